"""``yalis build``: compile the native all-reduce libraries ahead of time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from yalis.errors import BuildError


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Register ``yalis build``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "build",
        help="compile the all-reduce libraries ahead of time",
        description="Compile the all-reduce libraries (csrc/nvrar.h) ahead of time. Without this they are compiled on "
        "first use, in seconds.",
        epilog="""examples:
  yalis build                                  what this machine can build, into the cache
  yalis build --library cuda --arch 80,90,100
  yalis build --output /shared/yalis           then set YALIS_NVRAR_DIR=/shared/yalis on every node""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--library", choices=("all", "cuda", "host"), default="all", help="default: all that can be built here"
    )
    parser.add_argument(
        "--arch", default="80,90,100", metavar="A[,B]", help="compute capabilities of the CUDA library (80,90,100)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write libraries and manifest there")
    return parser


def run(args: argparse.Namespace) -> int:
    """Build and print the paths; raises `BuildError` when nothing could be built, or what was asked for could not."""
    from yalis.comm.nvrar import build

    archs = build.parse_architectures(args.arch)
    kinds: list[build.Kind] = []
    left_out = []
    for kind in get_args(build.Kind):
        if args.library not in ("all", kind):
            continue
        try:
            build.recipe(kind, archs)
            kinds.append(kind)
        except BuildError as error:
            if args.library == kind:
                raise
            left_out.append(f"{kind}: {error}")
    if not kinds:
        raise BuildError("; ".join(left_out))
    for path in build.build_ahead(kinds, archs, args.output):
        print(path)
    for reason in left_out:
        print(f"left out {reason}")
    return 0
