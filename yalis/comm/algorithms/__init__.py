"""All-reduce algorithms, one file each, loaded on first use. To add one: a file, a row here, a rule in `policy`."""

from __future__ import annotations

import importlib

from yalis.comm.algorithms.base import Algorithm
from yalis.errors import ConfigError

_CLASSES = {
    "torch": "yalis.comm.algorithms.torch_dist:TorchDist",
    "rd": "yalis.comm.algorithms.recursive_doubling:RecursiveDoubling",
    "shm": "yalis.comm.algorithms.shm:SharedMemory",
    "symm_mem": "yalis.comm.algorithms.symm_mem:SymmMem",
    "two_shot": "yalis.comm.algorithms.two_shot:TwoShot",
    "null": "yalis.comm.algorithms.null:Null",
    "nvrar": "yalis.comm.algorithms.nvrar:Nvrar",
}


def load(name: str) -> type[Algorithm]:
    """The class of algorithm ``name``.

    Raises:
        ConfigError: there is no such algorithm.
    """
    if name not in _CLASSES:
        raise ConfigError(f"all-reduce algorithm {name!r}: unknown; known: auto, {', '.join(_CLASSES)}")
    module, _, attribute = _CLASSES[name].partition(":")
    found: type[Algorithm] = getattr(importlib.import_module(module), attribute)
    return found
