"""All-reduce formulas: by hand, their limits, and how they grow."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yalis.errors import ConfigError
from yalis.study import collectives as c
from yalis.study import nccl
from yalis.study.cluster import Cluster, Fit, load_cluster
from yalis.study.collectives import Tier

IN, OUT = Tier(2e-6, 1e-11), Tier(5e-6, 4e-11)
KIB = 1024
us = 1e-6


def test_by_hand() -> None:
    m = 1e6
    # 16 ranks on 4 nodes: 30 ring steps, 6 across; 2 * 15/16 of a megabyte over the slower link.
    assert c.ring_s(m, 16, 4, IN, OUT) == pytest.approx(24 * 2 * us + 6 * 5 * us + 2 * 15 / 16 * m * 4e-11)
    # up and down: 3 hops in the chain and log2(4) levels; both halves, twice the bytes.
    assert c.tree_s(m, 16, 4, IN, OUT) == pytest.approx(2 * (3 * 2 * us + 2 * 5 * us) + 2 * m * 4e-11)
    assert c.flat_doubling_s(m, 16, 4, IN, OUT) == pytest.approx(2 * (2 * us + m * 1e-11) + 2 * (5 * us + m * 4e-11))
    assert c.rabenseifner_s(m, 16, 4, IN, OUT) == pytest.approx(
        4 * 2 * us + 1.5 * m * 1e-11 + 4 * 5 * us + 1.5 * m / 4 * 4e-11
    )
    nvrar = c.hierarchical(m, 16, 4, IN, OUT)
    assert nvrar.intra_s == pytest.approx(2 * (2 * us + 0.75 * m * 1e-11))
    assert nvrar.inter_s == pytest.approx(2 * (5 * us + 0.25 * m * 4e-11))
    spread = c.direct(m, 16, 4, IN, OUT)
    assert spread.intra_s == nvrar.intra_s
    assert spread.inter_s == pytest.approx(5 * us + 3 * 0.25 * m * 4e-11)
    assert c.one_shot_s(m, 8, IN) == pytest.approx(2 * us + 7 * m * 1e-11)
    assert c.two_shot_s(m, 8, IN) == pytest.approx(2 * (2 * us + 7 / 8 * m * 1e-11))


def test_doubling_steps() -> None:
    assert [c.doubling_steps(n) for n in range(1, 10)] == [0, 1, 3, 2, 4, 4, 4, 3, 5]


@pytest.mark.parametrize("nodes", [4, 8, 16, 32])
def test_direct_crossover_is_where_the_two_cost_the_same(nodes: int) -> None:
    m = c.direct_crossover_bytes(nodes, 4, OUT)
    assert c.direct(m, 4 * nodes, nodes, IN, OUT).total_s == pytest.approx(
        c.hierarchical(m, 4 * nodes, nodes, IN, OUT).total_s
    )
    assert c.direct(m / 2, 4 * nodes, nodes, IN, OUT).total_s < c.hierarchical(m / 2, 4 * nodes, nodes, IN, OUT).total_s
    assert c.direct(m * 2, 4 * nodes, nodes, IN, OUT).total_s > c.hierarchical(m * 2, 4 * nodes, nodes, IN, OUT).total_s


def test_crossover_of_the_brief_example() -> None:
    # G=4, 5 us, 25 GB/s, flags beside data: N=4 250 KB, N=8 125 KB, N=16 68 KB.
    tier = Tier(5e-6, 2 / 25e9)
    assert [round(c.direct_crossover_bytes(n, 4, tier) / 1e3) for n in (4, 8, 16)] == [250, 125, 68]
    assert math.isinf(c.direct_crossover_bytes(2, 4, tier))


FORMULAS = {
    "ring": c.ring_s,
    "tree": c.tree_s,
    "rd": c.flat_doubling_s,
    "rabenseifner": c.rabenseifner_s,
    "hierarchical": lambda *a: c.hierarchical(*a).total_s,
    "direct": lambda *a: c.direct(*a).total_s,
}
TIERS = st.builds(Tier, st.floats(1e-7, 1e-3), st.floats(1e-12, 1e-7))


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 1 << 28),
    nodes=st.sampled_from([1, 2, 4, 8, 64]),
    g=st.sampled_from([1, 2, 4, 8]),
    i=TIERS,
    e=TIERS,
)
def test_every_formula_grows_with_bytes_and_latency(name: str, m: int, nodes: int, g: int, i: Tier, e: Tier) -> None:
    f, ranks = FORMULAS[name], nodes * g
    here = f(m, ranks, nodes, i, e)
    assert here >= 0
    assert (here == 0) == (ranks == 1)
    assert f(2 * m, ranks, nodes, i, e) >= here
    assert f(m, ranks, nodes, i, Tier(2 * e.alpha_s, e.beta_s)) >= here
    assert f(m, 2 * ranks, 2 * nodes, i, e) >= here * (1 - 1e-9)
    if ranks > 1:  # nobody moves fewer bytes than 2(P-1)/P over the faster link at no latency
        least = 2 * (ranks - 1) / ranks * m * min(i.beta_s, e.beta_s) / max(g, nodes)
        assert here >= least * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(nodes=st.sampled_from([2, 4, 8, 16, 32]), e=TIERS)
def test_small_messages_doubling_is_logarithmic_and_ring_linear(nodes: int, e: Tier) -> None:
    assert c.flat_doubling_s(0, nodes, nodes, IN, e) == pytest.approx(math.log2(nodes) * e.alpha_s)
    assert c.ring_s(0, nodes, nodes, IN, e) == pytest.approx(2 * (nodes - 1) * e.alpha_s)


def test_engine_algorithms() -> None:
    cluster = load_cluster("perlmutter")
    assert c.all_reduce(cluster, "nvrar", 1 << 17, 1, 1).cost.total_s == 0
    inside = c.all_reduce(cluster, "nvrar", 8 * KIB, 4, 1)
    assert inside.variant == "one-shot"
    assert inside.cost.inter_s == 0
    assert c.all_reduce(cluster, "nvrar", 1 << 22, 4, 1).variant == "two-shot"
    small, large = (c.all_reduce(cluster, "nvrar", m, 32, 8) for m in (16 * KIB, 1 << 21))
    assert (small.variant, large.variant) == ("direct", "hierarchical")
    assert large.wire.endswith("simple")
    assert c.all_reduce(cluster, "nccl", 1 << 30, 32, 8).wire == "simple"
    assert {c.all_reduce(cluster, "two_shot", m, 4, 1).variant for m in (8 * KIB, 1 << 26)} == {"two-shot"}
    with pytest.raises(ConfigError, match="'two_shot' does not serve 8 ranks on 2 nodes"):
        c.all_reduce(cluster, "two_shot", 8, 8, 2)
    with pytest.raises(ConfigError, match="cost model knows"):
        c.all_reduce(cluster, "magic", 8, 2, 1)
    with pytest.raises(ConfigError, match="does not serve 8 ranks on 2 nodes"):
        c.all_reduce(cluster, "shm", 8, 8, 2)


SETTING = nccl.Setting(230e9, 80e9, 8, 0.0, "ampere", "amd")


def test_nccl_by_hand() -> None:
    # 16 ranks on 4 nodes: a tree of LL128 costs 14 + 2 (3 * 1.25 + 2 * 8.5) us, at 120/128 of 0.92 of the NICs' rate,
    # halved for up and down, of which 60 percent are left at 1 MiB.
    m = 1 << 20
    bandwidth = 80e9 * 0.92 * 120 / 128 / 2 * 0.6
    assert nccl.time_s(SETTING, "tree", "ll128", m, 16, 4) == pytest.approx(55.5 * us + m / bandwidth)
    # A ring of LL: 24 hops inside cost a post of an AMD host each, 6 cross; 19 GB/s at most on more than two nodes.
    ring = (6.6 + 24 * 2.0 + 6 * 2.7) * us
    assert nccl.time_s(SETTING, "ring", "ll", m, 16, 4) == pytest.approx(ring + 30 / 16 * m / 19e9)
    # A ring of Simple pays 1.4 times its latency once each channel and rank has 64 bytes.
    empty = nccl.latency_s(SETTING, "ring", "simple", 16, 4)
    assert empty == pytest.approx((8.4 + 24 * 6.0 + 6 * 14.0) * us)
    assert nccl.time_s(SETTING, "ring", "simple", 64 * 8 * 16, 16, 4) > 1.4 * empty
    assert nccl.time_s(SETTING, "ring", "simple", 64 * 8 * 16 - 1, 16, 4) < 1.01 * empty + 8192 * 2 / 80e9
    # With a GPU a node, the ring pays the tree's latency between nodes.
    assert nccl.latency_s(SETTING, "ring", "ll", 4, 4) == pytest.approx((6.6 + 6 * 5.0) * us)
    assert nccl.time_s(SETTING, "tree", "ll", 8, 4, 4) > 0


def test_nccl_takes_the_cheapest_way_and_the_model_says_which() -> None:
    cluster = load_cluster("perlmutter")
    for m in (1 << 13, 1 << 18, 1 << 22):
        chosen = c.all_reduce(cluster, "nccl", m, 32, 8)
        shape, protocol, seconds = min(nccl.ways(c.nccl_setting(cluster), m, 32, 8), key=lambda way: way[2])
        assert (chosen.variant, chosen.wire, chosen.cost.flat_s) == (shape, protocol, seconds)


def _measured(cluster: Cluster, *algorithms: str) -> Cluster:
    fits = [Fit(name, 4, 1, ((1e6, 50e-6, 1e-9),), "fitted", "here") for name in algorithms]
    return dataclasses.replace(cluster, fits=tuple(fits))


def test_a_formula_is_not_compared_with_a_measurement() -> None:
    cluster = _measured(load_cluster("cpu-host"), "shm")
    assert c.all_reduce(cluster, "rd", KIB, 4, 1).cost.total_s < c.all_reduce(cluster, "shm", KIB, 4, 1).cost.total_s
    assert c.comparable(cluster, ("shm", "rd", "torch"), 4, 1) == ["shm"]
    assert c.comparable(cluster, ("shm", "rd", "torch"), 2, 1) == ["shm", "rd", "torch"]
    assert {row[1] for row in c.crossovers(cluster, ("shm", "rd", "torch"), 4, 1)} == {"shm"}


def test_auto_is_what_the_engine_takes() -> None:
    host, perlmutter = load_cluster("cpu-host"), load_cluster("perlmutter")
    assert c.automatic(host, 2 * KIB, 4, 1) == "shm"
    assert c.automatic(host, 2 * KIB, 4, 2) == "rd"
    assert c.automatic(perlmutter, 2 * KIB, 16, 4) == "nccl"


def test_references_hold_every_formula() -> None:
    cluster = load_cluster("perlmutter")
    across = c.references(cluster, 1 << 17, 16, 4)
    assert set(across) == {"ring", "tree", "flat doubling", "Rabenseifner", "hierarchical", "direct"}
    assert set(c.references(cluster, 1 << 17, 4, 1)) >= {"ring", "one-shot", "two-shot"}
    assert c.references(cluster, 1 << 17, 1, 1) == {}


def test_crossovers_are_ascending_and_agree_with_the_costs() -> None:
    cluster = load_cluster("perlmutter")
    rows = c.crossovers(cluster, ["nccl", "nvrar"], 32, 8)
    assert len(rows) >= 3
    assert [r[0] for r in rows] == sorted(r[0] for r in rows)
    for size, name, variant in rows:
        best = min((c.all_reduce(cluster, a, size, 32, 8) for a in ("nccl", "nvrar")), key=lambda x: x.cost.total_s)
        assert (best.algorithm, best.variant) == (name, variant)
    assert c.crossovers(cluster, ["nccl"], 1, 1) == []
