"""Timing of collectives and the JSON record of a benchmark.

A sample of a collective is the time of one call, the longest over the ranks, begun together behind a barrier. Records
keep the raw samples beside their summary, and everything that a reader needs to run the same again.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yalis.errors import ConfigError
from yalis.utils.machine import launch_environment, machine_record

if TYPE_CHECKING:
    from yalis.comm.communicator import Communicator


def percentile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile (0 to 1) of ``values`` (at least one), linear between neighbours."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Mean, min, median, p10, p90, p99, max, and ``spread`` = (p90 - p10) / median, of at least one value."""
    median = percentile(values, 0.5)
    low, high = percentile(values, 0.1), percentile(values, 0.9)
    return {
        "mean": sum(values) / len(values),
        "min": min(values),
        "p10": low,
        "median": median,
        "p90": high,
        "p99": percentile(values, 0.99),
        "max": max(values),
        "spread": (high - low) / median if median else 0.0,
    }


def time_collective(comm: Communicator, call: Callable[[], object], *, iters: int, warmup: int) -> list[float]:
    """Seconds of ``iters`` calls, each the longest over the ranks of ``comm`` (collective).

    Every call starts behind a barrier, so that a sample holds the collective and not the wait for a rank that was late.
    On CUDA a sample ends when the device has finished.
    """
    import torch

    on_cuda = comm.device.type == "cuda"
    samples = torch.empty(iters, dtype=torch.float64)
    for i in range(-warmup, iters):
        comm.barrier()
        if on_cuda:
            torch.cuda.synchronize(comm.device)
        start = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize(comm.device)
        if i >= 0:
            samples[i] = time.perf_counter() - start
    everyone = comm.all_gather(samples.to(comm.device).unsqueeze(0), dim=0)
    longest: list[float] = everyone.max(dim=0).values.tolist()
    return longest


def make_record(
    kind: str, *, config: Mapping[str, Any], results: Any, samples: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """A JSON-ready record.

    Keys: ``kind``, ``time_utc``, ``argv``, ``config``, ``results``, ``samples``, ``machine`` (with ``versions`` and
    ``commit``), ``env``.
    """
    return {
        "kind": kind,
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": list(sys.argv),
        "config": dict(config),
        "results": results,
        "samples": {name: list(values) for name, values in samples.items()},
        "machine": machine_record(),
        "env": launch_environment(),
    }


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that could not be written, before anything is measured.

    Raises:
        ConfigError: ``path`` is a folder, or its folder is missing or cannot be written; names ``option``.
    """
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; name a file in it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _unwritable(path, error, option) from error


def write_record(
    path: Path, kind: str, *, config: Mapping[str, Any], results: Any, samples: Mapping[str, Sequence[float]]
) -> None:
    """Write `make_record` to ``path``, whole or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    text = json.dumps(make_record(kind, config=config, results=results, samples=samples), indent=1)
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as draft:
            try:
                draft.write(text + "\n")
                draft.close()
                os.chmod(draft.name, 0o644)
                os.replace(draft.name, path)
            except BaseException:
                os.unlink(draft.name)
                raise
    except OSError as error:
        raise _unwritable(path, error, "record") from error


def _unwritable(path: Path, error: OSError, what: str) -> ConfigError:
    return ConfigError(f"{what} {path}: cannot be written ({error.strerror}); name a file in a folder that can be")
