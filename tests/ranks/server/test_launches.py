"""Every way to start the ranks: under a launcher, and as two nodes without one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.checkpoints import DEMO
from tests.support.forked import start_module
from tests.support.ranks import ROOT
from tests.support.server import Server, events, wait_for
from yalis import LLM, SamplingParams

LONG: dict[str, Any] = {"prompt": "This program", "max_tokens": 900, "ignore_eos": True}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "yalis")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_torchrun() -> None:
    with Server("-tp", "2", prefix=TORCHRUN) as server:
        server.ready()
        pids = server.rank_pids()
        assert len(pids) == 2
        # One of torchrun's workers is rank 1 itself, the other is the API process with rank 0 as its child.
        parents = {rank: psutil.Process(pid).parent() for rank, pid in pids.items()}
        assert parents[0] is not None and parents[1] is not None and parents[0].ppid() == parents[1].pid
        assert server.complete("This program", max_tokens=4)["usage"]["completion_tokens"] == 4
        # A launcher tells every process to end; the server drains first, and the ranks wait for it.
        os.kill(pids[1], signal.SIGTERM)
        assert server.complete("This program", max_tokens=4)["usage"]["completion_tokens"] == 4
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
        wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids.values()), 5.0, "the end of the ranks")
        assert "was lost" not in server.stderr


def test_rank_lost_under_torchrun() -> None:
    with Server("-tp", "2", "--dist-timeout", "10", prefix=TORCHRUN) as server:
        pids = server.ready().rank_pids()
        with server.stream(LONG) as response:
            response.readline()
            os.kill(pids[1], signal.SIGKILL)
            rest = response.read().decode()
        assert f"rank 1 on {socket.gethostname()} (pid {pids[1]}) was lost" in rest
        assert server.wait_exit(15) != 0


@pytest.fixture
def second() -> Iterator[Any]:
    """Starts another `yalis serve` of the same run; killed at the end if it still runs."""
    started: list[Any] = []

    def start(*arguments: str, temporary: Path, **variables: str) -> Any:
        words = ["yalis", "serve", str(DEMO), "--cpu-threads", "1", *arguments]
        env = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"} | variables
        started.append(start_module(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(10)


def mpi(rank: int) -> dict[str, str]:
    names = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}


def slurm(rank: int) -> dict[str, str]:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_NODEID": "0", **step}


@pytest.mark.parametrize("launcher", [mpi, slurm])
def test_other_launchers(launcher: Any, second: Any) -> None:
    """The environment that mpirun and srun give to two processes of one host."""
    port = str(free_port())
    with Server("-tp", "2", env={**launcher(0), "MASTER_PORT": port}) as server:
        other = second("-tp", "2", temporary=server.temporary, MASTER_PORT=port, **launcher(1))
        assert server.ready().rank_pids()[1] == other.pid  # that process is a rank itself
        assert server.complete("This program", max_tokens=4)["usage"]["completion_tokens"] == 4
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit(20) == 0 and other.wait(20) == 0


# Without the parameter, mpirun kills what is left a second after SIGTERM.
PATIENCE = ("--mca", "odls_base_sigkill_timeout", "8")
MPIRUN = ("mpirun", "-np", "2", "--oversubscribe", "--allow-run-as-root", *PATIENCE, sys.executable, "-m", "yalis")
has_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun: apt-get install openmpi-bin")


@has_mpirun
def test_mpirun() -> None:
    """The real launcher: one process is the server over rank 0, the other is rank 1; Ctrl-C or SIGTERM ends both."""
    with Server("-tp", "2", prefix=MPIRUN) as server:
        pids = server.ready().rank_pids()
        assert len(pids) == 2
        assert server.complete("This program", max_tokens=4)["usage"]["completion_tokens"] == 4
        with server.stream({**LONG, "max_tokens": 200}) as response:
            stream = events(response)
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            *_, done = stream
        assert done == "[DONE]"
        server.process.wait(20)
        wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids.values()), 5.0, "the end of the ranks")
        assert "was lost" not in server.stderr


@has_mpirun
def test_generate_under_mpirun(offline: LLM) -> None:
    options = ["--model", str(DEMO), "--tp", "2", "--cpu-threads", "1", "--temperature", "0", "--max-tokens", "8"]
    command = [*MPIRUN, "generate", *options, "This program is free software"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    [output] = offline.generate(["This program is free software"], SamplingParams(temperature=0.0, max_tokens=8))
    assert done.stdout.strip() == "This program is free software" + output.outputs[0].text  # and once, not twice


def two_nodes(port: int) -> list[str]:
    return ["-tp", "2", "-pp", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{port}", "--dist-timeout", "8"]


def test_two_nodes_without_a_launcher(second: Any) -> None:
    shared = two_nodes(free_port())
    with Server(*shared, "--node-rank", "0") as server:
        other = second(*shared, "--headless", "--node-rank", "1", temporary=server.temporary)
        server.ready()
        state = server.state()
        assert [rank["rank"] for rank in state["ranks"]] == [0, 1, 2, 3]
        assert state["engine"]["num_nodes"] == 2 and state["engine"]["ranks_per_node"] == 2
        ours = {p.pid for p in psutil.Process(server.process.pid).children(recursive=True)}
        theirs = {p.pid for p in psutil.Process(other.pid).children(recursive=True)}
        assert {state["ranks"][0]["pid"], state["ranks"][1]["pid"]} <= ours
        assert {state["ranks"][2]["pid"], state["ranks"][3]["pid"]} <= theirs
        assert server.complete("This program", max_tokens=4)["usage"]["completion_tokens"] == 4
        assert server.metric("yalis:rank_up") == 4
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit(25) == 0
        assert other.wait(25) == 0


def test_sigterm_to_both_nodes_lets_requests_finish(second: Any) -> None:
    """As systemd or Kubernetes end a service: every node is told at once, and only node 0 knows of the stream."""
    shared = two_nodes(free_port())
    with Server(*shared, "--node-rank", "0") as server:
        other = second(*shared, "--headless", "--node-rank", "1", temporary=server.temporary)
        server.ready()
        with server.stream({**LONG, "max_tokens": 300}) as response:
            stream = events(response)
            next(stream)
            other.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)
            *rest, done = stream
        assert done == "[DONE]" and rest[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait_exit(25) == 0, server.stderr
        assert other.wait(25) == 0


# A node that goes alone takes the run along: after its patience, or at a second signal.
@pytest.mark.parametrize(("patience_s", "signals"), [("0", 1), ("60", 2)], ids=["patience", "second-signal"])
def test_a_node_that_goes_takes_the_run_along(patience_s: str, signals: int, second: Any) -> None:
    shared = [*two_nodes(free_port()), "--drain-timeout", patience_s]
    with Server(*shared, "--node-rank", "0") as server:
        other = second(*shared, "--headless", "--node-rank", "1", temporary=server.temporary)
        server.ready()
        for _ in range(signals):
            other.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert server.get("/health").status == 200 or signals == 2
        assert server.wait_exit(25) == 70
        assert "was lost" in server.stderr
        assert other.wait(20) == 0


def test_a_node_that_waits_for_node_0_ends_at_once(second: Any, tmp_path: Path) -> None:
    other = second(*two_nodes(free_port()), "--headless", "--node-rank", "1", temporary=tmp_path)
    time.sleep(4)  # its handlers stand
    other.send_signal(signal.SIGTERM)
    assert other.wait(25) == 0


WRONG: list[tuple[list[str], str]] = [
    (["--headless"], "need"),
    (["--nnodes", "2", "--node-rank", "2", "--master-addr", "127.0.0.1"], "node 2 of 2"),
    (["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1"], "add --headless"),
    (["--nnodes", "2", "--headless", "--master-addr", "127.0.0.1"], "leave out --headless"),
    (["--nnodes", "2"], "--master-addr"),
    (["--nnodes", "2", "--master-addr", "127.0.0.1", "-tp", "3"], "cannot be spread evenly"),
    (["--nnodes", "2", "--master-addr", "127.0.0.1", "-tp", "2", "--restarts", "1"], "restarts=1"),
    (["--dist-init-addr", "host", "--nnodes", "2"], "must look like HOST:PORT"),
    (["--port", "99999"], "must be 0 to 65535"),
    (["--api-key", "short"], "at least 8"),
    (["--model", "x"], "name one model"),
    (["--max-queued-requests", "-1"], "at least 0"),
    (["--drain-timeout", "nan"], "number of seconds"),
    (["--tool-call-parser", "x"], "hermes"),
    (["--chat-template", "/nonexistent"], "/nonexistent"),
    (["--api-key-file", "/nonexistent"], "/nonexistent"),
    (["--profile-dir", "/dev/null/traces"], "/dev/null/traces"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_wrong_options_end_at_once_with_one_line(arguments: list[str], words: str, capsys: Any) -> None:
    from yalis.cli.main import main

    assert main(["serve", str(DEMO), *arguments]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("yalis: error: ") and words in said[-1], said


def test_taken_port(capsys: Any) -> None:
    from yalis.cli.main import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(DEMO), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
