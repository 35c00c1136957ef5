"""An engine whose ranks are processes of the test's own, as under a launcher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.ranks import run_ranks
from yalis import LLM, SamplingParams
from yalis.engine.handle import Info
from yalis.engine.messages import EngineStats
from yalis.engine.outputs import RequestOutput

START_AND_RUN_S = 100.0


def generated(
    folder: Path,
    prompts: Sequence[str | list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    options: dict[str, Any],
) -> tuple[list[RequestOutput], Info, EngineStats]:
    """What rank 0 gives: outputs, what the engine is made of, its counters; the outputs of all ranks are the same."""
    ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    call = (str(folder), list(prompts), params, options)
    results = run_ranks(_generate, ranks, *call, timeout_s=START_AND_RUN_S, torch_store=True)
    (outputs, info, stats), *others = (result.value for result in results)
    for told, _, _ in others:
        assert [o.outputs for o in told] == [o.outputs for o in outputs]
    return outputs, info, stats


def _generate(
    folder: str,
    prompts: list[str | list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    options: dict[str, Any],
) -> tuple[list[RequestOutput], Info, EngineStats | None]:
    with LLM(folder, **options) as llm:
        return llm.generate(prompts, params), llm.info, llm.stats() if llm.is_root else None
