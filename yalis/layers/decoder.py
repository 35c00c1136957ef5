"""A stack of pre-norm decoder layers, with every reduction fused with the norm that follows it.

Between layers two tensors travel: the residual stream and its normed copy, input of the next block. The norm after a
layer's MLP is the *next* layer's input norm (or the final norm), which is why the stack, not the layer, runs the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from yalis.attention.base import LayerKV
from yalis.comm.communicator import Communicator
from yalis.kernels import ops
from yalis.layers.attention import AttentionBlock
from yalis.layers.mlp import GatedMLP
from yalis.layers.norm import RMSNorm
from yalis.layers.weight import Slot


def reduce_and_norm(
    tp: Communicator, partial: torch.Tensor, residual: torch.Tensor, norm: RMSNorm, tag: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum ``partial`` over the group, add it to the residual stream, normalise: ``(normed, new residual)``.

    The communicator owns the fusion with its transfer. With nothing to transfer the kernel does both in one pass, in
    place; ``residual`` must not be used afterwards in either case.
    """
    if tp.size == 1:
        return ops.add_rms_norm(partial, residual, norm.weight, norm.eps, out=partial)
    return tp.all_reduce_rmsnorm(partial, residual, norm.weight, norm.eps, tag=tag)


class DecoderLayer:
    """The parts of one layer.

    Args:
        index: layer number in the whole model; names the layer's reductions.
    """

    def __init__(
        self, index: int, input_norm: RMSNorm, attention: AttentionBlock, post_attention_norm: RMSNorm, mlp: GatedMLP
    ):
        self.input_norm = input_norm
        self.attention = attention
        self.post_attention_norm = post_attention_norm
        self.mlp = mlp
        self.attention_tag = f"L{index}.attn.out"
        self.mlp_tag = f"L{index}.mlp.down"

    def slots(self) -> list[Slot]:
        """Weights in the order of use."""
        return [
            slot
            for part in (self.input_norm, self.attention, self.post_attention_norm, self.mlp)
            for slot in part.slots()
        ]


class DecoderStack:
    """The layers of one pipeline stage.

    Args:
        layers: at least one.
        final_norm: the model's last norm on the last stage, else None.
        tp: tensor-parallel group.
    """

    def __init__(self, layers: Sequence[DecoderLayer], final_norm: RMSNorm | None, tp: Communicator):
        self.layers = list(layers)
        self.final_norm = final_norm
        self.tp = tp

    def forward(
        self,
        residual: torch.Tensor,
        positions: torch.Tensor,
        kv: Sequence[LayerKV],
        plan: Any,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layers.

        Args:
            residual: [T, hidden], the residual stream; may be overwritten.
            positions: [T] int64.
            kv: pages of each layer.
            plan: of the attention backend.
            rows: [R] int64, the rows that somebody will read; default all. Only heeded on the last stage: behind the
                last layer's attention, where K and V of all rows are written, nothing reads the others any more.

        Returns:
            [T or R, hidden]: normed by the final norm on the last stage, else the residual stream.
        """
        tp, layers = self.tp, self.layers
        last = layers[-1] if self.final_norm is not None and rows is not None else None
        normed = layers[0].input_norm.forward(residual)
        following = [layer.input_norm for layer in layers[1:]] + [self.final_norm]
        for layer, pages, next_norm in zip(layers, kv, following, strict=True):
            attended = layer.attention.attend(normed, positions, pages, plan)
            if layer is last:
                assert rows is not None
                attended, residual = attended.index_select(0, rows), residual.index_select(0, rows)
                if not len(rows):
                    return residual
            partial = layer.attention.project(attended)
            normed, residual = reduce_and_norm(tp, partial, residual, layer.post_attention_norm, layer.attention_tag)
            partial = layer.mlp.forward(normed)
            if next_norm is None:
                return residual + tp.all_reduce(partial, tag=layer.mlp_tag)
            normed, residual = reduce_and_norm(tp, partial, residual, next_norm, layer.mlp_tag)
        return normed

    def slots(self) -> list[Slot]:
        """Weights in the order of use."""
        slots = [slot for layer in self.layers for slot in layer.slots()]
        return slots + (self.final_norm.slots() if self.final_norm else [])
