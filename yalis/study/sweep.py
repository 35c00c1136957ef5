"""What a rank of a calibration measures apart from the engine: ping-pong, all-reduces by size, products by shape and
rows. ``python -m`` entry, or `measure` in a rank that a launcher started.

Rank 0 writes one JSON file; times are raw seconds of a call, the longest over ranks. On GPUs calls are timed in chains
inside CUDA graphs, as decode steps make them; ``timed`` says so of each all-reduce.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from yalis.bench.harness import time_collective
from yalis.bench.replay import Call, Captured, time_chain
from yalis.comm.communicator import Communicator, init_distributed
from yalis.comm.topology import Topology, from_environment
from yalis.errors import CommError, ConfigError
from yalis.kernels import ops
from yalis.study.ring import ring_all_reduce

# Outputs x inputs of a product: more outputs, more inputs, and a smaller one: on a CPU one that a cache of any size
# would hold; on a GPU as large as those of a decode step, since what is smaller takes no longer than its launch.
_PRODUCTS_CPU = {"wide": (8192, 1024), "tall": (1024, 8192), "small": (512, 512)}
_PRODUCTS_CUDA = {"wide": (16384, 4096), "tall": (4096, 16384), "small": (4096, 4096)}
PRODUCT_ROWS = (1, 8, 64, 512)
# A sample lasts at least so long: a host's memory changes its speed within milliseconds. A GPU's does not.
_SAMPLE_S = {"cpu": 0.05, "cuda": 0.005}
# Weights of one shape that a rank goes through before it meets the first again, so that none comes out of a cache.
_LEAST_BYTES, _CACHES = 512 * 2**20, 16
# In a graph: products, all-reduces (fewer, where so many bytes are reached before), and buffers that they take in turn.
_CHAIN_PRODUCTS, _CHAIN_CALLS, _CHAIN_LEAST, _CHAIN_BYTES, _BUFFERS = 24, 64, 4, 64 * 2**20, 4
# Rows of the residual's norm are as long as a model's, where the message holds one.
_HIDDEN, _EPS = 4096, 1e-5
IN_GRAPH, ONE_BY_ONE = "in CUDA graphs", "one by one"


def products_of(device: str) -> Mapping[str, tuple[int, int]]:
    """Outputs and inputs of the products that are measured on ``cpu`` or ``cuda``, by name."""
    return _PRODUCTS_CPU if device == "cpu" else _PRODUCTS_CUDA


def sizes(low: int, high: int) -> list[int]:
    """Powers of two in bytes, both ends included."""
    found = []
    while low <= high:
        found.append(low)
        low *= 2
    return found


def ping_pong(comm: Communicator, size: int, iters: int) -> list[float]:
    """Seconds of one way between members 0 and the last, half of a round trip; empty on the others (collective)."""
    far = comm.size - 1
    x = torch.zeros(size, dtype=torch.uint8, device=comm.device)
    samples = []
    comm.barrier()
    for i in range(-2, iters):
        start = time.perf_counter()
        if comm.rank == 0:
            comm.send(x, far)
            comm.recv(x, far)
        elif comm.rank == far:
            comm.recv(x, 0)
            comm.send(x, 0)
        if comm.device.type == "cuda":
            torch.cuda.synchronize(comm.device)
        if i >= 0:
            samples.append((time.perf_counter() - start) / 2)
    comm.barrier()
    return samples if comm.rank == 0 else []


def weight_bytes(ranks: int, quick: bool, device: torch.device) -> int:
    """Bytes of weights of one shape on a rank: past every cache, and at most a quarter of the free memory in all."""
    if device.type == "cuda":  # each rank has a device of its own; less than its cache would measure the cache
        free, cache = torch.cuda.mem_get_info(device)[0], _l2_bytes(device)
        least = _LEAST_BYTES if quick else max(_LEAST_BYTES, _CACHES * cache)
        return min(least, free // (4 * len(_PRODUCTS_CUDA)))
    if quick:
        return 16 * 2**20
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        cache = int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1)
    except (OSError, ValueError):
        cache = 0  # some virtual machines hide it
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min(max(_LEAST_BYTES, _CACHES * cache), free // (4 * ranks * len(_PRODUCTS_CPU)))


def _l2_bytes(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


class ProductTimer:
    """The engine's linear on one shape, over weights that no cache holds."""

    def __init__(self, n: int, k: int, nbytes: int, device: torch.device):
        weight = torch.randn(n, k, dtype=torch.float32, device=device).to(torch.bfloat16)
        self.each = n * k * weight.itemsize
        self.weights = [ops.pack_linear(weight.clone()) for _ in range(max(2, nbytes // self.each))]
        self.device, self.k, self.next = device, k, 0
        self._chains: dict[int, tuple[Captured, int]] = {}

    def sample(self, rows: int, least_s: float) -> float:
        """Seconds per weight byte over at least ``least_s`` seconds."""
        if self.device.type == "cuda":
            return self._replayed(rows, least_s)
        x = torch.randn(rows, self.k).to(torch.bfloat16)
        ops.linear(x, self.weights[self.next])
        calls, start = 0, time.perf_counter()
        while True:
            self.next = (self.next + 1) % len(self.weights)
            ops.linear(x, self.weights[self.next])
            calls += 1
            elapsed = time.perf_counter() - start
            if elapsed >= least_s:
                return elapsed / (calls * self.each)

    def _replayed(self, rows: int, least_s: float) -> float:
        """The same by the device's clock, all weights in one graph: a product that is launched alone waits for it."""
        if rows not in self._chains:
            x = torch.randn(rows, self.k, device=self.device).to(torch.bfloat16)
            rounds = max(1, _CHAIN_PRODUCTS // len(self.weights))
            calls = [partial(ops.linear, x, weight) for weight in self.weights * rounds]
            self._chains[rows] = Captured(calls, self.device), len(calls)
            self._chains[rows][0].run()
        chain, length = self._chains[rows]
        runs, elapsed = 0, 0.0
        while elapsed < least_s:
            elapsed += chain.run()
            runs += 1
        return elapsed / (runs * length * self.each)

    def close(self) -> None:
        """Let go of the graphs."""
        for chain, _ in self._chains.values():
            chain.close()
        self._chains.clear()


def products(comm: Communicator, rounds: int, *, quick: bool) -> dict[str, dict[int, list[float]]]:
    """Seconds per weight byte by shape and rows, of the slowest of all ranks at work; rounds outermost (collective)."""
    kind, nbytes = comm.device.type, weight_bytes(comm.size, quick, comm.device)
    timers = {name: ProductTimer(n, k, nbytes, comm.device) for name, (n, k) in products_of(kind).items()}
    # As the engine does at its start for what does not wait for other ranks; leaves CPUs alone.
    ops.tune_products([ops.LinearUse(weight) for timer in timers.values() for weight in timer.weights], PRODUCT_ROWS)
    cells = [(name, rows) for name in timers for rows in PRODUCT_ROWS]
    least_s = _SAMPLE_S[kind] / 10 if quick else _SAMPLE_S[kind]
    table = torch.zeros(rounds, len(cells), dtype=torch.float64)
    for i in range(rounds):
        for j, (name, rows) in enumerate(cells):
            comm.barrier()
            table[i, j] = timers[name].sample(rows, least_s)
    for timer in timers.values():
        timer.close()
    slowest = comm.all_gather(table.unsqueeze(0).to(comm.device), dim=0).max(dim=0).values.tolist()
    found: dict[str, dict[int, list[float]]] = {name: {} for name in timers}
    for j, (name, rows) in enumerate(cells):
        found[name][rows] = [row[j] for row in slowest]
    return found


class Reducer:
    """Times one communicator's all-reduces (collective).

    Args:
        name: of the algorithm; ``ring`` is the study's own.
        pacer: over the same ranks, for barriers.
    """

    def __init__(self, comm: Communicator, name: str, pacer: Communicator, iters: int):
        self.comm, self.name, self.pacer, self.iters = comm, name, pacer, iters
        in_graph = comm.device.type == "cuda" and not comm.uncapturable
        self.timed = IN_GRAPH if in_graph else ONE_BY_ONE

    def plain(self, size: int) -> list[float]:
        """Seconds of all-reduces of ``size`` bytes, in place."""
        xs = [torch.zeros(max(1, size // 2), dtype=torch.bfloat16, device=self.comm.device) for _ in range(_BUFFERS)]
        return self._seconds([partial(_reduce, self.comm, self.name, x) for x in xs], size)

    def with_norm(self, size: int) -> list[float]:
        """The same with the residual and the norm behind it."""
        rows, hidden = rows_of(size)
        blank = partial(torch.zeros, rows, hidden, dtype=torch.bfloat16, device=self.comm.device)
        weight = torch.ones(hidden, dtype=torch.bfloat16, device=self.comm.device)
        calls = [partial(self.comm.all_reduce_rmsnorm, blank(), blank(), weight, _EPS) for _ in range(_BUFFERS)]
        return self._seconds(calls, size)

    def _seconds(self, calls: Sequence[Call], size: int) -> list[float]:
        if self.timed == ONE_BY_ONE:
            return time_collective(self.comm, calls[0], iters=self.iters, warmup=2)
        length = chain_length(size)
        # Any call of all ranks aligns them; in place on zeros, it may come as often as it likes.
        chain = Captured([calls[i % len(calls)] for i in range(length)], self.comm.device, align=calls[0])
        try:
            return time_chain(self.pacer, chain, length, iters=self.iters, warmup=2)
        finally:
            chain.close()


def chain_length(size: int) -> int:
    """All-reduces of ``size`` bytes in one graph: enough that its start does not count, and not for ever."""
    return max(_CHAIN_LEAST, min(_CHAIN_CALLS, _CHAIN_BYTES // size))


def rows_of(size: int) -> tuple[int, int]:
    """Rows and their length in elements of a message of ``size`` bytes (a power of two)."""
    hidden = max(1, min(_HIDDEN, size // 2))
    return max(1, size // 2 // hidden), hidden


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for; collective. Empty on ranks other than 0.

    Raises:
        ConfigError: an algorithm is unknown.
    """
    topology = from_environment(os.environ, ranks_per_node=args.ranks_per_node)
    device = _device(args, topology)
    found: dict[str, Any] = {
        "ranks": topology.world_size, "nodes": topology.num_nodes, "device": device.type, "emulated": "", "skipped": {},
        "timed": {},
    }  # fmt: skip
    init_distributed(topology, timeout_s=args.timeout)
    everyone = range(topology.world_size)

    def create(algorithm: str, **how: Any) -> Communicator:
        how = {"device": device, "algorithm": algorithm, "timeout_s": args.timeout, **how}
        return Communicator.create(topology, everyone, **how)

    with ExitStack() as opened:
        # Barriers between processes without the device, which is to find all of a chain enqueued.
        pacer = (
            opened.enter_context(create("auto", device="cpu", table=[(1 << 62, "torch")]))
            if device.type == "cuda"
            else None
        )
        for name in filter(None, args.algorithms.split(",")):
            try:
                comm = create("rd" if name == "ring" else name)
            except (CommError, ConfigError) as error:
                if args.strict:
                    raise
                found["skipped"][name] = str(error)  # alike on every rank: the choice is a pure function
                continue
            with comm:
                found["emulated"] = comm.emulated or found["emulated"]
                reducer = Reducer(comm, name, pacer or comm, args.iters)
                found["timed"][name] = reducer.timed
                over = sizes(args.low, args.high)
                found.setdefault("all_reduce", {})[name] = {size: reducer.plain(size) for size in over}
                if args.norms:
                    found.setdefault("all_reduce_rmsnorm", {})[name] = {size: reducer.with_norm(size) for size in over}
    if args.ping_pong or args.product_rounds:
        with create("rd" if device.type == "cpu" else "auto") as comm:
            if args.ping_pong:
                found["emulated"] = comm.emulated or found["emulated"]
                found["ping_pong"] = {s: ping_pong(comm, s, args.iters) for s in sizes(args.low, args.high)}
            if args.product_rounds:
                found["products"] = products(comm, args.product_rounds, quick=args.quick)
    return found if topology.rank == 0 else {}


def _device(args: argparse.Namespace, topology: Topology) -> torch.device:
    index = topology.device_index or 0
    if args.device == "cuda":
        device = torch.device("cuda", index % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    from yalis.engine.cores import cores_of_rank

    allowed = sorted(os.sched_getaffinity(0))
    cores, _ = cores_of_rank(allowed, os.cpu_count() or 1, topology, None)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(max(1, len(allowed) // topology.world_size))
    return torch.device("cpu")


def _reduce(comm: Communicator, name: str, x: torch.Tensor) -> None:
    if name == "ring":
        ring_all_reduce(comm, x)
    else:
        comm.all_reduce(x, out=x)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a sweep; ``strict``: an algorithm that cannot serve here is an error, not a line in ``skipped``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--algorithms", default="")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--ping-pong", action="store_true")
    parser.add_argument("--norms", action="store_true", help="all-reduces with residual and norm, too")
    parser.add_argument("--product-rounds", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--low", type=int, default=256)
    parser.add_argument("--high", type=int, default=1 << 20)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=60.0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write; for ranks started by `yalis.study.calibrate`."""
    args = parse(argv)
    found = measure(args)
    if found and args.out is not None:
        args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
