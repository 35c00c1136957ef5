"""From measuring the machine to explaining a run: the commands of docs/study.md, one after another."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import DEMO
from tests.support.forked import run_module
from tests.support.ranks import ROOT
from yalis.study.cluster import load_cluster
from yalis.study.explain import explain, read_record

WORKLOAD = "4x32+33"
SHAPE = ("--batch-size", "4", "--input-len", "32", "--output-len", "33", "--num-iters", "3", "--num-iters-warmup", "1")
BENCH = ("bench", "latency", "--model", DEMO, *SHAPE, "--tp", "2", "--cpu-threads", "1")

pytestmark = pytest.mark.timeout(280)  # commands that start ranks several times over


def yalis(*words: str | Path, env: dict[str, str] | None = None) -> str:
    """What the command prints; it must succeed."""
    whole = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    done = run_module("yalis", *map(str, words), cwd=ROOT, env=whole, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This machine's description."""
    path = tmp_path_factory.mktemp("calibrated") / "here.toml"
    yalis("calibrate", "--quick", "--max-ranks", "2", "--output", path)
    return path


@pytest.fixture(scope="module")
def prediction(cluster: Path) -> tuple[str, Path]:
    """The stored prediction's id, and the folder that holds it."""
    store = cluster.parent / "store"
    told = yalis("plan", DEMO, "--cluster", cluster, "--workload", WORKLOAD, "--gpus", "1..2", "--store", store)
    found = re.search(r"^prediction (\w+)", told, re.MULTILINE)
    assert found is not None, told
    return found[1], store


@pytest.fixture(scope="module")
def near(prediction: tuple[str, Path]) -> tuple[str, Path]:
    """What measuring against the prediction prints, and its record."""
    name, store = prediction
    record = store.parent / "near.json"
    return yalis(*BENCH, "--against", name, "--store", store, "--output-json", record), record


def test_calibration_measures_every_layout_link_and_product(cluster: Path) -> None:
    found = load_cluster(cluster)
    assert {(r.tp, r.pp, r.flying) for r in found.rates} == {(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2)}
    assert {(f.algorithm, f.ranks, f.nodes) for f in found.fits} >= {("p2p", 2, 1), ("p2p", 2, 2), ("rd", 2, 2)}
    assert {(p.n, p.k) for p in found.products if p.ranks == 2} == {(8192, 1024), (1024, 8192), (512, 512)}
    raw = json.loads(cluster.with_suffix(".samples.json").read_text())
    assert {(s["tp"], s["pp"]) for s in raw["steps"]} == {(1, 1), (2, 1), (1, 2)}


def test_a_calibrated_machine_gives_a_stored_prediction(prediction: tuple[str, Path]) -> None:
    name, store = prediction
    stored = json.loads((store / f"{name}.json").read_text())
    assert {(row["tp"], row["pp"]) for row in stored["rows"]} >= {(1, 1), (2, 1), (1, 2)}
    assert all(0 < row["tpot_s"] < 1 for row in stored["rows"])


def test_a_measurement_shows_the_residual_of_every_term(prediction: tuple[str, Path], near: tuple[str, Path]) -> None:
    told, file = near
    name, store = prediction
    assert f"against prediction {name}" in told
    residuals = read_record(file)["results"]["against"]
    rows: dict[str, Any] = {row["name"]: row for row in residuals["rows"]}
    assert residuals["id"] == name
    assert {"TTFT", "TPOT", "intra all-reduce"} <= set(rows)
    stored = json.loads((store / f"{name}.json").read_text())["rows"]
    assert rows["TPOT"]["predicted_s"] in [row["tpot_s"] for row in stored if (row["tp"], row["nodes"]) == (2, 1)]
    assert rows["TPOT"]["measured_s"] == pytest.approx(explain(read_record(file), "").tpot_s)


def test_two_records_are_explained_and_told_apart(near: tuple[str, Path]) -> None:
    _, file = near
    # Two nodes with a slow network in between: what that changes is the all-reduce between nodes.
    far = file.parent / "far.json"
    fabric = {"YALIS_EMULATED_FABRIC": "alpha_s=0.004"}
    yalis(*BENCH, "--ranks-per-node", "1", "--all-reduce", "rd", "--output-json", far, env=fabric)
    for record in (file, far):
        assert abs(explain(read_record(record), "").unaccounted_share) < 0.03
        told = yalis("explain", record)
        assert "unaccounted" in told and "WARNING" not in told
    assert re.search(r"mostly inter all-reduce: \+\d", yalis("explain", file, far))
