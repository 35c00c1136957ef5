"""Workloads with exact definitions. A name means the same numbers everywhere: in plans, runs and reports."""

from __future__ import annotations

import re
from dataclasses import dataclass

from yalis.errors import ConfigError


@dataclass(frozen=True)
class Workload:
    """``batch`` equal requests that arrive together: ``input_len`` prompt tokens each, exactly ``output_len`` new ones.

    Prompts are random and share no prefix; decoding is greedy and ignores the end token.
    """

    name: str
    batch: int
    input_len: int
    output_len: int

    @property
    def tokens_out(self) -> int:
        """Output tokens of all requests."""
        return self.batch * self.output_len


# The shapes of the NVRAR paper's kind of study: long prompts and short answers, and the other way round.
_KINDS = {"prefill-heavy": (2048, 128), "decode-heavy": (512, 1024), "balanced": (1024, 1024)}
_CUSTOM = re.compile(r"^(\d+)x(\d+)\+(\d+)$")


def kinds() -> tuple[str, ...]:
    """Names of the shipped kinds."""
    return tuple(_KINDS)


def parse_workload(text: str) -> Workload:
    """``prefill-heavy``, ``decode-heavy`` or ``balanced``, with ``:BATCH`` (default 8); or ``BATCHxINPUT+OUTPUT``.

    Raises:
        ConfigError: neither; names what is known.
    """
    custom = _CUSTOM.match(text)
    if custom:
        batch, input_len, output_len = map(int, custom.groups())
    else:
        kind, _, count = text.partition(":")
        if kind not in _KINDS or (count and not count.isdigit()):
            raise ConfigError(
                f"workload {text!r}: use {', '.join(_KINDS)} with an optional :BATCH, or BATCHxINPUT+OUTPUT such as "
                "8x512+128"
            )
        batch = int(count) if count else 8
        input_len, output_len = _KINDS[kind]
    if min(batch, input_len, output_len) < 1:
        raise ConfigError(f"workload {text!r}: batch, input and output must be at least 1")
    return Workload(text, batch, input_len, output_len)
