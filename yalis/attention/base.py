"""The contract between the engine and an attention backend.

A step has two parts, so that backends with host-side planning (FlashInfer's ``plan``) and CUDA graphs fit: `plan` runs
once per step outside of any graph and may look at host values; `forward` runs once per layer, looks only at device
tensors, and is what a graph captures. Decode steps over tensors that stay where they are share one plan, made by
`plan_fixed` and told before each of them, by `renew`, how long its sequences are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from yalis.kernels import ops


@dataclass(frozen=True)
class AttentionSpec:
    """What one rank's attention looks like; the same for all of its layers.

    Attributes:
        num_heads: query heads on this rank.
        num_kv_heads: KV heads on this rank.
        head_dim: elements per head.
        scale: multiplies q.k before the softmax.
        block_size: tokens per KV page.
        dtype: of q, k, v and of the pages.
        device: of every tensor.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class AttentionBatch:
    """Which tokens of which sequences a step holds. B sequences, T tokens; tokens of a sequence are contiguous.

    Sequence ``b`` owns rows ``query_start[b] : query_start[b + 1]`` of q; they are its *last* rows, so that
    ``seq_lens[b]`` counts all keys including theirs.

    Attributes:
        query_start: [B + 1] int32, on the device.
        seq_lens: [B] int32, on the device: keys per sequence after this step.
        block_table: [B, max_blocks] int32, on the device; entries past a sequence's end are 0, or
            anything in batches whose tensors stay where they are.
        slot_mapping: [T] int64, on the device: ``block * block_size + offset`` to write each token's K and V to;
            negative = do not write.
        query_lens_host, seq_lens_host: the same lengths as Python ints, for planning.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    query_lens_host: list[int]
    seq_lens_host: list[int]


@dataclass(frozen=True)
class LayerKV:
    """KV pages of one layer: ``k`` and ``v`` are [num_blocks, num_kv_heads, block_size, head_dim] (HND)."""

    k: torch.Tensor
    v: torch.Tensor


class AttentionPlan(Protocol):
    """What every plan has, whatever else a backend puts there.

    Attributes:
        slot_mapping: of the batch.
    """

    @property
    def slot_mapping(self) -> torch.Tensor:
        """[T] int64."""


@dataclass(frozen=True)
class Rotation:
    """How q and k of the step's tokens are prepared, as `yalis.kernels.ops.rope_and_write_kv` takes it.

    Attributes:
        positions: [T] int64.
        cos_sin: [max_positions, head_dim] float32.
        norms: (weight of q [D], weight of k [D], eps) of an RMS norm of each head before the rotation, or None.
    """

    positions: torch.Tensor
    cos_sin: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor, float] | None


class AttentionBackend(Protocol):
    """One per rank; every layer shares it.

    Attributes:
        name: in the registry.
        capturable: a CUDA graph may hold `forward` for steps of one token per sequence with a plan of `plan_fixed`;
            replays see new values in the batch's tensors, and what `renew` enqueued before them.
        captures_prompts: likewise for steps of any query lengths with a plan of `plan_padded`.
    """

    name: str
    capturable: bool
    captures_prompts: bool = False

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        """Host-side preparation of a step. The result is handed to every `forward` of the step."""

    def plan_fixed(self, batch: AttentionBatch) -> AttentionPlan:
        """The plan of all decode steps of one size; made once, outside of any graph, the largest size first.

        Args:
            batch: one token per sequence. Its tensors stay where they are and get new values before each step; its host
                lengths are the longest possible. Rows of padding will have ``seq_lens`` 1 and a negative slot.
        """
        return self.plan(batch)

    def renew(self, plan: Any, seq_lens_host: Sequence[int]) -> None:
        """Before each run or replay of a decode step with a plan of `plan_fixed`, once its inputs are enqueued.

        Backends whose kernels find the lengths on the device inherit this, which does nothing.

        Args:
            plan: what `plan_fixed` returned.
            seq_lens_host: keys of each row after this step, without padding.
        """
        return

    def plan_padded(self, batch: AttentionBatch, decodes: int) -> AttentionPlan:
        """The plan of all steps with prompts that are padded to one size; made once, outside of any graph.

        Args:
            batch: its tensors stay where they are and get new values before each step; its host lengths are the longest
                possible. Of its B sequences those that a step has come first; rows of padding have a negative slot.
            decodes: most sequences of a step with one query token; at most B - ``decodes`` have more. They come in any
                order.
        """
        raise NotImplementedError(f"attention backend {self.name!r} has no plan for padded steps")

    def renew_padded(self, plan: Any, query_lens_host: Sequence[int], seq_lens_host: Sequence[int]) -> None:
        """Before each run or replay of a step with a plan of `plan_padded`, once its inputs are enqueued.

        Args:
            plan: what `plan_padded` returned.
            query_lens_host, seq_lens_host: of the sequences that are there.
        """
        return

    def forward(self, q: torch.Tensor, kv: LayerKV, plan: Any, window: int | None) -> torch.Tensor:
        """Attend.

        Args:
            q: [T, num_heads, head_dim]; rows may be strided, the last two dimensions are contiguous.
            kv: pages of this layer, which already hold the step's keys and values: the caller writes them to the plan's
                slots (`yalis.kernels.ops.rope_and_write_kv`), in one kernel with the rotary embedding.
            plan: what `plan` returned for this step.
            window: sliding window in tokens (a query sees itself and ``window - 1`` tokens before), or None.

        Returns:
            [T, num_heads, head_dim], contiguous.
        """

    def rotate_and_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: Rotation,
        kv: LayerKV,
        plan: Any,
        window: int | None,
    ) -> torch.Tensor:
        """Everything between the qkv and the o product: rotate q and k, write k and v to their slots, attend.

        Backends that have no kernel for the whole inherit this.

        Args:
            q, k, v: [T, heads, head_dim], slices of one tensor; q and k may be overwritten.
            rotation: of q and k.
            kv, plan, window: as in `forward`.

        Returns:
            [T, num_heads, head_dim], contiguous.
        """
        q = ops.rope_and_write_kv(
            q, k, v, rotation.positions, rotation.cos_sin, kv.k, kv.v, plan.slot_mapping, norms=rotation.norms
        )
        return self.forward(q, kv, plan, window)
