"""``yalis bench breakdown``: where the time of a step goes, from traces."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``yalis bench breakdown``."""
    parser.add_argument(
        "trace", type=Path, nargs="+", metavar="TRACE", help="traces of ranks, as --profile writes them"
    )
    parser.add_argument("--all-steps", action="store_true", help="look at every step, not at decode steps only")
    parser.add_argument(
        "--kernels", type=int, default=12, metavar="N", help="most expensive kernels to name (default: 12)"
    )


def run(args: argparse.Namespace) -> int:
    """Print a table per trace."""
    for trace in args.trace:
        print(f"{trace}:")
        print_breakdown(trace, kind="all" if args.all_steps else "decode", top=args.kernels)
    return 0


def print_breakdown(trace: Path, *, kind: str = "decode", top: int = 12) -> dict[str, Any]:
    """Print one trace's breakdown; returns it for records."""
    from yalis.bench.breakdown import PARTS, break_down, read_trace
    from yalis.cli.tables import print_table

    read = read_trace(trace)
    found = break_down(read.events, kind, top=top, calls_us=read.calls_us)
    where = "the GPU" if found.on_device else "the host, by operators and ranges: there is no GPU in the trace"
    print(f"{found.steps} steps of {found.step_us / 1e3:.3f} ms on {where}")
    rows = [[part, f"{found.parts_us[part]:.1f}", f"{found.parts_us[part] / found.step_us:.1%}"] for part in PARTS]
    if found.wait_us is not None:
        at = PARTS.index("all-reduce") + 1
        rows.insert(at, ["  of it waiting", f"{found.wait_us:.1f}", f"{found.wait_us / found.step_us:.1%}"])
    rows.append(["sum", f"{sum(found.parts_us.values()):.1f}", f"{sum(found.parts_us.values()) / found.step_us:.1%}"])
    print_table(["part", "us per step", "share"], rows)
    if found.kernels:
        rows = [[k.name[:80], k.part, f"{k.us:.1f}", f"{k.launches:g}"] for k in found.kernels]
        print_table(["kernel", "part", "us per step", "launches"], rows)
    return asdict(found)
