"""Enumerate layouts and all-reduces, predict each, and recommend one with a reason. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yalis.errors import ConfigError
from yalis.models.config import ModelConfig, validate_parallel
from yalis.study.cluster import Cluster
from yalis.study.collectives import automatic, comparable, crossovers, references
from yalis.study.cost import Layout, Prediction, decode_message_bytes, message_bytes, predict, rates_of
from yalis.study.terms import NAMES
from yalis.study.workload import Workload

OBJECTIVES = {
    "e2e": "least time from arrival to the last token",
    "tpot": "least time per output token",
    "ttft": "least time to first token",
    "throughput": "most output tokens per second and GPU",
}
SHAPES = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Plan:
    """Every prediction for one model, cluster and workload.

    Attributes:
        rows: fastest all-reduce of each layout first; by number of GPUs, then TP descending.
        best: the recommended row, None where nothing fits. reason: why, in words.
        crossovers: for each (ranks, nodes) of a TP group: from which message size on which all-reduce is best.
        references: likewise, seconds by formula of an all-reduce of ``reference_bytes``, one step of the whole batch.
    """

    model: str
    cluster: Cluster
    workload: Workload
    objective: str
    rows: tuple[Prediction, ...]
    best: Prediction | None
    reason: str
    crossovers: dict[tuple[int, int], list[tuple[int, str, str]]]
    references: dict[tuple[int, int], dict[str, float]]
    reference_bytes: int


def shipped_models() -> list[str]:
    """Names of the model shapes that come with yalis."""
    return sorted(path.name for path in SHAPES.iterdir() if (path / "config.json").exists())


def find_model(name: str | Path) -> Path:
    """Folder of a model: a path with config.json, or a shipped shape's name.

    Raises:
        ConfigError: neither.
    """
    path = Path(name)
    if (path / "config.json").exists():
        return path
    if (SHAPES / str(name) / "config.json").exists():
        return SHAPES / str(name)
    raise ConfigError(f"model {str(name)!r}: no folder with config.json, and not a shipped shape: {shipped_models()}")


def parse_gpus(text: str) -> list[int]:
    """``2..512`` (doubling from the first), ``8``, or a list ``4,6,8``.

    Raises:
        ConfigError: none of these.
    """
    try:
        if ".." in text:
            low, high = map(int, text.split(".."))
            counts, n = [], low
            while 1 <= n <= high:
                counts.append(n)
                n *= 2
        else:
            counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(f"--gpus {text!r}: write LOW..HIGH (doubling), one number, or a list such as 4,8,12")
    return sorted(set(counts))


def layouts(model: ModelConfig, cluster: Cluster, gpus: int, ranks_per_node: int | None = None) -> list[Layout]:
    """TP x PP of ``gpus`` ranks that the model can be split into, TP descending.

    TP groups must be whole nodes or lie within one, as ranks are placed in blocks. Where steps were measured, layouts
    unlike all of those are left out.

    Raises:
        ConfigError: ``ranks_per_node`` is more than a node has.
    """
    if ranks_per_node is not None and ranks_per_node > cluster.gpus_per_node:
        raise ConfigError(
            f"ranks_per_node={ranks_per_node}: a node of {cluster.name} has {cluster.gpus_per_node}; declare no more"
        )
    per_node = ranks_per_node or min(gpus, cluster.gpus_per_node)
    if gpus % per_node:
        return []
    nodes = gpus // per_node
    if nodes > cluster.max_nodes:
        return []
    found = []
    for tp in range(gpus, 0, -1):
        if gpus % tp or (tp % per_node and per_node % tp):
            continue
        layout = Layout(tp, gpus // tp, nodes)
        try:
            validate_parallel(model, layout.tp, layout.pp)
            for flying in range(1, layout.pp + 1):
                rates_of(cluster, layout, flying)
        except ConfigError:
            continue
        found.append(layout)
    return found


def predict_auto(model: ModelConfig, cluster: Cluster, layout: Layout, workload: Workload) -> Prediction:
    """With the all-reduce that the engine's ``auto`` takes in a decode step, as a run without further options has it.

    Raises:
        ConfigError: as of `predict`, or the description does not know that all-reduce.
    """
    name = automatic(cluster, decode_message_bytes(model, layout, workload), layout.tp, layout.tp_nodes)
    return predict(model, cluster, layout, name, workload)


def score(prediction: Prediction, objective: str) -> float:
    """Lower is better."""
    if objective == "throughput":
        return -prediction.throughput / prediction.layout.ranks
    return {
        "e2e": prediction.e2e_s,
        "tpot": prediction.tpot.total_s,
        "ttft": prediction.ttft.total_s,
    }[objective]


def make_plan(
    model_path: Path,
    cluster: Cluster,
    workload: Workload,
    gpus: Sequence[int],
    *,
    objective: str = "e2e",
    algorithms: Sequence[str] = (),
    ranks_per_node: int | None = None,
) -> Plan:
    """Predict everything that can be built.

    Args:
        algorithms: all-reduces to compare; default the cluster's.
        ranks_per_node: declares nodes smaller than the cluster's.

    Raises:
        ConfigError: unknown objective, or no layout at all.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective {objective!r}: must be one of {', '.join(OBJECTIVES)}")
    model = ModelConfig.from_pretrained(model_path)
    rows: list[Prediction] = []
    places: dict[tuple[int, int], list[tuple[int, str, str]]] = {}
    formulas: dict[tuple[int, int], dict[str, float]] = {}
    nbytes = message_bytes(model, workload.batch)
    names = tuple(algorithms) or cluster.algorithms
    for count in gpus:
        for layout in layouts(model, cluster, count, ranks_per_node):
            usable = comparable(cluster, names, layout.tp, layout.tp_nodes)
            if layout.tp == 1:
                usable = usable[:1] or [names[0]]
            found = [predict(model, cluster, layout, a, workload) for a in usable]
            rows += sorted(found, key=lambda p: score(p, objective))
            if layout.tp > 1:
                place = layout.tp, layout.tp_nodes
                places[place] = crossovers(cluster, names, *place)
                formulas[place] = references(cluster, nbytes, *place)
    if not rows:
        raise ConfigError(
            f"no layout of {', '.join(map(str, gpus))} GPUs suits the model on {cluster.name} "
            f"({cluster.gpus_per_node} GPUs a node, at most {cluster.max_nodes} nodes)"
            + ("; of more ranks no steps were measured: yalis calibrate --max-ranks N" if cluster.rates else "")
        )
    fitting = [row for row in rows if row.memory.fits]
    best = min(fitting, key=lambda p: score(p, objective)) if fitting else None
    return Plan(
        str(model_path),
        cluster,
        workload,
        objective,
        tuple(rows),
        best,
        _reason(best, fitting, objective) if best else _nothing_fits(rows),
        places,
        formulas,
        nbytes,
    )


def _nothing_fits(rows: Sequence[Prediction]) -> str:
    least = min(rows, key=lambda p: p.memory.total)
    return (
        f"nothing fits: {least.layout.name} on {least.layout.ranks} GPUs needs {least.memory.total / 1e9:.0f} GB a "
        f"GPU, {least.memory.available / 1e9:.0f} GB are there; allow more GPUs or a smaller batch"
    )


def _label(prediction: Prediction) -> str:
    layout = prediction.layout
    reduce = f" with {prediction.algorithm}" if layout.tp > 1 else ""
    return f"{layout.name}{reduce} on {layout.nodes} node(s)"


def _reason(best: Prediction, fitting: Sequence[Prediction], objective: str) -> str:
    words = [f"{_label(best)}: {OBJECTIVES[objective]} of {len(fitting)} candidates that fit."]
    layout = best.layout
    same = [p for p in fitting if p.layout == layout and p.algorithm != best.algorithm]
    if same:
        other = min(same, key=lambda p: score(p, objective))
        words.append(
            f"With {other.algorithm} the same layout takes {other.tpot.total_s / best.tpot.total_s:.2f}x per token: "
            f"{_biggest(best, other)}."
        )
    others = [p for p in fitting if p.layout.pp != layout.pp and p.layout.ranks == layout.ranks]
    if others:
        other = min(others, key=lambda p: score(p, objective))
        words.append(
            f"{_label(other)} on as many GPUs: TTFT {other.ttft.total_s / best.ttft.total_s:.2f}x, TPOT "
            f"{other.tpot.total_s / best.tpot.total_s:.2f}x; {_biggest(best, other)}."
        )
    smaller = [p for p in fitting if p.layout.ranks < layout.ranks]
    if smaller:
        other = min(smaller, key=lambda p: score(p, objective))
        gain = other.e2e_s / best.e2e_s
        more = layout.ranks / other.layout.ranks
        words.append(
            f"Against the best on {other.layout.ranks} GPUs it is {gain:.2f}x faster for {more:.0f}x the GPUs."
        )
    return " ".join(words)


def _biggest(best: Prediction, other: Prediction) -> str:
    mine, theirs = best.tpot.as_dict(), other.tpot.as_dict()
    name = max(mine, key=lambda n: abs(theirs[n] - mine[n]))
    return f"the largest difference per token is {NAMES[name]}, {1e3 * (theirs[name] - mine[name]):+.2f} ms"


def as_dict(prediction: Prediction) -> dict[str, Any]:
    """One prediction, JSON-ready."""
    layout, memory = prediction.layout, prediction.memory
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "nodes": layout.nodes,
        "gpus": layout.ranks,
        "all_reduce": prediction.algorithm,
        "variant": prediction.decode_choice.variant,
        "wire": prediction.decode_choice.wire,
        "fits": memory.fits,
        "memory_bytes": {
            "weights": memory.weights,
            "kv": memory.kv,
            "activations": memory.activations,
            "available": memory.available,
        },
        "ttft_s": prediction.ttft.total_s,
        "tpot_s": prediction.tpot.total_s,
        "e2e_s": prediction.e2e_s,
        "tokens_per_s": prediction.throughput,
        "communication_share": prediction.communication_share,
        "ttft_terms_s": prediction.ttft.as_dict(),
        "tpot_terms_s": prediction.tpot.as_dict(),
    }


def _is_automatic(cluster: Cluster, row: Prediction) -> bool:
    """Whether a run without further options would use this row's all-reduce in a decode step."""
    return row.algorithm == automatic(cluster, row.decode_bytes, row.layout.tp, row.layout.tp_nodes)


def plan_record(plan: Plan) -> dict[str, Any]:
    """The whole plan, JSON-ready, with the constants it rests on."""
    return {
        "model": plan.model,
        "cluster": plan.cluster.name,
        "cluster_title": plan.cluster.title,
        "emulated": plan.cluster.emulated,
        "workload": vars(plan.workload),
        "objective": plan.objective,
        "rows": [{**as_dict(row), "auto": _is_automatic(plan.cluster, row)} for row in plan.rows],
        "best": as_dict(plan.best) if plan.best else None,
        "reason": plan.reason,
        "crossovers": [
            {"ranks": ranks, "nodes": nodes, "from_bytes": size, "all_reduce": name, "variant": variant}
            for (ranks, nodes), rows in sorted(plan.crossovers.items())
            for size, name, variant in rows
        ],
        "references": [
            {"ranks": ranks, "nodes": nodes, "bytes": plan.reference_bytes, "seconds": seconds}
            for (ranks, nodes), seconds in sorted(plan.references.items())
        ],
        "constants": {
            key: {"value": c.value, "kind": c.kind, "source": c.source} for key, c in plan.cluster.constants().items()
        },
    }
