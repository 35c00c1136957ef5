"""``yalis bench latency``: options, table and record of `yalis.bench.latency`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from yalis.cli.engine_options import add_engine_options, engine_options
from yalis.cli.lost_rank import lost_rank_is_told
from yalis.errors import ConfigError

if TYPE_CHECKING:
    from yalis.engine.llm import LLM
    from yalis.engine.messages import EngineStats


_LABELS = {"latency": "latency", "ttft": "TTFT", "tpot": "TPOT", "first": "all first tokens", "step": "step of batch"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``yalis bench latency``."""
    parser.add_argument("--model", required=True, metavar="PATH", help="folder in Hugging Face layout, or a hub id")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: 8)")
    parser.add_argument("--input-len", type=int, default=32, metavar="N", help="tokens per prompt (default: 32)")
    parser.add_argument("--output-len", type=int, default=128, metavar="N", help="tokens per output (default: 128)")
    parser.add_argument("--num-iters-warmup", type=int, default=3, metavar="N", help="uncounted runs (default: 3)")
    parser.add_argument("--num-iters", type=int, default=10, metavar="N", help="counted runs (default: 10)")
    parser.add_argument(
        "--table",
        action="store_true",
        help="instead of one shape: decode steps at batch 1, 8 and 32 (512 tokens in, 129 out) and the time to the "
        "first tokens of 1 and 8 prompts of 2048",
    )
    parser.add_argument(
        "--null-comm",
        action="store_true",
        help="measure again in an engine that skips every all-reduce (its tokens mean nothing), and report the "
        "difference: communication that computation does not hide",
    )
    parser.add_argument(
        "--null-compute",
        action="store_true",
        help="likewise in an engine that skips products and attention: computation that communication does not hide",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="record one more run: a trace per rank (Chrome's format), and where the time of a step goes",
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the record, raw samples included")
    parser.add_argument(
        "--against", metavar="ID", help="compare with a prediction that yalis plan stored, term by term"
    )
    parser.add_argument("--store", type=Path, metavar="DIR", help="where predictions are kept (.yalis/predictions)")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; on ranks other than 0 of a launch, take part silently."""
    for name in ("batch_size", "input_len", "output_len", "num_iters"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.num_iters_warmup < 0:
        raise ConfigError(f"--num-iters-warmup {args.num_iters_warmup}: must be at least 0")
    prediction = _prediction(args)
    # Prefix reuse would skip the very prefill that is to be timed.
    options = {"enable_prefix_caching": False, "max_num_seqs": max(64, args.batch_size)} | engine_options(args)
    ablations = [ablation for ablation in _ABLATIONS if getattr(args, f"null_{ablation.flag}")]
    for ablation in ablations:
        if options.get(ablation.option) == "null":
            raise ConfigError(
                f"--null-{ablation.flag} compares with --{ablation.option.replace('_', '-')} null by itself; name what "
                "to compare with it"
            )
    found = _measure(args, options)
    if found is not None and prediction is not None:
        found.results["against"] = _print_residuals(args, found, prediction)
    for ablation in ablations:
        if found is not None:
            print(f"\nwithout {ablation.what} (tokens are wrong):")
        silent = _measure(args, options | {ablation.option: "null"})
        if found is not None and silent is not None:
            found.results[f"exposed_{ablation.what}_ms"] = _print_difference(ablation.what, found, silent)
            found.results[f"without_{ablation.what}"] = silent.results
    if found is not None and args.output_json is not None:
        _write(args, found)
    return 0


@dataclass(frozen=True)
class _Ablation:
    """One thing that an engine can leave out: ``--null-FLAG`` sets ``option`` to null and leaves out ``what``."""

    flag: str
    option: str
    what: str


_ABLATIONS = (_Ablation("comm", "all_reduce", "communication"), _Ablation("compute", "compute", "computation"))


@dataclass
class _Found:
    """What one engine gave: its description, the record's results and samples, and the medians to compare."""

    info: Any
    results: dict[str, Any]
    samples: dict[str, list[float]]
    medians_ms: dict[str, float]


def _measure(args: argparse.Namespace, options: dict[str, Any]) -> _Found | None:
    """Measure in an engine of these options and print; None on ranks other than 0 of a launch."""
    from yalis.bench.latency import measure, summary
    from yalis.engine.llm import LLM

    started = time.perf_counter()
    with LLM(args.model, **options) as llm, lost_rank_is_told():
        ready_s = time.perf_counter() - started
        if args.table:
            return _table(llm, args, ready_s)
        shape = {"batch_size": args.batch_size, "input_len": args.input_len, "output_len": args.output_len}
        samples, stats = measure(llm, warmup=args.num_iters_warmup, iters=args.num_iters, profile=args.profile, **shape)
        if not llm.is_root:
            return None
        results = {name: summary(values) for name, values in asdict(samples).items()}
        _print(llm.info, shape, results, stats, ready_s)
        return _Found(
            dict(llm.info),
            {"ready_s": ready_s, "summary_ms": results} | _decode_split(args, stats) | _break_down(args.profile),
            {f"{name}_s": values for name, values in asdict(samples).items()},
            {_LABELS[name]: values["p50"] for name, values in results.items() if values},
        )


def _decode_split(args: argparse.Namespace, stats: EngineStats) -> dict[str, Any]:
    """Terms of a decode step; empty where there is none."""
    from yalis.study.explain import decode_split

    if args.output_len < 2:
        return {}
    tokens = args.num_iters * (args.output_len - 1)
    return {"decode_split_s": decode_split(msgspec.to_builtins(stats.decode_times), tokens)}


def node_count(env: Mapping[str, str], ranks: int, ranks_per_node: int | None) -> int:
    """Nodes that ``ranks`` ranks will stand on: those of the launch, where ``env`` is of one, or those declared.

    Raises:
        TopologyError: the launcher's variables contradict each other, or do not tell the nodes.
    """
    from yalis.comm.topology import from_environment
    from yalis.launch import is_launched

    if is_launched(env):
        return from_environment(env, ranks_per_node=ranks_per_node).num_nodes
    return max(1, ranks // (ranks_per_node or ranks))


def _prediction(args: argparse.Namespace) -> dict[str, Any] | None:
    """The stored prediction of this very run; checked before anything is measured."""
    if args.against is None:
        return None
    if args.table:
        raise ConfigError("--against compares one shape; leave --table out")
    from yalis.study.store import DEFAULT_STORE, load, match

    options = engine_options(args)
    tp, pp = options.get("tensor_parallel_size", 1), options.get("pipeline_parallel_size", 1)
    row: dict[str, Any] = match(
        load(args.against, args.store or DEFAULT_STORE),
        tp=tp,
        pp=pp,
        nodes=node_count(os.environ, tp * pp, options.get("ranks_per_node")),
        all_reduce=options.get("all_reduce", "auto"),
        workload={"batch": args.batch_size, "input_len": args.input_len, "output_len": args.output_len},
    )
    return row


def _print_residuals(args: argparse.Namespace, found: _Found, row: dict[str, Any]) -> dict[str, Any]:
    """Print and return predicted, measured and residual of every term."""
    from yalis.cli.tables import print_table
    from yalis.study.explain import measured_terms
    from yalis.study.store import residuals

    shape = {name: getattr(args, name) for name in ("batch_size", "input_len", "output_len")}
    if "decode_split_s" in found.results:
        measured = measured_terms({"results": found.results, "config": {**shape, "engine": found.info}})
    else:
        measured = {"ttft_s": found.results["summary_ms"]["first"]["p50"] / 1e3}
    rows = residuals(row, measured)
    print(f"\nagainst prediction {args.against}:")
    print_table(
        ["ms", "predicted", "measured", "residual", "of measured"],
        [
            [name, f"{1e3 * p:.3f}", "-", "-", "-"]
            if m is None
            else [
                name,
                f"{1e3 * p:.3f}",
                f"{1e3 * m:.3f}",
                f"{1e3 * (m - p):+.3f}",
                f"{(p - m) / m:+.1%}" if m else "-",
            ]
            for name, p, m in rows
        ],
    )
    return {"id": args.against, "rows": [{"name": n, "predicted_s": p, "measured_s": m} for n, p, m in rows]}


def _write(args: argparse.Namespace, found: _Found) -> None:
    from yalis.bench.harness import write_record

    shape = {} if args.table else {n: getattr(args, n) for n in ("batch_size", "input_len", "output_len")}
    config = {**shape, "iters": args.num_iters, "warmup": args.num_iters_warmup, "engine": found.info}
    kind = "latency-table" if args.table else "latency"
    write_record(args.output_json, kind, config=config, results=found.results, samples=found.samples)
    sys.stderr.write(f"wrote {args.output_json}\n")


def _print_difference(what: str, found: _Found, silent: _Found) -> dict[str, float]:
    """Print and return, in milliseconds, what communication or computation adds to each median."""
    from yalis.cli.tables import print_table

    exposed = {name: value - silent.medians_ms[name] for name, value in found.medians_ms.items()}
    print(f"\nexposed {what}, medians:")
    rows = [
        [name, f"{value:.3f}", f"{silent.medians_ms[name]:.3f}", f"{exposed[name]:.3f}", f"{exposed[name] / value:.1%}"]
        for name, value in found.medians_ms.items()
        if value
    ]
    print_table(["ms", "with", "without", "exposed", "share"], rows)
    return exposed


def _table(llm: LLM, args: argparse.Namespace, ready_s: float) -> _Found | None:
    from yalis.bench.harness import summarize
    from yalis.bench.latency import measure_table

    cells = measure_table(llm, warmup=args.num_iters_warmup, iters=args.num_iters, profile=args.profile)
    if not llm.is_root:
        return None
    from yalis.cli.tables import print_table

    _print_engine(llm.info, f"ready after {ready_s:.1f} s")
    rows, results = [], {}
    for cell in cells:
        found = {name: 1e3 * value for name, value in summarize(cell.value).items() if name != "spread"}
        times = cell.stats.times
        idle = times.device_idle_s / times.total_s if times.total_s else 0.0
        host = times.host_s / times.total_s if times.total_s else 0.0
        what = "step" if cell.samples.step else "first tokens"
        rows.append(
            [
                cell.shape.name,
                what,
                *(f"{found[k]:.3f}" for k in ("median", "p10", "p90")),
                f"{host:.1%}",
                f"{idle:.1%}",
            ]
        )
        results[cell.shape.name] = {"what": what, "ms": found, "times": msgspec.to_builtins(times)}
    broken_down = (
        {} if args.profile is None else {c.shape.name: _break_down(args.profile / c.shape.name) for c in cells}
    )
    print_table(["shape", "ms per", "median", "p10", "p90", "host", "GPU idle"], rows)
    return _Found(
        dict(llm.info),
        {"ready_s": ready_s, "cells": results, "breakdown": broken_down},
        {f"{c.shape.name}.{n}_s": values for c in cells for n, values in asdict(c.samples).items() if values},
        {name: cell["ms"]["median"] for name, cell in results.items()},
    )


def _break_down(folder: Path | None) -> dict[str, Any]:
    """Print where the time of a step goes on rank 0, from the latest trace in ``folder``; the same for the record."""
    if folder is None:
        return {}
    from yalis.cli.bench_breakdown import print_breakdown

    traces = sorted(folder.glob("*-rank0-*.json"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise ConfigError(f"{folder} holds no trace of rank 0: the log says why it could not be written")
    return {"breakdown": print_breakdown(traces[-1])}


def _print_engine(info: Any, words: str) -> None:
    graphs = f", CUDA graphs for batch {info['cuda_graphs']}" if info.get("cuda_graphs") else ""
    if info.get("prefill_cuda_graphs"):
        graphs += f", for prompts of {info['prefill_cuda_graphs']} tokens"
    print(
        f"{info['model']}: {info['dtype']} on {info['device']}, TP {info['tensor_parallel_size']} x PP "
        f"{info['pipeline_parallel_size']}, attention {info['attention_backend']}, all-reduce {info['all_reduce']}"
        f"{graphs}; {words}"
    )


def _print(
    info: Any, shape: dict[str, int], results: dict[str, dict[str, float]], stats: EngineStats, ready_s: float
) -> None:
    from yalis.cli.tables import print_table

    batch, out = shape["batch_size"], shape["output_len"]
    _print_engine(info, f"batch {batch}, {shape['input_len']} tokens in, {out} out; ready after {ready_s:.1f} s")
    rows = [
        [
            _LABELS[name],
            *(f"{values[k]:.2f}" for k in ("mean", "min", "p50", "p90", "p99", "max")),
        ]
        for name, values in results.items()
        if values
    ]
    print_table(["ms", "mean", "min", "p50", "p90", "p99", "max"], rows)
    print(f"throughput: {batch * out / (results['latency']['mean'] / 1e3):.1f} output tokens/s")
    times = stats.times
    if times.steps:
        per = 1e3 / times.steps
        reduce_s = times.intra_s + times.inter_s + times.flat_s
        print(
            f"step on rank 0: {times.total_s * per:.2f} ms = compute {times.compute_s * per:.2f} + all-reduce "
            f"{reduce_s * per:.2f} + stages {times.pipeline_s * per:.2f} + host {times.host_s * per:.2f} "
            f"({times.steps} steps, prefill included)"
        )
