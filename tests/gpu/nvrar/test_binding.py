"""NVRAR through the communicator, two processes on one GPU under an MPS daemon of their own (binding.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from yalis.comm.nvrar import build
from yalis.errors import BuildError

HERE = Path(__file__).resolve().parent


def missing() -> str:
    """What keeps these tests from running, with the remedy; empty when nothing does."""
    if not torch.cuda.is_available():
        return "no CUDA device; run this on a machine with a GPU"
    if shutil.which("nvidia-cuda-mps-control") is None:
        return "no nvidia-cuda-mps-control; it comes with the driver"
    try:
        build.recipe("cuda", (90,))
    except BuildError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.mark.parametrize("shape", ["2x1", "1x2"])
def test_eager_captured_compiled_failing(shape: str) -> None:
    command = ["bash", str(HERE / "mps.sh"), "2", sys.executable, "-m", "tests.gpu.nvrar.binding", shape]
    env = {**os.environ, "SECONDS_LEFT": "90"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=115, env=env, cwd=HERE.parents[2])
    assert done.returncode == 0 and f"ok {shape}" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
