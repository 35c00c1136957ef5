"""Where the time of a step goes, from a rank's trace: matrix products, attention, all-reduce, other work, idle.

A trace is what `yalis.engine.profiler` writes (Chrome's format). The engine marks each step with a range on the host;
what the device did for it is found through the launches inside that range. A step lasts from its first work on the
device to that of the next step, and every moment of it belongs to exactly one part, so the parts sum to the step.
Of the kernels of one stream only the earliest that runs is at work: those after it were started ahead of time and
wait for it (programmatic dependent launch). Where several streams are at work, the moment goes to the first of: matrix
products, attention, all-reduce, other. So the all-reduce shown is what computation does not hide.

Where the all-reduce notes its own times (NVRAR), the trace holds how long each call waited for the first data of a
peer: that share of the call is waiting, the rest moving.

On the CPU there is no device: the ranges of the communicator and torch's own operators stand in, and compiled kernels,
which leave no mark, are *other*.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from yalis.engine.profiler import CALL_TIMES
from yalis.errors import ConfigError

PARTS = ("GEMM", "attention", "all-reduce", "other", "idle")
# Names of kernels (and on the CPU of operators and ranges), first match wins.
_NAMES = (
    ("all-reduce", re.compile(r"nccl|all_?reduce|one_shot|two_shot|symmetric_memory::barrier|multimem", re.IGNORECASE)),
    ("attention", re.compile(r"^_?(decode|prefill)(_|$)|attention|attn|flash|fmha", re.IGNORECASE)),
    (
        "GEMM",
        re.compile(
            r"^_(one_row|few_rows)$|gemm|gemv|matvec|nvjet|cutlass|cublas|splitk|(^|::|_)(linear|addmm|matmul|bmm|mm)(_|$)",
            re.I,
        ),
    ),
)
_NVRAR = re.compile(r"nvrar(::all_reduce|,)")  # a kernel's name, or a range's
_STEP = re.compile(r"^yalis\.(decode|forward)\[")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_HOST_WORK = ("cpu_op", "user_annotation")


@cache
def part_of(name: str) -> str:
    """The part that a kernel, operator or range of this name belongs to."""
    return next((part for part, pattern in _NAMES if pattern.search(name)), "other")


@dataclass(frozen=True)
class Span:
    """Something that ran from ``start`` to ``end``, in microseconds, on a stream (or on the host, a thread)."""

    name: str
    start: float
    end: float
    stream: int


@dataclass(frozen=True)
class KernelShare:
    """A kernel's mean per step: launches, and its share of the step's microseconds."""

    name: str
    part: str
    us: float
    launches: float


@dataclass(frozen=True)
class Breakdown:
    """Means over the steps of one kind in one trace.

    Attributes:
        steps: number of steps looked at.
        step_us: from a step's first work to the next one's.
        parts_us: of each of `PARTS`; they sum to ``step_us``.
        wait_us: the part of the all-reduce that was waiting for a peer; None where no call has noted it.
        kernels: the most expensive ones, descending.
        on_device: whether the times are a GPU's.
    """

    steps: int
    step_us: float
    parts_us: dict[str, float]
    wait_us: float | None
    kernels: list[KernelShare]
    on_device: bool


@dataclass(frozen=True)
class Trace:
    """What a trace holds.

    Attributes:
        events: the complete ones.
        calls_us: (waited, moved) of the latest calls of NVRAR, oldest first; empty where none has noted it.
    """

    events: list[dict[str, Any]]
    calls_us: list[tuple[float, float]]


def read_trace(path: Path) -> Trace:
    """A trace, compressed or not.

    Raises:
        ConfigError: not a trace.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        found = json.loads(text)
        events = found["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no trace in Chrome's format: {error}") from error
    calls = [(float(waited), float(moved)) for waited, moved in found.get(CALL_TIMES, ())]
    return Trace([e for e in events if e.get("ph") == "X" and "dur" in e], calls)


def break_down(
    events: Sequence[dict[str, Any]],
    kind: str = "decode",
    *,
    top: int = 12,
    calls_us: Sequence[tuple[float, float]] = (),
) -> Breakdown:
    """Break the steps of a trace down.

    Args:
        events: of a `Trace`.
        kind: ``"decode"``: decode steps of fixed size if there are any, else all; ``"all"``: every step.
        top: kernels to name.
        calls_us: of the same `Trace`.

    Raises:
        ConfigError: the trace holds no marked step.
    """
    ranges = sorted(
        (e for e in events if e.get("cat") == "user_annotation" and _STEP.match(e["name"])),
        key=lambda e: float(e["ts"]),
    )
    on_device = any(e.get("cat") in _DEVICE for e in events)
    steps = _device_steps(events, ranges) if on_device else [(r["name"], [_span(r)]) for r in ranges]
    if not steps:
        raise ConfigError("the trace holds no step of the engine: record it with --profile")
    work = [_span(e) for e in events if e.get("cat") in (_DEVICE if on_device else _HOST_WORK)]
    work = [s for s in work if not s.name.startswith("yalis.") or _STEP.match(s.name)]
    work.sort(key=lambda s: s.start)
    starts = [min(s.start for s in spans) for _, spans in steps]
    if len(steps) == 1:  # alone it ends with its own last work
        steps, starts = steps * 2, [*starts, max(s.end for s in steps[0][1])]
    whole = range(len(steps) - 1)  # nobody knows what the last one would have waited for
    wanted = [i for i in whole if kind == "all" or steps[i][0].startswith("yalis.decode[")] or list(whole)
    waiting = _waiting_shares(work, calls_us)
    wait_us = 0.0
    parts = dict.fromkeys(PARTS, 0.0)
    shares: dict[str, list[float]] = {}
    lengths = []
    for i in wanted:
        begin, end = starts[i], starts[i + 1]
        lengths.append(end - begin)
        inside = [s for s in work if s.start < end and s.end > begin]
        for span in inside:
            if begin <= span.start:
                shares.setdefault(span.name, [0.0, 0.0])[1] += 1
        for worker, us in _sweep(inside, begin, end, nested=not on_device):
            parts["idle" if worker is None else part_of(worker.name)] += us
            if worker is not None:
                shares.setdefault(worker.name, [0.0, 0.0])[0] += us
                wait_us += us * waiting.get(worker, 0.0)
    count = len(wanted)
    kernels = [KernelShare(n, part_of(n), us / count, launches / count) for n, (us, launches) in shares.items()]
    kernels.sort(key=lambda k: -k.us)
    return Breakdown(
        steps=count,
        step_us=statistics.fmean(lengths),
        parts_us={part: us / count for part, us in parts.items()},
        wait_us=wait_us / count if waiting else None,
        kernels=[k for k in kernels if not _STEP.match(k.name)][:top],
        on_device=on_device,
    )


def _waiting_shares(work: Sequence[Span], calls_us: Sequence[tuple[float, float]]) -> dict[Span, float]:
    """Share of waiting in each call of NVRAR; the last call noted is the last in the trace."""
    calls = [span for span in work if _NVRAR.search(span.name)]
    count = min(len(calls), len(calls_us))
    known = zip(calls[len(calls) - count :], calls_us[len(calls_us) - count :], strict=True)
    return {span: waited / (waited + moved) for span, (waited, moved) in known if waited + moved > 0}


def _device_steps(events: Sequence[dict[str, Any]], ranges: Sequence[dict[str, Any]]) -> list[tuple[str, list[Span]]]:
    """(name, device work) of each marked step that has any, in order."""
    work: dict[int, list[Span]] = {}
    for e in events:
        if e.get("cat") in _DEVICE:
            work.setdefault(int(e.get("args", {}).get("correlation", -1)), []).append(_span(e))
    launches = sorted(
        (float(e["ts"]), e.get("tid"), int(e["args"]["correlation"]))
        for e in events
        if e.get("cat") in _LAUNCH and "correlation" in e.get("args", {})
    )
    steps, at = [], 0
    for marked in ranges:
        begin, end = float(marked["ts"]), float(marked["ts"]) + float(marked["dur"])
        while at < len(launches) and launches[at][0] < begin:
            at += 1
        found: list[Span] = []
        while at < len(launches) and launches[at][0] <= end:
            if launches[at][1] == marked.get("tid"):
                found += work.get(launches[at][2], [])
            at += 1
        if found:
            steps.append((str(marked["name"]), found))
    return steps


def _sweep(spans: Iterable[Span], begin: float, end: float, *, nested: bool) -> Iterator[tuple[Span | None, float]]:
    """Cut [begin, end) into moments: who was at work (None: nobody), and for how many microseconds.

    Args:
        nested: spans of one thread enclose each other and the innermost is at work; else they wait for each other.
    """
    edges: list[tuple[float, int, int, Span]] = []
    for number, span in enumerate(spans):
        edges.append((max(span.start, begin), 1, number, span))
        edges.append((min(span.end, end), 0, number, span))
    edges.sort(key=lambda edge: edge[:3])
    running: dict[int, Span] = {}  # in the order in which they started
    at = begin
    for moment, starts, number, span in edges:
        if moment > at:
            yield _at_work(list(running.values()), nested=nested), moment - at
            at = moment
        if starts:
            running[number] = span
        else:
            running.pop(number, None)
    yield None, end - at


def _at_work(running: list[Span], *, nested: bool) -> Span | None:
    if nested:
        running = running[::-1]
    else:
        first: dict[int, Span] = {}
        for span in running:
            first.setdefault(span.stream, span)
        running = list(first.values())
    return min(running, key=lambda span: PARTS.index(part_of(span.name)), default=None)


def _span(event: dict[str, Any]) -> Span:
    start = float(event["ts"])
    stream = event.get("args", {}).get("stream", event.get("tid"))
    return Span(str(event["name"]), start, start + float(event["dur"]), hash(stream))
