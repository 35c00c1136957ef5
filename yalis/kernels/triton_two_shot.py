"""Two-shot all-reduce of long messages between GPUs that map each other's memory: scatter, reduce, finish.

All ranks must meet between `scatter` and `reduce` and between `reduce` and `finish`; who sees to that, and why two
meetings suffice, is in docs/communicator.md. A message is divided over the ranks in whole *units* (rows with a norm,
else groups of elements), as by `yalis.comm.shards.shard_bounds`.

The memory of each rank has two areas of ``ranks - 1`` slots of ``room`` elements each: what the others send of this
rank's shard, then the others' finished shards. The slot of sender s at receiver t is (s - t - 1) modulo ranks.

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
    """How one message is divided and where it is staged: the same on every rank but for ``rank`` and ``staged``.

    Attributes:
        rank, ranks: this one's place, and how many there are.
        bases: [ranks] int64 on the device, addresses of every rank's memory.
        staged: this rank's memory, in the message's dtype, 1-D.
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
    def clipped(self) -> bool:
        """Whether the last unit is not whole."""
        return self.count != self.units * self.unit


@triton.jit
def _shard(index, units, count, RANKS: tl.constexpr, UNIT: tl.constexpr, CLIPPED: tl.constexpr):
    """First element and length of shard ``index``."""
    base = units // RANKS
    extra = units % RANKS
    first = base * index + tl.minimum(index, extra)
    start = first.to(tl.int64) * UNIT
    length = (base + (index < extra).to(tl.int32)) * UNIT
    if CLIPPED:  # the compiler no longer knows that lengths are multiples: slower
        length = tl.maximum(tl.minimum(start + length, count) - start, 0).to(tl.int32)
    return start, length


@triton.jit
def _memory_of(bases, rank, DTYPE: tl.constexpr):
    """Where a rank's memory begins, aligned as allocations are."""
    return tl.multiple_of(tl.load(bases + rank).to(tl.pointer_type(DTYPE)), 16)


# Counts are left alone: Triton would take a count of 1 for a constant.
@triton.jit(do_not_specialize=["units", "count"])
def _two_shot_scatter(
    x, bases, units, count, room,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    to = (RANK + 1 + tl.program_id(1)) % RANKS  # each rank begins with another
    start, length = _shard(to, units, count, RANKS, UNIT, CLIPPED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = (RANK - to - 1 + RANKS) % RANKS
    there = _memory_of(bases, to, x.dtype.element_ty) + slot.to(tl.int64) * room
    tl.store(there + at, tl.load(x + start + at, mask=at < length), mask=at < length)


@triton.jit(do_not_specialize=["units", "count"])
def _two_shot_reduce(
    x, residual, out, staged, bases, units, count, room,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, CLIPPED: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    start, length = _shard(RANK, units, count, RANKS, UNIT, CLIPPED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    here = start + at
    for sender in tl.static_range(RANKS):  # in rank order; the first term starts the sum, so a sum of -0 is -0
        if sender == RANK:
            term = tl.load(x + here, mask=inside, other=0)
        else:
            term = tl.load(staged + (sender - RANK - 1 + RANKS) % RANKS * room.to(tl.int64) + at, mask=inside, other=0)
        if sender == 0:
            total = term.to(tl.float32)
        else:
            total += term.to(tl.float32)
    found = total.to(DTYPE)
    if ADD:
        found = (found.to(tl.float32) + tl.load(residual + here, mask=inside, other=0).to(tl.float32)).to(DTYPE)
        tl.store(residual + here, found, mask=inside)
    else:
        tl.store(out + here, found, mask=inside)
    for step in tl.static_range(1, RANKS):
        to = (RANK + step) % RANKS
        slot = RANKS - 1 + (RANK - to - 1 + RANKS) % RANKS  # in the second area
        there = _memory_of(bases, to, DTYPE) + slot * room.to(tl.int64)
        tl.store(there + at, found, mask=inside)


@triton.jit(do_not_specialize=["units", "count"])
def _two_shot_finish(
    out, staged, units, count, room,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sender = (RANK + 1 + tl.program_id(1)) % RANKS
    start, length = _shard(sender, units, count, RANKS, UNIT, CLIPPED)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = RANKS - 1 + (sender - RANK - 1 + RANKS) % RANKS
    found = tl.load(staged + slot.to(tl.int64) * room + at, mask=at < length)
    tl.store(out + start + at, found, mask=at < length)


@triton.jit(do_not_specialize=["units"])
def _two_shot_finish_norm(
    x, residual, weight, staged, units, room, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    base = units // RANKS
    extra = units % RANKS
    # Shards of base + 1 rows come first.
    long_rows = extra * (base + 1)
    owner = tl.where(row < long_rows, row // (base + 1), extra + (row - long_rows) // tl.maximum(base, 1))
    within = row - (base * owner + tl.minimum(owner, extra))
    columns = tl.arange(0, BLOCK)
    inside = columns < UNIT
    gain = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    held = residual + row.to(tl.int64) * UNIT + columns
    if owner == RANK:
        total = tl.load(held, mask=inside, other=0)
    else:
        slot = RANKS - 1 + (owner - RANK - 1 + RANKS) % RANKS
        total = tl.load(staged + slot.to(tl.int64) * room + within.to(tl.int64) * UNIT + columns, mask=inside, other=0)
        tl.store(held, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / UNIT + eps)
    normed = (wide * scale).to(total.dtype).to(tl.float32) * gain
    tl.store(x + row.to(tl.int64) * UNIT + columns, normed.to(total.dtype), mask=inside)


def scatter(x: torch.Tensor, exchange: Exchange) -> None:
    """Store this rank's part of every other rank's shard into that rank's memory. ``x``: contiguous."""
    e = exchange
    _two_shot_scatter[(triton.cdiv(e.room, _BLOCK), e.ranks - 1)](
        x, e.bases, e.units, e.count, e.room,
        RANK=e.rank, RANKS=e.ranks, UNIT=e.unit, CLIPPED=e.clipped, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def reduce(x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor, exchange: Exchange) -> None:
    """Sum this rank's shard in fp32 and in rank order, round; with a residual add that and round again.

    The result goes into ``out`` (``residual``, where there is one) and into every other rank's memory. All contiguous;
    ``out`` may be ``x``.
    """
    e = exchange
    _two_shot_reduce[(triton.cdiv(e.room, _BLOCK),)](
        x, x if residual is None else residual, out, e.staged, e.bases, e.units, e.count, e.room,
        RANK=e.rank, RANKS=e.ranks, UNIT=e.unit, CLIPPED=e.clipped, ADD=residual is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def finish(out: torch.Tensor, exchange: Exchange) -> None:
    """Take the other ranks' shards into ``out``."""
    e = exchange
    _two_shot_finish[(triton.cdiv(e.room, _BLOCK), e.ranks - 1)](
        out, e.staged, e.units, e.count, e.room,
        RANK=e.rank, RANKS=e.ranks, UNIT=e.unit, CLIPPED=e.clipped, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def finish_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, exchange: Exchange) -> None:
    """Take the other ranks' rows into ``residual``, and the RMS norm of all rows times ``weight`` into ``x``.

    Units must be rows: [units, unit], contiguous. Roundings as `yalis.kernels.ops.add_rms_norm`.
    """
    e = exchange
    block = triton.next_power_of_2(e.unit)
    _two_shot_finish_norm[(e.units,)](
        x, residual, weight, e.staged, e.units, e.room, eps,
        RANK=e.rank, RANKS=e.ranks, UNIT=e.unit, BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
