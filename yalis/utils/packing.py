"""Many small host arrays to the device in one copy.

A step has a dozen small inputs. Copied one by one from pageable memory, each would cost a launch and make the host
wait; side by side in one pinned buffer they travel in a single asynchronous copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Every field starts at a multiple of this, so that any dtype may look at it and kernels may load 16 bytes at a time.
_ALIGNMENT = 16
_TORCH_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.bool_): torch.bool,
}


@dataclass(frozen=True)
class Field:
    """One array within a buffer: where it starts, in bytes, its shape and numpy dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Layout:
    """Where each named array lies in one buffer of bytes.

    Args:
        shapes: shape and dtype (a key of `_TORCH_TYPES`) of each array, in order.
    """

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], Any]]):
        self.fields: dict[str, Field] = {}
        at = 0
        for name, (shape, kind) in shapes.items():
            dtype = np.dtype(kind)
            if dtype not in _TORCH_TYPES:
                raise ValueError(f"field {name!r} has dtype {dtype}; known: {', '.join(map(str, _TORCH_TYPES))}")
            self.fields[name] = Field(at, shape, dtype)
            at += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = at

    def arrays(self, buffer: torch.Tensor) -> dict[str, np.ndarray]:
        """Views of a host buffer [>= nbytes] uint8."""
        flat = buffer.numpy()
        return {
            name: flat[f.offset : f.offset + math.prod(f.shape) * f.dtype.itemsize].view(f.dtype).reshape(f.shape)
            for name, f in self.fields.items()
        }

    def tensors(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of a buffer [>= nbytes] uint8 on any device."""
        return {
            name: buffer[f.offset : f.offset + math.prod(f.shape) * f.dtype.itemsize]
            .view(_TORCH_TYPES[f.dtype])
            .view(f.shape)
            for name, f in self.fields.items()
        }


def host_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """[nbytes] uint8 on the host, pinned where ``device`` is a GPU.

    torch's pinned allocator recycles the memory of a dropped buffer only when the copies out of it have ended, so a
    buffer may be dropped as soon as its copy is enqueued.
    """
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def send(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as tensors on ``device``: in one asynchronous copy to a GPU; on the CPU without any copy."""
    if device.type == "cpu" or not arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    layout, buffer = _side_by_side(arrays, device)
    return layout.tensors(buffer.to(device, non_blocking=True))


def pinned(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as host tensors that ``device`` can be sent without a wait; pinned where it is a GPU."""
    layout, buffer = _side_by_side(arrays, device)
    return layout.tensors(buffer)


def _side_by_side(arrays: Mapping[str, np.ndarray], device: torch.device) -> tuple[Layout, torch.Tensor]:
    layout = Layout({name: (array.shape, array.dtype) for name, array in arrays.items()})
    buffer = host_buffer(layout.nbytes, device)
    for name, view in layout.arrays(buffer).items():
        view[...] = arrays[name]
    return layout, buffer
