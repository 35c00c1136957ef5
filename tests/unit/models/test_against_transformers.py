"""Log-probabilities against transformers, on random checkpoints of every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import VARIANTS, reference_logprobs
from tests.support.stepper import Stepper, logprobs, make_model
from yalis.errors import ConfigError

VOCAB = 515
PROMPT = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

Checkpoint = Callable[..., Path]


def chunked(stepper: Stepper, tokens: list[int]) -> torch.Tensor:
    """Two chunks of prefill, then decode steps."""
    pieces = [tokens[:13], tokens[13:30], *([t] for t in tokens[30:])]
    return torch.cat([stepper.step({0: piece})[0] for piece in pieces])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs(checkpoint: Checkpoint, variant: str, dtype: torch.dtype) -> None:
    folder = checkpoint(variant, dtype=dtype)
    expected = reference_logprobs(folder, PROMPT, dtype)
    for backend in ("native", "sdpa"):
        model = make_model(folder, backend=backend, dtype=dtype)
        once = logprobs(Stepper([model]).step({0: PROMPT})[0], VOCAB)
        torch.testing.assert_close(once, expected, atol=TOLERANCE[dtype], rtol=0)
        steps = logprobs(chunked(Stepper([model]), PROMPT), VOCAB)
        torch.testing.assert_close(steps, expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("variant", ["llama-tied", "mistral-window", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_one_after_the_other(checkpoint: Checkpoint, variant: str, num_stages: int) -> None:
    folder = checkpoint(variant)
    stages = [make_model(folder, stage=i, num_stages=num_stages) for i in range(num_stages)]
    assert [i for stage in stages for i in stage.layers_of_stage] == list(range(4))
    got = logprobs(chunked(Stepper(stages), PROMPT), VOCAB)
    torch.testing.assert_close(got, reference_logprobs(folder, PROMPT), atol=1e-4, rtol=0)


def test_several_files(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen3", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    got = logprobs(Stepper([make_model(folder)]).step({0: PROMPT})[0], VOCAB)
    torch.testing.assert_close(got, reference_logprobs(folder, PROMPT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_sequences_of_a_batch_do_not_mix(checkpoint: Checkpoint, backend: str) -> None:
    """Prefills, a chunk and decodes in one ragged batch give what each sequence gives alone."""
    folder = checkpoint("mistral-window")
    model = make_model(folder, backend=backend)
    prompts = [PROMPT, PROMPT[5:22], PROMPT[17:18], PROMPT[20:37]]
    stepper = Stepper([model], num_sequences=4)
    got: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}
    taken = [0, 0, 0, 0]
    # sequence -> number of tokens, step by step
    for step in ({0: 20, 1: 16}, {1: 1, 2: 1, 0: 3}, {3: 16, 0: 1}, {0: 16, 3: 1}):
        new = {i: prompts[i][taken[i] : taken[i] + n] for i, n in step.items()}
        for i, logits in stepper.step(new).items():
            taken[i] += len(new[i])
            got[i].append(logits)
    for i, prompt in enumerate(prompts):
        expected = reference_logprobs(folder, prompt)
        torch.testing.assert_close(logprobs(torch.cat(got[i]), VOCAB), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_rows_that_nobody_reads_change_nothing(checkpoint: Checkpoint, num_stages: int) -> None:
    """The last layer leaves them out behind its attention; what is read, now and by later steps, stays as it is."""
    folder = checkpoint("qwen3")
    stages = [make_model(folder, stage=i, num_stages=num_stages) for i in range(num_stages)]
    steps = [{0: PROMPT[:9], 1: PROMPT[3:8]}, {0: PROMPT[9:20], 1: PROMPT[8:9]}, {0: PROMPT[20:21], 1: PROMPT[9:10]}]
    whole, some = Stepper(stages, num_sequences=2), Stepper(stages, num_sequences=2)
    for step, rows in zip(steps, ([13, 8], [], [1]), strict=True):
        assert torch.equal(some.hidden(step, rows), whole.hidden(step)[rows])


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("mistral-window", {"sliding_window": 10}),
        ("qwen2-window", {"max_window_layers": 3}),
        ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("llama", {"rms_norm_eps": 1e-2}),
    ],
)
def test_the_comparison_can_fail(checkpoint: Checkpoint, variant: str, changes: dict[str, object]) -> None:
    """A config that is slightly wrong is far outside the tolerance."""
    import json

    folder = checkpoint(variant, seed=7)
    expected = reference_logprobs(folder, PROMPT)
    raw = json.loads((folder / "config.json").read_text())
    wrong = {**raw, **changes}
    if "max_window_layers" in changes:
        wrong.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(wrong))
    try:
        got = logprobs(Stepper([make_model(folder)]).step({0: PROMPT})[0], VOCAB)
    finally:
        (folder / "config.json").write_text(json.dumps(raw))
    assert (got - expected).abs().max() > 5e-4


def test_longer_than_the_model_is_refused(checkpoint: Checkpoint) -> None:
    import dataclasses

    model = make_model(checkpoint("llama"), load=False)
    context = dataclasses.replace(model.context, max_model_len=257)
    with pytest.raises(ConfigError, match=r"max_model_len=257 exceeds.*256"):
        type(model)(model.config, context)
