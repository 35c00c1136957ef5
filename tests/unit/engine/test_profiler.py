"""Profiles of one rank's steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from yalis.bench.breakdown import read_trace
from yalis.engine import profiler as profiler_module
from yalis.engine.messages import ProfileCommand
from yalis.engine.profiler import StepProfiler


def steps(profiler: StepProfiler, count: int) -> None:
    for _ in range(count):
        torch.ones(2).add(1)
        profiler.stepped()


def test_a_trace_of_what_ran(tmp_path: Path) -> None:
    profiler = StepProfiler()
    profiler.obey(ProfileCommand(True, str(tmp_path / "new" / "folder")))
    assert profiler.running
    steps(profiler, 2)
    profiler.obey(ProfileCommand(False, ""))
    assert not profiler.running and not profiler.take_end()
    names = [event.get("name") for event in json.loads(Path(profiler.last_trace).read_text())["traceEvents"]]
    assert names.count("aten::add") == 2


def test_calls_that_note_their_times_are_in_the_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(lambda: [(2e-6, 3e-6), (0.0, 1e-6)])
    profiler.obey(ProfileCommand(True, str(tmp_path)))
    steps(profiler, 1)
    profiler.obey(ProfileCommand(False, ""))
    assert read_trace(Path(profiler.last_trace)).calls_us == [(2.0, 3.0), (0.0, 1.0)]


def test_a_long_profile_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler_module, "MAX_PROFILED_STEPS", 3)
    profiler = StepProfiler()
    profiler.obey(ProfileCommand(True, str(tmp_path)))
    steps(profiler, 5)
    assert not profiler.running and Path(profiler.last_trace).exists()
    assert profiler.take_end() and not profiler.take_end()


def test_a_folder_that_cannot_be_written_costs_the_trace_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    profiler = StepProfiler()
    profiler.obey(ProfileCommand(True, str(tmp_path / "file" / "folder")))
    steps(profiler, 1)
    profiler.obey(ProfileCommand(False, ""))
    assert not profiler.running and profiler.last_trace == ""
