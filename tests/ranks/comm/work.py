"""What the tests of this folder run inside the ranks."""

from __future__ import annotations

import ctypes
import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch

from tests.ranks.comm.rank_pool import Rank
from yalis.comm.channels import Channels
from yalis.comm.communicator import Communicator
from yalis.comm.group import Group
from yalis.comm.guard import NullGuard
from yalis.comm.shards import shard_bounds
from yalis.comm.shm import SharedSegment
from yalis.comm.topology import Topology
from yalis.errors import CommError, PeerLostError, PeerTimeoutError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Example:
    """One all-reduce: who, how, and on what."""

    nodes: int
    per_node: int
    algorithm: str
    dtype: str
    count: int
    in_place: bool
    layout: str
    seed: int
    memory: bool = True

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


def communicator(me: Rank, nodes: int, per_node: int, algorithm: str, memory: bool = True) -> Communicator:
    """This rank's communicator of that shape, made on first use. ``memory=False``: no shared memory in a node."""
    key = (nodes, per_node, algorithm, memory)
    if key not in me.kept:
        topology = Topology(me.rank, nodes * per_node, per_node)
        comm = Communicator.create(topology, range(nodes * per_node), algorithm=algorithm, timeout_s=20, store=me.store)
        if not memory:
            assert comm._algorithms["rd"]._segment is not None or per_node == 1
            comm._algorithms["rd"]._segment = None
        me.kept[key] = comm
    return me.kept[key]


def values(seed: int, rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rank- and position-dependent data of mixed magnitude."""
    generator = torch.Generator().manual_seed(seed * 64 + rank)
    scale = torch.randint(-3, 4, (count,), generator=generator).float().exp2()
    return (torch.randn(count, generator=generator) * scale).to(dtype)


def lay_out(flat: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in the same order of elements, in another memory layout."""
    if layout == "strided":
        wide = torch.full((flat.numel() * 2,), 7.0, dtype=flat.dtype)
        wide[::2] = flat
        return wide[::2]
    if layout == "transposed" and flat.numel() % 3 == 0:
        return flat.clone().view(3, -1).t().contiguous().t()  # in place must not touch the original
    if layout == "offset":  # not aligned to a cache line
        wide = torch.full((flat.numel() + 1,), 7.0, dtype=flat.dtype)
        wide[1:] = flat
        return wide[1:]
    return flat.clone()


def all_reduce(me: Rank, e: Example) -> tuple[str, float]:
    """Run one example; returns a digest of the result's bits and the worst error as a share of what is allowed."""
    comm = communicator(me, e.nodes, e.per_node, e.algorithm, e.memory)
    dtype = DTYPES[e.dtype]
    everyone = [values(e.seed, rank, e.count, dtype) for rank in range(e.ranks)]
    x = lay_out(everyone[me.rank], e.layout)
    before = x.clone()
    if e.in_place:
        result = comm.all_reduce(x, out=x, tag="test")
        assert result is x
    else:
        result = comm.all_reduce(x, tag="test")
        assert torch.equal(x, before), "the input of an out-of-place all-reduce changed"
    assert result.shape == x.shape
    assert result.dtype == dtype
    flat = result.reshape(-1)
    exact = torch.stack([v.double() for v in everyone]).sum(0)
    reach = torch.stack([v.double().abs() for v in everyone]).sum(0)
    # Each rounding errs by at most half a unit of what has been added up so far, which `reach` bounds. torch rounds at
    # every hop; shm once; rd and nvrar once inside the node, then once per doubling step, fold included.
    doubling = 1 + e.nodes.bit_length() + 1
    steps = {"torch": e.ranks, "shm": 1, "rd": doubling, "nvrar": doubling}[e.algorithm]
    allowed = reach * torch.finfo(dtype).eps / 2 * (steps + 0.01) + reach * 2.0**-23 * e.ranks + 1e-7 * e.ranks
    worst = float(((flat.double() - exact).abs() / allowed).max()) if e.count else 0.0
    bits = torch.empty(flat.shape, dtype=dtype).copy_(flat).view(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest(), worst


# ---- the shared segment by itself ------------------------------------------------------------------------------------


def segment_script(me: Rank, ranks: int, capacity: int, first_stage: int, script: list[tuple[Any, ...]]) -> None:
    """Run a row of operations on a fresh segment with small slots; asserts every result."""
    group = Group(Topology(me.rank, ranks, ranks), range(ranks), torch.device("cpu"), 20.0)
    group.connect(me.store, "gloo")
    segment = SharedSegment.connect(group, capacity=capacity, first_stage=first_stage)
    assert segment is not None
    for number, (operation, count, dtype_name, detail) in enumerate(script):
        dtype = DTYPES[dtype_name]
        everyone = [values(number * 7 + count, rank, count, dtype) for rank in range(ranks)]
        x = everyone[me.rank].clone()
        total = everyone[0].float()
        for other in everyone[1:]:
            total = total + other.float()
        total = total.to(dtype)
        start, end = shard_bounds(count, ranks, me.rank)
        if detail % (ranks + 2) == me.rank:
            time.sleep(0.002)  # one rank late, now and then
        if operation == "all_reduce":
            out = x if detail % 2 else torch.empty_like(x)
            segment.all_reduce(x, out)
            assert torch.equal(out, total), (number, operation, count, dtype_name)
        elif operation == "reduce_scatter":
            out = x[start:end] if detail % 2 else torch.empty(end - start, dtype=dtype)
            segment.reduce_scatter(x, out)
            assert torch.equal(out, total[start:end]), (number, operation, count, dtype_name)
        elif operation == "all_gather":
            whole = torch.empty(count, dtype=dtype)
            shard = values(count, 99, count, dtype)[start:end]
            if detail % 2:
                whole[start:end] = shard
                shard = whole[start:end]
            segment.all_gather(shard, whole)
            assert torch.equal(whole, values(count, 99, count, dtype)), (number, operation, count, dtype_name)
        elif operation == "broadcast":
            segment.broadcast(x, detail % ranks)
            assert torch.equal(x, everyone[detail % ranks]), (number, operation, count, dtype_name)
        else:
            segment.barrier()
    group.exchange("finished", "yes")
    segment.close()
    group.close()


def back_to_back(me: Rank, ranks: int, rounds: int, count: int) -> int:
    """Many all-reduces without a pause, every one checked: wrong elements in all."""
    comm = communicator(me, 1, ranks, "shm")
    base = torch.arange(count, dtype=torch.float32) % 97
    wrong = 0
    for number in range(rounds):
        x = base * (me.rank + 1) + (number * 13 + me.rank) % 101
        comm.all_reduce(x, out=x)
        expected = base * (ranks * (ranks + 1) // 2) + sum((number * 13 + r) % 101 for r in range(ranks))
        wrong += int((x != expected).sum())
    return wrong


# ---- the other collectives -------------------------------------------------------------------------------------------


def others(me: Rank, nodes: int, per_node: int) -> None:
    """all_gather, broadcast, agree_min, barrier, send and recv, the fused norm: against what they must give."""
    comm = communicator(me, nodes, per_node, "auto")
    size = comm.size

    def part(rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.arange(24).reshape(2, 3, 4) + 100 * rank).to(dtype)

    for dim in (-1, 0, 1):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            expected = torch.cat([part(r, dtype) for r in range(size)], dim=dim)
            assert torch.equal(comm.all_gather(part(me.rank, dtype), dim=dim), expected)
    assert torch.equal(comm.all_gather(part(me.rank).mT, dim=1), torch.cat([part(r).mT for r in range(size)], dim=1))
    narrow = comm.all_gather(part(me.rank)[:, 0, :1], dim=-1)  # [S, 1]: a reshape of the parts would be a strided view
    assert narrow.is_contiguous() and torch.equal(narrow, torch.cat([part(r)[:, 0, :1] for r in range(size)], dim=-1))
    for src in range(size):
        assert torch.equal(comm.broadcast(part(me.rank), src), part(src))
    assert comm.agree_min(1000 - me.rank) == 1000 - (size - 1)
    counted = comm.all_reduce(torch.full((5,), me.rank + 1, dtype=torch.int64))
    assert counted.tolist() == [size * (size + 1) // 2] * 5
    comm.barrier(tag="test")
    following, before = (me.rank + 1) % size, (me.rank - 1) % size
    handle = comm.isend(part(me.rank).mT, following, tag="ring")
    assert torch.equal(comm.recv(src=before, shape=(2, 4, 3), dtype=torch.float32), part(before).mT)
    handle.wait()
    assert handle.done()
    for peer in set(range(size)) - {me.rank}:  # shared memory inside a declared node, the network between nodes
        assert (comm._way(peer) is comm.group) == (peer // per_node != me.rank // per_node)
    if me.rank == 0:
        comm.send(part(7), 1)
    if me.rank == 1:
        out = torch.zeros(2, 3, 4)
        assert comm.recv(out, 0) is out
        assert torch.equal(out, part(7))
    for dtype in (torch.float32, torch.bfloat16):
        weight = values(5, 0, 64, dtype)
        residual = values(6, 0, 3 * 64, dtype).view(3, 64)
        inputs = [values(7, r, 3 * 64, dtype).view(3, 64) for r in range(size)]
        summed = comm.all_reduce(inputs[me.rank].clone())
        hidden = residual + summed
        wide = hidden.float()
        normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
        got, kept = comm.all_reduce_rmsnorm(inputs[me.rank].clone(), residual.clone(), weight, 1e-5, tag="norm")
        assert torch.equal(kept, hidden)
        torch.testing.assert_close(got, normed, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(comm.all_gather(got.unsqueeze(0), dim=0), got.unsqueeze(0).expand(size, -1, -1))


def channels(me: Rank, count: int, capacity: int, first: int) -> Channels:
    """Rings of that size between ranks 0 to count - 1, made on first use."""
    key = ("channels", count, capacity, first)
    if key not in me.kept:
        group = Group(Topology(me.rank, count, count), range(count), torch.device("cpu"), 20)
        group.connect(me.store, "gloo")
        me.kept[key] = Channels.connect(group, capacity=capacity, first=first)
    return me.kept[key]


def messages(me: Rank, count: int, capacity: int, first: int, sizes: list[int], plan: list[int]) -> None:
    """Everybody sends messages of these bytes to everybody, begun and awaited in an order that ``plan`` shuffles."""
    rings = channels(me, count, capacity, first)
    peers = [peer for peer in range(count) if peer != me.rank]

    def content(src: int, dst: int, place: int) -> torch.Tensor:
        return ((torch.arange(sizes[place]) * (3 * src + dst + 1) + place) % 251).to(torch.uint8)

    # Of one pair of ranks messages begin in order; pairs and directions are mixed.
    queues = [[(way, peer, place) for place in range(len(sizes))] for peer in peers for way in ("send", "recv")]
    begun = []
    for step in range(sum(map(len, queues))):
        waiting = [queue for queue in queues if queue]
        way, peer, place = waiting[plan[step % len(plan)] % len(waiting)].pop(0)
        if way == "send":
            passage = rings.isend(content(me.rank, peer, place), peer)
        else:
            passage = rings.irecv(torch.empty(sizes[place], dtype=torch.uint8), peer)
        begun.append((way, peer, place, passage))
    for step in range(len(begun)):
        way, peer, place, passage = begun.pop(plan[step % len(plan)] % len(begun))
        for _ in range(plan[step % len(plan)] % 3):
            passage.done()
        got = passage.wait()
        assert passage.done()
        assert torch.equal(got, content(*((me.rank, peer) if way == "send" else (peer, me.rank)), place)), (way, place)


def stats_and_bits(me: Rank, nodes: int, per_node: int) -> dict[str, dict[str, float]]:
    """The tiers that one all-reduce of 4000 bytes counts."""
    comm = communicator(me, nodes, per_node, "auto")
    comm.stats.reset()
    comm.all_reduce(torch.ones(1000))
    return comm.stats.as_dict()


def uneven(me: Rank) -> list[float]:
    """A group with two ranks on one node and one on another, and a second generation of it after a close."""
    topology = Topology(me.rank, 4, 2)
    results = []
    for _ in range(2):
        comm = Communicator.create(topology, [0, 1, 3], algorithm="rd", timeout_s=20, store=me.store)
        results.append(float(comm.all_reduce(torch.tensor([10.0**me.rank]))))
        comm.barrier()
        comm.close()
        comm.close()
    return results


def profiled(me: Rank) -> bool:
    """Whether the call site shows up as a profiler range."""
    from torch.profiler import ProfilerActivity, profile

    comm = communicator(me, 1, 2, "auto")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        comm.all_reduce(torch.ones(8), tag="L3.mlp.down")
    return any(event.key == "L3.mlp.down/allreduce[shm,32B]" for event in record.key_averages())


# ---- failures --------------------------------------------------------------------------------------------------------


def outcome(comm: Communicator, call: Any) -> dict[str, Any]:
    """How a call failed: type, words, named rank, host, what it waited for, and after how many seconds."""
    start = time.monotonic()
    try:
        call()
    except CommError as error:
        seconds = time.monotonic() - start
        again = None
        try:
            comm.barrier()
        except CommError as second:
            again = second
        return {
            "kind": type(error).__name__,
            "words": str(error),
            "rank": getattr(error, "rank", None),
            "host": getattr(error, "host", None),
            "waiting_for": getattr(error, "waiting_for", None),
            "seconds": seconds,
            "stays_broken": again is error,
        }
    return {"kind": "none"}


def make(me: Rank, nodes: int, per_node: int, algorithm: str, timeout_s: float) -> None:
    """Build the communicator of a failure test and use it once."""
    topology = Topology(me.rank, nodes * per_node, per_node)
    comm = Communicator.create(
        topology, range(nodes * per_node), algorithm=algorithm, timeout_s=timeout_s, store=me.store
    )
    comm.all_reduce(torch.ones(16))
    me.kept["comm"] = comm


def wait_alone(me: Rank, operation: str = "all_reduce") -> dict[str, Any]:
    """One more collective, in which somebody will be missing."""
    comm = me.kept["comm"]
    if operation == "recv":
        return outcome(comm, lambda: comm.recv(src=1, shape=(4,), dtype=torch.float32, tag="stage1"))
    if operation == "send":  # more than a ring holds: what fits into it is not waited for
        return outcome(comm, lambda: comm.send(torch.ones(2 << 20), 1, tag="stage1"))
    if operation == "barrier":
        return outcome(comm, lambda: comm.barrier(tag="end"))
    return outcome(comm, lambda: comm.all_reduce(torch.ones(16), tag="L3.mlp.down"))


def other_size(me: Rank) -> dict[str, Any]:
    """Rank 1 reduces another size than rank 0."""
    comm = me.kept["comm"]
    return outcome(comm, lambda: comm.all_reduce(torch.ones(16 + 8 * me.rank)))


def other_message(me: Rank) -> dict[str, Any]:
    """Rank 1 sends another size than rank 0 expects."""
    comm = me.kept["comm"]
    if me.rank == 1:
        comm.send(torch.ones(6), 0)
        return {}
    return outcome(comm, lambda: comm.recv(torch.ones(4), 1))


class FlagGuard(NullGuard):
    """A guard with a flag, like the liveness monitor's."""

    def __init__(self) -> None:
        super().__init__({})
        self.flag = ctypes.c_int32(0)

    def abort_flag_address(self) -> int:
        return ctypes.addressof(self.flag)


def raise_flag(me: Rank, algorithm: str) -> dict[str, Any]:
    """Wait for a peer that will not come; a thread raises the abort flag after 0.2 s."""
    import threading

    guard = FlagGuard()
    comm = Communicator.create(
        Topology(me.rank, 2, 2), [0, 1], algorithm=algorithm, timeout_s=20, store=me.store, guard=guard
    )
    if me.rank == 1:
        me.kept["comm"] = comm  # alive, but elsewhere
        return {}
    timer = threading.Timer(0.2, lambda: setattr(guard.flag, "value", 1))
    timer.start()
    result = outcome(comm, lambda: comm.all_reduce(torch.ones(4)))
    timer.join()
    return result


def refuse(me: Rank) -> list[str]:
    """Misuse that must be refused before anything is sent: the words of each refusal."""
    comm = communicator(me, 1, 2, "auto")
    x = torch.ones(4)
    said = []
    for call in (
        lambda: comm.all_reduce(x, out=torch.ones(5)),
        lambda: comm.all_reduce(x, out=torch.ones(4, dtype=torch.float64)),
        lambda: comm.broadcast(x, 2),
        lambda: comm.broadcast(torch.ones(4, 4).t(), 0),
        lambda: comm.isend(x, me.rank),
        lambda: comm.irecv(src=1 - me.rank),
        lambda: comm.all_gather(x, dim=1),
    ):
        try:
            call()
        except CommError as error:
            said.append(str(error))
    assert float(comm.all_reduce(torch.ones(1))) == 2.0  # still in step
    return said


def no_compiler(me: Rank) -> tuple[str, float, str]:
    """Rank 1 cannot build the native part: both ranks fall back together; a forced shm is refused by both."""
    from unittest.mock import patch

    from yalis.comm import shm
    from yalis.errors import BuildError

    def refuse_build() -> None:
        if me.rank == 1:
            raise BuildError("cannot build shm_allreduce: no C compiler found; install gcc or set CC")
        return real()

    real = shm.library
    with patch.object(shm, "library", refuse_build):
        comm = Communicator.create(Topology(me.rank, 2, 2), [0, 1], timeout_s=20, store=me.store)
        result = float(comm.all_reduce(torch.ones(1)))
        names = ",".join(comm._algorithms)
        comm.close()
        try:
            Communicator.create(Topology(me.rank, 2, 2), [0, 1], algorithm="shm", timeout_s=20, store=me.store)
        except CommError as error:
            return names, result, str(error)
    return names, result, "accepted"


def lost(error: dict[str, Any]) -> bool:
    """Whether an outcome is a lost peer."""
    return error["kind"] in (PeerLostError.__name__, PeerTimeoutError.__name__)


def join_alone(me: Rank) -> dict[str, Any]:
    """Build a group whose other member never comes."""
    start = time.monotonic()
    try:
        Communicator.create(Topology(me.rank, 2, 2), [0, 1], timeout_s=1.0, store=me.store)
    except PeerLostError as error:
        return {"rank": error.rank, "words": str(error), "seconds": time.monotonic() - start}
    return {"rank": None, "words": "it came", "seconds": 0.0}
