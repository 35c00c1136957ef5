"""Attention by torch's scaled_dot_product_attention on gathered pages: any device; the reference for other backends.

Sequences with equally many query tokens form a group that is padded to its longest sequence and computed in one call;
decode steps are one group, whatever their lengths. Gathering copies the keys and values of every sequence, so this
backend is about being right everywhere, not about speed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from yalis.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerKV


@dataclass
class _Group:
    """Sequences with ``query_len`` query tokens each.

    Attributes:
        rows: [B * query_len] int64, their rows of q.
        blocks: [B, n] int64, pages up to the longest sequence.
        seq_lens: [B] int64.
        padding: [B, 1, num_keys, 1] bool, keys past a sequence's end.
        masks: what may be seen, [B, 1, query_len, keys] bool, per window; made when a layer first asks.
    """

    query_len: int
    rows: torch.Tensor
    blocks: torch.Tensor
    seq_lens: torch.Tensor
    num_keys: int
    padding: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        found = self.masks.get(window)
        if found is None:
            device = self.seq_lens.device
            keys = torch.arange(self.num_keys, device=device)
            # The queries are the last rows of their sequence.
            queries = self.seq_lens[:, None] - self.query_len + torch.arange(self.query_len, device=device)
            found = keys <= queries[:, :, None]
            if window is not None:
                found &= keys > queries[:, :, None] - window
            found = self.masks[window] = found[:, None]
        return found


@dataclass(frozen=True)
class _Plan:
    slot_mapping: torch.Tensor
    groups: list[_Group]


class SDPABackend(AttentionBackend):
    """Serves every device and dtype that torch does. Looks at host lengths, so a CUDA graph cannot capture it."""

    name = "sdpa"
    capturable = False

    def __init__(self, spec: AttentionSpec):
        self._spec = spec

    def plan(self, batch: AttentionBatch) -> _Plan:
        """Form the groups."""
        members: dict[int, list[int]] = {}
        starts, start = [], 0
        for index, query_len in enumerate(batch.query_lens_host):
            starts.append(start)
            start += query_len
            if query_len:
                members.setdefault(query_len, []).append(index)
        device = batch.block_table.device
        groups = []
        for query_len, indices in members.items():
            chosen = torch.tensor(indices, device=device)
            seq_lens = batch.seq_lens[chosen].long()
            num_keys = max(batch.seq_lens_host[i] for i in indices)
            num_blocks = -(-num_keys // self._spec.block_size)
            first = torch.tensor([starts[i] for i in indices], device=device)
            groups.append(
                _Group(
                    query_len=query_len,
                    rows=(first[:, None] + torch.arange(query_len, device=device)).flatten(),
                    blocks=batch.block_table[chosen, :num_blocks].long(),
                    seq_lens=seq_lens,
                    num_keys=num_keys,
                    padding=(torch.arange(num_keys, device=device) >= seq_lens[:, None])[:, None, :, None],
                )
            )
        return _Plan(batch.slot_mapping, groups)

    def forward(self, q: torch.Tensor, kv: LayerKV, plan: _Plan, window: int | None) -> torch.Tensor:
        """See `yalis.attention.base.AttentionBackend.forward`."""
        heads, head_dim = q.shape[1:]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in plan.groups:
            queries = q[group.rows].view(-1, group.query_len, heads, head_dim).transpose(1, 2)
            found = F.scaled_dot_product_attention(
                queries,
                self._gather(kv.k, group),
                self._gather(kv.v, group),
                attn_mask=group.mask(window),
                scale=self._spec.scale,
                enable_gqa=self._spec.num_heads != self._spec.num_kv_heads,
            )
            out[group.rows] = found.transpose(1, 2).reshape(-1, heads, head_dim)
        return out

    def _gather(self, pages: torch.Tensor, group: _Group) -> torch.Tensor:
        """Pages [num_blocks, Hk, block_size, D] -> [B, Hk, num_keys, D]."""
        found = pages[group.blocks].transpose(1, 2)  # [B, Hk, n, block_size, D]
        found = found.reshape(*found.shape[:2], -1, found.shape[-1])[:, :, : group.num_keys]
        # Stale slots may hold NaN, which a probability of zero would not hide.
        return found.masked_fill_(group.padding, 0.0)
