"""Linears split over the ranks of a tensor-parallel group.

Column: every rank computes some output features, nothing to reduce. Row: every rank holds some input features and
returns a *partial sum*; the caller reduces it, because the reduction is fused with the norm that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from yalis.kernels import ops
from yalis.layers.weight import LocalTensor, Piece, Slot

_BIAS_STD = 0.02


@dataclass(frozen=True)
class OutputPart:
    """Rows of one checkpoint matrix: ``start : start + length`` of ``total`` output features.

    Attributes:
        stem: name in the checkpoint without ``.weight`` or ``.bias``.
    """

    stem: str
    total: int
    start: int
    length: int


class ColumnLinear:
    """Output features of one or several checkpoint matrices, fused one under another.

    Args:
        parts: which rows of which matrices, in order.
        in_features: input features, whole on every rank.
        bias: whether the checkpoint has biases for the parts.
        pad_to: output features of the fused matrix, if more than the parts have; the rest is zero.
    """

    packed: ops.PackedLinear

    def __init__(self, parts: Sequence[OutputPart], in_features: int, *, bias: bool = False, pad_to: int = 0):
        self.parts = tuple(parts)
        self.in_features = in_features
        self.out_features = max(pad_to, sum(part.length for part in parts))
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] -> [T, out_features of this rank]."""
        return ops.linear(x, self.packed)

    def slots(self) -> list[Slot]:
        """The matrix, and its bias if it has one."""
        rows, columns = self.out_features, self.in_features
        tensors = [LocalTensor((rows, columns), self._pieces(".weight", (columns,)), columns**-0.5)]
        if self.bias:
            tensors.append(LocalTensor((rows,), self._pieces(".bias", ()), _BIAS_STD))
        return [Slot(tuple(tensors), self._install)]

    def _pieces(self, suffix: str, trailing: tuple[int, ...]) -> tuple[Piece, ...]:
        pieces, offset = [], 0
        for part in self.parts:
            pieces.append(Piece(part.stem + suffix, (part.total, *trailing), 0, part.start, part.length, offset))
            offset += part.length
        return tuple(pieces)

    def _install(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.packed = ops.pack_linear(weight, bias)


class RowLinear:
    """Input features ``start : start + length`` of one checkpoint matrix; the output is a partial sum.

    Args:
        stem: name in the checkpoint without ``.weight`` or ``.bias``.
        in_features, out_features: sizes of the whole matrix.
        start, length: input features of this rank.
        bias: whether the checkpoint has a bias.
        first_rank: whether this rank adds the bias, which must enter the sum once; it is zero elsewhere.
    """

    packed: ops.PackedLinear

    def __init__(
        self, stem: str, in_features: int, out_features: int, start: int, length: int, *, bias: bool, first_rank: bool
    ):
        self.stem = stem
        self.in_features = in_features
        self.out_features = out_features
        self.start = start
        self.length = length
        self.bias = bias
        self.first_rank = first_rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, length] -> [T, out_features], this rank's part of the sum."""
        return ops.linear(x, self.packed)

    def slots(self) -> list[Slot]:
        """The columns of this rank, and the bias."""
        rows = self.out_features
        piece = Piece(self.stem + ".weight", (rows, self.in_features), 1, self.start, self.length)
        tensors = [LocalTensor((rows, self.length), (piece,), self.in_features**-0.5)]
        if self.bias:
            bias = Piece(self.stem + ".bias", (rows,), 0, 0, rows if self.first_rank else 0)
            tensors.append(LocalTensor((rows,), (bias,), _BIAS_STD))
        return [Slot(tuple(tensors), self._install)]

    def _install(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.packed = ops.pack_linear(weight, bias)
