"""Attention backends by name, imported on first use."""

from __future__ import annotations

import importlib
import logging

import torch

from yalis.attention.base import AttentionBackend, AttentionSpec
from yalis.errors import ConfigError
from yalis.kernels.gpu import gpu_kernels
from yalis.utils.logging import get_logger, log_once

logger = get_logger(__name__)

# To add a backend: its file, and its line here. Each class takes an AttentionSpec.
BACKENDS = {
    "flashinfer": ("yalis.attention.flashinfer", "FlashInferBackend"),
    "native": ("yalis.attention.native", "NativeBackend"),
    "sdpa": ("yalis.attention.sdpa", "SDPABackend"),
    "triton": ("yalis.attention.triton", "TritonBackend"),
}


def create_backend(name: str, spec: AttentionSpec) -> AttentionBackend:
    """The backend ``name``, or with ``"auto"`` the best one for the device (logged).

    Raises:
        ConfigError: unknown name, or a backend that does not serve the device; names those that can be chosen.
    """
    if name == "auto":
        name, why = _best(spec.device)
        log_once(logger, logging.INFO, f"attention backend {name} (auto, device {spec.device.type}: {why})")
    if name not in BACKENDS:
        raise ConfigError(f"attention_backend={name!r} is unknown; use one of auto, {', '.join(sorted(BACKENDS))}")
    module, cls = BACKENDS[name]
    backend: AttentionBackend = getattr(importlib.import_module(module), cls)(spec)
    return backend


def _best(device: torch.device) -> tuple[str, str]:
    """A backend for the device, and the reason."""
    if device.type == "cpu":
        return "native", "the CPU kernels read the pages"
    if device.type != "cuda":
        return "sdpa", "it runs wherever torch does"
    kernels = gpu_kernels()
    if kernels.triton:
        return "triton", "our own kernels, which CUDA graphs can hold"
    return "sdpa", f"the Triton kernels cannot serve: {kernels.reason}"
