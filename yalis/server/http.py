"""Uvicorn, with what it lacks: time limits for a request's head and for unread answers, a shutdown that is ours."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from yalis.errors import ConfigError
from yalis.server.errors import bad_request

_KEEP_ALIVE_S = 30
_MAX_HEAD_BYTES = 64 << 10


class HttpServer(uvicorn.Server):
    """Serves ``app`` on a listening socket. Set ``should_exit`` to end it.

    Args:
        app: the application.
        head_timeout_s: a connection that takes longer to send a request's head is closed.
        read_timeout_s: a connection that takes no byte of its answer for so long is closed.
        on_stalled: called for each of these.
        shutdown_s: after ``should_exit``, answers that are under way have so long to leave.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        head_timeout_s: float,
        read_timeout_s: float,
        on_stalled: Callable[[], None],
        shutdown_s: int,
    ):
        class Protocol(_PatientProtocol):
            patience_s = head_timeout_s
            unread_s = read_timeout_s
            stalled = staticmethod(on_stalled)

        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                loop="asyncio",
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=shutdown_s,
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: a drain comes before the shutdown."""
        yield


class _PatientProtocol(H11Protocol):
    """Closes a connection whose request does not arrive, or whose answer is not read; else both could be held for ever.

    An answer that is not taken makes the application wait, and its end wakes it with the news that the client is gone.
    """

    patience_s: float
    unread_s: float
    stalled: Callable[[], None]
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # No answer is kept here beyond what the system takes, so that what is kept is what the client does not read.
        transport.set_write_buffer_limits(high=0)
        self._expect()

    def send_400_response(self, msg: str) -> None:
        # What is no HTTP never reaches the application, but its error looks like any other.
        answer = bad_request("the request is no valid HTTP/1.1; see RFC 9112", code="invalid_http").response()
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def _await_reader(self) -> None:
        self._unread = self.loop.call_later(self.unread_s, self._look_again, self.transport.get_write_buffer_size())

    def _look_again(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._await_reader()
        else:
            self.stalled()
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._late is None and (self.cycle is None or self.cycle.response_complete):
            self._expect()  # the next request on a connection that was kept alive
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self._late = self.loop.call_later(self.patience_s, self._give_up)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from error
    listener.setblocking(False)
    return listener


def url(listener: socket.socket) -> str:
    """``http://host:port`` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
