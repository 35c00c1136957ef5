"""Memory for weights: anonymous maps that ask for 2 MiB pages."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

_HUGE_PAGE = 2 << 20


def alloc_weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeroed CPU tensor of ``shape`` in an anonymous map aligned to 2 MiB, with huge pages asked for.

    The kernel may decline the huge pages (setting ``never``, fragmented memory); the tensor is then an ordinary one.
    Tensors under 2 MiB come from torch's allocator. The map lives as long as any tensor that shares it.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype)
    length = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE + _HUGE_PAGE
    area = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: plain ones are correct, only slower
            area.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(area, dtype=torch.uint8)
    offset = -raw.data_ptr() % _HUGE_PAGE
    return raw[offset : offset + nbytes].view(dtype).view(shape)
