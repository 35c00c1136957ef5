"""What no client should send: a 4xx in OpenAI's shape, never a 5xx, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ranks.server.conftest import BODY_TIMEOUT_S, MAX_BODY, NUM_QUEUED, NUM_SEQS
from tests.support.server import Answer, Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(autouse=True)
def still_serves(one: Server) -> Iterator[None]:
    before = one.metric("vllm:generation_tokens_total")
    yield
    assert one.get("/health").status == 200
    assert one.complete("This program", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert one.metric("vllm:generation_tokens_total") >= before + 2


BODIES: list[tuple[str, bytes, int, str | None]] = [
    ("not json", b"{'prompt': 1}", 400, "invalid_json"),
    ("empty", b"", 400, "invalid_json"),
    ("cut", b'{"prompt": "x"', 400, "invalid_json"),
    ("trailing", b'{"prompt": "x"} x', 400, "invalid_json"),
    ("no object", b'["prompt"]', 400, None),
    ("invalid utf-8", b'{"prompt": "\xff\xfe"}', 400, "invalid_json"),
    ("lone surrogate", b'{"prompt": "\\ud800"}', 400, "invalid_json"),
    ("deep nesting", b'{"prompt": ' + b"[" * 50000 + b"]" * 50000 + b"}", 400, "invalid_json"),
    ("NaN", b'{"prompt": "x", "temperature": NaN}', 400, "invalid_json"),
    ("infinite", b'{"prompt": "x", "temperature": 1e999}', 400, None),
    ("unknown field", b'{"prompt": "x", "temprature": 1}', 400, "unknown_parameter"),
]


@pytest.mark.parametrize(("body", "status", "code"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_bodies(one: Server, body: bytes, status: int, code: str | None) -> None:
    answer = one.post(COMPLETIONS, body)
    assert answer.status == status, answer.body
    assert answer.error["type"] == "invalid_request_error"
    if code is not None:
        assert answer.error["code"] == code


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [2048]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": [[[1]]]}, "prompt"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"min_tokens": 20}, "min_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop_token_ids": [99999]}, "stop_token_ids"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1000}}, "logit_bias"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 4}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"usage": True}}, "stream_options"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "nonsense"}}, "response_format"),
]


@pytest.mark.parametrize(("fields", "param"), FIELDS, ids=lambda value: str(value)[:40])
def test_fields(one: Server, fields: dict[str, Any], param: str) -> None:
    answer = one.post(COMPLETIONS, {"prompt": "x", **fields})
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param, answer.error
    assert len(answer.error["message"]) < 1000


CHATS: list[dict[str, Any]] = [
    {},
    {"messages": []},
    {"messages": "hi"},
    {"messages": [{"content": "hi"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 5},
    {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 21},
    {"messages": [{"role": "user", "content": "hi"}], "chat_template": "{{ 1 }}"},
    {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"messages": []}},
    {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 0},
    {"messages": [{"role": "user", "content": "hi", "surprise": 1}]},
    {"messages": [{"role": "user", "content": "hi"}], "verbosity": "low"},
    {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "high"},
    {"messages": [{"role": "user", "content": "hi"}], "prompt_logprobs": 1, "stream": True},
    {"messages": [{"role": "user", "content": "hi"}], "prompt_logprobs": 21},
]


@pytest.mark.parametrize("body", CHATS, ids=lambda body: json.dumps(body)[:60])
def test_chats(one: Server, body: dict[str, Any]) -> None:
    answer = one.post(CHAT, body)
    assert answer.status == 400, answer.body
    assert answer.error["message"]


def test_more_sequences_than_ever_fit(one: Server) -> None:
    for body in ({"prompt": ["x"] * (NUM_SEQS + NUM_QUEUED + 1)}, {"prompt": ["x", "y"], "n": 17}):
        answer = one.post(COMPLETIONS, body)
        assert answer.status == 400 and answer.error["code"] == "too_many_sequences"
        assert f"at most {NUM_SEQS + NUM_QUEUED}" in answer.error["message"]


def test_wrong_content_type(one: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = one.post(COMPLETIONS, b'{"prompt": "x"}', headers={"content-type": kind})
        assert answer.status == 415 and answer.error["code"] == "unsupported_media_type"


def test_unknown_paths_and_methods(one: Server) -> None:
    assert one.get("/v1/nothing").error["type"] == "not_found_error"
    assert one.post(COMPLETIONS + "/", {"prompt": "x"}).error["code"] == "not_found"
    assert one.get("/page/../app.py").status == 404
    assert one.get("/page/%2e%2e%2fapp.py").status == 404
    answer = one.get(COMPLETIONS)
    assert answer.status == 405 and answer.error["code"] == "method_not_allowed" and answer.headers["allow"] == "POST"


def test_huge_body(one: Server) -> None:
    answer = one.post(COMPLETIONS, json.dumps({"prompt": "x" * MAX_BODY}).encode())
    assert answer.status == 413 and str(MAX_BODY) in answer.error["message"]
    assert answer.headers["connection"] == "close"


def raw(one: Server, *parts: bytes, pause_s: float = 0.0, timeout_s: float = 10.0) -> bytes:
    """Send parts with pauses in between; everything that comes back until the connection closes."""
    with socket.create_connection(("127.0.0.1", one.port), timeout=timeout_s) as link:
        received = b""
        try:
            for part in parts:
                link.sendall(part)
                time.sleep(pause_s)
            while data := link.recv(65536):
                received += data
        except ConnectionError:
            pass  # the server hung up on us; what it said before counts
        return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_a_text_of_megabytes_is_refused_without_tokenizing(one: Server) -> None:
    body = {"prompt": "x" * (MAX_BODY - 100)}
    began = time.monotonic()
    answer = one.post(COMPLETIONS, body)
    assert answer.error["code"] == "context_length_exceeded" and time.monotonic() - began < 2.0
    answer = one.post(CHAT, {"messages": [{"role": "user", "content": body["prompt"]}]})
    assert answer.error["code"] == "context_length_exceeded" and answer.error["param"] == "messages"


def test_more_ids_than_the_context_holds(one: Server) -> None:
    answer = one.post("/detokenize", {"tokens": [5] * 1025})
    assert answer.status == 400 and answer.error["param"] == "tokens" and "at most 1024" in answer.error["message"]
    assert one.post("/detokenize", {"tokens": [5] * 1024}).status == 200
    assert one.post("/detokenize", {"tokens": [2048]}).error["param"] == "tokens"
    answer = one.post(COMPLETIONS, {"prompt": [5] * 1024})
    assert answer.status == 400 and answer.error["code"] == "context_length_exceeded"
    answer = one.post(CHAT, {"messages": [{"role": "user", "content": ""}] * 1024})
    assert answer.status == 400 and answer.error["code"] == "context_length_exceeded"


def test_endless_chunked_body(one: Server) -> None:
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    answer = raw(one, HEAD + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 20)
    assert answer.startswith(b"HTTP/1.1 413 "), answer[:200]


def test_slow_body(one: Server) -> None:
    began = time.monotonic()
    answer = raw(one, HEAD + b"content-length: 1000\r\n\r\n", b"{")
    assert answer.startswith(b"HTTP/1.1 408 "), answer[:200]
    assert BODY_TIMEOUT_S * 0.9 < time.monotonic() - began < BODY_TIMEOUT_S + 2.0


def test_slow_head(one: Server) -> None:
    began = time.monotonic()
    assert raw(one, b"POST /v1/comp", b"let", pause_s=0.2) == b""
    assert BODY_TIMEOUT_S * 0.9 < time.monotonic() - began < BODY_TIMEOUT_S + 2.0


def test_no_http_at_all(one: Server) -> None:
    for noise in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 1000 + b"\r\n\r\n", b"GET " + b"a" * 200000):
        answer = raw(one, noise)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 "), answer[:100]
    head, _, body = raw(one, b"POST /v1/completions\r\nhost x\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_a_kept_connection_serves_again(one: Server) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    answer = raw(one, request, request, request.replace(b"host: x", b"host: x\r\nconnection: close"), pause_s=0.1)
    assert answer.count(b"HTTP/1.1 200 OK") == 3


def test_request_ids_come_back(one: Server) -> None:
    def given(value: str) -> Answer:
        return one.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, headers={"x-request-id": value})

    assert given("my-id-17").headers["x-request-id"] == "my-id-17"
    assert len(given("a b").headers["x-request-id"]) == 32  # no name that could break a log line
    assert len(given("x" * 200).headers["x-request-id"]) == 32
    with one.stream({"prompt": "x", "max_tokens": 1}) as response:
        assert response.headers["x-request-id"]
