"""Communication between ranks: topology, communicator, algorithms. Ships alone: knows nothing of the engine.

Importing this package does nothing else: the public names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yalis.comm.communicator import Communicator, init_distributed
    from yalis.comm.guard import Guard, NullGuard
    from yalis.comm.topology import Topology

_PUBLIC = {
    "Communicator": "yalis.comm.communicator",
    "init_distributed": "yalis.comm.communicator",
    "Guard": "yalis.comm.guard",
    "NullGuard": "yalis.comm.guard",
    "Topology": "yalis.comm.topology",
}

__all__ = ["Communicator", "Guard", "NullGuard", "Topology", "init_distributed"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'yalis.comm' has no attribute {name!r}")
