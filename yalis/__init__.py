"""yalis: one language model over many ranks, with the communication in between made fast and explained.

Importing this package does nothing else: the public names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from yalis.comm.communicator import Communicator
    from yalis.config import EngineConfig
    from yalis.engine.llm import LLM
    from yalis.engine.outputs import RequestOutput
    from yalis.engine.sampling_params import GuidedParams, SamplingParams

_PUBLIC = {
    "LLM": "yalis.engine.llm",
    "SamplingParams": "yalis.engine.sampling_params",
    "GuidedParams": "yalis.engine.sampling_params",
    "RequestOutput": "yalis.engine.outputs",
    "EngineConfig": "yalis.config",
    "Communicator": "yalis.comm.communicator",
}

__all__ = ["LLM", "Communicator", "EngineConfig", "GuidedParams", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'yalis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
