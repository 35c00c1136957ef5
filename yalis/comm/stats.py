"""Where a communicator's time goes: seconds, calls and bytes per tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tier = Literal["intra", "inter", "flat"]


@dataclass
class TierStats:
    """Totals of one tier: seconds spent in it (host time), stages entered, payload bytes of those stages."""

    seconds: float = 0.0
    calls: int = 0
    bytes: int = 0


class CommStats:
    """Totals since the last `reset`.

    ``intra``: inside a node; ``inter``: between nodes; ``flat``: an algorithm that does not tell the two apart. The
    times are the caller's, so they hold the wait for late peers too; on CUDA they cover the launch only.

    ``algorithms``: all-reduces by the algorithm that served them, as [calls, bytes].
    """

    __slots__ = ("algorithms", "flat", "inter", "intra")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.intra = TierStats()
        self.inter = TierStats()
        self.flat = TierStats()
        self.algorithms: dict[str, list[int]] = {}

    def add(self, tier: TierStats, seconds: float, nbytes: int) -> None:
        """Count one stage of ``nbytes`` payload bytes that took ``seconds``; ``tier`` is one of this object's own."""
        tier.seconds += seconds
        tier.calls += 1
        tier.bytes += nbytes

    def count(self, algorithm: str, nbytes: int) -> None:
        """Count one all-reduce of ``nbytes`` bytes by ``algorithm``."""
        counted = self.algorithms.get(algorithm)
        if counted is None:
            counted = self.algorithms[algorithm] = [0, 0]
        counted[0] += 1
        counted[1] += nbytes

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers for records: ``{"intra": {"seconds": s, "calls": n, "bytes": b}, ...}``."""
        return {
            name: {"seconds": tier.seconds, "calls": tier.calls, "bytes": tier.bytes}
            for name, tier in (("intra", self.intra), ("inter", self.inter), ("flat", self.flat))
        }
