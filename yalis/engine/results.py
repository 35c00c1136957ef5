"""What a step sampled, and how it travels from the last pipeline stage to the others: one flat int64 tensor.

Both ends derive the layout from the step itself, so no sizes travel. Every stage needs the tokens; only the first,
where rank 0 lives, gets the log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from yalis.engine.batch import PromptRows
from yalis.engine.sampler import SamplerOutput
from yalis.engine.scheduler import ScheduledSequence


@dataclass(frozen=True)
class ResultLayout:
    """What a step yields.

    Attributes:
        samplers: the scheduled ranges that sample, in step order.
        prompt_rows: ranges that have prompt tokens to score.
    """

    samplers: list[ScheduledSequence]
    prompt_rows: list[PromptRows]


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of prompt tokens: row ``i`` of ``output`` scores ``rows.targets[i]``."""

    rows: PromptRows
    output: SamplerOutput


@dataclass(frozen=True)
class Sampled:
    """What the last stage computed in one step.

    Attributes:
        output: one row per scheduled range that samples; None if there is none.
        prompt_scores: one per range that has prompt tokens to score.
    """

    output: SamplerOutput | None
    prompt_scores: list[PromptScores]

    def to_host(self) -> Sampled:
        """The same in host memory; from a GPU the copies are only enqueued, so wait for the stream before reading."""
        return Sampled(
            None if self.output is None else _output_to_host(self.output),
            [PromptScores(s.rows, _output_to_host(s.output)) for s in self.prompt_scores],
        )


def packed_size(results: ResultLayout, vocab_size: int, *, full: bool) -> int:
    """Elements of the tensor that `pack` makes for this step."""
    return sum(math.prod(shape) for shape, _ in _layout(results, vocab_size, full=full))


def pack(sampled: Sampled, *, full: bool) -> torch.Tensor:
    """Flatten: tokens, and with ``full`` everything else.

    Returns:
        [packed_size] int64.
    """
    parts: list[torch.Tensor] = []
    if sampled.output is not None:
        parts += _tensors(sampled.output) if full else [sampled.output.token_ids]
    if full:
        for scores in sampled.prompt_scores:
            parts += _tensors(scores.output)
    flat = [p.view(torch.int32).to(torch.int64).flatten() if p.is_floating_point() else p.flatten() for p in parts]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.int64)


def unpack(flat: torch.Tensor, results: ResultLayout, vocab_size: int, *, full: bool) -> Sampled:
    """The inverse of `pack` for the same step."""
    tensors = _split(flat, _layout(results, vocab_size, full=full))
    output = None
    if results.samplers:
        with_logprobs = full and _num_logprobs(results) is not None
        output = SamplerOutput(*(next(tensors) for _ in range(5 if with_logprobs else 1)))
    scores = []
    if full:
        scores = [PromptScores(rows, SamplerOutput(*(next(tensors) for _ in range(5)))) for rows in results.prompt_rows]
    return Sampled(output, scores)


def _layout(results: ResultLayout, vocab_size: int, *, full: bool) -> list[tuple[tuple[int, ...], bool]]:
    """(shape, is float) of each tensor, in the order of `SamplerOutput`'s fields."""
    layout: list[tuple[tuple[int, ...], bool]] = []
    if results.samplers:
        layout += _output_layout(len(results.samplers), _num_logprobs(results) if full else None, vocab_size)
    if full:
        for rows in results.prompt_rows:
            layout += _output_layout(len(rows.targets), rows.item.seq.params.prompt_logprobs, vocab_size)
    return layout


def _output_layout(rows: int, k: int | None, vocab_size: int) -> list[tuple[tuple[int, ...], bool]]:
    if k is None:
        return [((rows,), False)]
    top = (rows, min(k, vocab_size))
    return [((rows,), False), ((rows,), True), ((rows,), False), (top, False), (top, True)]


def _num_logprobs(results: ResultLayout) -> int | None:
    wanted = [i.seq.params.logprobs for i in results.samplers if i.seq.params.logprobs is not None]
    return max(wanted) if wanted else None


def _output_to_host(output: SamplerOutput) -> SamplerOutput:
    moved: list[Any] = [None if t is None else to_host(t) for t in (getattr(output, f.name) for f in fields(output))]
    return SamplerOutput(*moved)


def to_host(x: torch.Tensor) -> torch.Tensor:
    """``x`` in host memory; from a GPU only enqueued on the current stream, into pinned memory."""
    if not x.is_cuda:
        return x
    # Copies to pageable memory would wait for the device.
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _tensors(output: SamplerOutput) -> list[torch.Tensor]:
    fields = (output.token_ids, output.logprobs, output.ranks, output.top_token_ids, output.top_logprobs)
    return [f for f in fields if f is not None]


def _split(flat: torch.Tensor, layout: list[tuple[tuple[int, ...], bool]]) -> Iterator[torch.Tensor]:
    start = 0
    for shape, is_float in layout:
        piece = flat[start : start + math.prod(shape)].reshape(shape)
        start += piece.numel()
        yield piece.to(torch.int32).view(torch.float32) if is_float else piece
