"""Builds small native sources into shared objects on first use.

The cache key is the content of the sources, the whole command, the compiler's version and whatever else the caller
names (the CPU's feature flags, a library's version), so a stale object is never loaded. One process builds, the others
wait for it (`flock`, with a deadline), and the result is published by an atomic rename: nobody ever loads half a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from yalis.errors import BuildError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

BUILD_TIMEOUT_S = 600.0
"""Longest run of a compiler, and longest wait for another process that builds the same object."""


def cache_dir() -> Path:
    """Folder of built objects: ``$YALIS_CACHE_DIR`` or ``~/.cache/yalis``."""
    return Path(os.environ.get("YALIS_CACHE_DIR") or Path.home() / ".cache" / "yalis")


@cache
def cpu_flags() -> frozenset[str]:
    """Feature flags of this CPU as Linux names them (``avx512_bf16``, ...); empty where unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


@cache
def compiler() -> str | None:
    """The C compiler: ``$CC``, else gcc, cc or clang; None where there is none."""
    return _first(os.environ.get("CC"), "gcc", "cc", "clang")


@cache
def cxx_compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else g++, c++ or clang++; None where there is none."""
    return _first(os.environ.get("CXX"), "g++", "c++", "clang++")


def _first(*candidates: str | None) -> str | None:
    return next((c for c in candidates if c and shutil.which(c)), None)


@cache
def compiler_version(program: str) -> str:
    """What ``program --version`` says.

    Raises:
        BuildError: it does not run.
    """
    try:
        return subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{program} --version failed: {error}") from error


@dataclass(frozen=True)
class Recipe:
    """How one shared object comes about.

    Args:
        name: stem of the object's file name.
        command: compiler and flags, up to where ``-o OBJECT SOURCES`` follows.
        sources: files to compile together; headers beside them (``*.h``, ``*.cuh``) count for the key.
        libraries: what follows the sources, such as ``-lm``.
        key: more that the result depends on (versions, CPU features).
    """

    name: str
    command: tuple[str, ...]
    sources: tuple[Path, ...]
    libraries: tuple[str, ...] = ()
    key: tuple[str, ...] = ()

    def digest(self) -> str:
        """Hexadecimal name of exactly this build."""
        digest = hashlib.sha256()
        parts = (*self.command, "|", *self.libraries, compiler_version(self.command[0]), platform.machine(), *self.key)
        for part in parts:
            digest.update(part.encode() + b"\0")
        folders = {source.parent for source in self.sources}
        headers = sorted(h for folder in folders for pattern in ("*.h", "*.cuh") for h in folder.glob(pattern))
        for file in (*self.sources, *headers):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        return digest.hexdigest()[:16]

    def file_name(self) -> str:
        """``NAME-DIGEST.so``."""
        return f"{self.name}-{self.digest()}.so"


def build(recipe: Recipe, folder: Path | None = None, timeout_s: float = BUILD_TIMEOUT_S) -> Path:
    """Path of the object of ``recipe``, built if it is not there.

    Args:
        recipe: what to build.
        folder: where objects are kept; default ``native`` in `cache_dir`.
        timeout_s: longest time to compile, or to wait for a process that compiles the same.

    Raises:
        BuildError: the compiler refused, or did not end in time; carries the command and its output.
        OSError: the folder cannot be written.
    """
    folder = folder or cache_dir() / "native"
    target = folder / recipe.file_name()
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder / f".{target.name}.lock", timeout_s):
        if not target.exists():
            compile_to(recipe, target, timeout_s)
    return target


def compile_to(recipe: Recipe, target: Path, timeout_s: float = BUILD_TIMEOUT_S) -> None:
    """Build ``recipe`` whatever the cache holds; ``target`` appears whole or not at all. Raises as `build`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        built = Path(tmp) / target.name
        command = [*recipe.command, "-o", str(built), *map(str, recipe.sources), *recipe.libraries]
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise BuildError(f"cannot build {recipe.name}: no end after {timeout_s:g} s: {' '.join(command)}") from None
        if done.returncode != 0:
            raise BuildError(f"cannot build {recipe.name}: {' '.join(command)}\n{done.stderr.strip()}")
        os.replace(built, target)
    logger.info("built %s in %.1f s", target, time.monotonic() - start)


@contextlib.contextmanager
def _only_one(lock: Path, timeout_s: float) -> Iterator[None]:
    """Hold ``lock`` among processes. A file system without locks lets all build; the rename keeps even that safe."""
    with lock.open("w") as handle:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"another process has been building {lock.name[1:-5]} for {timeout_s:g} s; look at it, or "
                        f"remove {lock}"
                    ) from None
                time.sleep(0.05)
            except OSError:
                break
        yield


def build_shared_object(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """Compile C ``sources`` into one shared object and return its path (from the cache if it is there).

    Args:
        name: stem of the object's file name.
        sources: C files, compiled together; headers beside them (``*.h``) count for the cache key.
        flags: extra compiler flags, after ``-O3 -fPIC -shared``.

    Raises:
        BuildError: no compiler, or it refused; carries the command and its output.
    """
    cc = compiler()
    if cc is None:
        raise BuildError(f"cannot build {name}: no C compiler found; install gcc or set CC")
    command = (cc, "-O3", "-std=gnu11", "-fPIC", "-shared", *flags)
    return build(Recipe(name, command, tuple(sources), ("-lm",), tuple(sorted(cpu_flags()))))


def load_shared_object(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """`build_shared_object`, then load it."""
    return ctypes.CDLL(str(build_shared_object(name, sources, flags)))
