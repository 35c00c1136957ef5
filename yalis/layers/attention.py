"""The attention block: qkv (column) -> q/k norm, rope, KV write -> attention over the KV pages -> o (row)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from yalis.attention.base import AttentionBackend, AttentionPlan, LayerKV, Rotation
from yalis.comm.communicator import Communicator
from yalis.layers.linear import ColumnLinear, OutputPart, RowLinear
from yalis.layers.norm import RMSNorm
from yalis.layers.weight import Slot


@dataclass(frozen=True)
class AttentionNames:
    """Checkpoint names of one layer's attention, without ``.weight`` or ``.bias``."""

    q: str
    k: str
    v: str
    o: str
    q_norm: str = ""
    k_norm: str = ""


@dataclass(frozen=True)
class HeadShard:
    """Heads of one rank: ``num_heads`` query heads from ``first_head`` on, and likewise for KV.

    With more ranks than KV heads each rank has one KV head, and consecutive ranks share it.
    """

    first_head: int
    num_heads: int
    first_kv_head: int
    num_kv_heads: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, rank: int, size: int) -> HeadShard:
        """Heads of ``rank``; ``size`` divides the heads, and divides or is a multiple of the KV heads."""
        heads = num_heads // size
        kv_heads = max(1, num_kv_heads // size)
        return cls(rank * heads, heads, rank * num_kv_heads // size, kv_heads)


class AttentionBlock:
    """One layer's attention on this rank.

    Args:
        names: checkpoint names.
        hidden_size, num_heads, num_kv_heads, head_dim: sizes of the whole model.
        qkv_bias, o_bias: whether the linears have biases.
        qk_norm_eps: eps of the RMSNorm over each head of q and k; None where the model has none.
        window: sliding window in tokens, or None.
        cos_sin: [max_positions, head_dim] float32.
        tp: tensor-parallel group.
        backend: attention over the KV pages.
    """

    def __init__(
        self,
        names: AttentionNames,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm_eps: float | None,
        window: int | None,
        cos_sin: torch.Tensor,
        tp: Communicator,
        backend: AttentionBackend,
    ):
        shard = HeadShard.of(num_heads, num_kv_heads, tp.rank, tp.size)
        q_part = (num_heads * head_dim, shard.first_head * head_dim, shard.num_heads * head_dim)
        kv_part = (num_kv_heads * head_dim, shard.first_kv_head * head_dim, shard.num_kv_heads * head_dim)
        parts = [OutputPart(names.q, *q_part), OutputPart(names.k, *kv_part), OutputPart(names.v, *kv_part)]
        self.qkv = ColumnLinear(parts, hidden_size, bias=qkv_bias)
        self.o = RowLinear(names.o, q_part[0], hidden_size, q_part[1], q_part[2], bias=o_bias, first_rank=tp.rank == 0)
        self.norms = (
            ()
            if qk_norm_eps is None
            else (RMSNorm(names.q_norm, head_dim, qk_norm_eps), RMSNorm(names.k_norm, head_dim, qk_norm_eps))
        )
        self.heads = [shard.num_heads, shard.num_kv_heads, shard.num_kv_heads]
        self.fused_shape = (-1, sum(self.heads), head_dim)
        self.out_size = q_part[2]
        self.window = window
        self.cos_sin = cos_sin
        self.backend = backend

    def attend(self, x: torch.Tensor, positions: torch.Tensor, kv: LayerKV, plan: AttentionPlan) -> torch.Tensor:
        """Everything before the o product.

        Args:
            x: [T, hidden], normed.
            positions: [T] int64.
            kv: pages of this layer; the step's K and V are written to them.
            plan: of the attention backend for this step.

        Returns:
            [T, heads of this rank * head_dim].
        """
        # One view and one split instead of slices: each costs about a microsecond of host time.
        q, k, v = self.qkv.forward(x).view(self.fused_shape).split_with_sizes(self.heads, 1)
        norms = (self.norms[0].weight, self.norms[1].weight, self.norms[0].eps) if self.norms else None
        rotation = Rotation(positions, self.cos_sin, norms)
        out = self.backend.rotate_and_forward(q, k, v, rotation, kv, plan, self.window)
        return out.view(-1, self.out_size)

    def project(self, attended: torch.Tensor) -> torch.Tensor:
        """The o product: rows of `attend` -> [rows, hidden], this rank's part of the sum."""
        return self.o.forward(attended)

    def slots(self) -> list[Slot]:
        """Weights in the order of use."""
        return self.qkv.slots() + [slot for norm in self.norms for slot in norm.slots()] + self.o.slots()
