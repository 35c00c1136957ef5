"""The communicator of yalis in a program of your own, without the engine.

    torchrun --nproc-per-node 2 examples/allreduce_library.py
    torchrun --nproc-per-node 4 examples/allreduce_library.py --ranks-per-node 2 --all-reduce nvrar
    srun --nodes 2 --ntasks-per-node 4 python examples/allreduce_library.py

On GPUs where there are some, else on CPU. Shows: a checked sum, the policy in effect, the fused residual add and
RMSNorm, a torch.compile graph that holds an all-reduce, a CUDA graph (on GPUs), and which algorithm served.
"""

from __future__ import annotations

import argparse
import os
import time

import torch

from yalis.comm import Communicator, init_distributed
from yalis.comm.topology import from_environment


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all-reduce", default="auto", help="auto, nvrar, shm, rd, two_shot, torch (default: auto)")
    parser.add_argument("--ranks-per-node", type=int, help="declare nodes of so many ranks")
    args = parser.parse_args()

    topology = from_environment(os.environ, ranks_per_node=args.ranks_per_node)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", (topology.device_index or 0) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    init_distributed(topology, timeout_s=30)
    everyone = range(topology.world_size)
    with Communicator.create(topology, everyone, device=device, algorithm=args.all_reduce, timeout_s=30) as comm:

        def say(words: str) -> None:
            if comm.rank == 0:
                print(words, flush=True)

        say(f"{comm.size} ranks on {comm.shape.nodes} node(s), {device.type}; bfloat16: {'; '.join(comm.explain())}")

        x = torch.full((8, 1024), comm.rank + 1.0, dtype=torch.bfloat16, device=device)
        total = comm.all_reduce(x, tag="example")  # tag: the name of the call site in errors and profiles
        assert bool((total == comm.size * (comm.size + 1) // 2).all())
        say("sum: right on every rank")

        residual = torch.ones_like(x)
        weight = torch.ones(1024, dtype=torch.bfloat16, device=device)
        normed, residual = comm.all_reduce_rmsnorm(x.clone(), residual, weight, 1e-5, tag="example")
        say(f"residual add and RMSNorm: residual {float(residual[0, 0]):g}, normed {float(normed[0, 0]):g}")

        @torch.compile(backend="aot_eager", fullgraph=True)
        def layer(y: torch.Tensor) -> torch.Tensor:
            return comm.all_reduce(y * 2) + 1

        assert torch.equal(layer(x), comm.all_reduce(x * 2) + 1)
        say("torch.compile: one graph, same result")

        if device.type == "cuda":
            graph, out = torch.cuda.CUDAGraph(), torch.empty_like(x)
            with torch.cuda.graph(graph):
                comm.all_reduce(x, out=out)
            for _ in range(3):
                graph.replay()
            torch.cuda.synchronize()
            comm.check()  # a replayed graph raises nothing by itself
            assert torch.equal(out, total)
            say("CUDA graph: same result")

        comm.stats.reset()
        start = time.perf_counter()
        for _ in range(100):
            comm.all_reduce(x, out=x)
            x.fill_(1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = (time.perf_counter() - start) / 100
        say(f"100 all-reduces of {x.nbytes} bytes: {took * 1e6:.1f} us each; served by {comm.stats.algorithms}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
