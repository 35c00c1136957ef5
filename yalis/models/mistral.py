"""Mistral: Llama without biases, with one sliding window for all layers unless the config says null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yalis.models.config import ArchitectureOptions
from yalis.models.llama import LlamaForCausalLM

_DEFAULT_WINDOW = 4096  # of the 7B v0.1 model; transformers assumes it, too, where a config has no such key


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral."""

    @classmethod
    def options(cls, raw: Mapping[str, Any]) -> ArchitectureOptions:
        """The window applies to every layer."""
        window = raw.get("sliding_window", _DEFAULT_WINDOW)
        return ArchitectureOptions(windows=(window,) * int(raw.get("num_hidden_layers", 0)))
