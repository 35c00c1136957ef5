"""Two-shot all-reduce of long messages between GPUs that map each other's memory: scatter, reduce, finish.

All ranks must meet between `scatter` and `reduce` and between `reduce` and `finish`; who sees to that, and why two
meetings suffice, is in docs/communicator.md. A message is divided over the ranks in whole *units* (rows with a norm,
else groups of elements), as by `yalis.comm.shards.shard_bounds`.

The memory of each rank has two halves of ``ranks - 1`` slots each: what the others send of this rank's shard, and the
others' finished shards. The slot of sender s at receiver t is (s - t - 1) modulo ranks. Slots are as large as the
largest shard, so they lie elsewhere in every call; the halves never move, as a rank may still read one of the call
before while the other is written.

Kernels are launched the ordinary way: each sees everything before it, and what it stored at a peer is there when it
ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Elements of a program that copies or sums: 16 bytes for each of 256 threads, twice (bf16).
_BLOCK = 4096


@dataclass(frozen=True)
class Exchange:
    """How one message is divided, the same on every rank, and where this rank finds what.

    Attributes:
        rank, ranks: this one's place, and how many there are.
        bases: [ranks] int64 on the device, where this rank sees every rank's memory.
        staged: this rank's memory, in the message's dtype, 1-D; half of it holds ``ranks - 1`` slots.
        unit: elements that stay together, a multiple of 16.
        units: of the message.
        count: elements of the message; with whole units ``units * unit``.
    """

    rank: int
    ranks: int
    bases: torch.Tensor
    staged: torch.Tensor
    unit: int
    units: int
    count: int

    @property
    def room(self) -> int:
        """Elements of a slot: the largest shard."""
        return -(-self.units // self.ranks) * self.unit

    @property
    def half(self) -> int:
        """Elements of a half of the memory."""
        return self.staged.numel() // 2

    @property
    def clipped(self) -> bool:
        """Whether the last unit is not whole."""
        return self.count != self.units * self.unit


@triton.jit
def _shard(index, units, RANKS: tl.constexpr):
    """First unit of shard ``index``, and how many it has."""
    base = units // RANKS
    extra = units % RANKS
    return base * index + tl.minimum(index, extra), base + (index < extra).to(tl.int32)


@triton.jit
def _elements(first, many, count, UNIT: tl.constexpr, CLIPPED: tl.constexpr):
    """First element of so many units from ``first`` on, and how many they are."""
    start = first.to(tl.int64) * UNIT
    length = many * UNIT
    if CLIPPED:  # the compiler no longer knows that lengths are multiples: slower
        length = tl.maximum(tl.minimum(start + length, count) - start, 0).to(tl.int32)
    return start, length


@triton.jit
def _slot(sender, receiver, room, RANKS: tl.constexpr):
    """Where in a half of the receiver's memory the sender's slot begins."""
    return ((sender - receiver - 1 + RANKS) % RANKS) * room.to(tl.int64)


@triton.jit
def _memory_of(bases, rank, DTYPE: tl.constexpr):
    """Where a rank's memory begins, aligned as allocations are."""
    return tl.multiple_of(tl.load(bases + rank).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _sum(x, staged, here, at, inside, room, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Sum over the ranks in their order, in fp32, rounded; the first term starts it, so a sum of -0 is -0."""
    for sender in tl.static_range(RANKS):
        if sender == RANK:
            term = tl.load(x + here, mask=inside, other=0)
        else:
            term = tl.load(staged + _slot(sender, RANK, room, RANKS) + at, mask=inside, other=0)
        if sender == 0:
            total = term.to(tl.float32)
        else:
            total += term.to(tl.float32)
    return total.to(x.dtype.element_ty)


@triton.jit
def _to_others(found, bases, at, inside, room, half, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Store a part of this rank's finished shard into every other rank's memory."""
    for step in tl.static_range(1, RANKS):  # each rank begins with another
        to = (RANK + step) % RANKS
        there = _memory_of(bases, to, found.dtype) + half + _slot(RANK, to, room, RANKS)
        tl.store(there + at, found, mask=inside)


@triton.jit
def _norm(total, gain, eps, UNIT: tl.constexpr):
    """RMS norm of a row, padded with zeros, times ``gain`` in fp32."""
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / UNIT + eps)
    return ((wide * scale).to(total.dtype).to(tl.float32) * gain).to(total.dtype)


# Counts are left alone: Triton would take a count of 1 for a constant.
@triton.jit(do_not_specialize=["units", "count"])
def _two_shot_scatter(
    x, bases, units, count, room,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    to = (RANK + 1 + tl.program_id(1)) % RANKS
    first, many = _shard(to, units, RANKS)
    start, length = _elements(first, many, count, UNIT, CLIPPED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = _memory_of(bases, to, x.dtype.element_ty) + _slot(RANK, to, room, RANKS)
    tl.store(there + at, tl.load(x + start + at, mask=at < length), mask=at < length)


@triton.jit(do_not_specialize=["units", "count"])
def _two_shot_reduce(
    x, out, staged, bases, units, count, room, half,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, many = _shard(RANK, units, RANKS)
    start, length = _elements(first, many, count, UNIT, CLIPPED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    found = _sum(x, staged, start + at, at, inside, room, RANK, RANKS)
    tl.store(out + start + at, found, mask=inside)
    _to_others(found, bases, at, inside, room, half, RANK, RANKS)


@triton.jit(do_not_specialize=["units", "count"])
def _two_shot_finish(
    out, staged, units, count, room, half,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sender = (RANK + 1 + tl.program_id(1)) % RANKS
    first, many = _shard(sender, units, RANKS)
    start, length = _elements(first, many, count, UNIT, CLIPPED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(staged + half + _slot(sender, RANK, room, RANKS) + at, mask=at < length)
    tl.store(out + start + at, found, mask=at < length)


@triton.jit(do_not_specialize=["units"])
def _two_shot_reduce_norm(
    x, residual, weight, staged, bases, units, room, half, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first, many = _shard(RANK, units, RANKS)
    if row < many:
        columns = tl.arange(0, BLOCK)
        inside = columns < UNIT
        at = row.to(tl.int64) * UNIT + columns
        here = first.to(tl.int64) * UNIT + at
        gain = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
        held = tl.load(residual + here, mask=inside, other=0)
        found = _sum(x, staged, here, at, inside, room, RANK, RANKS)
        total = (found.to(tl.float32) + held.to(tl.float32)).to(found.dtype)
        _to_others(total, bases, at, inside, room, half, RANK, RANKS)
        tl.store(residual + here, total, mask=inside)
        tl.store(x + here, _norm(total, gain, eps, UNIT), mask=inside)


@triton.jit(do_not_specialize=["units"])
def _two_shot_finish_norm(
    x, residual, weight, staged, units, room, half, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sender = (RANK + 1 + tl.program_id(1)) % RANKS
    first, many = _shard(sender, units, RANKS)
    if row < many:
        columns = tl.arange(0, BLOCK)
        inside = columns < UNIT
        at = row.to(tl.int64) * UNIT + columns
        here = first.to(tl.int64) * UNIT + at
        gain = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
        total = tl.load(staged + half + _slot(sender, RANK, room, RANKS) + at, mask=inside, other=0)
        tl.store(residual + here, total, mask=inside)
        tl.store(x + here, _norm(total, gain, eps, UNIT), mask=inside)


def scatter(x: torch.Tensor, exchange: Exchange) -> None:
    """Store this rank's part of every other rank's shard into that rank's memory. ``x``: contiguous."""
    e = exchange
    _two_shot_scatter[(triton.cdiv(e.room, _BLOCK), e.ranks - 1)](
        x, e.bases, e.units, e.count, e.room,
        RANK=e.rank, RANKS=e.ranks, UNIT=e.unit, CLIPPED=e.clipped, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def reduce(x: torch.Tensor, out: torch.Tensor, exchange: Exchange) -> None:
    """Sum this rank's shard in fp32 and in rank order, round, store into ``out`` and into every other rank's memory.

    Both contiguous; ``out`` may be ``x``.
    """
    e = exchange
    _two_shot_reduce[(triton.cdiv(e.room, _BLOCK),)](
        x, out, e.staged, e.bases, e.units, e.count, e.room, e.half,
        RANK=e.rank, RANKS=e.ranks, UNIT=e.unit, CLIPPED=e.clipped, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def finish(out: torch.Tensor, exchange: Exchange) -> None:
    """Take the other ranks' shards into ``out``."""
    e = exchange
    _two_shot_finish[(triton.cdiv(e.room, _BLOCK), e.ranks - 1)](
        out, e.staged, e.units, e.count, e.room, e.half,
        RANK=e.rank, RANKS=e.ranks, UNIT=e.unit, CLIPPED=e.clipped, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def reduce_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, exchange: Exchange) -> None:
    """As `reduce`, but the sum is added to this rank's rows of ``residual``, which are handed on; their norm: ``x``.

    Units must be rows: [units, unit], contiguous. Roundings as `yalis.kernels.ops.add_rms_norm`.
    """
    e = exchange
    _two_shot_reduce_norm[(e.room // e.unit,)](
        x, residual, weight, e.staged, e.bases, e.units, e.room, e.half, eps, RANK=e.rank, RANKS=e.ranks, **_row(e.unit)
    )


def finish_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, exchange: Exchange) -> None:
    """Take the other ranks' rows into ``residual``, their RMS norm times ``weight`` into ``x``. As `reduce_norm`."""
    e = exchange
    _two_shot_finish_norm[(e.room // e.unit, e.ranks - 1)](
        x, residual, weight, e.staged, e.units, e.room, e.half, eps, RANK=e.rank, RANKS=e.ranks, **_row(e.unit)
    )


def _row(unit: int) -> dict[str, int]:
    """How a program has a row in its registers."""
    block = triton.next_power_of_2(unit)
    return {"UNIT": unit, "BLOCK": block, "num_warps": min(16, max(1, block // 256))}
