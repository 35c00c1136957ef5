"""An engine in processes of its own: starts the ranks and talks to rank 0."""

from __future__ import annotations

import socket
import time

import msgspec
import zmq

from yalis.config import EngineConfig
from yalis.engine.handle import Info, failed_output
from yalis.engine.messages import (
    AbortRequests,
    AddRequest,
    ClientMessage,
    EngineFailed,
    EngineStats,
    GetStats,
    Outputs,
    Profile,
    ProfileCommand,
    Profiled,
    Ready,
    ServiceMessage,
    Shutdown,
    Status,
)
from yalis.engine.outputs import Prompt, RequestOutput, plain_prompt
from yalis.engine.process import EngineProcesses
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.status import status_endpoint, stuck
from yalis.engine.tokenizer import load_tokenizer
from yalis.errors import EngineDeadError, RequestError, YalisError
from yalis.weights.hub import resolve_model_path

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[ServiceMessage] = msgspec.msgpack.Decoder(ServiceMessage)
_STATUS_DECODER = msgspec.msgpack.Decoder(Status)
_POLL_MS = 200


class EngineClient:
    """Starts ``config.world_size`` ranks on this machine and drives them. One thread at a time.

    Args:
        config: of the engine; resolved by the ranks.

    Raises:
        YalisError: the ranks did not come up; carries rank 0's words.
    """

    def __init__(self, config: EngineConfig):
        path = resolve_model_path(config.tokenizer or config.model)
        self._processes = EngineProcesses()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._status_socket = self._context.socket(zmq.PULL)
        self._status_socket.setsockopt(zmq.CONFLATE, 1)  # the latest is enough, and nobody may read for hours
        self._processes.bind(self._socket)
        self._processes.bind(self._status_socket, status_endpoint(self._processes.endpoint))
        self._status: Status | None = None
        self._limit_s = config.distributed_timeout_s
        self._outputs: list[RequestOutput] = []
        self._closed = False
        self._end = "the engine is closed; make a new one"
        self._processes.launch(config)
        self._ranks = self._processes.ranks
        try:
            self.tokenizer = load_tokenizer(path, config)
            # Loading may take any time; a rank that dies or stops meanwhile ends the launch by itself.
            message = self._receive()
            while not isinstance(message, Ready):
                message = self._receive()
            self.info: Info = message.info
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[int, int]:
        """Process id of each rank."""
        return self._ranks.pids

    def submit(self, request_id: str, prompt: Prompt, params: SamplingParams, *, stream: bool) -> None:
        """See `EngineHandle.submit`."""
        try:
            message = AddRequest(request_id, plain_prompt(prompt), params, stream)
        except RequestError as error:
            self._outputs.append(failed_output(request_id, prompt, str(error), time.monotonic()))
            return
        self._send(message)

    def abort(self, request_ids: list[str]) -> None:
        """See `EngineHandle.abort`."""
        self._send(AbortRequests(request_ids))

    def poll(self) -> list[RequestOutput]:
        """See `EngineHandle.poll`; waits for the next outputs."""
        if not self._outputs:
            message = self._receive()
            if isinstance(message, Outputs):
                self._outputs += message.outputs
        while self._socket.poll(0):
            message = self._receive()
            if isinstance(message, Outputs):
                self._outputs += message.outputs
        outputs, self._outputs = self._outputs, []
        return outputs

    def settle(self) -> None:
        """See `EngineHandle.settle`; rank 0 steps for as long as there is anything to do."""

    def stats(self, *, reset: bool = False) -> EngineStats:
        """See `EngineHandle.stats`."""
        self._send(GetStats(reset))
        while True:
            message = self._receive()
            if isinstance(message, EngineStats):
                return message
            if isinstance(message, Outputs):
                self._outputs += message.outputs

    def profile(self, start: bool, folder: str) -> str:
        """See `EngineHandle.profile`.

        Raises:
            RequestError: the profilers run already, or do not.
        """
        self._send(Profile(ProfileCommand(start, folder)))
        while True:
            message = self._receive()
            if isinstance(message, Profiled):
                if message.error:
                    raise RequestError(message.error)
                return message.path
            if isinstance(message, Outputs):
                self._outputs += message.outputs

    def close(self) -> None:
        """See `EngineHandle.close`."""
        if self._closed:
            return
        self._closed = True
        if self._ranks.poll() is None:
            try:
                self._socket.send(_ENCODER.encode(Shutdown()), zmq.NOBLOCK)
                self._processes.wait_for_end()
            except (zmq.ZMQError, YalisError):
                pass  # rank 0 is not there to hear it; what is left is ended below
        self._processes.close()
        self._socket.close()
        self._status_socket.close()
        self._context.term()

    def _send(self, message: ClientMessage) -> None:
        if self._closed:
            raise EngineDeadError(self._end)
        if not self._wait(zmq.POLLOUT):  # nobody at the other end
            self._fail(self._last_message())
        self._socket.send(_ENCODER.encode(message))

    def _receive(self) -> ServiceMessage:
        """The next message.

        Raises:
            EngineDeadError: the ranks ended or said that they will, or rank 0 is stuck.
        """
        if self._closed:
            raise EngineDeadError(self._end)
        if not self._wait(zmq.POLLIN):
            self._fail("")
        message = _DECODER.decode(self._socket.recv())
        if isinstance(message, EngineFailed):
            self._fail(message.message)
        return message

    def _wait(self, event: int) -> bool:
        """Wait until the socket can be read or written; whether it can, which is no more once the ranks have ended.

        Raises:
            EngineDeadError: rank 0 is stuck.
        """
        turned = trusted = time.monotonic()
        while not self._socket.poll(_POLL_MS, event):
            if self._ranks.poll() is not None:
                return bool(self._socket.poll(0, event))
            late, turned = time.monotonic() - turned > self._limit_s / 4, time.monotonic()
            if late:
                trusted = turned
            if self._status_socket.poll(0):
                self._status = _STATUS_DECODER.decode(self._status_socket.recv())
            if words := stuck(self._status, turned - trusted, self._limit_s):
                root = f"rank 0 on {socket.gethostname()} (pid {self.pids.get(0)})"
                self._ranks.terminate()  # it would not end by itself, and nothing that is left can work on
                self._fail(f"{root} was lost: {words}")
        return True

    def _fail(self, message: str) -> None:
        words = self._processes.obituary(message)
        self.close()
        self._end = f"the engine is dead: {words}"
        raise EngineDeadError(words)

    def _last_message(self) -> str:
        """What rank 0 said before it ended, if it said why."""
        message = ""
        while self._socket.poll(0):
            last = _DECODER.decode(self._socket.recv())
            message = last.message if isinstance(last, EngineFailed) else ""
        return message
