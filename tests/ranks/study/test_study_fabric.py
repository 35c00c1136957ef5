"""The emulated network and the split of waiting from moving, with real processes."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import pytest
import torch

from tests.support.ranks import rank_store, run_ranks
from yalis.comm.communicator import Communicator
from yalis.comm.topology import Topology
from yalis.errors import ConfigError
from yalis.study.ring import ring_all_reduce

MS = 1e-3


def _comm(per_node: int, algorithm: str) -> Communicator:
    topology = Topology(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), per_node)
    return Communicator.create(
        topology, range(topology.world_size), algorithm=algorithm, timeout_s=20, store=rank_store()
    )


Samples = dict[int, list[tuple[float, float, float]]]


def split(
    per_node: int, algorithm: str, late_rank: int, delays_s: tuple[float, ...], sizes: tuple[int, ...], calls: int = 6
) -> list[Samples]:
    """By delay and bytes, each call on this rank, one rank entering that late: total, waits inside and between."""
    with _comm(per_node, algorithm) as comm:
        comm.all_reduce(torch.ones(4))
        by_delay: list[Samples] = []
        for delay_s in delays_s:
            samples: Samples = {}
            by_delay.append(samples)
            for nbytes in sizes:
                x = torch.ones(nbytes // 4)
                comm.all_reduce(x.clone())
                for _ in range(calls):
                    y = x.clone()
                    comm.barrier()
                    comm.barrier()
                    if comm.rank == late_rank:
                        time.sleep(delay_s)
                    intra, inter = comm.waited_s or 0.0, comm.waited_between_nodes_s
                    start = time.perf_counter()
                    comm.all_reduce(y, out=y)
                    total = time.perf_counter() - start
                    found = (total, (comm.waited_s or 0.0) - intra, comm.waited_between_nodes_s - inter)
                    samples.setdefault(nbytes, []).append(found)
        return by_delay


SIZES = (16, 8 << 10, 256 << 10, 4 << 20)
SHORT = SIZES[:3]  # where more ranks than idle cores move megabytes, they do wait for each other
LONG = SIZES[2:]  # between nodes the first in one piece, the second with a mark ahead


def _waited(sample: tuple[float, float, float]) -> float:
    return sample[1] + sample[2]


def _transfer(samples: list[tuple[float, float, float]]) -> float:
    """The shortest: a busy host only adds."""
    return min(sample[0] - _waited(sample) for sample in samples)


@pytest.mark.parametrize(
    ("ranks", "per_node", "algorithm", "tier", "sizes", "late_rank"),
    [
        (2, 2, "shm", "intra", SHORT, 0),  # beside other tests even two ranks may have one core
        (3, 3, "shm", "intra", SHORT, 0),
        (2, 1, "rd", "inter", SIZES, 0),
        (2, 1, "rd", "inter", LONG, 1),  # of two ranks the one hears the mark, the other sends it
        (4, 2, "rd", "both", SHORT, 0),
    ],
)
def test_wait_for_a_late_rank_is_told_from_the_transfer(
    ranks: int, per_node: int, algorithm: str, tier: str, sizes: tuple[int, ...], late_rank: int
) -> None:
    # Between nodes the declared network dwarfs what a busy host adds; inside one nothing can be declared.
    alpha_s, bytes_per_s, delay_s = 40 * MS, 1e8, 120 * MS
    env = {"YALIS_EMULATED_FABRIC": f"alpha_s={alpha_s},bytes_per_s={bytes_per_s}"} if algorithm == "rd" else {}

    args = (per_node, algorithm, late_rank, (0.0, delay_s), sizes)
    results = run_ranks(split, ranks, *args, timeout_s=100, torch_store=True, env=env)
    control, late = ([result.value[index] for result in results] for index in range(2))
    for rank in range(ranks):
        for nbytes in sizes:
            moving_s = _transfer(control[rank][nbytes])
            wait_s = statistics.median(map(_waited, late[rank][nbytes]))
            assert min(map(_waited, control[rank][nbytes])) < 0.1 * delay_s, (rank, nbytes)
            if rank == late_rank:
                assert wait_s < 0.1 * delay_s, nbytes
            else:
                assert wait_s == pytest.approx(delay_s, rel=0.10), (rank, nbytes)
                inter_s = statistics.median(s[2] for s in late[rank][nbytes])
                assert tier == "both" or (inter_s > 0.9 * wait_s) == (tier == "inter")
            transfer_s = _transfer(late[rank][nbytes])
            assert transfer_s == pytest.approx(moving_s, rel=0.10, abs=0.05 * delay_s), (rank, nbytes)
            if env:
                least_s = alpha_s + nbytes / per_node / bytes_per_s
                assert moving_s == pytest.approx(least_s, rel=0.10), (rank, nbytes)


def test_who_folds_in_hears_how_long_its_partner_waited() -> None:
    alpha_s, delay_s = 40 * MS, 200 * MS
    env = {"YALIS_EMULATED_FABRIC": f"alpha_s={alpha_s}"}
    sizes = (16, 256 << 10)
    results = run_ranks(split, 3, 1, "rd", 1, (delay_s,), sizes, timeout_s=60, torch_store=True, env=env)
    # Node 2 hands its part to node 0, which is an alpha later where it meets node 1.
    for rank, hops in ((0, 2), (2, 3)):
        for nbytes in sizes:
            samples = results[rank].value[0][nbytes]
            assert statistics.median(map(_waited, samples)) == pytest.approx(delay_s - alpha_s, rel=0.10)
            assert _transfer(samples) == pytest.approx(hops * alpha_s, rel=0.10)


@pytest.mark.parametrize(("per_node", "algorithm"), [(2, "shm"), (1, "rd")])
def test_moving_a_long_message_is_no_wait(per_node: int, algorithm: str) -> None:
    sizes = (16, 4 << 20)
    results = run_ranks(split, 2, per_node, algorithm, -1, (0.0,), sizes, 20, timeout_s=60, torch_store=True)
    for result in results:
        # The least share of all calls: the host may be busy, and then a partner really comes late.
        assert min(_waited(sample) / sample[0] for sample in result.value[0][sizes[-1]]) < 0.25


def emulated_times(algorithm: str, counts: tuple[int, ...]) -> Any:
    """Least seconds of an all-reduce by number of float32 elements; an error's words where it is refused."""
    try:
        comm = _comm(1, algorithm)
    except ConfigError as error:
        return str(error)
    with comm:
        found = {}
        for count in counts:
            x = torch.ones(count)
            samples = []
            for _ in range(5):
                comm.barrier()
                start = time.perf_counter()
                out = comm.all_reduce(x)
                samples.append(time.perf_counter() - start)
                assert bool((out == comm.size).all())
            found[count] = min(samples)  # the machine may be busy with something else
        return found, comm.emulated


def test_emulated_messages_take_what_was_declared() -> None:
    env = {"YALIS_EMULATED_FABRIC": "alpha_s=0.05,bytes_per_s=1e7"}
    counts = (16, 100_000)
    results = run_ranks(emulated_times, 4, "rd", counts, timeout_s=40, torch_store=True, env=env)
    for result in results:
        found, words = result.value
        assert words == "emulated network: 50000 us, 10 MB/s"
        assert found[16] == pytest.approx(2 * 0.05, rel=0.1)  # two steps between four nodes
        assert found[100_000] == pytest.approx(2 * (0.05 + 400_000 / 1e7), rel=0.1)


def hops(counts: tuple[int, ...], calls: tuple[int, int]) -> dict[tuple[str, int], list[float]]:
    """Seconds of an all-reduce of 16 bytes a rank, each call on this rank, by algorithm and nodes of one rank each.

    ``calls`` of few hops and of many.
    """
    world = Topology(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 1)
    found: dict[tuple[str, int], list[float]] = {}
    for nodes in counts:
        if world.rank >= nodes:
            continue
        with Communicator.create(world, range(nodes), algorithm="rd", timeout_s=60, store=rank_store()) as comm:
            for algorithm in ("rd", "ring"):
                for _ in range(calls[algorithm == "ring" and nodes > 3]):
                    x = torch.ones(4 * comm.size)
                    comm.barrier()
                    start = time.perf_counter()
                    if algorithm == "ring":
                        ring_all_reduce(comm, x)
                    else:
                        comm.all_reduce(x, out=x)
                    found.setdefault((algorithm, nodes), []).append(time.perf_counter() - start)
                    assert bool((x == comm.size).all())
    return found


def test_doubling_takes_log_many_hops_and_a_ring_as_many_as_nodes() -> None:
    alpha_s = 100 * MS  # much more than many ranks on few cores take between two hops
    env = {"YALIS_EMULATED_FABRIC": f"alpha_s={alpha_s}"}
    doubling = {2: 1, 3: 3, 4: 2, 6: 4, 8: 3}
    results = run_ranks(hops, 8, tuple(doubling), (4, 2), timeout_s=110, torch_store=True, env=env)
    for nodes, count in doubling.items():
        for algorithm, declared in (("rd", count), ("ring", 2 * (nodes - 1))):
            calls = zip(*(r.value[algorithm, nodes] for r in results[:nodes]), strict=True)
            assert min(map(max, calls)) / alpha_s == pytest.approx(declared, rel=0.10), (algorithm, nodes)


def several_at_once() -> float:
    """Seconds in which this rank receives from all others at once; the least of some calls."""
    with _comm(1, "rd") as comm:
        samples = []
        for _ in range(4):
            peers = [i for i in range(comm.size) if i != comm.rank]
            boxes = {peer: torch.empty(4) for peer in peers}
            comm.barrier()
            start = time.perf_counter()
            mine = torch.full((4,), float(comm.rank))
            comm.group.swap([(mine, peer) for peer in peers], [(box, peer) for peer, box in boxes.items()], 9)
            samples.append(time.perf_counter() - start)
            assert all(bool((box == peer).all()) for peer, box in boxes.items())
        return min(samples)


def test_messages_of_one_exchange_travel_at_the_same_time() -> None:
    alpha_s = 60 * MS
    env = {"YALIS_EMULATED_FABRIC": f"alpha_s={alpha_s}"}
    results = run_ranks(several_at_once, 4, timeout_s=100, torch_store=True, env=env)
    assert all(r.value == pytest.approx(alpha_s, rel=0.10) for r in results)


# Bytes of the messages of one exchange, by sender and receiver; a mark goes ahead of some.
MIXED = {(0, 1): (8, 200_000), (1, 0): (300_000,), (1, 2): (300_000, 16), (0, 2): (600_000,), (2, 0): (700_000, 4)}


def mixed_sizes(turns: int) -> bool:
    """Whether all messages of exchanges that mix long and short, one way and both, arrive where they belong."""
    right = True
    with _comm(1, "rd") as comm:
        for turn in range(turns):
            sends: list[tuple[torch.Tensor, int]] = []
            wanted: list[tuple[torch.Tensor, int]] = []
            for (src, dst), sizes in MIXED.items():
                for place, nbytes in enumerate(sizes):
                    x = torch.full((nbytes,), 1 + 50 * src + 10 * dst + 3 * place + turn, dtype=torch.uint8)
                    if src == comm.rank:
                        sends.append((x, dst))
                    elif dst == comm.rank:
                        wanted.append((x, src))
            boxes = [(torch.empty_like(x), src) for x, src in wanted]
            comm.group.swap(sends, boxes, 9)
            right &= all(torch.equal(box, x) for (box, _), (x, _) in zip(boxes, wanted, strict=True))
    return right


@pytest.mark.parametrize("env", [{}, {"YALIS_EMULATED_FABRIC": "alpha_s=0.002"}])
def test_marks_do_not_get_between_the_messages(env: dict[str, str]) -> None:
    results = run_ranks(mixed_sizes, 3, 3, timeout_s=60, torch_store=True, env=env)
    assert all(result.value for result in results)


def test_what_the_emulation_cannot_carry_is_refused() -> None:
    env = {"YALIS_EMULATED_FABRIC": "alpha_s=0.02"}
    results = run_ranks(emulated_times, 2, "torch", (16,), timeout_s=40, torch_store=True, env=env)
    assert all("does not pass through the emulated network" in r.value for r in results)


def test_loss_and_late_ranks_cost_what_was_declared() -> None:
    env = {"YALIS_EMULATED_FABRIC": "alpha_s=0.001,late=1:0.03"}
    results = run_ranks(emulated_times, 2, "rd", (16,), timeout_s=40, torch_store=True, env=env)
    assert all(r.value[0][16] == pytest.approx(0.031, rel=0.15) for r in results)
    env = {"YALIS_EMULATED_FABRIC": "alpha_s=0.001,loss=0.9,retransmit_s=0.005,seed=1"}
    results = run_ranks(emulated_times, 2, "rd", (16,), timeout_s=40, torch_store=True, env=env)
    assert all(r.value[0][16] > 0.006 for r in results)
