"""The kernels' operations in plain torch: what CUDA, other CPUs and other dtypes run, and what tests compare with.

Arguments are as in `yalis.kernels.ops`, already validated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    inside = (ids >= 0) & (ids < table.shape[0])
    return F.embedding(ids.where(inside, 0), table).masked_fill_(~inside.unsqueeze(-1), 0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    cos, sin = cos_sin[positions].to(x.dtype).unsqueeze(1).chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    x.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    block, offset = slots // k_cache.shape[2], slots % k_cache.shape[2]
    k_cache[block, :, offset] = k[kept]
    v_cache[block, :, offset] = v[kept]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    _, kv_heads, block_size, dim = k_cache.shape
    group = q.shape[1] // kv_heads
    starts = query_start.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        begin, end = starts[b], starts[b + 1]
        if begin == end:
            continue
        position = torch.arange(length - (end - begin), length, device=q.device).unsqueeze(1)
        # Keys before the window are not touched: their pages may be gone.
        low = 0 if window is None else max(0, length - (end - begin) - window + 1) // block_size
        high = -(-length // block_size)
        pages = block_table[b, low:high].long()
        first = low * block_size
        key = torch.arange(first, length, device=q.device)
        visible = key <= position
        if window is not None:
            visible &= key > position - window
        used = visible.any(0)  # slots that nobody sees may hold anything, NaN too
        k = k_cache[pages].transpose(1, 2).reshape(-1, kv_heads, dim)[: length - first].float()
        v = v_cache[pages].transpose(1, 2).reshape(-1, kv_heads, dim)[: length - first].float()
        k, v = (t.masked_fill(~used.view(-1, 1, 1), 0) for t in (k, v))
        rows = q[begin:end].float().view(end - begin, kv_heads, group, dim)
        scores = torch.einsum("thgd,shd->hgts", rows, k) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hgts,shd->thgd", weights, v).reshape(end - begin, -1, dim).to(out.dtype)
