"""Named ranges of host time: in a torch profile while one is recorded, for Nsight tools where YALIS_NVTX=1 is set."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

_NOTHING: AbstractContextManager[None] = nullcontext()


@cache
def nvtx_enabled() -> bool:
    """Whether ranges go to NVTX: YALIS_NVTX=1, and there is a GPU."""
    return os.environ.get("YALIS_NVTX") == "1" and torch.cuda.is_available()


def span(name: str) -> AbstractContextManager[object]:
    """A range called ``name``; costs a microsecond at most where nobody listens."""
    if torch.autograd.profiler._is_profiler_enabled:
        recorded: AbstractContextManager[object] = torch.profiler.record_function(name)
        return recorded
    if nvtx_enabled():
        ranged: AbstractContextManager[object] = torch.cuda.nvtx.range(name)
        return ranged
    return _NOTHING
