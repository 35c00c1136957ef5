"""Memory that GPUs map to each other, without GPUs: who agrees on what, and what is freed when.

torch's symmetric memory and the other rank are played; tests/gpu/comm has the real ones.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from yalis.comm import peer_memory, resources
from yalis.comm.algorithms.symm_mem import SymmMem
from yalis.comm.peer_memory import PeerMemory
from yalis.comm.policy import GroupShape
from yalis.comm.resources import _map_memory
from yalis.comm.stats import CommStats
from yalis.errors import CommError, ConfigError

NBYTES = 4096
COUNTS = itertools.count(1000)
CUDA = GroupShape(2, 1, 2, "cuda", False, True, one_host=True)


class Handle:
    """torch's, as far as `PeerMemory` uses it."""

    def __init__(self, buffer: torch.Tensor):
        self.buffers = [buffer, torch.zeros_like(buffer)]

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        assert (sizes, dtype) == ((NBYTES,), torch.uint8)
        return self.buffers[rank]

    def barrier(self, channel: int, timeout_ms: int) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nand more")


class Other:
    """A group of this rank and one that says what it is told to, ``says[key](word of this rank)``; else the same."""

    def __init__(self, **says: Callable[[str], str]):
        self.size, self.index, self.ranks, self.timeout_s = 2, 0, (0, 1), 30.0
        self.device, self.store, self.shape = torch.device("cpu"), dist.HashStore(), CUDA
        self.members = (SimpleNamespace(hostname="here"),) * 2
        self.asked: list[str] = []
        self._says = says

    def exchange(self, key: str, word: str, timeout_s: float = 30.0) -> list[str]:
        assert key not in self.asked, "once per group"
        self.asked.append(key)
        return [word, self._says.get(key.rsplit("/")[-1].replace("-", "_"), lambda mine: mine)(word)]


def changed(**values: Any) -> Callable[[str], str]:
    return lambda word: json.dumps(json.loads(word) | values)


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Handle]]:
    """Those that rendezvous gave out."""
    given: list[weakref.ref[Handle]] = []

    def rendezvous(buffer: torch.Tensor, name: str) -> Handle:
        handle = Handle(buffer)
        given.append(weakref.ref(handle))
        return handle

    monkeypatch.setattr(symm_mem, "empty", lambda n, dtype, device: torch.zeros(n, dtype=dtype))
    monkeypatch.setattr(symm_mem, "rendezvous", rendezvous)
    monkeypatch.setattr(PeerMemory, "_rendezvous", next(COUNTS))  # torch's registry takes a name once
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(peer_memory, "_REST_S", 0.1)
    return given


def alive(handle: weakref.ref[Handle]) -> bool:
    gc.collect()
    return handle() is not None


def opened(**says: Callable[[str], str]) -> PeerMemory:
    group: Any = Other(**says)
    return PeerMemory(group, NBYTES, "two_shot")


def test_addresses_of_all_ranks(handles: list[weakref.ref[Handle]]) -> None:
    before = PeerMemory._rendezvous
    memory = opened()
    (handle,) = handles
    found = handle()
    assert found is not None
    assert memory.bases.tolist() == [buffer.data_ptr() for buffer in found.buffers]
    assert PeerMemory._rendezvous == before + 1


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"two_shot": changed(problem="out of memory")}, "out of memory"),
        ({"two_shot": changed(count=999)}, "different numbers of groups"),
    ],
)
def test_who_cannot_come_is_not_waited_for(says: dict[str, Any], words: str, handles: list[Any]) -> None:
    with pytest.raises(CommError, match=words):
        opened(**says)
    assert not handles, "nobody met"


def test_this_rank_tells_that_it_cannot_come(handles: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory\nand more")

    monkeypatch.setattr(symm_mem, "empty", full)
    with pytest.raises(CommError, match=r"ranks \[0, 1\] to each other: CUDA out of memory$"):
        opened()
    assert not handles


def test_who_forced_symmetric_memory_is_told_what_to_use(handles: list[Any]) -> None:
    group: Any = Other(symm_mem=changed(problem="out of memory"))
    with pytest.raises(CommError, match="symm_mem: .*out of memory; use nccl or auto$"):
        SymmMem(group, resources.Resources(), CommStats())


def test_what_one_rank_could_not_map_is_freed_on_all(handles: list[weakref.ref[Handle]]) -> None:
    with pytest.raises(CommError, match="no peer access"):
        opened(mapped=lambda _: "no peer access")
    assert not alive(handles[0])
    assert PeerMemory._rendezvous < 0, "no other rank has that count: from now on all go without"


def fails(_: object) -> None:
    raise RuntimeError("CUDA error: unspecified launch failure")


def hangs(_: object) -> None:
    threading.Event().wait(5)


@pytest.mark.parametrize(
    ("failed", "device", "kept"),
    [(False, None, False), (True, None, True), (False, fails, True), (False, hangs, True)],
    ids=["at rest", "a peer was lost", "failed device", "busy device"],
)
def test_memory_is_freed_only_where_that_is_safe(
    failed: bool,
    device: Callable[[object], None] | None,
    kept: bool,
    handles: list[weakref.ref[Handle]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = opened()
    if device is not None:
        monkeypatch.setattr(torch.cuda, "synchronize", device)
    memory.close(failed=failed)
    memory.close(failed=failed)  # again, without harm
    assert alive(handles[0]) == kept


def test_a_failed_device_is_a_failed_wait(handles: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(peer_memory.WaitFailed, match="launch failure$"):
        opened().meet()
    assert "and more" in caplog.text
    peer_memory.raise_if_failed(RuntimeError("Failed to find C compiler"))  # is none


# ---- who maps memory at all ---------------------------------------------------------------------------------------


@pytest.fixture
def gpus(handles: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_gpu_of", lambda group: "here/GPU-0")


TABLE = [(1 << 62, "two_shot")]
OTHER_GPU = changed(gpu="here/GPU-1")


@pytest.mark.parametrize(
    ("algorithm", "table", "maps"),
    [
        ("nvrar", None, True),
        ("two_shot", None, True),
        ("auto", TABLE, True),
        ("auto", None, False),
        ("torch", None, False),
    ],
)
def test_mapped_where_it_may_be_chosen(algorithm: str, table: Any, maps: bool, gpus: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(symm_mem, "empty", lambda n, dtype, device: torch.zeros(NBYTES, dtype=dtype))
    monkeypatch.setattr(Handle, "get_buffer", lambda self, rank, sizes, dtype: self.buffers[rank])
    group: Any = Other(two_shot=OTHER_GPU)
    # The key of the memory's own exchange has the same last word: it is answered alike.
    memory = _map_memory(group, algorithm, table, None)
    assert (memory is not None) == maps == group.shape.mapped
    assert bool(group.asked) == maps


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({}, "ranks share a GPU"),
        ({"two_shot": changed(gpu="here/GPU-1", problem="no Triton")}, "no Triton"),
        ({"two_shot": OTHER_GPU, "mapped": lambda _: "no peer access"}, "no peer access"),
    ],
)
def test_where_it_cannot_serve_all_go_without(
    says: dict[str, Any], words: str, gpus: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handle, "get_buffer", lambda self, rank, sizes, dtype: self.buffers[rank])
    group: Any = Other(**says)
    with caplog.at_level(logging.WARNING, "yalis"):
        assert _map_memory(group, "nvrar", None, None) is None
    assert words in caplog.text and "torch takes long messages" in caplog.text
    assert not group.shape.mapped
    forced: Any = Other(**says)
    with pytest.raises(ConfigError, match=words):
        _map_memory(forced, "two_shot", None, None)
