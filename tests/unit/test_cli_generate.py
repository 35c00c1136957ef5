"""``yalis generate`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.checkpoints import DEMO
from tests.support.forked import run_module
from tests.support.ranks import ROOT

PROMPT = "This program is free software"
GREEDY = ("--temperature", "0", "--max-tokens", "12", "--cpu-threads", "1")


def yalis(*argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return run_module("yalis", *argv, input=stdin, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60)


def generate(*options: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return yalis("generate", "--model", str(DEMO), *GREEDY, *options, stdin=stdin)


@pytest.fixture(scope="module")
def text() -> str:
    """What the model says to `PROMPT`, prompt included, with nothing but defaults."""
    done = generate(PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(PROMPT)
    assert done.stdout.endswith("\n")
    assert "\x1b" not in done.stdout
    assert len(done.stdout) > len(PROMPT) + 10
    return done.stdout.removesuffix("\n")


def test_json_with_prompts_from_everywhere(text: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\nYou may copy\n")
    done = generate("--json", "--prompt-file", str(file), "--prompt", "THE SOFTWARE", "The licenses", "--logprobs", "2")
    assert (done.returncode, done.stderr) == (0, "")
    outputs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [o["prompt"] for o in outputs] == ["The licenses", "THE SOFTWARE", PROMPT, "You may copy"]
    [sample] = outputs[2]["outputs"]
    assert PROMPT + sample["text"] == text
    assert len(sample["token_ids"]) == 12
    assert sample["finish_reason"] == "length"
    assert len(sample["logprobs"]) == 12
    assert outputs[2]["metrics"]["num_output_tokens"] == 12
    assert all(o["error"] is None for o in outputs)


def test_stdin_and_several_samples(text: str) -> None:
    done = generate("--prompt-file", "-", "--n", "2", stdin=f"{PROMPT}\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{text}\n\n{text}\n\n", "")


# Every engine option that must not change the text, by its first and by its other names.
ENGINE_OPTIONS = (
    ("--tokenizer", str(DEMO), "--dtype", "auto", "--load-format", "auto", "--device", "cpu", "--max-model-len", "256"),
    ("--tp-size", "1", "--pp-size", "1", "--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--block-size", "8"),
    ("--num-kv-blocks", "64", "--kv-cache-memory-bytes", "9000000", "--gpu-memory-utilization", "0.5"),
    ("--attention-backend", "native", "--all-reduce", "torch", "--engine-seed", "7", "--overlap-scheduling"),
    ("--enable-chunked-prefill", "--no-enable-prefix-caching", "--distributed-timeout-seconds", "20", "--bind-cores"),
    ("--compute", "full", "--cpu-threads", "1", "--enforce-eager", "--disable-cuda-graph"),
)
OTHER_NAMES = (
    ("-tp", "1", "-pp", "1", "--context-length", "256", "--page-size", "32", "--mem-fraction-static", "0.5"),
    ("--tensor-parallel-size", "1", "--pipeline-parallel-size", "1", "--kv-cache-memory-bytes", "9000000"),
    ("--enable-prefix-caching", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "256", "--pp", "1"),
    (
        "--no-overlap-scheduling",
        "--attention-backend",
        "sdpa",
        "--all-reduce",
        "rd",
        "--dist-timeout",
        "9",
        "--no-bind-cores",
    ),
    ("--max-running-requests", "4", "--chunked-prefill-size", "256"),
)
# Refused where there are none.
GRAPHS = {
    "--max-cudagraph-batch": "max_cudagraph_batch",
    "--cuda-graph-max-bs": "max_cudagraph_batch",
    "--max-cudagraph-prefill": "max_cudagraph_prefill",
}


@pytest.mark.parametrize("options", [ENGINE_OPTIONS, OTHER_NAMES], ids=["first names", "other names"])
def test_engine_options_do_not_change_the_text(text: str, options: tuple[tuple[str, ...], ...]) -> None:
    done = generate(*(word for part in options for word in part), PROMPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, text + "\n", "")


def test_engine_options_over_ranks_do_not_change_the_text(text: str) -> None:
    done = generate("--tp", "2", "--ranks-per-node", "1", "--all-reduce", "rd", PROMPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, text + "\n", "")


@pytest.mark.parametrize("flag", GRAPHS)
def test_sizes_of_graphs_are_refused_without_a_gpu(flag: str) -> None:
    done = generate("--device", "cpu", flag, "8", PROMPT)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{GRAPHS[flag]}=8: there are no CUDA graphs on cpu" in done.stderr


def test_every_engine_option_is_exercised_here() -> None:
    import argparse

    from yalis.cli.engine_options import add_engine_options

    parser = argparse.ArgumentParser(add_help=False)
    add_engine_options(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    used = {word for part in (*ENGINE_OPTIONS, *OTHER_NAMES) for word in part} | {*GREEDY, "--tp", "--ranks-per-node"}
    used |= {*GRAPHS}
    assert flags - used == set()


def test_sampling_options_reach_the_engine(text: str) -> None:
    words = text.removeprefix(PROMPT)
    stop = words[4:8]
    done = generate("--stop", stop, PROMPT)
    assert done.stdout == PROMPT + words[: words.index(stop)] + "\n"
    options = "--top-k 5 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.1 --presence-penalty 0.1 --seed 3 --n 2"
    more = "--frequency-penalty 0.1 --logit-bias 13=-100,42=2.5 --stop-token-ids 5,6 --min-tokens 2 --ignore-eos"
    last = "--prompt-logprobs 1 --include-stop-str-in-output --no-skip-special-tokens --temperature 0.9 --json"
    done = generate(*f"{options} {more} {last}".split(), PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    output = json.loads(done.stdout)
    assert len(output["outputs"]) == 2
    assert len(output["prompt_logprobs"]) == len(output["prompt_token_ids"])
    assert not any(13 in sample["token_ids"] for sample in output["outputs"])


def test_help_has_examples() -> None:
    done = yalis("generate", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:\n  yalis generate --model models/demo" in done.stdout


def test_profile(tmp_path: Path, text: str) -> None:
    done = generate(PROMPT, "--profile", str(tmp_path))
    assert (done.returncode, done.stdout.rstrip()) == (0, text.rstrip())
    [trace] = tmp_path.iterdir()
    assert f"rank 0's trace: {trace}\n" in done.stderr  # torch's profiler has words of its own
    assert "traceEvents" in json.loads(trace.read_text())
