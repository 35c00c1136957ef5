"""The TOML text of a cluster description from what `yalis.study.calibrate` measured."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from yalis.study.cluster import Constant, Rates
from yalis.study.fit import Segment, fit_segments, isotonic, trimmed_mean
from yalis.study.shapes import models_of
from yalis.study.sweep import products_of
from yalis.utils.machine import cpu_model, git_commit, versions

Sweep = Mapping[str, Any]
# Where nothing was measured: a message between processes of one host over loopback.
_LOOPBACK = Segment(1 << 20, 60e-6, 1e-9, 60e-6, 60e-6, 1e-9, 1e-9)
_LEAST_BETA = 1e-13


@dataclass(frozen=True)
class Host:
    """What a description says besides measurements.

    Attributes:
        name: short. device: ``cpu`` or ``cuda``. cores: that ranks share (CPU).
        per_node, nodes: ranks of a node, and nodes, as far as they were measured.
        emulated: what is emulated between nodes; empty for nothing.
    """

    name: str
    device: str
    cores: int
    per_node: int
    nodes: int
    emulated: str


def text(value: str) -> str:
    """A TOML string: JSON's escapes are TOML's."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def constant(value: float, kind: str, source: str, low: float | None = None, high: float | None = None) -> str:
    """A constant's table in one line."""
    line = f"{{ value = {value:.6g}, kind = {text(kind)}, source = {text(source)}"
    if low is not None and high is not None:
        rounded = float(f"{value:.6g}")
        line += f", low = {min(float(f'{low:.6g}'), rounded):.6g}, high = {max(float(f'{high:.6g}'), rounded):.6g}"
    return line + " }"


def numbers(values: Iterable[float]) -> str:
    """A TOML array."""
    return "[" + ", ".join(f"{v:.6g}" for v in values) + "]"


def times_by_size(raw: Mapping[str, Sequence[float]]) -> dict[float, Sequence[float]]:
    """JSON has no numbers as keys."""
    return {float(size): values for size, values in raw.items()}


class Place(NamedTuple):
    """What a fit is of. ``algorithm``: or ``p2p``. ``norm``: with the norm behind. ``timed``: how, in words."""

    algorithm: str
    ranks: int
    nodes: int
    norm: bool = False
    timed: str = ""


Curves = Mapping[Place, Sequence[Segment]]
# Resamplings for the bounds of a fit: a GPU's samples are many and alike, and the machine waits meanwhile.
_ROUNDS = {"cpu": 200, "cuda": 50}


def fit_curves(sweeps: Sequence[Sweep]) -> Curves:
    """Fits of every all-reduce, alone and with its norm, and of transfers between the two outermost ranks."""
    found = {}
    for sweep in sweeps:
        shape, timed = (sweep["ranks"], sweep["nodes"]), sweep.get("timed", {})
        rounds = _ROUNDS[sweep.get("device", "cpu")]
        for key, norm in (("all_reduce", False), ("all_reduce_rmsnorm", True)):
            for name, raw in sweep.get(key, {}).items():
                found[Place(name, *shape, norm, timed.get(name, ""))] = fit_segments(times_by_size(raw), rounds=rounds)
        if sweep.get("ping_pong"):
            found[Place("p2p", *shape)] = fit_segments(times_by_size(sweep["ping_pong"]), rounds=rounds)
    return found


def _fit_table(place: Place, segments: Sequence[Segment], source: str) -> str:
    algorithm, ranks, nodes, norm, timed = place
    source += f", {timed}" if timed else ""
    rows = ", ".join(f"[{s.limit_bytes:.0f}, {s.alpha_s:.6g}, {s.beta_s:.6g}]" for s in segments)
    bounds = "; ".join(
        f"alpha {s.alpha_low_s * 1e6:.3g} to {s.alpha_high_s * 1e6:.3g} us, beta {s.beta_low_s * 1e9:.3g} to "
        f"{s.beta_high_s * 1e9:.3g} ns/B"
        for s in segments
    )
    return (
        f'\n[[fit]]\nalgorithm = {text(algorithm)}\nranks = {ranks}\nnodes = {nodes}\nkind = "fitted"'
        f"\nsource = {text(f'{source}; 95 percent: {bounds}')}\nsegments = [{rows}]" + ("\nnorm = true" if norm else "")
    )


def wire(name: str, segments: Sequence[Segment] | None, source: str) -> list[str]:
    """A tier's wire: the latency of small messages, the bandwidth of large ones."""
    kind = "fitted" if segments else "assumed"
    first, last = (segments[0], segments[-1]) if segments else (_LOOPBACK, _LOOPBACK)
    source = source if segments else "no second rank was measured: a message over loopback"
    rate = [1 / max(b, _LEAST_BETA) for b in (last.beta_s, last.beta_high_s, last.beta_low_s)]
    return [
        f"\n[{name}]",
        f"alpha_s = {constant(first.alpha_s, kind, source, first.alpha_low_s, first.alpha_high_s)}",
        f"bytes_per_s = {constant(rate[0], kind, source, rate[1], rate[2])}",
        f"factor = {constant(1.0, 'spec', 'no flags beside the data')}",
    ]


def rates_table(rates: Rates, source: str) -> str:
    """A ``[[rates]]`` table."""
    lines = ["\n[[rates]]", *(f"{name} = {getattr(rates, name)}" for name in ("tp", "pp", "flying"))]
    for field in fields(rates):
        value = getattr(rates, field.name)
        if isinstance(value, Constant):
            lines.append(f"{field.name} = {constant(value.value, value.kind, source, value.low, value.high)}")
    for name in ("rows", "s_per_weight_byte", "low", "high"):
        lines.append(f"{name} = {numbers(max(v, 1e-15) for v in getattr(rates, name))}")
    return "\n".join(lines)


def products_by_rows(sweep: Sweep, shape: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """(rows, seconds per weight byte, and what 10 and 90 percent of the samples give) of one shape of product."""
    raw = {int(rows): values for rows, values in sweep["products"][shape].items()}
    rows = sorted(raw)
    middle = isotonic([trimmed_mean(raw[r]) for r in rows])
    low, high = ([float(np.percentile(raw[r], q)) for r in rows] for q in (10, 90))
    return [float(r) for r in rows], middle, list(map(min, low, middle)), list(map(max, high, middle))


def _products_tables(sweeps: Sequence[Sweep]) -> list[str]:
    found = []
    for sweep in sweeps:
        for shape in sweep.get("products", {}):
            n, k = products_of(sweep.get("device", "cpu"))[shape]
            columns = zip(("rows", "s_per_weight_byte", "low", "high"), products_by_rows(sweep, shape), strict=True)
            lines = [f"\n[[products]]  # {shape}", f"ranks = {sweep['ranks']}", f"n = {n}", f"k = {k}"]
            found.append("\n".join([*lines, *(f"{name} = {numbers(values)}" for name, values in columns)]))
    return found


def describe(host: Host, sweeps: Sequence[Sweep], curves: Curves, rates: Sequence[Rates]) -> str:
    """The whole description.

    Args:
        curves: `fit_curves` of the sweeps.
        sweeps: of `yalis.study.sweep.measure`; one holds products.
        rates: of the engine's steps, one rank or one group of GPUs first.
    """
    date = time.strftime("%Y-%m-%d", time.gmtime())
    here = f"calibrate {date}"
    on_cpu = host.device == "cpu"
    label = "emulated network" if host.emulated else "this machine"

    def segments(name: str, least_nodes: int, most_nodes: int) -> Sequence[Segment] | None:
        """Of the smallest group that was measured."""
        places = [p for p in curves if p.algorithm == name and not p.norm and least_nodes <= p.nodes <= most_nodes]
        return curves[min(places, key=lambda p: (p.ranks, p.nodes))] if places else None

    near, between = segments("p2p", 1, 1), segments("p2p", 2, host.nodes)
    inside = segments("shm", 1, 1) if on_cpu else near
    algorithms = [
        name for name in ("shm", "rd", "torch", "nccl", "nvrar", "symm_mem") if any(name == p.algorithm for p in curves)
    ]
    title, device_name, memory = _hardware(host)
    nics = 1 if on_cpu else host.per_node
    lines = [
        f"# Written by yalis calibrate on {date}.",
        f"name = {text(host.name)}",
        f"title = {text(title + ('; EMULATED network' if host.emulated else ''))}",
        f"algorithms = {json.dumps(algorithms or (['shm', 'rd'] if on_cpu else ['nccl']))}",
        f"emulated = {'true' if host.emulated else 'false'}",
        f"\n[node]\ngpus = {host.per_node}\nnics = {nics}\nmax_nodes = {max(host.nodes, 1)}",
        f"\n[device]\nname = {text(device_name)}\nshared = {'true' if on_cpu else 'false'}",
        *([f"cores = {host.cores}"] if on_cpu else []),
        f"memory_bytes = {constant(memory, 'measured', 'as the system reports it')}",
        *_device(sweeps, rates[0], here),
        *wire("intra.shm" if on_cpu else "intra.simple", inside or near, f"{here}, this node"),
        *wire("inter.tcp" if on_cpu else "inter.simple", between or near, f"{here}, ping-pong between nodes, {label}"),
        *_library(host, near, between, here),
        *(rates_table(r, f"{here}: the engine's own steps") for r in rates),
        *_products_tables(sweeps),
        *(_fit_table(place, fit, f"{here}, {label}") for place, fit in curves.items()),
        "\n[notes]",
        f"date = {text(date)}",
        f"commit = {text(git_commit() or 'unknown')}",
        *(f"{text(package)} = {text(version)}" for package, version in versions().items() if version),
        f"command = {text(' '.join(['yalis', *sys.argv[1:]]))}",
        f"emulated = {text(host.emulated)}",
        *(f"{text(f'without {n}')} = {text(r)}" for s in sweeps for n, r in s.get("skipped", {}).items()),
    ]
    return "\n".join(lines) + "\n"


def _device(sweeps: Sequence[Sweep], rates: Rates, here: str) -> list[str]:
    """Bandwidth and rate of the best shape of product, and what a step costs besides."""
    sweep = next(s for s in sweeps if s.get("products"))
    curves = [products_by_rows(sweep, shape) for shape in sweep["products"]]
    reads = min(curves, key=lambda curve: curve[1][0])
    multiplies = min(curves, key=lambda curve: curve[1][-1])
    rows = multiplies[0][-1]
    bandwidth = [1 / column[0] for column in (reads[1], reads[3], reads[2])]
    flops = [2 * rows / 2 / column[-1] for column in (multiplies[1], multiplies[3], multiplies[2])]
    share = min(1.0, 4 / (max(rates.pair_s.value, 1e-18) * flops[0]))
    step, layer, sequence = rates.step_s, rates.layer_s, rates.sequence_s
    one, many = models_of(sweep.get("device", "cpu")).tiny
    batches = f"{here}: batch {many.batch} and {one.batch}"
    return [
        f"memory_bytes_per_s = {constant(bandwidth[0], 'measured', here + ': products of one row', *bandwidth[1:])}",
        f"flops_per_s = {constant(flops[0], 'measured', f'{here}: products of {rows:g} rows', *flops[1:])}",
        f"attention_flops_share = {constant(share, 'fitted', here + ': prompts of three lengths')}",
        f"kernel_s = {constant(layer.value, 'fitted', here + ': two depths, a whole layer', layer.low, layer.high)}",
        f"kernels_per_layer = {constant(1, 'measured', 'kernel_s is a whole layer')}",
        f"step_s = {constant(step.value, 'fitted', here + ': a step without layers', step.low, step.high)}",
        f"sequence_s = {constant(sequence.value, 'fitted', batches, sequence.low, sequence.high)}",
        f"pass_s = {constant(0.0, 'measured', 'in step_s')}",
    ]


def _library(host: Host, near: Sequence[Segment] | None, between: Sequence[Segment] | None, here: str) -> list[str]:
    """The baseline where no ``[[fit]]`` holds: one flat ring of messages as they were measured."""
    kind = "fitted" if near or between else "assumed"
    inside, across = (near or between or [_LOOPBACK]), (between or near or [_LOOPBACK])
    rates = [1 / max(s[-1].beta_s, _LEAST_BETA) for s in (inside, across)]
    hop = "a hop of the ring costs a message"
    return [
        f'\n[library]\nname = "{"gloo" if host.device == "cpu" else "nccl"}"',
        f"bus_intra_bytes_per_s = {constant(rates[0], kind, here + ', ping-pong inside a node')}",
        f"bus_inter_bytes_per_s = {constant(rates[1], kind, here + ', ping-pong between nodes')}",
        f"library_p2p_s = {constant(across[0].alpha_s, kind, here + ', ping-pong')}",
        "\n[library.ring]",
        f"base_s = {constant(inside[0].alpha_s, 'assumed', 'the first hop')}",
        f"intra_s = {constant(inside[0].alpha_s, 'assumed', hop)}",
        f"inter_s = {constant(across[0].alpha_s, 'assumed', hop)}",
    ]


def _hardware(host: Host) -> tuple[str, str, float]:
    """(title, name of the device, its memory in bytes)."""
    if host.device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"{cpu_model()}, {host.cores} cores, CPU ranks", cpu_model(), memory
    import torch

    properties: Any = torch.cuda.get_device_properties(0)
    title = f"{host.nodes} node(s) of {host.per_node} {properties.name}"
    return title, str(properties.name), float(properties.total_memory)
