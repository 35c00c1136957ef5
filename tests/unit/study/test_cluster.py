"""Descriptions of clusters: shipped ones load, wrong ones are refused by file, key and value."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

import pytest

from yalis.errors import ConfigError
from yalis.study.cluster import FOLDER, KINDS, load_cluster, parse_cluster, shipped


@pytest.fixture
def raw() -> dict[str, Any]:
    return tomllib.loads((FOLDER / "perlmutter.toml").read_text())


def test_shipped_clusters_load_and_every_constant_says_where_it_comes_from() -> None:
    assert set(shipped()) >= {"perlmutter", "vista", "dgx-h100", "2xh200", "2xh100", "cpu-host"}
    for name in shipped():
        cluster = load_cluster(name)
        assert cluster.name == name
        constants = cluster.constants()
        assert len(constants) > 20
        for key, constant in constants.items():
            assert constant.kind in KINDS, key
            assert len(constant.source) > 3, key


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("device", "flops_per_s", "value"), -1.0, "device.flops_per_s.value=-1.0: must be a finite number"),
        (("device", "flops_per_s", "value"), 0, "device.flops_per_s.value=0: must be above 0"),
        (("device", "flops_per_s", "kind"), "guess", "device.flops_per_s.kind='guess': must be one of spec"),
        (("device", "flops_per_s", "low"), 1e18, "must be between low=1e\\+18"),
        (("device", "flops_per_s"), 3, "device.flops_per_s=3: must be a table"),
        (("node", "gpus"), 0, "node.gpus=0: must be an integer of at least 1"),
        (("inter", "ll", "factor", "value"), 0.5, "inter.ll.factor=0.5: must be at least 1"),
        (("inter",), {}, "inter: no wire format"),
        (("device", "colour"), "red", "device.colour is unknown"),
        (("algorithms",), ["fast"], "algorithms=\\['fast'\\]: must be a list of nccl"),
        (("name",), "", "name='': must be text"),
        (
            ("fit",),
            [{"algorithm": "rd", "ranks": 2, "nodes": 2, "segments": [[8, 1e-6]], "kind": "fitted"}],
            "segments",
        ),
    ],
)
def test_wrong_values_are_refused(raw: dict[str, Any], path: tuple[str, ...], value: Any, words: str) -> None:
    changed = copy.deepcopy(raw)
    table = changed
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    with pytest.raises(ConfigError, match=words) as caught:
        parse_cluster(changed, "some.toml")
    assert "some.toml" in str(caught.value)


def test_missing_keys_and_files_are_named(raw: dict[str, Any], tmp_path: Any) -> None:
    del raw["device"]["step_s"]
    with pytest.raises(ConfigError, match="device.step_s is missing"):
        parse_cluster(raw, "x.toml")
    with pytest.raises(ConfigError, match="not shipped \\(2xh100, 2xh200, .*perlmutter"):
        load_cluster("frontier")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="not TOML"):
        load_cluster(tmp_path / "bad.toml")


def test_fits_are_used_by_range(raw: dict[str, Any]) -> None:
    raw["fit"] = [
        {
            "algorithm": "nvrar",
            "ranks": 8,
            "nodes": 2,
            "segments": [[1024, 1e-6, 0.0], [65536, 2e-6, 1e-9]],
            "kind": "fitted",
            "source": "here",
        }
    ]
    fit = parse_cluster(raw, "x.toml").fit("nvrar", 8, 2)
    assert fit is not None
    assert fit.seconds(1000) == 1e-6
    assert fit.seconds(10_000) == pytest.approx(12e-6)
    assert fit.seconds(10**6) == pytest.approx(2e-6 + 1e-3)
    assert parse_cluster(raw, "x.toml").fit("nvrar", 8, 4) is None
