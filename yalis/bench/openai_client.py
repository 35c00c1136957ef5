"""One streamed request to an OpenAI-compatible server, with the time of every token. No failure leaves this module."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from yalis.bench.datasets import Sample
from yalis.bench.sse import SSEError, SSEParser

_ERROR_CHARACTERS = 500
CONNECT_S = 30.0


@dataclass(frozen=True)
class Target:
    """Where requests go and what is the same in all of them.

    Attributes:
        url: of the endpoint.
        chat: whether it takes messages (else a prompt).
        model: name that the server knows.
        extra: further fields of the body.
        timeout_s: most seconds of one request, from sending to its last byte.
    """

    url: str
    chat: bool
    model: str
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    request_id_prefix: str = "bench-"

    def body(self, sample: Sample) -> dict[str, Any]:
        """JSON body of a request for ``sample``."""
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.chat:
            body |= {"messages": sample.prompt, "max_completion_tokens": sample.output_len}
        else:
            body |= {"prompt": sample.prompt, "max_tokens": sample.output_len}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body | dict(self.extra)


@dataclass
class RequestResult:
    """What became of a request. Times are seconds; `start_s` is on this process's `time.perf_counter`.

    Attributes:
        kind: of the failure (``http_429``, ``timeout``, ``disconnected``, ...), empty for a success.
        error: the failure in words.
        queue_s: waited on the client's side for a free slot of ``max_concurrency``; in no other time.
        ttft_s: from sending to the first token.
        itl_s: gaps between the following token events.
        latency_s: from sending to the last token.
        prompt_len, output_len: as the server's usage tells; else the data set's count and the number of token events.
        counted: where `output_len` comes from, ``usage`` or ``events``.
    """

    start_s: float = 0.0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    prompt_len: int = 0
    output_len: int = 0
    counted: str = "events"
    text: str = ""
    kind: str = ""
    error: str = ""

    @property
    def success(self) -> bool:
        """Whether the whole answer came."""
        return not self.kind


class _Failure(Exception):
    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


async def send_request(
    session: aiohttp.ClientSession, target: Target, sample: Sample, index: int, result: RequestResult | None = None
) -> RequestResult:
    """Send ``sample`` and read its stream to the end; a failure is part of the result."""
    result = result if result is not None else RequestResult()
    result.prompt_len = sample.prompt_len or 0
    payload = json.dumps(target.body(sample)).encode()
    headers = {
        "Content-Type": "application/json",
        "x-request-id": f"{target.request_id_prefix}{index}",
        **target.headers,
    }
    timeout = aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=min(CONNECT_S, target.timeout_s))
    result.start_s = time.perf_counter()
    try:
        async with session.post(target.url, data=payload, headers=headers, timeout=timeout) as response:
            if response.status != 200:
                words = (await response.content.read(1 << 16)).decode("utf-8", "replace")
                raise _Failure(f"http_{response.status}", _error_message(words) or str(response.reason))
            await _read_stream(response, target.chat, result)
    except _Failure as failure:
        _fail(result, failure.kind, str(failure))
    except TimeoutError:
        _fail(result, "timeout", f"no end after {time.perf_counter() - result.start_s:.1f} s")
    except aiohttp.ClientConnectorError as error:
        _fail(result, "connect", str(error))
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, ConnectionError) as error:
        _fail(result, "disconnected", str(error) or type(error).__name__)
    except Exception as error:  # a load test goes on whatever one request meets; the kind names it
        _fail(result, type(error).__name__, str(error))
    return result


async def _read_stream(response: aiohttp.ClientResponse, chat: bool, result: RequestResult) -> None:
    parser = SSEParser()
    last: float | None = None
    usage: dict[str, Any] = {}
    ended = False
    texts: list[str] = []
    async for chunk in response.content.iter_any():
        now = time.perf_counter()
        try:
            events = parser.feed(chunk)
        except SSEError as error:
            raise _Failure("malformed", str(error)) from None
        for event in events:
            if event == "[DONE]":
                ended = True
                continue
            data = _decoded(event)
            if data.get("error"):
                raise _Failure("error_event", _error_message(event) or event[:_ERROR_CHARACTERS])
            if isinstance(data.get("usage"), dict):
                usage = data["usage"]
            choices = data.get("choices")
            if not choices:
                continue
            try:
                choice = choices[0]
                text = _token_text(choice, chat)
                ended = ended or choice.get("finish_reason") is not None
            except (AttributeError, KeyError, TypeError, IndexError):
                raise _Failure("malformed", f"a chunk of another shape: {event[:_ERROR_CHARACTERS]}") from None
            if text is None:
                continue
            texts.append(text)
            if last is None:
                result.ttft_s = now - result.start_s
            else:
                result.itl_s.append(now - last)
            last = now
    result.text = "".join(texts)
    if last is None:
        raise _Failure("no_token", "the stream ended without a token")
    result.latency_s = last - result.start_s
    result.output_len = 1 + len(result.itl_s)
    if not ended:
        raise _Failure(
            "truncated", f"the stream ended after {result.output_len} tokens without finish_reason or [DONE]"
        )
    if isinstance(usage.get("completion_tokens"), int):
        result.output_len, result.counted = usage["completion_tokens"], "usage"
    if isinstance(usage.get("prompt_tokens"), int):
        result.prompt_len = usage["prompt_tokens"]


def _decoded(event: str) -> dict[str, Any]:
    try:
        data = json.loads(event)
    except ValueError:
        raise _Failure("malformed", f"an event that is no JSON: {event[:_ERROR_CHARACTERS]}") from None
    if not isinstance(data, dict):
        raise _Failure("malformed", f"an event that is no object: {event[:_ERROR_CHARACTERS]}")
    return data


def _token_text(choice: Mapping[str, Any], chat: bool) -> str | None:
    """Text of a token event; None for a chunk that carries no token.

    Any completions chunk is a token event, because a token may have no text of its own. In chat, chunks with the role
    alone, or with nothing but the finish reason, carry none.
    """
    if not chat:
        return choice.get("text") or ""
    delta = choice.get("delta") or {}
    text = delta.get("content")
    if text is None or (text == "" and delta.get("role")):
        others = (delta.get(name) for name in ("reasoning_content", "reasoning", "tool_calls"))
        return "" if any(others) else None
    return str(text)


def _error_message(body: str) -> str:
    """Message of an error in OpenAI's shape or the older flat one, else the body itself; at most 500 characters."""
    try:
        data = json.loads(body)
        error = data.get("error", data)
        message = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = None
    return " ".join(str(message if message else body).split())[:_ERROR_CHARACTERS]


def _fail(result: RequestResult, kind: str, message: str) -> None:
    result.kind, result.error = kind, message[:_ERROR_CHARACTERS] or kind
