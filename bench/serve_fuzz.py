"""Mutated requests at one server: every answer is 2xx or 4xx, nobody else is affected, and nothing is left behind.

    python bench/serve_fuzz.py [--requests 5000] [--seed 0] [--tp 1] [--output-json FILE]

Each request is a good one with some mutations: of JSON values (types, sizes, nesting, NaN, unknown and double keys), of
the body's bytes (flipped, cut, repeated, invalid UTF-8), and of the HTTP around it (method, path, lengths, headers).
They go over bare sockets, because a good client would refuse to send them. All the while another client asks one fixed
question and compares the answer, and a third asks for /health. Requests are a function of --seed and their number:
`--only N` sends one again.

What counts as a failure: a 5xx, a connection that is closed without an answer or does not answer in time, an error
without OpenAI's shape from an API path, a wrong answer of the other client, an answer of /health that is no 200 or
takes longer than --health-limit, and a server that is not healthy or not idle afterwards. Answers that generate for
longer than --patience seconds are dropped by the client, which is allowed.
Load goes to 127.0.0.1 only and ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from serve_process import serving

from yalis.utils.machine import machine_record

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "This program"}]
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SAMPLING = {
    "max_tokens": 8,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "n": 2,
    "seed": 7,
    "stop": ["END"],
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -10},
    "min_tokens": 1,
    "stop_token_ids": [9],
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "This program is free", **SAMPLING}),
    ("/v1/completions", {"prompt": ["You may", "THERE IS"], "max_tokens": 4, "echo": True, "logprobs": 3}),
    ("/v1/completions", {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 4, "logprobs": 0, "stream": False}),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 4, "guided_regex": "[ab]+", "user": "u"}),
    ("/v1/completions", {"prompt": "Pick", "max_tokens": 4, "guided_choice": ["yes", "no"]}),
    ("/v1/chat/completions", {"messages": MESSAGES, **SAMPLING}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 8, "logprobs": True, "top_logprobs": 3}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 24, "response_format": {"type": "json_object"}}),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_tokens": 24,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        },
    ),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8, "tools": [TOOL], "tool_choice": "auto"}),
    ("/tokenize", {"prompt": "This program", "add_special_tokens": True}),
    ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]
CANARY = {"prompt": "The licenses for most software", "max_tokens": 24, "temperature": 0.8, "seed": 11}
BODY_LIMIT = 16 << 20  # the server's default
GROWN_LIMIT = 2 * BODY_LIMIT  # what is grown may be too large, but growing it twice must not make gigabytes
ODD_TEXTS = ["", " ", "\x00", "a" * 100_000, "\u202e\U0001f4a9" * 50, "\ud800", "<|im_end|>" * 20, "{{ 7*7 }}", "null"]
ODD_NUMBERS: list[Any] = [
    *(0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, -1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf")),
]


def nested(rng: random.Random) -> Any:
    depth = rng.choice([3, 50, 500, 5000])
    kind = rng.choice(["list", "dict"])
    value: Any = 1
    for _ in range(min(depth, 400)):
        value = [value] if kind == "list" else {"a": value}
    if depth > 400:  # deeper than json.dumps would go
        return Raw("[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth)
    return value


@dataclass(frozen=True)
class Raw:
    """JSON text put in as it is."""

    text: str


def odd_value(rng: random.Random) -> Any:
    """A value that a field does not expect, mostly."""
    return rng.choice(
        [
            lambda: rng.choice(ODD_NUMBERS),
            lambda: rng.choice(ODD_TEXTS),
            lambda: rng.choice([None, True, False, [], {}, [[]], [None], {"": None}]),
            lambda: nested(rng),
            lambda: [rng.choice(ODD_NUMBERS) for _ in range(rng.choice([1, 3, 3000]))],
            lambda: {str(i): i for i in range(rng.choice([1, 2000]))},
            lambda: Raw(rng.choice(["01", "1e999999", "'x'", "nul", '"\\ud800"', '"\\x"', "-", "1_0"])),
        ]
    )()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutate_json(rng: random.Random, body: dict[str, Any]) -> Any:
    """Change one place of a body."""
    if rng.random() < 0.04:
        return odd_value(rng)
    path = rng.choice(places(body))
    holder: Any = body
    for key in path[:-1]:
        holder = holder[key]
    change = rng.choice(["replace", "replace", "replace", "remove", "rename", "swap", "grow", "crowd"])
    if change == "replace":
        holder[path[-1]] = odd_value(rng)
    elif change == "remove":
        del holder[path[-1]]
    elif change == "rename" and isinstance(holder, dict):
        holder[rng.choice(["", "prompt", "messages", "stream", "x" * 1000, str(path[-1]).upper()])] = holder.pop(
            path[-1]
        )
    elif change == "swap":
        other = rng.choice(SEEDS)[1]
        key = rng.choice(list(other))
        body[key] = copy.deepcopy(other[key])
    elif change == "crowd":  # long texts where short ones are meant, and more of something than anybody needs
        # As text, because this client must not take seconds to build it: its own connections would be late.
        one = rng.choice(['"a"', "1", "[]", "{}", '{"role":"user","content":""}'])
        crowd = "[" + ",".join([one] * rng.choice([1_000, 30_000, 300_000])) + "]"
        holder[path[-1]] = Raw(rng.choice(['"' + "a" * 1_000_000 + '"', crowd]))
    elif isinstance(holder[path[-1]], str | list):
        size = len(encode(holder[path[-1]]))
        factors = [factor for factor in (2, 1000) if factor * size <= GROWN_LIMIT]
        # Copies, because a later change of one element is meant for that one.
        copies = (copy.deepcopy(holder[path[-1]]) for _ in range(rng.choice(factors or [1])))
        holder[path[-1]] = "".join(copies) if isinstance(holder[path[-1]], str) else [x for one in copies for x in one]
    return body


def encode(value: Any) -> bytes:
    """JSON text; `Raw` parts as they are, NaN and lone surrogates let through."""
    raws: list[str] = []

    def plain(v: Any) -> Any:
        if isinstance(v, Raw):
            raws.append(v.text)
            return f"@raw{len(raws) - 1}@"
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        return [plain(x) for x in v] if isinstance(v, list) else v

    text = json.dumps(plain(value), ensure_ascii=False)
    text = re.sub('"@raw([0-9]+)@"', lambda found: raws[int(found[1])], text)
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Change some bytes of a body."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(data) + 1)
        kind = rng.choice(["flip", "cut", "insert", "repeat", "double"])
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at : at + rng.choice([1, 10, len(data)])]
        elif kind == "insert":
            data[at:at] = rng.choice(
                [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"{", b'"', b"\\u", b",,", bytes([at % 256])]
            )
        elif kind == "repeat":
            data[at:at] = bytes(data[at : at + 40]) * rng.choice([2, 200])
        else:
            data += b'{"a": 1}'
    return bytes(data)


def make_request(seed: int, number: int, host: str) -> tuple[bytes, str, str]:
    """Bytes of request ``number``, its path, and what was done to it."""
    rng = random.Random(f"{seed}/{number}")
    path, body = copy.deepcopy(rng.choice(SEEDS))
    kind = rng.choices(["json", "bytes", "http"], [6, 3, 2])[0]
    value: Any = body
    if kind == "json":
        for _ in range(rng.choice([1, 1, 2, 4])):
            if isinstance(value, dict) and value:
                value = mutate_json(rng, value)
    raw = encode(value)
    if kind == "bytes":
        raw = mutate_bytes(rng, raw)
    method, target, version = "POST", path, "HTTP/1.1"
    headers = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(raw)), "Connection": "close"}
    if kind == "http":
        what = rng.choice(["method", "path", "type", "length", "header", "chunked", "version", "expect"])
        kind = f"http {what}"
        if what == "method":
            method = rng.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "BREW", "P\x01ST"])
        elif what == "path":
            odd = [
                "/",
                "/v1",
                path + "/",
                path + "?a=1&a=2",
                "/page/../app.py",
                "/page/%2e%2e/app.py",
                "/%ff%00",
                "/" * 500,
            ]
            target = rng.choice([*odd, "/v1/models/../..", "/x" * 4000, "*", "http://example.invalid/v1/completions"])
        elif what == "type":
            headers["Content-Type"] = rng.choice(
                ["text/plain", "", "application/json; charset=utf-16", "a" * 5000, "/"]
            )
        elif what == "length":
            length = rng.choice(["-1", "abc", "0", str(len(raw) - 1), "99999999999", "1" * 400])
            headers["Content-Length"] = length
        elif what == "header":
            name = rng.choice(["Authorization", "X-Request-Id", "Content-Encoding", "Accept", "Origin", "X" * 300])
            headers[name] = rng.choice(["gzip", "Bearer x", "a" * 9000, "\u00e9", "*/*", "a\tb", "'\"<>"])
        elif what == "chunked":
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = rng.choice(["chunked", "gzip, chunked", "identity", "chunked, chunked"])
            raw = rng.choice([b"%x\r\n%s\r\n0\r\n\r\n" % (len(raw), raw), b"zz\r\n", b"5\r\nabc", b"fffffffff\r\nabc"])
        elif what == "expect":
            headers["Expect"] = rng.choice(["100-continue", "200-maybe"])
        else:
            version = rng.choice(["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/9", "FTP/1.1"])
    head = f"{method} {target} {version}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
    return head.encode("utf-8", "replace") + raw, target, kind


@dataclass
class Answer:
    """What came back: ``status`` 0 for nothing."""

    status: int
    body: bytes
    ended: str  # "closed", "reset", "slow"
    took_s: float


async def send(host: str, port: int, raw: bytes, patience_s: float) -> Answer:
    """Send bytes, half-close, and read to the end or until patience is over."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
    data, ended = b"", "closed"
    try:
        async with asyncio.timeout(patience_s):
            writer.write(raw)  # sent while the answer is read: a refusal may come before the end of a large body
            while part := await reader.read(1 << 16):
                data += part
    except TimeoutError:
        ended = "slow"
    except ConnectionError:
        ended = "reset"
    finally:
        writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    if status == 100:
        head, _, body = body.partition(b"\r\n\r\n")
        words = head.split(b" ", 2)
        status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    return Answer(status, body, ended, time.monotonic() - began)


def judge(answer: Answer, target: str, kind: str, size: int) -> str | None:
    """What is wrong with the answer to a request of ``size`` bytes, None if nothing is."""
    if answer.status >= 500 and not (answer.status in (501, 505) and kind.startswith("http")):
        return f"status {answer.status}: {answer.body[:300]!r}"
    if answer.status == 0:
        # A request that promises a body that never comes gets its 408 later than we wait.
        if answer.ended == "slow":
            return None if kind in ("http length", "http chunked", "http expect") else "no answer in time"
        # A server that refuses a body beyond its limit hangs up on what is still on its way, which may eat the 413.
        too_large = size > BODY_LIMIT and answer.ended == "reset"
        return None if kind.startswith("http") or too_large else f"connection {answer.ended} without an answer"
    if answer.status >= 400 and any(target.startswith(path) for path, _ in SEEDS) and kind in ("json", "bytes"):
        text = answer.body
        try:
            error = json.loads(text[text.index(b"{") : text.rindex(b"}") + 1])["error"]
            if not isinstance(error["message"], str) or set(error) < {"message", "type", "param", "code"}:
                return f"an error of another shape: {text[:300]!r}"
        except (ValueError, KeyError, TypeError):
            return f"an error of another shape: {text[:300]!r}"
    if b"internal_error" in answer.body or b"Traceback" in answer.body:
        return f"a fault inside the server: {answer.body[:300]!r}"
    return None


async def fuzz(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """All requests, `args.concurrency` at a time, and the client that must not notice."""
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 0
    numbers = iter([args.only] if args.only is not None else range(args.requests))
    statuses: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    problems: list[str] = []
    slow = 0
    canaries = 0
    health: list[float] = []
    stop = asyncio.Event()

    async def canary(session: aiohttp.ClientSession) -> str:
        async with session.post(f"{url}/v1/completions", json=CANARY) as response:
            return (
                str((await response.json())["choices"][0]["text"]) if response.status == 200 else await response.text()
            )

    async def canary_loop(session: aiohttp.ClientSession, expected: str) -> None:
        nonlocal canaries
        while not stop.is_set():
            got = await canary(session)
            canaries += 1
            if got != expected:
                problems.append(f"another client's answer changed: {got[:200]!r} is not {expected[:200]!r}")
            await asyncio.sleep(0.05)

    async def probe_loop(session: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            asked = time.monotonic()
            async with session.get(f"{url}/health") as response:
                await response.read()
            took = time.monotonic() - asked
            health.append(took)
            if response.status != 200 or took > args.health_limit:
                problems.append(f"/health answered {response.status} after {took:.2f} s")
            await asyncio.sleep(0.05)

    async def worker() -> None:
        nonlocal slow
        for number in numbers:
            raw, target, kind = make_request(args.seed, number, f"{host}:{port}")
            answer = await send(host, port, raw, args.patience)
            statuses[str(answer.status) if answer.status else f"none ({answer.ended})"] += 1
            kinds[kind] += 1
            slow += answer.ended == "slow"
            wrong = judge(answer, target, kind, len(raw))
            if wrong or args.only is not None:
                print(f"request {number} ({kind}): {wrong or answer}\n  {raw[:600]!r}", flush=True)
            if wrong:
                problems.append(f"request {number}: {wrong}")

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        expected = await canary(session)
        watcher: Callable[[], Any] = lambda: canary_loop(session, expected)  # noqa: E731
        tasks = [asyncio.create_task(watcher()), asyncio.create_task(probe_loop(session))]
        await asyncio.gather(*(worker() for _ in range(args.concurrency)))
        stop.set()
        await asyncio.gather(*tasks)
        if await canary(session) != expected:
            problems.append("the fixed question has another answer afterwards")
    return {
        "statuses": dict(sorted(statuses.items())),
        "mutations": dict(sorted(kinds.items())),
        "dropped_after_patience": slow,
        "fixed_questions_answered": canaries,
        "health_answers": len(health),
        "health_worst_s": max(health),
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="send this one request and show the answer")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds before an answer is dropped")
    parser.add_argument("--health-limit", type=float, default=1.0, help="seconds that /health may take meanwhile")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cpu-threads", type=int, help="per rank (default: the engine's choice)")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    threads = ["--cpu-threads", str(args.cpu_threads)] if args.cpu_threads else []
    with serving(args.model, "--tp", str(args.tp), *threads, "--body-timeout", "4") as server:
        began = time.monotonic()
        results = asyncio.run(fuzz(server.url, args))
        results["seconds"] = time.monotonic() - began
        state = server.wait_idle()
        left = {name: state[name] for name in ("running", "waiting", "open_requests")}
        left |= {"kv_usage": state["kv"]["usage"], "admitted": server.metric("yalis:admitted_sequences")}
        health, ready = server.get("/health")[0], server.get("/ready")[0]
        ended = server.process.poll()
        log = server.log.read_text(errors="replace")
    problems: list[str] = results["problems"]
    if any(left.values()):
        problems.append(f"left behind: {left}")
    if (health, ready, ended) != (200, 200, None):
        problems.append(f"/health {health}, /ready {ready}, exit code {ended} afterwards")
    if "Traceback" in log:
        at = log.index("Traceback")
        problems.append(f"the server's log holds a traceback:\n{log[at : at + 3000]}")
    results |= {"left_behind": left, "health": health, "ready": ready}
    for name, value in results.items():
        if name != "problems":
            print(f"{name}: {value}")
    for problem in problems[:20]:
        print(f"problem: {problem}")
    if args.output_json:
        config = {k: v for k, v in vars(args).items() if k != "output_json"}
        record = {"kind": "serve_fuzz", "config": config, "results": results, "machine": machine_record()}
        args.output_json.write_text(json.dumps(record, indent=1) + "\n")
    print("fuzz: ok" if not problems else f"fuzz: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
