"""NVRAR's library, one process per rank (bench/nvrar_peers.cu); ranks that share a GPU do so under their own MPS."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
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


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("nvrar") / "nvrar_peers"
    major, minor = torch.cuda.get_device_capability()
    command = [str(NVCC), "-std=c++17", "-O3", "--split-compile=0", "-rdc=true", f"-arch=sm_{major}{minor}"]
    command += [f"-I{ROOT / 'yalis/comm/nvrar/csrc'}", f"-I{NVSHMEM}/include"]
    command += [str(ROOT / "bench/nvrar_peers.cu"), str(ROOT / "yalis/comm/nvrar/csrc/nvrar.cu"), f"-L{NVSHMEM}/lib"]
    command += ["-l:libnvshmem_host.so.3", "-lnvshmem_device", "-lcuda", "-lnvidia-ml"]
    command += ["-Xlinker", f"-rpath={NVSHMEM}/lib", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return target


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
def test_peers(program: Path, case: str) -> None:
    """Sums and norms verified bit by bit; lost, stopped, aborting and differing ranks end in an error in time."""
    shape = case.split()[0]
    nodes, local = map(int, shape.split("x"))
    per_gpu = -(-nodes * local // torch.cuda.device_count())
    command = ["bash", str(MPS), str(per_gpu), str(program), *case.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and f"ok {shape}" in done.stdout, done.stdout + done.stderr
