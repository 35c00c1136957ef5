from __future__ import annotations

import os
import sys
import time

import pytest

from yalis.cli import allreduce_check
from yalis.errors import CommError


def test_two_local_ranks_sum_right_at_three_sizes() -> None:
    # A launcher around doctor must not reach its ranks: they would look for the launcher's world.
    env = {**os.environ, "RANK": "5", "WORLD_SIZE": "64", "SLURM_PROCID": "5", "MASTER_ADDR": "nowhere.invalid"}
    rows = allreduce_check.run_check(env)
    assert [row["bytes"] for row in rows] == [8192, 131072, 1048576]
    assert [row["wrong"] for row in rows] == [0, 0, 0]
    assert all(row["time_us"] > 0 for row in rows)


def test_failing_rank_is_named_with_its_words(monkeypatch, tmp_path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "no such thing" >&2\nexit 3\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(CommError, match="rank 0 exited with 3: no such thing"):
        allreduce_check.run_check()


def test_stuck_ranks_are_killed_at_the_deadline(monkeypatch, tmp_path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    start = time.monotonic()
    with pytest.raises(CommError, match="did not finish within 1 s"):
        allreduce_check.run_check(timeout_s=1.0)
    assert time.monotonic() - start < 10
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
