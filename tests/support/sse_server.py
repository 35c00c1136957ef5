"""A real HTTP server on loopback that streams completions as the asked model's name says, and notes when it wrote."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

FIRST_S, GAP_S = 0.08, 0.03


@dataclass
class SSEServer:
    """``requests``: bodies as they came; ``writes``: per request id the `time.perf_counter` of each token's write;
    ``refused``: a path of ``posts`` that is answered with 500."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    writes: dict[str, list[float]] = field(default_factory=dict)
    posts: list[str] = field(default_factory=list)
    refused: str = ""
    running: int = 0
    most_running: int = 0

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Models: ``timed``, ``cut`` (bytes cut anywhere, comments, CRLF), ``bundled``, and one per failure."""
        body = await request.json()
        self.requests.append(body)
        self.headers.append({k.lower(): v for k, v in request.headers.items()})
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._answer(request, body, chat=request.path.endswith("chat/completions"))
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any], *, chat: bool) -> web.StreamResponse:
        model = body["model"]
        if model == "busy":
            error = {"message": "the queue is full", "type": "rate_limit", "param": None, "code": None}
            return web.json_response({"error": error}, status=429, headers={"Retry-After": "1"})
        if model == "hang":
            await asyncio.sleep(30)
        if model == "reset":
            assert request.transport is not None
            request.transport.abort()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        count = body.get("max_tokens") or body.get("max_completion_tokens")
        writes = self.writes.setdefault(request.headers.get("x-request-id", "?"), [])

        async def send(data: Any) -> None:
            text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
            if model == "cut":
                raw = f": a comment\r\nevent: token\r\ndata: {text}\r\n\r\n".encode()
                for i in range(0, len(raw), 7):
                    await response.write(raw[i : i + 7])
            else:
                await response.write(f"data: {text}\n\n".encode())

        def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
            piece: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            return {"choices": [{"index": 0, "finish_reason": finish, **piece}]}

        if chat:  # long before the first token: only the role
            await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        if model == "malformed":
            await send("{no json")
        if model == "no-token":
            count = 0
        if model == "early":
            count = min(count, 2)
        if model == "error-event":
            await send({"error": {"message": "rank 1 was lost", "type": "server_error"}})
        for i in range(count):
            await asyncio.sleep(FIRST_S if i == 0 else GAP_S)
            if model == "bundled" and i % 2:
                continue
            if model == "truncated" and i == 2:
                return response
            if model == "disconnected" and i == 2:
                assert request.transport is not None
                request.transport.abort()
            writes.append(time.perf_counter())
            await send(chunk("é" if model == "cut" else "x", "length" if i == count - 1 and not chat else None))
        if chat:
            await send({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        if model != "untold":
            await send({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        await send("[DONE]")
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "timed", "root": None}]})

    async def post(self, request: web.Request) -> web.Response:
        self.posts.append(request.path)
        return web.Response(status=500 if request.path == self.refused else 200)


@contextmanager
def sse_server() -> Iterator[SSEServer]:
    """A running server, in a thread with an event loop of its own, so that the client's load does not delay it."""
    loop = asyncio.new_event_loop()
    started: threading.Event = threading.Event()
    server = SSEServer("")

    async def serve() -> web.AppRunner:
        app = web.Application()
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, server.completions)
        for path in ("/start_profile", "/stop_profile"):
            app.router.add_post(path, server.post)
        app.router.add_get("/v1/models", server.models)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
