"""The file of a study: which cells it makes, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from yalis.errors import ConfigError
from yalis.study.grid import Study, load_study

TEXT = """
name = "test"
models = ["models/demo"]
workloads = ["1x16+8", "balanced:2"]
schemes = [{ tp = 1 }, { tp = 2, ranks_per_node = 1 }, { tp = 1, pp = 2 }]
all_reduce = ["rd", "shm"]
iters = 2
emulate = "alpha_s=0.001"
[[engine]]
kind = "yalis"
[[engine]]
kind = "transformers"
[allreduce]
nodes = [2, 4, 8]
algorithms = ["rd", "ring", "torch"]
[slurm]
partition = "gpu"
time = "00:10:00"
"""


def load(tmp_path: Path, text: str = TEXT) -> Study:
    (tmp_path / "s.toml").write_text(text)
    return load_study(tmp_path / "s.toml")


def test_the_grid_holds_what_can_run_once_each(tmp_path: Path) -> None:
    study = load(tmp_path)
    engines = [c for c in study.cells if c.kind != "allreduce"]
    assert [c.label for c in engines if c.workload == "1x16+8"] == [
        "yalis demo TP1, 1x16+8",  # one rank has no all-reduce: both choices are the same cell
        "yalis demo TP2, 2 nodes, rd, 1x16+8",
        "yalis demo TP1 PP2, 1x16+8",
        "transformers demo TP1, 1x16+8",
    ]
    for words in ("shm works inside one node", "transformers runs on one rank", "does not pass through the emulated"):
        assert any(words in reason for reason in study.skipped)
    sweeps = [c for c in study.cells if c.kind == "allreduce"]
    assert [(c.all_reduce, c.nodes) for c in sweeps] == [(a, n) for n in (2, 4, 8) for a in ("rd", "ring")]
    assert len({c.key for c in study.cells}) == len(study.cells)
    # Only what crosses declared nodes is emulated.
    assert {c.scheme: bool(c.emulate) for c in engines} == {"TP1": False, "TP2, 2 nodes": True, "TP1 PP2": False}


def test_other_engines_are_neither_emulated_nor_run_once_per_all_reduce(tmp_path: Path) -> None:
    text = TEXT.replace('kind = "transformers"', 'kind = "vllm"').replace("ranks_per_node = 1", "ranks_per_node = 2")
    text += '\n[[engine]]\nkind = "openai"\nurl = "http://x"\ntp = 4\nranks_per_node = 2\nserved_name = "m"\nvocab = 9'
    cells = [c for c in load(tmp_path, text).cells if c.workload == "1x16+8"]
    assert [c.label for c in cells if c.kind == "vllm"] == [
        f"vllm demo {scheme}, 1x16+8" for scheme in ("TP1", "TP2", "TP1 PP2")
    ]
    [server] = [c for c in cells if c.kind == "openai"]  # as it was started, whatever the schemes
    assert (server.label, server.emulate) == ("openai demo TP4, 2 nodes, 1x16+8", "")
    assert server.options == {"url": "http://x", "served_name": "m", "vocab": 9}


def test_loads_over_time_are_workloads_of_engines_that_serve(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("")
    loads = f"""workloads = [{{ rate = 4, burstiness = 0.5, requests = 9, input_len = 16, output_len = 8 }},
        {{ trace = "{tmp_path}/t.csv", requests = 5, time_scale = 10 }}]"""
    study = load(tmp_path, TEXT.replace('workloads = ["1x16+8", "balanced:2"]', loads))
    assert [c.label for c in study.cells if c.tp == 2 and c.kind == "yalis"] == [
        "yalis demo TP2, 2 nodes, rd, 9 of 16+8 at 4/s, burstiness 0.5",
        "yalis demo TP2, 2 nodes, rd, 5 of t.csv, 10x faster",
    ]
    assert sum("need a server" in reason for reason in study.skipped) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("name =", "nome ="), r"s.toml: object contains unknown field `nome`; known: name, models"),
        (("tp = 2", "tpp = 2"), r"schemes\[1\]: object contains unknown field `tpp`; known: tp, pp, ranks_per_node"),
        (("nodes = [2, 4, 8]", "speed = 3"), "allreduce: object contains unknown field `speed`; known: nodes"),
        (('models = ["models/demo"]', 'models = "m"'), "models='m': expected `array`, got `str`"),
        (("{ tp = 1 }", "1"), r"schemes\[0\]=1: expected `object`, got `int`"),
        (('"1x16+8"', "3"), r"workloads\[0\]=3: expected `str | object`"),
        (("[2, 4, 8]", "2"), "allreduce.nodes=2: expected `array`"),
        (("[2, 4, 8]", "[0]"), r"allreduce.nodes\[0\]=0: expected `int` >= 1"),
        (("iters = 2", "iters = 0"), "iters=0: expected `int` >= 1"),
        (("iters = 2", "timeout_s = 0"), "timeout_s=0: expected `float` > 0.0"),
        (("iters = 2", 'timeout_s = "x"'), "timeout_s='x': expected `float`, got `str`"),
        (("iters = 2", "iters = "), "not TOML"),
        (("iters = 2", 'load_format = "gguf"'), "load_format='gguf': must be one of auto, dummy"),
        (('["rd", "ring", "torch"]', '["magic"]'), "allreduce.algorithms='magic': must be one of .*, ring"),
        (('["rd", "shm"]', '["ring"]'), "all_reduce='ring': must be one of auto"),
        (("[slurm]", 'baseline = "nccl"\n[slurm]'), "allreduce.baseline='nccl': must be one of rd, ring, torch"),
        (('kind = "yalis"', 'kind = "magic"'), "engine.kind='magic': must be one of yalis, "),
        (('kind = "yalis"', 'kind = "openai"'), "engine.url is missing"),
        (('kind = "yalis"', 'kind = "yalis"\nvocab = 3'), "engine.vocab=3: is for kind openai, not yalis"),
        (("ranks_per_node = 1", "ranks_per_node = 3"), "ranks_per_node=3: does not divide 2"),
        (("balanced:2", "quick"), "workload 'quick'"),
        (('"balanced:2"', "{ rate = 1, requests = 2 }"), "workloads.rate=1: needs input_len and output_len"),
        (('"balanced:2"', "{ requests = 2 }"), "give either rate or trace"),
        (('"balanced:2"', '{ trace = "none.csv", requests = 2 }'), "workloads.trace='none.csv': no such file"),
        (("alpha_s=0.001", "beta=1"), "'beta' is unknown"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in TEXT
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, TEXT.replace(*change, 1))


def test_files_that_ask_for_nothing_or_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no cell; give models"):
        load(tmp_path, 'name = "empty"')
    with pytest.raises(ConfigError, match="none.toml: cannot be read"):
        load_study(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="engine='yalis': expected `array`"):
        load(tmp_path, 'engine = "yalis"')
