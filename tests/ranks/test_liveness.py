"""Ranks that die or stall, with real processes and real signals."""

from __future__ import annotations

import builtins
import ctypes
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.ranks import RankProcesses, RankResult, rank_store, run_ranks
from yalis.comm.control import ChannelClosedError, ControlChannel
from yalis.comm.liveness import EXIT_PEER_LOST, EXIT_TERMINATED, LivenessMonitor, install_termination_handler
from yalis.comm.topology import from_environment

TIMEOUT_S = 3.0
SLACK_S = 1.0
WAIT = "L3.mlp.down/allreduce[shm,8192B]"


def joined(timeout_s: float = TIMEOUT_S) -> tuple[LivenessMonitor, ControlChannel]:
    topology, store = from_environment(os.environ), rank_store()
    monitor = LivenessMonitor.connect(topology, store, timeout_s=timeout_s)
    install_termination_handler(monitor)
    return monitor, ControlChannel.connect(topology, store, timeout_s=timeout_s, guard=monitor)


def ready() -> None:
    print("ready", flush=True)


def spin(monitor: LivenessMonitor, limit_s: float = 1000.0) -> None:
    """A wait as C code does it: polls the abort flag."""
    flag = ctypes.c_int32.from_address(monitor.abort_flag_address())
    monitor.entered(WAIT)
    deadline = time.monotonic() + limit_s
    while not flag.value:
        if time.monotonic() > deadline:
            raise monitor.explain(WAIT, TimeoutError("nobody came"), None)
        time.sleep(0.001)
    raise monitor.explain(WAIT, None, None)


def stick() -> None:
    """A foreign library that never returns to the interpreter, not even for a signal; other threads run on."""
    lock = ctypes.CDLL(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(64)  # zeros: an unlocked mutex
    lock(mutex)
    lock(mutex)


def survive(mode: str) -> None:
    monitor, channel = joined()
    monitor.set_step(17)
    ready()
    if mode == "spinning":
        spin(monitor)
    elif mode == "stuck":
        monitor.entered(WAIT)
        stick()
    elif os.environ["RANK"] == "0":
        time.sleep(1000)  # the hub of an idle engine waits for the outside world
    else:
        channel.recv()


def culprits(result: RankResult) -> set[str]:
    return set(re.findall(r"(rank \d+ on \S+ \(pid \d+\)) was lost", result.stderr))


def lose(mode: str, victim: int, number: signal.Signals) -> tuple[float, list[RankResult]]:
    with RankProcesses(survive, 3, mode) as group:
        group.wait_for_line("ready")
        time.sleep(0.5)  # a beat with the new state
        group.signal(victim, number)
        begin = time.monotonic()
        results = group.wait(TIMEOUT_S + SLACK_S)
        return time.monotonic() - begin, results


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("mode", ["spinning", "stuck", "idle"])
def test_lost_rank_is_named_by_all_and_nobody_is_left(mode: str, number: signal.Signals) -> None:
    """Each of three ranks in turn; a stopped one must be gone as well, or `wait` raises."""
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda victim: lose(mode, victim, number), range(3)))
    for victim, (seconds, results) in enumerate(runs):
        assert seconds <= TIMEOUT_S + SLACK_S
        assert results[victim].returncode == -signal.SIGKILL
        who = f"rank {victim} on {socket.gethostname()} (pid {results[victim].pid})"
        reason = "process died" if number == signal.SIGKILL else r"silent for [01]\.\d s"
        for survivor in (r for r in results if r.rank != victim):
            assert survivor.returncode != 0
            assert culprits(survivor) == {who}
            assert re.search(f"was lost: {reason}; it was in .* at step 17", survivor.stderr), survivor.stderr
            doing = {"spinning": WAIT, "stuck": WAIT, "idle": "idle, waiting for a command"}[mode]
            if mode != "idle" or survivor.rank != 0:
                assert f"This rank {survivor.rank} was waiting in {doing}" in survivor.stderr
            if mode == "stuck" or (mode, survivor.rank) == ("idle", 0):
                assert survivor.returncode == EXIT_PEER_LOST
            else:  # the abort flag reached the main thread
                assert survivor.returncode == 1
                assert "yalis.errors.PeerLostError: " in survivor.stderr


def stuck_in_gloo() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    monitor, _ = joined()
    dist.barrier()
    ready()
    if dist.get_rank() == 2:
        time.sleep(1000)
    monitor.entered("pp/recv from rank 2")
    dist.recv(torch.zeros(4), src=2)


def test_survivor_stuck_in_a_torch_receive_is_ended() -> None:
    """Rank 2 lives and never sends; gloo itself would wait half an hour. Rank 0, the hub, dies."""
    with RankProcesses(stuck_in_gloo, 3, torch_store=True) as group:
        group.wait_for_line("ready")
        time.sleep(0.4)
        group.signal(0, signal.SIGKILL)
        results = group.wait(TIMEOUT_S + SLACK_S)
    assert results[1].returncode == EXIT_PEER_LOST
    assert results[2].returncode != 0
    assert len(culprits(results[1])) == 1
    assert culprits(results[1]) == culprits(results[2])
    assert "rank 0" in culprits(results[1]).pop()


def slow_but_alive() -> dict[int, tuple[str, int, float]]:
    monitor, channel = joined()
    ready()
    if os.environ["RANK"] == "0":
        time.sleep(2.0)
        table = monitor.status()
        channel.broadcast(b"go on")
    else:
        monitor.set_step(5)
        assert channel.recv() == b"go on"
        table = {}
    assert monitor.verdict is None
    channel.close()
    monitor.close()
    return table


@pytest.mark.parametrize("pause_s", [0.74, 0.9])
def test_a_pause_under_the_limit_is_forgiven(pause_s: float) -> None:
    """Rank 0 pauses right after rank 1: so it last *read* a beat of rank 1 longer ago than the limit."""
    with RankProcesses(slow_but_alive, 3) as group:
        group.wait_for_line("ready")
        for victim in (1, 0):
            group.signal(victim, signal.SIGSTOP)
            time.sleep(pause_s)  # the limit is 1.5 s
            group.signal(victim, signal.SIGCONT)
        results = group.wait(10)
    assert [(r.returncode, r.stderr) for r in results] == [(0, "")] * 3
    table = results[0].value
    assert table[0][0] == "working"
    assert {table[r][:2] for r in (1, 2)} == {("idle, waiting for a command", 5)}
    assert all(age < 1.5 for _, _, age in table.values())


def test_a_pause_of_the_whole_machine_is_forgiven() -> None:
    """All ranks stop for longer than the limit, as when a laptop sleeps: nobody may blame anybody afterwards."""
    with RankProcesses(slow_but_alive, 3) as group:
        group.wait_for_line("ready")
        time.sleep(0.4)
        for rank in range(3):
            group.signal(rank, signal.SIGSTOP)
        time.sleep(2.4)
        for rank in range(3):
            group.signal(rank, signal.SIGCONT)
        results = group.wait(10)
    assert [(r.returncode, r.stderr) for r in results] == [(0, "")] * 3


def leave_in_turn(order: list[int]) -> None:
    with joined()[0] as monitor:
        time.sleep(0.1 + 0.5 * order.index(int(os.environ["RANK"])))
        assert monitor.verdict is None


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_orderly_exits_are_no_losses(order: list[int]) -> None:
    results = run_ranks(leave_in_turn, 3, order, timeout_s=10)
    assert [r.stderr for r in results] == ["", "", ""]


def hang_outside() -> None:
    monitor, _ = joined()
    ready()
    if os.environ["RANK"] == "1":
        monitor.set_step(9)
        monitor.entered("L0.attn.o/all_reduce")
        monitor.left()
        time.sleep(1000)
    spin(monitor, limit_s=1.0)


def test_rank_that_never_arrives_is_found_by_those_who_wait() -> None:
    results = run_ranks(hang_outside, 3, timeout_s=TIMEOUT_S + SLACK_S + 1, check=False)
    for result in results:
        assert result.returncode != 0
        assert len(culprits(result)) == 1
        assert "rank 1" in culprits(result).pop()
        assert f"did not arrive in {WAIT}; it was in no collective" in result.stderr
        assert "after L0.attn.o/all_reduce at step 9" in result.stderr
    assert "(this rank; the others gave it up)" in results[1].stderr


def blame_the_neighbour() -> None:
    """0 waits for 1 and blames it, 1 waits for 2, 2 hangs."""
    monitor, _ = joined()
    ready()
    if os.environ["RANK"] == "2":
        time.sleep(1000)
    monitor.entered(WAIT)
    if os.environ["RANK"] == "1":
        stick()
    time.sleep(1.0)
    raise monitor.explain(WAIT, TimeoutError("rank 1 is late"), 1)


def test_the_end_of_a_chain_of_waits_is_blamed() -> None:
    results = run_ranks(blame_the_neighbour, 3, timeout_s=TIMEOUT_S + SLACK_S + 1, check=False)
    assert all("rank 2" in culprits(r).pop() for r in results)


def wait_in_foreign_code() -> None:
    """Both wait, in a library without a time limit."""
    monitor, _ = joined(1.5)
    monitor.entered(f"{WAIT} of rank {os.environ['RANK']}")
    stick()


def test_a_wait_without_a_limit_of_its_own_is_ended() -> None:
    begin = time.monotonic()
    results = run_ranks(wait_in_foreign_code, 2, timeout_s=6, check=False)
    assert time.monotonic() - begin > 1.5
    for result in results:
        assert result.returncode == EXIT_PEER_LOST
        assert "which one cannot be told: every rank waits: rank 0 in L3" in result.stderr


def raise_on(victim: int) -> None:
    with joined()[0] as monitor:
        if int(os.environ["RANK"]) == victim:
            time.sleep(0.3)
            raise ValueError("bad weights\nand more")
        spin(monitor)


@pytest.mark.parametrize("victim", [0, 1])
def test_an_exception_is_the_verdict_on_the_others(victim: int) -> None:
    results = run_ranks(raise_on, 3, victim, timeout_s=TIMEOUT_S, check=False)
    for result in results:
        assert result.returncode == 1
        if result.rank != victim:
            assert f"rank {victim} on" in culprits(result).pop()
            assert "was lost: raised ValueError: bad weights; it was in no collective" in result.stderr


def wait_for_sigterm(stuck: bool) -> None:
    monitor, _ = joined()
    ready()
    if stuck:
        stick()
    spin(monitor)


@pytest.mark.parametrize("stuck", [False, True])
def test_sigterm_to_all_is_no_loss(stuck: bool) -> None:
    with RankProcesses(wait_for_sigterm, 3, stuck) as group:
        group.wait_for_line("ready")
        for rank in range(3):
            group.signal(rank, signal.SIGTERM)
        results = group.wait(6.0)
    assert [(r.returncode, r.stderr) for r in results] == [(EXIT_TERMINATED, "")] * 3


class SlowTeardown:
    """Keeps the interpreter's teardown busy, when no other thread runs any more."""

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(1.9)


def end_slowly(slow: int) -> None:
    monitor, _ = joined()
    if int(os.environ["RANK"]) == slow:
        builtins.slow_teardown = SlowTeardown()  # type: ignore[attr-defined]
        ready()
        spin(monitor)
    ready()
    stick()


def test_a_slow_end_after_sigterm_to_all_is_no_loss() -> None:
    """The others are stuck, so their monitors still watch when the slow one no longer beats."""
    with RankProcesses(end_slowly, 3, 1) as group:
        group.wait_for_line("ready")
        time.sleep(0.2)
        for rank in range(3):
            group.signal(rank, signal.SIGTERM)
        results = group.wait(4.0)
    assert [(r.returncode, r.stderr) for r in results] == [(EXIT_TERMINATED, "")] * 3


def test_sigterm_to_one_is_named_by_the_others() -> None:
    with RankProcesses(wait_for_sigterm, 3, False) as group:
        group.wait_for_line("ready")
        group.signal(2, signal.SIGTERM)
        results = group.wait(TIMEOUT_S + SLACK_S)
    assert results[2].returncode == EXIT_TERMINATED
    for result in results[:2]:
        assert "rank 2" in culprits(result).pop()
        assert "was lost: ended by SIGTERM" in result.stderr


@pytest.mark.parametrize("stuck", [False, True])
def test_sigterm_after_a_kill_still_names_the_dead_rank(stuck: bool) -> None:
    """What torch's elastic agent does: it sees the dead rank and terminates the others at once."""
    with RankProcesses(wait_for_sigterm, 3, stuck) as group:
        group.wait_for_line("ready")
        group.signal(0, signal.SIGKILL)
        for rank in (1, 2):
            group.signal(rank, signal.SIGTERM)
        results = group.wait(TIMEOUT_S)
    for result in results[1:]:
        assert result.returncode == EXIT_PEER_LOST
        assert "rank 0" in culprits(result).pop()
        assert "process died" in result.stderr


def acknowledge_and_go_on() -> str:
    monitor, _ = joined()
    ready()
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    try:
        spin(monitor)
    except RuntimeError as error:
        monitor.acknowledge()
        time.sleep(2.0)  # longer than the monitor would have let it live
        return str(error)
    return ""


def test_an_acknowledged_verdict_leaves_the_process_to_its_owner() -> None:
    with RankProcesses(acknowledge_and_go_on, 2) as group:
        group.wait_for_line("ready")
        group.signal(1, signal.SIGKILL)
        results = group.wait(6)
    assert results[0].returncode == 0
    assert "rank 1 on" in results[0].value


def hang_on_the_way_out() -> None:
    monitor, _ = joined()
    ready()
    if os.environ["RANK"] == "1":
        time.sleep(1000)

    class Destructor:
        def __del__(self) -> None:
            ctypes.PyDLL(None).sleep(1000)  # with the GIL held: nothing of Python runs any more

    keep = Destructor()
    try:
        spin(monitor)
    finally:
        del keep


def test_a_process_that_hangs_with_the_gil_held_is_ended() -> None:
    with RankProcesses(hang_on_the_way_out, 2) as group:
        group.wait_for_line("ready")
        group.signal(1, signal.SIGKILL)
        results = group.wait(TIMEOUT_S + SLACK_S)
    assert results[0].returncode != 0
    assert "hang_on_the_way_out" in results[0].stderr or "__del__" in results[0].stderr


def alone() -> None:
    monitor, channel = joined()
    monitor.entered(WAIT)
    monitor.left()
    channel.broadcast(b"")
    assert list(monitor.status()) == [0]
    channel.close()
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    monitor.close()
    monitor.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_world_of_one() -> None:
    run_ranks(alone, 1, timeout_s=10)


def closing() -> str:
    monitor, channel = joined()
    if os.environ["RANK"] == "0":
        channel.close()
        monitor.close()
        return ""
    try:
        channel.recv()
    except ChannelClosedError as error:
        monitor.close()
        return str(error)
    return "no error"


def test_the_end_of_the_run_reaches_idle_followers() -> None:
    results = run_ranks(closing, 3, timeout_s=10)
    assert [r.value for r in results] == ["", *["rank 0 closed the control channel"] * 2]
