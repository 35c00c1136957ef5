"""A picture of a load test: how TTFT and inter-token latency are distributed, and throughput over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yalis.bench.harness import percentile
from yalis.bench.openai_client import RequestResult
from yalis.bench.serve_metrics import samples
from yalis.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 60
_X_LABEL = "seconds since the first request"


def plot_run(path: Path, results: Sequence[RequestResult], title: str) -> None:
    """Write a PNG, PDF or SVG (by the name's end) with four panels.

    Raises:
        ConfigError: matplotlib is missing, the format is unknown, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; pip install 'yalis[study]'") from error
    values = samples(results)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    (first, gaps), (tokens, running) = figure.subplots(2, 2)
    for axes, name, label in ((first, "ttft", "time to first token, ms"), (gaps, "itl", "inter-token latency, ms")):
        ms = sorted(1e3 * v for v in values[name])
        if ms:
            axes.plot(ms, [(i + 1) / len(ms) for i in range(len(ms))], drawstyle="steps-post")
            for share, style in ((0.5, "--"), (0.99, ":")):
                at = percentile(ms, share)
                axes.axvline(at, color="gray", linestyle=style, linewidth=1, label=f"p{share * 100:g}: {at:.4g} ms")
            axes.legend(loc="lower right", fontsize=8)
        axes.set(xlabel=label, ylabel="share of samples", ylim=(0, 1.02))
        axes.set_xlim(left=0)
    _draw_timeline(tokens, running, results)
    for axes in (first, gaps, tokens, running):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def _draw_timeline(tokens: Axes, running: Axes, results: Sequence[RequestResult]) -> None:
    """Tokens per second in about 60 bins, and the exact number of requests in flight."""
    import numpy as np

    good = [r for r in results if r.success]
    tokens.set(xlabel=_X_LABEL, ylabel="output tokens per second")
    running.set(xlabel=_X_LABEL, ylabel="requests in flight")
    if not good:
        return
    zero = min(r.start_s for r in good)
    end = max(r.start_s + r.latency_s for r in good) - zero
    at = np.concatenate([r.start_s - zero + r.ttft_s + np.cumsum([0.0, *r.itl_s]) for r in good])
    counts, edges = np.histogram(at, bins=_BINS, range=(0.0, end))
    tokens.stairs(counts * (_BINS / end), edges, fill=True, alpha=0.5)
    changes = sorted([(r.start_s - zero, 1) for r in good] + [(r.start_s + r.latency_s - zero, -1) for r in good])
    running.step([t for t, _ in changes], np.cumsum([c for _, c in changes]), where="post")
    failed = [r.start_s - zero for r in results if not r.success and r.start_s]
    if failed:
        running.plot(failed, [0] * len(failed), "x", color="tab:red", label=f"{len(failed)} failed", clip_on=False)
        running.legend(fontsize=8)
    for axes in (tokens, running):
        axes.set_xlim(0, end)
        axes.set_ylim(bottom=0)
