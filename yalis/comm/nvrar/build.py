"""Builds the two libraries of ``csrc/nvrar.h``: on first use, or ahead of time with ``yalis build``.

Where a library comes from, first match wins:

1. ``$YALIS_NVRAR_DIR``: a folder that ``yalis build --output`` wrote. It must be made of the sources of this version
   (and the NVSHMEM installed here), else it is refused.
2. the cache (`yalis.utils.native.cache_dir`), built there if need be. ``yalis build`` without ``--output`` fills it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from yalis.errors import BuildError, ConfigError
from yalis.utils.logging import get_logger
from yalis.utils.native import BUILD_TIMEOUT_S, Recipe, build, compile_to, compiler_version, cpu_flags, cxx_compiler

logger = get_logger(__name__)

Kind = Literal["cuda", "host"]

CSRC = Path(__file__).resolve().parent / "csrc"
ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that the CUDA library is checked for."""
DIRECTORY_VARIABLE = "YALIS_NVRAR_DIR"
_MANIFEST = "nvrar.json"


@dataclass(frozen=True)
class Nvshmem:
    """The NVSHMEM of the pip wheel: folders and version."""

    include: Path
    lib: Path
    host_library: Path
    version: str


@cache
def find_nvshmem() -> Nvshmem:
    """The installed wheel.

    Raises:
        BuildError: there is none; says what to install.
    """
    fix = "pip install nvidia-nvshmem-cu13 (or -cu12, as torch.version.cuda says)"
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:  # no package named nvidia at all
        spec = None
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    for root in map(Path, roots):
        found = sorted((root / "lib").glob("libnvshmem_host.so.*"), key=lambda p: len(p.name))
        if found and (root / "include" / "nvshmem.h").exists() and (root / "lib" / "libnvshmem_device.a").exists():
            return Nvshmem(root / "include", root / "lib", found[0], _nvshmem_version())
    if roots:
        raise BuildError(
            f"the NVSHMEM in {roots[0]} lacks include/nvshmem.h, lib/libnvshmem_device.a or lib/libnvshmem_host.so.*; "
            f"reinstall it: {fix}"
        )
    raise BuildError(f"nvrar on CUDA needs NVSHMEM, and no package nvidia.nvshmem is installed: {fix}")


def _nvshmem_version() -> str:
    for name in ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


@cache
def find_nvcc() -> str:
    """The CUDA compiler: ``$CUDACXX``, nvcc on the path, ``$CUDA_HOME``, /usr/local/cuda.

    Raises:
        BuildError: there is none; says what to install.
    """
    places = (
        os.environ.get("CUDACXX"),
        "nvcc",
        str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"),
    )
    for place in places:
        if place and (found := shutil.which(place)):
            return found
    raise BuildError(
        "nvrar on CUDA is compiled on first use, and no nvcc was found: install the CUDA toolkit (12.8 or newer) and "
        "put nvcc on PATH or set CUDA_HOME; or build elsewhere with `yalis build --output DIR` and set "
        f"{DIRECTORY_VARIABLE}"
    )


def parse_architectures(text: str) -> tuple[int, ...]:
    """``"80,90,100"`` as numbers, without repetition, ascending.

    Raises:
        ConfigError: something else was written.
    """
    parts = [part.strip().removeprefix("sm_") for part in text.split(",")]
    if not all(re.fullmatch(r"\d{2,3}", part) for part in parts):
        raise ConfigError(f"architectures {text!r}: write compute capabilities such as 80,90,100")
    archs = sorted({int(part) for part in parts})
    if archs[0] < 80:
        raise ConfigError(f"architecture {archs[0]}: the least is 80 (A100), for bfloat16")
    return tuple(archs)


def recipe(kind: Kind, archs: Sequence[int] = ()) -> Recipe:
    """What builds the library ``kind`` (``cuda``: for the compute capabilities ``archs``).

    Raises:
        BuildError: a compiler or NVSHMEM is missing; says what to install.
    """
    if kind == "host":
        cxx = cxx_compiler()
        if cxx is None:
            raise BuildError("cannot build nvrar_host: no C++ compiler found; install g++ or set CXX")
        # -ffp-contract=off: a fused multiply-add would round elsewhere than on another machine.
        command: tuple[str, ...] = (
            cxx,
            "-std=c++17",
            "-O3",
            "-march=native",
            "-ffp-contract=off",
            "-fno-exceptions",
            "-fno-rtti",
        )
        command += ("-fPIC", "-shared", "-fvisibility=hidden")
        return Recipe("nvrar_host", command, (CSRC / "nvrar_host.cpp",), key=tuple(sorted(cpu_flags())))
    source = CSRC / "nvrar.cu"
    if not source.exists():
        raise BuildError(f"cannot build nvrar_cuda: {source.name} is missing from {CSRC}; reinstall yalis")
    nvcc, nvshmem = find_nvcc(), find_nvshmem()
    # Device code of NVSHMEM is a static library, hence relocatable code and a device link step.
    # Thirty kernels: --split-compile=0 takes all cores for them.
    command = (nvcc, "-std=c++17", "-O3", "--split-compile=0", "-shared", "-rdc=true")
    command += ("-Xcompiler", "-fPIC,-fvisibility=hidden")
    for arch in archs:
        command += ("-gencode", f"arch=compute_{arch},code=sm_{arch}")
    command += (f"-I{nvshmem.include}",)
    # The wheel has no unversioned name of the host library.
    libraries: tuple[str, ...] = (f"-L{nvshmem.lib}", "-lnvshmem_device", f"-l:{nvshmem.host_library.name}")
    libraries += ("-Xlinker", f"-rpath,{nvshmem.lib}")
    name = "nvrar_cuda-sm" + "_".join(map(str, archs))
    return Recipe(name, command, (source,), libraries, (nvshmem.version,))


@cache
def library_path(kind: Kind, arch: int = 0, timeout_s: float = BUILD_TIMEOUT_S) -> Path:
    """Path of the library, from the place that the head of this module names.

    Args:
        kind: which one.
        arch: compute capability of the device, such as 90; for ``cuda``.
        timeout_s: longest time to compile, or to wait for another rank that compiles.

    Raises:
        BuildError: it cannot be built, or ``$YALIS_NVRAR_DIR`` does not hold one that fits.
    """
    folder = os.environ.get(DIRECTORY_VARIABLE)
    if folder:
        return _prebuilt(Path(folder), kind, arch)
    try:
        return build(recipe(kind, (arch,) if kind == "cuda" else ()), timeout_s=timeout_s)
    except OSError as error:
        raise BuildError(f"cannot build nvrar_{kind}: {error}; set YALIS_CACHE_DIR to a folder of yours") from error


# ---- ahead of time ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What a folder of prebuilt libraries was made from, by kind: source digest, compiler, NVSHMEM, architectures."""

    sources: str
    compilers: dict[str, str]
    nvshmem: str
    archs: tuple[int, ...]


def source_digest() -> str:
    """Hexadecimal digest of everything in ``csrc``."""
    digest = hashlib.sha256()
    for file in sorted(CSRC.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def file_name(kind: Kind) -> str:
    """Name of a prebuilt library."""
    return f"libnvrar_{kind}.so"


def build_ahead(kinds: Sequence[Kind], archs: Sequence[int], output: Path | None = None) -> list[Path]:
    """Build libraries now: into the cache (one file per architecture, as first use would), or into ``output``.

    Raises:
        BuildError: something is missing, or a compiler refused.
    """
    made = []
    try:
        if output is None:
            for kind in kinds:
                for arch in archs if kind == "cuda" else (0,):
                    made.append(build(recipe(kind, (arch,) if kind == "cuda" else ())))
            return made
        output.mkdir(parents=True, exist_ok=True)
        compilers: dict[str, str] = {}
        for kind in kinds:
            plan = recipe(kind, archs if kind == "cuda" else ())
            compile_to(plan, output / file_name(kind))
            lines = compiler_version(plan.command[0]).splitlines()
            compilers[kind] = next((line for line in lines if "release" in line), lines[0])  # nvcc says it further down
            made.append(output / file_name(kind))
        nvshmem = find_nvshmem().version if "cuda" in kinds else ""
        manifest = Manifest(source_digest(), compilers, nvshmem, tuple(archs) if "cuda" in kinds else ())
        draft = output / f".{_MANIFEST}.{os.getpid()}"
        draft.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        os.replace(draft, output / _MANIFEST)
        return made
    except OSError as error:
        raise BuildError(f"cannot write libraries: {error}; choose a folder that can be written") from error


def _prebuilt(folder: Path, kind: Kind, arch: int) -> Path:
    where = f"{DIRECTORY_VARIABLE}={folder}"
    fix = "build it anew with `yalis build --output DIR`, or unset the variable"
    try:
        words = json.loads((folder / _MANIFEST).read_text())
        manifest = Manifest(words["sources"], words["compilers"], words["nvshmem"], tuple(words["archs"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{where}: no readable {_MANIFEST} ({error}); {fix}") from error
    if kind not in manifest.compilers or not (folder / file_name(kind)).exists():
        raise BuildError(f"{where}: holds no {file_name(kind)}; {fix}")
    if manifest.sources != source_digest():
        raise BuildError(f"{where}: made from other sources ({manifest.sources}) than these ({source_digest()}); {fix}")
    if kind == "cuda":
        if arch not in manifest.archs:
            raise BuildError(f"{where}: made for architectures {list(manifest.archs)}, this device is {arch}; {fix}")
        # The device part of NVSHMEM inside the library must match the host part that will be loaded.
        if manifest.nvshmem != find_nvshmem().version:
            raise BuildError(f"{where}: made with {manifest.nvshmem}, installed is {find_nvshmem().version}; {fix}")
    return folder / file_name(kind)
