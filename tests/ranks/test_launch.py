"""Ranks started by the launcher, with real processes and real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import ROOT
from yalis.errors import ConfigError, YalisError
from yalis.launch import Nodes, RankGroup, is_launched, launch_ranks

TARGET = "tests.support.launch_target"
PYTHON_PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

Start = Callable[..., RankGroup]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    groups: list[RankGroup] = []

    def launch(nproc: int, mode: str, *args: str, folder: Path = tmp_path, **env: str) -> RankGroup:
        groups.append(launch_ranks(nproc, [TARGET, mode, str(folder), *args], env={"PYTHONPATH": PYTHON_PATH, **env}))
        return groups[-1]

    yield launch
    for group in groups:
        group.terminate()


def running(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def told(folder: Path, rank: int) -> Any:
    return json.loads((folder / f"{rank}.json").read_text())


def test_environment_and_arguments_of_the_ranks(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    awkward = ["--prompt", "${local_rank} costs $$5", "", "a b"]
    group = start(3, "return", *awkward, YALIS_TEST_EXTRA="x y")
    assert group.wait(30) is True
    assert group.poll() is True
    assert group.failures == {}
    for rank in range(3):
        seen = told(tmp_path, rank)
        assert seen["argv"][1:] == ["return", str(tmp_path), *awkward]
        assert seen["pid"] == group.pids[rank]
        env = seen["env"]
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank), "3")
        assert (env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"]) == ("3", "127.0.0.1")
        assert env["YALIS_TEST_EXTRA"] == "x y"
        assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert "YALIS_TEST_EXTRA" not in os.environ


def test_given_thread_count_is_kept(start: Start, tmp_path: Path) -> None:
    assert start(1, "return", OMP_NUM_THREADS="7").wait(30) is True
    assert told(tmp_path, 0)["env"]["OMP_NUM_THREADS"] == "7"


def test_two_groups_at_once_do_not_meet(start: Start, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    groups = [start(2, "sleep", folder=folder) for folder in folders]
    wait_for(lambda: all((folder / f"{rank}.json").exists() for folder in folders for rank in range(2)))
    ports = {told(folder, rank)["env"]["MASTER_PORT"] for folder in folders for rank in range(2)}
    assert len(ports) == 2
    groups[0].terminate()
    assert groups[1].poll() is None
    assert all(running(pid) for pid in groups[1].pids.values())


def test_terminate_ends_ranks_that_ignore_sigterm(start: Start, tmp_path: Path) -> None:
    group = start(2, "deaf")
    wait_for(lambda: all((tmp_path / f"{rank}.deaf").exists() for rank in range(2)))
    assert group.wait(0.1) is None
    group.terminate()
    assert not any(running(pid) for pid in group.pids.values())
    assert {f.exitcode for f in group.failures.values()} == {-signal.SIGKILL}
    assert group.wait() is False


def test_terminate_before_the_ranks_are_up(start: Start) -> None:
    group = start(2, "sleep")
    group.terminate()
    assert group.wait(1) is False
    assert not any(running(pid) for pid in group.pids.values())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def node_of(count: int, index: int, port: int, folder: Path, timeout_s: float = 60.0) -> RankGroup:
    nodes = Nodes(count, index, "127.0.0.1", port, timeout_s)
    return launch_ranks(count, [TARGET, "return", str(folder)], env={"PYTHONPATH": PYTHON_PATH}, nodes=nodes)


@pytest.mark.parametrize("index", [0, 1])
def test_terminate_while_other_nodes_are_waited_for(tmp_path: Path, index: int) -> None:
    group = node_of(3, index, free_port(), tmp_path)
    assert group.wait(3.0) is None  # its agent waits by now
    assert not group.started
    begin = time.monotonic()
    group.terminate()
    assert time.monotonic() - begin < 10.0
    with pytest.raises(YalisError, match=r"told to end while it waited for node "):
        group.wait(1)
    begin = time.monotonic()
    group.terminate()  # as the interpreter's exit would
    assert time.monotonic() - begin < 1.0


def test_nodes_that_come_one_after_the_other_meet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    groups = [node_of(3, 2, port, tmp_path)]
    try:
        assert groups[0].wait(2.0) is None
        groups += [node_of(3, index, port, tmp_path) for index in (0, 1)]
        assert [group.wait(60) for group in groups] == [True] * 3
    finally:
        for group in groups:
            group.terminate()
    assert {told(tmp_path, rank)["env"]["WORLD_SIZE"] for rank in range(3)} == {"3"}
    assert capfd.readouterr().err == ""  # no traceback for an attempt that came too early


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    group = node_of(2, 0, free_port(), tmp_path, timeout_s=1.0)
    with pytest.raises(YalisError, match="waited 1 s for node 1 of 2"):
        group.wait(30)
    other = node_of(2, 1, free_port(), tmp_path, timeout_s=1.0)
    with pytest.raises(YalisError, match="waited 1 s for node 0 to listen at 127.0.0.1"):
        other.wait(30)


SCRIPT = """
import sys
from yalis.launch import launch_ranks
group = launch_ranks(3, sys.argv[1:])
print(*group.pids.values(), flush=True)
group.wait(60)
for failure in group.failures.values():
    print(failure, flush=True)
"""


def parent_of_ranks(tmp_path: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, TARGET, mode, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("mode", "words"), [("raise", "ValueError: no such weights"), ("sys.exit", "error: no such model")]
)
def test_a_failing_rank_is_one_line(tmp_path: Path, mode: str, words: str) -> None:
    parent = parent_of_ranks(tmp_path, mode)
    out, err = parent.communicate(timeout=30)
    pids = [int(word) for word in out.splitlines()[0].split()]
    line = f"rank 1 (pid {pids[1]}) exited with code 1: {words}"
    assert out.splitlines()[1:] == [line]
    assert [text for text in err.splitlines() if text.startswith("yalis: ")] == [f"yalis: {line}"]
    assert "elastic" not in err
    assert "=====" not in err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_rank_is_named_and_the_group_ends(tmp_path: Path, number: signal.Signals) -> None:
    parent = parent_of_ranks(tmp_path, "watched")
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    wait_for(lambda: all((tmp_path / f"{rank}.watched").exists() for rank in range(3)))
    time.sleep(0.5)
    os.kill(pids[1], number)
    begin = time.monotonic()
    out, err = parent.communicate(timeout=30)
    assert time.monotonic() - begin < 4.0 + 1.0
    assert not any(running(pid) for pid in pids)
    who = f"rank 1 on {socket.gethostname()} (pid {pids[1]}) was lost"
    failures = out.splitlines()
    assert f"rank 1 (pid {pids[1]}) was killed by SIGKILL" in failures
    for rank in (0, 2):
        mine = [text for text in failures if text.startswith(f"rank {rank} ")]
        assert len(mine) == 1
        assert f"exited with code 70: {who}" in mine[0]
        assert f"yalis: {who}" in err
    assert "Traceback" not in err


def test_ranks_die_with_a_killed_parent(tmp_path: Path) -> None:
    parent = parent_of_ranks(tmp_path, "deaf")
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    wait_for(lambda: all((tmp_path / f"{rank}.deaf").exists() for rank in range(3)))
    parent.kill()
    wait_for(lambda: not any(running(pid) for pid in pids), 3.0)
    parent.communicate(timeout=10)


def test_ranks_end_with_an_interrupted_parent(tmp_path: Path) -> None:
    parent = parent_of_ranks(tmp_path, "sleep")
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=10)
    assert "KeyboardInterrupt" in err
    assert not any(running(pid) for pid in pids)


def test_no_ranks_and_no_module_are_refused() -> None:
    with pytest.raises(ConfigError, match="nproc=0"):
        launch_ranks(0, [TARGET])
    with pytest.raises(ConfigError, match="module"):
        launch_ranks(1, [])


def test_is_launched() -> None:
    assert not is_launched({})
    assert not is_launched({"RANK": "0", "WORLD_SIZE": "1"})
    assert is_launched({"RANK": "1", "WORLD_SIZE": "2"})
    assert is_launched({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"})
    assert is_launched({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"})
    assert not is_launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})  # the batch script itself is no task
