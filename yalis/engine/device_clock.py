"""Time of steps on a GPU, by its own clock, and the one place where the host waits for it.

Two events enclose each step. Their distance is the step's time on the device; the distance from a step's end to the
next one's begin is time in which the device stood still because the host was late.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from yalis.errors import EngineDeadError

# First poll without a pause: most waits are either over or long. Then sleep, so that other threads get the interpreter.
_SPINS = 20
_PAUSE_S = 20e-6
# How often a wait looks whether somebody else knows why it will not end.
_LOOK_S = 5e-3

_cuda: Any = torch.cuda  # its type information lacks the arguments


@dataclass(frozen=True)
class DeviceStep:
    """Events around one step, and the end of the step before if there was no rest in between."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    previous_end: torch.cuda.Event | None


@dataclass(frozen=True)
class StepInterval:
    """Seconds of one step on the device, and seconds that the device waited for it."""

    busy_s: float
    idle_s: float


def _nobody() -> None:
    """Nobody else knows anything."""


def _is_over(event: Any, look: Callable[[], None]) -> bool:
    try:
        return bool(event.query())
    except RuntimeError:  # the device failed
        look()  # over another rank, perhaps: its name says more than CUDA's words
        raise


def _await(event: Any, deadline_s: float, look: Callable[[], None] = _nobody) -> None:
    now = time.monotonic()
    give_up, next_look = now + deadline_s, now + _LOOK_S
    polls = 0
    while not _is_over(event, look):
        polls += 1
        if polls > _SPINS:
            time.sleep(_PAUSE_S)
            now = time.monotonic()
            if now > next_look:
                look()
                next_look = now + _LOOK_S
            if now > give_up:
                raise EngineDeadError(
                    f"the GPU did not finish a step within {deadline_s:g} s; a kernel or a collective hangs, look "
                    "at the other ranks (distributed_timeout_s is the limit where it is larger)"
                )


class DeviceClock:
    """Events of the steps of one rank, all on the stream that is current when they are recorded."""

    def __init__(self, device: torch.device):
        self._device = device
        self._last_end: torch.cuda.Event | None = None

    def begin(self) -> torch.cuda.Event:
        """A step begins here."""
        event: torch.cuda.Event = _cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, begin: torch.cuda.Event) -> DeviceStep:
        """The step that began with ``begin`` ends here."""
        step = DeviceStep(begin, _cuda.Event(enable_timing=True), self._last_end)
        step.end.record()
        self._last_end = step.end
        return step

    def extend(self, step: DeviceStep) -> None:
        """The step ends here instead."""
        step.end.record()

    def rest(self) -> None:
        """Nothing is to do: the time until the next step is nobody's fault."""
        self._last_end = None

    def wait(self, step: DeviceStep, deadline_s: float, look: Callable[[], None] = _nobody) -> StepInterval:
        """Wait until the step has ended.

        Args:
            look: called every few milliseconds; raises what ends the wait, such as the loss of a rank.

        Raises:
            EngineDeadError: it has not after ``deadline_s`` seconds.
        """
        _await(step.end, deadline_s, look)
        busy_s = step.begin.elapsed_time(step.end) / 1e3
        previous = step.previous_end
        idle_s = max(0.0, previous.elapsed_time(step.begin) / 1e3) if previous is not None else 0.0
        return StepInterval(busy_s, idle_s)

    def drain(self, deadline_s: float, look: Callable[[], None] = _nobody) -> None:
        """Wait until the current stream has done everything it was told so far. As `wait`."""
        everything = _cuda.Event()
        everything.record()
        _await(everything, deadline_s, look)
