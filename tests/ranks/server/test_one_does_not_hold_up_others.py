"""Whatever one client sends or fails to read, the others go on: probes are answered, streams flow, places get free."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.server import Server, events, wait_for

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# The promise is half a second; the rest is for a machine that is busy with other tests.
SLACK_S = 0.5
USER = {"role": "user", "content": "hi"}
# What a grammar may cost that never ends compiling: the checker gives up after a second of a core, five by the clock.
SLOW_SCHEMA = {"allOf": [{"type": "string", "pattern": f"a{i}b*(c|d){{1,30}}"} for i in range(40)]}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--max-num-seqs", "8", "--max-queued-requests", "0") as server:
        yield server.ready()


@contextmanager
def probed(server: Server) -> Iterator[list[float]]:
    """Seconds that each answer of /health took while the block ran."""
    took: list[float] = []
    stop = threading.Event()

    def probe() -> None:
        while not stop.is_set():
            began = time.monotonic()
            assert server.get("/health").status == 200
            took.append(time.monotonic() - began)
            time.sleep(0.02)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()


LARGE: list[tuple[str, str, Any, int]] = [
    ("many prompts", COMPLETIONS, {"prompt": ["a"] * 500_000}, 400),
    ("many lists", COMPLETIONS, b'{"prompt": [' + b"[]," * 500_000 + b"[]]}", 400),
    ("many ids", COMPLETIONS, {"prompt": [5] * 500_000}, 400),
    ("long prompts", COMPLETIONS, {"prompt": ["x" * 30_000] * 8, "max_tokens": 1}, 400),
    ("long role", CHAT, {"messages": [{"role": "a" * 1_000_000, "content": "hi"}]}, 400),
    ("long name", CHAT, {"messages": [{**USER, "name": "a" * 1_000_000}], "max_tokens": 1}, 200),
    ("many messages", CHAT, {"messages": [{"role": "user", "content": ""}] * 30_000}, 400),
    ("large documents", CHAT, {"messages": [USER], "documents": [{"text": "a"}] * 50_000, "max_tokens": 1}, 200),
    (
        "large variables",
        CHAT,
        {"messages": [USER], "chat_template_kwargs": {"x": ["a"] * 200_000}, "max_tokens": 1},
        200,
    ),
    ("ids to text", "/detokenize", {"tokens": [5] * 500_000}, 400),
    ("text to ids", "/tokenize", {"prompt": "x" * 30_000, "return_token_strs": True}, 200),
]


@pytest.mark.parametrize(("path", "body", "status"), [case[1:] for case in LARGE], ids=[case[0] for case in LARGE])
def test_large_bodies(server: Server, path: str, body: Any, status: int) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with probed(server) as took:
        time.sleep(0.1)
        answer = server.post(path, data)
        time.sleep(0.1)
    assert answer.status == status, answer.body[:300]
    assert max(took) < 0.5 + SLACK_S, max(took)


def test_a_grammar_that_is_slow_to_refuse(server: Server) -> None:
    gaps: list[float] = []
    with server.stream({"prompt": "This program", "max_tokens": 900, "ignore_eos": True}) as response:
        tokens = events(response)
        next(tokens)
        answers: list[Any] = []
        body = {"prompt": "x", "guided_json": SLOW_SCHEMA}
        threads = [threading.Thread(target=lambda: answers.append(server.post(COMPLETIONS, body))) for _ in range(2)]
        for thread in threads:
            thread.start()
        last = time.monotonic()
        for _ in tokens:
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
            if not any(thread.is_alive() for thread in threads):
                break
    for thread in threads:
        thread.join()
    assert [answer.error["code"] for answer in answers] == ["invalid_grammar"] * 2
    assert "longer than" in answers[0].error["message"]
    assert max(gaps) < 0.5 + SLACK_S, max(gaps)
    began = time.monotonic()  # the verdict is remembered
    assert server.post(COMPLETIONS, body).error == answers[0].error and time.monotonic() - began < 0.5 + SLACK_S
    assert server.complete("x", guided_regex="[ab]{3}", max_tokens=8)["choices"][0]["finish_reason"] == "stop"


def test_a_client_that_does_not_read_takes_no_places(server: Server) -> None:
    wait_for(lambda: server.state()["open_requests"] == 0, 10, "the places of the test before")
    body = json.dumps(
        {"prompt": "This program", "n": 8, "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 5}
    ).encode()
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", server.port))
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        link.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_for(lambda: server.state()["open_requests"] == 8, 10, "the request")
        assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 429
        wait_for(lambda: server.state()["open_requests"] == 0, 60, "free places though nobody reads")
        assert server.complete("x", max_tokens=1, n=8)["usage"]["completion_tokens"] == 8
        assert link.recv(4096).startswith(b"HTTP/1.1 200")  # and the answer is still there


def test_gaps_of_answers_in_one_piece_are_counted(server: Server) -> None:
    name = "vllm:inter_token_latency_seconds"
    before = server.metric(f"{name}_count"), server.metric(f"{name}_sum")
    server.complete("x", max_tokens=8, n=2, ignore_eos=True)
    assert server.metric(f"{name}_count") == before[0] + 2 * 7
    assert 0 < server.metric(f"{name}_sum") - before[1] < 14
    assert server.metric("http_requests_total") > 0
    assert server.metric("vllm:cache_config_info") == 1
