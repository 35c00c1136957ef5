"""Many streaming clients with random disconnects on one server: nothing leaks, and every answer is the offline one.

    python bench/serve_soak.py [--clients 200] [--seconds 300] [--tp 1] [--output-json FILE]

Each client asks over and over, for completions of text, of token ids, and for chat, sampled with a seed, until the
time is over. A share of the requests is cut off by the client: at once, or after some tokens. What must hold:

- every answer that was read to its end has exactly the tokens and the text that `yalis.LLM` gives for the same prompt
  and seed, and every answer that was cut off is the beginning of it;
- no request fails;
- afterwards nothing runs, waits or holds a KV block, and the API process has as many descriptors as before;
- memory of the server's processes stays flat: the mean of the last fifth of the time is at most 5 percent plus 8 MiB
  above that of the second fifth (checked from 60 s on);
- at the end comes SIGTERM amid all clients, none of which leaves: every request that was sent before is answered to its
  end, rightly; later ones get 503 or, in the end, nobody; the process ends with 0.

Exit code 1 if one of these does not hold. Load goes to 127.0.0.1 only and ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from serve_process import ServerProcess, serving

from yalis.bench.harness import percentile, summarize
from yalis.bench.sse import SSEParser
from yalis.utils.machine import machine_record

TEXTS = [
    "This program is free software",
    "The licenses for most software",
    "You may copy and distribute",
    "THERE IS NO WARRANTY",
    "If you modify this file,",
    "Each contributor hereby grants",
    "A work based on the Program",
    "Permission is hereby granted",
]
SHAPES = ("text", "tokens", "chat")
MEMORY_CHECK_S = 60.0
# Seconds of load before SIGTERM comes, of the longest drain, and until a client that was refused asks again.
LEAD_S, DRAIN_S, AGAIN_S = 2.0, 120.0, 0.1


@dataclass(frozen=True)
class Task:
    """One question and its answer offline."""

    path: str
    body: dict[str, Any]
    token_ids: list[int]
    text: str


@dataclass
class Tally:
    """What the clients saw."""

    complete: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    longest_s: float = 0.0


def make_tasks(model: str, count: int, seed: int, tp: int) -> list[Task]:
    """Questions of every shape with their offline answers, from an engine with as many ranks (sums split alike)."""
    from yalis import LLM, SamplingParams

    rng = random.Random(seed)
    drawn = []
    for i in range(count):
        shape = SHAPES[i % len(SHAPES)]
        text = rng.choice(TEXTS) + rng.choice(["", " and", " that", ", or", " to"])
        sampling = {
            "seed": rng.randrange(2**31),
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "top_p": rng.choice([1.0, 0.9]),
            "top_k": rng.choice([-1, 20]),
        }
        drawn.append((shape, text, sampling, rng.choice([8, 32, 64, 128])))
    tasks = []
    with LLM(model, max_num_seqs=64, tensor_parallel_size=tp, cpu_threads=1) as llm:
        assert llm.tokenizer is not None
        prompts: list[Any] = []
        for shape, text, _, _ in drawn:
            messages = [{"role": "user", "content": text}]
            if shape == "chat":
                rendered = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
                prompts.append(llm.tokenizer.encode(rendered, add_special_tokens=False))
            else:
                prompts.append(llm.tokenizer.encode(text))
        params = [SamplingParams(max_tokens=most, **sampling) for _, _, sampling, most in drawn]
        outputs = llm.generate(prompts, params)
    for (shape, text, sampling, most), prompt, output in zip(drawn, prompts, outputs, strict=True):
        common = {**sampling, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        if shape == "chat":
            path = "/v1/chat/completions"
            body = {**common, "messages": [{"role": "user", "content": text}], "max_completion_tokens": most}
        else:
            path, body = (
                "/v1/completions",
                {**common, "prompt": text if shape == "text" else prompt, "max_tokens": most},
            )
        [sample] = output.outputs
        tasks.append(Task(path, body, list(sample.token_ids), sample.text))
    return tasks


async def client(
    session: aiohttp.ClientSession,
    url: str,
    tasks: list[Task],
    rng: random.Random,
    share: float,
    until: float,
    t: Tally,
) -> None:
    """One user: asks, reads or leaves, asks again."""
    await asyncio.sleep(rng.random())
    while time.monotonic() < until:
        task = rng.choice(tasks)
        leave_after = None
        if rng.random() < share:
            leave_after = rng.choice([0, 1, 2, rng.randrange(1, 1 + len(task.token_ids))])
        try:
            began = time.monotonic()
            await one(session, url, task, leave_after, t)
            t.longest_s = max(t.longest_s, time.monotonic() - began)
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError) as error:
            t.failed[f"{type(error).__name__}: {error}"[:160]] += 1
            await asyncio.sleep(0.5)


async def one(session: aiohttp.ClientSession, url: str, task: Task, leave_after: int | None, t: Tally) -> None:
    """One request; ``leave_after`` so many token events the connection is dropped, 0 before the answer begins."""
    began = time.perf_counter()
    if leave_after == 0:
        try:  # the request is sent; whoever reads its answer is gone some milliseconds later
            await session.post(url + task.path, json=task.body, timeout=aiohttp.ClientTimeout(total=0.003))
        except TimeoutError:
            t.cut["before the first token"] += 1
            return
    async with session.post(url + task.path, json=task.body) as response:
        if response.status != 200:
            t.failed[f"{response.status}: {(await response.text())[:120]}"] += 1
            return
        parser, ids, words, events, usage, done = SSEParser(), [], [], 0, None, False
        async for chunk in response.content.iter_any():
            for event in parser.feed(chunk):
                if event == "[DONE]":
                    done = True
                    continue
                data = json.loads(event)
                if data.get("error"):
                    t.failed[f"event: {data['error']}"[:160]] += 1
                    return
                usage = data.get("usage") or usage
                for choice in data["choices"]:
                    events += 1
                    if events == 1:
                        t.ttft_s.append(time.perf_counter() - began)
                    ids += choice.get("token_ids") or []
                    words.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
            if leave_after is not None and events >= leave_after:
                assert response.connection is not None or done
                if response.connection is not None and response.connection.transport is not None:
                    response.connection.transport.abort()
                t.cut["after some tokens"] += 1
                t.tokens += events
                check(task, ids, "".join(words), whole=False, t=t)
                return
        if not done:
            t.failed["stream ended without [DONE]"] += 1
            return
        t.complete += 1
        t.tokens += len(ids)
        check(task, ids, "".join(words), whole=True, t=t)
        if usage is None or usage["completion_tokens"] != len(task.token_ids):
            t.wrong.append(f"usage {usage} for {len(task.token_ids)} tokens")


def check(task: Task, ids: list[int], text: str, *, whole: bool, t: Tally) -> None:
    """Compare with the offline answer: equal, or its beginning."""
    same_ids = ids == (task.token_ids if whole else task.token_ids[: len(ids)])
    same_text = text == task.text if whole else task.text.startswith(text)
    if not (same_ids and same_text):
        t.wrong.append(f"{task.body}: {ids} {text!r} is not {task.token_ids} {task.text!r}")


async def watch(server: ServerProcess, until: float, every_s: float, out: list[dict[str, float]]) -> None:
    """Sample resources and state of the server."""
    began = time.monotonic()
    while time.monotonic() < until:
        state = await asyncio.to_thread(server.state)
        sample = await asyncio.to_thread(server.resources)
        out.append(
            {
                "at_s": round(time.monotonic() - began, 1),
                **{k: round(v, 2) for k, v in sample.items()},
                "running": state["running"],
                "waiting": state["waiting"],
                "kv_usage": round(state["kv"]["usage"], 4),
                "tokens_per_s": round(state["tokens_per_s"]["generation"], 1),
            }
        )
        await asyncio.sleep(every_s)


async def soak(
    server: ServerProcess, tasks: list[Task], args: argparse.Namespace
) -> tuple[Tally, list[dict[str, float]]]:
    """The load itself."""
    tally, samples = Tally(), list[dict[str, float]]()
    until = time.monotonic() + args.seconds
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120)
    ) as session:
        users = [
            client(session, server.url, tasks, random.Random(f"{args.seed}/{i}"), args.disconnects, until, tally)
            for i in range(args.clients)
        ]
        await asyncio.gather(watch(server, until, max(0.5, args.seconds / 150), samples), *users)
    return tally, samples


async def drain(server: ServerProcess, tasks: list[Task], clients: int, seed: int) -> tuple[Tally, dict[str, Any]]:
    """SIGTERM amid ``clients`` that ask and read on until nobody answers; what they saw, and what became of it."""
    tally, gone, refused, signalled = Tally(), 0, 0, float("inf")

    async def user(rng: random.Random) -> None:
        nonlocal gone, refused
        while True:
            began, before = time.monotonic(), sum(tally.failed.values())
            try:
                await one(session, server.url, rng.choice(tasks), None, tally)
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                if began > signalled and not isinstance(error, aiohttp.ClientPayloadError):
                    gone += 1
                else:
                    tally.failed[f"{type(error).__name__}: {error}"[:160]] += 1
                return
            if sum(tally.failed.values()) > before:
                await asyncio.sleep(AGAIN_S)

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=DRAIN_S)
    ) as session:
        users = [asyncio.create_task(user(random.Random(f"{seed}/drain/{i}"))) for i in range(clients)]
        await asyncio.sleep(LEAD_S)
        complete = tally.complete
        server.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        try:
            code = await asyncio.to_thread(server.process.wait, DRAIN_S + 10)
        except subprocess.TimeoutExpired:
            code = None
        took = time.monotonic() - signalled
        _, left = await asyncio.wait(users, timeout=10)
        for task in left:
            task.cancel()
    for what in [what for what in tally.failed if what.startswith("503") and "shutting down" in what]:
        refused += tally.failed.pop(what)
    return tally, {
        "exit_code": code,
        "seconds": took,
        "answers_finished_before": complete,
        "answers_finished_after": tally.complete - complete,
        "refused_with_503": refused,
        "found_nobody": gone,
        "clients_that_hang": len(left),
        "wrong_answers": len(tally.wrong),
        "failed": dict(tally.failed),
    }


def drain_problems(tally: Tally, seen: dict[str, Any]) -> list[str]:
    """What the server did not keep."""
    problems = [f"after SIGTERM, {n} x failed: {what}" for what, n in tally.failed.items()]
    problems += [f"after SIGTERM, wrong answer: {text[:600]}" for text in tally.wrong[:3]]
    if seen["exit_code"] != 0:
        problems.append(f"SIGTERM: exit code {seen['exit_code']} after {seen['seconds']:.1f} s, expected 0")
    if seen["clients_that_hang"]:
        problems.append(f"SIGTERM: {seen['clients_that_hang']} clients still wait")
    if not seen["answers_finished_after"] or not seen["refused_with_503"]:
        problems.append("SIGTERM: no answer was under way, or no new request came: nothing was tested")
    return problems


def memory_growth(samples: list[dict[str, float]]) -> tuple[float, float]:
    """Mean MiB in the second fifth of the time, and in the last one."""
    values, fifth = [s["uss_mib"] for s in samples], len(samples) // 5
    return statistics.fmean(values[fifth : 2 * fifth]), statistics.fmean(values[-fifth:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--disconnects", type=float, default=0.3, help="share of requests that are cut off")
    parser.add_argument("--tasks", type=int, default=120, help="different questions")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cpu-threads", type=int, help="per rank (default: the engine's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    tasks = make_tasks(args.model, args.tasks, args.seed, args.tp)
    threads = ["--cpu-threads", str(args.cpu_threads)] if args.cpu_threads else []
    with serving(args.model, "--tp", str(args.tp), "--drain-timeout", str(DRAIN_S), *threads) as server:
        server.wait_idle()
        # A first round opens what stays open: pools, threads, caches.
        asyncio.run(soak(server, tasks, argparse.Namespace(**vars(args) | {"clients": 4, "seconds": 1.0})))
        server.wait_idle()
        time.sleep(1.0)
        before = server.api_resources()
        began = time.monotonic()
        tally, samples = asyncio.run(soak(server, tasks, args))
        took = time.monotonic() - began
        state = server.wait_idle()
        admitted = server.metric("yalis:admitted_sequences")
        time.sleep(1.0)
        after = server.api_resources()
        health = server.get("/health")[0]
        drain_tally, drained = asyncio.run(drain(server, tasks, args.clients, args.seed))
    problems = [f"{n} x failed: {what}" for what, n in tally.failed.items()]
    problems += [f"wrong answer: {text[:600]}" for text in tally.wrong[:3]]
    left = {name: state[name] for name in ("running", "waiting", "open_requests")} | {
        "kv_usage": state["kv"]["usage"],
        "admitted": admitted,
    }
    if any(left.values()):
        problems.append(f"left behind: {left}")
    if health != 200:
        problems.append(f"/health says {health} afterwards")
    if after["descriptors"] > before["descriptors"] + 2:
        problems.append(
            f"descriptors of the API process: {before['descriptors']:.0f} before, {after['descriptors']:.0f}"
        )
    if not tally.complete or (args.disconnects and not tally.cut):
        problems.append("no request was read to its end, or none was cut off: nothing was tested")
    early = late = None
    if args.seconds >= MEMORY_CHECK_S:
        early, late = memory_growth(samples)
        if late > 1.05 * early + 8:
            problems.append(f"memory grew from {early:.1f} to {late:.1f} MiB")
    problems += drain_problems(drain_tally, drained)
    results = {
        "seconds": took,
        "complete_answers": tally.complete,
        "cut_off": dict(tally.cut),
        "wrong_answers": len(tally.wrong),
        "failed": dict(tally.failed),
        "token_events_read": tally.tokens,
        "tokens_per_s": tally.tokens / took,
        "ttft_s": summarize(tally.ttft_s) if tally.ttft_s else None,
        "longest_request_s": tally.longest_s,
        "left_behind": left,
        "memory_mib_second_fifth": early,
        "memory_mib_last_fifth": late,
        "descriptors_before_after": [before["descriptors"], after["descriptors"]],
        "api_memory_mib_before_after": [before["uss_mib"], after["uss_mib"]],
        "most_running": max((s["running"] for s in samples), default=0),
        "most_waiting": max((s["waiting"] for s in samples), default=0),
        "most_kv_usage": max((s["kv_usage"] for s in samples), default=0),
        "sigterm": drained,
        "problems": problems,
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    if args.output_json:
        config = {k: v for k, v in vars(args).items() if k != "output_json"}
        record = {"kind": "serve_soak", "config": config, "results": results, "samples": samples}
        record["machine"] = machine_record()
        args.output_json.write_text(json.dumps(record, indent=1) + "\n")
    if tally.ttft_s:
        print(
            f"TTFT p50 {1e3 * percentile(tally.ttft_s, 0.5):.1f} ms, p99 {1e3 * percentile(tally.ttft_s, 0.99):.1f} ms"
        )
    print("soak: ok" if not problems else f"soak: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
