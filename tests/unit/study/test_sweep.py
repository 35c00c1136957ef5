"""What is timed inside CUDA graphs, with fakes in the place of the device: the order of things, and what is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from yalis.bench import replay
from yalis.bench.replay import Captured, time_chain
from yalis.cli import calibrate as calibrate_command
from yalis.comm.communicator import Communicator
from yalis.comm.topology import Topology
from yalis.errors import ConfigError
from yalis.study import sweep
from yalis.study.calibrate import groups_of, launched_group
from yalis.study.sweep import IN_GRAPH, ONE_BY_ONE, ProductTimer, Reducer, chain_length, products_of, rows_of


class Device:
    """Records what is done to it in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(synchronize=lambda: self.log.append("wait"))

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(
            capture_begin=lambda capture_error_mode: self.log.append(f"capture {capture_error_mode}"),
            capture_end=lambda: self.log.append("captured"),
            replay=lambda: self.log.append("replay"),
            reset=lambda: self.log.append("reset"),
        )

    def Event(self, enable_timing: bool) -> Any:
        return SimpleNamespace(
            record=lambda stream: self.log.append("event"),
            synchronize=lambda: self.log.append("wait"),
            elapsed_time=lambda other: 6.0,
        )

    def _sleep(self, cycles: int) -> None:
        self.log.append("spin")


@contextmanager
def _stream(stream: Any) -> Iterator[None]:
    yield


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(replay, "_cuda", found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", _stream)
    return found


def test_a_chain_is_captured_once_and_meets_the_other_ranks_before_the_clock_starts(device: Device) -> None:
    def call(name: str) -> Callable[[], None]:
        return lambda: device.log.append(name)

    chain = Captured([call("a"), call("b")], torch.device("cuda"), align=call("meet"))
    assert device.log == ["a", "a", "wait", "capture thread_local", "a", "b", "captured"]
    device.log.clear()
    assert chain.run() == pytest.approx(6e-3)
    assert device.log == ["spin", "meet", "event", "replay", "event", "wait"]
    device.log.clear()
    chain.close()
    assert device.log == ["wait", "reset"]


def test_a_chain_of_one_rank_meets_nobody(device: Device) -> None:
    chain = Captured([lambda: None], torch.device("cuda"))
    device.log.clear()
    chain.run()
    assert device.log == ["event", "replay", "event", "wait"]


def test_samples_are_seconds_of_a_call_without_those_of_the_warm_up() -> None:
    times = iter([9.0, 9.0, 4.0, 2.0, 3.0])
    pacer = Communicator.create(Topology(rank=0, world_size=1, ranks_per_node=1), [0])
    chain = SimpleNamespace(run=lambda: next(times))
    assert time_chain(pacer, chain, 4, iters=3, warmup=2) == [1.0, 0.5, 0.75]


class Chain:
    """In the place of `Captured`: makes its calls, and takes a second for each."""

    made: ClassVar[list[Chain]] = []

    def __init__(self, calls: Sequence[Callable[[], Any]], device: torch.device, align: Any = None) -> None:
        self.calls, self.align, self.closed = calls, align, False
        self.made.append(self)

    def run(self) -> float:
        for call in self.calls:
            call()
        return float(len(self.calls))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[Chain]:
    monkeypatch.setattr(sweep, "Captured", Chain)
    monkeypatch.setattr(Chain, "made", [])
    return Chain.made


def _gpu_comm(uncapturable: tuple[str, ...], called: list[tuple[Any, ...]]) -> Any:
    """A communicator whose tensors are on no device, but which says that it is a GPU's."""

    def reduce(x: torch.Tensor, out: torch.Tensor) -> None:
        called.append(("plain", x.shape, x.data_ptr()))

    def reduce_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        called.append(("norm", x.shape, x.data_ptr()))

    return SimpleNamespace(
        device=torch.device("meta"), uncapturable=uncapturable, all_reduce=reduce, all_reduce_rmsnorm=reduce_norm
    )


def test_all_reduces_are_chained_over_buffers_in_turn(chains: list[Chain]) -> None:
    called: list[tuple[Any, ...]] = []
    comm = _gpu_comm((), called)
    pacer = Communicator.create(Topology(rank=0, world_size=1, ranks_per_node=1), [0])
    reducer = Reducer(comm, "nccl", pacer, iters=2)
    assert reducer.timed == ONE_BY_ONE  # no GPU's
    reducer.timed, comm.device = IN_GRAPH, torch.device("cpu")
    assert reducer.plain(1 << 14) == [1.0, 1.0]
    assert [len(chain.calls) for chain in chains] == [64]
    assert chains[0].closed and chains[0].align is chains[0].calls[0]
    assert len({pointer for _, _, pointer in called}) == 4
    called.clear()
    assert reducer.with_norm(1 << 15) == [1.0, 1.0]
    assert {(kind, shape) for kind, shape, _ in called} == {("norm", torch.Size([4, 4096]))}
    assert chains[1].closed


def test_chains_and_rows_by_size() -> None:
    assert [chain_length(2**i) for i in (8, 20, 22, 25)] == [64, 64, 16, 4]
    assert [rows_of(2**i) for i in (8, 13, 20)] == [(1, 128), (1, 4096), (128, 4096)]


def test_products_of_a_gpu_go_through_all_weights_in_one_chain(chains: list[Chain]) -> None:
    timer = ProductTimer(64, 32, 5 * 64 * 32 * 2, torch.device("cpu"))
    assert timer._replayed(8, 50.0) == pytest.approx(1 / timer.each)
    (chain,) = chains
    assert len(chain.calls) == 20  # four rounds of five weights: at most 24
    assert len({id(call.args[1]) for call in chain.calls}) == 5
    assert timer._replayed(8, 1.0) == pytest.approx(1 / timer.each)
    assert len(chains) == 1
    timer.close()
    assert chain.closed
    assert all(n * k * 2 >= 32 * 2**20 for n, k in products_of("cuda").values())


def test_gpus_are_swept_with_norms_and_only_with_what_is_asked_for() -> None:
    one, two = groups_of(2, "cuda", 5)
    assert (one.algorithms, one.norms, one.product_rounds) == ((), False, 5)
    assert (two.algorithms, two.norms, two.ping_pong) == (("nccl", "nvrar", "symm_mem"), True, True)
    assert groups_of(2, "cuda", 5, ("nccl",))[1].algorithms == ("nccl",)
    assert not any(group.norms for group in groups_of(4, "cpu", 5))
    world = launched_group(16, 8, "cuda", 5, ("nccl", "nvrar"))
    assert (world.algorithms, world.norms, world.ping_pong) == (("nccl", "nvrar"), True, True)
    assert launched_group(16, 8, "cuda", 5).algorithms == ("nccl", "nvrar", "symm_mem")
    assert [launched_group(4, n, "cpu", 5).algorithms for n in (4, 2)] == [("shm", "torch"), ("rd", "torch")]
    assert calibrate_command._only("nccl,nvrar", "cuda") == ("nccl", "nvrar")
    for names, device in (("nvrar", "cuda"), ("nccl,mpi", "cuda"), ("nccl", "cpu")):
        with pytest.raises(ConfigError, match="--all-reduce"):
            calibrate_command._only(names, device)
