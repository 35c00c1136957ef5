"""Rates from the engine's steps: times that the cost model makes of known rates give those rates back."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from yalis.models.config import ModelConfig
from yalis.study import steps
from yalis.study.calibrate import caveats, describe_measured, disagreements, layouts_of
from yalis.study.cluster import Cluster, Constant, Fit, Rates, load_cluster, parse_cluster
from yalis.study.cost import Layout, decode_terms, prefill_terms
from yalis.study.describe import Host
from yalis.study.fit import trimmed_mean
from yalis.study.workload import Workload

ROOT = Path(__file__).parents[3]
HOST = replace(
    load_cluster("cpu-host"),
    fits=(
        Fit("shm", 2, 1, ((1e6, 4e-6, 1e-10),), "fitted", "test"),
        Fit("shm", 4, 1, ((1e6, 30e-6, 3e-10),), "fitted", "test"),
        Fit("p2p", 2, 1, ((1e6, 20e-6, 2e-10),), "fitted", "test"),
    ),
)
LAYOUTS = layouts_of(4, "cpu")


def _truth(layout: Layout, flying: int) -> Rates:
    """A host of two cores: as slow as ranks at work divide it, and slower where they outnumber the cores."""

    def plain(value: float) -> Constant:
        return Constant(value, "measured", "truth", value, value)

    active = layout.tp * flying
    slow = active if layout.ranks > 1 else 1.0
    overhead = 1.0 if active <= 2 else 1.7
    rows = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
    costs = tuple(slow * max(1.5e-11, 1e-12 * r) for r in rows)
    return Rates(
        layout.tp,
        layout.pp,
        flying,
        step_s=plain(4e-4 * overhead),
        sequence_s=plain(7e-6),
        layer_s=plain(6e-5 * overhead),
        logit_s=plain(3e-10),
        arrival_s=plain(6e-4),
        kv_byte_s=plain(2e-11 * slow),
        kv_query_s=plain(1e-11 * slow),
        pair_s=plain(7e-12 * slow),
        rows=rows,
        s_per_weight_byte=costs,
        low=costs,
        high=costs,
    )


TRUTH = tuple(_truth(x, flying) for x in LAYOUTS for flying in sorted({1, x.pp}))


def _samples(cluster: Cluster) -> dict[Layout, steps.Samples]:
    found: dict[Layout, steps.Samples] = {}
    for layout in LAYOUTS:
        for shape in steps.shapes_of(layout, first=layout == LAYOUTS[0]):
            for run in steps.RUNS[shape]:
                model, context = steps.model_of(shape), run.input_len + run.output_len / 2
                first = prefill_terms(model, cluster, layout, "shm", run.workload).total_s
                step = decode_terms(model, cluster, layout, "shm", run.batch, context).total_s
                kinds = {"first": [first] * 5, "step": [step] * 5}
                found.setdefault(layout, {}).setdefault(shape, {})[run.name] = kinds
    return found


@pytest.fixture(scope="module")
def found() -> list[Rates]:
    return steps.fit_rates(HOST, _samples(replace(HOST, rates=TRUTH)), trimmed_mean)


def test_known_rates_are_found_in_every_layout(found: list[Rates]) -> None:
    assert [(r.tp, r.pp, r.flying) for r in found] == [(r.tp, r.pp, r.flying) for r in TRUTH]
    for rates, truth in zip(found, TRUTH, strict=True):
        # Weights of the tiny models are not told from their overheads: small, not nothing.
        assert rates.layer_s.value == pytest.approx(truth.layer_s.value, rel=0.3)
        assert rates.step_s.value == pytest.approx(truth.step_s.value, rel=0.25)
        assert rates.logit_s.value == pytest.approx(truth.logit_s.value, rel=0.3)
        for rows in (1, 128, 512):
            assert rates.weight_s(rows, 1.0) == pytest.approx(truth.weight_s(rows, 1.0), rel=0.12)


@pytest.mark.parametrize("shape", ["llama-254m", "qwen3-0.6b"])
def test_models_of_other_shapes_are_predicted(found: list[Rates], shape: str) -> None:
    model = ModelConfig.from_pretrained(ROOT / "bench/shapes" / shape)
    for layout in LAYOUTS:
        for batch in (1, 8):
            work = Workload("x", batch, 128, 33)
            predicted, true = (
                (
                    prefill_terms(model, replace(HOST, rates=rates), layout, "shm", work).total_s,
                    decode_terms(model, replace(HOST, rates=rates), layout, "shm", batch, 144.5).total_s,
                )
                for rates in (tuple(found), TRUTH)
            )
            assert predicted == pytest.approx(true, rel=0.08), (layout, batch)


def test_solving() -> None:
    assert steps.solve(lambda x: 2 + 3 * x, 5.0, 0.1) == pytest.approx(1.0)
    assert steps.solve(lambda x: 2 + 3 * x, 1.0, 0.1) == 0.0
    assert steps.solve(lambda x: max(1e-3, 4 * x), 8e-3, 1e-5) == pytest.approx(2e-3)
    assert steps.solve(lambda x: x + max(0.0, 3 * (x - 1)), 5.0, 10.0) == pytest.approx(2.0)


def _sweep(ranks: int, nodes: int, s_per_byte: float = 1.5e-11, **more: Any) -> dict[str, Any]:
    rows = {str(r): [s_per_byte * max(1, r / 16)] * 6 for r in (1, 8, 64, 512)}
    products = {"wide": rows, "tall": rows} if nodes == 1 else {}
    return {"ranks": ranks, "nodes": nodes, "emulated": "", "skipped": {}, "products": products, **more}


def _curve(alpha_s: float, beta_s: float) -> dict[str, list[float]]:
    return {str(2**i): [alpha_s + 2**i * beta_s] * 6 for i in range(8, 21)}


def test_a_description_holds_what_was_measured_with_its_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["yalis", "calibrate", "--output", 'a "strange"\\name.toml'])
    samples = _samples(replace(HOST, rates=TRUTH))
    for of_layout in samples.values():  # a machine that is a tenth faster at times
        for runs in of_layout.values():
            for kinds in runs.values():
                for values in kinds.values():
                    values[0] *= 0.9
    wires = {"all_reduce": {"shm": _curve(4e-6, 1e-10)}, "ping_pong": _curve(20e-6, 2e-10)}
    sweeps = [
        _sweep(1, 1),
        _sweep(2, 1, 3e-11, **wires),
        _sweep(2, 2, all_reduce={"rd": _curve(1e-4, 1e-9)}, ping_pong=_curve(90e-6, 1e-9)),
        _sweep(4, 1, 6e-11, all_reduce={"shm": _curve(30e-6, 3e-10)}, skipped={"nvrar": 'no "library"'}),
    ]
    said: list[str] = []
    host = Host('my "host"', "cpu", 2, 4, 2, "")
    text = describe_measured(host, sweeps, samples, said.append, draws=3)
    cluster = parse_cluster(tomllib.loads(text), "here.toml")
    assert cluster.name == 'my "host"'
    assert cluster.notes["command"].endswith('a "strange"\\name.toml')
    assert cluster.notes["without nvrar"] == 'no "library"'
    assert (cluster.gpus_per_node, cluster.device.cores, cluster.device.shared) == (4, 2, True)
    assert len(cluster.rates) == len(TRUTH)
    one = cluster.rates_for(1, 1, 1)
    assert one is not None
    assert one.low[0] < one.s_per_weight_byte[0] <= one.high[0]
    assert one.layer_s.low <= one.layer_s.value <= one.layer_s.high
    assert one.layer_s.kind == "fitted"
    for nodes, alpha_s in ((1, 20e-6), (2, 90e-6)):
        fit = cluster.fit("p2p", 2, nodes)
        assert fit is not None
        assert fit.seconds(256) == pytest.approx(alpha_s, rel=0.05)
    assert cluster.intra[0].alpha_s.value == pytest.approx(4e-6, rel=0.02)
    assert not said


def test_products_within_and_apart_from_the_engine_must_agree(found: list[Rates]) -> None:
    assert disagreements(found, [_sweep(1, 1), _sweep(2, 1, 3e-11)]) == []
    (words,) = disagreements(found, [_sweep(2, 1, 4e-11)])[:1]
    assert "2 rank(s), 1 row(s): weights at 3" in words


def test_a_description_of_gpus_says_what_it_is_not_good_for() -> None:
    assert caveats("cpu") == []
    (words,) = caveats("cuda")
    assert "CUDA graph" in words and "2xh100" in words


def test_without_a_second_rank_the_wires_are_assumed() -> None:
    samples = {LAYOUTS[0]: _samples(replace(HOST, rates=TRUTH))[LAYOUTS[0]]}
    text = describe_measured(Host("one", "cpu", 2, 1, 1, ""), [_sweep(1, 1)], samples, lambda _: None, draws=1)
    cluster = parse_cluster(tomllib.loads(text), "one.toml")
    assert {w.alpha_s.kind for w in (*cluster.intra, *cluster.inter)} == {"assumed"}
