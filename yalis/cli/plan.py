"""``yalis plan``: predict every layout of a model on a cluster, recommend one, and keep the prediction."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yalis.study.plan import Plan

_EPILOG = """examples:
  yalis plan llama-3.1-405b --cluster perlmutter --workload decode-heavy:8 --gpus 8..128
  yalis plan models/demo --cluster cpu-host --workload 8x128+64 --gpus 1..4 --all
  yalis plan llama-3.1-70b --cluster my-machine.toml --objective throughput --json plan.json --plot plan.png"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="predict layouts of a model on a cluster and recommend one",
        description="Predict time, memory and communication of every TP, PP and hybrid layout and all-reduce. "
        "Nothing is measured; the prediction is stored under an id for bench latency --against.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder with config.json, or a shipped shape (llama-3.1-405b)")
    parser.add_argument("--cluster", default="cpu-host", metavar="C", help="shipped name or TOML (default: cpu-host)")
    parser.add_argument(
        "--workload", default="decode-heavy", metavar="W", help="KIND[:BATCH] or BATCHxINPUT+OUTPUT (docs/study.md)"
    )
    parser.add_argument("--gpus", default="2..512", metavar="N", help="LOW..HIGH doubling, or a list (default: 2..512)")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="declare smaller nodes than the cluster's")
    parser.add_argument("--algorithms", metavar="A,B", help="all-reduces to compare (default: the cluster's)")
    parser.add_argument("--objective", default="e2e", metavar="O", help="e2e (default), tpot, ttft or throughput")
    parser.add_argument("--all", action="store_true", help="every all-reduce of a layout, not only the fastest")
    parser.add_argument("--store", type=Path, metavar="DIR", help="where predictions are kept (.yalis/predictions)")
    parser.add_argument("--no-store", action="store_true", help="do not keep this prediction")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole plan")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw time per token by GPUs and layout")
    return parser


def run(args: argparse.Namespace) -> int:
    """Predict, print, keep."""
    from yalis.errors import ConfigError
    from yalis.study.cluster import ALGORITHMS, load_cluster
    from yalis.study.plan import find_model, make_plan, parse_gpus, plan_record
    from yalis.study.store import DEFAULT_STORE, save
    from yalis.study.workload import parse_workload

    algorithms = tuple(args.algorithms.split(",")) if args.algorithms else ()
    for name in algorithms:
        if name not in ALGORITHMS:
            raise ConfigError(f"--algorithms {name!r}: the cost model knows {', '.join(ALGORITHMS)}")
    if args.ranks_per_node is not None and args.ranks_per_node < 1:
        raise ConfigError(f"--ranks-per-node {args.ranks_per_node}: must be at least 1")
    plan = make_plan(
        find_model(args.model),
        load_cluster(args.cluster),
        parse_workload(args.workload),
        parse_gpus(args.gpus),
        objective=args.objective,
        algorithms=algorithms,
        ranks_per_node=args.ranks_per_node,
    )
    _print(plan, everything=args.all)
    record = plan_record(plan)
    if not args.no_store:
        name = save(record, args.store or DEFAULT_STORE)
        print(f"\nprediction {name} (measure it: yalis bench latency ... --against {name})")
    if args.json is not None:
        _write(args.json, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    if args.plot is not None:
        from yalis.study.plots import plot_plan

        _write(args.plot, lambda path: plot_plan(plan, path))
    return 0


def _write(path: Path, writer: Any) -> None:
    from yalis.errors import ConfigError

    try:
        writer(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    sys.stderr.write(f"wrote {path}\n")


def _print(plan: Plan, *, everything: bool) -> None:
    from yalis.cli.tables import print_table

    w = plan.workload
    emulated = ", EMULATED network" if plan.cluster.emulated else ""
    print(
        f"{plan.model} on {plan.cluster.title}{emulated}\n{w.name}: {w.batch} requests of {w.input_len} tokens in and "
        f"{w.output_len} out. Predicted, not measured."
    )
    rows, seen = [], set()
    for p in plan.rows:
        if p.layout in seen and not everything:
            continue
        seen.add(p.layout)
        way = f"{p.algorithm} {p.decode_choice.variant}" if p.layout.tp > 1 else "-"
        mark = "*" if p is plan.best else ""
        rows.append(
            [
                f"{p.layout.name}{mark}",
                str(p.layout.ranks),
                str(p.layout.nodes),
                way,
                f"{p.memory.total / 1e9:.1f}{'' if p.memory.fits else '!'}",
                f"{1e3 * p.ttft.total_s:.1f}",
                f"{1e3 * p.tpot.total_s:.2f}",
                f"{p.e2e_s:.2f}",
                f"{p.throughput:.0f}",
                f"{p.communication_share:.0%}",
            ]
        )
    header = ["layout", "GPUs", "nodes", "all-reduce", "GB/GPU", "TTFT ms", "TPOT ms", "E2E s", "tok/s", "comm"]
    print_table(header, rows)
    available = plan.rows[0].memory.available
    print(f"* recommended; ! does not fit in {available / 1e9:.0f} GB; comm: share of a decode step nothing hides")
    if plan.crossovers:
        print("\nbest all-reduce by message size:")
        for (ranks, nodes), found in sorted(plan.crossovers.items()):
            parts = [f"{name} {variant} from {_size(size)}" for size, name, variant in found]
            print(f"  {ranks} ranks on {nodes} node(s): {', '.join(parts)}")
    if plan.references:
        print(f"\nby formula, one all-reduce of a whole batch's step ({_size(plan.reference_bytes)}), us:")
        for (ranks, nodes), seconds in sorted(plan.references.items()):
            parts = [f"{name} {1e6 * s:.1f}" for name, s in sorted(seconds.items(), key=lambda x: x[1])]
            print(f"  {ranks} ranks on {nodes} node(s): {', '.join(parts)}")
    print(f"\n{plan.reason}")


def _size(nbytes: int) -> str:
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes} B"
