"""Opens NVRAR for a group: library, memory, agreement, watch. Everything collective about it happens here."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import select
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch

from yalis.comm.group import Group, WaitFailed
from yalis.comm.nvrar import library
from yalis.comm.nvrar.build import Kind, source_digest
from yalis.comm.nvrar.library import Failure, Handle, NvrarFailed, Options, Plan, Stamp
from yalis.comm.shm import open_pidfds, share_memory
from yalis.comm.tuning import Limits, TunedTable, default_norm_plan, default_plan, shape_of
from yalis.errors import BuildError, CommError, ConfigError
from yalis.utils.logging import get_logger
from yalis.utils.native import BUILD_TIMEOUT_S

logger = get_logger(__name__)

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MAX_BYTES = 4 << 20
"""Default capacity. Larger messages are bound by bandwidth and go elsewhere (`yalis.comm.policy.choose`)."""

OPTIONS_VARIABLE = "YALIS_NVRAR_OPTIONS"
"""Names out of ``relay``, ``whole_cells``, ``ordinary_launch`` (nvrar.h), with commas between; alike on all ranks."""
_WATCH_S = 0.02
_ASK_S = 0.5
_FAILURE = "nvrar-failure"
_DEADLINE_SHARE = 0.9  # of the group's time-out: the rank that gave up must still tell who it waited for


def chosen_options() -> list[str]:
    """What ``$YALIS_NVRAR_OPTIONS`` turns on.

    Raises:
        ConfigError: a name is unknown.
    """
    known = ("relay", "whole_cells", "ordinary_launch")
    names = [name.strip() for name in os.environ.get(OPTIONS_VARIABLE, "").split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"{OPTIONS_VARIABLE}: {name!r} is none of {', '.join(known)}")
    return names


class NvrarWaitFailed(WaitFailed):
    """A wait of NVRAR failed: the phase and step in words, for the error that names the culprit."""

    def __init__(self, message: str, suspect: int | None, failure: Failure) -> None:
        super().__init__(message, suspect)
        self.failure = failure


class Link:
    """NVRAR between the ranks of one group.

    Use `connect`. Tensors are contiguous and on the group's device. Calls raise `NvrarWaitFailed`.

    Attributes:
        capacity: bytes of the largest message.
        max_hidden: longest row of `all_reduce_rmsnorm`; 0: not available.
        limits: what plans may use.
        table: the tuned table, or None.
    """

    def __init__(
        self, group: Group, handle: Handle, table: TunedTable | None, memory: mmap.mmap | None, abort_flag: int
    ) -> None:
        self._group = group
        self._handle = handle
        self._memory = memory
        self._flag = ctypes.c_int32.from_address(abort_flag) if abort_flag else ctypes.c_int32(0)
        self._pidfds: list[int] = []
        self._watchdog: _Watchdog | None = None
        self._raw: dict[tuple[torch.dtype, int, bool], tuple[int, Any]] = {}
        self._cuda = group.device.type == "cuda"
        nodes, local = shape_of(group.shape)
        info = handle.info
        self.capacity = info.max_bytes
        self.max_hidden = info.max_hidden
        self.limits = Limits(
            group.device.type, nodes, local, info.blocks, info.threads, info.formats, info.relay != 0, info.parts
        )
        self.table = table

    @classmethod
    def connect(
        cls, group: Group, table: TunedTable | None, *, max_bytes: int = MAX_BYTES, blocks: int = 0, abort_flag: int = 0
    ) -> Link:
        """Open NVRAR (collective over the group).

        Args:
            group: connected; on CPU all members must be on one host.
            table: rank 0's tuned table, already the same on all ranks.
            max_bytes: capacity; blocks: most blocks of a call (0: the library's default).
            abort_flag: address of an int32 that ends every wait when it turns nonzero; 0: none.

        Raises:
            CommError: some rank cannot; the same on every rank, with the first such rank's reason.
            ConfigError: the ranks do not agree on version, options or plans; names them.
            PeerLostError: a member did not come.
        """
        kind: Kind = "cuda" if group.device.type == "cuda" else "host"
        nodes, local = shape_of(group.shape)
        node, index = divmod(group.index, local)
        chosen = dict.fromkeys(chosen_options(), True)
        options = Options(
            nodes, local, node, index, group.timeout_s * _DEADLINE_SHARE, blocks, max_bytes=max_bytes, **chosen
        )  # fmt: skip
        problem, unique, size, arch = "", b"", 0, 0
        try:
            if kind == "cuda":
                major, minor = torch.cuda.get_device_capability(group.device)
                arch = 10 * major + minor
            elif not group.shape.one_host:
                raise CommError("its host library works between processes of one host, and these ranks share none")
            library.load(kind, arch)
            if kind == "host":
                size = library.host_bytes(options)
            if group.index == 0:
                unique = library.unique_id(kind, arch)
        except (BuildError, CommError, OSError) as error:
            problem = str(error).splitlines()[0]
        # Some ranks may have compiled while others found the library: wait as long as a compiler may take.
        hello = json.dumps({"problem": problem, "id": unique.hex()})
        words = [json.loads(word) for word in group.exchange("nvrar-hello", hello, BUILD_TIMEOUT_S)]
        _refuse_problems(group, [word["problem"] for word in words])
        _agree(group, _facts(kind, options, table))
        unique = bytes.fromhex(words[0]["id"])
        memory: mmap.mmap | None = None
        if kind == "host":
            memory = share_memory(group, range(group.size), size, "nvrar", lambda mapped: mapped)
        handle = None
        try:
            base = 0 if memory is None else ctypes.addressof(ctypes.c_char.from_buffer(memory))
            if kind == "cuda":
                with torch.cuda.device(group.device):
                    handle = Handle(kind, arch, options, unique)
                    handle.note_times()  # before graphs are captured; some 10 ns a call
            else:
                handle = Handle(kind, 0, options, unique, base)
                handle.note_times()
        except (CommError, BuildError) as error:
            problem = str(error).splitlines()[0]
        problems = group.exchange("nvrar-open", problem)
        if any(problems):
            if handle is not None:
                handle.abort()
                handle.close()
            _refuse_problems(group, problems)
        assert handle is not None
        link = cls(group, handle, table, memory, abort_flag)
        if kind == "host":
            link._pidfds = list(open_pidfds(group, range(group.size)))
            handle.watch(abort_flag, link._pidfds)
        limits = [json.loads(word) for word in group.exchange("nvrar-limits", json.dumps(asdict(link.limits)))]
        if any(other != limits[0] for other in limits):
            link.close(failed=True)
            raise CommError(f"nvrar: the ranks have different limits: {limits}")
        return link

    def plan(self, dtype: torch.dtype, nbytes: int, norm: bool = False) -> Plan:
        """How a message is reduced (``norm``: by the fused call); the same on every rank."""
        found = self.table.plan(dtype, nbytes, norm) if self.table is not None else None
        return found or (default_norm_plan if norm else default_plan)(self.limits, nbytes)

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor, plan: Plan | None = None) -> None:
        """``out`` = sum of ``x`` over the members; ``out`` may be ``x``. ``plan``: in place of the usual one."""
        dtype, raw = self._plan(x) if plan is None else (DTYPES[x.dtype], library.raw_plan(plan))
        try:
            self._handle.all_reduce(x.data_ptr(), out.data_ptr(), x.numel(), dtype, raw, self._stream())
        except NvrarFailed as error:
            raise self._explain(str(error)) from error

    def all_reduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        plan: Plan | None = None,
    ) -> None:
        """``residual += sum(x)``; ``out`` (may be ``x``) = its RMS norm by rows. x, residual, out: [..., hidden]."""
        hidden = x.shape[-1]
        dtype, raw = self._plan(x, True) if plan is None else (DTYPES[x.dtype], library.raw_plan(plan))
        try:
            self._handle.all_reduce_rmsnorm(
                x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // hidden, hidden, eps,
                dtype, raw, self._stream(),
            )  # fmt: skip
        except NvrarFailed as error:
            raise self._explain(str(error)) from error

    def stamps(self) -> list[Stamp]:
        """Waiting and moving of this rank's latest calls, oldest first; waits for the device to be idle."""
        with torch.cuda.device(self._group.device) if self._cuda else contextlib.nullcontext():
            return self._handle.stamps()

    def failed(self) -> NvrarWaitFailed | None:
        """What went wrong so far, on this rank's device or told by a peer; None if nothing did. Never waits."""
        return self._explain("") if self._handle.failure() is not None else None

    def watch(self, on_failure: Callable[[NvrarWaitFailed], object]) -> None:
        """CUDA: from now on a thread looks for failures while nobody calls, and hands the first one over."""
        self._watchdog = _Watchdog(self, on_failure)
        self._watchdog.start()

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._group.device

    @property
    def verdict_out(self) -> bool:
        """Whether the guard has raised its flag."""
        return self._flag.value != 0

    def abort(self) -> None:
        """End every wait, here and on the peers."""
        self._handle.abort()

    def close(self, failed: bool = False) -> None:
        """Let go; not collective. ``failed``: end waits first, so that nothing is waited for."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        # A verdict about some other communicator counts: the rank that is gone would be waited for here, too.
        if failed or self.verdict_out:
            self._handle.abort()
        if words := self._handle.close():
            logger.warning("group %s: closing nvrar: %s", list(self._group.ranks), words)
        for fd in self._pidfds:
            if fd >= 0:
                os.close(fd)
        self._pidfds = []
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _plan(self, x: torch.Tensor, norm: bool = False) -> tuple[int, Any]:
        """Dtype and plan of ``x`` as the library takes them; kept, since making them costs as much as a small call."""
        key = (x.dtype, x.nbytes, norm)
        found = self._raw.get(key)
        if found is None:
            found = self._raw[key] = (DTYPES[x.dtype], library.raw_plan(self.plan(*key)))
        return found

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._group.device).cuda_stream if self._cuda else 0

    def _share(self, failure: Failure) -> Failure:
        """On CUDA each rank has a record of its own: who saw the cause tells, who was only told to stop asks."""
        store = self._group.store
        if not self._cuda or store is None:
            return failure
        with contextlib.suppress(RuntimeError):  # the store may have gone with the rank that held it
            if failure.reason == "late":
                store.set(_FAILURE, json.dumps(asdict(failure)))
            elif failure.reason == "peer failed":
                store.wait([_FAILURE], timedelta(seconds=_ASK_S))
                return Failure(**json.loads(store.get(_FAILURE)))
        return failure

    def _explain(self, words: str) -> NvrarWaitFailed:
        failure = self._share(self._handle.failure() or Failure("aborted", -1, -1, "unknown", -1, 0, 0))
        suspect: int | None = None
        # A process that ended is noticed long before the time runs out; survivors that gave up may have ended since.
        gone = [i for i, fd in enumerate(self._pidfds) if fd >= 0 and select.select([fd], [], [], 0)[0]]
        if failure.reason == "late" and failure.peer >= 0:
            suspect = failure.peer
            ranks, waited = self._group.ranks, self._group.timeout_s * _DEADLINE_SHARE
            words = f"rank {ranks[failure.rank]} waited {waited:g} s for rank {ranks[suspect]}"
        elif gone:
            suspect = failure.peer if failure.peer in gone else gone[0]
            words = f"the process of rank {self._group.ranks[suspect]} has ended"
        else:
            words = words or "aborted"  # a rank that only heard of a failure, and not from whom, can say no more
        return NvrarWaitFailed(f"{words} ({failure})", suspect, failure)


class _Watchdog(threading.Thread):
    """Sees a failure that the device reported while the main thread does something else (or waits for the device)."""

    def __init__(self, link: Link, on_failure: Callable[[NvrarWaitFailed], object]) -> None:
        super().__init__(name="yalis-nvrar-watchdog", daemon=True)
        self._link = link
        self._on_failure = on_failure
        self._end = threading.Event()

    def run(self) -> None:
        aborted = False
        while not self._end.wait(_WATCH_S):
            if self._link.verdict_out and not aborted:
                aborted = True
                self._link.abort()
            failed = self._link.failed()
            if failed is not None:
                self._on_failure(failed)
                return

    def stop(self) -> None:
        self._end.set()
        if threading.current_thread() is not self:
            self.join(2.0)


def _refuse_problems(group: Group, problems: list[str]) -> None:
    for index, problem in enumerate(problems):
        if problem:
            member = group.members[index]
            raise CommError(f"nvrar: rank {member.rank} on {member.hostname}: {problem}")


def _facts(kind: Kind, options: Options, table: TunedTable | None) -> dict[str, str]:
    """What all ranks must hold alike, else they would run different exchanges and wait for each other."""
    from yalis import __version__

    common = {k: v for k, v in asdict(options).items() if k not in ("node", "index")}
    # The choices themselves too: a plan that depended on the rank would show here.
    limits = Limits("cuda" if kind == "cuda" else "cpu", options.nodes, options.local, 32, 512, library.FORMATS)
    plans = [
        str(
            (table and table.plan(dtype, nbytes, norm)) or (default_norm_plan if norm else default_plan)(limits, nbytes)
        )
        for norm in (False, True)
        for dtype in DTYPES
        for nbytes in (2, 4096, 16384, 16385, 65536, 1 << 20, options.max_bytes)
    ]
    return {
        "yalis version": __version__,
        "native sources": source_digest(),
        "library": kind,
        "options": json.dumps(common, sort_keys=True),
        "tuned table": table.digest() if table is not None else "none",
        "plans": hashlib.sha256("\n".join(plans).encode()).hexdigest()[:16],
    }


def _agree(group: Group, facts: Mapping[str, str]) -> None:
    """Refuse, on every rank alike, a group whose members differ in ``facts``."""
    theirs = [json.loads(word) for word in group.exchange("nvrar-agree", json.dumps(facts))]
    for name in facts:
        values = [their.get(name) for their in theirs]
        odd = [i for i, value in enumerate(values) if value != values[0]]
        if odd:
            told = [f"rank {group.ranks[i]} on {group.members[i].hostname} has {values[i]}" for i in (0, *odd)]
            raise ConfigError(
                f"nvrar: the ranks differ in {name}: {', '.join(told)}; start all ranks from one installation with the "
                "same options"
            )
