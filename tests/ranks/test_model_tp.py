"""Tensor parallelism with real processes and the communicator, against transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import make_checkpoint, reference_logprobs
from tests.support.ranks import run_ranks
from tests.support.stepper import Stepper, logprobs, make_model
from yalis.comm.communicator import Communicator, init_distributed
from yalis.comm.topology import from_environment

VOCAB = 515
PROMPT = torch.randint(0, VOCAB, (24,), generator=torch.Generator().manual_seed(2)).tolist()
# Odd vocabulary, biases of row-parallel linears, tied embeddings, q/k norm, windows; two KV heads but for the last.
VARIANTS = ("llama-bias", "llama-tied", "qwen3", "mistral-window", "qwen2", "llama-mha")


def work(root: str, pipeline: bool) -> dict[str, torch.Tensor]:
    """Log-probabilities of the prompt for every variant: a chunk, another, then decode steps.

    With ``pipeline``, each rank runs both stages, one after the other.
    """
    torch.set_num_threads(1)
    topology = from_environment(os.environ)
    init_distributed(topology, "gloo", 30.0)
    found = {}
    with Communicator.create(topology, range(topology.world_size), timeout_s=30.0) as tp:
        for variant in VARIANTS:
            num_stages = 2 if pipeline else 1
            stages = [
                make_model(Path(root) / variant, tp=tp, stage=i, num_stages=num_stages) for i in range(num_stages)
            ]
            stepper = Stepper(stages)
            pieces = [PROMPT[:9], PROMPT[9:20], *([t] for t in PROMPT[20:])]
            shard = torch.cat([stepper.step({0: piece})[0] for piece in pieces])
            assert shard.shape[1] == stages[-1].vocab_shard_size == -(-VOCAB // tp.size)
            assert stages[-1].vocab_start == tp.rank * stages[-1].vocab_shard_size
            logits = tp.all_gather(shard, dim=-1)
            assert bool((logits[:, VOCAB:] == -torch.inf).all())
            found[variant] = logprobs(logits, VOCAB)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tp")
    for variant in VARIANTS:
        make_checkpoint(folder / variant, variant)
    return folder


@pytest.mark.parametrize(("size", "pipeline"), [(2, False), (4, True)], ids=["tp2", "tp4-two-stages"])
def test_sharded_models_equal_transformers(root: Path, size: int, pipeline: bool) -> None:
    """With four ranks the two KV heads are replicated."""
    results = run_ranks(work, size, str(root), pipeline, timeout_s=90, torch_store=True)
    for variant in VARIANTS:
        expected = reference_logprobs(root / variant, PROMPT)
        for result in results:
            torch.testing.assert_close(result.value[variant], expected, atol=1e-4, rtol=0)
            assert torch.equal(result.value[variant], results[0].value[variant])
