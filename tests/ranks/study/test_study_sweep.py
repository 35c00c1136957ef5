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


def test_all_reduces_are_timed_with_the_norm_behind_them() -> None:
    found = run_sweep(Group(2, 2, ("shm",), norms=True), iters=3, low=256, high=1 << 14, limit_s=60)
    sizes = [str(2**i) for i in range(8, 15)]
    assert list(found["all_reduce"]["shm"]) == list(found["all_reduce_rmsnorm"]["shm"]) == sizes
    assert all(len(times) == 3 for times in found["all_reduce_rmsnorm"]["shm"].values())
    assert (found["device"], found["timed"]) == ("cpu", {"shm": "one by one"})
