"""Qwen3 (dense): Llama with RMSNorm over each head of q and k; head_dim is its own key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yalis.models.config import ArchitectureOptions, sliding_windows
from yalis.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3."""

    @classmethod
    def options(cls, raw: Mapping[str, Any]) -> ArchitectureOptions:
        """Biases are an option of the config; no released checkpoint has them."""
        bias = bool(raw.get("attention_bias", False))
        return ArchitectureOptions(qkv_bias=bias, o_bias=bias, qk_norm=True, windows=sliding_windows(raw))
