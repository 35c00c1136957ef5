"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and an optional sliding window on the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yalis.models.config import ArchitectureOptions, sliding_windows
from yalis.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2."""

    @classmethod
    def options(cls, raw: Mapping[str, Any]) -> ArchitectureOptions:
        """The biases are part of the architecture."""
        return ArchitectureOptions(qkv_bias=True, windows=sliding_windows(raw))
