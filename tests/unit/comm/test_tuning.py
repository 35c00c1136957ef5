"""Tuned tables and plans, without processes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yalis.comm import policy, tuning
from yalis.comm.nvrar.library import ALGORITHMS, FORMATS, Plan
from yalis.comm.policy import GroupShape
from yalis.comm.tuning import Limits, Row, TableKey, TunedTable
from yalis.errors import ConfigError

KEY = TableKey("1.0", "abc", "NVIDIA H200", 2, 4)
PLAN = Plan("doubling", "cells", 8, 512)
NORM_PLAN = Plan("doubling", "cells", 8, 256, 4)
TABLE = TunedTable(
    KEY,
    {"bfloat16": [Row(8192, "nvrar", PLAN, 3.1, {"torch": 12.0}), Row(65536, "torch", None, 9.0, {})]},
    {"bfloat16": [Row(8192, "nvrar", NORM_PLAN, 5.0, {}), Row(65536, "nvrar", PLAN, 6.0, {})]},
)
SHAPE = GroupShape(8, 2, 4, "cuda", False, True, nvrar_bytes=1 << 20)


def test_written_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YALIS_TUNING_DIR", str(tmp_path))
    path = tuning.save(TABLE)
    assert path == tmp_path / "all-reduce-nvidia-h200-2x4.json"
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no draft is left"
    found = tuning.find(KEY)
    assert found is not None
    assert found.to_json() == TABLE.to_json() and found.digest() == TABLE.digest()
    assert found.plan(torch.bfloat16, 8192) == PLAN
    assert found.plan(torch.bfloat16, 8193) is None
    assert found.plan(torch.bfloat16, 8192, norm=True) == NORM_PLAN
    assert found.plan(torch.bfloat16, 65537, norm=True) is None
    assert found.plan(torch.float32, 4) is None
    assert found.policy_rows(torch.bfloat16) == [(8192, "nvrar"), (65536, "torch")]
    assert found.policy_rows(torch.float16) is None


@pytest.mark.parametrize("field", ["version", "sources", "device", "nodes", "local"])
def test_a_table_of_something_else_is_left_out(field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tuning.save(TABLE, tmp_path / "table.json")
    other = 7 if field in ("nodes", "local") else "other"
    logging.getLogger("yalis").propagate = True
    with caplog.at_level(logging.WARNING):
        assert tuning.find(replace(KEY, **{field: other}), path) is None
    assert f"{field} " in caplog.text and "run `yalis tune` again" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("key"),
        lambda d: d.pop("norms"),
        lambda d: d["norms"]["bfloat16"].reverse(),
        lambda d: d["key"].pop("nodes"),
        lambda d: d["rows"]["bfloat16"][0].update(algorithm="ring"),
        lambda d: d["rows"]["bfloat16"][0].update(plan=None),
        lambda d: d["rows"]["bfloat16"][0]["plan"].update(algorithm="ring"),
        lambda d: d["rows"]["bfloat16"].reverse(),
        lambda d: d["rows"]["bfloat16"][0].pop("us"),
    ],
)
def test_a_damaged_table_is_refused(change, tmp_path: Path) -> None:
    data = json.loads(TABLE.to_json())
    change(data)
    with pytest.raises(ConfigError, match="run `yalis tune` again"):
        TunedTable.from_json(json.dumps(data))
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data))
    assert tuning.find(KEY, path) is None


def test_no_table_is_no_matter(tmp_path: Path) -> None:
    assert tuning.find(KEY, tmp_path / "none.json") is None
    with pytest.raises(ConfigError, match="--output"):
        tuning.save(TABLE, Path("/proc/no/table.json"))


@given(
    device=st.sampled_from(["cpu", "cuda"]),
    nodes=st.integers(1, 9),
    local=st.integers(1, 9),
    blocks=st.integers(1, 128),
    threads=st.sampled_from([128, 512]),
    formats=st.sampled_from([("cells",), FORMATS]),
    relay=st.booleans(),
    parts=st.sampled_from([1, 2, 4, 8]),
    nbytes=st.integers(1, 1 << 23),
    rows=st.integers(1, 300),
)
def test_plans_are_within_limits(
    device: str,
    nodes: int,
    local: int,
    blocks: int,
    threads: int,
    formats: tuple[str, ...],
    relay: bool,
    parts: int,
    nbytes: int,
    rows: int,
) -> None:
    if device == "cpu":
        threads, relay, parts = 1, False, 1
    limits = Limits(device, nodes, local, blocks, threads, ("cells",) if relay else formats, relay, parts)
    plain, norm = tuning.candidate_plans(limits, nbytes), tuning.candidate_norm_plans(limits, nbytes, rows)
    for plans in (plain, norm):
        assert len(set(plans)) == len(plans) > 0
        assert not relay or all(plan.blocks <= 4 for plan in plans), "a put per block, phase and rank"
    for plan in (tuning.default_plan(limits, nbytes), tuning.default_norm_plan(limits, nbytes), *plain, *norm):
        assert plan.parts <= limits.parts and (plan.parts < 2 or plan.parts * rows <= limits.blocks)
        assert plan.algorithm in ALGORITHMS and plan.format in limits.formats
        assert 1 <= plan.blocks <= limits.blocks
        assert 1 <= plan.threads <= limits.threads
        assert plan.threads % 32 == 0 or device == "cpu"


def test_forced_nvrar_serves_what_its_memory_holds() -> None:
    for nbytes, name in ((1 << 20, "nvrar"), ((1 << 20) + 2, "torch")):
        assert policy.choose(SHAPE, torch.bfloat16, nbytes, "nvrar") == name
        assert policy.choose(SHAPE, torch.bfloat16, nbytes, "auto", [(1 << 62, "nvrar")]) == name
    assert policy.explain(SHAPE, torch.bfloat16, "nvrar") == [(1 << 20, "nvrar"), (1 << 62, "torch")]
    closed = replace(SHAPE, nvrar_bytes=0)
    assert "not open" in str(policy.why_not("nvrar", closed))
    assert policy.explain(closed, torch.bfloat16, "auto", [(8192, "nvrar")]) == [(1 << 62, "torch")]


def plan_on_gpus(nodes: int, local: int, nbytes: int, relay: bool = False) -> Plan:
    formats = ("cells",) if relay else FORMATS
    return tuning.default_plan(Limits("cuda", nodes, local, 128, 512, formats, relay, 8), nbytes)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_two_ranks_have_one_exchange(shape: tuple[int, int]) -> None:
    for nbytes in (8, 1 << 16, 1 << 18, 1 << 23):
        plan = plan_on_gpus(*shape, nbytes)
        assert plan.algorithm == "one_shot"
        assert plan.format == ("dense" if nbytes >= 1 << 16 else "cells")
    assert {p.algorithm for p in tuning.candidate_plans(Limits("cuda", *shape, 128, 512, FORMATS), 1 << 20)} == {
        "one_shot"
    }


def test_the_cost_model_chooses_the_algorithm() -> None:
    assert plan_on_gpus(2, 4, 4096).algorithm == "one_shot", "one step"
    assert plan_on_gpus(2, 4, 1 << 21).algorithm == "doubling", "fewer bytes"
    # Between nodes: direct saves steps while messages are small, doubling saves bytes.
    assert plan_on_gpus(8, 8, 1 << 16, relay=True).algorithm == "direct"
    assert plan_on_gpus(8, 8, 1 << 23, relay=True).algorithm == "doubling"
    # Three nodes pay fold and unfold for doubling: three steps of one shard, direct one step of two.
    assert plan_on_gpus(3, 4, 1 << 23, relay=True).algorithm == "direct"
    fast = tuning.Costs(1.0, 1000.0)
    assert tuning.model_us("doubling", 4, 1, 1000, fast, fast) == 2 * (1 + 1)
    assert tuning.model_us("doubling", 5, 1, 1000, fast, fast) == 4 * (1 + 1)
    assert tuning.model_us("direct", 4, 2, 1000, fast, fast) == 2 * (1 + 0.5) + 1 + 3 * 0.5
    assert tuning.model_us("one_shot", 2, 2, 1000, fast, tuning.Costs(5.0, 100.0)) == 5 + 20
