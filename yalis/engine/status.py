"""Rank 0's status thread: tells the client what every rank does, a few times a second, whatever the step loop does."""

from __future__ import annotations

import os
import socket
import threading
import time

import msgspec
import zmq

from yalis.comm.control import IDLE
from yalis.engine.handle import LocalEngine
from yalis.engine.messages import AllReduceStats, CollectiveStats, RankState, Status
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

STATUS_INTERVAL_S = 0.25
# A turn of rank 0's loop may take so many deadlines: the large prefill of a large model on a CPU lasts longer than any
# message, and whoever waits for a rank in a collective has judged it after one.
_TURN_DEADLINES = 2
_ENCODER = msgspec.msgpack.Encoder()
_JOIN_S = 2.0


def status_endpoint(endpoint: str) -> str:
    """Address for `Status` messages beside a service's ``endpoint``."""
    return f"{endpoint}-status"


def stuck(status: Status | None, trusted_s: float, limit_s: float) -> str:
    """Why a client has to give rank 0 up though its process lives and its status thread talks; empty if it need not.

    Who is late in a collective, those who wait there tell. Nobody waits while every rank is stuck in its own code, or
    rank 0 before it has told the others of the step; then only the loop that stands still shows it.

    Args:
        status: the latest, None before the first.
        trusted_s: seconds since the client itself was last stopped or starved: a clock that ran meanwhile proves
            nothing about rank 0, which may have been stopped as well.
        limit_s: the deadline of the ranks.
    """
    if status is None or min(status.turn_age_s, trusted_s) <= _TURN_DEADLINES * limit_s:
        return ""
    return f"its step did not end for {status.turn_age_s:.1f} s"


class Pulse:
    """When the step loop turned last. One writer, any reader."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def beat(self) -> None:
        """The loop turns now."""
        self._at = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the last turn."""
        return time.monotonic() - self._at


class StatusSender:
    """Sends `Status` from a daemon thread until `close`; starts at once.

    Args:
        engine: rank 0's; only counters are read, and single reads of them are atomic.
        pulse: of the step loop.
        endpoint: of the service, see `status_endpoint`.
    """

    def __init__(self, engine: LocalEngine, pulse: Pulse, endpoint: str):
        self._engine = engine
        self._pulse = pulse
        self._endpoint = status_endpoint(endpoint)
        self._host = socket.gethostname()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="yalis-status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        context = zmq.Context()
        link = context.socket(zmq.PUSH)  # of this thread alone: sockets must not be shared
        link.setsockopt(zmq.LINGER, 0)
        link.setsockopt(zmq.SNDHWM, 100)
        link.connect(self._endpoint)
        try:
            while True:
                try:
                    link.send(_ENCODER.encode(self.status()), zmq.NOBLOCK)
                except zmq.Again:
                    logger.debug("the client does not read the status")
                if self._stop.wait(STATUS_INTERVAL_S):
                    return
        finally:
            link.close()
            context.term()

    def status(self) -> Status:
        """The state of all ranks as of now."""
        engine, core = self._engine.engine, self._engine.engine.core
        sizes = []
        while core.step_tokens:
            sizes.append(core.step_tokens.popleft())
        groups = {name: c for name, c in (("tp", core.runner.tp), ("pp", core.runner.pp)) if c.size > 1}
        engine_ranks = self._engine.ranks
        monitor = engine_ranks.monitor
        has_work = engine.has_unfinished_requests
        if monitor is None:
            me = RankState(0, self._host, os.getpid(), "working" if has_work else "idle", engine_ranks.num_steps, 0.0)
            ranks, verdict = [me], ""
        else:
            who = monitor.identities
            ranks = [
                RankState(rank, who[rank].host, who[rank].pid, _state(state, has_work), step, age)
                for rank, (state, step, age) in monitor.status().items()
            ]
            verdict = str(monitor.verdict) if monitor.verdict is not None else ""
        return Status(
            ranks=ranks,
            verdict=verdict,
            turn_age_s=self._pulse.age_s,
            stats=engine.stats(),
            step_tokens=sizes,
            collectives=[
                CollectiveStats(name, tier, ",".join(comm.algorithms), s["seconds"], int(s["calls"]), int(s["bytes"]))
                for name, comm in groups.items()
                for tier, s in comm.stats.as_dict().items()
            ],
            all_reduces=[
                AllReduceStats(name, algorithm, calls, nbytes)
                for name, comm in groups.items()
                for algorithm, (calls, nbytes) in list(comm.stats.algorithms.items())
            ],
            waited_s={name: comm.waited_s for name, comm in groups.items() if comm.waited_s is not None},
        )


def _state(state: str, has_work: bool) -> str:
    return "idle" if state == IDLE or (state == "working" and not has_work) else state
