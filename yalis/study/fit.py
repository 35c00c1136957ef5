"""Latency and bandwidth from measured times: ``t = alpha + bytes * beta`` by range of sizes, robust, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from yalis.errors import ConfigError

# A second segment must lessen the error by this share to be believed, and the single line must miss by this much.
_WORTH = 0.3
_GOOD = 0.05
_LEAST_POINTS = 3


@dataclass(frozen=True)
class Segment:
    """One range of sizes: up to ``limit_bytes``, alpha in seconds, beta in seconds per byte, with 95 percent bounds."""

    limit_bytes: float
    alpha_s: float
    beta_s: float
    alpha_low_s: float
    alpha_high_s: float
    beta_low_s: float
    beta_high_s: float

    def seconds(self, nbytes: float) -> float:
        """Time of ``nbytes`` bytes."""
        return self.alpha_s + nbytes * self.beta_s


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """(alpha, beta, mean relative error): alpha, beta >= 0 of least relative error, outliers weighed down.

    Raises:
        ConfigError: fewer than two sizes.
    """
    x, y = np.asarray(sizes, float), np.asarray(seconds, float)
    if len(x) < 2 or x.max() == x.min():
        raise ConfigError(f"a line needs at least two sizes, got {sorted(set(sizes))}")
    scale = np.array([y.min(), y.max() / x.max()])
    start = np.array([0.8, 0.5])

    # The residuals are linear in both, so their derivatives are always the same.
    slopes = np.stack([scale[0] / y, scale[1] * x / y], axis=1)

    def residual(p: np.ndarray) -> np.ndarray:
        return np.asarray((p[0] * scale[0] + p[1] * scale[1] * x) / y - 1.0)

    found = least_squares(residual, start, lambda _: slopes, bounds=(0.0, np.inf), loss="soft_l1", f_scale=0.05)
    alpha, beta = found.x * scale
    return float(alpha), float(beta), float(np.mean(np.abs(residual(found.x))))


def fit_segments(samples: Mapping[float, Sequence[float]], *, rounds: int = 200, seed: int = 0) -> list[Segment]:
    """One segment, or two where that lessens the error clearly (a protocol changes with the size).

    Args:
        samples: size in bytes -> measured seconds of single calls. The median of each size is fitted.
        rounds: resamplings for the 95 percent bounds; each draws every size's samples anew.
        seed: of the resampling.

    Raises:
        ConfigError: fewer than two sizes.
    """
    sizes = sorted(samples)
    medians = [float(np.median(samples[size])) for size in sizes]
    whole = fit_line(sizes, medians)
    cut, best = None, whole[2] * (1 - _WORTH)
    for i in range(_LEAST_POINTS, len(sizes) - _LEAST_POINTS + 1) if whole[2] > _GOOD else ():
        left, right = fit_line(sizes[:i], medians[:i]), fit_line(sizes[i:], medians[i:])
        error = (left[2] * i + right[2] * (len(sizes) - i)) / len(sizes)
        if error < best:
            cut, best = i, error
    parts = [range(len(sizes))] if cut is None else [range(cut), range(cut, len(sizes))]
    rng = np.random.default_rng(seed)
    segments = []
    for part in parts:
        chosen = [sizes[i] for i in part]
        alpha, beta, _ = fit_line(chosen, [medians[i] for i in part])
        draws = []
        for _ in range(rounds):
            again = [float(np.median(rng.choice(np.asarray(samples[s]), len(samples[s])))) for s in chosen]
            draws.append(fit_line(chosen, again)[:2])
        low, high = np.percentile(np.asarray(draws), [2.5, 97.5], axis=0) if draws else ((alpha, beta), (alpha, beta))
        segments.append(
            Segment(
                chosen[-1],
                alpha,
                beta,
                min(alpha, float(low[0])),
                max(alpha, float(high[0])),
                min(beta, float(low[1])),
                max(beta, float(high[1])),
            )
        )
    return segments


def trimmed_mean(values: Sequence[float], share: float = 0.1) -> float:
    """Mean without the lowest and the highest ``share`` of the values.

    A machine whose memory runs at one of two speeds gives samples in two heaps: a median would jump between them.
    """
    ordered = np.sort(np.asarray(values, float))
    cut = int(len(ordered) * share)
    return float(np.mean(ordered[cut : len(ordered) - cut]))


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence of least squares: neighbours that fall are replaced by their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (left, n), (right, m) = blocks[-2:]
            blocks[-2:] = [((left * n + right * m) / (n + m), n + m)]
    return [value for value, count in blocks for _ in range(count)]
