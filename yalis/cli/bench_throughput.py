"""``yalis bench throughput``: options, report and record of `yalis.bench.throughput`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from yalis.cli.engine_options import add_engine_options, engine_options
from yalis.cli.lost_rank import lost_rank_is_told
from yalis.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``yalis bench throughput``."""
    parser.add_argument("--model", required=True, metavar="PATH", help="folder in Hugging Face layout, or a hub id")
    parser.add_argument("--num-prompts", type=int, default=512, metavar="N", help="requests (default: 512)")
    parser.add_argument(
        "--min-len", type=int, default=128, metavar="N", help="shortest input and output (default: 128)"
    )
    parser.add_argument(
        "--max-len", type=int, default=1024, metavar="N", help="longest input and output (default: 1024)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths and prompts (default: 0)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the record")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; on ranks other than 0 of a launch, take part silently."""
    if args.num_prompts < 1:
        raise ConfigError(f"--num-prompts {args.num_prompts}: must be at least 1")
    if not 1 <= args.min_len <= args.max_len:
        raise ConfigError(f"--min-len {args.min_len} --max-len {args.max_len}: must be 1 or more, and in this order")
    import msgspec

    from yalis.bench.throughput import Workload, measure
    from yalis.engine.llm import LLM

    # Random prompts have no prefix in common; looking for one would only take host time.
    options = {"enable_prefix_caching": False} | engine_options(args)
    started = time.perf_counter()
    with LLM(args.model, **options) as llm, lost_rank_is_told():
        ready_s = time.perf_counter() - started
        vocab = int(llm.info["vocab_size"]) if llm.is_root else 1
        workload = Workload.uniform(
            args.num_prompts, low=args.min_len, high=args.max_len, vocab_size=vocab, seed=args.seed
        )
        found = measure(llm, workload)
        if found is None:
            return 0
        times = found.stats.times
        results = {
            "seconds": found.seconds,
            "output_tokens_per_s": workload.output_tokens / found.seconds,
            "total_tokens_per_s": (workload.input_tokens + workload.output_tokens) / found.seconds,
            "requests_per_s": args.num_prompts / found.seconds,
            "host_share": times.host_s / times.total_s if times.total_s else 0.0,
            "decode_share": times.decode_s / times.total_s if times.total_s else 0.0,
            "device_idle_share": times.device_idle_s / times.total_s if times.total_s else 0.0,
            "outside_steps_share": 1.0 - times.total_s / found.seconds,
            "num_preemptions": found.stats.num_preemptions,
            "times": msgspec.to_builtins(times),
        }
        print(
            f"{args.num_prompts} requests, {workload.input_tokens} tokens in, {workload.output_tokens} out, in "
            f"{found.seconds:.2f} s: {results['output_tokens_per_s']:.0f} output tokens/s, "
            f"{results['total_tokens_per_s']:.0f} in all"
        )
        print(
            f"{times.steps} steps ({times.decode_steps} decode steps of fixed size), {found.stats.num_preemptions} "
            f"preemptions; of the steps' time {results['decode_share']:.1%} went into those, "
            f"{results['host_share']:.1%} is the host's, the GPU was idle for {results['device_idle_share']:.1%}; "
            f"ready after {ready_s:.1f} s"
        )
        if args.output_json is not None:
            from yalis.bench.harness import write_record

            shape = {name: getattr(args, name) for name in ("num_prompts", "min_len", "max_len", "seed")}
            write_record(
                args.output_json,
                "throughput",
                config={**shape, "engine": llm.info},
                results={"ready_s": ready_s, **results},
                samples={},
            )
            sys.stderr.write(f"wrote {args.output_json}\n")
    return 0
