"""Attention over KV pages in Triton: split decode with its merge in one launch, and ragged causal prefill.

Both pack the query heads that share a KV head (a group) into the rows of one matrix product, so that keys and values
are read once per group: row r of a tile is query ``r // group`` of the tile, head ``r % group`` of the group.

Softmax runs in base 2 with the scale folded in. Keys past a sequence's end or before its window are never loaded:
pages may hold anything there, NaN too.

These kernels wait for nothing but data: lengths, tables and which sequences to serve are read before the wait for the
predecessor (`yalis.kernels.gpu`), so that the first keys are on their way when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yalis.kernels.triton_elementwise import ask_for, head_norm, rotated

_LOG2E = 1.4426950408889634
_LEAST_DOT = 16  # inner size of the smallest matrix product


@triton.jit
def _page_rows(table, keys, kv_head, kv_heads, BLOCK_SIZE: tl.constexpr):
    """Row numbers (of [num_blocks * kv_heads * BLOCK_SIZE]) of keys of one sequence; int64."""
    pages = tl.load(table + keys // BLOCK_SIZE)
    # Rows fit into 32 bits (2**31 rows would be hundreds of gigabytes), elements do not.
    return ((pages * kv_heads + kv_head) * BLOCK_SIZE + keys % BLOCK_SIZE).to(tl.int64)


@triton.jit
def load_columns(rows, columns, SIZE: tl.constexpr, PAD: tl.constexpr):
    """``rows`` [N, 1] pointers -> [N, PAD] values, zero from SIZE on."""
    if SIZE == PAD:
        return tl.load(rows + columns[None, :])
    else:
        return tl.load(rows + columns[None, :], mask=(columns < SIZE)[None, :], other=0)


@triton.jit(do_not_specialize=["table_step", "window", "splits"])
def _decode(
    q, k_new, v_new, cos_sin, q_gain, k_gain, slots,
    k_cache, v_cache, out, partial, masses, counters, which, query_start, seq_lens, block_table,
    q_step, out_step, table_step, kv_heads, scale, window, splits, eps,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, MERGE: tl.constexpr,
    WINDOW: tl.constexpr, LISTED: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    index = tl.program_id(2)
    # Lengths and tables are inputs of the step, not written by its kernels: they may be read before the wait.
    sequence = index
    if LISTED:
        listed = tl.load(which + index)
        sequence = tl.maximum(listed, 0)
    length = tl.load(seq_lens + sequence)
    token = tl.load(query_start + sequence).to(tl.int64)
    table = block_table + sequence.to(tl.int64) * table_step
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    first_tile = first // KEYS
    last_tile = tl.cdiv(length, KEYS)
    # The grid is fixed by what was captured, the lengths are not: splits share the tiles there are, the rest is idle.
    per_split = tl.cdiv(last_tile - first_tile, splits)
    used = tl.cdiv(last_tile - first_tile, per_split)
    if LISTED:
        used = tl.where(listed >= 0, used, 0)
    begin = first_tile + split * per_split
    end = tl.minimum(begin + per_split, last_tile)
    columns = tl.arange(0, DIM_PAD)
    HALF: tl.constexpr = DIM // 2
    half = tl.arange(0, HALF_PAD)
    if ROPE:
        # The query is the sequence's last token.
        cos = tl.load(cos_sin + (length - 1) * DIM + half, mask=half < HALF, other=0)
        sin = tl.load(cos_sin + (length - 1) * DIM + HALF + half, mask=half < HALF, other=0)
        place_new = tl.load(slots + token)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if split < used:
            # Nearly all keys are there already: bring the first ones near while the predecessor runs.
            LINE: tl.constexpr = 128 // (k_cache.dtype.element_ty.primitive_bitwidth // 8)
            keys = tl.minimum(begin * KEYS + tl.arange(0, KEYS), length - 1)
            lines = tl.minimum(tl.arange(0, (DIM_PAD + LINE - 1) // LINE) * LINE, DIM - 1)
            place = _page_rows(table, keys, kv_head, kv_heads, BLOCK_SIZE)[:, None] * DIM + lines[None, :]
            ask_for(k_cache + place)
            ask_for(v_cache + place)
        tl.extra.cuda.gdc_wait()
    if split >= used:
        return

    rows = tl.arange(0, ROWS)
    held = (rows < GROUP)[:, None] & (columns < DIM)[None, :]
    head = kv_head * GROUP + rows
    if ROPE:
        DTYPE: tl.constexpr = k_cache.dtype.element_ty
        cos = cos.to(DTYPE).to(tl.float32)[None, :]
        sin = sin.to(DTYPE).to(tl.float32)[None, :]
        halves = (rows < GROUP)[:, None] & (half < HALF)[None, :]
        source = q + token * q_step + head[:, None] * DIM + half[None, :]
        a = tl.load(source, mask=halves, other=0).to(tl.float32)
        b = tl.load(source + HALF, mask=halves, other=0).to(tl.float32)
        if NORM:
            a, b = head_norm(a, b, q_gain, half, half < HALF, eps, DIM, DTYPE)
        first_half, second_half = rotated(a, b, cos, sin, DTYPE)
        if split == used - 1:
            # The newest key is this program's: it writes it, and reads it with the others of its tile.
            one = tl.arange(0, 1)
            pair = (half < HALF)[None, :] & (one == 0)[:, None]
            fresh = token * q_step + kv_head * DIM + half[None, :] + one[:, None]
            k_a = tl.load(k_new + fresh, mask=pair, other=0).to(tl.float32)
            k_b = tl.load(k_new + fresh + HALF, mask=pair, other=0).to(tl.float32)
            if NORM:
                k_a, k_b = head_norm(k_a, k_b, k_gain, half, half < HALF, eps, DIM, DTYPE)
            new_a, new_b = rotated(k_a, k_b, cos, sin, DTYPE)
            if place_new >= 0:
                target = ((place_new // BLOCK_SIZE * kv_heads + kv_head) * BLOCK_SIZE + place_new % BLOCK_SIZE) * DIM
                target = target + half[None, :] + one[:, None]
                tl.store(k_cache + target, new_a, mask=pair)
                tl.store(k_cache + target + HALF, new_b, mask=pair)
                tl.store(v_cache + target, tl.load(v_new + fresh, mask=pair, other=0), mask=pair)
                tl.store(v_cache + target + HALF, tl.load(v_new + fresh + HALF, mask=pair, other=0), mask=pair)
            tl.debug_barrier()
    else:
        queries = tl.load(q + token * q_step + head[:, None] * DIM + columns[None, :], mask=held, other=0)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        keys = tile * KEYS + tl.arange(0, KEYS)
        # Keys outside are replaced by the nearest one inside: a load without a mask, of something written.
        near = tl.maximum(tl.minimum(keys, length - 1), first)
        start = _page_rows(table, near, kv_head, kv_heads, BLOCK_SIZE)[:, None] * DIM
        if ROPE:
            k = load_columns(k_cache + start, half, HALF, HALF_PAD)
            k_2 = load_columns(k_cache + start + HALF, half, HALF, HALF_PAD)
            scores = tl.dot(first_half, tl.trans(k), input_precision=PRECISION)
            scores = tl.dot(second_half, tl.trans(k_2), scores, input_precision=PRECISION)
        else:
            k = load_columns(k_cache + start, columns, DIM, DIM_PAD)
            scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
        v = load_columns(v_cache + start, columns, DIM, DIM_PAD)
        scores = tl.where(((keys >= first) & (keys < length))[None, :], scores, -float("inf"))
        new = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new[:, None])
        fade = tl.exp2(highest - new)
        total = total * fade + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)
        highest = new

    results = sums / total[:, None]
    if used == 1:
        target = out + token * out_step + head[:, None] * DIM + columns[None, :]
        tl.store(target, results.to(out.dtype.element_ty), mask=held)
        return
    # What a split leaves: its own result and the logarithm of its mass, the latter once per column, so that the merge
    # below is the same arithmetic on every element: no shuffles, no exchange between warps, which would cost it more
    # time than the additional bytes do.
    slot = index * kv_heads + kv_head
    mass = tl.broadcast_to((highest + tl.log2(total))[:, None], [ROWS, DIM_PAD])
    at = ((slot.to(tl.int64) * splits + split) * GROUP + rows)[:, None] * DIM + columns[None, :]
    tl.store(partial + at, results, mask=held)
    tl.store(masses + at, mass, mask=held)
    # The last split to arrive merges, in the order of the splits, so the result does not depend on who it is. The
    # barrier puts this program's stores before its atomic; the atomic orders them among programs.
    tl.debug_barrier()
    if tl.atomic_add(counters + slot, 1, sem="acq_rel", scope="gpu") < used - 1:
        return
    tl.debug_barrier()
    tl.store(counters + slot, 0)
    members = tl.arange(0, GROUP_PAD)
    kept = (members < GROUP)[:, None] & (columns < DIM)[None, :]
    own = members[:, None] * DIM + columns[None, :]
    best = tl.full([GROUP_PAD, DIM_PAD], -1e30, tl.float32)
    whole = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    merged = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    base = slot.to(tl.int64) * splits * (GROUP * DIM) + own
    for start in tl.range(0, used, MERGE):
        new = best
        for part in tl.static_range(MERGE):
            present = tl.where(start + part < used, GROUP, 0)
            there = (members < present)[:, None] & (columns < DIM)[None, :]
            power = tl.load(
                masses + base + (start + part) * (GROUP * DIM), mask=there, other=-1e30, cache_modifier=".cg"
            )
            new = tl.maximum(new, power)
        fade = tl.exp2(best - new)
        whole = whole * fade
        merged = merged * fade
        for part in tl.static_range(MERGE):
            present = tl.where(start + part < used, GROUP, 0)
            there = (members < present)[:, None] & (columns < DIM)[None, :]
            power = tl.load(
                masses + base + (start + part) * (GROUP * DIM), mask=there, other=-1e30, cache_modifier=".cg"
            )
            value = tl.load(partial + base + (start + part) * (GROUP * DIM), mask=there, other=0, cache_modifier=".cg")
            share = tl.exp2(power - new)
            whole += share
            merged += value * share
        best = new
    final = out + token * out_step + kv_head * GROUP * DIM + own
    tl.store(final, (merged / whole).to(out.dtype.element_ty), mask=kept)


@dataclass(frozen=True)
class DecodeShape:
    """How the decode kernel is cut; measured choices, not facts.

    Attributes:
        keys: keys of one tile.
        stages: tiles in flight.
        warps: of one program.
    """

    keys: int
    stages: int
    warps: int

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, *, crowded: bool) -> DecodeShape:
        """What fits on chip and measured best; ``crowded`` where there is more than a little to do."""
        if dtype == torch.float32 or head_dim > 128:
            return cls(32, 2, 4)
        return cls(64, 3, 4) if crowded else cls(128, 1, 4)


@dataclass(frozen=True)
class NewKeys:
    """What lies between the qkv product and attention, for a kernel that does it on its way.

    Attributes:
        k, v: [T, Hk, D] of the new tokens, slices of one tensor with q.
        cos_sin: [max_pos, D] fp32, as in `yalis.kernels.ops.rope_`.
        slots: [T] int64, where their keys and values go; negative = nowhere.
        norms: (weight of q [D], weight of k [D], eps) of head norms before the rotation, or None.
    """

    k: torch.Tensor
    v: torch.Tensor
    cos_sin: torch.Tensor
    slots: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor, float] | None


class DecodeScratch:
    """Partial results of decode splits, and the arrival counters, which every launch leaves at zero.

    Args:
        programs: sequences times KV heads that one launch may have.
        splits, group, dim: of the launches.
    """

    def __init__(self, programs: int, splits: int, group: int, dim: int, device: torch.device):
        self.programs, self.splits = programs, splits
        self.partial = torch.empty(programs * splits * group * dim, dtype=torch.float32, device=device)
        self.masses = torch.empty_like(self.partial)
        self.counters = torch.zeros(programs, dtype=torch.int32, device=device)

    def holds(self, programs: int, splits: int) -> bool:
        """Whether a launch of that many programs and splits fits."""
        return programs <= self.programs and programs * splits <= self.programs * self.splits


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    scratch: DecodeScratch,
    which: torch.Tensor | None,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    *,
    splits: int,
    window: int | None,
    shape: DecodeShape,
    pdl: bool,
    new: NewKeys | None = None,
) -> None:
    """Attention of sequences with one query token each.

    Args:
        q: [T, Hq, D]; rows may be strided, heads are contiguous.
        k_cache, v_cache: [num_blocks, Hk, block_size, D] contiguous; hold the new rows.
        out: [T, Hq, D], written at the rows of these sequences; strided like ``q``.
        scratch: at least B * Hk programs of ``splits``.
        which: [B] int32 numbers of the sequences, -1 for none, or None for all of them in order.
        query_start, seq_lens, block_table: as in `yalis.attention.base.AttentionBatch`.
        splits: programs that share a sequence's keys, at most.
        window: sliding window in tokens, or None.
        new: with it, q is not rotated yet and the cache lacks the new rows: the kernel does both.
    """
    kv_heads, block_size, dim = k_cache.shape[1:]
    group = q.shape[1] // kv_heads
    if new is not None and not new.k.stride() == new.v.stride() == (q.stride(0), dim, 1):
        raise ValueError(f"decode: q, k and v must be slices of one tensor, got strides {q.stride()}, {new.k.stride()}")
    norms = None if new is None else new.norms
    count = len(seq_lens) if which is None else len(which)
    dim_pad = max(_LEAST_DOT, triton.next_power_of_2(dim))
    group_pad = triton.next_power_of_2(group)
    merge = min(8, triton.next_power_of_2(splits))
    _decode[(splits, kv_heads, count)](
        q, *((q, q, q, q, q, q) if new is None else (
            new.k, new.v, new.cos_sin, *((q, q) if norms is None else norms[:2]), new.slots)),
        k_cache, v_cache, out, scratch.partial, scratch.masses, scratch.counters,
        seq_lens if which is None else which, query_start, seq_lens, block_table,
        q.stride(0), out.stride(0), block_table.stride(0), kv_heads, scale * _LOG2E, window or 0, splits,
        0.0 if norms is None else norms[2],
        GROUP=group, GROUP_PAD=group_pad, ROWS=max(16, group_pad), DIM=dim, DIM_PAD=dim_pad,
        HALF_PAD=max(_LEAST_DOT, triton.next_power_of_2(dim // 2)), BLOCK_SIZE=block_size,
        ROPE=new is not None, NORM=norms is not None,
        KEYS=shape.keys, STAGES=shape.stages, MERGE=merge, WINDOW=window is not None, LISTED=which is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", PDL=pdl, num_warps=shape.warps, launch_pdl=pdl,
        # Contracted to one operation, a product and a sum of the rotation would lose the rounding between them.
        enable_fp_fusion=new is None,
    )  # fmt: skip


@triton.jit
def _attend(
    sums, total, highest, queries, table, k_cache, v_cache, begin, end, low, positions, length, kv_head, kv_heads,
    scale, window,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles ``begin .. end`` of one sequence's keys; MASKED where some query of the tile does not see some key."""
    columns = tl.arange(0, DIM_PAD)
    for tile in tl.range(begin, end, num_stages=STAGES):
        keys = tile * KEYS + tl.arange(0, KEYS)
        near = keys
        if MASKED:
            # Keys outside are replaced by the nearest one inside: a load without a mask, of something written.
            near = tl.maximum(tl.minimum(keys, length - 1), low)
        start = _page_rows(table, near, kv_head, kv_heads, BLOCK_SIZE)[:, None] * DIM
        k = load_columns(k_cache + start, columns, DIM, DIM_PAD)
        v = load_columns(v_cache + start, columns, DIM, DIM_PAD)
        scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if WINDOW:
                visible = visible & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, -float("inf"))
        new = tl.maximum(highest, tl.max(scores, 1) * scale)
        # A query may see nothing of a tile, nor of those before it: a finite maximum keeps NaN out.
        top = tl.where(new == -float("inf"), 0.0, new) if MASKED else new
        weights = tl.exp2(scores * scale - top[:, None])
        fade = tl.exp2(highest - top)
        total = total * fade + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)
        highest = new
    return sums, total, highest


@triton.jit(do_not_specialize=["table_step", "window"])
def _prefill(
    q, k_cache, v_cache, out, work, query_start, seq_lens, block_table,
    q_step, out_step, table_step, kv_heads, scale, window,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    listed = tl.load(work + item * 2)
    sequence = tl.maximum(listed, 0)
    start = tl.load(work + item * 2 + 1)
    first_row = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - first_row
    length = tl.load(seq_lens + sequence)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # Before any return: a launch that ended without it would let its successors run ahead of its predecessors.
        tl.extra.cuda.gdc_wait()
    if listed < 0:
        return

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM_PAD)
    query = start + rows // GROUP
    held = ((query < count) & (rows < QUERIES * GROUP))[:, None] & (columns < DIM)[None, :]
    token = (first_row + query).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    offsets = head[:, None] * DIM + columns[None, :]
    queries = tl.load(q + token[:, None] * q_step + offsets, mask=held, other=0)
    table = block_table + sequence.to(tl.int64) * table_step
    before = length - count
    positions = before + query
    first = before + start
    last = tl.minimum(first + QUERIES, length)
    low = 0
    if WINDOW:
        low = tl.maximum(first - window + 1, 0)
    begin = low // KEYS
    # Every query of the tile sees the keys below ``whole * KEYS`` (with a window: no such promise is made).
    whole = begin
    if not WINDOW:
        whole = (first + 1) // KEYS
    end = tl.cdiv(last, KEYS)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM_PAD], tl.float32)
    if not WINDOW:
        sums, total, highest = _attend(
            sums, total, highest, queries, table, k_cache, v_cache, begin, whole, low, positions, length, kv_head,
            kv_heads, scale, window, DIM, DIM_PAD, BLOCK_SIZE, KEYS, STAGES, False, WINDOW, PRECISION,
        )  # fmt: skip
    sums, total, highest = _attend(
        sums, total, highest, queries, table, k_cache, v_cache, whole, end, low, positions, length, kv_head,
        kv_heads, scale, window, DIM, DIM_PAD, BLOCK_SIZE, KEYS, STAGES, True, WINDOW, PRECISION,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)
    results = out + token[:, None] * out_step + offsets
    tl.store(results, (sums / total[:, None]).to(out.dtype.element_ty), mask=held)


@dataclass(frozen=True)
class PrefillShape:
    """How the prefill kernel is cut.

    Attributes:
        rows: rows of a tile, queries times heads of the group.
        keys: keys of one tile.
        stages: tiles in flight.
        warps: of one program.
    """

    rows: int
    keys: int
    stages: int
    warps: int

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, group: int) -> PrefillShape:
        """What fits on chip and measured best."""
        least = max(16, triton.next_power_of_2(group))
        if dtype == torch.float32:
            return cls(max(least, 32), 32, 1 if head_dim > 128 else 2, 4)
        if head_dim > 128:
            return cls(max(least, 64), 64, 2, 8)
        return cls(max(least, 128), 32, 4, 4)

    def queries(self, group: int) -> int:
        """Query tokens of one tile."""
        return self.rows // group


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    work: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    *,
    window: int | None,
    shape: PrefillShape,
    pdl: bool,
) -> None:
    """Causal attention of sequences with any number of query tokens.

    Args:
        q: [T, Hq, D]; rows may be strided, heads are contiguous.
        k_cache, v_cache: [num_blocks, Hk, block_size, D] contiguous; hold the new rows.
        out: [T, Hq, D], written at the rows that ``work`` covers; strided like ``q``.
        work: [N, 2] int32: number of a sequence, and the first of the ``shape.queries(group)`` query tokens of a tile;
            -1 for no tile.
        query_start, seq_lens, block_table: as in `yalis.attention.base.AttentionBatch`.
        window: sliding window in tokens, or None.
    """
    kv_heads, block_size, dim = k_cache.shape[1:]
    group = q.shape[1] // kv_heads
    _prefill[(kv_heads, len(work))](
        q, k_cache, v_cache, out, work, query_start, seq_lens, block_table,
        q.stride(0), out.stride(0), block_table.stride(0), kv_heads, scale * _LOG2E, window or 0,
        GROUP=group, QUERIES=shape.queries(group), ROWS=shape.rows, DIM=dim,
        DIM_PAD=max(_LEAST_DOT, triton.next_power_of_2(dim)),
        BLOCK_SIZE=block_size, KEYS=shape.keys, STAGES=shape.stages, WINDOW=window is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", PDL=pdl, num_warps=shape.warps, launch_pdl=pdl,
    )  # fmt: skip
