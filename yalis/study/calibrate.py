"""Measure this machine and describe it as a cluster: links, all-reduces, products, and the engine's own steps.

Every number comes from the engine's own operations in real ranks: the communicator's sends and all-reduces and the
linear layer (`yalis.study.sweep`), and whole steps of small models (`yalis.study.steps`). Machines change their speed
within seconds, so groups take turns, pass after pass, and a mean over all of it counts.
"""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yalis.errors import ConfigError
from yalis.launch import is_launched
from yalis.study import steps, sweep
from yalis.study.cluster import Cluster, Rates, parse_cluster
from yalis.study.cost import Layout
from yalis.study.describe import Host, describe, fit_curves, products_by_rows
from yalis.study.netns import started_ranks
from yalis.study.steps import Samples, blank_rates, measure_models, merge, shapes_of, with_bounds
from yalis.utils.machine import usable_cores

Say = Callable[[str], None]
# A product apart from the engine and within its steps should cost the same; further apart, one of them was disturbed.
_AGREES = 0.10
# Longest pass over the models of one layout; most take a minute or two. Ranks that are lost end it much sooner.
_STEPS_LIMIT_S = 3600.0
GPU_ALL_REDUCES = ("nccl", "nvrar", "symm_mem")


@dataclass(frozen=True)
class Group:
    """One launch of a sweep: ranks, ranks of a declared node, what to measure (``norms``: all-reduces with theirs)."""

    ranks: int
    per_node: int
    algorithms: tuple[str, ...]
    ping_pong: bool = False
    product_rounds: int = 0
    norms: bool = False


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        iters: timed calls for each size of a message. high: largest message in bytes.
        product_rounds: samples of each product. passes: over all layouts; rounds: of an engine in each.
        quick: little memory and short samples.
    """

    iters: int
    high: int = 1 << 20
    product_rounds: int = 12
    passes: int = 2
    rounds: int = 3
    quick: bool = False


def effort(iters: int, device: str, *, quick: bool) -> Effort:
    """A whole calibration, or a look.

    A GPU keeps its speed, so one pass does there; messages are as long as those of a prefill.
    """
    if device == "cuda":
        return Effort(min(iters, 5), 1 << 22, 2, 1, 1, True) if quick else Effort(iters, 1 << 25, 5, 1, 5)
    return Effort(min(iters, 5), 1 << 14, 2, 1, 1, True) if quick else Effort(iters)


def run_sweep(
    group: Group,
    *,
    device: str = "cpu",
    iters: int = 20,
    low: int = 256,
    high: int = 1 << 20,
    strict: bool = True,
    quick: bool = False,
    env: Mapping[str, str] | None = None,
    limit_s: float = 300.0,
) -> dict[str, Any]:
    """Start the ranks, wait, and return what rank 0 wrote.

    Args:
        strict: an algorithm that cannot serve here is an error; else it is left out and named under ``skipped``.

    Raises:
        ConfigError: the ranks failed or took longer than ``limit_s``.
    """
    command = ["yalis.study.sweep", *_options(group, device, iters, low, high, strict, quick)]
    return _told_by_ranks("sweep", group.ranks, group.per_node, command, env or {}, limit_s)


def _told_by_ranks(
    what: str, ranks: int, per_node: int, command: Sequence[str], env: Mapping[str, str], limit_s: float
) -> dict[str, Any]:
    """Run a module's ``command`` in ranks, and return what rank 0 wrote to the file that ``--out`` names.

    Raises:
        ConfigError: the ranks failed or took longer than ``limit_s``.
    """
    with tempfile.TemporaryDirectory(prefix="yalis-measured-") as folder:
        out = Path(folder) / "found.json"
        with started_ranks(ranks, per_node, [*command, "--out", str(out)], env) as running:
            good = running.wait(limit_s)
        if good is None:
            raise ConfigError(f"the {what} of {ranks} ranks took longer than {limit_s:g} s")
        if not good or not out.exists():
            raise ConfigError(f"the {what} of {ranks} ranks failed; see what they printed above")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _options(group: Group, device: str, iters: int, low: int, high: int, strict: bool, quick: bool) -> list[str]:
    options = ["--device", device, "--iters", str(iters), "--low", str(low), "--high", str(high)]
    options += ["--ranks-per-node", str(group.per_node), "--algorithms", ",".join(group.algorithms)]
    options += ["--product-rounds", str(group.product_rounds)]
    flags = {"--ping-pong": group.ping_pong, "--norms": group.norms, "--strict": strict, "--quick": quick}
    for name, wanted in flags.items():
        options += [name] if wanted else []
    return options


def groups_of(max_ranks: int, device: str, product_rounds: int, only: Sequence[str] = ()) -> list[Group]:
    """Sweeps of a host: 1, 2, 4, ... ranks on one node, and on CPU ranks as declared nodes besides.

    Args:
        only: these of GPUs' all-reduces; empty: all.
    """
    counts = [n for n in (1, 2, 4, 8) if n <= max_ranks]
    inside = ("shm", "torch") if device == "cpu" else tuple(only) or GPU_ALL_REDUCES
    found = []
    for ranks in counts:
        algorithms = inside if ranks > 1 else ()
        norms = device == "cuda" and ranks > 1
        found.append(Group(ranks, ranks, algorithms, ranks == 2, product_rounds, norms))
        for nodes in [n for n in (2, 4, 8) if device == "cpu" and 1 < n <= ranks]:
            found.append(Group(ranks, ranks // nodes, ("rd",), ping_pong=ranks == 2))
    return found


def launched_group(world: int, per_node: int, device: str, product_rounds: int, only: Sequence[str] = ()) -> Group:
    """The sweep of a launcher's whole world; ``only`` as in `groups_of`."""
    inside = ("shm", "torch") if world == per_node else ("rd", "torch")
    algorithms = inside if device == "cpu" else tuple(only) or GPU_ALL_REDUCES
    return Group(world, per_node, algorithms, True, product_rounds, norms=device == "cuda")


def layouts_of(max_ranks: int, device: str) -> list[Layout]:
    """Layouts whose steps are measured: TP over 1, 2, 4, ... ranks; on CPU ranks, also two stages of half as many."""
    counts = [n for n in (1, 2, 4, 8) if n <= max_ranks]
    tensor = [Layout(n, 1, 1) for n in counts]
    return tensor + [Layout(n // 2, 2, 1) for n in counts if n > 1] if device == "cpu" else tensor


def measure_layouts(layouts: Sequence[Layout], device: str, much: Effort, say: Say) -> dict[Layout, Samples]:
    """Samples of every layout, layouts in turn in each pass; collective under a launcher."""
    found: dict[Layout, Samples] = {layout: {} for layout in layouts}
    for number in range(much.passes):
        for layout in layouts:
            # Attention is a small part of every prediction: once, on the first layout.
            shapes = shapes_of(layout, device, first=number == 0 and layout == layouts[0])
            say(f"pass {number + 1} of {much.passes}: {layout.name}, models {', '.join(shapes)}")
            merge(found[layout], _models_in_turn(layout, shapes, device, much))
    return found


def _models_in_turn(layout: Layout, shapes: Sequence[str], device: str, much: Effort) -> Samples:
    """One pass of a layout: one launch for all models, since ranks take longer to start than a small model to run."""
    if layout.ranks == 1 or is_launched(os.environ):
        return measure_models(layout, shapes, much.rounds, device, quick=much.quick)
    command = [steps.__name__, *steps.options(layout, shapes, much.rounds, device, quick=much.quick)]
    return _told_by_ranks("steps", layout.ranks, layout.ranks // layout.nodes, command, {}, _STEPS_LIMIT_S)


def calibrate(
    name: str,
    *,
    device: str,
    max_ranks: int,
    much: Effort,
    say: Say,
    env: Mapping[str, str],
    only: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """Measure this host with ranks that are started here.

    Args:
        max_ranks: largest group to measure; 1, 2, 4, 8 up to it.
        only: these of GPUs' all-reduces; empty: all.
        env: for sweeps between declared nodes, such as an emulated network.

    Returns:
        the description as TOML, and the raw samples.

    Raises:
        ConfigError: ranks failed.
    """
    sweeps = []
    for group in groups_of(max_ranks, device, much.product_rounds, only):
        nodes = group.ranks // group.per_node
        say(f"{group.ranks} rank(s) on {nodes} node(s): {', '.join(group.algorithms) or 'products'}")
        common = {"device": device, "iters": much.iters, "high": much.high, "strict": False, "quick": much.quick}
        sweeps.append(run_sweep(group, env=env if nodes > 1 else None, **common))  # type: ignore[arg-type]
    samples = measure_layouts(layouts_of(max_ranks, device), device, much, say)
    say("fitting")
    emulated = next((s["emulated"] for s in sweeps if s["emulated"]), "")
    largest = max(s["ranks"] for s in sweeps)
    nodes = max(s["nodes"] for s in sweeps)
    host = Host(name, device, usable_cores(), largest, nodes, emulated)
    return describe_measured(host, sweeps, samples, say), _raw(sweeps, samples)


def calibrate_launched(
    name: str, *, device: str, much: Effort, say: Say, only: Sequence[str] = ()
) -> tuple[str, dict[str, Any]] | None:
    """The same as one rank of a launcher's world, which is then the only group; None on ranks other than 0.

    Args:
        only: these of GPUs' all-reduces; empty: all.

    Raises:
        ConfigError: a pipeline or a single GPU cannot be measured so.
    """
    from yalis.comm.topology import from_environment

    topology = from_environment(os.environ)
    world, per_node = topology.world_size, topology.ranks_per_node
    group = launched_group(world, per_node, device, much.product_rounds, only)
    if topology.rank:
        say = _silent
    say(f"{world} ranks on {topology.num_nodes} node(s): {', '.join(group.algorithms)}, products")
    args = sweep.parse(_options(group, device, much.iters, 256, much.high, False, much.quick))
    allowed = os.sched_getaffinity(0)
    found = sweep.measure(args)
    os.sched_setaffinity(0, allowed)  # the engine takes its own share
    samples = measure_layouts([Layout(world, 1, topology.num_nodes)], device, much, say)
    if topology.rank:
        return None
    host = Host(name, device, usable_cores(), per_node, topology.num_nodes, found["emulated"])
    return describe_measured(host, [found], samples, say), _raw([found], samples)


def _silent(_: str) -> None:
    return None


def describe_measured(
    host: Host, sweeps: Sequence[Mapping[str, Any]], samples: Mapping[Layout, Samples], say: Say, *, draws: int = 25
) -> str:
    """Fit, check, describe; ``draws`` resamplings for the intervals."""
    # The cost model needs a cluster to be solved in: one with everything but the steps.
    curves = fit_curves(sweeps)
    draft = _parse(describe(host, sweeps, curves, [blank_rates(Layout(1, 1, 1), 1)]))
    rates = with_bounds(draft, samples, draws=draws)
    for line in [*caveats(sweeps), *disagreements(rates, sweeps)]:
        say(f"warning: {line}")
    return describe(host, sweeps, curves, rates)


def caveats(sweeps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which all-reduces of GPUs were not timed as a decode step makes them, in words."""
    return [
        f"{s['ranks']} rank(s): a CUDA graph cannot hold {name}, so it was timed call by call, launches included"
        for s in sweeps
        for name, how in s.get("timed", {}).items()
        if s.get("device") == "cuda" and how == sweep.ONE_BY_ONE
    ]


def disagreements(rates: Sequence[Rates], sweeps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where products within the engine's steps and apart from them differ by more than a tenth, in words.

    Of the shapes apart, the nearest counts: a model's matrices are of several shapes.
    """
    found = []
    for sweep_ in sweeps:
        mine = next((r for r in rates if (r.tp, r.pp) == (sweep_["ranks"], 1)), None)
        if mine is None or not sweep_.get("products"):
            continue
        for rows in (1, 8):
            within = mine.weight_s(rows, 1.0)
            apart = []
            for shape in sweep_["products"]:
                xs, ys, *_ = products_by_rows(sweep_, shape)
                apart.append(ys[xs.index(rows)])
            nearest = min(apart, key=lambda s: abs(s - within))
            if abs(nearest - within) > _AGREES * within:
                found.append(
                    f"{mine.ranks} rank(s), {rows} row(s): weights at {1e-9 / within:.1f} GB/s in the engine's steps, "
                    f"{1e-9 / nearest:.1f} apart from it; calibrate again on a quiet machine"
                )
    return found


def _parse(text: str) -> Cluster:
    return replace(parse_cluster(tomllib.loads(text), "the calibration"), rates=())


def _raw(sweeps: Sequence[Mapping[str, Any]], samples: Mapping[Layout, Samples]) -> dict[str, Any]:
    return {
        "sweeps": list(sweeps),
        "steps": [{"tp": x.tp, "pp": x.pp, "nodes": x.nodes, "samples": s} for x, s in samples.items()],
    }
