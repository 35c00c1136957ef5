"""Bad input of every kind ends in one line that names the value, the limit and what to do, and a non-zero exit code."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import DEMO
from tests.support.forked import run_module
from tests.support.ranks import ROOT
from yalis.cli.main import main
from yalis.config import EngineConfig
from yalis.errors import ConfigError

LONG_PROMPT = "free software " * 600


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """A log handler keeps the stderr that it was made for, and each test has its own."""
    yield
    logging.getLogger("yalis").handlers.clear()


def one_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run ``yalis`` with ``argv``; it must fail with one line on stderr, which is returned."""
    try:
        code = main(argv)
    except SystemExit as end:  # wrong usage, found by argparse
        code = int(str(end.code))
        assert code == 2
    assert code in (1, 2)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("yalis: error: ")
    assert told.err.count("\n") == 1, told.err
    return told.err


def generate(*options: str, model: Path | str = DEMO, prompt: str = "This program") -> list[str]:
    return ["generate", "--model", str(model), "--cpu-threads", "1", *options, "--prompt", prompt]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (generate(prompt=LONG_PROMPT), ["1202 tokens", "the limit is 1023", "shorten the prompt"]),
        (generate("--max-model-len", "8", prompt="one two three four five six"), ["the limit is 7", "shorten"]),
        (generate("--max-model-len", "5000"), ["max_model_len=5000", "1024", "lower it"]),
        (generate("--dtype", "float8"), ["'float8'", "bfloat16", "--dtype", "--help"]),
        (generate("--load-format", "gguf"), ["'gguf'", "dummy"]),
        (generate("--device", "tpu"), ["'tpu'", "cuda"]),
        (generate("--max-tokns", "5"), ["--max-tokns", "did you mean --max-tokens?"]),
        (generate("--tp", "0"), ["tensor_parallel_size=0", "at least 1"]),
        (generate("--block-size", "0"), ["block_size=0", "at least 1"]),
        (generate("--num-kv-blocks", "0"), ["num_kv_blocks=0", "at least 1"]),
        (generate("--kv-cache-memory-bytes", "100"), ["100 are available", "raise kv_cache_memory_bytes"]),
        (generate("--gpu-memory-utilization", "1.5"), ["gpu_memory_utilization=1.5", "at most 1"]),
        (generate("--max-num-batched-tokens", "8"), ["max_num_batched_tokens=8", "max_num_seqs=64", "lower"]),
        (
            generate("--no-enable-chunked-prefill", "--max-num-batched-tokens", "512"),
            ["max_num_batched_tokens=512", "max_model_len=1024", "switch chunked prefill on"],
        ),
        (generate("--overlap-scheduling", "--pp", "2"), ["overlap_scheduling", "pipeline_parallel_size=2", "off"]),
        (generate("--dist-timeout", "0.1"), ["distributed_timeout_s=0.1", "at least 1"]),
        (generate("--dist-timeout", "inf", "--tp", "2"), ["distributed_timeout_s=inf", "at most 1e+06"]),
        (generate("--dist-timeout", "nan"), ["distributed_timeout_s=nan", "at most 1e+06"]),
        (generate("--num-kv-blocks", "1000000000"), ["num_kv_blocks=1000000000", "a rank has", "lower it"]),
        (
            generate(
                "--kv-cache-memory-bytes", "9" * 18, "--max-num-seqs", "1000000", "--max-num-batched-tokens", "1000000"
            ),
            ["kv_cache_memory_bytes=9", "a rank has", "lower it"],
        ),
        (generate("--engine-seed", "9" * 23), ["seed=9", "2**63"]),
        (generate("--attention-backend", "flash9"), ["'flash9'", "native", "sdpa"]),
        (generate("--all-reduce", "quantum"), ["'quantum'", "torch, rd, shm"]),
        (generate("--temperature", "nan"), ["temperature=nan", "at least 0"]),
        (generate("--temperature", "-1"), ["temperature=-1", "at least 0"]),
        (generate("--temperature", "hot"), ["'hot'", "--temperature"]),
        (generate("--top-p", "0"), ["top_p=0", "above 0", "use 1"]),
        (generate("--top-k", "-2"), ["top_k=-2", "from -1 to", "use 0"]),
        (generate("--min-p", "2"), ["min_p=2", "at most 1"]),
        (generate("--n", "0"), ["n=0", "from 1 to 1024"]),
        (generate("--max-tokens", "0"), ["max_tokens=0", "from 1 to"]),
        (generate("--min-tokens", "9", "--max-tokens", "3"), ["min_tokens=9", "max_tokens=3", "raise"]),
        (generate("--repetition-penalty", "0"), ["repetition_penalty=0", "above 0", "use 1"]),
        (generate("--presence-penalty", "3"), ["presence_penalty=3", "at most 2", "use 0"]),
        (generate("--frequency-penalty", "inf"), ["frequency_penalty=inf", "at most 2"]),
        (generate("--logprobs", "21"), ["logprobs=21", "from 0 to 20"]),
        (generate("--logit-bias", "13"), ["'13'", "must look like"]),
        (generate("--logit-bias", "999999=1"), ["999999", "ends at 2047", "remove it"]),
        (generate("--stop-token-ids", "x"), ["'x'", "token ids"]),
        (generate("--stop-token-ids", "2048"), ["2048", "ends at 2047", "remove it"]),
        (generate("--stop", ""), ["stop=''", "1 to 1024 characters"]),
        (generate(model="/nonexistent/model"), ["/nonexistent/model", "check the path"]),
        (generate("--tokenizer", "/nonexistent/tok"), ["/nonexistent/tok", "check the path"]),
        (["generate", "--model", str(DEMO)], ["no prompt", "--prompt-file"]),
        (["generate", "--model", str(DEMO), "--prompt-file", "/nonexistent.txt"], ["/nonexistent.txt", "No such file"]),
        (["generate", "text"], ["--model", "required"]),
        (["bench", "latency", "--model", str(DEMO), "--batch-size", "0"], ["--batch-size 0", "at least 1"]),
        (["bench", "latency", "--model", str(DEMO), "--input-len", "2000"], ["2000", "1024"]),
        (["bench", "allreduce", "--ranks", "0"], ["--ranks 0", "at least 1"]),
        (["bench", "allreduce", "--dtype", "int8"], ["'int8'", "bfloat16"]),
        (["bench", "allreduce", "--algorithm", "quantum"], ["'quantum'", "torch, rd, shm"]),
        (["bench", "allreduce", "-b", "2X"], ["'2X'", "8K"]),
        (["demo", "--max-tokens", "0"], ["max_tokens=0", "from 1 to"]),
    ],
    ids=lambda value: "-".join(value[-4:])[:60] if isinstance(value, list) and value[0] in ("generate",) else None,
)
def test_bad_values(capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    line = one_line(capsys, *argv)
    assert [word for word in words if word not in line] == [], line


def test_prompt_beyond_the_kv_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate("--num-kv-blocks", "2", prompt="free software " * 40)) == 1
    *warning, line = capsys.readouterr().err.splitlines()
    assert "the limit is 31" in line
    assert "KV cache" in line
    assert len(warning) <= 1  # the one that says that the cache holds less than the model's context


def test_empty_prompt_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n")
    line = one_line(capsys, "generate", "--model", str(DEMO), "--prompt-file", str(file))
    assert "no prompt" in line
    assert str(file) in line


def test_one_bad_prompt_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    argv = generate("--temperature", "0", "--max-tokens", "4", prompt="This program is free software")
    assert main([*argv, "--prompt", LONG_PROMPT]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("This program is free software")
    assert told.err.count("\n") == 1
    assert "the limit is 1023" in told.err


@pytest.mark.parametrize(
    ("options", "world", "words"),
    [
        (["--tp", "3"], 3, ["tensor_parallel_size=3", "num_attention_heads=8", "1, 2, 4, 8"]),
        (["--pp", "5"], 5, ["pipeline_parallel_size=5", "4 layers", "at most"]),
        (["--tp", "4", "--ranks-per-node", "3"], 4, ["ranks_per_node=3", "4 ranks", "1, 2, 4"]),
        (["--tp", "2"], 4, ["needs 2 ranks", "4 were launched", "--nproc-per-node"]),
    ],
)
def test_launch_that_does_not_fit(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    world: int,
    words: list[str],
) -> None:
    # As torchrun sets it. All of these are noticed before the ranks meet, so one rank is enough.
    env = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    line = one_line(capsys, *generate(*options))
    assert [word for word in words if word not in line] == [], line


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 3_000_000)


NORM, QUERY = "model.norm.weight", "model.layers.2.self_attn.q_proj.weight"

BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "broken config": (lambda f: (f / "config.json").write_text('{"architectures": ['), ["config.json"]),
    "architecture": (lambda f: set_config(f, architectures=["OPTForCausalLM"]), ["OPTForCausalLM", "Llama"]),
    "quantized": (lambda f: set_config(f, quantization_config={"quant_method": "gptq"}), ["gptq"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["safetensors"]),
    "truncated": (truncate, ["model.safetensors"]),
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(NORM)), [NORM]),
    "unknown tensor": (lambda f: change_tensors(f, lambda t: t.update(extra=t[NORM].clone())), ["extra"]),
    "shape": (lambda f: change_tensors(f, lambda t: t.update({QUERY: t[QUERY][:100].clone()})), [QUERY, "100"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    breaking, words = BROKEN[kind]
    breaking(folder)
    line = one_line(capsys, *generate(model=folder))
    assert [word for word in words if word not in line] == [], line
    assert len(line) < 1000


@pytest.mark.parametrize(
    ("key", "words"),
    [("tensor_paralel_size", "did you mean 'tensor_parallel_size'"), ("zzz", "Known: all_reduce")],
)
def test_unknown_config_key(key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        EngineConfig.from_mapping({"model": str(DEMO), key: 2})
    assert words in str(caught.value)


@pytest.mark.parametrize("tokens", [-1, 1, 2049])
def test_prefill_graphs_that_no_step_could_use(tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"max_cudagraph_prefill={tokens}: must be 0 .*at least 2.*=2048"):
        EngineConfig(str(DEMO), max_cudagraph_prefill=tokens)


@pytest.mark.parametrize("name", ["max_cudagraph_batch", "max_cudagraph_prefill"])
def test_graphs_that_are_switched_off_and_sized(name: str) -> None:
    with pytest.raises(ConfigError, match=f"enforce_eager with {name}=8: the first switches graphs off"):
        EngineConfig.from_mapping({"model": str(DEMO), "enforce_eager": True, name: 8})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", 7, "a string"),
        ("tokenizer", 7, "a string or None"),
        ("dtype", None, "a string"),
        ("enable_prefix_caching", "false", "True or False"),
        ("enforce_eager", 1, "True or False"),
        ("bind_cores", None, "True or False"),
        ("overlap_scheduling", "yes", "True or False or None"),
        ("gpu_memory_utilization", "0.9", "a number"),
        ("distributed_timeout_s", True, "a number"),
        ("seed", 1.5, "an integer"),
        ("seed", True, "an integer"),
        ("block_size", 16.0, "an integer"),
        ("num_kv_blocks", "12", "an integer or None"),
    ],
)
def test_config_values_of_another_type(name: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_mapping({"model": str(DEMO), name: value})
    assert str(caught.value) == f"{name}={value!r}: must be {words}"


def test_a_whole_number_may_stand_for_a_float() -> None:
    assert EngineConfig(str(DEMO), distributed_timeout_s=20, seed=-(1 << 63)).distributed_timeout_s == 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tp", "3"], ["tensor_parallel_size=3", "1, 2, 4, 8"]),  # noticed by every rank alone
        (["--tp", "2", "--ranks-per-node", "1", "--all-reduce", "shm"], ["'shm'", "spans 2", "use rd or torch"]),
        (["--tp", "2"], ["model.safetensors"]),  # a truncated file, noticed when the ranks have met
    ],
)
def test_several_ranks_say_it_once(tmp_path: Path, options: list[str], words: list[str]) -> None:
    model = DEMO
    if options == ["--tp", "2"]:
        model = tmp_path / "model"
        shutil.copytree(DEMO, model)
        truncate(model)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run_module("yalis", *generate(*options, model=model), cwd=ROOT, env=env, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("yalis: error: ")
    assert [word for word in words if word not in done.stderr] == [], done.stderr
