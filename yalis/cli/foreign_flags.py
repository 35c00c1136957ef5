"""Flags of vLLM's and SGLang's command lines that mean nothing here: accepted, and each use says so in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

# Whether the flag takes a value, and why it has no effect.
WITHOUT_EFFECT: dict[str, tuple[bool, str]] = {
    "--enable-auto-tool-choice": (False, "tools are served wherever the chat template has them"),
    "--trust-remote-code": (False, "code of a checkpoint is never run"),
    "--disable-log-stats": (False, "statistics are not logged, they are at /metrics"),
    "--uvicorn-log-level": (True, "the environment variable YALIS_LOG_LEVEL says what is logged"),
    "--root-path": (True, "the page asks by relative paths; let the proxy take the prefix off"),
}


class _NoEffect(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, *, why: str, **kwargs: Any):
        super().__init__(option_strings, dest, **kwargs)
        self._why = why

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        sys.stderr.write(f"yalis: {option} has no effect here: {self._why}\n")


def add_flags_without_effect(parser: argparse.ArgumentParser) -> None:
    """Add them all."""
    group = parser.add_argument_group("accepted from vLLM's and SGLang's command lines, without effect")
    for flag, (takes_value, why) in WITHOUT_EFFECT.items():
        group.add_argument(
            flag,
            action=_NoEffect,
            why=why,
            nargs=None if takes_value else 0,
            metavar="X" if takes_value else None,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help=why,
        )
