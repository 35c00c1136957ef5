"""Plans: what is enumerated, what is recommended and why, what is stored, and how the command behaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yalis.cli.main import main
from yalis.errors import ConfigError
from yalis.models.config import ModelConfig
from yalis.study import store
from yalis.study.cluster import load_cluster
from yalis.study.plan import find_model, layouts, make_plan, parse_gpus, plan_record, shipped_models
from yalis.study.workload import parse_workload

PM = load_cluster("perlmutter")
W = parse_workload("decode-heavy:8")


def test_gpus() -> None:
    assert parse_gpus("2..512") == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert parse_gpus("3..13") == [3, 6, 12]
    assert parse_gpus("8,4") == [4, 8]
    for bad in ("x", "0..4", "8..4", ""):
        with pytest.raises(ConfigError, match="--gpus"):
            parse_gpus(bad)


def test_layouts_are_those_the_engine_accepts() -> None:
    model = ModelConfig.from_pretrained(find_model("llama-3.1-8b"))
    names = [(x.tp, x.pp, x.nodes, x.tp_nodes) for x in layouts(model, PM, 8)]
    assert names == [(8, 1, 2, 2), (4, 2, 2, 1), (2, 4, 2, 1), (1, 8, 2, 1)]
    assert layouts(model, PM, 8, ranks_per_node=1)[0].tp_nodes == 8
    with pytest.raises(ConfigError, match="ranks_per_node=8: a node of perlmutter has 4"):
        layouts(model, PM, 8, ranks_per_node=8)
    assert layouts(model, PM, 6) == []  # not whole nodes
    assert layouts(model, PM, 64 * 1024) == []  # more than the machine has
    assert max(x.tp for x in layouts(model, PM, 512)) <= 32  # of 32 heads


def test_recommendation_is_the_best_that_fits_and_says_why() -> None:
    plan = make_plan(find_model("llama-3.1-405b"), PM, W, [8, 16, 32])
    assert plan.best is not None
    assert plan.best.memory.fits
    assert plan.best.e2e_s == min(p.e2e_s for p in plan.rows if p.memory.fits)
    assert not any(p.memory.fits for p in plan.rows if p.layout.ranks == 8)
    assert "nvrar" in plan.reason
    assert "With nccl the same layout takes" in plan.reason
    for objective in ("tpot", "ttft", "throughput"):
        other = make_plan(find_model("llama-3.1-405b"), PM, W, [16, 32], objective=objective)
        assert other.best is not None
    none = make_plan(find_model("llama-3.1-405b"), PM, W, [4])
    assert none.best is None
    assert none.reason.startswith("nothing fits: ")
    with pytest.raises(ConfigError, match="objective 'fun'"):
        make_plan(find_model("llama-3.1-8b"), PM, W, [4], objective="fun")
    with pytest.raises(ConfigError, match="no layout of 6 GPUs"):
        make_plan(find_model("llama-3.1-8b"), PM, W, [6])


def test_stored_predictions_keep_their_name_and_cannot_be_changed(tmp_path: Path) -> None:
    record = plan_record(make_plan(find_model("llama-3.1-8b"), PM, W, [4, 8]))
    name = store.save(record, tmp_path)
    loaded = store.load(name, tmp_path)
    assert loaded["rows"] == json.loads(json.dumps(record["rows"]))
    shape = {"batch": 8, "input_len": 512, "output_len": 1024}
    row = store.match(loaded, tp=8, pp=1, nodes=2, all_reduce="nccl", workload=shape)
    assert (row["tp"], row["all_reduce"]) == (8, "nccl")
    assert store.match(loaded, tp=8, pp=1, nodes=2, all_reduce="auto", workload=shape)["all_reduce"] == "nccl"
    with pytest.raises(ConfigError, match="for batch=8, the measurement for 4"):
        store.match(loaded, tp=8, pp=1, nodes=2, all_reduce="auto", workload={**shape, "batch": 4})
    with pytest.raises(ConfigError, match="has no TP8 PP1 on 1 node"):
        store.match(loaded, tp=8, pp=1, nodes=1, all_reduce="auto", workload=shape)
    path = tmp_path / f"{name}.json"
    path.write_text(path.read_text().replace("tpot", "tpet", 1))
    with pytest.raises(ConfigError, match="was changed after it was stored"):
        store.load(name, tmp_path)
    with pytest.raises(ConfigError, match=f"'nothing': not in .*there: {name}"):
        store.load("nothing", tmp_path)


def test_residuals_name_every_term() -> None:
    row = {"ttft_s": 0.1, "tpot_s": 0.01, "tpot_terms_s": {"gemm_s": 0.006, "attention_s": 0.001, "inter_s": 0.003}}
    measured = {
        "ttft_s": 0.2,
        "tpot_s": 0.02,
        "tpot_terms_s": {"gemm_s": 0.012, "attention_s": 0.0, "inter_s": 0.008},
        "joined": {"compute": ["gemm_s", "attention_s"]},
    }
    found = {name: (p, m) for name, p, m in store.residuals(row, measured)}
    assert found["TTFT"] == (0.1, 0.2)
    assert found["compute"] == (pytest.approx(0.007), 0.012)
    assert found["inter all-reduce"] == (0.003, 0.008)
    # A pipeline's clock cannot tell the wait for a stage from the transfer.
    stages = {**row, "pp": 2, "tpot_terms_s": {**row["tpot_terms_s"], "pipeline_s": 0.001, "wait_s": 0.002}}
    clocked = {**measured, "tpot_terms_s": {**measured["tpot_terms_s"], "pipeline_s": 0.004}}
    found = {name: (p, m) for name, p, m in store.residuals(stages, clocked)}
    assert found["pipeline and wait"] == (0.003, 0.004)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / name for name in ("plan.json", "plan.png")}
    arguments = ["plan", "llama-3.1-70b", "--cluster", "dgx-h100", "--workload", "balanced:4", "--gpus", "4..16"]
    extra = ["--store", str(tmp_path), "--json", str(files["plan.json"]), "--plot", str(files["plan.png"])]
    assert main([*arguments, *extra, "--all"]) == 0
    out = capsys.readouterr().out
    assert "Predicted, not measured" in out
    assert "best all-reduce by message size" in out
    name = out.split("prediction ")[-1].split()[0]
    assert store.load(name, tmp_path)["cluster"] == "dgx-h100"
    record = json.loads(files["plan.json"].read_text())
    assert {"rows", "best", "reason", "crossovers", "references", "constants"} <= set(record)
    assert "Rabenseifner" in out
    assert files["plan.png"].read_bytes()[:4] == b"\x89PNG"
    assert main([*arguments, "--no-store", "--algorithms", "nccl", "--objective", "ttft", "--ranks-per-node", "4"]) == 0
    assert "nvrar" not in capsys.readouterr().out
    for wrong, words in (
        (["plan", "no-such-model", "--no-store"], "not a shipped shape"),
        ([*arguments, "--algorithms", "magic"], "cost model knows"),
        ([*arguments, "--ranks-per-node", "0"], "at least 1"),
        ([*arguments, "--no-store", "--json", str(tmp_path / "no" / "x")], "cannot write"),
    ):
        assert main(wrong) == 1
        assert words in capsys.readouterr().err


def test_shipped_models() -> None:
    assert {"llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"} <= set(shipped_models())
    for name in shipped_models():
        ModelConfig.from_pretrained(find_model(name))
