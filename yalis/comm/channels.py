"""Messages between the ranks of one node through rings in shared memory (``csrc/shm_channel.c``).

A message goes into the ring when it is sent, so that a sender goes on at once. What does not fit is carried on by a
thread of the sender; the receiver takes a message when it waits for it, or asks whether it is there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import torch

from yalis.comm.group import Group, WaitFailed
from yalis.comm.shm import LATE, SPIN_US, open_pidfds, ranks_on_host, share_memory, wait_words, yield_budget_us
from yalis.errors import BuildError, CommError
from yalis.utils.native import load_shared_object

# Bytes of a ring, a power of two: hidden states of a decode step fit whole, and both sides' copies stay in L2.
CAPACITY = 1 << 20
# How long to wait for one message before looking after others, in seconds.
_SLICE_S = 0.001


@cache
def library() -> ctypes.CDLL:
    """The compiled rings.

    Raises:
        BuildError: there is no C compiler, or it refused.
    """
    lib = load_shared_object("shm_channel", [Path(__file__).parent / "csrc" / "shm_channel.c"])
    pointer, size, integer, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    for name, result, arguments in (
        ("yalis_channel_bytes", size, [size]),
        ("yalis_channel_open", pointer, [pointer, size, integer, ctypes.c_uint32, integer, long, long, pointer]),
        ("yalis_channel_close", None, [pointer]),
        ("yalis_channel_stop", None, [pointer]),
        ("yalis_channel_push", long, [pointer, pointer, size, size]),
        ("yalis_channel_pull", long, [pointer, pointer, size, size]),
        ("yalis_channel_wait_room", integer, [pointer, long]),
        ("yalis_channel_wait_bytes", integer, [pointer, long]),
    ):
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib


class Channels:
    """A ring from every member of this rank's node to every other one of it, within one group.

    Tensors are contiguous CPU tensors. Messages between two members arrive in the order in which they were sent.

    Use `connect`.
    """

    def __init__(self, memory: mmap.mmap, group: Group, abort_flag: int, first: int, capacity: int):
        self._memory = memory
        # The buffer export pins the mapping: closing it under a running call is impossible.
        self._base = (ctypes.c_char * len(memory)).from_buffer(memory)
        self._pidfds = open_pidfds(group, group.local)
        size = int(library().yalis_channel_bytes(capacity))
        here, many = group.position, len(group.local)
        self._out: dict[int, _Sender] = {}
        self._in: dict[int, _Receiver] = {}
        receivers = self._in.values()
        for place, index in enumerate(group.local):
            if index == group.index:
                continue
            how = (capacity, first, self._pidfds[place], group, index, abort_flag, receivers)
            base = ctypes.addressof(self._base)
            self._out[index] = _Sender(base + (here * many + place) * size, *how)
            self._in[index] = _Receiver(base + (place * many + here) * size, *how)

    @classmethod
    def connect(cls, group: Group, abort_flag: int = 0, *, first: int = 0, capacity: int = CAPACITY) -> Channels | None:
        """Map one segment per node (collective over the whole group); None where a node has but this member.

        Args:
            group: connected.
            abort_flag: address of an int32; when it turns nonzero every wait ends. 0: none.
            first: where the counters of bytes start, a multiple of 64, the same on all ranks (to test their wrap).
            capacity: bytes of a ring, a power of two; its memory is taken as messages pass.

        Raises:
            CommError: some rank of the group could not; the same on every rank, with the first such rank's reason.
            PeerLostError: a member did not come.
        """
        problem, size = "", 0
        try:
            size = len(group.local) ** 2 * int(library().yalis_channel_bytes(capacity))
        except (BuildError, OSError) as error:
            problem = str(error).splitlines()[0]
        make = lambda memory: cls(memory, group, abort_flag, first, capacity)  # noqa: E731
        return share_memory(group, group.local, size, "channels", make, problem, reserve=False)

    def reaches(self, peer: int) -> bool:
        """Whether member ``peer`` is on this rank's node."""
        return peer in self._out

    def isend(self, x: torch.Tensor, dst: int) -> Passage:
        """Start to send ``x`` to member ``dst``; ``x`` must stay unchanged until the passage ends."""
        return self._out[dst].start(x)

    def irecv(self, out: torch.Tensor, src: int) -> Passage:
        """Start to receive from member ``src`` into ``out``."""
        return self._in[src].start(out)

    def close(self) -> None:
        """End what is under way and unmap; not collective, may be called twice."""
        for end in (*self._out.values(), *self._in.values()):
            end.close()
        for fd in self._pidfds:
            if fd >= 0:
                os.close(fd)
        if self._out:
            del self._base
            self._memory.close()
        self._out, self._in, self._pidfds = {}, {}, []


class Passage:
    """A message on its way; keeps its tensor alive."""

    __slots__ = ("_end", "failed", "moved", "tensor", "thread", "total")

    def __init__(self, end: _Sender | _Receiver, tensor: torch.Tensor):
        self._end = end
        self.tensor = tensor
        self.total = 64 + (tensor.nbytes + 63) // 64 * 64
        self.moved = 0  # of total, as the ring counts
        self.failed = 0  # why the sender's thread gave up, as `wait_words` numbers it
        self.thread: Thread | None = None  # of the sender, where the ring was too full

    def wait(self) -> torch.Tensor:
        """Wait until the tensor may be reused (send) or read (receive) and return it.

        Raises:
            WaitFailed: the peer is gone or silent past the group's timeout.
            CommError: the peer sent a message of another size.
        """
        if self.moved != self.total:
            self._end.finish(self)
        return self.tensor

    def done(self) -> bool:
        """True when `wait` would return at once."""
        if self.moved != self.total:
            self._end.advance()
        return self.moved == self.total


class _End:
    """One side of one ring. ``index`` is the other side's member; ``receivers`` are all of this rank's."""

    producer: ClassVar[bool]

    def __init__(
        self,
        base: int,
        capacity: int,
        first: int,
        pidfd: int,
        group: Group,
        index: int,
        abort_flag: int,
        receivers: Collection[_Receiver],
    ):
        self._receivers = receivers
        self._lib = library()
        self._group = group
        self._index = index
        self._ring: int | None = self._lib.yalis_channel_open(
            base,
            capacity,
            self.producer,
            first,
            pidfd,
            int(SPIN_US * 1e3),
            int(yield_budget_us(ranks_on_host(group), len(os.sched_getaffinity(0))) * 1e3),
            abort_flag or None,
        )
        if self._ring is None:
            raise CommError(f"a ring of {capacity} bytes is not possible; it must be a power of two, at least 64")

    def close(self) -> None:
        """No call may be running, but for the sender's own thread."""
        ring, self._ring = self._ring, None
        if ring is not None:
            self._lib.yalis_channel_close(ring)

    def _wait(self, passage: Passage, look: Callable[[float], int]) -> None:
        """Until the passage is over, ``look(seconds)`` being a wait for it to go on.

        Meanwhile other messages that this rank has begun to receive are taken: their senders may wait for that, and
        whoever this one waits for may wait for them.
        """
        deadline_s = time.monotonic() + self._group.timeout_s
        while passage.moved != passage.total:
            others = [receiver for receiver in self._receivers if receiver is not self and receiver.expects]
            left_s = deadline_s - time.monotonic()
            kind = look(min(left_s, _SLICE_S) if others else left_s)
            if kind != LATE or left_s <= _SLICE_S or not others:
                self._check(kind)
            self.advance()
            for receiver in others:
                receiver.advance()

    def advance(self) -> None:
        """Move what can be moved now."""

    def _check(self, kind: int) -> None:
        if kind:
            raise WaitFailed(*wait_words(self._group, kind, self._index))


class _Sender(_End):
    producer = True

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self._last: Passage | None = None  # that was given to a thread

    def start(self, x: torch.Tensor) -> Passage:
        passage = Passage(self, x)
        before = self._last
        if before is None or before.moved == before.total:
            before = self._last = None
            self._push(passage)
        if passage.moved != passage.total:
            self._last = passage
            # A daemon: a process that ends without `close` must not wait for a receiver.
            passage.thread = Thread(target=self._carry_on, args=(passage, before), daemon=True)
            passage.thread.start()
        return passage

    def finish(self, passage: Passage) -> None:
        thread = passage.thread
        assert thread is not None

        def look(seconds: float) -> int:
            thread.join(seconds)
            return passage.failed or (LATE if passage.moved != passage.total else 0)

        self._wait(passage, look)

    def close(self) -> None:
        if self._ring is not None:
            self._lib.yalis_channel_stop(self._ring)
        if self._last is not None and self._last.thread is not None:
            self._last.thread.join()  # ends at its next look at the stop word, within 5 ms
        super().close()

    def _push(self, passage: Passage) -> None:
        x = passage.tensor
        passage.moved = self._lib.yalis_channel_push(self._ring, x.data_ptr(), x.nbytes, passage.moved)

    def _carry_on(self, passage: Passage, before: Passage | None) -> None:
        """In a thread, after the one of the message before. A receiver may be busy for as long as it likes: whoever
        waits for the passage has a deadline, and `close` ends it."""
        if before is not None and before.thread is not None:
            before.thread.join()
            passage.failed = before.failed
        while passage.moved != passage.total and not passage.failed:
            self._push(passage)
            if passage.moved != passage.total:
                kind = self._lib.yalis_channel_wait_room(self._ring, 1_000_000_000)
                passage.failed = 0 if kind == LATE else kind


class _Receiver(_End):
    producer = False

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self._expected: deque[Passage] = deque()

    def start(self, out: torch.Tensor) -> Passage:
        passage = Passage(self, out)
        self._expected.append(passage)
        return passage

    @property
    def expects(self) -> bool:
        """Whether a message has been asked for that is not here yet."""
        return bool(self._expected)

    def finish(self, passage: Passage) -> None:
        self.advance()
        self._wait(passage, lambda seconds: int(self._lib.yalis_channel_wait_bytes(self._ring, int(seconds * 1e9))))

    def advance(self) -> None:
        """Take out what is there, for the messages in order."""
        while self._expected:
            passage = self._expected[0]
            out = passage.tensor
            moved = self._lib.yalis_channel_pull(self._ring, out.data_ptr(), out.nbytes, passage.moved)
            if moved < 0:
                ranks = self._group.ranks
                raise CommError(
                    f"rank {ranks[self._index]} sent a message of {-1 - moved} bytes where rank "
                    f"{ranks[self._group.index]} expects {out.nbytes}; both sides must send and receive the same "
                    "messages in the same order"
                )
            passage.moved = moved
            if moved != passage.total:
                return
            self._expected.popleft()
