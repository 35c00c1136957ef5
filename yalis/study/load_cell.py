"""A cell of requests that arrive over time, sent to a server as `yalis bench serve` does. ``python -m`` entry.

The server is one that runs already (``--url``), or yalis's own, started here on a free port and ended afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from yalis.bench.arrivals import Arrivals
from yalis.bench.datasets import Sample, Vocabulary, burstgpt_dataset, random_dataset
from yalis.bench.harness import write_record
from yalis.bench.latency import summary
from yalis.bench.openai_client import Target
from yalis.bench.serve import Run, checked_url, run_load, wait_until_ready
from yalis.bench.serve_metrics import samples as samples_by_metric
from yalis.errors import ConfigError
from yalis.study.grid import Load
from yalis.study.netns import end_in_order_at_sigterm
from yalis.study.peers import check_answers
from yalis.study.run import end_tree

_SEED = 0
_START_S = 600.0  # a large checkpoint is read from disk; the cell's own limit is usually shorter
_POLL_S = 0.1
_LISTENING = re.compile(r"listening on (http://\S+?),")


@contextmanager
def yalis_server(model: str, options: Sequence[str]) -> Iterator[str]:
    """URL of a server of our own.

    Raises:
        ConfigError: it ended, or did not listen within `_START_S`.
    """
    command = [sys.executable, "-m", "yalis", "serve", model, "--port", "0", *options]
    with tempfile.TemporaryFile("w+", errors="replace") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words, text=True)
        try:
            yield _url(process, words)
        finally:
            end_tree(process)


def _url(process: subprocess.Popen[str], words: Any) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        words.seek(0)
        said = words.read()
        found = _LISTENING.search(said)
        if found:
            return found[1]
        if process.poll() is not None:
            raise ConfigError(f"yalis serve ended before it listened: {said.strip()[-2000:]}")
        time.sleep(_POLL_S)
    raise ConfigError(f"yalis serve did not listen within {_START_S:g} s")


def measure(url: str, model: str, served_name: str, vocab: int | None, load: Load) -> Run:
    """Send the load; every request got all its tokens.

    Raises:
        ConfigError: a request failed or ended early, or the trace has too few rows.
    """
    folder = Path(model)
    samples, arrivals_s = requests(load, Vocabulary(folder if folder.is_dir() else None, vocab))
    completions = f"{checked_url(url)}/v1/completions"
    greedy = {"temperature": 0.0}
    target = Target(completions, chat=False, model=served_name or model, ignore_eos=True, extra=greedy)
    asyncio.run(wait_until_ready(target, samples[0], _START_S))
    run = asyncio.run(run_load(target, samples, arrivals_s))
    check_answers(completions, samples, run.results)
    return run


def requests(load: Load, vocabulary: Vocabulary) -> tuple[list[Sample], list[float]]:
    """What is asked, and when, in seconds from the start."""
    if load.trace:
        found = burstgpt_dataset(
            Path(load.trace),
            load.requests,
            vocabulary,
            time_scale=load.time_scale,
            models=None,
            max_len=load.max_len,
            chat=False,
            seed=_SEED,
        ).samples
        return found, [sample.arrival_s or 0.0 for sample in found]
    assert load.rate is not None and load.input_len is not None and load.output_len is not None  # `Load` is checked
    found = random_dataset(
        load.requests,
        vocabulary,
        input_len=load.input_len,
        output_len=load.output_len,
        range_ratio=0.0,
        prefix_len=0,
        chat=False,
        seed=_SEED,
    ).samples
    return found, Arrivals(load.rate, load.burstiness).times(load.requests, _SEED)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write; options after ``--serve`` are those of ``yalis serve``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    ours, own = (argv[: argv.index("--serve")], argv[argv.index("--serve") + 1 :]) if "--serve" in argv else (argv, [])
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--load", required=True)
    parser.add_argument("--url", default="")
    parser.add_argument("--served-name", default="")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--output-json", type=Path, required=True)
    args = parser.parse_args(ours)
    end_in_order_at_sigterm()
    load = msgspec.json.decode(args.load, type=Load)
    if args.url:
        found = measure(args.url, args.model, args.served_name, args.vocab, load)
    else:
        with yalis_server(args.model, own) as url:
            found = measure(url, args.model, args.served_name, args.vocab, load)
    write(args.output_json, args.model, load, found)


def write(path: Path, model: str, load: Load, run: Run) -> None:
    """The record of a cell: percentiles over requests under the names that batches have, too."""
    times = samples_by_metric(run.results)
    tokens = sum(result.output_len for result in run.results)
    write_record(
        path,
        "load",
        config={"load": msgspec.to_builtins(load), "engine": {"model": model}},
        results={
            "summary_ms": {"first": summary(times["ttft"]), "step": summary(times["tpot"])},
            "e2e_s": statistics.median(times["e2el"]),
            "tokens_per_s": tokens / run.duration_s,
            "requests_per_s": len(run.results) / run.duration_s,
            "max_arrival_lag_s": run.max_arrival_lag_s,
        },
        samples={"first_s": times["ttft"], "step_s": times["tpot"], "e2e_s": times["e2el"]},
    )


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"yalis: {error}") from None
