"""Sending: errors before and inside a stream, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from yalis.server.answers import ClientGone, EventStream, event, while_connected
from yalis.server.errors import ApiError


class Connection:
    """An ASGI connection that records what is sent; the client goes away when ``gone`` is set."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.sent if m["type"] == "http.response.body")

    @property
    def status(self) -> int:
        return int(next(m["status"] for m in self.sent if m["type"] == "http.response.start"))


async def stream(connection: Connection, events: AsyncIterator[bytes]) -> list[str]:
    closed: list[str] = []
    response = EventStream(events, lambda: closed.append("closed"))
    await asyncio.wait_for(response({"type": "http"}, connection.receive, connection.send), 5)
    return closed


async def failing(after: int) -> AsyncIterator[bytes]:
    for number in range(after):
        yield event(number)
    raise ApiError(503, "lost")


def test_whole_stream() -> None:
    async def work() -> None:
        async def events() -> AsyncIterator[bytes]:
            yield event({"a": 1})
            yield b"data: [DONE]\n\n"

        connection = Connection()
        assert await stream(connection, events()) == ["closed"]
        assert connection.status == 200
        assert connection.body == b'data: {"a":1}\n\ndata: [DONE]\n\n'
        assert connection.sent[-1]["more_body"] is False

    asyncio.run(work())


def test_error_before_the_first_event_is_a_status() -> None:
    async def work() -> None:
        connection = Connection()
        assert await stream(connection, failing(0)) == ["closed"]
        assert connection.status == 503 and connection.body.startswith(b'{"error":')

    asyncio.run(work())


def test_error_inside_is_an_event() -> None:
    async def work() -> None:
        connection = Connection()
        assert await stream(connection, failing(1)) == ["closed"]
        assert connection.status == 200
        first, last, end = connection.body.split(b"\n\n")
        assert (first, end) == (b"data: 0", b"") and last.startswith(b'data: {"error":{"message":"lost"')

    asyncio.run(work())


def test_client_that_goes_away() -> None:
    async def work() -> None:
        ended: list[str] = []

        async def endless() -> AsyncIterator[bytes]:
            try:
                yield event(0)
                await asyncio.Event().wait()
            finally:
                ended.append("ended")

        connection = Connection()
        task = asyncio.create_task(stream(connection, endless()))
        while not connection.body:
            await asyncio.sleep(0)
        connection.gone.set()
        assert await asyncio.wait_for(task, 5) == ["closed"]
        assert ended == ["ended"]

        async def never() -> None:
            await asyncio.Event().wait()

        with pytest.raises(ClientGone):
            await asyncio.wait_for(while_connected(connection.receive, never()), 5)

    asyncio.run(work())
