"""Fits of latency and bandwidth, and the description that calibrate writes from measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yalis.cli.main import main
from yalis.errors import ConfigError
from yalis.study.fit import fit_line, fit_segments, isotonic, trimmed_mean

SIZES = [2**i for i in range(8, 22)]


def test_a_line_is_found_exactly() -> None:
    alpha, beta, error = fit_line(SIZES, [5e-6 + s * 1e-9 for s in SIZES])
    assert (alpha, beta) == (pytest.approx(5e-6, rel=1e-3), pytest.approx(1e-9, rel=1e-3))
    assert error < 1e-3
    with pytest.raises(ConfigError, match="at least two sizes"):
        fit_line([8, 8], [1.0, 1.0])


def test_noise_and_outliers_move_it_little_and_the_bounds_hold_it() -> None:
    rng = np.random.default_rng(1)
    samples: dict[float, Any] = {}
    for size in SIZES:
        truth = 20e-6 + size * 5e-10
        times = truth * (1 + 0.1 * rng.random(30))
        times[:4] *= 20  # something else had the core
        samples[size] = times.tolist()
    samples[SIZES[5]] = [t * 3 for t in samples[SIZES[5]]]  # one size was measured at a bad moment
    (found,) = fit_segments(samples)
    assert found.alpha_s == pytest.approx(20e-6 * 1.05, rel=0.08)
    assert found.beta_s == pytest.approx(5e-10 * 1.05, rel=0.08)
    assert found.alpha_low_s <= found.alpha_s <= found.alpha_high_s
    assert found.beta_low_s <= found.beta_s <= found.beta_high_s
    assert found.alpha_high_s < 1.3 * found.alpha_low_s


def test_a_change_of_protocol_gives_two_segments() -> None:
    def seconds(size: int) -> float:
        return 3e-6 + size * 4e-9 if size <= 16384 else 40e-6 + size * 4e-10

    segments = fit_segments({s: [seconds(s)] * 5 for s in SIZES})
    assert [s.limit_bytes for s in segments] == [16384, SIZES[-1]]
    assert segments[0].alpha_s == pytest.approx(3e-6, rel=0.02)
    assert segments[1].alpha_s == pytest.approx(40e-6, rel=0.02)
    assert segments[1].beta_s == pytest.approx(4e-10, rel=0.02)


def test_trimmed_mean_and_isotonic() -> None:
    assert trimmed_mean([1.0] * 9 + [100.0, 0.0]) == pytest.approx(1.0)
    assert trimmed_mean([2.0, 4.0]) == 3.0
    assert isotonic([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert isotonic([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert isotonic([1.0, 2.0]) == [1.0, 2.0]


def test_command_refuses_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(tmp_path / "x.toml")
    for arguments, words in (
        (["--output", str(tmp_path / "x.json")], "must end in .toml"),
        (["--output", str(tmp_path / "no" / "x.toml")], "the folder does not exist"),
        (["--output", good, "--max-ranks", "0"], "--max-ranks 0: must be at least 1"),
        (["--output", good, "--iters", "1"], "--iters 1"),
        (["--output", good, "--emulate", "speed=1"], "'speed' is unknown"),
    ):
        assert main(["calibrate", *arguments]) == 1
        assert words in capsys.readouterr().err
