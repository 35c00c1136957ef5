"""Metrics of a load test, with vLLM's definitions and JSON keys."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from yalis.bench.harness import percentile
from yalis.bench.openai_client import RequestResult
from yalis.errors import ConfigError

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token, first excluded",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
    "client_queue_time": "Client-side queueing",
    "e2el_including_client_queue": "End-to-end latency with client-side queueing",
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
DETAILED_KEYS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")


def tpot_s(result: RequestResult) -> float | None:
    """(latency - TTFT) / (tokens - 1) in seconds; None for a single token."""
    if result.output_len < 2:
        return None
    return (result.latency_s - result.ttft_s) / (result.output_len - 1)


def samples(results: Sequence[RequestResult]) -> dict[str, list[float]]:
    """Seconds of each metric over the successful requests; ``itl`` has one entry per gap, the others per request."""
    good = [r for r in results if r.success]
    return {
        "ttft": [r.ttft_s for r in good],
        "tpot": [t for r in good if (t := tpot_s(r)) is not None],
        "itl": [gap for r in good for gap in r.itl_s],
        "e2el": [r.latency_s for r in good],
        "client_queue_time": [r.queue_s for r in good],
        "e2el_including_client_queue": [r.latency_s + r.queue_s for r in good],
    }


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """``["ttft:300", "tpot:50"]`` as milliseconds by metric.

    Raises:
        ConfigError: another metric, or no positive number.
    """
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        if name not in GOODPUT_METRICS:
            raise ConfigError(f"--goodput {pair}: the metric must be one of {', '.join(GOODPUT_METRICS)}")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not limits[name] >= 0:
            raise ConfigError(f"--goodput {pair}: expected {name}:MILLISECONDS, such as {name}:300")
    return limits


def summarize_run(
    results: Sequence[RequestResult],
    duration_s: float,
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput: Mapping[str, float],
) -> dict[str, Any]:
    """vLLM's result keys: counts, throughputs, ``{mean,median,std,pNN}_{metric}_ms`` and raw samples per request.

    A statistic without samples is None: a run in which everything failed has no TTFT of 0.

    Args:
        metrics: of `METRICS`, those whose statistics are wanted.
        percentiles: 0 to 100.
        goodput: limits in milliseconds by metric, see `parse_goodput`.
    """
    good = [r for r in results if r.success]
    total_in, total_out = sum(r.prompt_len for r in good), sum(r.output_len for r in good)
    tokens, running = per_second(results)
    out: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": len(good) / duration_s,
        "request_goodput": sum(_is_good(r, goodput) for r in good) / duration_s if goodput else None,
        "output_throughput": total_out / duration_s,
        "total_token_throughput": (total_in + total_out) / duration_s,
        "input_lens": [r.prompt_len for r in results],
        "output_lens": [r.output_len if r.success else 0 for r in results],
        "ttfts": [r.ttft_s for r in results],
        "itls": [r.itl_s for r in results],
        "latencies": [r.latency_s for r in results],
        "start_times": [r.start_s for r in results],
        "queue_times": [r.queue_s for r in results],
        "generated_texts": [r.text for r in results],
        "errors": [r.error for r in results],
        "max_output_tokens_per_s": float(max(tokens, default=0)),
        "max_concurrent_requests": max(running, default=0),
        "rtfx": 0.0,  # of audio; there for readers of vLLM's files
    }
    values = samples(results)
    for name in metrics:
        ms = [1e3 * v for v in values[name]]
        out[f"mean_{name}_ms"] = statistics.fmean(ms) if ms else None
        out[f"median_{name}_ms"] = statistics.median(ms) if ms else None
        out[f"std_{name}_ms"] = statistics.pstdev(ms) if ms else None
        for p in percentiles:
            out[f"p{p:g}_{name}_ms"] = percentile(ms, p / 100) if ms else None
    return out


def per_second(results: Sequence[RequestResult]) -> tuple[list[int], list[int]]:
    """Token events in each second since the first successful request was sent, and requests active in it."""
    good = [r for r in results if r.success]
    if not good:
        return [], []
    zero = min(r.start_s for r in good)
    seconds = int(max(r.start_s + r.latency_s for r in good) - zero) + 1
    tokens, running = [0] * seconds, [0] * seconds
    for result in good:
        at = result.start_s - zero + result.ttft_s
        for gap in (0.0, *result.itl_s):
            at += gap
            tokens[min(int(at), seconds - 1)] += 1  # summed gaps may end a rounding error late
        for second in range(int(result.start_s - zero), int(result.start_s + result.latency_s - zero) + 1):
            running[second] += 1
    return tokens, running


def failures(results: Sequence[RequestResult]) -> dict[str, dict[str, Any]]:
    """Per kind of failure its count and the words of its first occurrence."""
    counts = Counter(r.kind for r in results if not r.success)
    first = {r.kind: r.error for r in reversed(results) if not r.success}
    return {kind: {"count": n, "first": first[kind]} for kind, n in counts.most_common()}


def _is_good(result: RequestResult, limits: Mapping[str, float]) -> bool:
    values = {"ttft": result.ttft_s, "tpot": tpot_s(result) or 0.0, "e2el": result.latency_s}
    return all(1e3 * values[name] <= limit for name, limit in limits.items())
