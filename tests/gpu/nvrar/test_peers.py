"""NVRAR's library, one process per rank (bench/nvrar_peers.cu); ranks that share a GPU do so under their own MPS."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

NVCC = shutil.which("nvcc")
MPS = Path(__file__).with_name("mps.sh")


def _nvshmem() -> Path | None:
    try:
        found = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return None
    return None if found is None or not found.submodule_search_locations else Path(found.submodule_search_locations[0])


NVSHMEM = _nvshmem()

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc; install the CUDA toolkit (12.8 or newer) and put nvcc on PATH"),
    pytest.mark.skipif(NVSHMEM is None, reason="no NVSHMEM; pip install nvidia-nvshmem-cu13"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run this on a machine with a GPU"),
    pytest.mark.skipif(
        shutil.which("nvidia-cuda-mps-control") is None, reason="no MPS; install the driver's MPS tools"
    ),
]


CASES = (
    "2x1 verify 300",
    "1x2 verify 200",
    "2x2 verify 200",
    "3x1 verify 100",
    "2x4 verify 100",
    "4x2 verify 100",
    "2x2 relay-verify 100",
    "3x1 relay-verify 100",
    "2x2 whole-verify 100",
    "2x1 ordinary-verify 100",
    "2x1 replays 2000",
    "2x1 kill",
    "2x2 kill",
    "2x1 stop",
    "2x1 abort",
    "2x1 mismatch",
    "2x1 stamps",
    "2x4 pipeline",
)


@pytest.mark.parametrize("case", CASES)
def test_peers(built: Callable[[str], Path], case: str) -> None:
    """Sums and norms verified bit by bit; lost, stopped, aborting and differing ranks end in an error in time."""
    shape = case.split()[0]
    nodes, local = map(int, shape.split("x"))
    ranks, gpus = nodes * local, torch.cuda.device_count()
    if ranks % gpus:  # NVSHMEM wants equally many on every GPU
        gpus = 1
    per_gpu = ranks // gpus
    command = ["bash", str(MPS), str(per_gpu), str(built("nvrar_peers")), *case.split()]
    env = {**os.environ, "LD_LIBRARY_PATH": f"{NVSHMEM}/lib:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    if gpus == 1:
        env["CUDA_VISIBLE_DEVICES"] = "0"
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0 and f"ok {shape}" in done.stdout, done.stdout + done.stderr
