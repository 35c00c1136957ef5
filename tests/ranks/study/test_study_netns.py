"""Nodes as network namespaces: the declared rate is what ranks see, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.ranks import ROOT
from yalis.comm.emulation import VARIABLE
from yalis.errors import ConfigError
from yalis.study import netns
from yalis.study.calibrate import Group, run_sweep
from yalis.study.fit import fit_line
from yalis.study.netns import MODULE, namespaces, why_not

REASON = why_not()
needs_namespaces = pytest.mark.skipif(bool(REASON), reason=f"network namespaces cannot be made here: {REASON}")
RATE = 4e6


def ours() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith("yalis-ns")]


@needs_namespaces
def test_recursive_doubling_sees_the_declared_rate_and_latency() -> None:
    env = {VARIABLE: f"netns,alpha_s=0.01,bytes_per_s={RATE}"}
    found = run_sweep(Group(2, 1, ("rd",)), iters=7, low=1 << 16, high=1 << 19, env=env, limit_s=90)
    assert found["emulated"] == "emulated network (network namespaces): 10000 us, 4 MB/s"
    # The least of each size: a busy machine only adds.
    least = {int(size): min(times) for size, times in found["all_reduce"]["rd"].items()}
    alpha_s, beta_s, _ = fit_line(list(least), list(least.values()))
    assert 1 / beta_s == pytest.approx(RATE, rel=0.1)
    assert alpha_s == pytest.approx(0.01, rel=0.35)  # the first bytes of a message pass the bucket at once
    assert ours() == []


@needs_namespaces
def test_namespaces_go_whatever_happens() -> None:

    def fail() -> None:
        with namespaces(2, 1e6) as nodes:
            assert len(ours()) == 3 and nodes[1].namespace in ours()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert ours() == []
    # Asked to end, and killed: the next one removes what is left.
    for number, left in ((signal.SIGTERM, 0), (signal.SIGKILL, 3)):
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, "2", "1", "timeit", "-n1", "-r1", "__import__('time').sleep(60)"],
            env=os.environ | {VARIABLE: "netns", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(ours()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(30)
        assert len(ours()) == left
    with namespaces(1, 0.0):
        assert len(ours()) == 2
    assert ours() == []


def test_where_they_cannot_be_made_the_other_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns.shutil, "which", lambda tool: None)
    with (
        pytest.raises(ConfigError, match=r"ip is not installed .*Leave netns out of the emulated network"),
        namespaces(2, 1e6),
    ):
        pass
