"""Sending answers: whole, or as a stream of events; either way the work ends when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from yalis.server.errors import ApiError

T = TypeVar("T")
_ENCODER = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client went away; nobody waits for the answer."""


def event(value: Any) -> bytes:
    """``value`` as one server-sent event."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return await task
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await one


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. The status is known before the first event: what fails until then is an ordinary error.

    Args:
        events: yields whole events; an `ApiError` inside becomes a last event of its own.
        close: called at the end, in any case.
    """

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client goes away."""
        try:
            with contextlib.suppress(ClientGone):
                await while_connected(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            first = await anext(self._events)
        except ApiError as error:
            response = error.response()
            await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
            await body(bytes(response.body), more=False)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await body(first)
        try:
            async for data in self._events:
                await body(data)
        except ApiError as error:
            await body(event(error.body()))
        await body(b"", more=False)
