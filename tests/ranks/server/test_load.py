"""A full queue, clients that leave, and the end of the server under load."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.server import Answer, Server, events, wait_for

LONG: dict[str, Any] = {"prompt": "This program", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
SHORT: dict[str, Any] = {"prompt": "This program", "max_tokens": 1}


@pytest.fixture(scope="module")
def small() -> Any:
    """A server that runs two sequences and lets two wait."""
    with Server("--max-num-seqs", "2", "--max-queued-requests", "2", "--max-num-batched-tokens", "64") as server:
        yield server.ready()


def idle(server: Server) -> bool:
    state = server.state()
    return bool(state["open_requests"] == state["running"] == state["waiting"] == 0 and state["kv"]["usage"] == 0)


def test_full_queue_is_told_with_a_time_to_retry(small: Server) -> None:
    with small.stream({**LONG, "n": 4}) as response:
        assert response.status == 200
        answer = small.post("/v1/completions", SHORT)
        assert answer.status == 429, answer.body
        assert answer.error["type"] == "rate_limit_error" and answer.error["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        state = small.state()
        assert state["open_requests"] == 4
        # Not even this stops the probes.
        assert small.get("/health").status == small.get("/ready").status == 200
    wait_for(lambda: idle(small), 5.0, "the engine to be idle")
    assert small.post("/v1/completions", SHORT).status == 200


def test_waiting_is_seen(small: Server) -> None:
    with small.stream({**LONG, "n": 4}):
        state = wait_for(lambda: (s := small.state())["waiting"] == 2 and s, 5.0, "two that wait")
        assert state["running"] == 2 and state["kv"]["usage"] > 0
        assert small.metric("vllm:num_requests_running") == 2
        assert small.metric("vllm:num_requests_waiting") == 2
        wait_for(lambda: small.state()["tokens_per_s"]["generation"] > 10, 5.0, "a speed")
        wait_for(lambda: small.state()["step_ms"]["total"] > 0, 5.0, "a step's time")


@pytest.mark.parametrize("streaming", [True, False])
def test_disconnect_frees_blocks(small: Server, streaming: bool) -> None:
    wait_for(lambda: idle(small), 5.0, "the engine to be idle")
    before = small.metric("vllm:request_success_total")
    if streaming:
        with small.stream(LONG) as response:
            next(events(response))
    else:
        with pytest.raises(TimeoutError):
            small.post("/v1/completions", LONG, timeout_s=0.3)
    wait_for(lambda: idle(small), 3.0, "the blocks to be free")
    assert small.metric("vllm:request_success_total") == before + 1  # as aborted


def test_disconnect_while_waiting(small: Server) -> None:
    with small.stream({**LONG, "n": 2}):
        with pytest.raises(TimeoutError):
            small.post("/v1/completions", LONG, timeout_s=0.3)
        wait_for(lambda: small.state()["open_requests"] == 2, 3.0, "the place in the queue to be free")


def test_sigterm_lets_requests_finish() -> None:
    with Server("--drain-timeout", "60") as server:
        server.ready()
        answers: list[Answer] = []
        body = LONG
        threads = [
            threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.state()["open_requests"] == 4, 5.0, "four requests")
        with server.stream(body) as response:
            tokens = events(response)
            next(tokens)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: server.state()["status"] == "draining", 2.0, "the drain")
            refused = server.post("/v1/completions", SHORT)
            assert refused.status == 503 and refused.error["code"] == "draining"
            assert "retry-after" in refused.headers
            assert server.get("/ready").status == 503
            assert server.get("/health").status == 200  # the ranks are well
            rest = list(tokens)
        assert rest[-1] == "[DONE]" and len(rest) == 900
        for thread in threads:
            thread.join(60)
        assert [answer.status for answer in answers] == [200] * 4
        assert all(answer.json()["usage"]["completion_tokens"] == 900 for answer in answers)
        assert server.wait_exit(20) == 0
        assert "Traceback" not in server.stderr


def test_drain_has_a_limit() -> None:
    with Server("--drain-timeout", "0.2") as server:
        server.ready()
        with ThreadPoolExecutor() as pool, server.stream({**LONG, "n": 8}) as response:
            whole = pool.submit(server.post, "/v1/completions", LONG)
            tokens = events(response)
            next(tokens)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            rest = list(tokens)
            assert rest[-1]["error"]["message"].endswith("the server is shutting down")
            assert whole.result().status == 503
        assert server.wait_exit(10) == 0
        assert time.monotonic() - began < 6.0


def test_signal_while_loading_ends_at_once() -> None:
    with Server("-tp", "2") as server:
        server.listening()
        assert server.get("/health").error["code"] == "unhealthy"
        assert server.post("/v1/completions", SHORT).error["code"] == "starting"
        server.process.send_signal(signal.SIGINT)
        assert server.wait_exit(15) == 0
