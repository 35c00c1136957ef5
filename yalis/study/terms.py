"""The terms of a step: one vocabulary for predictions, measurements and their differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

NAMES = {
    "gemm_s": "GEMM",
    "attention_s": "attention",
    "intra_s": "intra all-reduce",
    "inter_s": "inter all-reduce",
    "flat_s": "flat all-reduce",
    "wait_s": "wait",
    "pipeline_s": "pipeline",
    "launch_s": "launch",
    "host_s": "host",
    "other_s": "other",
}


@dataclass(frozen=True)
class Terms:
    """Seconds by cause; they add up to `total_s`.

    Attributes:
        gemm_s: matrix products, the logits' included.
        attention_s: scores and weighted sums, KV traffic.
        intra_s, inter_s: all-reduce inside a node and between nodes, less the wait for late ranks.
        flat_s: all-reduce by an algorithm that does not tell the two apart (NCCL, gloo), waits included.
        wait_s: waiting for ranks that came late to a collective; predicted, also for a stage of a pipeline (bubbles).
        pipeline_s: transfers between stages; measured, also the wait for a stage, which the clock cannot tell apart.
        launch_s: launching operations, where computation does not hide it.
        host_s: scheduling, batch preparation, side channel.
        other_s: the rest: norms, rotations, gathering of logits, sampling, what no term above claims.
    """

    gemm_s: float = 0.0
    attention_s: float = 0.0
    intra_s: float = 0.0
    inter_s: float = 0.0
    flat_s: float = 0.0
    wait_s: float = 0.0
    pipeline_s: float = 0.0
    launch_s: float = 0.0
    host_s: float = 0.0
    other_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Sum of all terms."""
        return sum(self.as_dict().values())

    @property
    def communication_s(self) -> float:
        """All-reduces and transfers between stages; waiting for late ranks and stages is not counted."""
        return self.intra_s + self.inter_s + self.flat_s + self.pipeline_s

    def __add__(self, other: Terms) -> Terms:
        mine, theirs = self.as_dict(), other.as_dict()
        return Terms(**{name: mine[name] + theirs[name] for name in mine})

    def scaled(self, factor: float) -> Terms:
        """Every term times ``factor``."""
        return Terms(**{name: factor * value for name, value in self.as_dict().items()})

    def as_dict(self) -> dict[str, float]:
        """Seconds by field name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> Terms:
        """Inverse of `as_dict`; names that are missing are zero."""
        return cls(**{name: float(values.get(name, 0.0)) for name in NAMES})
