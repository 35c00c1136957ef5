"""Rates from the engine's steps: times that the cost model makes of known rates give those rates back."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from yalis.config import EngineConfig
from yalis.models.config import ModelConfig, validate_parallel
from yalis.study import steps
from yalis.study.calibrate import describe_measured, disagreements, layouts_of
from yalis.study.cluster import Cluster, Constant, Fit, Rates, load_cluster, parse_cluster
from yalis.study.cost import Layout, decode_terms, layer_weight_bytes, prefill_terms
from yalis.study.describe import Host
from yalis.study.fit import trimmed_mean
from yalis.study.shapes import model_of, models_of
from yalis.study.sweep import IN_GRAPH, ONE_BY_ONE, products_of
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


def _samples(cluster: Cluster, layouts: Sequence[Layout] = LAYOUTS) -> dict[Layout, steps.Samples]:
    """What the engine would take on such a host, or such GPUs."""
    device, algorithm = ("cpu", "shm") if cluster.device.shared else ("cuda", "nccl")
    found: dict[Layout, steps.Samples] = {}
    for layout in layouts:
        for shape in steps.shapes_of(layout, device, first=layout == layouts[0]):
            for run in models_of(device).runs(shape):
                model, context = model_of(device, shape), run.input_len + run.output_len / 2
                first = prefill_terms(model, cluster, layout, algorithm, run.workload).total_s
                step = decode_terms(model, cluster, layout, algorithm, run.batch, context).total_s
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


# Two GPUs: a layer of 20 us, weights at 3 TB/s and slower with many rows, an all-reduce with its norm at 12 us.
def _gpu_truth(tp: int) -> Rates:
    def plain(value: float) -> Constant:
        return Constant(value, "measured", "truth", value, value)

    rows = (1.0, 2.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
    costs = tuple(max(3.4e-13 * (1 + 0.002 * min(r, 64)), 1.4e-15 * r) for r in rows)
    small = {"step_s": 6e-5, "sequence_s": 2e-7, "layer_s": 2e-5 / tp, "logit_s": 2e-12, "arrival_s": 9e-4}
    attention = {"kv_byte_s": 3e-13, "kv_query_s": 1e-14, "pair_s": 1e-14}
    constants = {name: plain(value) for name, value in (small | attention).items()}
    return Rates(tp, 1, 1, rows=rows, s_per_weight_byte=costs, low=costs, high=costs, **constants)


GPU_LAYOUTS = layouts_of(2, "cuda")
GPUS = replace(
    load_cluster("2xh100"),
    fits=(
        Fit("nccl", 2, 1, ((1e9, 6e-6, 5e-12),), "fitted", "test"),
        Fit("nccl", 2, 1, ((1e9, 12e-6, 6e-12),), "fitted", "test", norm=True),
    ),
)


def test_known_rates_of_gpus_are_found_from_their_models() -> None:
    truth = tuple(_gpu_truth(tp) for tp in (1, 2))
    found = steps.fit_rates(GPUS, _samples(replace(GPUS, rates=truth), GPU_LAYOUTS), trimmed_mean)
    for rates, true in zip(found, truth, strict=True):
        assert rates.layer_s.value == pytest.approx(true.layer_s.value, rel=0.05)
        assert rates.step_s.value == pytest.approx(true.step_s.value, rel=0.05)
        for rows in (1, 8, 32, 512, 2048):
            assert rates.weight_s(rows, 1.0) == pytest.approx(true.weight_s(rows, 1.0), rel=0.05)
    llama = ModelConfig.from_pretrained(ROOT / "bench/shapes/llama-3.1-8b")
    for layout in GPU_LAYOUTS:
        for batch in (1, 8, 32):
            predicted, wanted = (
                decode_terms(llama, replace(GPUS, rates=rates), layout, "nccl", batch, 576).total_s
                for rates in (tuple(found), truth)
            )
            assert predicted == pytest.approx(wanted, rel=0.05), (layout, batch)


def test_models_of_gpus_stream_from_memory_and_are_tuned_on_two_ranks() -> None:
    models, wide = models_of("cuda"), model_of("cuda", "wide")
    assert layer_weight_bytes(wide, 2) > 2 * 60 * 2**20  # L2 of an H200
    assert wide.num_layers * layer_weight_bytes(wide, 2) > 512 * 2**20
    for shape in models.sizes:
        model = model_of("cuda", shape)
        validate_parallel(model, 2, 1)
        assert max(run.input_len + run.output_len for run in models.runs(shape)) <= models.max_model_len
        assert models.max_model_len <= model.max_position_embeddings
    # Decode steps at every number of rows for which the engine chooses kernels, and at most as many as it runs at once.
    assert {run.batch for run in models.wide} >= {1, 8, 32, 64}
    assert max(run.batch for run in models.wide) <= EngineConfig(model="x").max_num_seqs


def test_a_description_of_gpus_holds_norms_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="some GPU", total_memory=80e9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    truth = tuple(_gpu_truth(tp) for tp in (1, 2))
    samples = _samples(replace(GPUS, rates=truth), GPU_LAYOUTS)
    one = {"ranks": 1, "nodes": 1, "emulated": "", "skipped": {}, "device": "cuda", "timed": {}}
    rows = {str(r): [max(3.4e-13 * (1 + 0.002 * min(r, 64)), 1.4e-15 * r)] * 5 for r in (1, 8, 64, 512)}
    products = dict.fromkeys(products_of("cuda"), rows)
    two = {
        "ranks": 2,
        "all_reduce": {"nccl": _curve(6e-6, 5e-12), "slow": _curve(3e-5, 5e-12)},
        "all_reduce_rmsnorm": {"nccl": _curve(12e-6, 6e-12)},
        "ping_pong": _curve(9e-6, 5e-12),
        "timed": {"nccl": IN_GRAPH, "slow": ONE_BY_ONE},
    }
    said: list[str] = []
    sweeps = [{**one, "products": products}, {**one, "products": products, **two}]
    text = describe_measured(Host("gpus", "cuda", 1, 2, 1, ""), sweeps, samples, said.append, draws=1)
    cluster = parse_cluster(tomllib.loads(text), "gpus.toml")
    assert said == [
        "warning: 2 rank(s): a CUDA graph cannot hold slow, so it was timed call by call, launches included"
    ]
    assert [r.tp for r in cluster.rates] == [1, 2]
    plain, normed = (cluster.fit("nccl", 2, 1, norm=norm) for norm in (False, True))
    assert plain is not None and normed is not None
    assert "in CUDA graphs" in plain.source
    assert (plain.seconds(8192), normed.seconds(8192)) == pytest.approx((6.04e-6, 12.05e-6), rel=0.02)
    assert {(p.n, p.k) for p in cluster.products} == set(products_of("cuda").values())
    # GPUs do not compete: two stages of one rank each are priced as TP 1.
    stages = cluster.rates_for(1, 2, 2)
    assert stages is not None
    assert stages.tp == 1


def test_without_a_second_rank_the_wires_are_assumed() -> None:
    samples = {LAYOUTS[0]: _samples(replace(HOST, rates=TRUTH))[LAYOUTS[0]]}
    text = describe_measured(Host("one", "cpu", 2, 1, 1, ""), [_sweep(1, 1)], samples, lambda _: None, draws=1)
    cluster = parse_cluster(tomllib.loads(text), "one.toml")
    assert {w.alpha_s.kind for w in (*cluster.intra, *cluster.inter)} == {"assumed"}
