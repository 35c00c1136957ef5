"""The CUDA code of NVRAR on one GPU: every rank is a group of blocks of one kernel (bench/nvrar_virtual_ranks.cu)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc; install the CUDA toolkit (12.8 or newer) and put nvcc on PATH"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run this on a machine with a GPU"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("nvrar") / "nvrar_virtual_ranks"
    major, minor = torch.cuda.get_device_capability()
    command = [
        str(NVCC),
        "-std=c++17",
        "-O3",
        "--split-compile=0",
        f"-arch=sm_{major}{minor}",
        f"-I{ROOT / 'yalis/comm/nvrar/csrc'}",
        str(ROOT / "bench/nvrar_virtual_ranks.cu"),
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize("arguments", ["verify 1000", "long 100000", "fail", "latency"])
def test_virtual_ranks(program: Path, arguments: str) -> None:
    """Graph replays (10^5 once) between eager calls; a missing rank ends by deadline and by abort; timing verifies."""
    done = subprocess.run([str(program), *arguments.split()], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and f"ok {arguments.split()[0]}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(program: Path, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer; install the CUDA toolkit's sanitizer package")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", str(program), "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
