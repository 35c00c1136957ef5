"""Costs of steps and requests: by hand for small shapes, limits, and what must not get slower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yalis.errors import ConfigError
from yalis.models.config import ModelConfig
from yalis.study import cost
from yalis.study.cluster import Cluster, Constant, Fit, Rates, load_cluster
from yalis.study.cost import Layout
from yalis.study.terms import NAMES, Terms
from yalis.study.workload import Workload, kinds, parse_workload

MODELS = Path(cost.__file__).parent / "models"
M8, M70, M405 = (ModelConfig.from_pretrained(MODELS / f"llama-3.1-{n}b") for n in (8, 70, 405))
PM = load_cluster("perlmutter")


def test_weights_by_hand() -> None:
    # 8B: 32 layers of 4096x(4096+1024+1024+4096) + 3x4096x14336, and twice 128256x4096, two bytes each.
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    assert cost.layer_weight_bytes(M8, 1) == 2 * layer
    assert cost.total_weight_bytes(M8) == 2 * (32 * layer + 2 * 128256 * 4096)
    assert cost.total_weight_bytes(M8) / 1e9 == pytest.approx(16.06, abs=0.01)
    assert cost.total_weight_bytes(M405) / 1e9 == pytest.approx(811.7, abs=0.5)
    # 8 KV heads over 16 ranks: every rank holds one, so keys and values are there twice.
    assert cost.kv_token_bytes(M8, 16) == cost.kv_token_bytes(M8, 8) == 2 * 128 * 2
    assert cost.kv_token_bytes(M8, 1) == 8 * 2 * 128 * 2


def test_decode_of_one_gpu_is_the_weights_over_the_bandwidth() -> None:
    terms = cost.decode_terms(M8, PM, Layout(1, 1, 1), "nccl", 1, 512)
    read = cost.total_weight_bytes(M8) - cost.head_bytes(M8, 1)  # of the embedding one row is read
    bandwidth = PM.device.memory_bytes_per_s.value
    assert terms.gemm_s == pytest.approx(read / bandwidth)
    assert terms.attention_s == pytest.approx(512 * 32 * cost.kv_token_bytes(M8, 1) / bandwidth)
    assert terms.communication_s == 0


def test_prefill_of_one_gpu_is_bound_by_products() -> None:
    workload = Workload("x", 1, 2048, 1)
    terms = cost.prefill_terms(M8, PM, Layout(1, 1, 1), "nccl", workload)
    # Behind the last layer's attention one row of the 2048 goes on.
    flops = 2 * 2048 * (32 * cost.layer_weight_bytes(M8, 1) - cost.weight_bytes_behind_attention(M8, 1)) / 2
    assert terms.gemm_s == pytest.approx(flops / PM.device.flops_per_s.value, rel=0.02)
    # Four chunks cost about four times one.
    four = cost.prefill_terms(M8, PM, Layout(1, 1, 1), "nccl", Workload("x", 4, 2048, 1))
    assert four.total_s == pytest.approx(4 * terms.total_s, rel=0.01)


def test_prompts_are_padded_on_gpus() -> None:
    def gemm_s(tokens: int, cluster: Cluster) -> float:
        return cost.prefill_terms(M8, cluster, Layout(1, 1, 1), "nccl", Workload("x", 1, tokens, 1)).gemm_s

    assert gemm_s(400, PM) == gemm_s(512, PM) < gemm_s(513, PM) == gemm_s(640, PM)
    host = load_cluster("cpu-host")
    assert gemm_s(400, host) < gemm_s(512, host)


def test_all_reduce_term_counts_two_a_layer() -> None:
    layout = Layout(16, 1, 4)
    terms = cost.decode_terms(M405, PM, layout, "nvrar", 8, 1024)
    one = cost.all_reduce(PM, "nvrar", 8 * 16384 * 2, 16, 4).cost
    assert terms.inter_s == pytest.approx(2 * 126 * one.inter_s)
    assert terms.intra_s == pytest.approx(2 * 126 * one.intra_s)
    assert terms.flat_s == 0


def test_pipeline_of_one_request_is_as_slow_as_its_stages_in_a_row() -> None:
    one = cost.decode_terms(M70, PM, Layout(4, 1, 1), "nccl", 1, 512)
    two = cost.decode_terms(M70, PM, Layout(4, 2, 2), "nccl", 1, 512)
    assert two.gemm_s == pytest.approx(one.gemm_s, rel=1e-6)
    assert two.pipeline_s > 0
    assert two.total_s > one.total_s
    # A full pipeline waits for the slowest stage as often as there are stages: the bubble of uneven stages.
    full = cost.decode_terms(M8, PM, Layout(1, 3, 1), "nccl", 3, 512)
    stages = [cost.stage_terms(M8, PM, Layout(1, 3, 1), "nccl", cost.Step(1, 1, 512, 0, 1), s) for s in range(3)]
    assert full.total_s >= 3 * max(s.total_s for s in stages)
    assert full.wait_s > 0
    assert full.communication_s == full.pipeline_s  # the bubble is no communication


def test_only_borders_between_nodes_cross_the_network() -> None:
    # Four stages of two ranks on two nodes of four: of three borders one crosses, and the way back does.
    assert [Layout(2, 4, 2).crosses(s) for s in range(4)] == [False, True, False, True]
    assert [Layout(4, 2, 2).crosses(s) for s in range(2)] == [True, True]
    assert not any(Layout(2, 2, 1).crosses(s) for s in range(2))
    inside, across = (cost.transfer_s(PM, 8192, across=far) for far in (False, True))
    assert cost.hops_s(PM, Layout(2, 4, 2), 8192) == pytest.approx(2 * inside + across)


def rates(tp: int, pp: int, flying: int, s_per_byte: float = 1e-10) -> Rates:
    def constant(value: float) -> Constant:
        return Constant(value, "measured", "test", value, value)

    rows = tuple(s_per_byte * factor for factor in (1, 2, 40))
    names = ("step_s", "sequence_s", "layer_s", "logit_s", "arrival_s", "kv_byte_s", "kv_query_s", "pair_s")
    values = (1e-3, 1e-5, 1e-4, 1e-9, 2e-3, 1e-10, 1e-11, 1e-12)
    constants = {name: constant(value) for name, value in zip(names, values, strict=True)}
    return Rates(tp, pp, flying, **constants, rows=(1.0, 8.0, 128.0), s_per_weight_byte=rows, low=rows, high=rows)


HOST = replace(load_cluster("cpu-host"), rates=(rates(1, 1, 1), rates(2, 1, 1, 2e-10), rates(4, 1, 1, 4e-10)))


def test_ranks_that_share_a_host_cost_what_their_layout_was_measured_to() -> None:
    layout = Layout(2, 1, 1)
    terms = cost.decode_terms(M8, HOST, layout, "shm", 8, 512)
    bytes_read = 32 * cost.layer_weight_bytes(M8, 2) + cost.head_bytes(M8, 2)
    assert terms.gemm_s == pytest.approx(4e-10 * bytes_read)
    assert terms.launch_s == pytest.approx(32 * 1e-4)
    assert terms.host_s == pytest.approx(1e-3 + 8 * 1e-5)
    # Four query heads share a head of keys and values.
    assert terms.attention_s == pytest.approx(32 * 8 * 512 * cost.kv_token_bytes(M8, 2) * (1e-10 + 4e-11))
    assert terms.other_s >= 8 * M8.vocab_size / 2 * 1e-9
    first = cost.prefill_terms(M8, HOST, layout, "shm", Workload("x", 1, 128, 1))
    assert first.host_s == pytest.approx(1e-3 + 1e-5 + 2e-3)


def test_layouts_that_were_not_measured_take_what_is_alike_or_are_refused() -> None:
    pipeline = replace(HOST, rates=(*HOST.rates, rates(1, 2, 1, 5e-10)))
    # One rank of four at work, each with one thread and a core to itself: as one of two.
    found = cost.rates_of(pipeline, Layout(1, 4, 1), 1)
    assert found is not None
    assert (found.tp, found.pp, found.flying) == (1, 2, 1)
    # Four at work on two cores: as TP 4.
    found = cost.rates_of(pipeline, Layout(2, 2, 1), 2)
    assert found is not None
    assert found.ranks == 4
    with pytest.raises(ConfigError, match="no steps like those of TP8 with 8 ranks at work on 2 cores.*--max-ranks 8"):
        cost.rates_of(pipeline, Layout(8, 1, 1), 1)
    assert cost.rates_of(PM, Layout(8, 1, 1), 1) is None


def test_without_measurements_a_shared_host_is_divided_among_the_ranks_at_work() -> None:
    host = load_cluster("cpu-host")
    two, four = (cost.decode_terms(M8, host, Layout(tp, 1, 1), "rd", 1, 512) for tp in (2, 4))
    assert two.gemm_s == pytest.approx(four.gemm_s)  # half the bytes at half the speed
    assert two.launch_s == pytest.approx(four.launch_s / 2)  # two of four wait for a core
    alone = cost.decode_terms(M8, host, Layout(1, 4, 1), "rd", 1, 512)
    assert alone.launch_s == pytest.approx(two.launch_s)  # of four stages one works


def test_prefill_of_a_pipeline_fills_and_drains() -> None:
    short, long = (
        cost.prefill_terms(M70, PM, Layout(4, 4, 4), "nccl", Workload("x", n, 2048, 1)).total_s for n in (1, 16)
    )
    # n chunks over 4 stages: n + 3 stage times.
    assert long / short == pytest.approx((16 + 3) / 4, rel=0.05)


def test_memory() -> None:
    w = parse_workload("decode-heavy:8")
    assert not cost.memory(M405, PM, Layout(8, 1, 2), w).fits
    assert cost.memory(M405, PM, Layout(16, 1, 4), w).fits
    one, two = (cost.memory(M70, PM, Layout(4, pp, pp), w) for pp in (1, 2))
    assert two.weights == pytest.approx(one.weights / 2, rel=0.03)
    more = cost.memory(M70, PM, Layout(4, 1, 1), replace(w, batch=16))
    assert more.kv == 2 * one.kv


def test_a_shape_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=3"):
        cost.predict(M8, PM, Layout(3, 1, 1), "nccl", parse_workload("1x8+8"))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 64),
    context=st.integers(16, 8192),
    tp=st.sampled_from([1, 2, 4, 8, 16]),
    algorithm=st.sampled_from(["nccl", "nvrar"]),
)
def test_more_work_is_never_faster_and_a_faster_machine_never_slower(
    batch: int, context: int, tp: int, algorithm: str
) -> None:
    layout = Layout(tp, 1, PM.nodes(tp))
    here = cost.decode_terms(M70, PM, layout, algorithm, batch, context).total_s
    assert cost.decode_terms(M70, PM, layout, algorithm, batch + 1, context).total_s >= here
    assert cost.decode_terms(M70, PM, layout, algorithm, batch, context + 64).total_s >= here
    speed = PM.device.memory_bytes_per_s.value * 2
    fast = replace(PM, device=replace(PM.device, memory_bytes_per_s=Constant(speed, "assumed", "x", speed, speed)))
    assert cost.decode_terms(M70, fast, layout, algorithm, batch, context).total_s <= here
    if tp > 1:
        half = Layout(tp // 2, 1, PM.nodes(tp // 2))
        assert cost.decode_terms(M70, PM, layout, algorithm, batch, context).gemm_s <= (
            cost.decode_terms(M70, PM, half, algorithm, batch, context).gemm_s
        )


def test_terms_add_up() -> None:
    terms = Terms(**{name: float(i) for i, name in enumerate(NAMES)})
    assert terms.total_s == sum(range(len(NAMES)))
    assert (terms + terms.scaled(2)).total_s == 3 * terms.total_s
    assert Terms.from_dict(terms.as_dict()) == terms


def test_workloads_have_exact_sizes() -> None:
    assert parse_workload("prefill-heavy") == Workload("prefill-heavy", 8, 2048, 128)
    assert parse_workload("decode-heavy:32").batch == 32
    assert parse_workload("4x100+20").tokens_out == 80
    assert set(kinds()) == {"prefill-heavy", "decode-heavy", "balanced"}
    for bad in ("fast", "balanced:x", "0x1+1", "balanced:0"):
        with pytest.raises(ConfigError, match="workload"):
            parse_workload(bad)


def test_an_all_reduce_that_was_measured_with_its_norm_holds_the_norm() -> None:
    def fit(alpha_s: float, norm: bool) -> Fit:
        return Fit("nccl", 2, 1, ((1e9, alpha_s, 0.0),), "fitted", "test", norm)

    gpus = load_cluster("2xh100")
    layout = Layout(2, 1, 1)
    alone, both = (
        cost.decode_terms(M8, replace(gpus, fits=fits), layout, "nccl", 32, 512)
        for fits in ((fit(7e-6, False),), (fit(7e-6, False), fit(16e-6, True)))
    )
    assert (alone.flat_s, both.flat_s) == pytest.approx((64 * 7e-6, 64 * 16e-6))
    norms = 32 * 32 * 8 * 4096 * 2  # bytes: 32 layers, 32 rows, four passes over two residuals
    assert alone.other_s - both.other_s == pytest.approx(norms / gpus.device.memory_bytes_per_s.value)
    # One that was not measured so is as it was.
    assert cost.all_reduce(replace(gpus, fits=(fit(7e-6, False),)), "nccl", 8192, 2, 1, norm=True).norm is False
