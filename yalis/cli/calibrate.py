"""``yalis calibrate``: measure this machine and write its description for ``yalis plan``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_EPILOG = """examples:
  yalis calibrate --output my-host.toml
  yalis calibrate --output emulated.toml --emulate alpha_s=0.002,bytes_per_s=1e8 --max-ranks 4
  torchrun --nnodes 2 --nproc-per-node 8 ... -m yalis calibrate --device cuda --output cluster.toml
  yalis plan models/demo --cluster my-host.toml --workload 8x128+64 --gpus 1..4"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "calibrate",
        help="measure this machine and describe it for plan",
        description="Measure links, all-reduces, products and whole steps of small models with the engine's own "
        "operations in real ranks, fit the cost model, and write a cluster description, with its raw samples beside "
        "it. Takes minutes, and wants a quiet machine. Under torchrun, srun or mpirun the ranks that are there are the "
        "only group.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="TOML", help="where to write the description")
    parser.add_argument("--max-ranks", type=int, default=4, metavar="N", help="largest group: 1, 2, 4, 8 (default: 4)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is a GPU"
    )
    parser.add_argument("--iters", type=int, default=30, metavar="N", help="timed calls per size (default: 30)")
    parser.add_argument(
        "--all-reduce",
        metavar="NAMES",
        help="on GPUs, only these of nccl (needed), nvrar, symm_mem; default: those of them that serve",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats and smaller messages: a look, not a result")
    parser.add_argument(
        "--emulate",
        metavar="FABRIC",
        help="put an emulated network between declared nodes: alpha_s=...,bytes_per_s=...,loss=...,late=RANK:SECONDS; "
        "the word netns makes the nodes network namespaces, whose rate the kernel keeps (root)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, write."""
    from yalis.comm.emulation import VARIABLE, EmulatedFabric
    from yalis.errors import ConfigError
    from yalis.launch import is_launched
    from yalis.study.calibrate import calibrate, calibrate_launched, effort
    from yalis.study.cluster import load_cluster

    for name, least in (("max_ranks", 1), ("iters", 3)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.output.suffix != ".toml":
        raise ConfigError(f"--output {args.output}: must end in .toml, so that --cluster takes it for a file")
    if not args.output.parent.is_dir():
        raise ConfigError(f"--output {args.output}: the folder does not exist")
    env = {}
    if args.emulate:
        fabric = EmulatedFabric.parse(args.emulate)
        env[VARIABLE] = args.emulate
        print(f"{fabric}: times between nodes are not those of a network")
    elif os.environ.get(VARIABLE):
        raise ConfigError(f"{VARIABLE} is set; say --emulate, so that the description is labelled")
    device = _device(args.device)
    only = _only(args.all_reduce, device)
    much = effort(args.iters, device, quick=args.quick)

    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"  {time.monotonic() - begun:4.0f} s  {line}", flush=True)

    name = args.output.stem
    if is_launched(os.environ):
        if args.emulate:
            raise ConfigError("--emulate needs ranks that are started here; run it without a launcher")
        found = calibrate_launched(name, device=device, much=much, say=say, only=only)
        if found is None:
            return 0
    else:
        most = args.max_ranks if device == "cpu" else min(args.max_ranks, _gpus())
        found = calibrate(name, device=device, max_ranks=most, much=much, say=say, env=env, only=only)
    text, raw = found
    args.output.write_text(text)
    samples = args.output.with_suffix(".samples.json")
    samples.write_text(json.dumps(raw) + "\n")
    cluster = load_cluster(args.output)
    _print(cluster)
    sys.stderr.write(f"wrote {args.output} and {samples}\n")
    return 0


def _only(names: str | None, device: str) -> tuple[str, ...]:
    """The all-reduces that are asked for; empty for all."""
    from yalis.errors import ConfigError
    from yalis.study.calibrate import GPU_ALL_REDUCES

    if names is None:
        return ()
    found = tuple(names.split(","))
    if device == "cpu" or "nccl" not in found or any(name not in GPU_ALL_REDUCES for name in found):
        raise ConfigError(
            f"--all-reduce {names!r}: on GPUs, nccl (which the engine's steps use) and any of "
            f"{', '.join(GPU_ALL_REDUCES[1:])}"
        )
    return found


def _device(name: str) -> str:
    from yalis.errors import ConfigError

    if name == "auto":
        return "cuda" if _gpus() else "cpu"
    if name == "cuda" and not _gpus():
        raise ConfigError("--device cuda: there is no GPU here; use cpu")
    return name


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def _print(cluster: Any) -> None:
    from yalis.cli.tables import print_table

    rows = []
    for fit in cluster.fits:
        for limit, alpha_s, beta_s in fit.segments:
            rate = f"{1 / beta_s / 1e9:.3g}" if beta_s else "-"
            name = fit.algorithm + (" + norm" if fit.norm else "")
            rows.append([name, str(fit.ranks), str(fit.nodes), f"{limit:.0f}", f"{alpha_s * 1e6:.2f}", rate])
    print_table(["all-reduce", "ranks", "nodes", "up to B", "alpha us", "GB/s"], rows, title="\nfitted")
    rows = []
    for r in cluster.rates:
        layer, step = (f"{1e6 * c.value:.0f} ({1e6 * c.low:.0f}-{1e6 * c.high:.0f})" for c in (r.layer_s, r.step_s))
        speed = [1e-9 / s for s in (r.s_per_weight_byte[0], r.high[0], r.low[0])]
        rows.append([f"TP{r.tp} PP{r.pp} x{r.flying}", layer, step, f"{speed[0]:.1f} ({speed[1]:.1f}-{speed[2]:.1f})"])
    if rows:
        print_table(["steps", "layer us", "step us", "weights GB/s a rank"], rows, title="\nthe engine's own steps")
    constants = cluster.constants()
    for key in ("device.memory_bytes_per_s", "device.flops_per_s"):
        c = constants[key]
        print(f"{key}: {c.value:.4g} ({c.low:.4g} to {c.high:.4g}), {c.source}")
