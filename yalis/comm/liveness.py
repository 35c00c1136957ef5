"""Notices a rank that died or stalled, agrees on who it was, and ends every survivor in time.

One daemon thread per rank with its own TCP links to rank 0 (a star). Every rank beats; rank 0 turns a closed link, or
silence for half of the timeout, into one *verdict* and sends it to all. The loss of rank 0 itself is concluded by each
follower alone. A rank that is alive but never arrives is found through those who wait for it: a wait that fails or
exceeds the timeout is reported to rank 0, which names the rank that is in no wait itself.

What a verdict does on each survivor: the abort flag is set, so that spinning C code and the control channel return and
the main thread raises `PeerLostError` (through `LivenessMonitor.explain`). A main thread that cannot be reached (inside
a foreign library) is not waited for: the monitor's thread prints the verdict and ends the process.

Time line for a timeout T: death is noticed at once and silence after T/2; a stuck process is ended by its monitor
min(T/10, 2 s) later. A main thread that did get its error has until 0.4 T after the verdict, unless it takes the
responsibility (`acknowledge`, `close`).

Limits: the thread needs the GIL, so C code that holds it longer than T/2 looks like a stalled process. A network split
between hosts is seen as loss of the other side by both sides.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import faulthandler
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from yalis.comm.control import PATIENT
from yalis.comm.topology import Topology
from yalis.comm.wire import LENGTH, Store, connect_star, process_identity
from yalis.errors import CommError, PeerLostError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

EXIT_PEER_LOST = 70
EXIT_TERMINATED = 128 + signal.SIGTERM
ERROR_FILE_VARIABLE = "YALIS_ERROR_FILE"
"""Environment variable with the file where a dying rank leaves its last words for the launcher."""

_SETTLE_S = 0.3  # a report waits so long for the plain truth (a closed link) before suspicion decides
_ACK_S = 0.3  # rank 0 waits so long for the others to have a verdict before it acts on it itself
_TERM_S = 1.5  # a rank told to end waits so long for the verdict that explains it
_TERM_EXIT_S = 1.5  # and its main thread has so long to unwind
_MAX_MESSAGE = 1 << 20
_CHUNK = 1 << 16
_MAX_WORDS = 300
_PR_SET_PDEATHSIG = 1

_Message = dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """What the ranks tell each other about themselves when they connect."""

    rank: int
    host: str
    pid: int
    parent: int
    started: int  # start time in clock ticks since boot: tells a process from a later one with the same pid
    pid_space: str


@dataclass(frozen=True)
class Verdict:
    """Who was lost and why. ``rank`` is None when nobody could be named."""

    rank: int | None
    host: str | None
    pid: int | None
    reason: str
    doing: str
    step: int
    fence: bool = False

    def __str__(self) -> str:
        if self.rank is None:
            return f"a rank was lost, but which one cannot be told: {self.reason}"
        step = f" at step {self.step}" if self.step >= 0 else ""
        return f"rank {self.rank} on {self.host} (pid {self.pid}) was lost: {self.reason}; it was {self.doing}{step}"


@dataclass
class _Peer:
    """What this rank's thread knows of one other rank."""

    link: socket.socket | None
    heard: float
    inbox: bytearray = field(default_factory=bytearray)
    waiting_in: str = ""
    last: str = ""
    since: float = 0.0  # monotonic time here at which its present state began
    step: int = -1
    said_bye: bool = False
    terminating: bool = False
    closed_at: float | None = None
    acked: bool = False

    @property
    def present(self) -> bool:
        return not self.said_bye and self.closed_at is None


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process (SIGKILL) when the thread that created it ends.

    Args:
        parent: pid of the process that is meant; default the present parent. If it is gone already, this process ends
            now: the kernel's promise does not reach back.

    Raises:
        OSError: the kernel refused (not Linux).
    """
    expected = os.getppid() if parent is None else parent
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected:
        os._exit(EXIT_PEER_LOST)


def last_words(line: str) -> None:
    """Print ``line`` on stderr and leave it for the launcher; plain system calls, safe while the process is stuck."""
    data = line.encode(errors="replace") + b"\n"
    with contextlib.suppress(OSError):  # nobody listens; the exit code remains
        os.write(2, data)
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path:
        try:
            Path(path).write_bytes(data)
        except OSError as error:
            logger.warning("cannot write %s: %s", path, error)


def _start_ticks(pid: int) -> tuple[int, int]:
    """(parent pid, start time in ticks) of a process; OSError when it is gone."""
    # The name in parentheses may hold blanks and parentheses itself, so count fields behind the last one.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), int(fields[19])


class LivenessMonitor:
    """The watch over one rank and, on rank 0, over all. Implements `yalis.comm.guard.Guard`. Build with `connect`.

    Use as a context manager around the rank's work: an ordinary end says goodbye, an exception becomes the verdict on
    all other ranks.
    """

    def __init__(self, topology: Topology, links: dict[int, socket.socket], peers: list[Identity], *, timeout_s: float):
        self._rank = topology.rank
        self._timeout_s = timeout_s
        self._interval = min(1.0, timeout_s / 10)
        self._silence = timeout_s / 2
        self._grace = min(timeout_s / 10, 2.0)
        self._peers_known = {p.rank: p for p in peers}
        now = time.monotonic()
        self._peers = {rank: _Peer(link, heard=now, since=now) for rank, link in links.items()}
        self._flag = ctypes.c_int32(0)
        self._doing: tuple[str, float] = ("", now)
        self._last = ""
        self._step = -1
        # The main thread talks to the monitor's thread through this queue; the socket pair only wakes it.
        self._orders: collections.deque[_Message] = collections.deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._verdict: Verdict | None = None
        self._verdict_out = threading.Event()
        self._exit_at: float | None = None
        self._acknowledged = False
        self._pending: tuple[Verdict, float] | None = None  # rank 0: announced, not yet acted on
        self._report: tuple[_Message, float] | None = None
        self._reported_wait: float = -1.0
        self._term_at: float | None = None
        self._term_done = threading.Event()
        self._term_exit_at: float | None = None
        self._closing = False
        self._handles_sigterm = False
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None

    @classmethod
    def connect(
        cls, topology: Topology, store: Store, *, timeout_s: float, bind_host: str | None = None
    ) -> LivenessMonitor:
        """Connect the watch and start its thread; collective.

        Args:
            topology: rank, world size and host name.
            store: the launch's store.
            timeout_s: everything ends within this time after a rank was lost, in seconds; also the longest wait here.
            bind_host: rank 0's interface; see `yalis.comm.wire.connect_star`.

        Raises:
            CommError: a rank did not come in time.
        """
        parent, started = _start_ticks(os.getpid())
        me = Identity(topology.rank, topology.hostname, os.getpid(), parent, started, process_identity())
        links = connect_star(
            "liveness", topology.rank, topology.world_size, store, timeout_s=timeout_s, bind_host=bind_host
        )
        monitor = cls(topology, links, [me], timeout_s=timeout_s)
        try:
            monitor._introduce(me, time.monotonic() + timeout_s)
        except BaseException:
            for link in links.values():
                link.close()
            raise
        monitor._start()
        return monitor

    # ---- the main thread's side ---------------------------------------------------------------------------------

    def entered(self, what: str) -> None:
        """See `Guard.entered`."""
        self._last = what
        self._doing = (what, time.monotonic())

    def left(self) -> None:
        """See `Guard.left`."""
        self._doing = ("", time.monotonic())

    def set_step(self, step: int) -> None:
        """Record the engine's step number; stores one integer."""
        self._step = step

    def abort_flag_address(self) -> int:
        """Address of an int32 that turns 1 when a verdict is out; valid as long as this object lives."""
        return ctypes.addressof(self._flag)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict, once there is one."""
        return self._verdict

    def explain(self, what: str, cause: BaseException | None, suspect: int | None) -> PeerLostError:
        """See `Guard.explain`. Waits for the verdict of rank 0, about a second at most."""
        if self._verdict is None:
            self._order({"t": "report", "what": what, "cause": _words(cause), "suspect": suspect})
            self._verdict_out.wait(_SETTLE_S + _ACK_S + max(0.5, self._interval))
        verdict = self._verdict
        if verdict is None:  # the hub does not answer: say what was seen from here, and be bound by it
            verdict = self._suspicion(suspect, f"not heard in {what}: {_words(cause) or 'no answer'}")
            self._order({"t": "own verdict", "verdict": verdict})
        # The error is on its way to the user, which takes as long as unwinding takes; still it must end.
        self._exit_at = max(self._exit_at or 0.0, time.monotonic() + 0.4 * self._timeout_s)
        return PeerLostError(self._sentence(verdict, what), rank=verdict.rank, host=verdict.host, waiting_for=what)

    def acknowledge(self) -> None:
        """The main thread has the verdict and ends the process itself: the monitor will not."""
        self._acknowledged = True
        if self._verdict is not None:
            faulthandler.cancel_dump_traceback_later()

    def failed(self, error: BaseException) -> None:
        """This rank ends because of ``error``: make that the verdict on all ranks. Returns when it is sent."""
        if self._verdict is None:
            self._order({"t": "failed", "reason": f"raised {_words(error)}"})
            self._verdict_out.wait(_ACK_S + 0.7)
        self._exit_at = max(self._exit_at or 0.0, time.monotonic() + 0.4 * self._timeout_s)

    def close(self) -> None:
        """Say goodbye and stop watching; the other ranks do not count this as a loss. Idempotent.

        Call it on the main thread if `install_termination_handler` was: only there can it be taken back.
        """
        self.acknowledge()
        self._order({"t": "close"})
        if self._thread is not None:
            self._thread.join(_ACK_S + 0.7)
        if self._handles_sigterm:
            if threading.current_thread() is not threading.main_thread():
                return  # the signal machinery still writes into the wake-up socket, so that must stay open
            self._handles_sigterm = False
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._wake_read.close()
        self._wake_write.close()

    def __enter__(self) -> LivenessMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is not None and not isinstance(value, (PeerLostError, SystemExit)):
            self.failed(value)
        elif self._verdict is None and not (isinstance(value, SystemExit) and value.code):
            self.close()

    def status(self) -> dict[int, tuple[str, int, float]]:
        """On rank 0, for every rank: (what it waits in or ``"working"``, step, seconds since its last beat)."""
        now = time.monotonic()
        table = {self._rank: (self._doing[0] or "working", self._step, 0.0)}
        for rank, peer in self._peers.items():
            state = "left" if peer.said_bye else "lost" if peer.closed_at is not None else peer.waiting_in or "working"
            table[rank] = (state, peer.step, now - peer.heard)
        return dict(sorted(table.items()))

    @property
    def identities(self) -> dict[int, Identity]:
        """Host and process of every rank."""
        return dict(self._peers_known)

    def request_termination(self) -> None:
        """SIGTERM arrived: find out why, then end. Safe in a signal handler."""
        self._order({"t": "sigterm"})

    def finish_termination(self) -> int:
        """Wait (at most `_TERM_S`) for the reason of a SIGTERM, print it, and return the exit code."""
        self._term_done.wait(_TERM_S + 0.5)
        if self._verdict is not None:
            last_words(f"yalis: {self._sentence(self._verdict)}")
            return EXIT_PEER_LOST
        return EXIT_TERMINATED

    # ---- start ----------------------------------------------------------------------------------------------------

    def _introduce(self, me: Identity, deadline: float) -> None:
        """Exchange identities through rank 0."""
        if self._rank == 0:
            for rank, peer in self._peers.items():
                self._peers_known[rank] = Identity(**_blocking_receive(peer, deadline, rank))
            everyone = [asdict(p) for _, p in sorted(self._peers_known.items())]
            for rank, peer in self._peers.items():
                _blocking_send(peer, {"everyone": everyone}, deadline, rank)
        else:
            _blocking_send(self._peers[0], asdict(me), deadline, 0)
            message = _blocking_receive(self._peers[0], deadline, 0)
            self._peers_known = {p["rank"]: Identity(**p) for p in message["everyone"]}

    def _start(self) -> None:
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        now = time.monotonic()
        for rank, peer in self._peers.items():
            assert peer.link is not None
            peer.heard = now
            self._selector.register(peer.link, selectors.EVENT_READ, rank)
        self._thread = threading.Thread(target=self._guarded_run, name="yalis-liveness", daemon=True)
        self._thread.start()

    def _order(self, message: _Message) -> None:
        self._orders.append(message)
        with contextlib.suppress(OSError):  # full: a wake-up is under way already; closed: nobody is left to wake
            self._wake_write.send(b"\0")

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _guarded_run(self) -> None:
        try:
            self._run()
        except Exception:  # a watch that fails silently would be worse than none
            traceback.print_exc(file=sys.stderr)
            me = self._peers_known[self._rank]
            self._accept(Verdict(self._rank, me.host, me.pid, "its liveness monitor failed", "working", self._step))

    def _run(self) -> None:
        next_beat = judged = time.monotonic()
        while not self._closing:
            now = time.monotonic()
            if now >= next_beat:
                self._beat(now)
                next_beat = now + self._interval
            urgent = self._verdict or self._pending or self._report or self._term_at or self._leaving()
            events = self._selector.select(max(0.0, min(next_beat - now, 0.02 if urgent else self._interval)))
            for key, _ in events:
                if key.data is None:
                    self._drain_wakeups()
                else:
                    self._read(key.data)
            now = time.monotonic()
            while self._orders:
                self._obey(self._orders.popleft(), now)
            if now - judged > self._interval + self._silence / 2:
                # This process itself was stopped or starved (a suspended machine, a debugger): its clock proves
                # nothing about the others. Everyone gets a fresh start.
                for peer in self._peers.values():
                    peer.heard = now
            judged = now
            self._judge(now)
        self._hang_up()

    def _leaving(self) -> bool:
        return any(p.closed_at is not None and not p.said_bye for p in self._peers.values())

    def _drain_wakeups(self) -> None:
        try:
            woken = self._wake_read.recv(4096)
        except BlockingIOError:
            return
        if signal.SIGTERM in woken:  # written by the interpreter's C signal handler: works with a stuck main thread
            self._orders.append({"t": "sigterm"})

    def _beat(self, now: float) -> None:
        what, since = self._doing
        message = {"t": "beat", "in": what, "last": self._last, "age": now - since, "step": self._step}
        for rank, peer in self._peers.items():
            self._send(rank, peer, message)

    def _send(self, rank: int, peer: _Peer, message: _Message) -> None:
        if peer.link is None:
            return
        data = json.dumps(message).encode()
        try:
            # A few hundred bytes a second fit into any socket buffer unless the peer stopped reading long ago; then
            # it is about to be declared silent, and blocking on it would stop the watch over all others.
            if peer.link.send(LENGTH.pack(len(data)) + data) != LENGTH.size + len(data):
                self._closed(rank, peer)
        except BlockingIOError:
            logger.debug("rank %d does not read its heartbeat link", rank)
        except OSError:
            pass  # the read side sees the closed link, after what is still in it

    def _read(self, rank: int) -> None:
        peer = self._peers[rank]
        assert peer.link is not None
        try:
            data = peer.link.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._closed(rank, peer)
            return
        peer.heard = time.monotonic()
        peer.inbox += data
        while (message := _take_message(peer.inbox)) is not None:
            self._handle(rank, peer, message)

    def _closed(self, rank: int, peer: _Peer) -> None:
        if peer.link is not None:
            self._selector.unregister(peer.link)
            peer.link.close()
            peer.link = None
        peer.closed_at = time.monotonic()

    def _handle(self, rank: int, peer: _Peer, message: _Message) -> None:
        kind = message["t"]
        if kind == "beat":
            peer.waiting_in, peer.last, peer.step = message["in"], message["last"], message["step"]
            peer.since = peer.heard - message["age"]
        elif kind == "bye":
            peer.said_bye = True
        elif kind == "ack":
            peer.acked = True
        elif kind == "term":
            peer.terminating = True
        elif kind == "all down":
            self._conclude_termination()
        elif kind == "verdict":
            self._send(rank, peer, {"t": "ack"})
            self._accept(Verdict(**message["verdict"]))
        elif kind == "report":
            self._file_report(message)
        elif kind == "failed":
            self._issue(self._lost(rank, message["reason"]))

    def _obey(self, order: _Message, now: float) -> None:
        kind = order["t"]
        if kind == "close":
            self._closing = True
        elif kind == "sigterm":
            if self._term_at is None:
                self._term_at = now
                for rank, peer in self._peers.items():
                    self._send(rank, peer, {"t": "term"})
        elif kind == "own verdict":
            self._accept(order["verdict"])
        elif self._rank != 0:  # report, failed
            self._send(0, self._peers[0], order)
        elif kind == "report":
            self._file_report(order)
        else:
            self._issue(self._lost(0, order["reason"]))

    def _judge(self, now: float) -> None:
        # Once the reason of a SIGTERM is settled, a peer that falls silent is tearing its interpreter down, which may
        # take longer than a stuck main thread here is waited for.
        if self._verdict is None and self._pending is None and not self._term_done.is_set():
            self._look_for_losses(now)
        if self._pending is not None:
            verdict, until = self._pending
            if now >= until or all(p.acked or p.closed_at is not None or p.said_bye for p in self._peers.values()):
                self._pending = None
                self._accept(verdict)
        if self._term_at is not None and not self._term_done.is_set():
            others = [p for p in self._peers.values() if p.present]
            if self._rank == 0 and all(p.terminating for p in others):
                for rank, peer in self._peers.items():
                    self._send(rank, peer, {"t": "all down"})
                self._conclude_termination()
            elif self._verdict is not None or now >= self._term_at + _TERM_S:
                self._conclude_termination()
        if self._term_exit_at is not None and now >= self._term_exit_at and not self._acknowledged:
            if self._verdict is not None:
                self._exit_with_verdict(self._verdict)
            os._exit(EXIT_TERMINATED)
        if self._verdict is not None and not self._acknowledged and now >= (self._exit_at or now):
            self._exit_with_verdict(self._verdict)

    def _look_for_losses(self, now: float) -> None:
        for rank, peer in self._peers.items():
            if peer.said_bye:
                continue
            if peer.closed_at is not None:
                if not peer.terminating:
                    # A stalled rank 0 is fenced by the first follower that gives it up; the others see the link close
                    # and should still say why.
                    quiet = peer.closed_at - peer.heard
                    died = quiet < self._silence / 2
                    self._issue(self._lost(rank, "process died" if died else f"silent for {quiet:.1f} s"))
                    return
                # It was told to end. If all are, nobody is lost; otherwise somebody killed just that one.
                if self._term_at is None and now >= peer.closed_at + _TERM_S / 2:
                    self._issue(self._lost(rank, "ended by SIGTERM"))
                    return
            elif now - peer.heard > self._silence:
                # Look into the socket once more: a select that a SIGCONT interrupted reports nothing, though beats
                # may lie there since before this process was stopped.
                self._read(rank)
                if peer.closed_at is not None or now - peer.heard <= self._silence:
                    continue
                self._issue(self._lost(rank, f"silent for {now - peer.heard:.1f} s", fence=True))
                return
        if self._report is not None and now >= self._report[1]:
            self._issue(self._blame(self._report[0]))
            return
        what, since = self._doing
        # The transport's own time limit should have fired; a foreign library may have a longer one or none.
        judged = what and not what.startswith(PATIENT)
        if judged and now - since > self._timeout_s + self._interval and self._reported_wait != since:
            self._reported_wait = since
            cause = f"waits since {now - since:.1f} s"
            self._obey({"t": "report", "what": what, "cause": cause, "suspect": None}, now)

    def _file_report(self, report: _Message) -> None:
        if self._report is None:
            self._report = (report, time.monotonic() + _SETTLE_S)

    def _blame(self, report: _Message) -> Verdict:
        """Rank 0: who holds up those who wait? First a rank in no wait at all, then an idle one, then the suspect.

        With A waiting for B and B waiting for C, A suspects B; only the states of all show that it is C.
        """
        states = self.status()
        suspect = report["suspect"]
        working = [r for r, (state, _, _) in states.items() if state in ("working", "left", "lost")]
        idle = [r for r, (state, _, _) in states.items() if state.startswith(PATIENT)]
        why = f"did not arrive in {report['what']}"
        for group in (working, idle):
            if suspect in group:
                return self._lost(suspect, why)
            if group:
                return self._lost(min(group, key=lambda r: (states[r][1], r)), why)
        if suspect is not None:
            return self._lost(suspect, f"{why} ({report['cause']})" if report["cause"] else why)
        table = "; ".join(f"rank {r} in {state} at step {step}" for r, (state, step, _) in states.items())
        return Verdict(None, None, None, f"every rank waits: {table}", "", -1)

    def _suspicion(self, suspect: int | None, reason: str) -> Verdict:
        return self._lost(suspect, reason) if suspect is not None else Verdict(None, None, None, reason, "", -1)

    def _lost(self, rank: int, reason: str, *, fence: bool = False) -> Verdict:
        who = self._peers_known[rank]
        now = time.monotonic()
        if rank == self._rank:
            (waiting_in, since), last, step = self._doing, self._last, self._step
        elif rank in self._peers:
            peer = self._peers[rank]
            waiting_in, since, last, step = peer.waiting_in, peer.since, peer.last, peer.step
        else:  # a follower blaming another follower knows no more than its name
            return Verdict(rank, who.host, who.pid, reason, "last heard by rank 0 only", -1, fence)
        after = f", after {last}" if last else ""
        doing = f"in {waiting_in}" if waiting_in else f"in no collective for {now - since:.1f} s{after}"
        return Verdict(rank, who.host, who.pid, reason, doing, step, fence)

    def _issue(self, verdict: Verdict) -> None:
        """Make a verdict that binds all. Rank 0 acts on it only when the others have it (or had the time to):
        otherwise it might be gone before, and they would take rank 0 itself for the one that was lost."""
        if self._verdict is not None or self._pending is not None:
            return
        if self._rank != 0:  # only the loss of rank 0 is concluded here, by every follower for itself
            self._accept(verdict)
            return
        for rank, peer in self._peers.items():
            self._send(rank, peer, {"t": "verdict", "verdict": asdict(verdict)})
            peer.acked = rank == verdict.rank  # a stopped rank does not answer
        self._pending = (verdict, time.monotonic() + _ACK_S)

    def _accept(self, verdict: Verdict) -> None:
        if self._verdict is not None:
            return
        self._verdict = verdict
        self._exit_at = max(self._exit_at or 0.0, time.monotonic() + self._grace)
        self._flag.value = 1
        self._verdict_out.set()
        # This thread cannot act once the interpreter tears itself down, and destructors of foreign libraries may hang
        # there; the watchdog of faulthandler needs no GIL, and shows where the process hung.
        faulthandler.dump_traceback_later(0.45 * self._timeout_s, exit=True, file=2)
        if verdict.fence and verdict.rank is not None and verdict.rank != self._rank:
            self._fence(self._peers_known[verdict.rank])

    def _fence(self, lost: Identity) -> None:
        """Kill a silent process of this host that our own launcher started.

        A stopped process survives SIGTERM and the end of the run, and once continued it would write into shared
        memory that others may use by then. Only a sibling (same parent) is ours to kill; the start time and the
        pidfd rule out a later process with the same number.
        """
        me = self._peers_known[self._rank]
        if lost.pid_space != me.pid_space or lost.parent != me.parent:
            return
        try:
            handle = os.pidfd_open(lost.pid)
        except OSError:
            return  # gone already
        try:
            if _start_ticks(lost.pid) == (lost.parent, lost.started):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        except OSError as error:
            logger.warning("could not end the stalled rank %d (pid %d): %s", lost.rank, lost.pid, error)
        finally:
            os.close(handle)

    def _conclude_termination(self) -> None:
        if not self._term_done.is_set():
            self._term_exit_at = time.monotonic() + _TERM_EXIT_S
            self._term_done.set()

    def _sentence(self, verdict: Verdict, what: str | None = None) -> str:
        mine = what if what is not None else self._doing[0]
        doing = f"was waiting in {mine}" if mine else "was in no collective"
        step = f" at step {self._step}" if self._step >= 0 else ""
        if verdict.rank == self._rank:
            return f"{verdict} (this rank; the others gave it up)"
        return f"{verdict}. This rank {self._rank} {doing}{step}."

    def _exit_with_verdict(self, verdict: Verdict) -> None:
        last_words(f"yalis: {self._sentence(verdict)}")
        os._exit(EXIT_PEER_LOST)

    def _hang_up(self) -> None:
        for rank, peer in self._peers.items():
            self._send(rank, peer, {"t": "bye"})
            if peer.link is not None:
                self._selector.unregister(peer.link)
                peer.link.close()
                peer.link = None
        self._selector.close()


def install_termination_handler(monitor: LivenessMonitor) -> None:
    """Have SIGTERM end this process with the reason: call on the main thread, after `LivenessMonitor.connect`.

    Launchers send SIGTERM to the survivors as soon as one rank is dead, often before the verdict is out. The handler
    waits for it (`_TERM_S` at most), prints it and raises SystemExit (70 with a verdict, else 143). When the main
    thread is stuck in foreign code, where no Python handler runs, the monitor's thread does the same and exits.
    """

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        monitor.request_termination()
        raise SystemExit(monitor.finish_termination())

    # The interpreter's C handler writes the signal's number into this socket at once, whatever the main thread does.
    previous = signal.set_wakeup_fd(monitor._wake_write.fileno(), warn_on_full_buffer=False)
    if previous != -1:  # an event loop owns it; the Python handler alone must do
        signal.set_wakeup_fd(previous, warn_on_full_buffer=False)
        logger.info("the wake-up descriptor is in use: SIGTERM waits until the main thread runs Python code")
    else:
        monitor._handles_sigterm = True
    signal.signal(signal.SIGTERM, on_sigterm)


def _words(error: BaseException | None) -> str:
    if error is None:
        return ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:_MAX_WORDS] if text else type(error).__name__


def _take_message(inbox: bytearray) -> _Message | None:
    if len(inbox) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack_from(inbox)
    if size > _MAX_MESSAGE:
        raise CommError(f"a liveness message of {size} bytes exceeds the limit of {_MAX_MESSAGE}")
    end = LENGTH.size + size
    if len(inbox) < end:
        return None
    message: _Message = json.loads(bytes(inbox[LENGTH.size : end]))
    del inbox[:end]
    return message


def _blocking_send(peer: _Peer, message: _Message, deadline: float, rank: int) -> None:
    assert peer.link is not None
    data = json.dumps(message).encode()
    peer.link.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        peer.link.sendall(LENGTH.pack(len(data)) + data)
    except OSError as error:
        raise CommError(f"rank {rank} was lost while it connected: {error}; look for its first error") from error
    peer.link.setblocking(False)


def _blocking_receive(peer: _Peer, deadline: float, rank: int) -> _Message:
    assert peer.link is not None
    peer.link.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        while (message := _take_message(peer.inbox)) is None:
            data = peer.link.recv(_CHUNK)
            if not data:
                raise ConnectionError("the link was closed")
            peer.inbox += data
    except OSError as error:
        raise CommError(f"rank {rank} did not introduce itself: {error}; look for its first error") from error
    peer.link.setblocking(False)
    return message
