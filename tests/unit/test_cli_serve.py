"""Command lines of vLLM and SGLang: what `yalis serve` makes of their flags."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.checkpoints import DEMO
from yalis.cli.engine_options import engine_options
from yalis.cli.foreign_flags import WITHOUT_EFFECT
from yalis.cli.main import build_parser, main

# Flag of theirs -> what it means here, as one of our flags.
SAME: list[tuple[str, str]] = [
    ("--model-path m", "--model m"),
    ("--tp 2", "--tensor-parallel-size 2"),
    ("--tp-size 2", "--tensor-parallel-size 2"),
    ("--pp-size 2", "--pipeline-parallel-size 2"),
    ("--context-length 512", "--max-model-len 512"),
    ("--mem-fraction-static 0.8", "--gpu-memory-utilization 0.8"),
    ("--max-running-requests 4", "--max-num-seqs 4"),
    ("--chunked-prefill-size 512", "--max-num-batched-tokens 512"),
    ("--chunked-prefill-size -1", "--no-enable-chunked-prefill"),
    ("--page-size 16", "--block-size 16"),
    ("--cuda-graph-max-bs 8", "--max-cudagraph-batch 8"),
    ("--disable-cuda-graph", "--enforce-eager"),
    ("--random-seed 3", "--engine-seed 3"),
    ("--seed 3", "--engine-seed 3"),
    ("--dtype half", "--dtype float16"),
    ("--dtype float", "--dtype float32"),
    ("--enable-log-requests", "--log-requests"),
    ("--disable-log-requests", ""),
    ("--api-key one two --api-key three", "--api-key one --api-key two --api-key three"),
    *((f"{flag} info" if takes_value else flag, "") for flag, (takes_value, _) in WITHOUT_EFFECT.items()),
]


def parsed(words: str) -> dict[str, Any]:
    return vars(build_parser("serve").parse_args(["serve", *words.split()]))


@pytest.mark.parametrize(("theirs", "ours"), SAME)
def test_their_flags(theirs: str, ours: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(theirs) == parsed(ours)
    said = capsys.readouterr().err.splitlines()
    flag = theirs.split()[0]
    if flag in WITHOUT_EFFECT:
        assert said == [f"yalis: {flag} has no effect here: {WITHOUT_EFFECT[flag][1]}"]
    else:
        assert said == []


def test_a_dtype_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--dtype double")
    assert "invalid choice: 'double'" in capsys.readouterr().err


def test_revision_is_that_of_the_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The server reads the folder of that revision, and requests name the model as the operator did."""
    asked: list[Any] = []
    served: list[Any] = []

    def fetch(model: str, **options: Any) -> str:
        asked.append((model, options["revision"]))
        return str(DEMO)

    def serve(config: Any, options: Any, **others: Any) -> int:
        served.append((config.model, options.served_model_names))
        return 0

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("yalis.server.launch.serve", serve)
    assert main(["serve", "owner/model", "--revision", "v2"]) == 0
    assert asked == [("owner/model", "v2")] and served == [(str(DEMO), ("owner/model",))]
    assert main(["serve", str(DEMO), "--revision", "v2"]) == 1
    assert "revision=v2" in capsys.readouterr().err


def test_a_whole_command_line_of_vllm() -> None:
    words = (
        "MODEL --revision main --dtype half -tp 2 --trust-remote-code --enable-auto-tool-choice "
        "--tool-call-parser hermes --disable-log-requests "
        "--disable-log-stats --uvicorn-log-level warning --root-path /llm --api-key a b"
    )
    args = build_parser("serve").parse_args(["serve", *words.split()])
    assert engine_options(args) == {"dtype": "float16", "tensor_parallel_size": 2}
    assert args.model_positional == "MODEL" and args.api_key == ["a", "b"] and args.log_requests is False
