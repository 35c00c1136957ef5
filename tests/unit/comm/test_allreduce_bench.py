"""The all-reduce benchmark: inputs, sizes, table, record and options."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yalis.bench import allreduce, harness
from yalis.cli.bench_allreduce import byte_size
from yalis.cli.main import main
from yalis.comm import Communicator, Topology
from yalis.errors import ConfigError


@given(
    ranks=st.integers(1, 200),
    count=st.integers(1, 300),
    dtype=st.sampled_from(sorted(allreduce.DTYPES)),
    seed=st.randoms(),
)
def test_crafted_sums_are_exact_in_any_order(ranks: int, count: int, dtype: str, seed: object) -> None:
    kind, cpu = allreduce.DTYPES[dtype], torch.device("cpu")
    inputs = [allreduce.crafted(r, ranks, count, kind, cpu) for r in range(ranks)]
    exact = sum(x.double() for x in inputs)
    seed.shuffle(inputs)  # type: ignore[attr-defined]
    total = torch.zeros(count, dtype=kind)
    for x in inputs:
        total = total + x
    assert torch.equal(total.double(), exact)


def test_crafted_inputs_tell_ranks_and_positions_apart() -> None:
    a, b = (allreduce.crafted(r, 4, 64, torch.bfloat16, torch.device("cpu")) for r in (0, 1))
    assert not torch.equal(a, b)
    assert len(set(a.tolist())) > 8
    with pytest.raises(ConfigError, match="300 ranks"):
        allreduce.crafted(0, 300, 4, torch.bfloat16, torch.device("cpu"))


def test_sizes() -> None:
    assert allreduce.message_sizes(2048, 16384, 2) == [2048, 4096, 8192, 16384]
    assert allreduce.message_sizes(8, 8, 2) == [8]
    for begin, end, factor in ((16, 8, 2), (0, 8, 2), (8, 16, 1)):
        with pytest.raises(ConfigError):
            allreduce.message_sizes(begin, end, factor)


def test_wrong_sums_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = Communicator.create(Topology(), [0])
    assert allreduce.count_wrong(comm, 100, torch.float32, False) == 0
    monkeypatch.setattr(comm, "all_reduce", lambda x, out=None, tag="": out.fill_(-5))
    assert allreduce.count_wrong(comm, 100, torch.float32, False) == 100


def test_table_and_keys() -> None:
    comm = Communicator.create(Topology(), [0])
    lines: list[str] = []
    rows = allreduce.run_allreduce_bench([comm], [1024, 2048], ["float32"], iters=3, warmup=1, emit=lines.append)
    assert [row.count for row in rows] == [256, 512]
    assert "out-of-place" in lines[1]
    assert "#wrong" in lines[1]
    assert lines[-2] == "# Out of bounds values : 0 OK"
    assert lines[-1].startswith("# Avg bus bandwidth    : ")
    record = json.loads(json.dumps(rows[0].as_dict()))
    assert {"time", "alg_bw", "bus_bw", "nwrong"} <= set(record["in_place"])
    assert "samples" not in record["in_place"]
    with pytest.raises(ConfigError, match="int8"):
        allreduce.run_allreduce_bench([comm], [1024], ["int8"], iters=1, warmup=0)


def test_bandwidths_and_the_star() -> None:
    m = allreduce.Measurement(10.0, 2.0, 3.0, 0, {}, [])
    row = allreduce.Row(2048, 1024, "bfloat16", "rd", True, m, m)
    assert "3.00*" in allreduce.format_row(row)
    assert any("flat-ring equivalent" in line for line in allreduce.trailer([row]))
    bad = allreduce.Measurement(10.0, 2.0, 3.0, 4, {}, [])
    assert "# Out of bounds values : 4 FAILED" in allreduce.trailer([allreduce.Row(1, 1, "", "", False, m, bad)])


def test_summary() -> None:
    got = harness.summarize([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (got["median"], got["min"], got["max"], got["mean"]) == (3.0, 1.0, 5.0, 3.0)
    assert got["p10"] == pytest.approx(1.4)
    assert got["spread"] == pytest.approx((4.6 - 1.4) / 3)
    assert harness.percentile([7.0], 0.99) == 7.0


def test_record_is_whole_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    harness.write_record(path, "test", config={"n": 1}, results=[1], samples={"x_s": [0.5]})
    record = json.loads(path.read_text())
    assert {"kind", "argv", "config", "results", "samples", "machine", "env", "time_utc"} == set(record)
    assert record["samples"] == {"x_s": [0.5]}
    assert "torch" in record["machine"]["versions"]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        harness.write_record(path, "test", config={}, results=object(), samples={})
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "nowhere" / "r.json", "nowhere/r.json.*No such file.*name a file in a folder"),
        (Path("/proc/r.json"), "/proc/r.json"),
    ):
        with pytest.raises(ConfigError, match=words):
            harness.write_record(path, "test", config={}, results=[], samples={})
    with pytest.raises(ConfigError, match="is a folder"):
        harness.check_writable(tmp_path, "--output-json")
    harness.check_writable(tmp_path / "new.json", "--output-json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bench", ["allreduce", "latency", "throughput", "serve"])
@pytest.mark.parametrize("where", ["missing", "file", "folder"])
def test_nothing_is_measured_for_a_record_that_cannot_be_written(
    bench: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("yalis.launch.launch_ranks", measure)
    monkeypatch.setattr("yalis.engine.llm.LLM", measure)
    monkeypatch.setattr("yalis.bench.serve.served_model", measure)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path = {"missing": tmp_path / "no" / "r.json", "file": tmp_path / "file" / "r.json", "folder": tmp_path / "folder"}
    argv = ["bench", bench] + ["--model", "models/demo"] * (bench in ("latency", "throughput"))
    argv += ["--plot" if bench == "serve" else "--output-json", str(path[where])]
    assert main(argv) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert str(path[where]) in said[0]
    assert "name a file in" in said[0]


def test_no_load_is_sent_for_a_result_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("yalis.bench.serve.served_model", measure)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "sub"):
        assert main(["bench", "serve", "--save-result", "--result-dir", str(folder)]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert str(folder) in said[0]


def test_byte_sizes() -> None:
    assert [byte_size(t) for t in ("8192", "8k", "2M", "1G")] == [8192, 8192, 2 << 20, 1 << 30]
    with pytest.raises(argparse.ArgumentTypeError):
        byte_size("8 apples")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--iters", "0"], "--iters 0"),
        (["--ranks", "0"], "--ranks 0"),
        (["--warmup", "-1"], "--warmup -1"),
        (["--timeout", "0"], "--timeout 0"),
        (["--dtype", "int8"], "int8"),
        (["--algorithm", "ring"], "ring"),
        (["-b", "8K", "-e", "4K"], "8192 to 4096"),
        (["-f", "1"], "step factor 1"),
    ],
)
def test_bad_options_are_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "allreduce", *options]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]
