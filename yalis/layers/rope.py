"""Rotary embedding: the table of cosines and sines."""

from __future__ import annotations

import math

import torch


def inverse_frequencies(
    head_dim: int,
    theta: float,
    *,
    type: str = "default",
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position_embeddings: int = 8192,
) -> torch.Tensor:
    """Angle per position of each pair of elements: [head_dim / 2] float32.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides those whose wavelength exceeds
    ``original / low_freq_factor``, keeps those below ``original / high_freq_factor``, and blends in between.

    Raises:
        ValueError: unknown ``type``.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if type == "default":
        return frequencies
    if type == "linear":
        return frequencies / factor
    if type == "llama3":
        # Turns over the original context: 1 at high_freq_factor and above, 0 at low_freq_factor and below.
        turns = original_max_position_embeddings / (2 * math.pi / frequencies)
        keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
        return (1.0 - keep) * frequencies / factor + keep * frequencies
    raise ValueError(f"rope type {type!r}")


def cos_sin_table(frequencies: torch.Tensor, max_positions: int, device: torch.device) -> torch.Tensor:
    """[max_positions, 2 * len(frequencies)] float32: cosines, then sines."""
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
