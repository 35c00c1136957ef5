"""Waiting for the step of a GPU (a stand-in here): what ends the wait, and what is not handed on after a failure."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from yalis.engine import device_clock
from yalis.engine.device_clock import StepInterval
from yalis.engine.results import ResultLayout, Sampled
from yalis.engine.runner import PendingStep, Runner
from yalis.engine.sampler import SamplerOutput
from yalis.engine.scheduler import ScheduledStep
from yalis.errors import EngineDeadError, PeerLostError


class Event:
    """Over after ``polls`` looks, or never; ``error`` is what the device then says instead."""

    def __init__(self, polls: int | None, error: Exception | None = None):
        self.polls = polls
        self.error = error

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        if self.polls is None:
            return False
        self.polls -= 1
        return self.polls < 0


def lost() -> None:
    raise PeerLostError("rank 1 was lost: process died", rank=1)


@pytest.mark.parametrize(
    "event", [Event(None), Event(None, RuntimeError("CUDA error: unknown"))], ids=["hangs", "fails"]
)
def test_a_wait_ends_with_the_verdict(event: Event) -> None:
    started = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1 was lost"):
        device_clock._await(event, 60.0, lost)
    assert time.monotonic() - started < 20


def test_a_wait_without_a_verdict_ends_with_its_deadline_or_the_devices_words() -> None:
    with pytest.raises(EngineDeadError, match=r"within 0.05 s"):
        device_clock._await(Event(None), 0.05)
    with pytest.raises(RuntimeError, match="unknown"):
        device_clock._await(Event(None, RuntimeError("CUDA error: unknown")), 60.0)
    device_clock._await(Event(30), 60.0)


class Clock:
    """A device whose step has ended; notes what the runner did in which order."""

    def __init__(self, order: list[str]):
        self.order = order

    def wait(self, step: Any, deadline_s: float, look: Any) -> StepInterval:
        self.order.append("wait")
        return StepInterval(1.0, 0.0)

    def drain(self, deadline_s: float, look: Any) -> None:
        self.order.append("drain")


class Group:
    """A communicator of which `check` fails when told to."""

    def __init__(self, order: list[str], size: int = 1):
        self.order, self.size, self.rank = order, size, 0
        self.broken: PeerLostError | None = None

    def check(self) -> None:
        self.order.append("check")
        if self.broken is not None:
            raise self.broken

    def recv(self, *, src: int, shape: tuple[int, ...], dtype: torch.dtype, tag: str) -> torch.Tensor:
        self.order.append("receive")
        return torch.full(shape, 9, dtype=dtype)


def make_runner(order: list[str], stages: int = 1) -> Runner:
    """A runner without a model: just what `Runner.collect` touches."""
    runner = object.__new__(Runner)
    runner.tp, runner.pp = Group(order), Group(order, stages)  # type: ignore[assignment]
    runner.pp_back = runner.pp
    runner._clock = Clock(order)  # type: ignore[assignment]
    runner._arrivals = None
    runner._check_ranks = lambda: order.append("ranks")
    runner.is_first_stage = True
    runner.vocab = SimpleNamespace(total=100)  # type: ignore[assignment]
    runner.resolved = SimpleNamespace(user=SimpleNamespace(distributed_timeout_s=30.0))  # type: ignore[assignment]
    runner.forward_s = runner.decode_s = runner.device_idle_s = runner.pipeline_s = 0.0
    return runner


def test_tokens_of_a_step_in_which_a_collective_failed_are_not_handed_on() -> None:
    order: list[str] = []
    runner = make_runner(order)
    sampled = Sampled(SamplerOutput(torch.tensor([3, 4])), [])
    step: Any = SimpleNamespace()  # its events; the stand-in looks at none
    pending = PendingStep(ScheduledStep([], 0), ResultLayout([], []), 0.0, sampled=sampled, device_step=step)
    assert runner.collect(pending).token_ids == [3, 4]
    assert order == ["wait", "check", "ranks"], "first the wait, or a failure that is still to come would be missed"
    runner.tp.broken = PeerLostError("rank 1 was lost in L0.attn.out", rank=1)  # type: ignore[attr-defined]
    with pytest.raises(PeerLostError, match="L0.attn.out"):
        runner.collect(pending)
    runner.tp.broken = None  # type: ignore[attr-defined]
    runner._check_ranks = lost
    with pytest.raises(PeerLostError, match="process died"):
        runner.collect(pending)


def test_tokens_of_another_stage_are_read_after_a_wait_that_has_a_deadline() -> None:
    order: list[str] = []
    runner = make_runner(order, stages=2)
    item: Any = SimpleNamespace(seq=SimpleNamespace(params=SimpleNamespace(logprobs=None)))
    pending = PendingStep(ScheduledStep([], 0), ResultLayout([item, item], []), 0.0)
    assert runner.collect(pending).token_ids == [9, 9]
    assert order == ["receive", "drain", "check", "ranks"]
