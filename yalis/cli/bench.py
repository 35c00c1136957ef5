"""``yalis bench``: measure one thing. Each measurement is a module with ``add_arguments(parser)`` and ``run(args)``."""

from __future__ import annotations

import argparse
import importlib
import os
from typing import Any

# Imported only when help on them, or they themselves, are asked for: name -> (module, summary, examples).
BENCHES = {
    "allreduce": (
        "yalis.cli.bench_allreduce",
        "speed of all-reduce between ranks, in nccl-tests' columns",
        """examples:
  yalis bench allreduce --ranks 2
  yalis bench allreduce --ranks 4 --ranks-per-node 2 --algorithm rd,torch -b 8K -e 2M
  torchrun --nnodes 2 --nproc-per-node 8 ... -m yalis bench allreduce --output-json result.json""",
    ),
    "latency": (
        "yalis.cli.bench_latency",
        "latency of the engine for one batch of prompts",
        """examples:
  yalis bench latency --model models/demo --batch-size 1 --input-len 128 --output-len 64
  yalis bench latency --model models/demo --tp 2 --output-json result.json
  yalis bench latency --model bench/shapes/llama-3.1-8b --load-format dummy --max-model-len 4096 --table
  yalis bench latency --model models/demo --batch-size 8 --profile traces""",
    ),
    "throughput": (
        "yalis.cli.bench_throughput",
        "throughput of many requests at once, offline",
        """examples:
  yalis bench throughput --model models/demo --num-prompts 32 --min-len 16 --max-len 64
  yalis bench throughput --model bench/shapes/llama-3.1-8b --load-format dummy --max-num-seqs 256""",
    ),
    "breakdown": (
        "yalis.cli.bench_breakdown",
        "parts of a step's time, from traces",
        """examples:
  yalis bench breakdown traces/*.json""",
    ),
    "serve": (
        "yalis.cli.bench_serve",
        "behaviour of any OpenAI-compatible server under load",
        """examples:
  yalis bench serve --model models/demo --num-prompts 100 --input-len 128 --output-len 64 --request-rate 8
  yalis bench serve --backend openai-chat --dataset-name jsonl --dataset-path prompts.jsonl --max-concurrency 4
  yalis bench serve --dataset-name burstgpt --dataset-path BurstGPT_1.csv --burstgpt-time-scale 10 --plot run.png""",
    ),
}


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Register ``yalis bench`` and its measurements."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure latency of the engine, speed of all-reduce, a server under load",
        description="Measure one thing, and say on what.",
        epilog="examples:\n  yalis bench allreduce --ranks 2\n  yalis bench latency --model models/demo --batch-size 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner = parser.add_subparsers(dest="bench", metavar="WHAT", title="measurements", required=True)
    for name, (module, summary, examples) in BENCHES.items():
        child = inner.add_parser(
            name,
            help=summary,
            description=f"Measure the {summary}.",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        importlib.import_module(module).add_arguments(child)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the chosen measurement; what it is to write must be writable before anything is measured."""
    from yalis.bench.harness import check_writable
    from yalis.comm.topology import from_environment

    files = {f"--{name.replace('_', '-')}": getattr(args, name, None) for name in ("output_json", "plot")}
    wanted = {option: path for option, path in files.items() if path is not None}
    if wanted and from_environment(os.environ, ranks_per_node=1).rank == 0:
        for option, path in wanted.items():
            check_writable(path, option)
    code: int = importlib.import_module(BENCHES[args.bench][0]).run(args)
    return code
