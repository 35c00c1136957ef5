"""Programs of bench/ for these tests, and multicast in the NVLink switch off for all that starts NVSHMEM or NCCL."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")  # before anything starts them; children have these from here
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

# A folder that `python bench/nvrar_two_gpus.py --prepare FOLDER` filled; what is stale there is compiled anew.
PROGRAMS = "YALIS_NVRAR_PROGRAMS"


def two_gpus() -> Any:
    """The module bench/nvrar_two_gpus.py."""
    name = "nvrar_two_gpus"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[3] / f"bench/{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look it up
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``built("nvrar_peers")``: the program for this GPU, carried or compiled now."""
    major, minor = torch.cuda.get_device_capability()
    carried = os.environ.get(PROGRAMS)
    folder = tmp_path_factory.mktemp("nvrar")
    session = two_gpus().Session(Path(carried).resolve() if carried else None, folder, 10 * major + minor, "", {})

    def program(name: str) -> Path:
        found: Path = session.program(name, 170)
        return found

    return program
