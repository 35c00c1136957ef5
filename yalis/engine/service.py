"""Rank 0's loop when a client process drives the engine: messages over ZeroMQ in, outputs back."""

from __future__ import annotations

import msgspec
import zmq

from yalis.engine.handle import LocalEngine
from yalis.engine.messages import (
    AbortRequests,
    AddRequest,
    ClientMessage,
    EngineFailed,
    GetStats,
    Outputs,
    Profile,
    Profiled,
    Ready,
    ServiceMessage,
    Shutdown,
)
from yalis.engine.status import Pulse
from yalis.errors import PeerLostError, RequestError

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
# Well below the shortest deadline: a loop that does not turn counts as stuck, see `yalis.engine.async_client`.
_IDLE_POLL_MS = 500


class ClientLink:
    """The service's end of the socket. One client, whose end was bound before the ranks were started."""

    def __init__(self, endpoint: str):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)  # last words may take so long to leave, in ms
        self._socket.setsockopt(zmq.SNDHWM, 0)  # a client that stands still must not hold up the ranks
        self._socket.connect(endpoint)

    def send(self, message: ServiceMessage) -> None:
        """Send without waiting for the client."""
        self._socket.send(_ENCODER.encode(message))

    def receive(self, timeout_ms: int) -> ClientMessage | None:
        """The next message, or None after ``timeout_ms``."""
        if not self._socket.poll(timeout_ms):
            return None
        return _DECODER.decode(self._socket.recv())

    def close(self) -> None:
        """Close the socket; what was sent is delivered first, within a second."""
        self._socket.close()
        self._context.term()


def serve(engine: LocalEngine, link: ClientLink, pulse: Pulse) -> None:
    """Run until the client says `Shutdown`.

    Args:
        pulse: is told at every turn of the loop, for those who watch it from another thread.

    Raises:
        PeerLostError: a rank was lost; the client has been told.
    """
    link.send(Ready(engine.info))
    try:
        while True:
            pulse.beat()
            message = link.receive(0 if engine.engine.has_unfinished_requests else _IDLE_POLL_MS)
            while message is not None:
                if isinstance(message, Shutdown):
                    return
                _handle(engine, link, message)
                message = link.receive(0)
            engine.ranks.check()
            outputs = engine.poll()
            if outputs:
                link.send(Outputs(outputs))
    except PeerLostError as error:
        link.send(EngineFailed(str(error)))
        raise


def _handle(engine: LocalEngine, link: ClientLink, message: ClientMessage) -> None:
    match message:
        case AddRequest():
            engine.submit(
                message.request_id,
                message.prompt,
                message.params,
                stream=message.stream,
                delta=message.delta,
                checked=message.checked,
            )
        case AbortRequests():
            engine.abort(message.request_ids)
        case GetStats():
            engine.settle()  # the client may have aborted a moment ago, and counts on it
            link.send(engine.stats(reset=message.reset))
        case Profile():
            try:
                link.send(Profiled(path=engine.profile(message.command.start, message.command.folder)))
            except RequestError as error:
                link.send(Profiled(error=str(error)))
        case Shutdown():
            raise AssertionError("handled by the loop")
