"""``yalis generate --guided-...``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import DEMO
from yalis.cli.main import main
from yalis.cli.sampling_options import add_sampling_options, sampling_options
from yalis.engine.sampling_params import GuidedParams, SamplingParams

SCHEMA = '{"type": "object", "properties": {"a": {"enum": [7, 8]}}, "required": ["a"], "additionalProperties": false}'


def parsed(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_sampling_options(parser)
    return sampling_options(parser.parse_args(argv))


def test_flags_become_fields(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    (tmp_path / "grammar.lark").write_text('start: "a"\n')
    cases = {
        ("--guided-json", SCHEMA): GuidedParams(json_schema=SCHEMA),
        ("--guided-json", f"@{tmp_path}/schema.json"): GuidedParams(json_schema=SCHEMA),
        ("--guided-choice", "yes|no"): GuidedParams(choice=["yes", "no"]),
        ("--guided-choice", '["a|b", "c"]'): GuidedParams(choice=["a|b", "c"]),
        ("--guided-regex", "[0-9]+"): GuidedParams(regex="[0-9]+"),
        ("--guided-grammar", 'start: "b"'): GuidedParams(grammar='start: "b"'),
        ("--guided-grammar", f"@{tmp_path}/grammar.lark"): GuidedParams(grammar='start: "a"\n'),
    }
    for argv, expected in cases.items():
        assert SamplingParams.from_mapping(parsed(*argv)).guided == expected
    assert "guided" not in parsed("--seed", "3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--guided-json", "{"), "no valid JSON"),
        (("--guided-choice", "[3"), "no valid JSON"),
        (("--guided-grammar", "@/nowhere/grammar.lark"), "No such file"),
    ],
)
def test_flags_that_cannot_be_read(argv: tuple[str, str], message: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=message):
        parsed(*argv)


def generate(*options: str) -> int:
    return main(
        [
            "generate",
            "--model",
            str(DEMO),
            "--dtype",
            "float32",
            "--cpu-threads",
            "1",
            "--max-tokens",
            "60",
            *options,
            "The answer:",
        ]
    )


def test_the_text_follows(capfd: pytest.CaptureFixture[str]) -> None:
    assert generate("--guided-json", SCHEMA, "--temperature", "0") == 0
    text = capfd.readouterr().out.removeprefix("The answer:")
    assert json.loads(text) in ({"a": 7}, {"a": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guided-regex", "("), "unclosed group"),
        (("--guided-regex", "a", "--guided-choice", "b"), "choice and regex"),
        (("--guided-regex", "a", "--ignore-eos"), "ignore_eos"),
    ],
)
def test_refusals(options: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate(*options) == 1
    assert message in capfd.readouterr().err
