"""Calibration recovers what was put into the emulated network."""

from __future__ import annotations

import pytest

from yalis.comm.emulation import VARIABLE
from yalis.study.calibrate import Group, run_sweep
from yalis.study.describe import times_by_size
from yalis.study.fit import fit_segments


def test_injected_latency_and_bandwidth_are_recovered() -> None:
    # The host's own millisecond a message, and its delays, come on top: the latency is far above them.
    env = {VARIABLE: "alpha_s=0.04,bytes_per_s=2e6"}
    group = Group(2, 1, ("rd",), ping_pong=True)
    found = run_sweep(group, iters=5, low=1 << 10, high=1 << 18, env=env, limit_s=60)
    assert found["emulated"].startswith("emulated network: 40000 us")
    for raw in (found["ping_pong"], found["all_reduce"]["rd"]):
        segments = fit_segments(times_by_size(raw), rounds=20)
        assert segments[0].alpha_s == pytest.approx(0.04, rel=0.1)
        assert 1 / segments[-1].beta_s == pytest.approx(2e6, rel=0.1)
