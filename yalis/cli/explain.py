"""``yalis explain``: a record's time per output token as a sum of terms; for two records, what changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yalis.study.explain import Explained

_EPILOG = """examples:
  yalis bench latency --model models/demo --tp 2 --output-json a.json
  yalis explain a.json
  yalis explain a.json b.json"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="a record's time per token as a sum; for two records, what changed",
        description="Break the time per output token of a bench latency record into terms that add up to it. With two "
        "records, say which term made the difference.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("record", type=Path, metavar="RECORD", help="from bench latency --output-json")
    parser.add_argument("other", type=Path, nargs="?", metavar="RECORD2", help="what to compare it with")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the sum, or both and the difference."""
    from yalis.study.explain import explain, read_record

    first = explain(read_record(args.record), str(args.record))
    _print(first)
    if args.other is not None:
        second = explain(read_record(args.other), str(args.other))
        print()
        _print(second)
        _compare(first, second)
    return 0


def _print(found: Explained) -> None:
    from yalis.cli.tables import print_table
    from yalis.study.explain import MOST_UNACCOUNTED

    note = f" [EMULATED network: {found.emulated}]" if found.emulated else ""
    print(f"{found.label}{note}")
    parts = " + ".join(f"{name} {1e3 * value:.3f}" for name, value in found.named())
    print(f"TPOT {1e3 * found.tpot_s:.3f} ms = {parts}")
    rows = [[name, f"{1e3 * v:.3f}", f"{v / found.tpot_s:.1%}"] for name, v in found.named()]
    rows.append(["measured", f"{1e3 * found.tpot_s:.3f}", "100.0%"])
    print_table(["term", "ms", "share"], rows)
    if found.together:
        print("computation: products, attention, launches and the rest together; --profile tells them apart")
    if abs(found.unaccounted_share) > MOST_UNACCOUNTED:
        print(
            f"WARNING: the terms miss the measured time by {found.unaccounted_share:+.1%}, more than "
            f"{MOST_UNACCOUNTED:.0%}: measure with more output tokens and iterations on a quieter machine"
        )


def _compare(first: Explained, second: Explained) -> None:
    from yalis.cli.tables import print_table
    from yalis.study.explain import changes

    delta = second.tpot_s - first.tpot_s
    rows = changes(first, second)
    print()
    print_table(
        ["term", "first ms", "second ms", "change ms"],
        [[name, f"{1e3 * a:.3f}", f"{1e3 * b:.3f}", f"{1e3 * (b - a):+.3f}"] for name, a, b in rows],
    )
    name, before, after = rows[0]
    print(
        f"TPOT {1e3 * first.tpot_s:.3f} -> {1e3 * second.tpot_s:.3f} ms ({delta / first.tpot_s:+.1%}); "
        f"mostly {name}: {1e3 * (after - before):+.3f} ms"
    )
