"""The CUDA code of NVRAR on one GPU: every rank is a group of blocks of one kernel (bench/nvrar_virtual_ranks.cu)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc; install the CUDA toolkit (12.8 or newer) and put nvcc on PATH"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run this on a machine with a GPU"),
]


@pytest.mark.parametrize("arguments", ["verify 1000", "long 100000", "fail", "latency"])
def test_virtual_ranks(built: Callable[[str], Path], arguments: str) -> None:
    """Graph replays (10^5 once) between eager calls; a missing rank ends by deadline and by abort; timing verifies."""
    done = subprocess.run(
        [str(built("nvrar_virtual_ranks")), *arguments.split()], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and f"ok {arguments.split()[0]}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(built: Callable[[str], Path], tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer; install the CUDA toolkit's sanitizer package")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", str(built("nvrar_virtual_ranks")), "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
