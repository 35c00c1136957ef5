"""nvcc takes the protocol for every GPU generation that the project names, without a warning and without spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.nvrar.build import HEADERS
from yalis.comm.nvrar.build import find_nvshmem
from yalis.errors import BuildError

NVCC = shutil.which("nvcc")
ARCHITECTURES = (80, 90, 100)
# Cells or dense, a pair or more ranks.
DIRECT = """
#include "kernels.cuh"
using namespace nvrar;
using Kernel = void (*)(const Launch);
Kernel instances[] = {all_reduce<TYPE, Cells, false, NORM>, all_reduce<TYPE, Cells, true, NORM>,
                      all_reduce<TYPE, Dense, false, NORM>, all_reduce<TYPE, Dense, true, NORM>};
"""
RELAYED = """
#define NVRAR_WITH_RELAY 1
#include "kernels.cuh"
using namespace nvrar;
using Kernel = void (*)(const Launch, const Relay);
Kernel instances[] = {relayed_all_reduce<TYPE, NORM>};
"""


def _wheel() -> str:
    try:
        return f"-I{find_nvshmem().include}"
    except BuildError:
        return ""


def _compile(folder: Path, text: str, architectures: tuple[int, ...], *flags: str) -> list[tuple[int, ...]]:
    """(architecture, stack, spill stores, spill loads, registers) of each function that is called from the host."""
    source = folder / "kernels.cu"
    source.write_text(text)
    command = [str(NVCC), "-std=c++17", "-O3", "--threads", "2", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    command += [f"-I{HEADERS}", "-c", str(source), *flags]
    done = subprocess.run([*command, "-o", str(folder / "kernels.o")], capture_output=True, text=True, timeout=115)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    pattern = (
        r"entry function \'\S*all_reduce\S*\' for \'sm_(\d+)\'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+)"
    )
    found = [tuple(map(int, numbers)) for numbers in re.findall(pattern, report, re.DOTALL)]
    for arch, stack, stores, loads, registers in sorted(found):
        print(f"sm_{arch}: {registers} registers, stack {stack}, spill stores {stores}, spill loads {loads}")
    assert found, report
    return found


needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="no nvcc; install the CUDA toolkit (12.8 or newer) and put nvcc on PATH"
)


@needs_nvcc
@pytest.mark.parametrize("norm", ["false", "true"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_kernels_compile_without_spills(tmp_path: Path, dtype: str, norm: str) -> None:
    # The types differ in conversions: one generation is enough for the others.
    architectures = ARCHITECTURES if dtype == "BF16" else (90,)
    text = DIRECT.replace("NORM", norm).replace("TYPE", dtype)
    found = _compile(tmp_path, text, architectures, "-Xcompiler", "-Wall,-Wextra,-Werror")
    assert len(found) == 4 * len(architectures)
    assert all(numbers[1:4] == (0, 0, 0) and numbers[4] <= 128 for numbers in found)


@needs_nvcc
@pytest.mark.skipif(not _wheel(), reason="no NVSHMEM headers; pip install nvidia-nvshmem-cu13")
@pytest.mark.parametrize("norm", ["false", "true"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_relayed_kernels_compile(tmp_path: Path, dtype: str, norm: str) -> None:
    """Around calls into NVSHMEM a few registers may be spilled; a block of 512 threads must still fit."""
    text = RELAYED.replace("NORM", norm).replace("TYPE", dtype)
    [(_, _, stores, loads, registers)] = _compile(tmp_path, text, (90,), "-rdc=true", _wheel())
    assert registers <= 128 and stores <= 64 and loads <= 128
