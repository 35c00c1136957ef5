"""The page at / in a real browser, in front of a server whose state the test decides."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import yalis
from tests.support.browser import Browser, browser, needs_chromium

PAGE = Path(yalis.__file__).parent / "server" / "page"
# The strictest policy under which a page of one origin can work: nothing inline, nothing from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
STATE: dict[str, Any] = {
    "model": "demo",
    "status": "ready",
    "message": None,
    "version": "1.0",
    "uptime_s": 12.3,
    "restarts": 0,
    "ranks": [
        {"rank": 0, "host": "n1", "pid": 41, "state": "working", "step": 17, "beat_age_s": 0.1},
        {
            "rank": 1,
            "host": "n1",
            "pid": 42,
            "state": "L3.mlp.down/allreduce[shm,8192B]",
            "step": 17,
            "beat_age_s": 0.2,
        },
    ],
    "kv": {"usage": 0.25, "num_blocks": 4096, "block_size": 16},
    "running": 3,
    "waiting": 1,
    "open_requests": 4,
    "preemptions": 0,
    "tokens_per_s": {"prompt": 0.0, "generation": 812.5},
    "step_ms": {
        "steps": 120,
        "total": 4.1,
        "compute": 2.9,
        "intra": 0.7,
        "inter": 0.0,
        "flat": 0.0,
        "pipeline": 0.0,
        "host": 0.5,
    },
    "engine": {
        "architecture": "LlamaForCausalLM",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
        "max_model_len": 1024,
    },
}
HOSTILE = "<img src=x onerror=alert(1)><b>bold</b> & \u202e end"

pytestmark = needs_chromium


class FakeServer:
    """Serves the page as `yalis serve` does, and what it asks for as the test says."""

    def __init__(self) -> None:
        self.state = copy.deepcopy(STATE)
        self.key = ""
        self.up = True
        self.tokens = ["Hello", " ", "wör", "ld"]
        self.gap_s = 0.0
        self.asked: list[dict[str, Any]] = []
        self.aborted = 0

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self._file)
        app.router.add_get("/page/{name}", self._file)
        app.router.add_get("/state", self._state)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        guarded = request.path == "/state" or request.path.startswith("/v1")
        if guarded and self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        return await handler(request)

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name", "index.html")
        kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
        body = (PAGE / name).read_bytes()
        headers = {"Content-Security-Policy": POLICY, "Content-Type": kinds[Path(name).suffix]}
        return web.Response(body=body, headers=headers)

    async def _state(self, request: web.Request) -> web.Response:
        if not self.up:
            return web.Response(status=502)
        return web.json_response(self.state)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        chat = "messages" in body
        if body.get("temperature") == 2:
            return web.json_response({"error": {"message": "temperature 2 is refused"}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            if chat:
                await self._send(response, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for i, token in enumerate(self.tokens):
                await asyncio.sleep(self.gap_s)
                finish = "stop" if i == len(self.tokens) - 1 else None
                piece: dict[str, Any] = {"delta": {"content": token}} if chat else {"text": token}
                await self._send(response, {"choices": [{"index": 0, "finish_reason": finish, **piece}]})
            await self._send(response, {"choices": [], "usage": {"completion_tokens": len(self.tokens)}})
            await response.write(b": comment\n\ndata: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.aborted += 1
            raise
        return response

    async def _send(self, response: web.StreamResponse, data: dict[str, Any]) -> None:
        raw = f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
        for part in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
            await response.write(part)


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[FakeServer, Browser]]:
    fake = FakeServer()
    runner = web.AppRunner(fake.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with browser() as tab:
            await tab.look(1280, 800)
            await tab.open(f"http://127.0.0.1:{runner.addresses[0][1]}/")
            yield fake, tab
    finally:
        await runner.cleanup()


LAST_SAID = "[...document.querySelectorAll('.said')].at(-1)"


def test_state_and_conversation() -> None:
    async def steps() -> None:
        async with opened() as (fake, tab):
            await tab.until("document.getElementById('status').textContent === 'ready'")
            assert await tab.text("generation") == "813"
            assert await tab.text("kv-text") == "25% of 4,096 blocks"
            assert "TP 2 \u00d7 PP 1" in await tab.text("engine")
            legend = await tab.text("step-list")
            assert legend == "compute2.9 msall-reduce in node0.7 mshost0.5 ms"
            widths = "[...document.querySelectorAll('#step-bar rect')].map(r => Number(r.getAttribute('width')))"
            assert await tab.evaluate(widths) == pytest.approx([100 * p / 4.1 for p in (2.9, 0.7, 0.5)])
            rows = "[...document.querySelectorAll('#ranks tr')].map(r => r.innerText.trim().split(/\\s+/).join(' '))"
            assert await tab.evaluate(rows) == [
                "0 working 17 0.1 s n1 41",
                "1 L3.mlp.down/allreduce[shm,8192B] 17 0.2 s n1 42",
            ]

            # By keyboard alone: the message box, Shift+Enter for a line, Enter to send.
            await tab.evaluate("document.getElementById('message').focus()")
            await tab.type("one")
            await tab.press("Enter", 13, modifiers=8)
            await tab.type("two")
            fake.tokens = ["Hello ", HOSTILE, "\nwörld"]
            await tab.press("Enter", 13)
            await tab.until("document.querySelector('.facts')?.textContent.includes('3 tokens')")
            await tab.until("!document.getElementById('send').disabled")
            assert fake.asked[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
            assert fake.asked[0]["stream_options"] == {"include_usage": True}
            # What the model says is text, whatever it says.
            assert await tab.evaluate(f"{LAST_SAID}.lastChild.data") == f"Hello {HOSTILE}\nwörld"
            assert await tab.evaluate("document.querySelectorAll('.said img, .said b').length") == 0
            assert await tab.evaluate("document.activeElement.id") == "message"
            assert int(await tab.text("ttft")) >= 0

            # The conversation goes on, and a completion has none.
            await tab.type("three")
            await tab.press("Enter", 13)
            await tab.until("document.querySelectorAll('.facts').length === 2")
            await tab.until("!document.getElementById('send').disabled")
            assert [m["role"] for m in fake.asked[1]["messages"]] == ["user", "assistant", "user"]
            await tab.evaluate("document.getElementById('mode').value = 'completion'")
            await tab.type("once upon")
            await tab.press("Enter", 13)
            await tab.until("document.querySelectorAll('.facts').length === 3")
            await tab.until("!document.getElementById('send').disabled")
            assert (fake.asked[2]["prompt"], fake.asked[2]["max_tokens"]) == ("once upon", 256)
            await tab.evaluate("document.getElementById('mode').value = 'chat'")

            # Stop, by button and by key: the server notices, and what came stays.
            fake.tokens, fake.gap_s = ["x"] * 1000, 0.02
            for stop in (lambda: tab.click("stop"), lambda: tab.press("Escape", 27)):
                before = fake.aborted
                await tab.type("go on")
                await tab.press("Enter", 13)
                await tab.until(f"{LAST_SAID}.classList.contains('assistant') && {LAST_SAID}.lastChild.data.length > 2")
                await stop()
                await tab.until("[...document.querySelectorAll('.facts')].at(-1).textContent.includes('stopped')")
                async with asyncio.timeout(10):
                    while fake.aborted == before:
                        await asyncio.sleep(0.02)
                assert "tokens/s" in await tab.evaluate("[...document.querySelectorAll('.facts')].at(-1).textContent")

            # An error is told in the server's words, and the question may be asked again.
            await tab.evaluate("document.getElementById('temperature').value = 2")
            await tab.type("refuse me")
            await tab.press("Enter", 13)
            await tab.until("document.querySelector('.facts.failed')?.textContent.includes('temperature 2 is refused')")
            await tab.click("clear")
            assert await tab.evaluate("document.querySelectorAll('.said').length") == 0
            assert [p for p in tab.problems if "400" not in p] == []

    asyncio.run(asyncio.wait_for(steps(), 90))


def test_trouble_is_shown() -> None:
    async def steps() -> None:
        async with opened() as (fake, tab):
            await tab.until("document.getElementById('status').textContent === 'ready'")
            assert await tab.evaluate("document.getElementById('alarm').hidden")
            fake.state["ranks"][1] |= {"beat_age_s": 6.4}
            await tab.until("document.querySelector('tr.silent')?.innerText.includes('silent')")
            fake.state["ranks"][1] |= {"state": "lost", "beat_age_s": 4.0}
            await tab.until("document.querySelector('tr.lost')?.innerText.includes('lost')")
            assert "rank 1 on n1" in await tab.text("alarm")
            assert await tab.evaluate("document.getElementById('status').dataset.tone") == "bad"
            # A verdict names the rank, whatever the last status said of it; and it comes to the top.
            verdict = "rank 1 on n1 (pid 42) was lost: process died."
            fake.state["ranks"][1] |= {"state": "working", "beat_age_s": 0.1}
            fake.state |= {"status": "dead", "message": verdict}
            await tab.until("document.getElementById('status').textContent === 'dead'")
            assert await tab.text("alarm") == verdict
            assert await tab.evaluate("document.querySelector('#ranks tr').className") == "lost"
            assert "1" in await tab.evaluate("document.querySelector('tr.lost th').textContent")
            fake.up = False
            await tab.until("document.getElementById('status').textContent === 'unreachable'")
            assert await tab.evaluate("document.getElementById('live').classList.contains('stale')")
            # Why it died is still there when the server itself is gone.
            assert f"{verdict} The server does not answer" in await tab.text("alarm")
            fake.up, fake.state = True, copy.deepcopy(STATE) | {"ranks": [], "step_ms": {}, "status": "starting"}
            await tab.until("document.getElementById('status').textContent === 'starting'")
            assert "have not met" in await tab.text("ranks")
            fake.key = "k-1"
            await tab.until("!document.getElementById('key-form').hidden")
            for key in ("wrong", "k-1"):
                await tab.evaluate(f"document.getElementById('key').value = '{key}'")
                await tab.evaluate("document.getElementById('key-form').requestSubmit()")
                if key == "wrong":
                    await tab.until("document.getElementById('alarm').textContent.includes('does not accept')")
            await tab.until("document.getElementById('key-form').hidden")
            assert [p for p in tab.problems if "502" not in p and "401" not in p] == []

    asyncio.run(asyncio.wait_for(steps(), 60))


def test_every_width_and_scheme_is_usable() -> None:
    """No sideways scrolling, text legible on its ground, every field with a label, also with a dead rank in sight."""

    async def steps() -> None:
        async with opened() as (fake, tab):
            fake.state["ranks"][1] |= {"state": "lost"}
            await tab.until("document.querySelector('tr.lost')")
            for width, dark in ((360, False), (360, True), (1280, False), (1280, True)):
                await tab.look(width, 760, dark=dark)
                assert await tab.evaluate("document.documentElement.scrollWidth") <= width
                assert await tab.evaluate(PARTED) == [], width
                low = await tab.evaluate(CONTRAST)
                assert low == [], (width, dark)
            unnamed = "[...document.querySelectorAll('input, select, textarea, meter')].filter(e => !e.labels.length)"
            assert await tab.evaluate(f"{unnamed}.map(e => e.id)") == []
            assert tab.problems == []

    asyncio.run(asyncio.wait_for(steps(), 60))


# Labels that do not stand right beside or above their field.
PARTED = """[...document.querySelectorAll('.row label')].filter((label) => {
  const [a, b] = [label, label.control].map((e) => e.getBoundingClientRect());
  return Math.max(b.left - a.right, a.left - b.right, b.top - a.bottom, a.top - b.bottom) > 12;
}).map((label) => label.textContent)"""
# Texts with less contrast to their ground than 4.5 (WCAG AA).
CONTRAST = """(() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => rgb(c).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if ((rgb(c)[3] ?? 1) === 1) return c;
    }
    return "rgb(255, 255, 255)";
  };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.closest(":disabled, svg, option")) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const name = `${e.tagName} ${e.id || e.className} ${e.textContent.trim().slice(0, 20)}`;
    if (ratio < 4.5) low.push(`${name} ${ratio.toFixed(2)}`);
  }
  return low;
})()"""
