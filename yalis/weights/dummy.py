"""Random weights without a checkpoint, as fast as memory can be written."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch

from yalis.layers.weight import Piece

# Elements of the noise that all tensors are cut from. Prime, so that no two rows of a matrix are equal.
_PERIOD = 4_194_301


class DummySource:
    """Values of imaginary checkpoint tensors: a window into periodic normal noise, shifted by the tensor's name.

    Args:
        seed: of the noise.
        stds: standard deviation of each tensor by name; None means ones.
        dtype, device: of what will be filled.
    """

    def __init__(self, seed: int, stds: Mapping[str, float | None], dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(_PERIOD, generator=generator).to(device)
        self._stds = stds
        # All scales are made now: reading is done by several threads.
        self._noise = {std: (noise * std).to(dtype) for std in set(stds.values()) if std is not None}

    def read(self, piece: Piece, out: torch.Tensor) -> int:
        """Fill ``out`` with ``piece``; nothing is read from a disk, so returns 0."""
        std = self._stds[piece.name]
        if std is None:
            out.fill_(1.0)
            return 0
        noise = self._noise[std]
        width = math.prod(piece.shape[1:])
        phase = zlib.crc32(piece.name.encode())
        if piece.dim == 0:
            _copy_periodic(noise, phase + piece.start * width, out.view(-1))
            return 0
        # Columns: rows are `width` apart in the noise. Each run of rows ends where the noise does.
        row = 0
        while row < len(out):
            at = (phase + row * width + piece.start) % _PERIOD
            rows = min(len(out) - row, (_PERIOD - at - piece.length) // width + 1)
            if rows < 1:
                _copy_periodic(noise, at, out[row])
                rows = 1
            else:
                out[row : row + rows] = noise.as_strided((rows, piece.length), (width, 1), at)
            row += rows
        return 0


def _copy_periodic(noise: torch.Tensor, start: int, out: torch.Tensor) -> None:
    done = 0
    while done < len(out):
        at = (start + done) % _PERIOD
        count = min(len(out) - done, _PERIOD - at)
        out[done : done + count] = noise[at : at + count]
        done += count
