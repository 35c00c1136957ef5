"""What telling waiting from moving costs: `rd` between two nodes of one rank, with its stamps and without.

    torchrun --nproc-per-node 2 bench/bench_wait_stamps.py [--calls 200]

Between CPU ranks a long message travels as a head and the rest, so that the time until the partner came does not hold
the time that its bytes take. Without, every message is one piece. The two take turns; printed are the 10th percentile
and the median over calls of the longer time of both ranks, in microseconds. What short messages pay is two looks at the
clock in either case.
"""

from __future__ import annotations

import argparse
import os
import sys
from time import perf_counter

import torch

from yalis.bench.harness import percentile
from yalis.comm import Communicator, init_distributed
from yalis.comm.group import WHOLE_BYTES
from yalis.comm.topology import from_environment

SIZES = (2 << 10, 8 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20, 4 << 20)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="timed calls of each kind per size (default: 200)")
    args = parser.parse_args()
    topology = from_environment(os.environ, ranks_per_node=1)
    init_distributed(topology)
    with Communicator.create(topology, range(topology.world_size), algorithm="rd") as comm:
        if comm.rank == 0:
            print(f"{'bytes':>8} {'p10: off':>9} {'on':>9} {'cost':>8} {'p50: off':>9} {'on':>9} {'cost':>8}")
        for nbytes in SIZES:
            x = torch.ones(nbytes // 4)
            samples: dict[int, list[float]] = {sys.maxsize: [], WHOLE_BYTES: []}
            for call in range(args.calls + 5):
                for whole, times in samples.items():
                    comm.group.whole_bytes = whole
                    x.fill_(1.0)
                    comm.barrier()
                    start = perf_counter()
                    comm.all_reduce(x, out=x)
                    if call >= 5:
                        times.append(perf_counter() - start)
            longest = [max_over_ranks(comm, times) for times in samples.values()]
            words = []
            for share in (0.1, 0.5):
                off, on = (1e6 * percentile(times, share) for times in longest)
                words.append(f"{off:9.1f} {on:9.1f} {on - off:+8.1f}")
            if comm.rank == 0:
                print(f"{nbytes:8d} {' '.join(words)}")


def max_over_ranks(comm: Communicator, times: list[float]) -> list[float]:
    """The longest of all ranks, call by call."""
    return comm.all_gather(torch.tensor([times], dtype=torch.float64), dim=0).amax(0).tolist()


if __name__ == "__main__":
    main()
