"""What the cost model says of a study's cells, before any of them is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from yalis.comm.emulation import EmulatedFabric
from yalis.study.cluster import Cluster, Constant, Wire
from yalis.study.collectives import Tier, all_reduce, hierarchical, ring_s, serves, tier_of
from yalis.study.grid import Cell
from yalis.study.sweep import sizes

# Bytes where a line of the model is drawn; those that a sweep measures.
_SIZES = sizes(256, 1 << 20)


def forecast(cell: Cell, cluster: Cluster | None) -> dict[str, Any] | None:
    """The prediction of a cell, JSON-ready; None where the model has nothing to say.

    For an engine: a row of `yalis.study.plan.as_dict`. For an all-reduce: ``seconds`` by bytes, and ``model`` in words.
    Between emulated nodes the injected constants count, everything else is the cluster's.
    """
    if cell.kind == "allreduce":
        return _all_reduce(cell, cluster)
    if cell.kind != "yalis" or cell.load or cluster is None:
        return None
    from yalis.models.config import ModelConfig
    from yalis.study.cost import Layout, predict
    from yalis.study.plan import as_dict, find_model, predict_auto
    from yalis.study.workload import parse_workload

    if cell.emulate:
        cluster = over_fabric(cluster, EmulatedFabric.parse(cell.emulate))
    layout = Layout(cell.tp, cell.pp, cell.nodes)
    model, workload = ModelConfig.from_pretrained(find_model(cell.model)), parse_workload(cell.workload)
    if cell.all_reduce == "auto":
        return as_dict(predict_auto(model, cluster, layout, workload))
    if not serves(cell.all_reduce, layout.tp, layout.tp_nodes):
        return None
    return as_dict(predict(model, cluster, layout, cell.all_reduce, workload))


def over_fabric(cluster: Cluster, fabric: EmulatedFabric) -> Cluster:
    """The cluster with an emulated network between its nodes; what was measured between them no longer counts."""

    def injected(value: float) -> Constant:
        return Constant(value, "spec", str(fabric), value, value)

    rate = injected(1 / fabric.s_per_byte if fabric.s_per_byte else 1e15)
    wire = Wire("emulated", injected(fabric.alpha_s), rate, injected(1.0))
    return replace(
        cluster,
        emulated=True,
        inter=(wire,),
        algorithms=tuple(name for name in cluster.algorithms if name != "torch"),
        bus_inter_bytes_per_s=rate,
        library_p2p_s=injected(fabric.alpha_s),
        fits=tuple(fit for fit in cluster.fits if fit.nodes == 1),
    )


def _all_reduce(cell: Cell, cluster: Cluster | None) -> dict[str, Any] | None:
    ranks, nodes, name = cell.ranks, cell.nodes, cell.all_reduce
    fabric = EmulatedFabric.parse(cell.emulate) if cell.emulate else None
    inside = tier_of(cluster.intra[0]) if cluster is not None else None
    if inside is None:
        if ranks > nodes or fabric is None:
            return None
        inside = Tier(0.0, 0.0)  # nobody shares a node
    if fabric is not None:
        across, words = Tier(fabric.alpha_s, fabric.s_per_byte), f"injected constants: {fabric}"
        formulas = {
            "ring": lambda m: ring_s(m, ranks, nodes, inside, across),
            "rd": lambda m: hierarchical(m, ranks, nodes, inside, across).total_s,
        }
        if name not in formulas:
            return None
        return _line({m: formulas[name](m) for m in _SIZES}, words)
    assert cluster is not None
    words = f"prediction for {cluster.name}"
    if name == "ring":
        across = tier_of(cluster.inter[0])
        return _line({m: ring_s(m, ranks, nodes, inside, across) for m in _SIZES}, words)
    known = {"gloo": "torch"}.get(name, name)
    if known not in cluster.algorithms or not serves(known, ranks, nodes):
        return None
    return _line({m: all_reduce(cluster, known, m, ranks, nodes).cost.total_s for m in _SIZES}, words)


def _line(seconds: Mapping[int, float], words: str) -> dict[str, Any]:
    return {"model": words, "seconds": {str(size): value for size, value in seconds.items()}}
