"""Decode steps over tensors that never move, so that a CUDA graph can replay them.

A decode step, one token for each of n sequences, is padded to the next of a few batch sizes. Its inputs are written
side by side into one pinned buffer and travel in one copy to fixed addresses; the graph of that size reads them there.
A token that the host does not know yet is -1 there, and the graph takes the one last sampled in the sequence's slot.

Rows of padding are harmless: they write no K and V (slot -1), read one key of some page, and their token goes to a slot
of its own, which no sequence has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from yalis.attention.base import AttentionBatch
from yalis.engine.cuda_graphs import CudaGraphs, GraphMemory
from yalis.engine.plain_draw import PlainDraw, temperature_of
from yalis.engine.scheduler import ScheduledStep
from yalis.utils.packing import Layout, host_buffer

# Below 8 decode costs little more than one row; above, buckets of 8 waste at most 7 rows.
_SMALL_SIZES = (1, 2, 4)
_SIZE_STEP = 8


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Batch sizes that get a graph: 1, 2, 4, 8, 16, 24, ... up to ``largest``, which is always one of them."""
    sizes = {*_SMALL_SIZES, *range(_SIZE_STEP, largest, _SIZE_STEP), largest}
    return tuple(sorted(size for size in sizes if size <= largest))


def size_for(sizes: Sequence[int], rows: int) -> int | None:
    """The least of ``sizes`` (ascending) that holds ``rows``, or None."""
    return next((size for size in sizes if size >= rows), None)


def is_decode(step: ScheduledStep) -> bool:
    """Whether every sequence of the step computes one token and samples the next."""
    return step.num_tokens == len(step.items) and all(item.samples and not item.scores_prompt for item in step.items)


@dataclass(frozen=True)
class StaticStep:
    """Inputs of decode steps of one padded size B, at fixed addresses.

    Attributes:
        size: B.
        token_ids: [B] int64; -1 where the token is only on the device.
        positions: [B] int64.
        slots: [B] int64, slots of the sequences; padding has the slot after the last.
        attention: lengths, block table and KV slots; the host's lengths are the longest possible.
        draw: temperature, seed and position of each row.
    """

    size: int
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    attention: AttentionBatch
    draw: PlainDraw


@dataclass(frozen=True)
class StaticOutput:
    """What a decode step leaves on the last stage, at fixed addresses until the next replay; nothing on the others.

    Attributes:
        raw_logits: [B, Vs].
        token_ids: [B] int64.
    """

    raw_logits: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None


class DecodeInputs:
    """The fixed inputs of decode steps of several sizes.

    The sizes share one device buffer, each with its own layout, so that whatever the size one contiguous copy fills it.
    The block table is apart: it is large and changes rarely, so only its changed entries travel.

    Args:
        sizes: batch sizes, ascending.
        num_slots: slots of sequences.
        max_blocks: most KV blocks of a sequence.
        block_size: tokens per KV block.
        device: where the tensors live.
    """

    def __init__(self, sizes: Sequence[int], *, num_slots: int, max_blocks: int, block_size: int, device: torch.device):
        self.sizes = tuple(sizes)
        self._num_slots = num_slots
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._device = device
        largest = self.sizes[-1]
        self._layouts = {size: _layout(size) for size in self.sizes}
        room = self._layouts[largest].nbytes + _update_layout(largest * max_blocks).nbytes
        self._buffer = torch.zeros(room, dtype=torch.uint8, device=device)
        self._table = torch.zeros((largest, max_blocks), dtype=torch.int32, device=device)
        # Whose blocks, and how many, each row of the table holds: (sequence, times preempted, blocks).
        self._rows: list[tuple[int, int, int]] = [(-1, 0, 0)] * largest
        self._static = {size: self._make_static(size) for size in self.sizes}

    def static(self, size: int) -> StaticStep:
        """The fixed tensors of steps of ``size``."""
        return self._static[size]

    def all(self) -> list[StaticStep]:
        """The fixed tensors of every size, the largest first."""
        return [self._static[size] for size in reversed(self.sizes)]

    def clear(self, size: int) -> StaticStep:
        """Fill the tensors of ``size`` with padding only, for runs that are to leave no trace."""
        return self._send(size, [], [])

    def fill(self, step: ScheduledStep) -> StaticStep:
        """Enqueue the copy of a decode step's inputs; the caller has made sure that a size holds it."""
        items = step.items
        size = size_for(self.sizes, len(items))
        assert size is not None, f"{len(items)} rows, largest size {self.sizes[-1]}"
        where: list[np.ndarray] = []
        blocks: list[np.ndarray] = []
        for row, item in enumerate(items):
            seq = item.seq
            table = seq.table.blocks
            owner, preempted, known = self._rows[row]
            if (owner, preempted) != (seq.seq_id, seq.num_preemptions):
                known = 0
            if known < len(table):
                start = row * self._max_blocks
                where.append(np.arange(start + known, start + len(table), dtype=np.int64))
                blocks.append(np.asarray(table[known:], np.int32))
                self._rows[row] = (seq.seq_id, seq.num_preemptions, len(table))
        return self._send(size, items, (where, blocks))

    def _send(self, size: int, items: Sequence[Any], updates: Any) -> StaticStep:
        layout = self._layouts[size]
        num_updates = sum(map(len, updates[0])) if updates else 0
        tail = _update_layout(num_updates)
        host = host_buffer(layout.nbytes + tail.nbytes, self._device)
        self._write(layout.arrays(host), items)
        if num_updates:
            arrays = tail.arrays(host[layout.nbytes :])
            np.concatenate(updates[0], out=arrays["where"])
            np.concatenate(updates[1], out=arrays["blocks"])
        self._buffer[: len(host)].copy_(host, non_blocking=True)
        if num_updates:
            arrived = tail.tensors(self._buffer[layout.nbytes :])
            self._table.view(-1).index_copy_(0, arrived["where"], arrived["blocks"])
        return self._static[size]

    def _write(self, arrays: dict[str, np.ndarray], items: Sequence[Any]) -> None:
        count, block_size = len(items), self._block_size
        starts = [item.start for item in items]
        arrays["token_ids"][:count] = [_known_token(item) for item in items]
        arrays["positions"][:count] = starts
        arrays["kv_slots"][:count] = [
            item.seq.table.blocks[start // block_size] * block_size + start % block_size
            for item, start in zip(items, starts, strict=True)
        ]
        arrays["slots"][:count] = [item.seq.slot for item in items]
        arrays["seeds"][:count] = [item.seq.seed for item in items]
        arrays["seq_lens"][:count] = [start + 1 for start in starts]
        arrays["temperature"][:count] = [temperature_of(item) for item in items]
        arrays["sample_positions"][:count] = [start + 1 for start in starts]
        for name, padding in _PADDING.items():
            arrays[name][count:] = self._num_slots if name == "slots" else padding

    def _make_static(self, size: int) -> StaticStep:
        views = self._layouts[size].tensors(self._buffer)
        return StaticStep(
            size=size,
            token_ids=views["token_ids"],
            positions=views["positions"],
            slots=views["slots"],
            attention=AttentionBatch(
                query_start=torch.arange(size + 1, dtype=torch.int32, device=self._device),
                seq_lens=views["seq_lens"],
                block_table=self._table[:size],
                slot_mapping=views["kv_slots"],
                query_lens_host=[1] * size,
                seq_lens_host=[self._max_blocks * self._block_size] * size,
            ),
            draw=PlainDraw(views["temperature"], views["seeds"], views["sample_positions"]),
        )


# What rows of padding hold; their slot is the one after the last.
_PADDING = {
    "token_ids": 0,
    "positions": 0,
    "kv_slots": -1,
    "slots": None,
    "seeds": 0,
    "sample_positions": 0,
    "seq_lens": 1,
    "temperature": 0.0,
}


def _layout(size: int) -> Layout:
    kinds = {"seq_lens": np.int32, "temperature": np.float32}
    return Layout({name: ((size,), kinds.get(name, np.int64)) for name in _PADDING})


def _update_layout(count: int) -> Layout:
    return Layout({"where": ((count,), np.int64), "blocks": ((count,), np.int32)})


def _known_token(item: Any) -> int:
    tokens: list[int] = item.seq.token_ids
    return tokens[item.start] if item.start < len(tokens) else -1


class DecodeSteps:
    """Runs decode steps of fixed sizes: as graph replays once `capture` was called, before that by calling ``body``.

    Args:
        inputs: the fixed inputs.
        body: the whole step from inputs to outputs; must do the same work whatever the values of its inputs.
        before: called with the inputs and the keys of each row that is no padding, before each run of ``body`` or
            replay, never within a graph: what a step needs from the host besides its inputs.
    """

    def __init__(
        self,
        inputs: DecodeInputs,
        body: Callable[[StaticStep], StaticOutput],
        before: Callable[[StaticStep, Sequence[int]], None],
    ):
        self.inputs = inputs
        self._body = body
        self._before = before
        self._graphs = CudaGraphs[int, StaticOutput]()

    @property
    def captured(self) -> list[int]:
        """The sizes that have a graph, ascending."""
        return sorted(self._graphs.sizes)

    def takes(self, step: ScheduledStep) -> bool:
        """Whether the step is a decode step of a size that was prepared."""
        return len(step.items) <= self.inputs.sizes[-1] and is_decode(step)

    def prepare(self, step: ScheduledStep) -> StaticStep:
        """Enqueue the copy of the inputs of a step that `takes` has found to fit, and what else it needs."""
        static = self.inputs.fill(step)
        self._before(static, [item.start + 1 for item in step.items])
        return static

    def run(self, static: StaticStep) -> StaticOutput:
        """Enqueue the step that `prepare` has prepared."""
        return self._graphs.replay(static.size) if static.size in self._graphs else self._body(static)

    def capture(self, memory: GraphMemory, on_graph: Callable[[], None] | None = None) -> None:
        """Capture one graph per size. Collective where ``body`` is.

        Args:
            on_graph: called after each graph.
        """
        for static in self.inputs.all():
            self._graphs.capture(static.size, partial(self._clear, static.size), partial(self._body, static), memory)
            if on_graph is not None:
                on_graph()

    def _clear(self, size: int) -> None:
        self._before(self.inputs.clear(size), [])

    def release(self) -> None:
        """Drop the graphs and their memory."""
        self._graphs.clear()
