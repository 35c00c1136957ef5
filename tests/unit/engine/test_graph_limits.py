"""Which steps get CUDA graphs, and that all ranks have the same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from yalis.config import EngineConfig
from yalis.engine.cuda_graphs import GraphLimits
from yalis.engine.start import _agree_graphs
from yalis.errors import ConfigError


def agree(others: Callable[[int], int], *, cannot: tuple[str, ...] = (), device: str = "cuda", **options: Any) -> Any:
    """What a rank captures whose backend cannot hold some kinds of steps, and whose peers have ``others(own)``."""
    runner: Any = SimpleNamespace(
        device=torch.device(device),
        resolved=SimpleNamespace(user=EngineConfig("model", **options)),
        attention=SimpleNamespace(
            name="other", captures_prompts="prompts" not in cannot, capturable="decodes" not in cannot
        ),
        tp=SimpleNamespace(uncapturable=("slow",) if "all-reduce" in cannot else ()),
    )
    return _agree_graphs(runner, others)


def alone(value: int) -> int:
    return value


def test_by_default_what_can_be_captured() -> None:
    assert agree(alone) == GraphLimits(256, 2048)
    assert agree(alone, max_num_batched_tokens=300) == GraphLimits(256, 300)
    assert agree(alone, max_num_batched_tokens=1, max_num_seqs=1) == GraphLimits(256, 0)
    assert agree(alone, cannot=("prompts",)) == GraphLimits(256, 0)
    assert agree(alone, cannot=("prompts", "decodes")) == GraphLimits(0, 0)
    assert agree(alone, cannot=("all-reduce",)) == GraphLimits(0, 0)
    assert agree(alone, enforce_eager=True) == agree(alone, device="cpu") == GraphLimits(0, 0)


def test_what_was_asked_for() -> None:
    assert agree(alone, max_cudagraph_batch=8, max_cudagraph_prefill=0) == GraphLimits(8, 0)
    with pytest.raises(
        ConfigError, match="max_cudagraph_prefill=64: attention backend .* cannot attend to prompts .*; leave it out"
    ):
        agree(alone, cannot=("prompts",), max_cudagraph_prefill=64)


def test_the_least_of_all_ranks(caplog: pytest.LogCaptureFixture) -> None:
    assert agree(lambda value: min(value, 100)) == GraphLimits(100, 100)
    assert "max_cudagraph_prefill lowered from 2048 to 100: another rank has no more" in caplog.text
    with pytest.raises(ConfigError, match="max_cudagraph_batch=8: another rank takes 0, and all must have the same"):
        agree(lambda value: 0, max_cudagraph_batch=8)
