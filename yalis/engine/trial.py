"""The largest steps that an engine may have to take, which no request asked for: run at start, they show what memory it
takes."""

from __future__ import annotations

from yalis.engine.request import Sequence
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.scheduler import ScheduledSequence, ScheduledStep
from yalis.kvcache.block_manager import BlockTable

# All that a request may ask for after the graph, at once; so much of the mass that no few candidates hold it.
_ALL_RULES = SamplingParams(temperature=1.0, top_p=1.0 - 1e-12, repetition_penalty=1.1, logprobs=20)


def imaginary_steps(
    most_tokens: int, most_padded: int, max_model_len: int, most_seqs: int, block_size: int
) -> list[ScheduledStep]:
    """The largest steps, which no request asked for: a prefill, one that is padded (the smallest there is if none
    is), a decode, and a decode under `_ALL_RULES`.

    The second has a sequence of one token beside its prompts where there is room: so what such steps need is compiled
    before stages of a pipeline wait for each other.
    """
    decode = [1] * most_seqs, [block_size - 1] * most_seqs, 1
    return [
        _imaginary_prefill(most_tokens, max_model_len, most_seqs, block_size),
        _imaginary_prefill(max(1, most_padded), max_model_len, most_seqs, block_size, decodes=1),
        _imaginary_step(*decode),
        _imaginary_step(*decode, params=_ALL_RULES),
    ]


def _imaginary_prefill(
    tokens: int, max_model_len: int, most_seqs: int, block_size: int, *, decodes: int = 0
) -> ScheduledStep:
    decodes = min(decodes, tokens - 1, most_seqs - 1)
    longest = min(tokens - decodes, max_model_len)
    whole, rest = divmod(tokens - decodes, longest)
    lengths = ([longest] * whole + [rest] * (rest > 0))[: most_seqs - decodes] + [1] * decodes
    return _imaginary_step(lengths, [0] * len(lengths), -(-longest // block_size))


def _imaginary_step(
    lengths: list[int], starts: list[int], blocks_each: int, *, params: SamplingParams | None = None
) -> ScheduledStep:
    """Sequence ``i`` computes ``lengths[i]`` tokens from ``starts[i]`` on."""
    params = params or SamplingParams(temperature=1.0)
    items = []
    for index, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        seq = Sequence(index, [0] * (start + length), start + length, params, 0, 1)
        seq.table = BlockTable(blocks=list(range(index * blocks_each, (index + 1) * blocks_each)))
        seq.slot = index
        items.append(ScheduledSequence(seq, start, length, True))
    return ScheduledStep(items, sum(lengths))
