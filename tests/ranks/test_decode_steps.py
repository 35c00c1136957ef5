"""Steps of fixed size over several ranks: what a CUDA graph holds, called instead of captured, on CPU ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import hidden_states
from tests.support.checkpoints import DEMO
from tests.support.padded_native import pad_native
from tests.support.ranks import run_ranks
from yalis.config import EngineConfig
from yalis.engine.handle import LocalEngine, follow
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.start import start_rank

KINDS: list[dict[str, Any]] = [
    dict(temperature=0.0),
    dict(temperature=0.8, seed=3),
    dict(temperature=1.0, top_p=0.9, seed=4),
    dict(temperature=0.0, repetition_penalty=1.3, logprobs=2),
]
PROMPTS = [[5], [6, 7, 8], list(range(9, 29))]


def work(fixed_sizes: int, options: dict[str, Any]) -> Any:
    """The outputs of a few requests, and on every rank how many steps of each kind there were."""
    config = EngineConfig(str(DEMO), dtype="float32", device="cpu", max_model_len=64, cpu_threads=1, **options)
    rank = start_rank(config)
    runner = rank.core.runner
    if fixed_sizes:
        pad_native(runner.attention)
        runner.fixed.prepare_decode(fixed_sizes)
        runner.fixed.prepare_prefill(64)
    outputs: Any = []
    if rank.ranks.is_root:
        engine = LocalEngine(rank)
        for number in range(6):
            params = SamplingParams(**KINDS[number % 4], max_tokens=6 + 2 * number, ignore_eos=True, detokenize=False)
            engine.submit(str(number), PROMPTS[number % 3], params, stream=False)
        done = {}
        while engine.engine.has_unfinished_requests:
            done |= {output.request_id: output for output in engine.poll()}
        engine.publish_results([])
        outputs = [(o.outputs[0].token_ids, o.outputs[0].logprobs) for _, o in sorted(done.items())]
    else:
        follow(rank)
    rank.ranks.close()
    return outputs, runner.counts


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2, "overlap_scheduling": True},
        {"pipeline_parallel_size": 3, "max_num_seqs": 8},
    ],
    ids=str,
)
def test_fixed_sizes_change_nothing(options: dict[str, Any]) -> None:
    world = EngineConfig(str(DEMO), **options).world_size
    plain = [r.value for r in run_ranks(work, world, 0, options, timeout_s=50, torch_store=True)]
    fixed = [r.value for r in run_ranks(work, world, 6, options, timeout_s=50, torch_store=True)]
    tokens, logprobs = zip(*plain[0][0], strict=True)
    fixed_tokens, fixed_logprobs = zip(*fixed[0][0], strict=True)
    assert fixed_tokens == tokens
    assert fixed_logprobs == logprobs
    assert all((counts.decode, counts.padded) == (0, 0) for _, counts in plain)
    assert all(counts.decode >= 10 and counts.padded >= 1 and not counts.other for _, counts in fixed)


@pytest.mark.parametrize("algorithm", ["nvrar", "shm"])
def test_all_ranks_hold_the_same_bits(algorithm: str) -> None:
    options = {"device": "cpu", "dtype": "bfloat16", "cpu_threads": 1, "all_reduce": algorithm}
    first, second = (r.value for r in run_ranks(hidden_states.worker, 2, options, timeout_s=60, torch_store=True))
    assert first == second
    assert len(set(first.values())) >= 1 + len(hidden_states.BATCHES), "other batches, other states"
