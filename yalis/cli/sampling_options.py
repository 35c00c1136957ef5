"""Sampling parameters as command-line flags, under vLLM's names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_PREFIX = "sampling."
# Flags to fields of `GuidedParams`.
_GUIDED = {
    "guided_json": "json_schema",
    "guided_choice": "choice",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `SamplingParams`. A flag that is not given leaves the checkpoint's or the library's default."""
    group = parser.add_argument_group("sampling")

    def add(flag: str, **kwargs: Any) -> None:
        dest = _PREFIX + flag.lstrip("-").replace("-", "_")
        group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, **kwargs)

    add("--max-tokens", type=int, metavar="N", help="most output tokens (default: 16)")
    add("--min-tokens", type=int, metavar="N", help="no end of sequence before so many output tokens")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token")
    add("--top-k", type=int, metavar="K", help="keep the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="keep the most likely tokens that sum to P")
    add("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=float, metavar="F", help="above 1: tokens seen before become less likely")
    add("--presence-penalty", type=float, metavar="F", help="subtracted for tokens that the output holds")
    add("--frequency-penalty", type=float, metavar="F", help="subtracted for each occurrence in the output")
    add("--logit-bias", type=_logit_bias, metavar="ID=BIAS,...", help="added to these tokens' logits")
    add("--seed", type=int, metavar="N", help="the same seed gives the same tokens")
    add("--n", type=int, metavar="N", help="continuations per prompt")
    add("--stop", action="append", metavar="TEXT", help="text that ends the output; may be repeated")
    add("--stop-token-ids", type=_ids, metavar="ID,...", help="tokens that end the output")
    add("--include-stop-str-in-output", action="store_true", help="keep the stop text")
    add("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    add("--logprobs", type=int, metavar="K", help="log-probabilities of the K likeliest output tokens")
    add("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens")
    add("--guided-json", type=_schema, metavar="SCHEMA", help="JSON under this schema (text, or @FILE; {} for any)")
    add("--guided-choice", type=_choices, metavar="A|B|...", help='one of these texts, or of a JSON list: ["A", "B"]')
    add("--guided-regex", metavar="REGEX", help="text that matches this regular expression")
    add("--guided-grammar", type=_text, metavar="LARK", help="text of this grammar (text, or @FILE)")
    add("--no-skip-special-tokens", action="store_false", help="show special tokens in the text")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that the command line names."""
    given = {name.removeprefix(_PREFIX): value for name, value in vars(args).items() if name.startswith(_PREFIX)}
    if "no_skip_special_tokens" in given:
        given["skip_special_tokens"] = given.pop("no_skip_special_tokens")
    guided = {field: given.pop(name) for name, field in _GUIDED.items() if name in given}
    if guided:
        # Several at once are left to be refused where the rule is known.
        given["guided"] = guided
    return given


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be token ids such as 2,13") from None


def _logit_bias(text: str) -> dict[int, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must look like 13=-100,42=2.5") from None


def _text(text: str) -> str:
    """The argument itself, or with an @ in front the content of a file."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _schema(text: str) -> str:
    content = _text(text)
    try:
        json.loads(content)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: no valid JSON: {error}") from None
    return content


def _choices(text: str) -> list[str]:
    if not text.startswith("["):
        return text.split("|")
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: no valid JSON: {error}") from None
    if not isinstance(listed, list):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a list of texts")
    return listed
