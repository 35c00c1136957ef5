"""nvcc takes the protocol for every GPU generation that the project names, without a warning and without spills."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.kernels.nvrar.build import HEADERS
from yalis.comm.nvrar.build import find_nvshmem
from yalis.errors import BuildError
from yalis.utils.native import cache_dir

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


@cache
def _version() -> str:
    return subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True, timeout=60).stdout


def _report(folder: Path, text: str, architectures: tuple[int, ...], *flags: str) -> str:
    """What nvcc says, which must succeed; kept, so that it is asked once per content of sources, flags and compiler."""
    command = [str(NVCC), "-std=c++17", "-O3", "--threads", "2", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    command += flags
    digest = hashlib.sha256("\0".join([*command, text, _version()]).encode())
    for header in sorted(HEADERS.iterdir()):
        digest.update(header.read_bytes() + b"\0")
    kept = cache_dir() / "tests" / f"nvrar-nvcc-{digest.hexdigest()[:16]}.txt"
    if kept.exists():
        return kept.read_text()
    source = folder / "kernels.cu"
    source.write_text(text)
    command += [f"-I{HEADERS}", "-c", str(source), "-o", str(folder / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=115)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(f".{os.getpid()}")
    draft.write_text(report)
    draft.replace(kept)
    return report


def _compile(folder: Path, text: str, architectures: tuple[int, ...], *flags: str) -> list[tuple[int, ...]]:
    """(architecture, stack, spill stores, spill loads, registers) of each function that is called from the host."""
    report = _report(folder, text, architectures, *flags)
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
