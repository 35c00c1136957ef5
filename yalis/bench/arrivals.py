"""When the requests of a load test arrive: at a rate with gamma-distributed gaps, on a ramp, or all at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from yalis.errors import ConfigError

RampStrategy = Literal["linear", "exponential"]


@dataclass(frozen=True)
class RampUp:
    """A rate that changes over the run, from ``start_rps`` at the first request to ``end_rps`` at the last one."""

    strategy: RampStrategy
    start_rps: float
    end_rps: float

    def __post_init__(self) -> None:
        for name in ("start_rps", "end_rps"):
            value = getattr(self, name)
            if not (0 < value < math.inf):
                raise ConfigError(f"ramp-up {name} {value}: must be a positive finite number of requests per second")

    def rate(self, index: int, count: int) -> float:
        """Requests per second around request ``index`` of ``count``."""
        progress = index / max(count - 1, 1)
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return float(self.start_rps * (self.end_rps / self.start_rps) ** progress)


@dataclass(frozen=True)
class Arrivals:
    """A process of arrivals.

    Attributes:
        request_rate: requests per second; infinite sends all at once.
        burstiness: shape of the gamma-distributed gaps: 1 is a Poisson process, below 1 burstier, above 1 more even,
            infinite exactly even. Mean gaps are 1 / rate for all of them.
        ramp_up: takes the place of ``request_rate``.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up: RampUp | None = None

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise ConfigError(f"request rate {self.request_rate}: must be above 0; use inf to send all at once")
        if not self.burstiness > 0:
            raise ConfigError(f"burstiness {self.burstiness}: must be above 0; 1 is a Poisson process")
        if self.ramp_up is not None and not math.isinf(self.request_rate):
            raise ConfigError(f"a ramp-up takes the place of the request rate {self.request_rate}; name one of them")

    def times(self, count: int, seed: int) -> list[float]:
        """Arrival of each of ``count`` requests, in seconds from the start, ascending.

        Without a ramp the gaps are scaled so that the last request arrives at count / rate: the mean rate is met
        exactly, whatever was drawn, so that runs with different seeds carry the same load (vLLM does the same).
        """
        if self.ramp_up is None and math.isinf(self.request_rate):
            return [0.0] * count
        ramp = self.ramp_up
        rates = [ramp.rate(i, count) if ramp else self.request_rate for i in range(count)]
        if math.isinf(self.burstiness):
            gaps = [1.0 / rate for rate in rates]
        else:
            unit = np.random.default_rng(seed).gamma(self.burstiness, 1.0 / self.burstiness, count)
            gaps = [float(g) / rate for g, rate in zip(unit, rates, strict=True)]
        times = [float(t) for t in np.cumsum(gaps)]
        if ramp is None and times and times[-1] > 0:
            scale = count / self.request_rate / times[-1]
            times = [t * scale for t in times]
        return times

    def describe(self) -> str:
        """One line for a record."""
        if self.ramp_up is not None:
            r = self.ramp_up
            return f"{r.strategy} ramp from {r.start_rps:g} to {r.end_rps:g} requests/s, burstiness {self.burstiness:g}"
        if math.isinf(self.request_rate):
            return "all at once"
        return (
            f"{self.request_rate:g} requests/s, gamma-distributed gaps with burstiness {self.burstiness:g}, scaled so "
            "that the mean rate is met exactly"
        )
