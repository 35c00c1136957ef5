"""What a rank holds of a checkpoint, as data: the layers declare it, the loader and the dummy source fill it.

A `Slot` is a unit of installation, such as the fused q, k, v matrix and its bias. Each of its `LocalTensor` is put
together from `Piece`, boxes of checkpoint tensors. Nothing here allocates, so a whole model can be described cheaply,
the parts on other ranks and stages included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Indices ``start : start + length`` along ``dim`` of one checkpoint tensor.

    Attributes:
        name: name in the checkpoint.
        shape: shape of the whole tensor in the checkpoint.
        dim: dimension that is cut.
        start, length: the cut along ``dim``; the other dimensions are whole.
        offset: first row of the local tensor that the piece fills.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    length: int
    offset: int = 0

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the cut."""
        return (*self.shape[: self.dim], self.length, *self.shape[self.dim + 1 :])


def whole(name: str, shape: tuple[int, ...], offset: int = 0) -> Piece:
    """The whole of a checkpoint tensor."""
    return Piece(name, shape, 0, 0, shape[0], offset)


@dataclass(frozen=True)
class LocalTensor:
    """One tensor of this rank; rows that no piece fills are zero.

    Attributes:
        shape: its shape on this rank.
        pieces: what fills it, by rows.
        std: standard deviation of dummy values; None means ones (norm weights).
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    std: float | None


@dataclass(frozen=True)
class Slot:
    """Tensors that are installed together; ``install`` takes them in the order of ``tensors`` and owns them."""

    tensors: tuple[LocalTensor, ...]
    install: Callable[..., None]

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every tensor."""
        for tensor in self.tensors:
            yield from tensor.pieces
