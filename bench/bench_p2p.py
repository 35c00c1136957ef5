"""Messages between two ranks of one host, shared memory against torch's backend: the table of docs/communicator.md.

    python bench/bench_p2p.py [--iters 300] [--output-json FILE]

One way, half of a round trip of `Communicator.send` and `recv`, bf16, each rank bound to a core; both ways in turn at
every size, in microseconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from yalis.bench.harness import summarize, write_record
from yalis.comm import Communicator, init_distributed
from yalis.comm.topology import from_environment
from yalis.launch import is_launched, launch_ranks

SIZES = [1 << n for n in range(13, 22)]
WAYS = ("auto", "torch")  # with and without the node's shared memory


def one_way(comm: Communicator, nbytes: int, iters: int, warmup: int) -> list[float]:
    """Microseconds one way, a sample per round trip."""
    x = torch.zeros(nbytes // 2, dtype=torch.bfloat16)
    samples = []
    comm.barrier()
    for i in range(-warmup, iters):
        start = time.perf_counter()
        if comm.rank == 0:
            comm.send(x, 1)
            comm.recv(x, 1)
        else:
            comm.recv(x, 0)
            comm.send(x, 0)
        if i >= 0:
            samples.append((time.perf_counter() - start) / 2 * 1e6)
    return samples


def main() -> int:
    """Start two ranks, or take part as one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=300, help="timed round trips per size and way (default: 300)")
    parser.add_argument("--output-json", type=Path, help="write the record")
    args = parser.parse_args()
    if not is_launched(os.environ):
        group = launch_ranks(2, ["bench.bench_p2p", *sys.argv[1:]])
        while (good := group.wait(1.0)) is None:
            pass
        return 0 if good else 1
    topology = from_environment(os.environ)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[topology.rank % len(cores)]})
    torch.set_num_threads(1)
    init_distributed(topology)
    comms = {way: Communicator.create(topology, [0, 1], algorithm=way) for way in WAYS}
    samples = {}
    for nbytes in SIZES:
        for way, comm in comms.items():
            samples[f"{nbytes}/{way}_us"] = one_way(comm, nbytes, args.iters, warmup=30)
    for comm in comms.values():
        comm.close()
    if topology.rank:
        return 0
    print("| bytes | shared memory | torch (gloo) | ratio |\n|---:|---:|---:|---:|")
    for nbytes in SIZES:
        found = [summarize(samples[f"{nbytes}/{way}_us"]) for way in WAYS]
        cells = [f"{s['median']:.1f} ({s['p10']:.1f}-{s['p90']:.1f})" for s in found]
        print(f"| {nbytes} | {' | '.join(cells)} | {found[1]['median'] / found[0]['median']:.2g}x |")
    if args.output_json is not None:
        write_record(args.output_json, "p2p", config={"iters": args.iters}, results={}, samples=samples)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
