"""What a rank of a calibration measures apart from the engine: ping-pong, all-reduces by size, products by shape and
rows. ``python -m`` entry, or `measure` in a rank that a launcher started.

Rank 0 writes one JSON file; times are raw seconds of single calls, the longest over ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from yalis.bench.harness import time_collective
from yalis.comm.communicator import Communicator, init_distributed
from yalis.comm.topology import Topology, from_environment
from yalis.errors import CommError, ConfigError
from yalis.kernels import ops
from yalis.study.ring import ring_all_reduce

# Outputs x inputs of a product: more outputs, more inputs, and one that a cache of any size would hold.
PRODUCTS = {"wide": (8192, 1024), "tall": (1024, 8192), "small": (512, 512)}
PRODUCT_ROWS = (1, 8, 64, 512)
# A sample lasts at least so long: a host's memory changes its speed within milliseconds.
_SAMPLE_S = 0.05
# Weights of one shape that a rank goes through before it meets the first again, so that none comes out of a cache.
_LEAST_BYTES, _CACHES = 512 * 2**20, 16


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


def weight_bytes(ranks: int, quick: bool) -> int:
    """Bytes of weights of one shape on a rank: past every cache, and at most a quarter of the free memory in all."""
    if quick:
        return 16 * 2**20
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        cache = int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1)
    except (OSError, ValueError):
        cache = 0  # some virtual machines hide it
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min(max(_LEAST_BYTES, _CACHES * cache), free // (4 * ranks * len(PRODUCTS)))


class ProductTimer:
    """The engine's linear on one shape, over weights that no cache holds."""

    def __init__(self, n: int, k: int, nbytes: int, device: torch.device):
        weight = torch.randn(n, k, dtype=torch.float32).to(torch.bfloat16).to(device)
        self.each = n * k * weight.itemsize
        self.weights = [ops.pack_linear(weight.clone()) for _ in range(max(2, nbytes // self.each))]
        self.device, self.k, self.next = device, k, 0

    def sample(self, rows: int, least_s: float) -> float:
        """Seconds per weight byte over at least ``least_s`` seconds."""
        x = torch.randn(rows, self.k).to(torch.bfloat16).to(self.device)
        on_cuda = self.device.type == "cuda"
        burst = 64 if on_cuda else 1  # launches must not wait for the clock
        ops.linear(x, self.weights[self.next])
        if on_cuda:
            torch.cuda.synchronize(self.device)
        calls, start = 0, time.perf_counter()
        while True:
            for _ in range(burst):
                self.next = (self.next + 1) % len(self.weights)
                ops.linear(x, self.weights[self.next])
            if on_cuda:
                torch.cuda.synchronize(self.device)
            calls += burst
            elapsed = time.perf_counter() - start
            if elapsed >= least_s:
                return elapsed / (calls * self.each)


def products(comm: Communicator, rounds: int, *, quick: bool) -> dict[str, dict[int, list[float]]]:
    """Seconds per weight byte by shape and rows, of the slowest of all ranks at work; rounds outermost (collective)."""
    nbytes = weight_bytes(comm.size, quick)
    timers = {name: ProductTimer(n, k, nbytes, comm.device) for name, (n, k) in PRODUCTS.items()}
    cells = [(name, rows) for name in timers for rows in PRODUCT_ROWS]
    table = torch.zeros(rounds, len(cells), dtype=torch.float64)
    for i in range(rounds):
        for j, (name, rows) in enumerate(cells):
            comm.barrier()
            table[i, j] = timers[name].sample(rows, _SAMPLE_S / 10 if quick else _SAMPLE_S)
    slowest = comm.all_gather(table.unsqueeze(0).to(comm.device), dim=0).max(dim=0).values.tolist()
    found: dict[str, dict[int, list[float]]] = {name: {} for name in timers}
    for j, (name, rows) in enumerate(cells):
        found[name][rows] = [row[j] for row in slowest]
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for; collective. Empty on ranks other than 0.

    Raises:
        ConfigError: an algorithm is unknown.
    """
    topology = from_environment(os.environ, ranks_per_node=args.ranks_per_node)
    device = _device(args, topology)
    found: dict[str, Any] = {"ranks": topology.world_size, "nodes": topology.num_nodes, "emulated": "", "skipped": {}}
    init_distributed(topology, timeout_s=args.timeout)
    everyone = range(topology.world_size)

    def create(algorithm: str) -> Communicator:
        return Communicator.create(topology, everyone, device=device, algorithm=algorithm, timeout_s=args.timeout)

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
            times = {}
            for size in sizes(args.low, args.high):
                x = torch.zeros(max(1, size // 2), dtype=torch.bfloat16, device=device)
                times[size] = time_collective(comm, _call(comm, name, x), iters=args.iters, warmup=2)
            found.setdefault("all_reduce", {})[name] = times
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


def _call(comm: Communicator, name: str, x: torch.Tensor) -> Any:
    if name == "ring":
        return lambda: ring_all_reduce(comm, x)
    return lambda: comm.all_reduce(x, out=x)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a sweep; ``strict``: an algorithm that cannot serve here is an error, not a line in ``skipped``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--algorithms", default="")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--ping-pong", action="store_true")
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
