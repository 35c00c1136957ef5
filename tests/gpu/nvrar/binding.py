"""What two processes on one GPU do with NVRAR through the communicator: eager, captured, compiled, failing.

    bash tests/gpu/nvrar/mps.sh 2 python -m tests.gpu.nvrar.binding 2x1    # SKIP=inductor,timed leaves parts out

NCCL refuses two ranks on one GPU, so everything but the all-reduce goes through gloo. Prints a line per part.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.support.ranks import RankProcesses
from yalis.bench.allreduce import crafted
from yalis.comm.communicator import Communicator, init_distributed
from yalis.comm.topology import Topology
from yalis.errors import PeerTimeoutError

COUNTS = (1, 7, 513, 4096, 65537, 524288)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _expected(count: int, dtype: torch.dtype, ranks: int) -> torch.Tensor:
    total = torch.zeros(count, device="cuda")
    for rank in range(ranks):
        total += crafted(rank, ranks, count, dtype, torch.device("cuda")).float()
    return total


def _same_on_all(x: torch.Tensor) -> bool:
    bits = x.cpu().view(torch.uint8)
    other = bits.clone()
    dist.broadcast(other, 0)
    return torch.equal(bits, other)


def eager(comm: Communicator) -> str:
    checked = 0
    for dtype in DTYPES:
        for count in COUNTS:
            if count * dtype.itemsize > comm.shape.nvrar_bytes:
                continue
            for in_place in (False, True):
                x = crafted(comm.rank, comm.size, count, dtype, comm.device)
                out = comm.all_reduce(x, out=x if in_place else None, tag="eager")
                torch.cuda.synchronize()
                assert torch.equal(out.float(), _expected(count, dtype, comm.size)), (dtype, count, in_place)
                assert _same_on_all(out)
                checked += 1
    noise = torch.randn(30001, device="cuda", generator=torch.Generator("cuda").manual_seed(comm.rank)).bfloat16()
    assert _same_on_all(comm.all_reduce(noise)), "bits differ where sums round"
    return f"{checked} sums exact, bits equal"


def captured(comm: Communicator, replays: int = 300) -> str:
    x = crafted(comm.rank, comm.size, 16384, torch.bfloat16, comm.device)
    y = torch.empty_like(x)
    small = crafted(comm.rank, comm.size, 777, torch.float32, comm.device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        comm.all_reduce(x, out=y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            comm.all_reduce(x, out=y)
            comm.all_reduce(y, out=y)
        wrong = 0
        for _ in range(replays):
            graph.replay()
            wrong += int((comm.all_reduce(small) != _expected(777, torch.float32, comm.size)).sum())
        stream.synchronize()
    comm.check()
    assert wrong == 0
    assert torch.equal(y.float(), _expected(16384, torch.bfloat16, comm.size) * comm.size)
    return f"{replays} replays of two calls, each followed by an eager one"


def compiled(comm: Communicator, backend: str) -> str:
    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = comm.all_reduce(x * 2) + 1
        comm.all_reduce(total, out=total)
        return comm.all_reduce_rmsnorm(total, residual, weight, 1e-5)

    x = torch.randn(4, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(comm.rank)).bfloat16()
    residual = torch.randn(4, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(9)).bfloat16()
    weight = torch.ones(512, device="cuda", dtype=torch.bfloat16)
    plain = layer(x, residual.clone(), weight)
    start = time.perf_counter()
    fast = torch.compile(layer, backend=backend, fullgraph=True)(x, residual.clone(), weight)
    torch.cuda.synchronize()
    worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(plain, fast, strict=True))
    assert worst <= 0.04, worst
    assert all(_same_on_all(t) for t in fast)
    return f"full graph, {backend}, {time.perf_counter() - start:.1f} s, greatest difference {worst:g}"


def fused(comm: Communicator) -> str:
    """The fused call against its three steps, also captured, and what both cost."""
    assert comm.link is not None
    worst, told = 0.0, []
    shapes = ((1, 8192), (3, 4096), (64, 8192), (7, 1032), (2, 16384))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, hidden in shapes:
            generator = torch.Generator("cuda").manual_seed(comm.rank)
            same = torch.Generator("cuda").manual_seed(99)
            x = torch.randn(rows, hidden, device="cuda", generator=generator).to(dtype)
            residual = torch.randn(rows, hidden, device="cuda", generator=same).to(dtype)
            weight = torch.rand(hidden, device="cuda", generator=same).to(dtype)
            if x.nbytes > comm.shape.nvrar_bytes:
                continue
            kept = residual + comm.all_reduce(x)
            wide = kept.float()
            expected = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
            normed, fresh = comm.all_reduce_rmsnorm(x.clone(), residual.clone(), weight, 1e-5)
            torch.cuda.synchronize()
            assert torch.equal(fresh, kept), (dtype, rows, hidden)
            worst = max(worst, float(((normed - expected).abs() / (expected.abs() + 1e-3)).max()))
            assert _same_on_all(normed) and _same_on_all(fresh)
    assert worst < 0.02, worst
    x, y = (torch.zeros(8, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight, stream = torch.ones(8192, dtype=torch.bfloat16, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        comm.all_reduce_rmsnorm(x, y, weight, 1e-5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(50):
                comm.all_reduce_rmsnorm(x, y, weight, 1e-5)
        samples = []
        for _ in range(15):
            dist.barrier()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1e3 / 50)
    told.append(f"128 KiB, hidden 8192: {sorted(samples)[7]:.1f} us emulated")
    return f"max_hidden {comm.link.max_hidden}, worst relative difference {worst:.4f}, {'; '.join(told)}"


def timed(comm: Communicator) -> str:
    told = []
    for nbytes in (8192, 65536, 262144, 1048576):
        x = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            comm.all_reduce(x, out=x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(50):
                    comm.all_reduce(x, out=x)
            samples = []
            for _ in range(15):
                dist.barrier()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                samples.append(begin.elapsed_time(end) * 1e3 / 50)
        worst = torch.tensor(sorted(samples)[7])
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        told.append(f"{nbytes} B {float(worst):.1f} us")
    return "emulated, two ranks share one GPU: " + ", ".join(told)


def failing(comm: Communicator) -> str:
    """Rank 1 comes too late: rank 0 ends by the deadline, rank 1 when it comes; both with NaN and words."""
    dist.barrier()
    if comm.rank == 1:
        time.sleep(comm._group.timeout_s + 0.5)
    start = time.perf_counter()
    x = torch.ones(4096, device="cuda")
    told: PeerTimeoutError | None = None
    try:
        comm.all_reduce(x, out=x, tag="L1.attn")
        torch.cuda.synchronize()
        comm.check()
    except PeerTimeoutError as error:
        told = error
    took = time.perf_counter() - start
    dist.barrier()  # the words below must not end one rank while the other still looks
    assert told is not None, "a missing rank was not noticed"
    assert bool(x.isnan().any()) or comm.rank == 1, "the output of a failed call must be NaN"
    assert comm.rank == 1 or told.rank == 1, told
    assert took < comm._group.timeout_s + 1, took
    return f"after {took:.2f} s: {told}"


def work(nodes: int, local: int) -> dict[str, str]:
    """Everything, on one of nodes x local ranks."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(0)
    topology = Topology(rank, nodes * local, local)
    init_distributed(topology, backend="gloo", timeout_s=60)
    everyone = range(topology.world_size)
    report: dict[str, str] = {}
    start = time.perf_counter()
    comm = Communicator.create(topology, everyone, device="cuda:0", algorithm="nvrar", timeout_s=4)
    print(f"open: {'; '.join(comm.explain())} [{time.perf_counter() - start:.1f} s]", flush=True)
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("eager", lambda: eager(comm)),
        ("captured", lambda: captured(comm)),
        ("fused", lambda: fused(comm)),
        ("aot_eager", lambda: compiled(comm, "aot_eager")),
        ("inductor", lambda: compiled(comm, "inductor")),
        ("timed", lambda: timed(comm)),
        ("failing", lambda: failing(comm)),
    ]
    for name, part in parts:
        if name in os.environ.get("SKIP", "").split(","):
            continue
        start = time.perf_counter()
        report[name] = part()
        print(f"{name}: {report[name]} [{time.perf_counter() - start:.1f} s]", flush=True)
    start = time.perf_counter()
    comm.close()
    report["close"] = f"{time.perf_counter() - start:.2f} s"
    print("close", report["close"], flush=True)
    return report


def main() -> None:
    """Run one shape, such as 2x1."""
    nodes, local = (int(n) for n in sys.argv[1].split("x"))
    limit_s = float(os.environ.get("SECONDS_LEFT", "100"))
    with RankProcesses(work, nodes * local, nodes, local, torch_store=True) as group:
        late = ""
        try:
            results = group.wait(limit_s)
        except AssertionError as error:
            late = str(error).splitlines()[0]
        for rank in range(nodes * local):
            print(f"--- rank {rank}\n{group.stdout(rank)}{group.stderr(rank)[-3000:]}")
    if late or any(result.returncode for result in results):
        raise SystemExit(f"FAILED {sys.argv[1]} {late}")
    print("ok", sys.argv[1])


if __name__ == "__main__":
    main()
