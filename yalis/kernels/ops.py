"""Compute kernels as plain functions on torch tensors.

On CPUs with AVX-512-bf16 (and a C compiler) bf16 and fp32 tensors go to the compiled kernels, CUDA tensors to the
Triton kernels; other dtypes and other devices go to torch (`cpu_kernels` and `gpu_kernels` tell which).

With the CPU's compiled kernels every result row is bitwise the same whatever the number of rows, its place among them,
the other sequences of the batch, the chunking of a prefill and the number of threads. All functions run with
``torch.get_num_threads()`` threads there. CPU and torch raise ValueError for shapes, dtypes or layouts that they do
not take; on CUDA devices values (positions, slots, lengths) are not looked at, so that nothing waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from yalis.kernels import gemm, native_cpu, torch_reference
from yalis.kernels.gpu import gpu_kernels
from yalis.kernels.memory import alloc_weight
from yalis.utils.logging import get_logger, log_once

__all__ = [
    "LinearUse",
    "PackedLinear",
    "add_rms_norm",
    "alloc_weight",
    "cpu_kernels",
    "embedding",
    "gpu_kernels",
    "linear",
    "linear_silu_and_mul",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rope_",
    "rope_and_write_kv",
    "silu_and_mul",
    "tune_products",
    "write_kv",
]

logger = get_logger(__name__)

_PANEL = 64  # columns of a packed panel, as in csrc/simd.h
# Rows from which a product and SiLU share a kernel on a CPU: with fewer, reading the weights is all that counts, and
# the jumps between the panels of gate and up disturb it.
_FUSED_ROWS = 16
_MAX_HEAD_DIM = 256
_MAX_GROUP = 64  # query heads per kv head


def cpu_kernels() -> str:
    """Who computes on the CPU in this process: ``"native avx512"`` or ``"torch: <reason>"``."""
    return str(native_cpu.cpu_kernels())


def _native(x: torch.Tensor) -> Any:
    """The compiled library if it serves ``x``, else None (typed Any: functions of a CDLL are attributes)."""
    chosen = native_cpu.cpu_kernels()
    if chosen.serves(x):
        return chosen.library
    if x.is_cpu and chosen.library is not None:
        log_once(logger, logging.INFO, f"{x.dtype} on the CPU is served by torch: the compiled kernels lack it")
    return None


def _on_gpu(x: torch.Tensor) -> bool:
    """Whether the Triton kernels serve ``x``."""
    return x.is_cuda and gpu_kernels().serves(x)


def _refuse(operation: str, problem: str) -> ValueError:
    return ValueError(f"{operation}: {problem}")


class PackedLinear:
    """A weight [N, K] and an optional bias [N] in the layout that is fastest on their device.

    With the compiled kernels: panels [ceil(N / 64)][K / 2 (bf16) or K (fp32)][64 columns] of 32-bit units, one copy
    that serves decode, prefill and row lookups. Elsewhere: the weight as it came. Build it with `pack_linear`.

    Attributes:
        shape: (N, K).
        dtype: of the weight.
        device: of the weight.
        skipped: products with it are not computed: what they return has the right shape and holds anything.
    """

    __slots__ = (
        "_bias",
        "_function",
        "_gated",
        "_library",
        "_pointers",
        "_weight",
        "device",
        "dtype",
        "shape",
        "skipped",
    )

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        n, k = weight.shape
        self.shape, self.dtype, self.device = (n, k), weight.dtype, weight.device
        self.skipped = False
        self._library = _native(weight)
        self._function: Any = None
        self._gated: Any = None
        self._pointers: tuple[int, int | None] = (0, None)
        self._bias = bias
        self._weight = weight
        if self._library is None:
            return
        is_bf16 = self.dtype == torch.bfloat16
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        units = (k + 1) // 2 if is_bf16 else k
        self._weight = alloc_weight((-(-n // _PANEL), units, _PANEL), torch.int32)
        self._library.yalis_pack(
            weight.data_ptr(),
            weight.stride(0) * weight.element_size(),
            self._weight.data_ptr(),
            n,
            k,
            is_bf16,
            torch.get_num_threads(),
        )
        if bias is not None:
            self._bias = F.pad(bias.float(), (0, -n % _PANEL))
        self._function = self._library.yalis_linear_bf16 if is_bf16 else self._library.yalis_linear_f32
        self._gated = self._library.yalis_linear_silu_bf16 if is_bf16 else self._library.yalis_linear_silu_f32
        self._pointers = (self._weight.data_ptr(), None if self._bias is None else self._bias.data_ptr())

    @property
    def nbytes(self) -> int:
        """Bytes held, padding and bias included."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias [N] in the weight's dtype, or None."""
        return None if self._bias is None else self._bias[: self.shape[0]].to(self.dtype)

    def unpack(self) -> torch.Tensor:
        """The weight as [N, K] row-major: a new tensor if it is packed."""
        if self._library is None:
            return self._weight
        return self.rows(torch.arange(self.shape[0]))

    def rows(self, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``ids`` [T] int64 of the weight as [T, K]; an id outside [0, N) gives a row of zeros."""
        if self._library is None:
            return embedding(ids, self._weight, out)
        n, k = self.shape
        count = ids.shape[0]
        if out is None:
            out = torch.empty((count, k), dtype=self.dtype)
        if ids.dtype != torch.int64 or not ids.is_contiguous() or out.stride(1) != 1 or out.shape != (count, k):
            raise _refuse(
                "embedding", f"wants contiguous int64 ids and out [{count}, {k}], got {ids.dtype}, {out.shape}"
            )
        self._library.yalis_unpack_rows(
            self._pointers[0],
            ids.data_ptr(),
            out.data_ptr(),
            out.stride(0) * out.element_size(),
            count,
            n,
            k,
            self.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return out

    def __repr__(self) -> str:
        layout = "row-major" if self._library is None else f"panels of {_PANEL}"
        return f"PackedLinear({self.shape[0]} x {self.shape[1]}, {self.dtype}, {layout}, bias={self._bias is not None})"


class LinearUse(NamedTuple):
    """How decode steps use a linear.

    Attributes:
        packed: the linear.
        gated: `linear_silu_and_mul` computes it.
        waits: what goes before it leaves memory alone for some microseconds: an all-reduce between ranks, or attention.
            On a GPU it is then measured after such a time, since weights that come near meanwhile are worth more than
            the best pace afterwards. (NCCL's and torch's all-reduces do not let it start so early; their norm does.)
    """

    packed: PackedLinear
    gated: bool = False
    waits: bool = False


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    """Put ``weight`` [N, K] (and ``bias`` [N]) in the layout that `linear` wants on its device.

    A packed weight is a copy: drop the original. An unpacked one is held as it is.
    """
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise _refuse("pack_linear", f"wants weight [N, K] and bias [N], got {weight.shape}, bias {bias}")
    return PackedLinear(weight.detach(), None if bias is None else bias.detach())


def linear(x: torch.Tensor, packed: PackedLinear, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``: [T, K] -> [T, N] in x's dtype, fp32 accumulation, rounded once.

    Args:
        x: [T, K], rows contiguous (any row stride), dtype of the weight.
        packed: from `pack_linear`.
        out: [T, N] to write, rows contiguous; must not overlap ``x``.
    """
    if packed.skipped:
        return torch.empty((len(x), packed.shape[0]), dtype=x.dtype, device=x.device) if out is None else out
    function = packed._function
    if function is None:
        if out is None and x.is_cuda:
            return gemm.linear(x, packed._weight, packed._bias)
        result = F.linear(x, packed._weight, packed._bias)
        return result if out is None else out.copy_(result)
    rows, k = x.shape
    n = packed.shape[0]
    if out is None:
        out = torch.empty(rows, n, dtype=packed.dtype)
    elif out.shape != (rows, n) or out.dtype != packed.dtype or out.stride(1) != 1:
        raise _refuse(
            "linear", f"out must be [{rows}, {n}] {packed.dtype} with contiguous rows, got {out.shape} {out.dtype}"
        )
    step, inner = x.stride()
    if k != packed.shape[1] or x.dtype != packed.dtype or inner != 1:
        raise _refuse("linear", f"{packed!r} wants contiguous rows [T, {packed.shape[1]}], got {x.shape} {x.dtype}")
    size = x.element_size()
    weight, bias = packed._pointers
    function(
        x.data_ptr(), step * size, weight, bias, out.data_ptr(), out.stride()[0] * size, rows, n, k,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def tune_products(
    products: Iterable[LinearUse],
    batch_sizes: Sequence[int],
    on_progress: Callable[[int, int], None] | None = None,
) -> gemm.TuneReceipt:
    """Choose by measurement who computes the products of few rows on a GPU (`yalis.kernels.gemm.tune`).

    Args:
        products: the linears of a model; those that are not on a GPU are left alone.
        batch_sizes: numbers of rows that decode steps will have.
        on_progress: called with (products done, products to measure).
    """
    uses = (gemm.ProductUse(use.packed._weight, use.packed._bias, use.gated, use.waits) for use in products)
    return gemm.tune(uses, batch_sizes, on_progress)


def linear_silu_and_mul(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """``silu_and_mul(linear(x, packed))``: [T, K] -> [T, N / 2].

    In one kernel where that is faster: on a GPU as measured at start; on a CPU, with the same bits, from `_FUSED_ROWS`
    rows on.
    """
    if packed.skipped:
        return torch.empty((len(x), packed.shape[0] // 2), dtype=x.dtype, device=x.device)
    if x.is_cuda and packed._function is None:
        found = gemm.linear_silu_and_mul(x, packed._weight, packed._bias)
        if found is not None:
            return found
    n, k = packed.shape
    fused = packed._gated
    if fused is None or len(x) < _FUSED_ROWS or n % (2 * _PANEL):
        return silu_and_mul(linear(x, packed))
    step, inner = x.stride()
    if x.shape[1] != k or x.dtype != packed.dtype or inner != 1:
        raise _refuse("linear_silu_and_mul", f"{packed!r} wants contiguous rows [T, {k}], got {x.shape} {x.dtype}")
    out = torch.empty((len(x), n // 2), dtype=x.dtype)
    size = x.element_size()
    weight, bias = packed._pointers
    fused(
        x.data_ptr(), step * size, weight, bias, out.data_ptr(), n // 2 * size, len(x), n, k, torch.get_num_threads()
    )  # fmt: skip
    return out


def embedding(ids: torch.Tensor, table: torch.Tensor | PackedLinear, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of a table [N, K], plain or packed (a tied head is held once): ids [T] int64 -> [T, K].

    An id outside [0, N) gives a row of zeros: a vocabulary shard passes ``ids - first`` and sums over ranks.
    """
    if isinstance(table, PackedLinear):
        return table.rows(ids, out)
    if _on_gpu(table):
        from yalis.kernels import triton_elementwise

        if out is None:
            out = torch.empty((len(ids), table.shape[1]), dtype=table.dtype, device=table.device)
        triton_elementwise.embedding(ids, table, out, pdl=gpu_kernels().pdl)
        return out
    found = torch_reference.embedding(ids, table)
    return found if out is None else out.copy_(found)


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor | None
) -> torch.Tensor | None:
    """The compiled norm, or None where torch has to serve."""
    if _on_gpu(x):
        from yalis.kernels import triton_elementwise

        if x.dim() not in (2, 3) or x.stride(-1) != 1:
            raise _refuse("rms_norm", f"wants [T, H] or [T, heads, D] with contiguous rows, got {x.shape}")
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        triton_elementwise.rms_norm(x, residual, weight, eps, out, pdl=gpu_kernels().pdl)
        return out
    library = _native(x)
    if library is None:
        return None
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    shape, steps, out_steps, size = x.shape, x.stride(), out.stride(), x.element_size()
    if len(shape) not in (2, 3) or steps[-1] != 1 or out_steps[-1] != 1 or out.shape != shape or out.dtype != x.dtype:
        raise _refuse("rms_norm", f"wants [T, H] or [T, heads, D] with contiguous rows, got {shape}, out {out.shape}")
    if weight.shape[0] != shape[-1] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise _refuse(
            "rms_norm", f"weight must be contiguous [{shape[-1]}] {x.dtype}, got {weight.shape} {weight.dtype}"
        )
    residual_pointer, residual_step = None, 0
    if residual is not None:
        if residual.shape != shape or residual.dtype != x.dtype or residual.stride(1) != 1:
            raise _refuse("add_rms_norm", f"residual must be {shape} {x.dtype}, got {residual.shape} {residual.dtype}")
        residual_pointer, residual_step = residual.data_ptr(), residual.stride(0) * size
    inner, x_inner, out_inner = (1, 0, 0) if len(shape) == 2 else (shape[1], steps[1] * size, out_steps[1] * size)
    library.yalis_rms_norm(
        x.data_ptr(), steps[0] * size, x_inner, residual_pointer, residual_step, weight.data_ptr(),
        out.data_ptr(), out_steps[0] * size, out_inner, shape[0], inner, shape[-1], eps, size == 2,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """RMS norm over the last dimension as transformers computes it: fp32 inside, rounded, times weight.

    Args:
        x: [T, H] or, per head, [T, heads, D]; any strides but the last, which must be 1.
        weight: [H] or [D], x's dtype.
        eps: added to the mean square.
        out: like ``x``; may be ``x`` itself.
    """
    done = _norm(x, None, weight, eps, out)
    if done is not None:
        return done
    result = torch_reference.rms_norm(x, weight, eps)
    return result if out is None else out.copy_(result)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual += x`` in place (rounded to the dtype), then its RMS norm: returns (normed, residual).

    Args:
        x: [T, H], rows contiguous.
        residual: [T, H], updated in place.
        weight: [H].
        eps: added to the mean square.
        out: [T, H] for the normed rows; may be ``x``.
    """
    if x.dim() != 2:
        raise _refuse("add_rms_norm", f"wants x [T, H], got {x.shape}")
    done = _norm(x, residual, weight, eps, out)
    if done is not None:
        return done, residual
    residual.add_(x)
    result = torch_reference.rms_norm(residual, weight, eps)
    return (result if out is None else out.copy_(result)), residual


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up`` for gate_up [T, 2 I] = (gate | up): -> [T, I]; silu in fp32, rounded before the product."""
    if _on_gpu(gate_up):
        from yalis.kernels import triton_elementwise

        if out is None:
            out = torch.empty((len(gate_up), gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
        triton_elementwise.silu_and_mul(gate_up, out, pdl=gpu_kernels().pdl)
        return out
    library = _native(gate_up)
    if library is None:
        result = torch_reference.silu_and_mul(gate_up)
        return result if out is None else out.copy_(result)
    rows, width = gate_up.shape
    n = width // 2
    if out is None:
        out = torch.empty(rows, n, dtype=gate_up.dtype)
    step, inner = gate_up.stride()
    if width % 2 or inner != 1 or out.shape != (rows, n) or out.stride(1) != 1 or out.dtype != gate_up.dtype:
        raise _refuse("silu_and_mul", f"wants [T, 2 I] with contiguous rows, got {gate_up.shape}, out {out.shape}")
    size = gate_up.element_size()
    library.yalis_silu_and_mul(
        gate_up.data_ptr(), step * size, out.data_ptr(), out.stride()[0] * size, rows, n, size == 2,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def rope_(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Rotary embedding in place, Llama style (halves rotated), with transformers' roundings.

    Args:
        q: [T, Hq, D]; any strides but the last, which must be 1 (a slice of the fused qkv output).
        k: [T, Hk, D], likewise.
        positions: [T] int64, each in [0, max_pos).
        cos_sin: [max_pos, D] fp32: D/2 cosines, then D/2 sines.
    """
    if _on_gpu(q):
        from yalis.kernels import triton_elementwise

        triton_elementwise.rope_and_write_kv(q, k, k, positions, cos_sin, None, None, pdl=gpu_kernels().pdl)
        return
    library = _native(q)
    if library is None:
        torch_reference.rope_(q, positions, cos_sin)
        torch_reference.rope_(k, positions, cos_sin)
        return
    rows, heads, dim = q.shape
    q_steps, k_steps, size = q.stride(), k.stride(), q.element_size()
    if k.shape[0] != rows or k.shape[2] != dim or k.dtype != q.dtype or q_steps[2] != 1 or k_steps[2] != 1 or dim % 2:
        raise _refuse("rope_", f"wants q [T, Hq, D], k [T, Hk, D] with contiguous heads, got {q.shape}, {k.shape}")
    if positions.dtype != torch.int64 or not positions.is_contiguous() or positions.shape[0] != rows:
        raise _refuse("rope_", f"positions must be contiguous int64 [{rows}], got {positions.dtype} {positions.shape}")
    if cos_sin.dtype != torch.float32 or cos_sin.shape[1] != dim or not cos_sin.is_contiguous():
        raise _refuse("rope_", f"cos_sin must be contiguous fp32 [max_pos, {dim}], got {cos_sin.dtype} {cos_sin.shape}")
    bad = library.yalis_rope(
        q.data_ptr(), q_steps[0] * size, q_steps[1] * size, k.data_ptr(), k_steps[0] * size, k_steps[1] * size,
        positions.data_ptr(), cos_sin.data_ptr(), cos_sin.shape[0], rows, heads, k.shape[1], dim, size == 2,
        torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise _refuse("rope_", f"position {int(positions[bad])} of row {bad} is outside [0, {cos_sin.shape[0]})")


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Copy new keys and values into their pages.

    Args:
        k: [T, Hk, D], heads contiguous (any row and head stride).
        v: [T, Hk, D], likewise.
        k_cache: [num_blocks, Hk, block_size, D] contiguous, dtype of ``k``.
        v_cache: likewise.
        slot_mapping: [T] int64, ``block * block_size + offset``; a negative slot skips its row.
    """
    if _on_gpu(k):
        from yalis.kernels import triton_elementwise

        cache = (k_cache, v_cache, slot_mapping)
        triton_elementwise.rope_and_write_kv(k, k, v, None, None, cache, None, pdl=gpu_kernels().pdl)
        return
    library = _native(k)
    if library is None:
        torch_reference.write_kv(k, v, k_cache, v_cache, slot_mapping)
        return
    rows, heads, dim = k.shape
    blocks, cache_heads, block_size, cache_dim = k_cache.shape
    if v.shape != k.shape or v_cache.shape != k_cache.shape or (cache_heads, cache_dim) != (heads, dim):
        raise _refuse("write_kv", f"shapes differ: k {k.shape}, v {v.shape}, caches {k_cache.shape}, {v_cache.shape}")
    if not (k.dtype == v.dtype == k_cache.dtype == v_cache.dtype):
        raise _refuse("write_kv", f"dtypes differ: {k.dtype}, {v.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    k_steps, v_steps, size = k.stride(), v.stride(), k.element_size()
    if k_steps[2] != 1 or v_steps[2] != 1 or not k_cache.is_contiguous() or not v_cache.is_contiguous():
        raise _refuse("write_kv", "heads and caches must be contiguous")
    if slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous() or slot_mapping.shape[0] != rows:
        raise _refuse("write_kv", f"slot_mapping must be contiguous int64 [{rows}], got {slot_mapping.dtype}")
    bad = library.yalis_write_kv(
        k.data_ptr(), k_steps[0] * size, k_steps[1] * size, v.data_ptr(), v_steps[0] * size, v_steps[1] * size,
        k_cache.data_ptr(), v_cache.data_ptr(), slot_mapping.data_ptr(), rows, heads, blocks, block_size, dim * size,
    )  # fmt: skip
    if bad >= 0:
        raise _refuse(
            "write_kv", f"slot {int(slot_mapping[bad])} of row {bad} is past the cache ({blocks * block_size})"
        )


def rope_and_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """What lies between the qkv product and attention: head norms, `rope_`, `write_kv`; one kernel on a GPU.

    Args:
        q: [T, Hq, D]; may be overwritten.
        k: [T, Hk, D]; may be overwritten.
        v: [T, Hk, D].
        positions, cos_sin: as in `rope_`.
        k_cache, v_cache, slot_mapping: as in `write_kv`.
        norms: (weight of q [D], weight of k [D], eps) of an RMS norm of each head before the rotation, or None.

    Returns:
        the rotated queries [T, Hq, D], heads contiguous.
    """
    if _on_gpu(q):
        from yalis.kernels import triton_elementwise

        cache = (k_cache, v_cache, slot_mapping)
        triton_elementwise.rope_and_write_kv(q, k, v, positions, cos_sin, cache, norms, pdl=gpu_kernels().pdl)
        return q
    if norms is not None:
        q, k = rms_norm(q, norms[0], norms[2]), rms_norm(k, norms[1], norms[2])
    rope_(q, k, positions, cos_sin)
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    return q


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over paged keys and values for a ragged batch of B sequences (prefill chunks and decodes).

    Args:
        q: [T, Hq, D], heads contiguous; rows ``query_start[b] .. query_start[b+1]-1`` are the last rows of sequence b.
        k_cache: [num_blocks, Hk, block_size, D] contiguous; already holds the new rows.
        v_cache: likewise.
        query_start: [B + 1] int32, ascending from 0 to T.
        seq_lens: [B] int32, keys of each sequence including its new rows.
        block_table: [B, max_blocks] int32; entries past a sequence's end, or wholly before its window, are not read.
        scale: multiplies the scores.
        window: a key at j is visible to a query at i iff ``i - window < j <= i``; None: all ``j <= i``.
        out: [T, Hq, D] to write; may be ``q`` itself only where it has q's strides.

    Returns:
        [T, Hq, D].

    Raises:
        ValueError: shapes, dtypes, lengths or block numbers that do not fit; nothing is computed then.
    """
    rows, heads, dim = q.shape
    blocks, kv_heads, block_size, cache_dim = k_cache.shape
    if heads % kv_heads or cache_dim != dim or v_cache.shape != k_cache.shape or (window is not None and window < 1):
        raise _refuse(
            "paged_attention", f"q {q.shape}, caches {k_cache.shape}, {v_cache.shape}, window {window} do not fit"
        )
    if out is None:
        out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    library = _native(q)
    if library is not None and (dim % 2 or dim > _MAX_HEAD_DIM or heads // kv_heads > _MAX_GROUP):
        log_once(logger, logging.WARNING, f"attention with {heads}/{kv_heads} heads of {dim} is served by torch (slow)")
        library = None
    if library is None:
        torch_reference.paged_attention(
            q, k_cache, v_cache, query_start, seq_lens, block_table, scale, window, out
        )  # fmt: skip
        return out
    q_steps, out_steps, size = q.stride(), out.stride(), q.element_size()
    if not (q.dtype == k_cache.dtype == v_cache.dtype == out.dtype):
        raise _refuse("paged_attention", f"dtypes differ: {q.dtype}, {k_cache.dtype}, {v_cache.dtype}, {out.dtype}")
    if out.shape != q.shape or q_steps[2] != 1 or out_steps[2] != 1:
        raise _refuse("paged_attention", f"q and out must agree and have contiguous heads: {q.shape}, {out.shape}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise _refuse("paged_attention", "the caches must be contiguous")
    batch, max_blocks = block_table.shape
    if query_start.shape[0] != batch + 1 or seq_lens.shape[0] != batch:
        raise _refuse(
            "paged_attention", f"batch {batch}: got query_start {query_start.shape}, seq_lens {seq_lens.shape}"
        )
    for metadata in (query_start, seq_lens, block_table):
        if metadata.dtype != torch.int32 or not metadata.is_contiguous():
            raise _refuse("paged_attention", "query_start, seq_lens and block_table must be contiguous int32")
    bad = library.yalis_paged_attention(
        q.data_ptr(), q_steps[0] * size, q_steps[1] * size, k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(),
        out_steps[0] * size, out_steps[1] * size, query_start.data_ptr(), seq_lens.data_ptr(), block_table.data_ptr(),
        max_blocks, batch, rows, blocks, heads, kv_heads, dim, block_size, window or 0, scale, size == 2,
        torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise _refuse(
            "paged_attention",
            f"sequence {bad}: query_start {query_start.tolist()[bad : bad + 2]} of {rows} rows, length "
            f"{int(seq_lens[bad])}, {max_blocks} table entries of {block_size} slots, {blocks} blocks do not fit",
        )
    return out
