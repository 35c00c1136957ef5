"""Offline throughput: many requests at once, of lengths drawn at random, as fast as the engine can."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yalis.errors import ConfigError

if TYPE_CHECKING:
    from yalis.engine.llm import LLM
    from yalis.engine.messages import EngineStats


@dataclass(frozen=True)
class Workload:
    """Prompts of random tokens and the output length of each.

    Attributes:
        prompts: token ids.
        output_lens: tokens to generate.
    """

    prompts: list[list[int]]
    output_lens: list[int]

    @classmethod
    def uniform(cls, count: int, *, low: int, high: int, vocab_size: int, seed: int) -> Workload:
        """``count`` requests with input and output lengths uniform in ``low .. high``."""
        rng = random.Random(seed)
        prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(low, high))] for _ in range(count)]
        return cls(prompts, [rng.randint(low, high) for _ in range(count)])

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        """Tokens of all outputs."""
        return sum(self.output_lens)


@dataclass(frozen=True)
class Throughput:
    """One run over a `Workload`: wall seconds, and the engine's counters over it."""

    seconds: float
    stats: EngineStats


def measure(llm: LLM, workload: Workload, *, warmup: int = 4) -> Throughput | None:
    """Run the workload once, after ``warmup`` of its requests alone. Collective in a launch; None but on rank 0.

    Raises:
        ConfigError: a request was refused or ended early, so the number would mean nothing.
    """
    from yalis.engine.sampling_params import SamplingParams

    def run(count: int) -> float:
        prompts: list[Any] = list(workload.prompts[:count])
        params = [
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
            for length in workload.output_lens[:count]
        ]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params) if llm.is_root else llm.generate([], [])
        seconds = time.perf_counter() - started
        for output, length in zip(outputs, workload.output_lens, strict=False):
            if output.error is not None:
                raise ConfigError(f"the benchmark's prompts were refused: {output.error}")
            if len(output.outputs[0].token_ids) != length:
                raise ConfigError(f"a request ended after {len(output.outputs[0].token_ids)} of {length} tokens")
        return seconds

    run(warmup)
    if llm.is_root:
        llm.stats(reset=True)
    seconds = run(len(workload.prompts))
    return Throughput(seconds, llm.stats()) if llm.is_root else None
