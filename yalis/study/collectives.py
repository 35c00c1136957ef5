"""What an all-reduce costs: pure functions of sizes, ranks and the constants of a tier.

``m`` bytes on ``P = N * G`` ranks, N nodes of G. ``alpha`` is the latency of a message in seconds, ``beta`` seconds per
byte *of payload* (the wire format's factor included), separately inside a node (``i``) and between nodes (``e``). The
time to add numbers is not counted: it is hidden behind the transfers on every machine described here, except where a
cluster brings measured fits, which hold it.

Every rank sends on a link of its own (a NIC per rank, or its share of the node's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yalis.errors import ConfigError
from yalis.study import nccl
from yalis.study.cluster import Cluster, Ring, Wire


@dataclass(frozen=True)
class Tier:
    """One tier's constants: ``alpha_s`` in seconds, ``beta_s`` in seconds per byte of payload."""

    alpha_s: float
    beta_s: float


@dataclass(frozen=True)
class Cost:
    """Seconds of one all-reduce by tier; ``flat_s`` where the algorithm does not tell them apart."""

    intra_s: float = 0.0
    inter_s: float = 0.0
    flat_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The whole call."""
        return self.intra_s + self.inter_s + self.flat_s


@dataclass(frozen=True)
class Choice:
    """The cheapest way that an engine's algorithm has for one message: formula, wire formats, cost.

    ``norm``: the cost holds the residual and the norm behind the all-reduce.
    """

    algorithm: str
    variant: str
    wire: str
    cost: Cost
    norm: bool = False


def doubling_steps(nodes: int) -> int:
    """Exchanges in a row of recursive doubling over ``nodes``: log2, and two more where that is no power of two."""
    power = 1 << (nodes.bit_length() - 1)
    return power.bit_length() - 1 + (0 if power == nodes else 2)


def ring_s(m: float, ranks: int, nodes: int, intra: Tier, inter: Tier) -> float:
    """Flat ring: 2(P-1) steps of m/P, of which 2(N-1) cross nodes; the slowest link sets the pace of the bytes."""
    if ranks == 1:
        return 0.0
    crossing = 2 * (nodes - 1)
    inside = 2 * (ranks - 1) - crossing
    beta_s = max(intra.beta_s if ranks > nodes else 0.0, inter.beta_s if nodes > 1 else 0.0)
    return inside * intra.alpha_s + crossing * inter.alpha_s + 2 * (ranks - 1) / ranks * m * beta_s


def tree_s(m: float, ranks: int, nodes: int, intra: Tier, inter: Tier) -> float:
    """Double binary tree between nodes, chain inside; up and down, both trees carry half, pipelined: 2 m beta."""
    if ranks == 1:
        return 0.0
    per_node = ranks / nodes
    beta_s = max(intra.beta_s if ranks > nodes else 0.0, inter.beta_s if nodes > 1 else 0.0)
    return 2 * ((per_node - 1) * intra.alpha_s + math.log2(nodes) * inter.alpha_s) + 2 * m * beta_s


def flat_doubling_s(m: float, ranks: int, nodes: int, intra: Tier, inter: Tier) -> float:
    """Recursive doubling over all ranks: every step carries the whole message."""
    inside, across = doubling_steps(ranks // nodes), doubling_steps(nodes)
    return inside * (intra.alpha_s + m * intra.beta_s) + across * (inter.alpha_s + m * inter.beta_s)


def rabenseifner_s(m: float, ranks: int, nodes: int, intra: Tier, inter: Tier) -> float:
    """Recursive halving, then doubling: 2 log2 P steps, 2(P-1)/P m bytes, of which most inside the node."""
    if ranks == 1:
        return 0.0
    per_node = ranks // nodes
    inside, across = math.log2(per_node), math.log2(nodes)
    inside_bytes = 2 * (per_node - 1) / per_node * m
    across_bytes = 2 * (nodes - 1) / nodes * m / per_node
    return (
        2 * inside * intra.alpha_s
        + inside_bytes * intra.beta_s
        + 2 * across * inter.alpha_s
        + across_bytes * inter.beta_s
    )


def hierarchical(m: float, ranks: int, nodes: int, intra: Tier, inter: Tier) -> Cost:
    """NVRAR: reduce-scatter inside, recursive doubling of 1/G between nodes, all-gather inside."""
    per_node = ranks // nodes
    inside = 2 * (intra.alpha_s + (per_node - 1) / per_node * m * intra.beta_s) if per_node > 1 else 0.0
    return Cost(inside, doubling_steps(nodes) * (inter.alpha_s + m / per_node * inter.beta_s))


def direct(m: float, ranks: int, nodes: int, intra: Tier, inter: Tier) -> Cost:
    """As `hierarchical`, but every node sends its part to every other at once: one latency, N-1 times the bytes."""
    per_node = ranks // nodes
    inside = 2 * (intra.alpha_s + (per_node - 1) / per_node * m * intra.beta_s) if per_node > 1 else 0.0
    across = inter.alpha_s + (nodes - 1) * m / per_node * inter.beta_s if nodes > 1 else 0.0
    return Cost(inside, across)


def one_shot_s(m: float, ranks: int, tier: Tier) -> float:
    """Everybody sends everything to everybody: one latency, P-1 times the bytes."""
    return tier.alpha_s + (ranks - 1) * m * tier.beta_s if ranks > 1 else 0.0


def two_shot_s(m: float, ranks: int, tier: Tier) -> float:
    """Direct reduce-scatter, then direct all-gather: two latencies, 2(P-1)/P times the bytes."""
    return 2 * (tier.alpha_s + (ranks - 1) / ranks * m * tier.beta_s) if ranks > 1 else 0.0


def direct_crossover_bytes(nodes: int, per_node: int, inter: Tier) -> float:
    """Message size up to which `direct` beats `hierarchical` between nodes; infinite where it always does."""
    steps = doubling_steps(nodes)
    if nodes - 1 <= steps:
        return math.inf
    return per_node * inter.alpha_s / inter.beta_s * (steps - 1) / (nodes - 1 - steps)


# ---- the engine's algorithms ------------------------------------------------------------------------------------


def tier_of(wire: Wire) -> Tier:
    """Latency and payload beta of a wire format."""
    return Tier(wire.alpha_s.value, wire.s_per_byte)


def nccl_setting(cluster: Cluster) -> nccl.Setting | None:
    """What NCCL's tuner is told of the cluster; None where the baseline is described as a ring."""
    library = cluster.library
    if isinstance(library, Ring):
        return None
    return nccl.Setting(
        cluster.bus_intra_bytes_per_s.value,
        cluster.bus_inter_bytes_per_s.value,
        library.channels.value,
        library.latency_inter_s.value,
        library.generation,
        library.cpu,
    )


def _library(cluster: Cluster, m: float, ranks: int, nodes: int) -> list[tuple[str, str, Cost]]:
    setting, library = nccl_setting(cluster), cluster.library
    if setting is not None:
        return [(shape, protocol, Cost(flat_s=s)) for shape, protocol, s in nccl.ways(setting, m, ranks, nodes)]
    assert isinstance(library, Ring)
    intra = Tier(library.intra_s.value, 1 / cluster.bus_intra_bytes_per_s.value)
    inter = Tier(library.inter_s.value, 1 / cluster.bus_inter_bytes_per_s.value)
    seconds = library.base_s.value + ring_s(m, ranks, nodes, intra, inter)
    return [("ring", cluster.library_name, Cost(flat_s=seconds))]


def _wires(cluster: Cluster, ranks: int, nodes: int) -> list[tuple[str, Tier, Tier]]:
    pairs = []
    for i in cluster.intra if ranks > nodes else cluster.intra[:1]:
        for e in cluster.inter if nodes > 1 else cluster.inter[:1]:
            name = e.name if ranks == nodes else i.name if nodes == 1 else f"{i.name}/{e.name}"
            pairs.append((name, tier_of(i), tier_of(e)))
    return pairs


def _hierarchical(cluster: Cluster, m: float, ranks: int, nodes: int) -> list[tuple[str, str, Cost]]:
    return [("hierarchical", name, hierarchical(m, ranks, nodes, i, e)) for name, i, e in _wires(cluster, ranks, nodes)]


def _fused(cluster: Cluster, m: float, ranks: int, nodes: int) -> list[tuple[str, str, Cost]]:
    if nodes == 1:
        return _shots(cluster, m, ranks, nodes)
    found = _hierarchical(cluster, m, ranks, nodes)
    return found + [("direct", n, direct(m, ranks, nodes, i, e)) for n, i, e in _wires(cluster, ranks, nodes)]


def _shots(cluster: Cluster, m: float, ranks: int, nodes: int) -> list[tuple[str, str, Cost]]:
    if nodes > 1:
        return []
    found = []
    for wire in cluster.intra:
        tier = tier_of(wire)
        found.append(("one-shot", wire.name, Cost(intra_s=one_shot_s(m, ranks, tier))))
        found.append(("two-shot", wire.name, Cost(intra_s=two_shot_s(m, ranks, tier))))
    return found


def _two_shot(cluster: Cluster, m: float, ranks: int, nodes: int) -> list[tuple[str, str, Cost]]:
    return [found for found in _shots(cluster, m, ranks, nodes) if found[0] == "two-shot"]


def references(cluster: Cluster, m: float, ranks: int, nodes: int) -> dict[str, float]:
    """Seconds of ``m`` bytes by every formula, each over its cheapest wire format: what an algorithm is compared with.

    Not all of them exist in the engine; none knows a measurement.
    """
    if ranks == 1:
        return {}
    flat = {"ring": ring_s, "tree": tree_s, "flat doubling": flat_doubling_s, "Rabenseifner": rabenseifner_s}
    wires = _wires(cluster, ranks, nodes)
    found = {name: min(formula(m, ranks, nodes, i, e) for _, i, e in wires) for name, formula in flat.items()}
    tiered = {"hierarchical": hierarchical, "direct": direct} if nodes > 1 else {}
    found |= {name: min(way(m, ranks, nodes, i, e).total_s for _, i, e in wires) for name, way in tiered.items()}
    for variant, _, cost in _shots(cluster, m, ranks, nodes):
        found[variant] = min(cost.total_s, found.get(variant, math.inf))
    return found


_Ways = Callable[[Cluster, float, int, int], Sequence[tuple[str, str, Cost]]]
VARIANTS: dict[str, _Ways] = {
    "nccl": _library,
    "torch": _library,
    "nvrar": _fused,
    "rd": _hierarchical,
    "shm": _shots,
    "symm_mem": _shots,
    "two_shot": _two_shot,
}
_ONE_NODE = ("shm", "symm_mem", "two_shot")


def serves(algorithm: str, ranks: int, nodes: int) -> bool:
    """Whether the engine's ``algorithm`` exists for this shape."""
    return not (algorithm in _ONE_NODE and nodes > 1) and ranks % nodes == 0


def comparable(cluster: Cluster, algorithms: Sequence[str], ranks: int, nodes: int) -> list[str]:
    """Those of ``algorithms`` that serve this shape and may be compared: the measured ones, if any was measured.

    A formula with a tier's constants is no match for a measurement of the very shape: it does not know how ranks wait
    for a core, and would win by what it leaves out.
    """
    usable = [name for name in algorithms if serves(name, ranks, nodes)]
    measured = [name for name in usable if cluster.fit(name, ranks, nodes) is not None]
    return measured or usable


def automatic(cluster: Cluster, m: float, ranks: int, nodes: int) -> str:
    """What the engine's ``auto`` takes for ``m`` bytes, by the table that it comes with.

    Raises:
        ConfigError: the description knows no algorithm for that choice.
    """
    import torch

    from yalis.comm.policy import GroupShape, choose

    device = "cpu" if cluster.device.shared else "cuda"
    shape = GroupShape(ranks, nodes, ranks // nodes, device, shared_memory=nodes == 1, contiguous=True)
    chosen = choose(shape, torch.bfloat16, int(m))
    name = "nccl" if (chosen, device) == ("torch", "cuda") else chosen
    if name not in VARIANTS:
        raise ConfigError(f"auto would take {name!r}, which the cost model does not know ({', '.join(VARIANTS)})")
    return name


def all_reduce(cluster: Cluster, algorithm: str, m: float, ranks: int, nodes: int, *, norm: bool = False) -> Choice:
    """Cost of one all-reduce of ``m`` bytes, by what was measured for this shape, else by the cheapest variant.

    Args:
        norm: together with the residual and the norm behind it, where that was measured; the choice says so.

    Raises:
        ConfigError: unknown algorithm, or it does not serve this shape.
    """
    if algorithm not in VARIANTS:
        raise ConfigError(f"all-reduce {algorithm!r}: the cost model knows {', '.join(VARIANTS)}")
    if ranks == 1:
        return Choice(algorithm, "none", "", Cost())
    if not serves(algorithm, ranks, nodes):
        raise ConfigError(f"all-reduce {algorithm!r} does not serve {ranks} ranks on {nodes} nodes")
    fit = cluster.fit(algorithm, ranks, nodes)
    if norm:
        fit = cluster.fit(algorithm, ranks, nodes, norm=True) or fit
    if fit is not None:
        seconds = fit.seconds(m)
        tier = {"torch": "flat_s", "nccl": "flat_s"}.get(algorithm)
        if tier is None:
            tier = "inter_s" if nodes > 1 else "intra_s"
        return Choice(algorithm, "measured", fit.kind, Cost(**{tier: seconds}), fit.norm)
    variant, wire, cost = min(VARIANTS[algorithm](cluster, m, ranks, nodes), key=lambda found: found[2].total_s)
    return Choice(algorithm, variant, wire, cost)


def crossovers(
    cluster: Cluster, algorithms: Sequence[str], ranks: int, nodes: int, low: int = 1 << 10, high: int = 1 << 26
) -> list[tuple[int, str, str]]:
    """The best algorithm by size: rows (from bytes, algorithm, variant), eight steps an octave."""
    usable = comparable(cluster, algorithms, ranks, nodes)
    if ranks == 1 or not usable:
        return []
    rows: list[tuple[int, str, str]] = []
    for i in range(8 * int(math.log2(high / low)) + 1):
        m = round(low * 2 ** (i / 8))
        best = min((all_reduce(cluster, name, m, ranks, nodes) for name in usable), key=lambda c: c.cost.total_s)
        if not rows or rows[-1][1:] != (best.algorithm, best.variant):
            rows.append((m, best.algorithm, best.variant))
    return rows
