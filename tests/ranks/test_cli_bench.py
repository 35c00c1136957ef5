"""``yalis bench latency`` as a user runs it (``bench allreduce`` has its own tests beside the communicator's)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import DEMO
from tests.support.forked import run_module
from tests.support.ranks import ROOT


def bench(*options: str, env: dict[str, str] | None = None, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    whole = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return run_module("yalis", "bench", *options, cwd=ROOT, env=whole, timeout=timeout_s)


@pytest.mark.parametrize("tp", [1, 2])
def test_latency(tmp_path: Path, tp: int) -> None:
    file = tmp_path / "latency.json"
    shape = (
        "--batch-size",
        "2",
        "--input-len",
        "8",
        "--output-len",
        "4",
        "--num-iters",
        "3",
        "--num-iters-warmup",
        "1",
    )
    done = bench(
        "latency", "--model", str(DEMO), *shape, "--tp", str(tp), "--cpu-threads", "1", "--output-json", str(file)
    )
    assert (done.returncode, done.stderr) == (0, f"wrote {file}\n")
    assert f"TP {tp} x PP 1" in done.stdout
    assert "batch 2, 8 tokens in, 4 out" in done.stdout
    assert "mean  " in done.stdout
    assert "output tokens/s" in done.stdout
    record = json.loads(file.read_text())
    assert record["config"]["batch_size"] == 2
    assert record["config"]["iters"] == 3
    assert record["config"]["engine"]["tensor_parallel_size"] == tp
    assert record["results"]["ready_s"] > 0
    summary = record["results"]["summary_ms"]
    assert set(summary["latency"]) >= {"mean", "min", "p50", "p90", "p99", "max"}
    assert summary["latency"]["min"] <= summary["latency"]["p50"] <= summary["latency"]["max"]
    assert len(record["samples"]["latency_s"]) == 3
    # What a reader needs to run the same again.
    assert record["argv"][1:3] == ["bench", "latency"]
    assert record["argv"][-2:] == ["--output-json", str(file)]
    machine = record["machine"]
    assert machine["versions"].keys() >= {"yalis", "python", "torch"}
    assert all(machine["versions"][name] for name in ("yalis", "python", "torch"))
    if (ROOT / ".git").exists():
        known = ["git", "cat-file", "-e", machine["commit"].removesuffix("-dirty")]
        assert subprocess.run(known, cwd=ROOT, timeout=20).returncode == 0
    assert machine["cpu"]["model"] and machine["cpu"]["cores_usable"] >= 1 and machine["host"]


SMALL = ("--batch-size", "2", "--input-len", "8", "--output-len", "4", "--num-iters", "2", "--num-iters-warmup", "1")


def test_latency_without_communication_and_profiled(tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    traces = tmp_path / "traces"
    more = ("--null-comm", "--profile", str(traces), "--output-json", str(file))
    done = bench("latency", "--model", str(DEMO), *SMALL, "--tp", "2", "--cpu-threads", "1", *more)
    assert done.returncode == 0, done.stderr
    assert "without communication (tokens are wrong)" in done.stdout
    assert "all-reduce null (none: tokens are wrong)" in done.stdout
    assert "exposed communication" in done.stdout
    results = json.loads(file.read_text())["results"]
    # A trace of each rank and of each of the two engines; rank 0's is broken down, and its parts sum to the step.
    assert sorted(trace.name.split("-rank")[1][0] for trace in traces.iterdir()) == ["0", "0", "1", "1"]
    assert results["breakdown"]["parts_us"]["all-reduce"] > 0
    for engine in (results, results["without_communication"]):
        found = engine["breakdown"]
        assert sum(found["parts_us"].values()) == pytest.approx(found["step_us"], rel=0.03)
    told = bench("breakdown", *map(str, traces.iterdir()), "--all-steps")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("us per step") == 8  # two tables for each trace


COMMUNICATION = ("intra_s", "inter_s", "flat_s", "wait_s")


def _step_ms(results: dict[str, Any]) -> float:
    return float(results["summary_ms"]["step"]["mean"])


def _term_ms(results: dict[str, Any], *names: str) -> float:
    return 1e3 * sum(float(results["decode_split_s"][name]) for name in names)


@pytest.mark.timeout(280)  # three engines, two of them slow on purpose
def test_leaving_communication_out_saves_what_the_split_says(tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    alpha_s, messages = 0.05, 9  # two for each of 4 layers, one for the embedding
    shape = (
        "--batch-size",
        "2",
        "--input-len",
        "8",
        "--output-len",
        "4",
        "--num-iters",
        "3",
    )
    where = ("--tp", "2", "--ranks-per-node", "1", "--all-reduce", "rd", "--cpu-threads", "1")
    more = ("--num-iters-warmup", "1", "--null-comm", "--null-compute", "--output-json", str(file))
    fabric = {"YALIS_EMULATED_FABRIC": f"alpha_s={alpha_s}"}
    done = bench("latency", "--model", str(DEMO), *shape, *where, *more, env=fabric, timeout_s=250)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    silent, idle = results["without_communication"], results["without_computation"]
    saved_ms = _step_ms(results) - _step_ms(silent)
    assert saved_ms == pytest.approx(_term_ms(results, *COMMUNICATION), rel=0.05)
    assert results["exposed_communication_ms"]["step of batch"] == pytest.approx(saved_ms, rel=0.05)
    assert _term_ms(silent, *COMMUNICATION) == 0.0
    for engine in (results, idle):  # without computation all messages still travel
        assert _term_ms(engine, *COMMUNICATION) > 0.95e3 * alpha_s * messages


def test_leaving_computation_out_saves_what_the_split_says(tmp_path: Path) -> None:
    file, folder = tmp_path / "latency.json", tmp_path / "model"
    folder.mkdir()
    # Products of some hundred milliseconds a step: what else there is to a step is little beside them.
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 64}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps({**kind, **sizes, **heads, "bos_token_id": 1, "eos_token_id": 2}))
    shape = ("--batch-size", "64", "--input-len", "2", "--output-len", "3", "--num-iters", "5")
    where = ("--load-format", "dummy", "--dtype", "float32", "--cpu-threads", "1")
    more = ("--num-iters-warmup", "1", "--null-compute", "--output-json", str(file))
    done = bench("latency", "--model", str(folder), *shape, *where, *more)
    assert done.returncode == 0, done.stderr
    assert "without computation (tokens are wrong)" in done.stdout
    record = json.loads(file.read_text())
    results, silent = record["results"], record["results"]["without_computation"]
    saved_ms = _step_ms(results) - _step_ms(silent)
    assert saved_ms == pytest.approx(_term_ms(results, "other_s"), rel=0.05)
    assert _term_ms(silent, "other_s") < 0.05 * _term_ms(results, "other_s")


def test_one_thing_is_left_out_by_one_flag() -> None:
    for flag, option in (("--null-comm", "--all-reduce"), ("--null-compute", "--compute")):
        refused = bench("latency", "--model", str(DEMO), flag, option, "null")
        assert refused.returncode == 1
        assert f"{flag} compares with {option} null by itself" in refused.stderr


def test_throughput(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    lengths = ("--num-prompts", "6", "--min-len", "4", "--max-len", "12", "--seed", "3")
    done = bench("throughput", "--model", str(DEMO), *lengths, "--cpu-threads", "1", "--output-json", str(file))
    assert done.returncode == 0, done.stderr
    assert "6 requests, " in done.stdout and "output tokens/s" in done.stdout
    record = json.loads(file.read_text())
    results = record["results"]
    assert record["config"]["max_len"] == 12
    assert results["output_tokens_per_s"] < results["total_tokens_per_s"]
    assert 0 < results["host_share"] < 1 and 0 <= results["outside_steps_share"] < 1
    refused = bench("throughput", "--model", str(DEMO), "--min-len", "9", "--max-len", "8")
    assert refused.returncode == 1 and "--min-len 9" in refused.stderr


def test_allreduce(tmp_path: Path) -> None:
    file = tmp_path / "allreduce.json"
    sizes = ("-b", "2K", "-e", "8K", "-n", "5", "-w", "2", "-d", "float32", "--algorithm", "rd,torch")
    done = bench("allreduce", "--ranks", "2", *sizes, "--output-json", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"wrote {file}\n"
    for column in ("size", "count", "type", "redop", "time", "algbw", "busbw", "#wrong"):
        assert column in done.stdout
    record = json.loads(file.read_text())
    assert record["config"]["ranks"] == 2
    assert [(row["size"], row["algorithm"]) for row in record["results"]] == [
        (size, name) for size in (2048, 4096, 8192) for name in ("rd", "torch")
    ]
    assert all(len(samples) == 5 for samples in record["samples"].values())


def test_help_has_examples() -> None:
    for name in ("latency", "throughput", "breakdown", "allreduce"):
        done = bench(name, "--help")
        assert done.returncode == 0
        assert f"examples:\n  yalis bench {name}" in done.stdout
