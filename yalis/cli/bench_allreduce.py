"""``yalis bench allreduce``: options, launch and record of `yalis.bench.allreduce`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from yalis.errors import ConfigError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def byte_size(text: str) -> int:
    """``8192``, ``8K``, ``2M`` or ``1G`` in bytes (powers of 1024)."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 8192, 8K, 2M or 1G")
    return int(match.group(1)) * _UNITS[match.group(2)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``yalis bench allreduce``; the short ones are nccl-tests'."""
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="start so many ranks here (default: join torchrun, srun or mpirun; else 2)",
    )
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="declare nodes of N ranks, even on one host")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is a GPU"
    )
    parser.add_argument(
        "--algorithm",
        default="auto",
        metavar="A[,B]",
        help="auto, torch, rd, shm, nvrar, two_shot, symm_mem; several take turns",
    )
    parser.add_argument(
        "-b", "--min-bytes", type=byte_size, default=byte_size("2K"), metavar="SIZE", help="default: 2K"
    )
    parser.add_argument(
        "-e", "--max-bytes", type=byte_size, default=byte_size("2M"), metavar="SIZE", help="default: 2M"
    )
    parser.add_argument("-f", "--step-factor", type=float, default=2.0, metavar="X", help="between sizes (default: 2)")
    parser.add_argument(
        "-d", "--dtype", default="bfloat16", metavar="D[,E]", help="float32, bfloat16, float16 (default: bfloat16)"
    )
    parser.add_argument("-n", "--iters", type=int, default=100, metavar="N", help="timed calls per row (default: 100)")
    parser.add_argument("-w", "--warmup", type=int, default=20, metavar="N", help="calls before them (default: 20)")
    parser.add_argument("--bind-cores", action="store_true", help="bind each rank to one core, in turn")
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="longest wait for a rank (default: 30 s)"
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the record, raw samples included")


def run(args: argparse.Namespace) -> int:
    """Start the ranks, or take part as one; 1 if a value was wrong."""
    _check(args)
    from yalis.launch import is_launched, launch_ranks

    if is_launched(os.environ):
        if args.ranks is not None and args.ranks != _world_size():
            raise ConfigError(f"--ranks {args.ranks} under a launcher that started {_world_size()}; leave --ranks out")
        return _take_part(args)
    ranks = 2 if args.ranks is None else args.ranks
    if ranks == 1:
        return _take_part(args)
    group = launch_ranks(ranks, ["yalis", *sys.argv[1:]])
    while (good := group.wait(1.0)) is None:
        pass
    return 0 if good else 1


def _check(args: argparse.Namespace) -> None:
    from yalis.bench.allreduce import DTYPES, message_sizes
    from yalis.comm.policy import check_name

    for name, least in (("ranks", 1), ("ranks_per_node", 1), ("iters", 1), ("warmup", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.timeout <= 0:
        raise ConfigError(f"--timeout {args.timeout:g}: must be above 0 seconds")
    for name in args.dtype.split(","):
        if name not in DTYPES:
            raise ConfigError(f"--dtype {name!r}: must be one of {', '.join(DTYPES)}")
    for name in args.algorithm.split(","):
        check_name(name)
    message_sizes(args.min_bytes, args.max_bytes, args.step_factor)


def _world_size() -> int:
    from yalis.comm.topology import from_environment

    return from_environment(os.environ, ranks_per_node=1).world_size


def _take_part(args: argparse.Namespace) -> int:
    import torch

    from yalis.bench.allreduce import message_sizes, run_allreduce_bench
    from yalis.bench.harness import write_record
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
    comms: list[Communicator] = []
    lines: Any = (lambda line: print(line, flush=True)) if topology.rank == 0 else (lambda _: None)
    try:
        for name in args.algorithm.split(","):
            comms.append(
                Communicator.create(
                    topology, range(topology.world_size), device=device, algorithm=name, timeout_s=args.timeout
                )
            )
        sizes = message_sizes(args.min_bytes, args.max_bytes, args.step_factor)
        rows = run_allreduce_bench(
            comms, sizes, args.dtype.split(","), iters=args.iters, warmup=args.warmup, emit=lines
        )
        comms[0].barrier()
    finally:
        for comm in comms:
            comm.close()
    if args.output_json is not None and topology.rank == 0:
        write_record(
            args.output_json,
            "allreduce",
            config={
                "ranks": topology.world_size,
                "ranks_per_node": topology.ranks_per_node,
                "device": kind,
                "algorithms": args.algorithm.split(","),
                "iters": args.iters,
                "warmup": args.warmup,
                "bind_cores": args.bind_cores,
            },
            results=[row.as_dict() for row in rows],
            samples={
                f"{row.type}/{row.size}/{row.algorithm}/{place}_us": getattr(row, place).samples
                for row in rows
                for place in ("out_of_place", "in_place")
            },
        )
        sys.stderr.write(f"wrote {args.output_json}\n")
    return 1 if any(row.out_of_place.nwrong + row.in_place.nwrong for row in rows) else 0
