"""Time to first token and time per output token of a batch of equal prompts."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yalis.bench.harness import percentile
from yalis.errors import ConfigError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

if TYPE_CHECKING:
    from yalis.engine.llm import LLM
    from yalis.engine.messages import EngineStats
    from yalis.engine.outputs import RequestOutput

PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True)
class LatencySamples:
    """Raw samples of a run, one per iteration, in seconds.

    Attributes:
        latency: from handing in the batch to its last token.
        ttft: mean over the batch of the time to the first token.
        tpot: (latency of a request - its TTFT) / (tokens - 1), mean over the batch; empty with one output token.
        first: from handing in the batch until every request has its first token.
        step: (time at which all have ended - time at which all have their first token) / (tokens - 1); empty likewise.
    """

    latency: list[float]
    ttft: list[float]
    tpot: list[float]
    first: list[float]
    step: list[float]


def measure(
    llm: LLM,
    *,
    batch_size: int,
    input_len: int,
    output_len: int,
    warmup: int,
    iters: int,
    seed: int = 0,
    profile: Path | None = None,
) -> tuple[LatencySamples, EngineStats]:
    """Generate ``output_len`` tokens for ``batch_size`` random prompts, ``warmup`` + ``iters`` times.

    Prompts differ between iterations, so that no prefix is reused.

    Args:
        profile: folder for a trace of each rank over one more, uncounted iteration.

    Returns:
        samples of the counted iterations, and the engine's counters over them; both empty on ranks other than 0 of a
        launch.
    """
    from yalis.engine.messages import EngineStats, StepTimes
    from yalis.engine.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    rng = random.Random(seed)
    if not llm.is_root:  # rank 0's prompts count, and only it has times
        for _ in range(warmup + iters):
            llm.generate([], params)
        if profile is not None:
            llm.start_profile(profile)
            llm.generate([], params)
            llm.stop_profile()
        return LatencySamples([], [], [], [], []), EngineStats(StepTimes(), 0, 0, 0, 0.0, 0, 0)
    vocab = int(llm.info["vocab_size"])
    samples = LatencySamples([], [], [], [], [])

    def random_prompts() -> list[Any]:
        return [[rng.randrange(vocab) for _ in range(input_len)] for _ in range(batch_size)]

    for iteration in range(warmup + iters):
        prompts = random_prompts()
        if iteration == warmup:
            llm.stats(reset=True)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params)
        elapsed = time.perf_counter() - started
        _check(outputs, output_len)
        if iteration < warmup:
            continue
        samples.latency.append(elapsed)
        samples.ttft.append(statistics.fmean(o.metrics.ttft_s or 0.0 for o in outputs))
        metrics = [o.metrics for o in outputs]
        arrived = min(m.arrival_s for m in metrics)
        all_first = max(m.first_token_s or 0.0 for m in metrics)
        samples.first.append(all_first - arrived)
        if output_len > 1:
            samples.step.append((max(m.finished_s or 0.0 for m in metrics) - all_first) / (output_len - 1))
            samples.tpot.append(statistics.fmean(o.metrics.tpot_s or 0.0 for o in outputs))
    stats = llm.stats()
    if profile is not None:
        llm.start_profile(profile)
        llm.generate(random_prompts(), params)
        trace = llm.stop_profile()
        logger.info("rank 0's trace: %s", trace)
    return samples, stats


@dataclass(frozen=True)
class Shape:
    """One cell of a table: so many prompts of so many tokens, continued by so many."""

    batch_size: int
    input_len: int
    output_len: int

    @property
    def name(self) -> str:
        """As ``"8x512+129"``."""
        return f"{self.batch_size}x{self.input_len}+{self.output_len}"


# What engines are commonly compared by: the time of a decode step at three batch sizes, from the 1st to the 129th
# token, and the time until all of a batch of long prompts have their first token.
DECODE_SHAPES = tuple(Shape(batch, 512, 129) for batch in (1, 8, 32))
PREFILL_SHAPES = tuple(Shape(batch, 2048, 1) for batch in (1, 8))


@dataclass(frozen=True)
class Cell:
    """A measured `Shape`: samples in seconds, and the engine's counters over them."""

    shape: Shape
    samples: LatencySamples
    stats: EngineStats

    @property
    def value(self) -> list[float]:
        """What the table shows: time per decode step, or with one output token the time to all first tokens."""
        return self.samples.step or self.samples.first


def measure_table(
    llm: LLM,
    *,
    warmup: int,
    iters: int,
    seed: int = 0,
    shapes: Sequence[Shape] = DECODE_SHAPES + PREFILL_SHAPES,
    profile: Path | None = None,
) -> list[Cell]:
    """`measure` for every shape, in one engine; traces go into a folder per shape."""
    cells = []
    for number, shape in enumerate(shapes):
        folder = None if profile is None else profile / shape.name
        samples, stats = measure(llm, **asdict(shape), warmup=warmup, iters=iters, seed=seed + number, profile=folder)
        cells.append(Cell(shape, samples, stats))
    return cells


def _check(outputs: Sequence[RequestOutput], output_len: int) -> None:
    for output in outputs:
        if output.error is not None:
            raise ConfigError(f"the benchmark's prompts were refused: {output.error}")
        got = len(output.outputs[0].token_ids)
        if got != output_len:
            raise ConfigError(f"a request ended after {got} of {output_len} tokens; the numbers would mean nothing")


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Mean, extremes and percentiles of samples in seconds, in milliseconds; empty for no samples."""
    if not samples:
        return {}
    values = {"mean": statistics.fmean(samples), "min": min(samples), "max": max(samples)}
    values |= {f"p{p}": percentile(samples, p / 100) for p in PERCENTILES}
    return {name: 1e3 * value for name, value in values.items()}
