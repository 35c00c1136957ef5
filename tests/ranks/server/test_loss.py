"""A rank of a serving engine dies or stalls: requests end with 503, /health names the rank, the process ends."""

from __future__ import annotations

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, alive, events, wait_for

TIMEOUT_S = 4.0
# For the event loop and the ranks to get a turn on a busy machine.
SLACK_S = 2.0
LONG: dict[str, Any] = {"prompt": "This program", "max_tokens": 900, "ignore_eos": True}


def unhealthy(server: Server) -> str:
    """The message of a 503, empty while the server is well; the end of the server counts as no answer."""
    try:
        answer = server.get("/health", timeout_s=2.0)
    except OSError:
        return "gone"
    return "" if answer.status == 200 else str(answer.error["message"])


# bench/serve_failures.py goes through every rank and signal, and measures.
LOSSES = [(2, 0, signal.SIGSTOP), (1, 0, signal.SIGKILL), (1, 0, signal.SIGSTOP)]


@pytest.mark.parametrize(("ranks", "rank", "number"), LOSSES)
def test_loss(ranks: int, rank: int, number: signal.Signals) -> None:
    with Server("-tp", str(ranks), "--dist-timeout", str(TIMEOUT_S)) as server:
        pid = server.ready().rank_pids()[rank]
        with ThreadPoolExecutor() as pool, server.stream(LONG) as response:
            whole = pool.submit(server.post, "/v1/completions", LONG)
            tokens = events(response)
            next(tokens)
            os.kill(pid, number)
            lost = time.monotonic()
            message = wait_for(lambda: unhealthy(server), TIMEOUT_S + SLACK_S, "the 503")
            noticed = time.monotonic() - lost
            *_, last = tokens
            answer = whole.result()
        who = f"rank {rank} on {socket.gethostname()} (pid {pid}) was lost: "
        assert message.startswith(who), message
        assert answer.status == 503 and who in answer.error["message"]
        assert answer.error["code"] == "engine_lost"
        assert who in last["error"]["message"]
        assert server.wait_exit(TIMEOUT_S + SLACK_S) == 70
        print(
            f"{ranks} ranks, rank {rank} {number.name}: 503 after {noticed:.2f} s, exit {time.monotonic() - lost:.2f}"
        )
        # The last line says it once more, with what the others saw.
        assert [line for line in server.stderr.splitlines() if line.startswith("yalis: error: ") and who in line]
        assert "Traceback" not in server.stderr


def test_killed_api_process_leaves_no_rank() -> None:
    with Server("-tp", "2") as server:
        pids = server.ready().rank_pids()
        server.process.kill()
        wait_for(lambda: not any(alive(pid) for pid in pids.values()), 5.0, "the end of the ranks")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_orderly_end_waits_for_no_stopped_rank(rank: int) -> None:
    """Its silence would count only after half of the 30 s deadline, and its end was once waited for 20 s."""
    with Server("-tp", "2") as server:
        os.kill(server.ready().rank_pids()[rank], signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit(8.0) == 0


def test_loss_while_loading() -> None:
    with Server("-tp", "2", "--dist-timeout", str(TIMEOUT_S)) as server:
        server.listening()
        import psutil

        def ranks() -> list[psutil.Process]:
            found = []
            for child in psutil.Process(server.process.pid).children(recursive=True):
                if "RANK" in child.environ():
                    found.append(child)
            return found if len(found) == 2 else []

        victim = wait_for(ranks, 20, "two ranks")[0]
        server._remember()
        victim.kill()
        assert server.wait_exit(30) == 1
        assert "yalis: error: " in server.stderr


def test_restart() -> None:
    with Server("-tp", "2", "--dist-timeout", str(TIMEOUT_S), "--restarts", "1") as server:
        first = server.ready().rank_pids()
        before = server.complete("This program", max_tokens=8, seed=1)["choices"][0]["text"]
        os.kill(first[0], signal.SIGKILL)
        wait_for(lambda: server.state()["status"] == "restarting", 5.0, "the restart")
        refused = server.post("/v1/completions", {"prompt": "x"})
        assert refused.status == 503 and refused.error["code"] == "restarting" and "retry-after" in refused.headers
        assert server.get("/health").status == 503
        server.ready()
        second = server.rank_pids()
        assert set(second.values()).isdisjoint(first.values())
        assert server.complete("This program", max_tokens=8, seed=1)["choices"][0]["text"] == before
        assert server.state()["restarts"] == 1 and server.metric("yalis:engine_restarts_total") == 1
        # No further restart is left.
        os.kill(second[1], signal.SIGKILL)
        assert server.wait_exit(TIMEOUT_S + SLACK_S) == 70


STUCK = {"PYTHONPATH": "tests/support/stuck"}


@pytest.mark.parametrize(("ranks", "seed"), [(1, 666), (2, 666), (2, 667)])
def test_stuck_step(ranks: int, seed: int) -> None:
    """A step that never ends is found though every process lives, its status thread reports, and nobody waits."""
    with Server("-tp", str(ranks), "--dist-timeout", "2", env=STUCK) as server:
        server.ready()
        asked = time.monotonic()
        answer = server.post("/v1/completions", {"prompt": "x", "seed": seed, "max_tokens": 4})
        assert answer.status == 503 and "its step did not end" in answer.error["message"]
        assert f"rank 0 on {socket.gethostname()} (pid " in answer.error["message"]
        assert time.monotonic() - asked < 2 * 2 + SLACK_S
        assert unhealthy(server)
        assert server.wait_exit(10) == 70


def test_a_rank_that_raises_is_named() -> None:
    with Server("-tp", "2", "--dist-timeout", str(TIMEOUT_S), env=STUCK) as server:
        pid = server.ready().rank_pids()[1]
        answer = server.post("/v1/completions", {"prompt": "x", "seed": 668, "max_tokens": 4})
        who = f"rank 1 on {socket.gethostname()} (pid {pid}) was lost: raised ValueError: the test wanted it"
        assert answer.status == 503 and who in answer.error["message"]
        assert server.wait_exit(TIMEOUT_S + SLACK_S) == 70
        assert [line for line in server.stderr.splitlines() if line.startswith("yalis: error: ") and who in line]


def test_restart_after_a_stopped_rank_and_after_a_stuck_step() -> None:
    with Server("-tp", "2", "--dist-timeout", "2", "--restarts", "2", env=STUCK) as server:
        os.kill(server.ready().rank_pids()[1], signal.SIGSTOP)
        wait_for(lambda: server.state()["restarts"] == 1, 2 + SLACK_S, "the first restart")
        server.ready()
        assert server.post("/v1/completions", {"prompt": "x", "seed": 666, "max_tokens": 4}).status == 503
        wait_for(lambda: server.state()["restarts"] == 2, 10, "the second restart")
        server.ready()
        assert server.complete("This program", max_tokens=4)["usage"]["completion_tokens"] == 4


def test_a_restart_that_fails_ends_the_server(tmp_path: Path) -> None:
    marker = tmp_path / "fail"
    env = {**STUCK, "YALIS_TEST_START_FAILS": str(marker)}
    with Server("-tp", "2", "--dist-timeout", str(TIMEOUT_S), "--restarts", "1", env=env) as server:
        pid = server.ready().rank_pids()[1]
        marker.touch()
        os.kill(pid, signal.SIGKILL)
        assert server.wait_exit(30) == 70
        assert "starting the engine again" in server.stderr and "Traceback" not in server.stderr
        assert "yalis: error: rank" in server.stderr.splitlines()[-1], server.stderr
