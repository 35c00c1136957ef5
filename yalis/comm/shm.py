"""Shared memory between the ranks of one host: setting it up, and the compiled collectives on it.

The protocol and its proof are in ``csrc/shm_allreduce.c``. The memory never has a name in a file system: the first rank
creates it as a memfd and the others open that descriptor through /proc. So nothing stays behind however and whenever
the processes end, and the size limit of /dev/shm (64 MB in many containers) does not count.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from yalis.comm.group import Group, WaitFailed
from yalis.errors import BuildError, CommError
from yalis.utils.logging import get_logger
from yalis.utils.native import cpu_flags, load_shared_object

logger = get_logger(__name__)
T = TypeVar("T")

# One slot; a rank has two. Longer messages go through in pieces. 256 KiB keeps both slots of a few ranks in L2/L3.
CAPACITY = 256 * 1024
# -ffp-contract=off: a fused multiply-add would round elsewhere than the portable build does.
_FLAGS = ("-march=native", "-ffp-contract=off")
_WIDE = ("-mprefer-vector-width=512",)  # gcc uses half of an AVX-512 register by default
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LATE, _ABORTED, _GONE, _MISMATCH = 1, 2, 3, 4
_MAX_RANKS = 64


# How long a rank spins with pause, then yields between looks, before it sleeps; in microseconds. To sleep and be woken
# costs 10 to 20 us, so a rank with a core of its own looks on for longer than the ranks usually differ in a layer. With
# more ranks than cores a rank that looks on may hold up the one that it waits for.
SPIN_US = 2.0
YIELD_US = 200.0
YIELD_CROWDED_US = 20.0


def yield_budget_us(ranks_on_host: int, cores: int) -> float:
    """How long to yield before sleeping."""
    return YIELD_US if ranks_on_host <= cores else YIELD_CROWDED_US


def one_shot_limit(ranks: int) -> int:
    """Largest message in bytes that every rank sums by itself (measured; a pure function of the group's size).

    One-shot saves a stage and makes each rank read ranks - 1 messages.
    """
    return 64 * 1024 // max(1, ranks - 1)


@cache
def library() -> ctypes.CDLL:
    """The compiled collectives.

    Raises:
        BuildError: there is no C compiler, or it refused.
    """
    flags = _FLAGS + (_WIDE if "avx512f" in cpu_flags() else ())
    lib = load_shared_object("shm_allreduce", [Path(__file__).parent / "csrc" / "shm_allreduce.c"], flags)
    pointer, size, integer, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    for name, result, arguments in (
        ("yalis_shm_bytes", size, [integer, size]),
        (
            "yalis_shm_open",
            pointer,
            [pointer, integer, integer, size, ctypes.c_uint32, long, long, long, pointer, pointer],
        ),
        ("yalis_shm_close", None, [pointer]),
        ("yalis_shm_waited_ns", long, [pointer]),
        ("yalis_shm_all_reduce", integer, [pointer, pointer, pointer, size, integer, size]),
        ("yalis_shm_reduce_scatter", integer, [pointer, pointer, pointer, size, integer]),
        ("yalis_shm_all_gather", integer, [pointer, pointer, pointer, size, size]),
        ("yalis_shm_broadcast", integer, [pointer, pointer, size, integer]),
        ("yalis_shm_barrier", integer, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib


class SharedSegment:
    """The shared memory of those members of a group that stand on this rank's node, and the collectives over them.

    "Peer" and "position" count within these members; tensors are contiguous CPU tensors. Calls raise `WaitFailed` when
    a peer is gone or late, and `CommError` when the ranks did not make the same call.

    Use `connect`. ``ranks`` is the number of members here, ``rank`` this one's position.
    """

    def __init__(self, memory: mmap.mmap, group: Group, abort_flag: int, first_stage: int, capacity: int):
        self._lib = library()
        self._group = group
        self.ranks = len(group.local)
        self.rank = group.position
        self._limit = one_shot_limit(self.ranks)
        self._memory = memory
        # The buffer export pins the mapping: closing it under a running call is impossible.
        self._base = (ctypes.c_char * len(memory)).from_buffer(memory)
        self._pidfds = open_pidfds(group, group.local)
        self._context: int | None = self._lib.yalis_shm_open(
            ctypes.addressof(self._base),
            self.ranks,
            self.rank,
            capacity,
            first_stage,
            int(group.timeout_s * 1e9),
            int(SPIN_US * 1e3),
            int(yield_budget_us(ranks_on_host(group), len(os.sched_getaffinity(0))) * 1e3),
            abort_flag or None,
            (ctypes.c_int * self.ranks)(*self._pidfds),
        )
        if self._context is None:
            raise CommError(f"shared memory: {self.ranks} ranks with slots of {capacity} bytes are not possible")
        self._all_reduce = self._lib.yalis_shm_all_reduce

    @classmethod
    def connect(
        cls,
        group: Group,
        abort_flag: int = 0,
        *,
        first_stage: int = 0,
        capacity: int = CAPACITY,
    ) -> SharedSegment | None:
        """Map one segment per node (collective over the whole group); None where a node has but this member.

        Args:
            group: connected.
            abort_flag: address of an int32; when it turns nonzero every wait ends. 0: none.
            first_stage: where the stage counter starts, the same on all ranks (to test its wrap).
            capacity: bytes of a slot, a multiple of 64.

        Raises:
            CommError: some rank of the group could not; the same on every rank, with the first such rank's reason.
            PeerLostError: a member did not come.
        """
        problem, size = "", 0
        try:
            if len(group.local) > _MAX_RANKS:
                raise CommError(f"{len(group.local)} ranks on one node; at most {_MAX_RANKS} can share memory")
            size = int(library().yalis_shm_bytes(len(group.local), capacity))
        except (BuildError, CommError, OSError) as error:
            problem = str(error).splitlines()[0]
        return share_memory(
            group,
            group.local,
            size,
            "shm",
            lambda memory: cls(memory, group, abort_flag, first_stage, capacity),
            problem,
        )

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``out`` = sum over members in order of position, fp32 accumulation, one rounding; ``out`` may be ``x``."""
        result = self._all_reduce(self._context, x.data_ptr(), out.data_ptr(), x.numel(), _DTYPES[x.dtype], self._limit)
        if result:
            self._fail(result)

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``out`` = this member's balanced shard (see `yalis.comm.shards`) of the sum of ``x``."""
        result = self._lib.yalis_shm_reduce_scatter(
            self._context, x.data_ptr(), out.data_ptr(), x.numel(), _DTYPES[x.dtype]
        )
        if result:
            self._fail(result)

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor) -> None:
        """``out`` = every member's balanced shard in order; ``shard`` may be its own place in ``out``."""
        result = self._lib.yalis_shm_all_gather(
            self._context, shard.data_ptr(), out.data_ptr(), out.numel(), out.element_size()
        )
        if result:
            self._fail(result)

    def broadcast(self, x: torch.Tensor, root: int) -> None:
        """Copy the ``x`` of the member at position ``root`` into everybody's."""
        result = self._lib.yalis_shm_broadcast(self._context, x.data_ptr(), x.nbytes, root)
        if result:
            self._fail(result)

    def barrier(self) -> None:
        """Return when every member has come here."""
        result = self._lib.yalis_shm_barrier(self._context)
        if result:
            self._fail(result)

    @property
    def waited_s(self) -> float:
        """Seconds that calls have waited for members that came later; not the time of a first look that found them."""
        context = self._context
        return 0.0 if context is None else float(self._lib.yalis_shm_waited_ns(context)) * 1e-9

    def close(self) -> None:
        """Unmap; not collective. No call may be running."""
        context, self._context = self._context, None
        if context is None:
            return
        self._lib.yalis_shm_close(context)
        for fd in self._pidfds:
            if fd >= 0:
                os.close(fd)
        del self._base
        self._memory.close()

    def _fail(self, result: int) -> None:
        kind, position = result % 16, result // 16
        index = self._group.local[position]
        rank = self._group.ranks[index]
        if kind == _MISMATCH:
            raise CommError(
                f"shared memory: rank {rank} made another call than rank {self._group.ranks[self._group.index]} "
                "(operation, dtype or size differ); all members must make the same calls in the same order"
            )
        raise WaitFailed(*wait_words(self._group, kind, index))


def wait_words(group: Group, kind: int, index: int) -> tuple[str, int | None]:
    """Why a wait for member ``index`` ended, as ``csrc/shm_wait.h`` numbers it, and whom to suspect."""
    rank = group.ranks[index]
    words = {
        LATE: f"rank {rank} was silent for {group.timeout_s:g} s",
        _ABORTED: f"a verdict came while waiting for rank {rank}",
        _GONE: f"the process of rank {rank} has ended",
    }[kind]
    # After a verdict the peer that we happened to wait for is not the suspect.
    return words, None if kind == _ABORTED else index


def ranks_on_host(group: Group) -> int:
    """Ranks that share this host's cores."""
    # The launcher knows of ranks outside this group; the group knows its own even where the launcher says nothing.
    mine = group.members[group.index].memory_domain
    together = sum(member.memory_domain == mine for member in group.members)
    return max(together, group.topology.ranks_on_host or 0)


def share_memory(
    group: Group,
    members: Sequence[int],
    size: int,
    key: str,
    make: Callable[[mmap.mmap], T],
    problem: str = "",
    *,
    reserve: bool = True,
) -> T | None:
    """Map one zeroed segment among ``members``, this rank's own among them (collective over the whole group).

    Args:
        group: connected.
        members: indices of those that share this rank's segment, ascending; other members of the group may have others.
        size: bytes, the same among ``members``.
        key: names the exchange in the group's store; used once per group.
        make: builds what uses the memory, before anybody may use it.
        problem: why this rank cannot take part, found before; empty: nothing stands in the way.
        reserve: take the memory now; else as it is first written.

    Returns:
        What ``make`` returned; None where ``members`` is this rank alone.

    Raises:
        CommError: some rank of the group could not; the same on every rank, with the first such rank's reason.
        PeerLostError: a member did not come.
    """
    leader = members[0] == group.index
    alone = len(members) == 1
    made: T | None = None
    fd = -1
    try:
        try:
            if leader and not alone and not problem:
                fd = os.memfd_create("yalis-comm", os.MFD_CLOEXEC)
                os.ftruncate(fd, size)
                if reserve:  # too little memory is an error here and not a SIGBUS later
                    os.posix_fallocate(fd, 0, size)
        except OSError as error:
            problem = str(error)
        places = group.exchange(f"{key}-place", f"/proc/{os.getpid()}/fd/{fd}" if fd >= 0 else "")
        source = places[members[0]]
        try:
            if not problem and not alone and source:
                if not leader:
                    fd = os.open(source, os.O_RDWR | os.O_CLOEXEC)
                made = make(mmap.mmap(fd, size, mmap.MAP_SHARED | (mmap.MAP_POPULATE if reserve else 0)))
        except (CommError, OSError) as error:
            problem = str(error).splitlines()[0]
        # Everybody has mapped it, or knows that somebody could not; this is also the moment from which flags count.
        words = group.exchange(f"{key}-mapped", problem)
    finally:
        if fd >= 0:
            os.close(fd)
    for index, word in enumerate(words):
        if word:
            if made is not None and hasattr(made, "close"):
                made.close()
            raise CommError(f"shared memory: rank {group.ranks[index]} on {group.members[index].hostname}: {word}")
    return made


def open_pidfds(group: Group, members: Sequence[int]) -> Sequence[int]:
    """A descriptor per member that tells when its process ends; -1 for this rank and where there can be none."""
    pidfds = []
    for index in members:
        fd = -1
        if index != group.index and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(group.members[index].pid)
        pidfds.append(fd)
    return pidfds
