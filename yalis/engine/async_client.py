"""An engine in processes of its own, driven from an event loop: what a server holds.

The client notices by itself when rank 0 is gone or silent, so that its answer to "is the engine well?" does not depend
on the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import time
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from yalis.config import EngineConfig
from yalis.engine.handle import Info
from yalis.engine.messages import (
    AbortRequests,
    AddRequest,
    ClientMessage,
    EngineFailed,
    Outputs,
    Profile,
    ProfileCommand,
    Profiled,
    Ready,
    ServiceMessage,
    Shutdown,
    Status,
)
from yalis.engine.outputs import RequestOutput
from yalis.engine.process import EngineProcesses
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.status import status_endpoint, stuck
from yalis.engine.tokenizer import Tokenizer, load_tokenizer
from yalis.errors import EngineDeadError, RequestError
from yalis.launch import Nodes
from yalis.weights.hub import resolve_model_path

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[ServiceMessage] = msgspec.msgpack.Decoder(ServiceMessage)
_STATUS_DECODER = msgspec.msgpack.Decoder(Status)
_WATCH_S = 0.1
# Rank 0 may end just after its last words: they are on their way when its process is seen to be gone.
_LAST_WORDS_S = 0.3

Sink = Callable[[RequestOutput | EngineDeadError], None]
"""Gets a request's outputs; after the last one, or after the error, nothing more."""


class AsyncEngineClient:
    """One engine, from its start to its end; a new one is needed after that. Use on one event loop.

    Args:
        config: of the engine.
        nodes: this node's share of a launch over several; default all ranks are here.
        join: this process was started by a launcher as rank 0.

    Attributes:
        info: resolved choices of the engine, empty before it is up.
        tokenizer: of the model; None where dummy weights come without one.
        status: the latest words of rank 0's status thread, None before the first.
        failure: why the engine is gone; None while it is well.
        root_lost: it is gone because rank 0's process ended, stopped or got stuck.
        on_outputs, on_status: called with what arrives, for counting.
    """

    def __init__(self, config: EngineConfig, *, nodes: Nodes | None = None, join: bool = False):
        self.config = config
        self.info: Info = {}
        self.tokenizer: Tokenizer | None = None
        self.status: Status | None = None
        self.failure: str | None = None
        self.root_lost = False
        self.on_outputs: Callable[[list[RequestOutput]], None] | None = None
        self.on_status: Callable[[Status], None] | None = None
        self._nodes = nodes
        self._join = join
        self._processes = EngineProcesses()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._status_socket = self._context.socket(zmq.PULL)
        for link in (self._socket, self._status_socket):
            link.setsockopt(zmq.LINGER, 0)
        # Requests are counted before they come here, so the queue needs no bound of its own and sending never waits.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._sinks: dict[str, Sink] = {}
        self._profiled: asyncio.Future[Profiled] | None = None
        self._ready = asyncio.Event()
        self._failed = asyncio.Event()
        self._status_at = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._root_handle = -1
        self._closing = False
        self._said_by_rank = False

    @property
    def pids(self) -> dict[int, int]:
        """Process id of each rank that this process started."""
        return self._processes.ranks.pids

    async def start(self) -> None:
        """Start the ranks and wait until the model is loaded, however long that takes.

        Raises:
            EngineDeadError: the ranks did not come up; carries their words.
            ConfigError: the configuration cannot work.
        """
        path = resolve_model_path(self.config.tokenizer or self.config.model)
        self._processes.bind(self._socket)
        self._processes.bind(self._status_socket, status_endpoint(self._processes.endpoint))
        self._processes.launch(self.config, serving=True, nodes=self._nodes, join=self._join)
        self.tokenizer = await asyncio.to_thread(load_tokenizer, path, self.config)
        self._tasks = [
            asyncio.create_task(self._read()),
            asyncio.create_task(self._read_status()),
            asyncio.create_task(self._watch()),
        ]
        failed = asyncio.create_task(self._failed.wait())
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait({failed, ready}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed.cancel()
            ready.cancel()
        if self.failure is not None:
            raise EngineDeadError(await self.obituary())

    def submit(self, request_id: str, prompt: list[int], params: SamplingParams, sink: Sink, *, stream: bool) -> None:
        """Queue a request; its outputs are deltas.

        Args:
            request_id: unique.
            params: with a grammar only if `yalis.engine.guided.GuideCompiler.check` has let it through: the ranks
                compile it between two steps of everybody's requests.
            sink: called on the event loop. A request that can never be served gets one output with ``error`` set.
            stream: whether every step's progress is wanted, or only the end.

        Raises:
            EngineDeadError: the engine is not there.
        """
        if self.failure is not None or not self._ready.is_set():
            raise EngineDeadError(self.failure or "the engine is not up yet")
        self._sinks[request_id] = sink
        self._send(AddRequest(request_id, prompt, params, stream=stream, delta=True, checked=True))

    def abort(self, request_ids: list[str]) -> None:
        """End requests now; their sinks are not called again."""
        known = [request_id for request_id in request_ids if self._sinks.pop(request_id, None) is not None]
        if known and self.failure is None:
            self._send(AbortRequests(known))

    def abort_all(self, message: str) -> None:
        """End every request now; their sinks get ``message`` as an error. The engine lives on."""
        sinks, self._sinks = self._sinks, {}
        if sinks and self.failure is None:
            self._send(AbortRequests(list(sinks)))
        for sink in sinks.values():
            sink(EngineDeadError(message))

    async def profile(self, *, start: bool, folder: str) -> str:
        """Start or end the profilers of all ranks; at the end, the path of rank 0's trace.

        Raises:
            RequestError: they run already, or do not.
            EngineDeadError: the engine is not there.
        """
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        if self._profiled is not None:
            raise RequestError("another profile request is in progress; try again")
        self._profiled = asyncio.get_running_loop().create_future()
        try:
            self._send(Profile(ProfileCommand(start, folder)))
            answer = await self._profiled
        finally:
            self._profiled = None
        if answer.error:
            raise RequestError(answer.error)
        return answer.path

    @property
    def num_open(self) -> int:
        """Requests that were submitted and are not over."""
        return len(self._sinks)

    @property
    def status_age_s(self) -> float:
        """Seconds since rank 0's status thread was last heard; 0 until the engine is up."""
        return time.monotonic() - self._status_at if self._ready.is_set() else 0.0

    async def failed(self) -> str:
        """Wait until the engine is gone; why."""
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    async def obituary(self) -> str:
        """After a failure: all that is known about it, once the processes have ended (they are given a while)."""
        said = self.failure or ""
        words = await asyncio.to_thread(self._processes.obituary, said if self._said_by_rank else "")
        # A survivor's verdict says more than what was seen from here; how a process ended says less.
        return words if self._said_by_rank or "was lost" in words or not said else f"{said}; {words}"

    async def close(self) -> None:
        """End the engine in good order, or what is left of it. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self.failure is None and self._ready.is_set():
            with contextlib.suppress(zmq.ZMQError):
                self._send(Shutdown())
                # Who asks meanwhile hears of a rank that is found stopped.
                self.failure = await asyncio.to_thread(self._processes.wait_for_end)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._processes.close)
        if self._root_handle >= 0:
            os.close(self._root_handle)
            self._root_handle = -1
        self._socket.close()
        self._status_socket.close()
        self._context.term()

    # ---- inside -----------------------------------------------------------------------------------------------

    def _send(self, message: ClientMessage) -> None:
        self._socket.send(_ENCODER.encode(message), zmq.NOBLOCK)

    async def _read(self) -> None:
        while True:
            message = _DECODER.decode(await self._socket.recv())
            if isinstance(message, Outputs):
                self._hand_out(message.outputs)
            elif isinstance(message, Profiled):
                if self._profiled is not None and not self._profiled.done():
                    self._profiled.set_result(message)
            elif isinstance(message, EngineFailed):
                self._said_by_rank = True
                self._fail(message.message)
            elif isinstance(message, Ready):
                self.info = message.info
                self._status_at = time.monotonic()
                self._ready.set()

    def _hand_out(self, outputs: list[RequestOutput]) -> None:
        if self.on_outputs is not None:
            self.on_outputs(outputs)
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:
                continue  # aborted
            if output.finished:
                del self._sinks[output.request_id]
            sink(output)

    async def _read_status(self) -> None:
        while True:
            self.status = _STATUS_DECODER.decode(await self._status_socket.recv())
            self._status_at = time.monotonic()
            if self.on_status is not None:
                self.on_status(self.status)
            if self.status.verdict:
                self._said_by_rank = True
                self._fail(self.status.verdict)

    async def _watch(self) -> None:
        """Notice what rank 0 cannot say: that it is gone, stopped, or stuck in a step."""
        limit_s = self.config.distributed_timeout_s
        pids = await asyncio.to_thread(lambda: self._processes.ranks.pids)
        root_pid = pids.get(0, 0)
        if root_pid:
            with contextlib.suppress(OSError):  # gone already: the processes' own end tells it
                self._root_handle = os.pidfd_open(root_pid)
        root = f"rank 0 on {socket.gethostname()} (pid {root_pid})"
        gone_at: float | None = None
        turned = trusted = time.monotonic()
        while self.failure is None:
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            late, turned = now - turned > limit_s / 4, now
            if late:  # this process was itself stopped or starved: its clock proves nothing about rank 0
                self._status_at = trusted = now
            if self._processes.ranks.poll() is not None or _has_ended(self._root_handle):
                gone_at = now if gone_at is None else gone_at
                if now - gone_at >= _LAST_WORDS_S:
                    # A stalled rank 0 is ended by the ranks that noticed first; that is not why it was lost.
                    quiet = self.status_age_s - (now - gone_at)
                    how = f"silent for {quiet:.1f} s" if quiet > limit_s / 4 else "process died"
                    self._fail(f"{root} was lost: {how}", root_lost=True)
            elif self.status_age_s > limit_s / 2:
                self._fail(f"{root} was lost: silent for {self.status_age_s:.1f} s", root_lost=True)
            elif words := stuck(self.status, now - trusted, limit_s):
                self._fail(f"{root} was lost: {words}", root_lost=True)
        if gone_at is None and not self._said_by_rank:
            # Rank 0 is stopped or stuck and would not end by itself; nothing that is left can work on.
            await asyncio.to_thread(self._processes.ranks.terminate)

    def _fail(self, message: str, *, root_lost: bool = False) -> None:
        if self.failure is not None or self._closing:
            return
        self.root_lost = root_lost
        self.failure = message
        self._failed.set()
        error = EngineDeadError(message)
        if self._profiled is not None and not self._profiled.done():
            self._profiled.set_exception(error)
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(error)


def _has_ended(handle: int) -> bool:
    if handle < 0:
        return False
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))
