"""The weight of an RMSNorm. Most norms are fused into a reduction, so callers often use only `weight`."""

from __future__ import annotations

import torch

from yalis.kernels import ops
from yalis.layers.weight import LocalTensor, Slot, whole


class RMSNorm:
    """RMSNorm over the last dimension, which is whole on every rank.

    Args:
        stem: name in the checkpoint without ``.weight``.
        size: elements that are normalised together.
        eps: added to the mean square.
    """

    weight: torch.Tensor

    def __init__(self, stem: str, size: int, eps: float):
        self.stem = stem
        self.size = size
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> the same shape."""
        return ops.rms_norm(x, self.weight, self.eps)

    def slots(self) -> list[Slot]:
        """The weight."""
        return [Slot((LocalTensor((self.size,), (whole(self.stem + ".weight", (self.size,)),), None),), self._install)]

    def _install(self, weight: torch.Tensor) -> None:
        self.weight = weight
