"""Who computes on CUDA devices: whether this process uses the Triton kernels, and how they are launched.

The choice is made once per process, at the first kernel call on a CUDA tensor, from ``$YALIS_GPU_KERNELS``:

- ``auto`` (default): the Triton kernels where triton can be imported and the device is Ampere or newer, else torch;
- ``triton``: the Triton kernels, or an error saying what is missing;
- ``torch``: torch, always.

Programmatic dependent launch (the next kernel starts while the last one drains, and waits on the device before it
touches data) is used from Hopper on; ``$YALIS_PDL=0`` turns it off.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import torch

from yalis.errors import ConfigError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_AMPERE, _HOPPER = (8, 0), (9, 0)


@dataclass(frozen=True)
class GpuKernels:
    """The choice of this process.

    Attributes:
        triton: the Triton kernels serve.
        pdl: they are launched with programmatic dependent launch. Every kernel so launched waits for its predecessor
            before it reads or writes anything that a kernel may write; weights and the step's inputs excepted.
        reason: why torch does the work, or "" if it does not.
    """

    triton: bool
    pdl: bool
    reason: str

    def __str__(self) -> str:
        if not self.triton:
            return f"torch: {self.reason}"
        return "triton, programmatic dependent launch" if self.pdl else "triton"

    def serves(self, tensor: torch.Tensor) -> bool:
        """Whether the Triton kernels take tensors of this device and dtype."""
        return self.triton and tensor.is_cuda and tensor.dtype in _DTYPES


@cache
def gpu_kernels() -> GpuKernels:
    """Choose, once per process, who computes on CUDA devices.

    Raises:
        ConfigError: ``$YALIS_GPU_KERNELS`` is none of auto, triton, torch; or it is triton and that cannot serve.
    """
    mode = os.environ.get("YALIS_GPU_KERNELS", "auto")
    if mode not in ("auto", "triton", "torch"):
        raise ConfigError(f"YALIS_GPU_KERNELS={mode!r}: must be auto, triton or torch")
    problem = _problem()
    if mode == "torch":
        chosen = GpuKernels(False, False, "YALIS_GPU_KERNELS=torch")
    elif problem:
        if mode == "triton":
            raise ConfigError(f"YALIS_GPU_KERNELS=triton cannot serve: {problem}; use auto")
        logger.warning("the Triton kernels cannot serve, torch does instead (slower): %s", problem)
        chosen = GpuKernels(False, False, problem)
    else:
        pdl = torch.cuda.get_device_capability() >= _HOPPER and os.environ.get("YALIS_PDL", "1") != "0"
        chosen = GpuKernels(True, pdl, "")
    logger.info("GPU kernels: %s", chosen)
    return chosen


def _problem() -> str:
    """Why the Triton kernels cannot serve here, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _AMPERE:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return ""
