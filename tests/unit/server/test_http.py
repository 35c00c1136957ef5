"""Connections that are held open: by a client that does not read its answer."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from yalis.server.http import HttpServer, listen

MUCH = 64 << 20  # more than any socket's buffers take


class App:
    """Answers with `MUCH` bytes; remembers how that ended."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(MUCH >> 20):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        gone = await receive()
        self.ended.set_result(gone["type"])


async def serve(*, reads: bool) -> tuple[int, int]:
    """Bytes of an answer that a client read, slowly or only the first of them; and how many clients stalled."""
    stalled: list[None] = []
    app = App()
    server = HttpServer(
        app, head_timeout_s=5, read_timeout_s=0.4, on_stalled=lambda: stalled.append(None), shutdown_s=1
    )
    listener = listen("127.0.0.1", 0)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    client = socket.create_connection(listener.getsockname())
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    size = 0
    try:
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        while data := await asyncio.wait_for(loop.sock_recv(client, 1 << 20), 10):
            size += len(data)
            if not reads:
                break
            await asyncio.sleep(0.02)
        assert await asyncio.wait_for(app.ended, 10) == "http.disconnect"
    finally:
        client.close()
        server.should_exit = True
        await asyncio.wait_for(task, 10)
    return size, len(stalled)


def test_a_client_that_does_not_read_is_hung_up_on() -> None:
    size, stalled = asyncio.run(serve(reads=False))
    assert 0 < size < MUCH and stalled == 1


def test_a_slow_reader_gets_everything() -> None:
    size, stalled = asyncio.run(serve(reads=True))
    assert size > MUCH and stalled == 0
