"""The thread that notices what a GPU reports while nobody calls, with a library that only pretends."""

from __future__ import annotations

import ctypes
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from yalis.comm.communicator import Communicator
from yalis.comm.guard import NullGuard
from yalis.comm.nvrar.library import Failure, Info
from yalis.comm.nvrar.link import Link, NvrarWaitFailed
from yalis.comm.resources import Resources
from yalis.errors import PeerTimeoutError

LATE = Failure("late", 0, 3, "between nodes", 1, 17, 2)


class Handle:
    """Says what it is told to say; `closing` is how finalize ends."""

    info = Info(4, 0, 8, 512, 4, ("cells",), 0, 8, 1 << 20, 1 << 24, 0)

    def __init__(self, closing: str = "") -> None:
        self.found: Failure | None = None
        self.aborted = threading.Event()
        self.closing = closing
        self.calls: list[str] = []

    def failure(self) -> Failure | None:
        return self.found

    def abort(self) -> None:
        self.calls.append("abort")
        self.aborted.set()
        self.found = self.found or Failure("aborted", 0, -1, "between calls", -1, 0, 0)

    def close(self) -> str:
        self.calls.append("close")
        return self.closing


class Store:
    """A store without a server."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.kept[key] = value

    def get(self, key: str) -> bytes:
        return self.kept[key].encode()

    def wait(self, keys: list[str], timeout: Any) -> None:
        if keys[0] not in self.kept:
            raise RuntimeError("timeout")


def group(store: Any = None) -> Any:
    shape = SimpleNamespace(ranks=4, nodes=2, ranks_per_node=2, contiguous=True)
    members = [SimpleNamespace(rank=10 + i, hostname=f"host{i // 2}") for i in range(4)]
    return SimpleNamespace(
        device=torch.device("cuda"),
        shape=shape,
        ranks=(10, 11, 12, 13),
        timeout_s=5.0,
        members=members,
        index=0,
        store=store,
    )


def link(handle: Any, flag: ctypes.c_int32 | None = None, store: Any = None) -> Link:
    return Link(group(store), handle, None, None, ctypes.addressof(flag) if flag is not None else 0)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_failure_of_the_device_is_handed_over_once() -> None:
    handle, seen = Handle(), []
    opened = link(handle)
    opened.watch(seen.append)
    time.sleep(0.1)
    assert not seen and opened.failed() is None
    handle.found = LATE
    wait_for(lambda: seen)
    time.sleep(0.1)
    [failed] = seen
    assert isinstance(failed, NvrarWaitFailed)
    assert failed.suspect == 3
    assert str(failed) == "rank 10 waited 4.5 s for rank 13 (phase between nodes, step 1, block 2, epoch 17)"
    opened.close()
    assert handle.calls == ["close"]


def test_a_verdict_aborts_what_the_device_waits_for() -> None:
    handle, seen, flag = Handle(), [], ctypes.c_int32(0)
    opened = link(handle, flag)
    opened.watch(seen.append)
    flag.value = 1
    assert handle.aborted.wait(10)
    wait_for(lambda: seen)
    assert seen[0].suspect is None and "aborted" in str(seen[0])
    opened.close()
    assert handle.calls == ["abort", "abort", "close"], "aborting twice does no harm; closing must not wait"


def test_who_was_only_told_to_stop_learns_the_cause() -> None:
    store, first, second = Store(), Handle(), Handle()
    second.found = Failure("peer failed", 1, -1, "gather", -1, 17, 0)
    told = link(second, store=store).failed()
    assert told is not None and told.suspect is None, "nobody has said why yet"
    first.found = LATE
    words = [str(link(handle, store=store).failed()) for handle in (first, second)]
    assert words[0] == words[1]
    assert "rank 10 waited 4.5 s for rank 13" in words[0]


def test_what_closing_could_not_do_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    opened = link(Handle("a peer did not come to finalize within 4.5 s"))
    opened.close()
    assert "did not come to finalize" in caplog.text


def test_check_raises_what_a_replayed_graph_met() -> None:
    handle = Handle()
    opened = link(handle)
    comm = object.__new__(Communicator)
    comm.ranks, comm._guard, comm._closed, comm._broken = (10, 11, 12, 13), NullGuard({13: "host1"}), False, None
    comm._resources, comm._failing, comm._begun = Resources(None, opened), threading.Lock(), "L1/all_reduce"
    comm.check()
    handle.found = LATE
    for _ in range(2):
        with pytest.raises(PeerTimeoutError) as caught:
            comm.check()
    error = caught.value
    assert (error.rank, error.host, error.phase, error.step) == (13, "host1", "between nodes", 1)
    assert "rank 13 on host host1" in str(error) and "L1/all_reduce" in str(error)
