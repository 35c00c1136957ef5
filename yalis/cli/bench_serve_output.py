"""What ``yalis bench serve`` shows and writes: the table for people, the record with vLLM's keys and our own."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yalis.bench.harness import check_writable
from yalis.errors import ConfigError

if TYPE_CHECKING:
    from yalis.bench.datasets import Dataset
    from yalis.bench.openai_client import Target
    from yalis.bench.serve import Run
    from yalis.cli.bench_serve import Plan

# Fields of a request's body that differ from request to request.
_VARIES = ("prompt", "messages", "max_tokens", "max_completion_tokens")


def header(args: argparse.Namespace, plan: Plan, target: Target) -> dict[str, Any]:
    """vLLM's keys that say what was asked for."""
    header: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": target.model,
        "tokenizer_id": args.tokenizer or args.model or target.model,
        "num_prompts": args.num_prompts,
        **plan.metadata,
        "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }
    if args.ramp_up_strategy is not None:
        for name in ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps"):
            header[name] = getattr(args, name)
    return header


def own_keys(
    run_: Run, dataset: Dataset, arrivals_text: str, target: Target, failed: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What vLLM's keys do not tell: what was sent and when, by which machine, and what speaks against the numbers."""
    from yalis.utils.machine import machine_record

    good = [r for r in run_.results if r.success]
    return {
        "dataset": dataset.description,
        "arrivals": arrivals_text,
        "body": {key: value for key, value in target.body(dataset.samples[0]).items() if key not in _VARIES},
        "failures": failed,
        "max_arrival_lag_s": run_.max_arrival_lag_s,
        "output_tokens_counted_by": {how: sum(r.counted == how for r in good) for how in ("usage", "events")},
        "requests_with_fewer_events_than_tokens": _bundled(run_),
        "client_machine": machine_record(),
    }


def _bundled(run_: Run) -> int:
    return sum(r.success and len(r.itl_s) + 1 < r.output_len for r in run_.results)


def print_result(
    plan: Plan,
    result: dict[str, Any],
    run_: Run,
    failed: dict[str, dict[str, Any]],
    title: str,
) -> None:
    """Print the table, the failures by kind, and what speaks against the numbers."""
    from yalis.bench.serve_metrics import METRICS
    from yalis.cli.tables import print_table

    print(title)
    counts = [
        ("successful requests", f"{result['completed']}"),
        ("failed requests", f"{result['failed']}"),
        ("duration, s", f"{result['duration']:.2f}"),
        ("input tokens", f"{result['total_input_tokens']}"),
        ("output tokens", f"{result['total_output_tokens']}"),
        ("requests/s", f"{result['request_throughput']:.3f}"),
        ("output tokens/s", f"{result['output_throughput']:.2f}"),
        ("most output tokens in one second", f"{result['max_output_tokens_per_s']:.0f}"),
        ("all tokens/s", f"{result['total_token_throughput']:.2f}"),
        ("most requests within one second", f"{result['max_concurrent_requests']}"),
    ]
    if result["request_goodput"] is not None:
        limits = ", ".join(f"{name} {ms:g} ms" for name, ms in plan.goodput.items())
        counts.append((f"goodput, requests/s within {limits}", f"{result['request_goodput']:.3f}"))
    print_table(["", "value"], [[name, value] for name, value in counts])
    columns = ["mean", "median", "std", *(f"p{p:g}" for p in plan.percentiles)]
    rows = []
    for name in plan.metrics:
        values = [result[f"{column}_{name}_ms"] for column in columns]
        rows.append([METRICS[name], *("-" if v is None else f"{v:.2f}" for v in values)])
    print()
    print_table(["ms", *columns], rows)
    for kind, what in failed.items():
        print(f"failed: {what['count']} x {kind}: {what['first']}")
    if _bundled(run_):
        print(
            f"note: {_bundled(run_)} requests had several tokens in one event, so inter-token latency is that of events"
        )
    if run_.max_arrival_lag_s > 0.1:
        print(f"note: requests were sent up to {run_.max_arrival_lag_s:.2f} s late; this client is a bottleneck")


def result_path(args: argparse.Namespace, model: str) -> Path:
    """Where the result goes: the name asked for, or vLLM's."""
    label = args.label or args.backend
    if args.ramp_up_strategy is not None:
        load = f"ramp-up-{args.ramp_up_strategy}-{args.ramp_up_start_rps}qps-{args.ramp_up_end_rps}qps"
    else:
        load = f"{args.request_rate}qps"
    if args.max_concurrency is not None:
        load += f"-concurrency{args.max_concurrency}"
    name = args.result_filename or f"{label}-{load}-{model.split('/')[-1]}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    return (args.result_dir or Path()) / name


def check_result(args: argparse.Namespace) -> None:
    """Make the result's folder, and refuse one that cannot be written before a request is sent.

    Raises:
        ConfigError: it cannot be made or written.
    """
    path = result_path(args, args.model or "model")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--result-dir {path.parent}: cannot be made ({error.strerror}); name another") from error
    check_writable(path, "--save-result")


def write_result(path: Path, record: dict[str, Any]) -> None:
    """Write the JSON file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the result to {path}: {error.strerror}") from error
    sys.stderr.write(f"wrote {path}\n")
