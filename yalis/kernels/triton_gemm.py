"""Products of few rows with a large weight, in Triton: the weight is streamed once, at the speed of memory.

`_one_row` multiplies and adds in registers (a matrix unit would idle fifteen of sixteen rows); `_few_rows` takes the
weight as the left operand of the matrix units, so that its 64 or more rows fill them and the few activations are the
columns. Both accumulate in fp32 and round once; with GATED they compute a row of gate and a row of up side by side and
leave ``silu(gate) * up``, rounded as two kernels would round it.

With PDL a program loads the beginning of its weights, which no kernel writes, into registers, asks for what follows
to come into the second-level cache, and only then waits for its predecessor: memory is busy while ranks talk to each
other, while attention goes through few keys, and while any kernel drains (docs/kernels.md, "Weights before the wait").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from yalis.kernels.triton_elementwise import ask_for_span, silu_product


@triton.jit
def _ask_for_columns(
    weight, step, first_row, n, begin, end, ROWS: tl.constexpr, SIZE: tl.constexpr, WARPS: tl.constexpr
):
    """Columns ``begin`` to ``end`` of ``ROWS`` rows of the weight, each by one instruction of one thread."""
    lane = tl.arange(0, 32 * WARPS)
    row = first_row + lane
    nbytes = (end - begin) * SIZE // 16 * 16
    nbytes = tl.where((lane < ROWS) & (row < n), nbytes, 0)
    ask_for_span(weight + tl.minimum(row, n - 1).to(tl.int64) * step + begin, nbytes)


@triton.jit(do_not_specialize=["ahead"])
def _one_row(
    x, weight, bias, out, n, k, weight_step, ahead,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr, HELD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = weight.dtype.element_ty
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < n
    start = weight + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * weight_step
    up_weight = weight + n.to(tl.int64) * weight_step
    second = start + n.to(tl.int64) * weight_step
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if HELD:
        near = tl.arange(0, HELD)
        held = tl.load(start + near[None, :], eviction_policy="evict_first")
        if GATED:
            held_up = tl.load(second + near[None, :], eviction_policy="evict_first")
    if PDL:
        last = tl.minimum(HELD + ahead, k)
        _ask_for_columns(weight, weight_step, first_row, n, HELD, last, ROWS, SIZE, WARPS)
        if GATED:
            _ask_for_columns(up_weight, weight_step, first_row, n, HELD, last, ROWS, SIZE, WARPS)
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    more = tl.zeros([ROWS, COLUMNS], tl.float32)
    found = tl.zeros([ROWS], tl.float32)
    up = tl.zeros([ROWS], tl.float32)
    if HELD:
        near_x = tl.load(x + near).to(tl.float32)[None, :]
        found = tl.sum(held.to(tl.float32) * near_x, 1)
        if GATED:
            up = tl.sum(held_up.to(tl.float32) * near_x, 1)
    for at in tl.range(HELD, k, COLUMNS, num_stages=STAGES):
        columns = at + tl.arange(0, COLUMNS)
        if WHOLE:
            values = tl.load(x + columns).to(tl.float32)[None, :]
            sums += tl.load(start + columns[None, :], eviction_policy="evict_first").to(tl.float32) * values
            if GATED:
                more += tl.load(second + columns[None, :], eviction_policy="evict_first").to(tl.float32) * values
        else:
            there = columns < k
            values = tl.load(x + columns, mask=there, other=0).to(tl.float32)[None, :]
            sums += tl.load(start + columns[None, :], mask=there[None, :], other=0).to(tl.float32) * values
            if GATED:
                more += tl.load(second + columns[None, :], mask=there[None, :], other=0).to(tl.float32) * values
    found += tl.sum(sums, 1)
    if BIAS:
        found += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)
    if GATED:
        up += tl.sum(more, 1)
        if BIAS:
            up += tl.load(bias + n + rows, mask=inside, other=0).to(tl.float32)
        product = silu_product(found.to(DTYPE).to(tl.float32), up.to(DTYPE).to(tl.float32), DTYPE)
        tl.store(out + rows, product, mask=inside)
    else:
        tl.store(out + rows, found.to(DTYPE), mask=inside)


@triton.jit
def _finish(gate, up, bias, out, m, n, out_step, rows, tokens, GATED: tl.constexpr, BIAS: tl.constexpr):
    """Bias, activation, store of sums [ROWS, TOKENS]."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    inside = rows < n
    if BIAS:
        gate += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias + n + rows, mask=inside, other=0).to(tl.float32)[:, None]
    found = gate.to(DTYPE)
    if GATED:
        found = silu_product(found.to(tl.float32), up.to(DTYPE).to(tl.float32), DTYPE)
    kept = inside[:, None] & (tokens < m)[None, :]
    tl.store(out + tokens.to(tl.int64)[None, :] * out_step + rows[:, None], found, mask=kept)


@triton.jit(do_not_specialize=["m", "ahead"])
def _few_rows(
    x, weight, bias, out, parts, counters, m, n, k, x_step, weight_step, out_step, ahead,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    HELD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = weight.dtype.element_ty
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first_row = tile * ROWS
    rows = first_row + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    per_split = tl.cdiv(tl.cdiv(k, COLUMNS), SPLITS) * COLUMNS
    begin = split * per_split
    end = tl.minimum(begin + per_split, k)
    start = weight + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * weight_step
    up_weight = weight + n.to(tl.int64) * weight_step
    second = start + n.to(tl.int64) * weight_step
    values = x + tl.minimum(tokens, m - 1).to(tl.int64)[None, :] * x_step
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if HELD:
        near = begin + tl.arange(0, HELD)
        held = tl.load(start + near[None, :])
        if GATED:
            held_up = tl.load(second + near[None, :])
    if PDL:
        first = begin + HELD
        last = tl.minimum(first + ahead, end)
        _ask_for_columns(weight, weight_step, first_row, n, first, last, ROWS, SIZE, WARPS)
        if GATED:
            _ask_for_columns(up_weight, weight_step, first_row, n, first, last, ROWS, SIZE, WARPS)
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    more = tl.zeros([ROWS, TOKENS], tl.float32)
    if HELD:
        near_x = tl.load(values + near[:, None])
        sums = tl.dot(held, near_x, sums, input_precision=PRECISION)
        if GATED:
            more = tl.dot(held_up, near_x, more, input_precision=PRECISION)
    for at in tl.range(begin + HELD, end, COLUMNS, num_stages=STAGES):
        columns = at + tl.arange(0, COLUMNS)
        if WHOLE:
            right = tl.load(values + columns[:, None])
            left = tl.load(start + columns[None, :])
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
            if GATED:
                left = tl.load(second + columns[None, :])
                more = tl.dot(left, right, more, input_precision=PRECISION)
        else:
            there = columns < k
            right = tl.load(values + columns[:, None], mask=there[:, None], other=0)
            left = tl.load(start + columns[None, :], mask=there[None, :], other=0)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
            if GATED:
                left = tl.load(second + columns[None, :], mask=there[None, :], other=0)
                more = tl.dot(left, right, more, input_precision=PRECISION)
    if SPLITS == 1:
        _finish(sums, more, bias, out, m, n, out_step, rows, tokens, GATED, BIAS)
    else:
        # Every split leaves its sums; the last to arrive adds them in the order of the splits, whoever it is.
        size = ROWS * TOKENS
        places = tl.arange(0, ROWS)[:, None] * TOKENS + tokens[None, :]
        first = parts + tile.to(tl.int64) * (SPLITS * size * (2 if GATED else 1))
        own = first + split * (size * (2 if GATED else 1))
        tl.store(own + places, sums)
        if GATED:
            tl.store(own + size + places, more)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.debug_barrier()
            tl.store(counters + tile, 0)
            sums = tl.zeros([ROWS, TOKENS], tl.float32)
            more = tl.zeros([ROWS, TOKENS], tl.float32)
            for part in tl.static_range(SPLITS):
                own = first + part * (size * (2 if GATED else 1))
                sums += tl.load(own + places, cache_modifier=".cg")
                if GATED:
                    more += tl.load(own + size + places, cache_modifier=".cg")
            _finish(sums, more, bias, out, m, n, out_step, rows, tokens, GATED, BIAS)


@triton.jit
def _dependent_reads(ring, sink, count):
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    at = tl.load(ring + 16 * tl.program_id(0))
    for _ in range(count):
        at = tl.load(ring + at, volatile=True)
    tl.store(sink + tl.program_id(0), at)


class LatencyBound:
    """A kernel bound by the latency of memory as an all-reduce between ranks is: reads that wait for each other.

    Like the all-reduce it waits for its predecessor before it lets its successor start. Devices with PDL only.

    Args:
        programs: how many read beside each other, at most 256.
        reads: of each, one after the other, from the second-level cache.
    """

    _LINES = 256  # of 128 bytes, 16 words

    def __init__(self, programs: int, reads: int, device: torch.device):
        if not 0 < programs <= self._LINES:
            raise ValueError(f"{programs} programs: there are lines for 1 to {self._LINES}")
        # On the CPU whatever torch's default device is: it is where the generator lives.
        order = torch.randperm(self._LINES, generator=torch.Generator().manual_seed(0), device="cpu") * 16
        ring = torch.zeros(16 * self._LINES, dtype=torch.int64, device="cpu")
        ring[order] = order.roll(-1)
        self._ring, self._reads, self._programs = ring.to(device), reads, programs
        self._sink = torch.empty(programs, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        """Launch it."""
        _dependent_reads[(self._programs,)](self._ring, self._sink, self._reads, num_warps=4, launch_pdl=True)


@dataclass(frozen=True)
class GemmShape:
    """How one of the kernels is cut.

    Attributes:
        rows: rows of the weight per program.
        columns: columns of the weight per tile.
        warps: of one program.
        stages: tiles in flight.
        splits: programs that share a row's columns; 0 is `_one_row`.
        held: columns of each row (and split) that are in registers before the predecessor has ended; whole tiles, a
            power of two.
        ahead: MiB of the whole weight behind them that are asked for by then, if all programs are resident.
        tokens: least columns of the matrix product, 8 or 16; activations are padded to it or to a power of two.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    splits: int = 0
    held: int = 0
    ahead: int = 0
    tokens: int = 8

    def __str__(self) -> str:
        kind = f"x{self.splits}" if self.splits else ""
        return (
            f"{self.rows}x{self.columns}{kind} w{self.warps} s{self.stages} h{self.held} a{self.ahead} t{self.tokens}"
        )

    def held_of(self, k: int) -> int:
        """Columns that are held of rows of ``k``: none where tiles or splits are not all whole."""
        splits = max(1, self.splits)
        whole = k % (self.columns * splits) == 0 and self.held % self.columns == 0
        return self.held if whole and self.held * splits <= k else 0

    def ahead_of(self, weight: torch.Tensor) -> int:
        """Columns that each split asks for behind those: none where rows are not aligned to 16 bytes."""
        row_nbytes = weight.stride(0) * weight.itemsize
        if weight.data_ptr() % 16 or row_nbytes % 16:
            return 0
        columns = (self.ahead << 20) // (len(weight) * weight.itemsize * max(1, self.splits))
        return min(columns // 64 * 64, weight.shape[1])

    def padded(self, m: int) -> int:
        """Columns of the matrix product for ``m`` rows of activations."""
        return max(self.tokens, int(triton.next_power_of_2(m)))


class GemmScratch:
    """Partial sums of split products, and the arrival counters, which every launch leaves at zero.

    Args:
        elements: float32 partial sums.
        tiles: arrival counters.
    """

    def __init__(self, elements: int, tiles: int, device: torch.device):
        self.device = device
        self.partial = torch.empty(elements, dtype=torch.float32, device=device)
        self.counters = torch.zeros(tiles, dtype=torch.int32, device=device)

    @staticmethod
    def needed(shape: GemmShape, m: int, n: int, gated: bool) -> tuple[int, int]:
        """(elements, tiles) of a product of ``n`` rows of output."""
        if shape.splits <= 1:
            return 0, 0
        tiles = triton.cdiv(n, shape.rows)
        return tiles * shape.splits * shape.rows * shape.padded(m) * (2 if gated else 1), tiles


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    shape: GemmShape,
    scratch: GemmScratch | None,
    *,
    gated: bool,
    pdl: bool,
    compile_only: bool = False,
) -> None:
    """``x @ weight.T + bias`` in ``out``, or with ``gated`` ``silu(gate) * up`` of its two halves.

    Args:
        x: [M, K], rows contiguous; M is 1 for shapes without splits.
        weight: [N, K], rows contiguous; [2 N, K] if gated.
        bias: [N] ([2 N] if gated) or None.
        out: [M, N], rows contiguous.
        scratch: what `GemmScratch.needed` says; may be None where that is nothing.
        compile_only: compile what would be launched; ``out`` is left as it is.
    """
    m, k = x.shape
    n = out.shape[1]
    added = weight if bias is None else bias
    ahead = shape.ahead_of(weight)
    flags = dict(
        GATED=gated, BIAS=bias is not None, PDL=pdl, HELD=shape.held_of(k), WARPS=shape.warps,
        num_warps=shape.warps, launch_pdl=pdl,
    )  # fmt: skip
    if shape.splits == 0:
        grid = (triton.cdiv(n, shape.rows), 1)
        (partial(_one_row.warmup, grid=grid) if compile_only else _one_row[grid])(
            x, weight, added, out, n, k, weight.stride(0), ahead,
            ROWS=shape.rows, COLUMNS=shape.columns, STAGES=shape.stages, WHOLE=k % shape.columns == 0, **flags,
        )  # fmt: skip
        return
    sums, counters = (added, added) if scratch is None else (scratch.partial, scratch.counters)
    grid = (triton.cdiv(n, shape.rows), shape.splits)
    (partial(_few_rows.warmup, grid=grid) if compile_only else _few_rows[grid])(
        x, weight, added, out, sums, counters, m, n, k, x.stride(0), weight.stride(0), out.stride(0), ahead,
        TOKENS=shape.padded(m), ROWS=shape.rows, COLUMNS=shape.columns, STAGES=shape.stages, SPLITS=shape.splits,
        WHOLE=k % shape.columns == 0, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", **flags,
    )  # fmt: skip
