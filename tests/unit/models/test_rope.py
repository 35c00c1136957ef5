"""Rotary tables against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from yalis.layers.rope import cos_sin_table, inverse_frequencies

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("theta", "kind", "factors"),
    [(1e4, "default", {}), (1e6, "default", {}), (1e4, "linear", {"factor": 4.0}), (5e5, "llama3", LLAMA3)],
)
def test_tables_equal_transformers(theta: float, kind: str, factors: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": kind, "rope_theta": theta, **factors}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=parameters)
    reference = LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(128, theta, type=kind, **factors)
    torch.testing.assert_close(frequencies, reference.inv_freq, rtol=1e-6, atol=0)
    positions = torch.arange(0, 20000)
    cos, sin = reference(torch.zeros(1), positions[None])
    table = cos_sin_table(frequencies, 20000, torch.device("cpu"))
    assert table.dtype == torch.float32
    # An angle of 20000 has a spacing of 2e-3 in float32; the last bits of a frequency show there.
    torch.testing.assert_close(table[:, :64], cos[0, :, :64], rtol=0, atol=4e-3)
    torch.testing.assert_close(table[:, 64:], sin[0, :, :64], rtol=0, atol=4e-3)
    torch.testing.assert_close(table[:1000, :64], cos[0, :1000, :64], rtol=0, atol=2e-4)


def test_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="yarn"):
        inverse_frequencies(64, 1e4, type="yarn")
