"""The side channel: rank 0 tells the other ranks what is new, one small frame per step.

A star over TCP. Payloads are opaque bytes of any size, in length-prefixed frames of `MAX_FRAME_BYTES` at most. The main
thread does the work itself: no thread lies on the path of a decode step. Waits poll the guard's abort flag, so that a
verdict ends them within `_POLL_S`.
"""

from __future__ import annotations

import ctypes
import select
import socket
import time
from collections.abc import Iterator
from types import TracebackType

from yalis.comm.guard import Guard, NullGuard
from yalis.comm.topology import Topology
from yalis.comm.wire import LENGTH, Store, connect_star
from yalis.errors import CommError

MAX_FRAME_BYTES = 16 << 20
"""A frame has to get through within the time limit, whatever the size of the payload that it is a part of."""
PATIENT = "idle, "
"""How the waits that may last for ever begin, as told to the guard: it judges who is dead or stopped, but not them."""
IDLE = PATIENT + "waiting for a command"
"""What an idle follower tells its guard."""

_POLL_S = 0.05
_FAREWELL = 0xFFFFFFFF
_MORE = 0x80000000  # set in the length of every frame of a payload but the last
_CHUNK = 1 << 16


class ChannelClosedError(CommError):
    """The other end closed the channel on purpose: the end of the run, not a failure."""


class ControlChannel:
    """Payloads between rank 0 and each other rank. Build with `connect`; not for use from several threads at once."""

    def __init__(self, links: dict[int, socket.socket], *, timeout_s: float, guard: Guard) -> None:
        self._links = links
        self._timeout_s = timeout_s
        self._guard = guard
        address = guard.abort_flag_address()
        self._flag = ctypes.c_int32.from_address(address) if address else None
        self._buffers = {rank: bytearray() for rank in links}
        self._pollers: dict[int, select.poll] = {}
        for rank, sock in links.items():
            self._pollers[rank] = select.poll()
            self._pollers[rank].register(sock, select.POLLIN)

    @classmethod
    def connect(
        cls,
        topology: Topology,
        store: Store,
        *,
        timeout_s: float,
        guard: Guard | None = None,
        bind_host: str | None = None,
        name: str = "control",
    ) -> ControlChannel:
        """Connect all ranks; collective.

        Args:
            topology: rank and world size.
            store: the launch's store (`torch.distributed.Store`); carries rank 0's address and the token.
            timeout_s: longest wait here, and the default of later waits, in seconds.
            guard: watches over the ranks; without one every wait ends after ``timeout_s``.
            bind_host: rank 0's interface; see `yalis.comm.wire.connect_star`.
            name: names the star in the store.

        Raises:
            CommError: a rank did not come in time.
        """
        links = connect_star(name, topology.rank, topology.world_size, store, timeout_s=timeout_s, bind_host=bind_host)
        return cls(links, timeout_s=timeout_s, guard=guard or NullGuard())

    def broadcast(self, payload: bytes) -> None:
        """Rank 0: send ``payload`` to every follower. Returns once the kernel has it, not once it is read.

        Raises:
            PeerLostError: a follower is gone, or did not read for ``timeout_s``.
        """
        for frame in _frames(payload):
            for rank in self._links:
                self._send(rank, frame)

    def recv(self, *, timeout_s: float | None = None) -> bytes:
        """Followers: the next payload from rank 0.

        Args:
            timeout_s: longest wait in seconds. None waits as long as rank 0 lives when the guard watches over it (an
                idle engine may be idle for days), and for the channel's ``timeout_s`` when there is no watch.

        Raises:
            ChannelClosedError: rank 0 ended the run.
            PeerLostError: a rank was lost, or the time is up.
        """
        if timeout_s is None:
            timeout_s = self._patience_s
        return self._receive(0, timeout_s, IDLE if timeout_s is None else "control/recv from rank 0")

    def send_to_root(self, payload: bytes) -> None:
        """Followers: send ``payload`` to rank 0. Raises as `broadcast`."""
        for frame in _frames(payload):
            self._send(0, frame)

    def recv_from(self, rank: int, *, timeout_s: float | None = None) -> bytes:
        """Rank 0: the next payload of ``rank``, within ``timeout_s`` (default the channel's). Raises as `recv`."""
        return self._receive(
            rank, self._timeout_s if timeout_s is None else timeout_s, f"control/recv from rank {rank}"
        )

    def assemble(self, tag: str) -> None:
        """Return when every rank has come here, however long the slowest works; collective.

        The guard still ends the wait when a rank dies or stops; without a watch it ends after the channel's
        ``timeout_s``.

        Args:
            tag: what the ranks come from, for messages.

        Raises:
            PeerLostError: a rank was lost.
        """
        what = f"{PATIENT}waiting for all ranks ({tag})"
        if 0 in self._links:
            self.send_to_root(b"")
            self._receive(0, self._patience_s, what)
            return
        for rank in self._links:
            self._receive(rank, self._patience_s, what)
        self.broadcast(b"")

    def close(self) -> None:
        """Say farewell and close; the other end gets `ChannelClosedError` after what was already sent. Idempotent."""
        for sock in self._links.values():
            try:
                sock.send(LENGTH.pack(_FAREWELL))
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # gone already, or so far behind that it will see the end of the stream instead
            sock.close()
        self._links.clear()

    def __enter__(self) -> ControlChannel:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _patience_s(self) -> float | None:
        """The limit of a wait that may last for ever where there is a watch."""
        return self._timeout_s if self._flag is None else None

    def _link(self, rank: int) -> socket.socket:
        try:
            return self._links[rank]
        except KeyError:
            raise CommError(
                f"no control link to rank {rank}: the channel is closed, or only rank 0 has such links"
            ) from None

    def _send(self, rank: int, frame: bytes) -> None:
        sock = self._link(rank)
        try:
            sent = sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._guard.explain(f"control/send to rank {rank}", error, rank) from error
        if sent == len(frame):
            return
        what = f"control/send to rank {rank}"
        self._guard.entered(what)
        rest = memoryview(frame)[sent:]
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        deadline = time.monotonic() + self._timeout_s
        while rest:
            self._check(what, rank, deadline)
            poller.poll(_POLL_S * 1000)
            try:
                rest = rest[sock.send(rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._guard.explain(what, error, rank) from error
        self._guard.left()

    def _receive(self, rank: int, timeout_s: float | None, what: str) -> bytes:
        """The next payload of ``rank``; ``timeout_s`` is for its first frame, None for no limit."""
        payload, more = self._receive_frame(rank, timeout_s, what)
        if not more:
            return payload
        parts = [payload]
        while more:
            part, more = self._receive_frame(rank, self._timeout_s, f"control/recv from rank {rank}")
            parts.append(part)
        return b"".join(parts)

    def _receive_frame(self, rank: int, timeout_s: float | None, what: str) -> tuple[bytes, bool]:
        sock, buffer = self._link(rank), self._buffers[rank]
        waiting = False
        deadline: float | None = None
        while True:
            frame = _take(buffer, rank)
            if frame is not None:
                if waiting:
                    self._guard.left()
                return frame
            try:
                data = sock.recv(_CHUNK)
            except BlockingIOError:
                if not waiting:
                    waiting = True
                    deadline = None if timeout_s is None else time.monotonic() + timeout_s
                    self._guard.entered(what)
                self._check(what, rank, deadline)
                self._pollers[rank].poll(_POLL_S * 1000)
                continue
            except OSError as error:
                raise self._guard.explain(what, error, rank) from error
            if not data:
                raise self._guard.explain(what, ConnectionError("the control connection was closed"), rank)
            buffer += data

    def _check(self, what: str, rank: int, deadline: float | None) -> None:
        if self._flag is not None and self._flag.value:
            raise self._guard.explain(what, None, rank)
        if deadline is not None and time.monotonic() >= deadline:
            raise self._guard.explain(what, TimeoutError(f"nothing within the time limit in {what}"), rank)


def _frames(payload: bytes) -> Iterator[bytes]:
    view = memoryview(payload)
    while len(view) > MAX_FRAME_BYTES:
        yield LENGTH.pack(MAX_FRAME_BYTES | _MORE) + view[:MAX_FRAME_BYTES]
        view = view[MAX_FRAME_BYTES:]
    yield LENGTH.pack(len(view)) + view


def _take(buffer: bytearray, rank: int) -> tuple[bytes, bool] | None:
    """Cut the first whole frame off ``buffer``: its bytes, and whether the payload goes on in the next one."""
    if len(buffer) < LENGTH.size:
        return None
    (word,) = LENGTH.unpack_from(buffer)
    if word == _FAREWELL:
        raise ChannelClosedError(f"rank {rank} closed the control channel")
    size, more = word & ~_MORE, bool(word & _MORE)
    if size > MAX_FRAME_BYTES:
        raise CommError(f"rank {rank} announced a control frame of {size} bytes; the limit is {MAX_FRAME_BYTES}")
    end = LENGTH.size + size
    if len(buffer) < end:
        return None
    frame = bytes(memoryview(buffer)[LENGTH.size : end])
    del buffer[:end]
    return frame, more
