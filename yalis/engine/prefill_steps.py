"""Steps with prompts, padded to a few sizes over tensors that never move, so that a CUDA graph can replay them.

Launched kernel by kernel, a short prompt is bound by the host: on two H100 an 8B model's 16 to 400 tokens take three to
ten times as long as replayed (docs/results/gpu-engine-two.md). Long steps hide their launches, so only sizes up to a
limit are padded.

A size has room for tokens and for sequences of two kinds: prompts, with any number of query tokens, and decodes, with
one. Padding is harmless: its rows write no K and V (slot -1) and are read by nobody, and sequences that are not there
have no tile and no place in the backend's list of decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from yalis.attention.base import AttentionBatch
from yalis.engine.cuda_graphs import CudaGraphs, GraphMemory
from yalis.engine.scheduler import ScheduledStep
from yalis.utils.packing import Layout, host_buffer, send

# Products of up to 128 rows fill one tile of a matrix unit's work; from there on a part of a tile costs a whole one.
_SMALL_SIZES = (16, 32, 64)
_LEAST_TOKENS = 2
_SIZE_STEP = 128
_DECODES = (0, 16, 64, 256)
# Above so many tokens idle programs for decodes that are not there cost nothing to speak of (2 us a layer): one size
# does for all, and each graph saved is memory for the KV cache.
_FEW_TOKENS = 512
# Tokens for each prompt that a size has room for. More, shorter prompts at once run kernel by kernel.
_TOKENS_A_PROMPT = 16


@dataclass(frozen=True, order=True)
class PaddedSize:
    """Room of a step.

    Attributes:
        tokens: T.
        decodes: most sequences with one query token.
        prompts: most other sequences.
    """

    tokens: int
    decodes: int
    prompts: int

    @property
    def sequences(self) -> int:
        """B: decodes and prompts."""
        return self.decodes + self.prompts

    def holds(self, tokens: int, decodes: int, prompts: int) -> bool:
        """Whether there is room."""
        return tokens <= self.tokens and decodes <= self.decodes and prompts <= self.prompts


def padded_tokens(tokens: int, most_tokens: int) -> int:
    """Tokens that a step of so many is padded to; itself above ``most_tokens``, where nothing is padded."""
    if tokens > most_tokens:
        return tokens
    return min(size for size in _token_sizes(most_tokens) if size >= tokens)


def _token_sizes(most_tokens: int) -> set[int]:
    steps = {*_SMALL_SIZES, *range(_SIZE_STEP, most_tokens, _SIZE_STEP), most_tokens}
    return {tokens for tokens in steps if _LEAST_TOKENS <= tokens <= most_tokens}


def padded_sizes(most_tokens: int, most_sequences: int) -> tuple[PaddedSize, ...]:
    """Sizes that get a graph, ascending: 16, 32, 64, 128, 256, 384, ... up to ``most_tokens``, which is always one of
    them, each with room for as many decodes as there can be beside a prompt, small ones also without and for 16, 64
    and 256."""
    every = most_sequences if most_sequences > 1 else 0
    sizes = []
    for tokens in _token_sizes(most_tokens):
        # The least prompt has two tokens: one of a single token is a decode.
        most = min(every, tokens - 2)
        for decodes in {n for n in _DECODES if n < most and tokens <= _FEW_TOKENS} | {most}:
            prompts = min(most_sequences, max(1, tokens // _TOKENS_A_PROMPT), (tokens - decodes) // 2)
            sizes.append(PaddedSize(tokens, decodes, prompts))
    return tuple(sorted(sizes))


@dataclass(frozen=True)
class PaddedStep:
    """Inputs of steps of one size, at fixed addresses.

    Attributes:
        size: T tokens of B sequences.
        token_ids, positions: [T] int64.
        rows: [B] int64, rows whose final hidden states are wanted.
        attention: of the step; the host's lengths are the longest possible.
        hidden_in: [T, hidden], where ``body`` puts what comes from the stage before; None on the first.
    """

    size: PaddedSize
    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    attention: AttentionBatch
    hidden_in: torch.Tensor | None


class PaddedInputs:
    """The fixed inputs of steps of several sizes, which share one buffer, each with its own layout.

    Args:
        sizes: ascending.
        max_blocks: most KV blocks of a sequence.
        block_size: tokens per KV block.
        hidden: [largest T, hidden] for what comes from the stage before; None on the first.
        device: where the tensors live.
    """

    def __init__(
        self,
        sizes: Sequence[PaddedSize],
        *,
        max_blocks: int,
        block_size: int,
        hidden: torch.Tensor | None,
        device: torch.device,
    ):
        self.sizes = tuple(sizes)
        self._device = device
        self._longest = max_blocks * block_size
        self._hidden = hidden
        self._layouts = {size: _layout(size) for size in self.sizes}
        room = max(layout.nbytes for layout in self._layouts.values())
        self._buffer = torch.zeros(room, dtype=torch.uint8, device=device)
        sequences = max(size.sequences for size in self.sizes)
        self._table = torch.zeros((sequences, max_blocks), dtype=torch.int32, device=device)
        self._static = {size: self._make_static(size) for size in self.sizes}

    def static(self, size: PaddedSize) -> PaddedStep:
        """The fixed tensors of steps of ``size``."""
        return self._static[size]

    def all(self) -> list[PaddedStep]:
        """The fixed tensors of every size, the largest first."""
        return [self._static[size] for size in reversed(self.sizes)]

    def clear(self, size: PaddedSize) -> None:
        """Fill the tensors of ``size`` with padding only, for runs that are to leave no trace."""
        nothing: dict[str, np.ndarray] = {
            name: np.zeros(int(name == "query_start"), kind) for name, (_, kind) in _shapes(size).items()
        }
        self._fill(size, nothing)

    def send(self, size: PaddedSize, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Enqueue the copies of a step's arrays, as `yalis.engine.batch.prepare_batch` names them, and return them as
        tensors: those of `PaddedStep` at their fixed addresses, without padding."""
        fixed = self._fill(size, arrays)
        rest = send({name: array for name, array in arrays.items() if name not in fixed}, self._device)
        table = rest["block_table"]
        self._table[: table.shape[0], : table.shape[1]].copy_(table)
        return rest | fixed

    def _fill(self, size: PaddedSize, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        layout = self._layouts[size]
        host = host_buffer(layout.nbytes, self._device)
        for name, whole in layout.arrays(host).items():
            count = len(arrays[name])
            whole[:count] = arrays[name]
            # Sequences that are not there begin behind the last token and have none.
            whole[count:] = arrays[name][-1] if name == "query_start" else _PADDING[name]
        self._buffer[: len(host)].copy_(host, non_blocking=True)
        return {name: view[: len(arrays[name])] for name, view in layout.tensors(self._buffer).items()}

    def _make_static(self, size: PaddedSize) -> PaddedStep:
        views = self._layouts[size].tensors(self._buffer)
        return PaddedStep(
            size=size,
            token_ids=views["token_ids"],
            positions=views["positions"],
            rows=views["sample_rows"],
            attention=AttentionBatch(
                query_start=views["query_start"],
                seq_lens=views["seq_lens"],
                block_table=self._table[: size.sequences],
                slot_mapping=views["slot_mapping"],
                query_lens_host=[size.tokens] * size.prompts + [1] * size.decodes,
                seq_lens_host=[self._longest] * size.sequences,
            ),
            hidden_in=None if self._hidden is None else self._hidden[: size.tokens],
        )


# What tensors hold where there is no token or sequence.
_PADDING = {"token_ids": 0, "positions": 0, "slot_mapping": -1, "sample_rows": 0, "seq_lens": 1, "query_start": None}


def _shapes(size: PaddedSize) -> dict[str, tuple[tuple[int, ...], type]]:
    """Of the arrays that graphs read, by the names that `yalis.engine.batch.prepare_batch` gives them."""
    return {
        "token_ids": ((size.tokens,), np.int64),
        "positions": ((size.tokens,), np.int64),
        "slot_mapping": ((size.tokens,), np.int64),
        "sample_rows": ((size.sequences,), np.int64),
        "seq_lens": ((size.sequences,), np.int32),
        "query_start": ((size.sequences + 1,), np.int32),
    }


def _layout(size: PaddedSize) -> Layout:
    return Layout(_shapes(size))


class PrefillSteps:
    """Runs padded steps: as graph replays once `capture` was called, before that by calling ``body``.

    Args:
        inputs: the fixed inputs.
        body: from inputs to the final hidden states of ``rows``, None on stages before the last; must do the same work
            whatever the values of its inputs.
        before: called with the inputs, query tokens and keys of each sequence that is there, before each run of
            ``body`` or replay, never within a graph: what a step needs from the host besides its inputs.
    """

    def __init__(
        self,
        inputs: PaddedInputs,
        body: Callable[[PaddedStep], torch.Tensor | None],
        before: Callable[[PaddedStep, Sequence[int], Sequence[int]], None],
    ):
        self.inputs = inputs
        self._body = body
        self._before = before
        self._graphs = CudaGraphs[PaddedSize, torch.Tensor | None]()

    @property
    def captured(self) -> list[int]:
        """Numbers of tokens that have a graph, ascending."""
        return sorted({size.tokens for size in self._graphs.sizes})

    def fitting(self, step: ScheduledStep) -> PaddedSize | None:
        """The least size that holds ``step``; None where there is none, or where prompt tokens are scored: scores need
        the hidden states of all rows."""
        if step.num_tokens > self.inputs.sizes[-1].tokens:
            return None
        if any(item.scores_prompt for item in step.items):
            return None
        decodes = sum(item.num_tokens == 1 for item in step.items)
        prompts = len(step.items) - decodes
        return next((size for size in self.inputs.sizes if size.holds(step.num_tokens, decodes, prompts)), None)

    def run(self, size: PaddedSize, attention: AttentionBatch) -> torch.Tensor | None:
        """Enqueue the step whose inputs `PaddedInputs.send` has sent.

        Args:
            attention: of the step, for the lengths on the host.

        Returns:
            what ``body`` returns, padding included; valid until the next run.
        """
        static = self.inputs.static(size)
        self._before(static, attention.query_lens_host, attention.seq_lens_host)
        return self._graphs.replay(size) if size in self._graphs else self._body(static)

    def capture(self, memory: GraphMemory, on_graph: Callable[[], None] | None = None) -> None:
        """Capture one graph per size. Collective where ``body`` is.

        Args:
            on_graph: called after each graph.
        """
        for static in self.inputs.all():
            self._graphs.capture(static.size, partial(self._clear, static), partial(self._body, static), memory)
            if on_graph is not None:
                on_graph()

    def _clear(self, static: PaddedStep) -> None:
        self.inputs.clear(static.size)
        self._before(static, [], [])

    def release(self) -> None:
        """Drop the graphs and their memory."""
        self._graphs.clear()
