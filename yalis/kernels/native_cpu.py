"""The CPU's compiled kernels: whether this process uses them, and their C signatures.

The choice is made once per process, at the first kernel call, from ``$YALIS_CPU_KERNELS``:

- ``auto`` (default): the compiled kernels where the CPU has AVX-512 with bf16 and a C compiler works, else torch;
- ``native``: the compiled kernels, or an error saying what is missing;
- ``torch``: torch, always.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch  # before the build is loaded: both must share torch's OpenMP runtime and its threads

from yalis.errors import BuildError, ConfigError
from yalis.utils.logging import get_logger
from yalis.utils.native import cpu_flags, load_shared_object

logger = get_logger(__name__)

_CSRC = Path(__file__).parent / "csrc"
_SOURCES = ("linear.c", "elementwise.c", "attention.c")
_NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
_NATIVE_DTYPES = (torch.bfloat16, torch.float32)

_P, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "yalis_linear_bf16": (None, [_P, _I, _P, _P, _P, _I, _I, _I, _I, _I]),
    "yalis_linear_f32": (None, [_P, _I, _P, _P, _P, _I, _I, _I, _I, _I]),
    "yalis_linear_silu_bf16": (None, [_P, _I, _P, _P, _P, _I, _I, _I, _I, _I]),
    "yalis_linear_silu_f32": (None, [_P, _I, _P, _P, _P, _I, _I, _I, _I, _I]),
    "yalis_pack": (None, [_P, _I, _P, _I, _I, _I, _I]),
    "yalis_unpack_rows": (None, [_P, _P, _P, _I, _I, _I, _I, _I, _I]),
    "yalis_rms_norm": (None, [_P, _I, _I, _P, _I, _P, _P, _I, _I, _I, _I, _I, _F, _I, _I]),
    "yalis_silu_and_mul": (None, [_P, _I, _P, _I, _I, _I, _I, _I]),
    "yalis_rope": (_I, [_P, _I, _I, _P, _I, _I, _P, _P, _I, _I, _I, _I, _I, _I, _I]),
    "yalis_write_kv": (_I, [_P, _I, _I, _P, _I, _I, _P, _P, _P, _I, _I, _I, _I, _I]),
    "yalis_paged_attention": (_I, [_P, _I, _I, _P, _P, _P, _I, _I, _P, _P, _P, *[_I] * 9, _F, _I, _I]),
}


@dataclass(frozen=True)
class CpuKernels:
    """The choice of this process.

    Attributes:
        library: the loaded object with typed functions, or None where torch does the work.
        reason: why torch does the work, or "" if it does not.
    """

    library: ctypes.CDLL | None
    reason: str

    def __str__(self) -> str:
        return "native avx512" if self.library is not None else f"torch: {self.reason}"

    def serves(self, tensor: torch.Tensor) -> bool:
        """Whether the compiled kernels take tensors of this device and dtype."""
        return self.library is not None and tensor.is_cpu and tensor.dtype in _NATIVE_DTYPES


def _openmp_flags() -> list[str]:
    """Link flags that make our object share torch's OpenMP runtime.

    Where torch maps ``libgomp.so.1`` the dynamic loader finds it by that name. Some wheels carry it under a mangled
    name instead; linking against that very file keeps a second runtime, with its own spinning threads, out.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    loaded = sorted({line.split(maxsplit=5)[5] for line in maps if "libgomp" in line})
    if not loaded or any(Path(path).name == "libgomp.so.1" for path in loaded):
        return []
    return ["-Wl,--as-needed", loaded[0]]


def _load() -> ctypes.CDLL:
    # No contraction: where transformers rounds a product and then adds, so must we; the kernels name their FMAs.
    flags = ["-march=native", "-fopenmp", "-ffp-contract=off", "-Wall", *_openmp_flags()]
    library = load_shared_object("yalis_cpu_kernels", [_CSRC / name for name in _SOURCES], flags)
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    return library


@cache
def cpu_kernels() -> CpuKernels:
    """Choose, once per process, who computes on the CPU.

    Raises:
        ConfigError: ``$YALIS_CPU_KERNELS`` is none of auto, native, torch; or it is native and the CPU cannot.
        BuildError: it is native and the sources do not compile here.
    """
    mode = os.environ.get("YALIS_CPU_KERNELS", "auto")
    if mode not in ("auto", "native", "torch"):
        raise ConfigError(f"YALIS_CPU_KERNELS={mode!r}: must be auto, native or torch")
    if mode == "torch":
        chosen = CpuKernels(None, "YALIS_CPU_KERNELS=torch")
    elif missing := [flag for flag in _NEEDED if flag not in cpu_flags()]:
        if mode == "native":
            raise ConfigError(f"YALIS_CPU_KERNELS=native needs {', '.join(missing)}, which this CPU lacks; use auto")
        chosen = CpuKernels(None, f"CPU lacks {', '.join(missing)}")
    else:
        try:
            chosen = CpuKernels(_load(), "")
        except (BuildError, OSError) as error:
            if mode == "native":
                raise
            logger.warning("the CPU kernels do not build, torch serves instead (slower): %s", error)
            chosen = CpuKernels(None, f"build failed: {str(error).splitlines()[0]}")
    logger.info("CPU kernels: %s", chosen)
    return chosen
