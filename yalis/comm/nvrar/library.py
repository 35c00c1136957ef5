"""ctypes binding of ``csrc/nvrar.h``, for both libraries. Knows addresses and numbers, nothing of torch or groups."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

from yalis.comm.nvrar.build import Kind, find_nvshmem, library_path
from yalis.errors import BuildError, CommError

ABI_VERSION = 2
UNIQUE_ID_BYTES = 128
MOST_STAMPS = 4096
"""Calls whose times the libraries keep."""

ALGORITHMS = ("one_shot", "doubling", "direct")
"""Names of ``nvrar_algorithm``, in order."""
FORMATS = ("cells", "dense")
"""Names of ``nvrar_format``, in order."""
REASONS = {1: "late", 2: "aborted", 3: "peer failed"}
PHASES = {0: "between calls", 1: "reduce", 2: "between nodes", 3: "gather"}

_OK, _INVALID, _TOO_LARGE, _SYSTEM, _FAILED = range(5)


class _Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("algorithm", "format", "blocks", "threads", "parts")]


class _Options(ctypes.Structure):
    _fields_ = [
        ("abi_version", ctypes.c_uint32),
        ("nodes", ctypes.c_int32),
        ("local", ctypes.c_int32),
        ("node", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("blocks", ctypes.c_uint32),
        ("relay", ctypes.c_uint32),
        ("whole_cells", ctypes.c_uint32),
        ("ordinary_launch", ctypes.c_uint32),
        ("max_bytes", ctypes.c_uint64),
        ("timeout_ns", ctypes.c_uint64),
        ("host_memory", ctypes.c_void_p),
    ]


class _Info(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_uint32)
            for name in ("ranks", "rank", "blocks", "threads", "mapped_peers", "formats", "relay", "parts")
        ),
        *((name, ctypes.c_uint64) for name in ("max_bytes", "slab_bytes", "max_hidden")),
    ]


class _Record(ctypes.Structure):
    _fields_ = [
        ("reason", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("epoch", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
        ("step", ctypes.c_int32),
        ("peer", ctypes.c_int32),
        ("block", ctypes.c_uint32),
    ]


class _Stamp(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("entered_ns", "arrived_ns", "left_ns")]


@dataclass(frozen=True)
class Stamp:
    """A call's times on this rank.

    Attributes:
        wait_s: from its entry until the first data from a peer was there.
        transfer_s: from then on.
    """

    wait_s: float
    transfer_s: float


@dataclass(frozen=True)
class Plan:
    """How one call runs; the same on every rank.

    Args:
        algorithm: one of `ALGORITHMS`. ``doubling`` with one node is the two-shot.
        format: one of `FORMATS`.
        blocks: 1 to `Info.blocks`.
        threads: per block; the host library takes 1.
        parts: with a norm on CUDA, blocks that share a row (0: as many as there are).
    """

    algorithm: str
    format: str
    blocks: int
    threads: int
    parts: int = 0

    def __str__(self) -> str:
        return f"{self.algorithm}/{self.format}/{self.blocks}x{self.threads}" + (f"/{self.parts}" if self.parts else "")


@dataclass(frozen=True)
class Options:
    """What `Handle` is opened with; see ``nvrar_options`` in nvrar.h. 0 stands for the library's default."""

    nodes: int
    local: int
    node: int
    index: int
    timeout_s: float
    blocks: int = 0
    relay: bool = False
    max_bytes: int = 0
    whole_cells: bool = False
    ordinary_launch: bool = False

    def raw(self, host_memory: int = 0) -> _Options:
        return _Options(
            ABI_VERSION, self.nodes, self.local, self.node, self.index, self.blocks, self.relay, self.whole_cells,
            self.ordinary_launch, self.max_bytes, int(self.timeout_s * 1e9), host_memory or None,
        )  # fmt: skip


@dataclass(frozen=True)
class Info:
    """Limits of an open handle; see ``nvrar_info`` in nvrar.h. ``formats``: names usable between all ranks."""

    ranks: int
    rank: int
    blocks: int
    threads: int
    mapped_peers: int
    formats: tuple[str, ...]
    relay: int
    parts: int
    max_bytes: int
    slab_bytes: int
    max_hidden: int


@dataclass(frozen=True)
class Failure:
    """The first failure of a communicator. Ranks are indices of the group; -1 where unknown.

    ``reason``: ``"late"`` (a peer did not come in time), ``"aborted"``, or ``"peer failed"`` (another rank gave up; its
    own record says why).
    """

    reason: str
    rank: int
    peer: int
    phase: str
    step: int
    epoch: int
    block: int

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step >= 0 else ""
        return f"phase {self.phase}{step}, block {self.block}, epoch {self.epoch}"


class NvrarFailed(Exception):
    """A call failed because of a peer or an abort; `Handle.failure` knows more."""


@cache
def load(kind: Kind, arch: int = 0) -> ctypes.CDLL:
    """The library, built if need be.

    Raises:
        BuildError: it cannot be built or loaded.
    """
    path = library_path(kind, arch)
    try:
        if kind == "cuda":
            # Its plugins (bootstrap, transports) look for the symbols of this very object.
            ctypes.CDLL(str(find_nvshmem().host_library), mode=ctypes.RTLD_GLOBAL)
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}; remove it, or reinstall what it needs") from error
    pointer, u64, u32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    plan = ctypes.POINTER(_Plan)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "nvrar_get_unique_id": (u32, [pointer]),
        "nvrar_host_bytes": (u64, [ctypes.POINTER(_Options)]),
        "nvrar_init": (u32, [ctypes.POINTER(pointer), ctypes.POINTER(_Options), pointer]),
        "nvrar_query": (u32, [pointer, ctypes.POINTER(_Info)]),
        "nvrar_all_reduce": (u32, [pointer, pointer, pointer, u64, u32, plan, pointer]),
        "nvrar_all_reduce_rmsnorm": (
            u32,
            [pointer, pointer, pointer, pointer, pointer, u64, u64, ctypes.c_float, u32, plan, pointer],
        ),
        "nvrar_stamps": (u32, [pointer, u32]),
        "nvrar_read_stamps": (u32, [pointer, ctypes.POINTER(_Stamp), u32, ctypes.POINTER(u32)]),
        "nvrar_error": (u32, [pointer, ctypes.POINTER(_Record)]),
        "nvrar_abort": (u32, [pointer]),
        "nvrar_finalize": (u32, [pointer]),
        "nvrar_last_error": (ctypes.c_char_p, []),
    }
    if kind == "host":
        signatures["nvrar_host_watch"] = (u32, [pointer, pointer, pointer])
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def unique_id(kind: Kind, arch: int = 0) -> bytes:
    """A new id, for rank 0 to hand round.

    Raises:
        CommError: the library refused.
    """
    lib = load(kind, arch)
    buffer = ctypes.create_string_buffer(UNIQUE_ID_BYTES)
    _check(lib, lib.nvrar_get_unique_id(buffer), "get_unique_id")
    return buffer.raw


def host_bytes(options: Options) -> int:
    """Shared memory that the host library needs for these options.

    Raises:
        CommError: the options are impossible.
    """
    lib = load("host")
    size = int(lib.nvrar_host_bytes(ctypes.byref(options.raw())))
    if size == 0:
        raise CommError(f"nvrar: {_words(lib)}")
    return size


class Handle:
    """One open communicator of a library.

    Calls take addresses. On the host they return when done; on CUDA they are ordered on the given stream. One call at a
    time; `failure` and `abort` from any thread.

    Args:
        kind, arch: which library (`load`).
        options: the same on every rank, but for the place.
        unique: what `unique_id` gave rank 0.
        host_memory: address of shared memory of `host_bytes`, zeroed; for the host library.

    Raises:
        CommError: the library refused, or a peer did not come in time.
        BuildError: there is no library.
    """

    def __init__(self, kind: Kind, arch: int, options: Options, unique: bytes, host_memory: int = 0) -> None:
        self._lib = load(kind, arch)
        self._lock = threading.Lock()  # another thread may abort or ask while this one closes, which frees the memory
        handle = ctypes.c_void_p()
        raw = options.raw(host_memory)
        _check(self._lib, self._lib.nvrar_init(ctypes.byref(handle), ctypes.byref(raw), unique), "init")
        self._handle: ctypes.c_void_p | None = handle
        info = _Info()
        _check(self._lib, self._lib.nvrar_query(handle, ctypes.byref(info)), "query")
        self.info = Info(
            info.ranks, info.rank, info.blocks, info.threads, info.mapped_peers,
            tuple(name for bit, name in enumerate(FORMATS) if info.formats >> bit & 1),
            info.relay, info.parts, info.max_bytes, info.slab_bytes, info.max_hidden,
        )  # fmt: skip
        self._all_reduce = self._lib.nvrar_all_reduce
        self._norm = self._lib.nvrar_all_reduce_rmsnorm

    def watch(self, abort_word: int, pidfds: list[int]) -> None:
        """Host library: end every wait when the int32 at ``abort_word`` (0: none) is set or a process ends."""
        fds = (ctypes.c_int * len(pidfds))(*pidfds)
        _check(self._lib, self._lib.nvrar_host_watch(self._handle, abort_word or None, fds), "watch")

    def all_reduce(self, x: int, out: int, count: int, dtype: int, plan: Any, stream: int) -> None:
        """Sum ``count`` elements at ``x`` into ``out``.

        Raises:
            NvrarFailed: a peer is gone or late, or somebody aborted.
            CommError: an argument is impossible.
        """
        status = self._all_reduce(self._handle, x, out, count, dtype, plan, stream)
        if status:
            self._raise(status, "all_reduce")

    def all_reduce_rmsnorm(
        self, x: int, residual: int, weight: int, out: int, rows: int, hidden: int, eps: float, dtype: int, plan: Any,
        stream: int,
    ) -> None:  # fmt: skip
        """Sum, add to ``residual``, normalise into ``out``. Raises as `all_reduce`."""
        status = self._norm(self._handle, x, residual, weight, out, rows, hidden, eps, dtype, plan, stream)
        if status:
            self._raise(status, "all_reduce_rmsnorm")

    def note_times(self) -> None:
        """Calls made, or captured in a graph, from now on note their times."""
        _check(self._lib, self._lib.nvrar_stamps(self._handle, 1), "stamps")

    def stamps(self) -> list[Stamp]:
        """Times of the latest calls that noted them, oldest first; waits for the device to be idle."""
        raw, count = (_Stamp * MOST_STAMPS)(), ctypes.c_uint32()
        _check(
            self._lib, self._lib.nvrar_read_stamps(self._handle, raw, MOST_STAMPS, ctypes.byref(count)), "read_stamps"
        )
        # A call that needed no data of a peer has waited for none.
        met = [(s.entered_ns, s.arrived_ns or s.entered_ns, s.left_ns) for s in raw[: count.value]]
        return [Stamp((arrived - entered) * 1e-9, (left - arrived) * 1e-9) for entered, arrived, left in met]

    def failure(self) -> Failure | None:
        """The first failure, or None. Never blocks; any thread."""
        record = _Record()
        with self._lock:
            if self._handle is None or self._lib.nvrar_error(self._handle, ctypes.byref(record)) != _FAILED:
                return None
        reason, phase = REASONS.get(record.reason, "?"), PHASES.get(record.phase, "?")
        return Failure(reason, record.rank, record.peer, phase, record.step, record.epoch, record.block)

    def abort(self) -> None:
        """End every wait, here and on the peers. Any thread."""
        with self._lock:
            if self._handle is not None:
                self._lib.nvrar_abort(self._handle)

    def close(self) -> str:
        """Free it; may be called twice. What went wrong, or an empty string; it is closed in any case."""
        with self._lock:
            handle, self._handle = self._handle, None
        return _words(self._lib) if handle is not None and self._lib.nvrar_finalize(handle) else ""

    def _raise(self, status: int, what: str) -> None:
        if status == _FAILED:
            raise NvrarFailed(_words(self._lib))
        _check(self._lib, status, what)


def raw_plan(plan: Plan) -> Any:
    """``plan`` as the library takes it (a pointer); keep it, since building it costs more than a small call."""
    words = (ALGORITHMS.index(plan.algorithm), FORMATS.index(plan.format), plan.blocks, plan.threads, plan.parts)
    return ctypes.pointer(_Plan(*words))


def _words(lib: ctypes.CDLL) -> str:
    return bytes(lib.nvrar_last_error()).decode(errors="replace")


def _check(lib: ctypes.CDLL, status: int, what: str) -> None:
    if status == _OK:
        return
    kind = {_INVALID: "impossible", _TOO_LARGE: "too large", _SYSTEM: "system", _FAILED: "failed"}
    raise CommError(f"nvrar {what}: {kind.get(status, status)}: {_words(lib)}")
