"""`yalis bench serve` against a real server that streams at known times."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.sse_server import FIRST_S, SSEServer, sse_server
from yalis.bench.datasets import Sample
from yalis.bench.openai_client import RequestResult, Target
from yalis.bench.serve import Run, run_load
from yalis.bench.serve_metrics import failures, per_second, summarize_run
from yalis.cli.main import main

LATE_S = 0.5  # how late a read may be on a busy machine


@pytest.fixture(scope="module")
def server() -> Iterator[SSEServer]:
    with sse_server() as started:
        yield started


def load(server: SSEServer, model: str, count: int = 1, *, tokens: int = 4, chat: bool = False, **options: Any) -> Run:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    target = Target(server.url + path, chat, model, timeout_s=options.pop("timeout_s", 20.0), request_id_prefix=model)
    prompt: Any = [{"role": "user", "content": "hi"}] if chat else [5, 6, 7]
    samples = [Sample(prompt, None if chat else 3, tokens)] * count
    return asyncio.run(run_load(target, samples, options.pop("arrivals", [0.0] * count), **options))


@pytest.mark.parametrize(("model", "chat"), [("timed", False), ("cut", False), ("timed", True)])
def test_times_are_those_of_the_server(server: SSEServer, model: str, chat: bool) -> None:
    server.writes.clear()
    [result] = load(server, model, tokens=5, chat=chat).results
    assert (result.success, result.output_len, result.counted, result.prompt_len) == (True, 5, "usage", 7)
    assert result.text == ("é" if model == "cut" else "x") * 5
    [writes] = server.writes.values()
    reads, at = [], result.start_s + result.ttft_s
    for gap in (0.0, *result.itl_s):
        at += gap
        reads.append(at)
    assert len(reads) == 5
    # Neither before the server wrote it, nor (by much) after: a role alone is no token.
    assert all(0 <= read - write < LATE_S for read, write in zip(reads, writes, strict=True))
    assert result.ttft_s >= FIRST_S and all(gap > 0 for gap in result.itl_s)
    assert result.latency_s == pytest.approx(result.ttft_s + sum(result.itl_s))


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("busy", "http_429", "the queue is full"),
        ("hang", "timeout", "no end after"),
        ("reset", "disconnected", ""),
        ("disconnected", "disconnected", ""),
        ("no-token", "no_token", "without a token"),
        ("malformed", "malformed", "{no json"),
        ("error-event", "error_event", "rank 1 was lost"),
        ("truncated", "truncated", "after 2 tokens"),
    ],
)
def test_failures_are_results(server: SSEServer, model: str, kind: str, words: str) -> None:
    [result] = load(server, model, timeout_s=0.6).results
    assert (result.success, result.kind) == (False, kind)
    assert words in result.error and result.error


def test_nobody_listens() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        [result] = load(SSEServer(f"http://127.0.0.1:{s.getsockname()[1]}"), "timed").results
    assert result.kind == "connect"


def test_concurrency_and_time_in_the_clients_queue(server: SSEServer) -> None:
    server.most_running = 0
    done: list[int] = []
    results = load(server, "timed", 5, tokens=1, max_concurrency=2, progress=done.append).results
    assert server.most_running == 2
    assert done == [1] * 5
    waits = sorted(r.queue_s for r in results)
    assert waits[1] < FIRST_S <= waits[2] < waits[4]
    assert waits[4] >= 2 * FIRST_S
    for r in results:  # the wait is in no other time
        assert FIRST_S <= r.ttft_s < FIRST_S + LATE_S


def test_arrivals_are_kept(server: SSEServer) -> None:
    run = load(server, "timed", 3, tokens=1, arrivals=[0.0, 0.15, 0.3])
    starts = [r.start_s for r in run.results]
    assert starts[1] - starts[0] == pytest.approx(0.15, abs=LATE_S)
    assert starts[2] - starts[0] >= 0.15
    assert run.duration_s >= 0.3 + FIRST_S
    assert run.max_arrival_lag_s < LATE_S


def test_arithmetic() -> None:
    def result(start: float, ttft: float, gaps: list[float], **kw: Any) -> RequestResult:
        return RequestResult(start, 0.5, ttft, ttft + sum(gaps), gaps, 10, len(gaps) + 1, **kw)

    results = [
        result(100.0, 0.1, [0.02, 0.04]),
        result(100.5, 0.3, [0.06, 0.06, 1.2]),
        result(101.0, 0.2, []),
        RequestResult(101.0, kind="http_429", error="busy", prompt_len=10),
        RequestResult(101.0, kind="http_429", error="again", prompt_len=10),
    ]
    got = summarize_run(
        results, 4.0, metrics=list(METRIC_NAMES), percentiles=[50, 99.9], goodput={"ttft": 250, "tpot": 50}
    )
    assert (got["completed"], got["failed"]) == (3, 2)
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (30, 8)
    assert (got["request_throughput"], got["output_throughput"], got["total_token_throughput"]) == (0.75, 2.0, 9.5)
    assert got["request_goodput"] == 0.5  # the first, and the third: a single token has no TPOT to miss
    assert got["mean_ttft_ms"] == pytest.approx(200) and got["median_ttft_ms"] == pytest.approx(200)
    assert got["std_ttft_ms"] == pytest.approx(1e3 * math.sqrt(0.02 / 3))
    assert got["mean_tpot_ms"] == pytest.approx((30 + 440) / 2)
    assert got["median_itl_ms"] == got["p50_itl_ms"] == pytest.approx(60)
    assert got["p99.9_itl_ms"] == pytest.approx(1200 - 0.004 * (1200 - 60), rel=1e-3)
    assert got["mean_e2el_ms"] == pytest.approx((160 + 1620 + 200) / 3)
    assert got["mean_client_queue_time_ms"] == pytest.approx(500)
    assert got["mean_e2el_including_client_queue_ms"] == pytest.approx(got["mean_e2el_ms"] + 500)
    assert got["output_lens"] == [3, 4, 1, 0, 0] and got["errors"][3:] == ["busy", "again"]
    assert per_second(results) == ([6, 1, 1], [2, 2, 1])
    assert (got["max_output_tokens_per_s"], got["max_concurrent_requests"]) == (6.0, 2)
    assert failures(results) == {"http_429": {"count": 2, "first": "busy"}}


def test_nothing_succeeded() -> None:
    got = summarize_run([RequestResult(kind="x")], 1.0, metrics=["ttft"], percentiles=[99], goodput={})
    assert got["mean_ttft_ms"] is got["p99_ttft_ms"] is got["request_goodput"] is None
    assert (got["completed"], got["max_concurrent_requests"]) == (0, 0)


METRIC_NAMES = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
# Keys of a result of `vllm bench serve --save-result --save-detailed` (0.32) for generation.
VLLM_KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate"),
    *("burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens"),
    *("total_output_tokens", "request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "generated_texts"),
    *("errors", "max_output_tokens_per_s", "max_concurrent_requests", "rtfx"),
    *(f"{stat}_{m}_ms" for m in METRIC_NAMES for stat in ("mean", "median", "std", "p50", "p99")),
}


def bench(server: SSEServer, *options: str) -> int:
    return main(["bench", "serve", "--base-url", server.url, "--vocab-size", "50", "--num-prompts", "4", *options])


def test_command(
    server: SSEServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-test")
    server.requests.clear(), server.headers.clear(), server.posts.clear()
    options = ["--random-input-len", "9", "--random-output-len", "3", "--random-range-ratio", "0"]
    options += ["--request-rate", "50", "--burstiness", "2", "--max-concurrency", "3", "--num-warmups", "2"]
    options += ["--seed", "3", "--profile", "--temperature", "0", "--top-p", "0.9", "--top-k", "5", "--min-p", "0.1"]
    options += ["--extra-body", '{"seed": 4}', "--header", "x-test=yes", "--request-id-prefix", "t-"]
    options += ["--percentile-metrics", ",".join(METRIC_NAMES), "--metric-percentiles", "50,99"]
    options += ["--goodput", "ttft:5000", "tpot:5000", "--metadata", "note=one", "--label", "try", "--disable-tqdm"]
    options += [
        "--save-result",
        "--save-detailed",
        "--result-dir",
        str(tmp_path / "out"),
        "--result-filename",
        "r.json",
    ]
    options += ["--plot", str(tmp_path / "p.png"), "--random-prefix-len", "2", "--ready-check-timeout-sec", "10"]
    assert bench(server, *options) == 0
    out, err = capsys.readouterr()
    assert "successful requests" in out and "Time to first token" in out and "goodput" in out
    assert "secret-of-the-test" not in out + err
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((tmp_path / "out" / "r.json").read_text())
    assert set(result) == VLLM_KEYS | {"note", "yalis"}
    assert (result["model_id"], result["request_rate"], result["label"]) == ("timed", 50.0, "try")
    assert (result["completed"], result["total_output_tokens"]) == (4, 12)
    assert 0 < result["request_goodput"] == pytest.approx(4 / result["duration"])
    assert result["yalis"]["failures"] == {}
    assert result["yalis"]["body"]["ignore_eos"] is True and "prompt" not in result["yalis"]["body"]
    assert server.posts == ["/start_profile", "/stop_profile"]
    assert len(server.requests) == 1 + 2 + 4  # the test request, warm-ups, and those that count
    for body in server.requests:
        assert len(body["prompt"]) == 11 and body["max_tokens"] == 3
        assert [body[k] for k in ("temperature", "top_p", "top_k", "min_p", "seed")] == [0, 0.9, 5, 0.1, 4]
        assert body["stream_options"] == {"include_usage": True} and body["ignore_eos"] is True
    probe, first = server.requests[0]["prompt"], server.requests[3]["prompt"]
    assert probe != first  # what comes before must not fill the prefix cache for what counts
    assert all(h["authorization"] == "Bearer secret-of-the-test" and h["x-test"] == "yes" for h in server.headers)
    assert server.headers[-1]["x-request-id"].startswith("t-")


def test_chat_from_a_file_at_its_own_times(
    server: SSEServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"say {i}", "timestamp": 0.1 * i, "output_tokens": 2} for i in range(4)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--backend", "openai-chat", "--dataset-name", "jsonl", "--dataset-path", "p.jsonl", "--model", "M"]
    server.requests.clear()
    assert bench(server, *options, "--served-model-name", "timed", "--save-result", "--ignore-eos") == 0
    [file] = tmp_path.glob("openai-chat-infqps-timed-*.json")
    result = json.loads(file.read_text())
    assert result["duration"] >= 0.3
    assert "the data set's own times" in result["yalis"]["arrivals"]
    assert "itls" not in result and "latencies" in result  # as vLLM's without --save-detailed
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "say 3"}]
    assert server.requests[-1]["max_completion_tokens"] == 2
    capsys.readouterr()
    ramp = ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "50", "--ramp-up-end-rps", "90")
    assert bench(server, *options, "--served-model-name", "bundled", *ramp, "--max-concurrency", "4") == 0
    out = capsys.readouterr().out
    assert "several tokens in one event" in out
    assert "the data set's times are not used" in out and "linear ramp from 50 to 90" in out
    assert bench(server, *options, "--served-model-name", "timed", "--no-self-timed") == 0
    assert "all at once" in capsys.readouterr().out


def test_burstgpt_command(server: SSEServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{10 * i},{'GPT-4' if i % 2 else 'ChatGPT'},{5 + i},2,{7 + i},API log" for i in range(9)]
    file = tmp_path / "b.csv"
    file.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "\n".join(rows))
    options = ["--dataset-name", "burstgpt", "--dataset-path", str(file), "--burstgpt-time-scale", "200"]
    options += ["--burstgpt-models", "GPT-4", "--burstgpt-max-len", "100", "--backend", "yalis"]
    server.requests.clear()
    started = time.perf_counter()
    assert bench(server, *options, "--self-timed", "--endpoint", "v1/completions") == 0
    assert time.perf_counter() - started >= 0.3
    assert sorted(len(b["prompt"]) for b in server.requests[1:]) == [6, 8, 10, 12]
    assert "trace's clock 200 times as fast" in capsys.readouterr().out


def test_failed_load_is_told(server: SSEServer, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "busy", "--input-len", "3", "--output-len", "2", "--ready-check-timeout-sec", "0")
    assert bench(server, *options) == 1
    assert "failed: 4 x http_429: the queue is full" in capsys.readouterr().out
    assert bench(server, *options[:-1], "0.1") == 1
    assert "gave no answer within 0.1 s: http_429" in capsys.readouterr().err


def test_profiling_that_fails(server: SSEServer, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "timed", "--input-len", "3", "--output-len", "2", "--profile")
    try:
        server.refused = "/stop_profile"  # what was measured is kept
        assert bench(server, *options) == 0
        out, err = capsys.readouterr()
        assert "successful requests" in out and "warning" in err and "/stop_profile: 500" in err
        server.refused = "/start_profile"
        assert bench(server, *options) == 1
        assert "/start_profile: 500" in capsys.readouterr().err
    finally:
        server.refused = ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num-prompts", "0"), "--num-prompts 0"),
        (("--max-concurrency", "0"), "--max-concurrency 0"),
        (("--request-timeout", "inf"), "--request-timeout inf"),
        (("--ready-check-timeout-sec", "nan"), "--ready-check-timeout-sec nan"),
        (("--base-url", "ftp://x"), "--base-url ftp://x"),
        (("--endpoint", "/v1/chat/completions"), "does not fit"),
        (("--percentile-metrics", "speed"), "speed"),
        (("--metric-percentiles", "101"), "0 to 100"),
        (("--metric-percentiles", ","), "names nothing"),
        (("--goodput", "itl:3"), "--goodput itl:3"),
        (("--goodput", "ttft:x"), "ttft:300"),
        (("--metadata", "a"), "KEY=VALUE"),
        (("--extra-body", "[]"), "must be an object"),
        (("--extra-body", "{"), "no JSON"),
        (("--dataset-name", "burstgpt"), "--dataset-path"),
        (("--ramp-up-strategy", "linear"), "--ramp-up-start-rps"),
        (("--ramp-up-end-rps", "3"), "--ramp-up-strategy"),
        (("--self-timed", "--request-rate", "3"), "leave out the rate"),
        (("--self-timed", "--model", "m"), "no times"),
        (("--random-range-ratio", "1", "--model", "m"), "[0, 1)"),
        (("--input-len", "0", "--model", "m"), "input-len 0"),
        (("--model", "m", "--vocab-size", "0"), "--vocab-size 0"),
        (("--tokenizer", "/none", "--model", "m"), ""),
    ],
)
def test_wrong_options(options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = () if "--tokenizer" in options else ("--vocab-size", "5")
    assert main(["bench", "serve", "--port", "1", *size, *options]) == 1
    assert words in capsys.readouterr().err


def test_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
        assert main(["bench", "serve", "--host", "127.0.0.1", "--port", port, "--ready-check-timeout-sec", "0.1"]) == 1
    assert "name --model" in capsys.readouterr().err


@pytest.mark.parametrize("model", [(), ("--model", "m")], ids=["name-unknown", "name-given"])
def test_a_silent_server_is_given_up_in_time(model: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """It takes connections and never answers: not the request's limit counts then, but the ready check's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = ["--port", str(listener.getsockname()[1]), "--vocab-size", "5", "--request-timeout", "50"]
        started = time.monotonic()
        assert main(["bench", "serve", *options, *model, "--ready-check-timeout-sec", "0.4"]) == 1
        assert time.monotonic() - started < 10
    words = "gave no answer within 0.4 s" if model else "name --model"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("further", "shown"), [((), True), (("--disable-tqdm",), False)])
def test_progress_on_a_terminal(server: SSEServer, further: tuple[str, ...], shown: bool) -> None:
    """The bar counts the requests that ended; it goes to stderr, and the table alone to stdout."""
    options = ["--base-url", server.url, "--model", "timed", "--vocab-size", "50", "--input-len", "3"]
    options += ["--output-len", "2", "--num-prompts", "4", "--max-concurrency", "1", *further]
    master, terminal = os.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "yalis", "bench", "serve", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=terminal,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "24"},
        )
        os.close(terminal)
        seen: list[bytes] = []
        reader = threading.Thread(target=lambda: seen.extend(iter(lambda: _read(master), b"")))
        reader.start()
        out, _ = process.communicate(timeout=60)
        reader.join(10)
    finally:
        os.close(master)
    text = b"".join(seen).decode()
    assert process.returncode == 0, text
    counts = [int(count) for count in re.findall(r"requests.*?(\d+)/4", text)]
    assert (counts == sorted(counts) and counts[-1:] == [4]) if shown else counts == [], text
    assert "successful requests" in out.decode() and "/4" not in out.decode()


def _read(master: int) -> bytes:
    """What the other end of a pseudo-terminal wrote; empty once it is closed."""
    try:
        return os.read(master, 4096)
    except OSError:
        return b""
