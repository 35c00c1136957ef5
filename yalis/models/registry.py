"""Architecture names, as ``config.json`` gives them, and where their classes are. Imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from yalis.errors import ConfigError

if TYPE_CHECKING:
    from yalis.models.base import CausalLM, ModelContext
    from yalis.models.config import ModelConfig

# To add an architecture: its file, and its line here.
ARCHITECTURES = {
    "LlamaForCausalLM": "yalis.models.llama",
    "MistralForCausalLM": "yalis.models.mistral",
    "Qwen2ForCausalLM": "yalis.models.qwen2",
    "Qwen3ForCausalLM": "yalis.models.qwen3",
}


def architecture_class(name: str) -> type[CausalLM]:
    """The class of architecture ``name``; the class has the same name in its module.

    Raises:
        ConfigError: unknown architecture; names those that are known.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(f"architecture {name!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    found: type[CausalLM] = getattr(importlib.import_module(ARCHITECTURES[name]), name)
    return found


def build_model(config: ModelConfig, context: ModelContext) -> CausalLM:
    """This rank's part of the model, without weights: fill it with `yalis.weights.loader`.

    Raises:
        ConfigError: unknown architecture, or sizes that do not divide.
    """
    return architecture_class(config.architecture)(config, context)
