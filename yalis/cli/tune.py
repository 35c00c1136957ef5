"""``yalis tune``: check and measure the all-reduce on these ranks, and write the table that ``auto`` will follow."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yalis.cli.bench_allreduce import byte_size
from yalis.errors import ConfigError

if TYPE_CHECKING:
    from yalis.comm.communicator import Communicator


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Register ``yalis tune``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune",
        help="measure the all-reduce here and keep the best choice per size",
        description="Check every algorithm and plan for exact sums and equal bits, measure them, and write the table "
        "that all-reduce 'auto' follows on such ranks from then on. The table counts for this version, this device and "
        "this number of nodes and ranks only.",
        epilog="""examples:
  yalis tune --ranks 4
  torchrun --nproc-per-node 4 -m yalis tune -d bfloat16
  srun --nodes 2 --ntasks-per-node 4 yalis tune""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="start so many here (default: join torchrun, srun or mpirun; else 2)")
    add("--ranks-per-node", type=int, metavar="N", help="declare nodes of N ranks, even on one host")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is a GPU")
    add("--against", default="auto", metavar="A[,B]", help="other algorithms to measure (default: all that can serve; "
        "none: NVRAR's plans only)")  # fmt: skip
    add("-b", "--min-bytes", type=byte_size, default=byte_size("2K"), metavar="SIZE", help="default: 2K")
    add("-e", "--max-bytes", type=byte_size, default=byte_size("2M"), metavar="SIZE", help="default: 2M")
    add("-f", "--step-factor", type=float, default=2.0, metavar="X", help="between sizes (default: 2)")
    add("-d", "--dtype", default="bfloat16", metavar="D[,E]", help="float32, bfloat16, float16 (default: bfloat16)")
    add("-n", "--iters", type=int, default=50, metavar="N", help="timed calls of each candidate (default: 50)")
    add("--hidden", type=int, metavar="N", help="row length for the call with residual and norm, at sizes of whole "
        "rows; 0: leave it out (default: 8192 on CUDA, 0 on CPU)")  # fmt: skip
    add("--bind-cores", action="store_true", help="bind each rank to one core, in turn")
    add("--timeout", type=float, default=30.0, metavar="S", help="longest wait for a rank (default: 30 s)")
    add("--output", type=Path, metavar="FILE", help="where to write (default: where auto looks)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Start the ranks, or take part as one; 1 if a candidate failed its check."""
    from yalis.bench.allreduce import message_sizes
    from yalis.launch import is_launched, launch_ranks

    for name, least in (("ranks", 2), ("ranks_per_node", 1), ("iters", 5), ("hidden", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.timeout <= 0:
        raise ConfigError(f"--timeout {args.timeout:g}: must be above 0 seconds")
    message_sizes(args.min_bytes, args.max_bytes, args.step_factor)
    _check_against(args.against)
    if is_launched(os.environ):
        return _take_part(args)
    group = launch_ranks(2 if args.ranks is None else args.ranks, ["yalis", *sys.argv[1:]])
    while (good := group.wait(1.0)) is None:
        pass
    return 0 if good else 1


def _take_part(args: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from yalis.bench.allreduce import message_sizes
    from yalis.bench.tune import tune
    from yalis.comm import tuning
    from yalis.comm.communicator import Communicator, init_distributed
    from yalis.comm.topology import from_environment

    topology = from_environment(os.environ, ranks_per_node=args.ranks_per_node)
    index = topology.device_index or 0
    if args.bind_cores:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = torch.device(kind, index % max(1, torch.cuda.device_count())) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    init_distributed(topology, timeout_s=args.timeout)
    everyone = range(topology.world_size)
    emit: Any = (lambda line: print(line, flush=True)) if topology.rank == 0 else (lambda _: None)
    opened: list[Communicator] = []

    def communicator(algorithm: str, **how: Any) -> Communicator:
        how = {"device": device, "algorithm": algorithm, "timeout_s": args.timeout, **how}
        opened.append(Communicator.create(topology, everyone, **how))
        return opened[-1]

    try:
        # Barriers through shared memory where there is any; a tuned table has nothing to say about them.
        pacer = communicator("auto", device="cpu", table=[(1 << 62, "torch")])
        comm = communicator("nvrar")
        names = _others(args.against, comm)
        others = {name: communicator(name) for name in names}
        emit(f"# {topology.world_size} ranks on {comm.shape.nodes} node(s), {kind}; {args.iters} calls each; median of "
             "the longest over ranks; the best, then the best of every other algorithm")  # fmt: skip
        sizes = message_sizes(args.min_bytes, args.max_bytes, args.step_factor)
        hidden = args.hidden if args.hidden is not None else 8192 if kind == "cuda" else 0
        table, failures = tune(
            comm, others, pacer, sizes, args.dtype.split(","), iters=args.iters, hidden=hidden, emit=emit
        )
        if topology.rank == 0:
            print(f"# wrote {tuning.save(table, args.output)}", flush=True)
        pacer.barrier()
    finally:
        for comm in opened:
            comm.close()
    dist.destroy_process_group()
    return 1 if failures else 0


def _check_against(asked: str) -> None:
    from yalis.comm.policy import ALGORITHMS

    known = [name for name in ALGORITHMS if name not in ("nvrar", "null")]
    for name in asked.split(","):
        if name not in (*known, "auto", "none"):
            raise ConfigError(f"--against {name!r}: must be auto, none, or some of {', '.join(known)}")


def _others(asked: str, comm: Communicator) -> list[str]:
    """Names of the algorithms to measure beside NVRAR."""
    from yalis.comm import policy

    if asked == "none":
        return []
    if asked != "auto":
        names = asked.split(",")
        for name in names:
            policy.check_forced(name, comm.shape)
        return names
    usable = ("torch", "rd", "shm") if comm.device.type == "cpu" else ("torch", "two_shot")
    return [name for name in usable if policy.why_not(name, comm.shape) is None]
