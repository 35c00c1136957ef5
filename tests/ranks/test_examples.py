"""The examples run as their text says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from yalis.comm.nvrar import build
from yalis.utils.native import compiler, cxx_compiler

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "nvrar_c" / "nvrar_example.c"
STRICT = ("-Wall", "-Wextra", "-Werror", "-std=gnu11", f"-I{build.CSRC}")


@pytest.mark.skipif(compiler() is None or cxx_compiler() is None, reason="no C and C++ compilers; install gcc and g++")
def test_c_example_on_the_host(tmp_path: Path) -> None:
    # The same library that first use builds, under the name that `yalis build --output` gives it.
    shutil.copy(build.library_path("host"), tmp_path / build.file_name("host"))
    program = tmp_path / "nvrar_example"
    command = [str(compiler()), *STRICT, str(EXAMPLE), "-o", str(program), f"-L{tmp_path}", "-lnvrar_host"]
    subprocess.run([*command, f"-Wl,-rpath,{tmp_path}"], check=True, timeout=60)
    ranks = [
        subprocess.Popen([str(program), str(rank), "3", str(tmp_path / "id")], stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        told = [rank.communicate(timeout=40)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert told == [f"rank {rank} of 3: 10 sums of 10000 floats are right\n" for rank in range(3)]


@pytest.mark.skipif(compiler() is None, reason="no C compiler; install gcc or set CC")
def test_c_example_compiles_for_cuda() -> None:
    nvcc = shutil.which("nvcc")
    headers = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    headers = [folder for folder in [*headers, Path("/usr/local/cuda/include")] if (folder / "cuda_runtime.h").exists()]
    if not headers:
        pytest.skip("no cuda_runtime.h; install the CUDA toolkit")
    command = [str(compiler()), *STRICT, "-DNVRAR_ON_CUDA", "-fsyntax-only", f"-isystem{headers[0]}", str(EXAMPLE)]
    subprocess.run(command, check=True, timeout=60)


@pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler; install g++ or set CXX")
def test_python_example_under_torchrun() -> None:
    options = ("--all-reduce", "nvrar", "--ranks-per-node", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "allreduce_library.py"), *options],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("sum: right on every rank", "torch.compile: one graph", "100 all-reduces of 16384 bytes"):
        assert words in done.stdout
    assert "'nvrar': [100, " in done.stdout
