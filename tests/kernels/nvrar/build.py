"""Compiles the C++ test programs of the protocol, once per content of sources, flags and compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from yalis.utils.native import cache_dir

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parents[2] / "yalis" / "comm" / "nvrar" / "csrc"
STRICT = ("-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror")
# What runs briefly: no optimisation, float and bfloat16 only. That compiles in a third of the time.
QUICK = ("-O0", "-DNVRAR_FEW_TYPES")
THREAD = (*QUICK, "-g", "-fsanitize=thread")
ADDRESS = (*QUICK, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def cxx() -> str | None:
    """``$CXX``, else g++; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout


def build(source: str, flags: Sequence[str], headers: Path = HEADERS) -> Path:
    """Path of the program made of ``source`` (a file beside this one) against the protocol in ``headers``."""
    compiler = cxx()
    assert compiler is not None
    command = [compiler, "-std=c++17", "-pthread", *flags]
    digest = hashlib.sha256("\0".join([*command, source, _version(compiler)]).encode())
    for file in (HERE / source, *sorted(HERE.glob("*.h")), *sorted(headers.glob("*.h"))):
        digest.update(file.read_bytes() + b"\0")
    target = cache_dir() / "tests" / f"nvrar-{Path(source).stem}-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        made = Path(tmp) / target.name
        command += [f"-I{HERE}", f"-I{headers}", str(HERE / source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
        os.replace(made, target)
    return target


def run(program: Path, arguments: str = "", timeout: float = 60) -> tuple[int | None, str]:
    """Exit status (None: still running after ``timeout`` seconds) and output."""
    # Reports of a sanitizer have an exit status of their own (66), so that they cannot pass for a wrong result.
    env = {**os.environ, "TSAN_OPTIONS": "exitcode=66 halt_on_error=1", "ASAN_OPTIONS": "exitcode=66"}
    try:
        done = subprocess.run(
            [str(program), *arguments.split()], capture_output=True, text=True, timeout=timeout, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        return None, "no end"
    return done.returncode, (done.stdout + done.stderr)[-3000:]
