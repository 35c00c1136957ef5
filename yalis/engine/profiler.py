"""Traces of the step loop on request: one Chrome trace per rank, readable in Perfetto or chrome://tracing."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from yalis.engine.messages import ProfileCommand
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

# A profiler that nobody stops would fill the memory; all ranks count the same steps, so all stop together.
MAX_PROFILED_STEPS = 500
# Under this name a trace holds [waited, moved] in microseconds of the latest calls of NVRAR, oldest first.
CALL_TIMES = "yalis_nvrar_calls_us"


class StepProfiler:
    """This rank's profiler. All ranks start and stop at the same step.

    Args:
        call_times: (waited, moved) in seconds of the latest all-reduces that note them, oldest first.

    Attributes:
        last_trace: path of the latest trace, empty before the first or if it could not be written (which is logged).
    """

    def __init__(self, call_times: Callable[[], Sequence[tuple[float, float]]] = tuple) -> None:
        self.last_trace = ""
        self._call_times = call_times
        self._profiler: torch.profiler.profile | None = None
        self._folder = ""
        self._steps = 0
        self._ended_itself = False

    @property
    def running(self) -> bool:
        """Whether steps are being recorded."""
        return self._profiler is not None

    def obey(self, command: ProfileCommand) -> None:
        """Start, or stop and write. A command that finds the profiler as it should be does nothing."""
        if command.start and self._profiler is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._folder, self._steps = command.folder, 0
            self._ended_itself = False
            self._profiler.start()
        elif not command.start and self._profiler is not None:
            self._finish()

    def stepped(self) -> None:
        """A step is over: mark it, and end a profile that has grown long."""
        if self._profiler is None:
            return
        self._steps += 1
        if self._steps >= MAX_PROFILED_STEPS:
            logger.warning("the profile ends by itself after %d steps", self._steps)
            self._finish()
            self._ended_itself = True

    def take_end(self) -> bool:
        """Whether the latest profile ended by itself; true once, for whoever wanted to end it."""
        ended, self._ended_itself = self._ended_itself, False
        return ended

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        if calls := self._call_times():
            # Only now: the last of them is the last that the trace shows.
            profiler.add_metadata_json(CALL_TIMES, json.dumps([[1e6 * waited, 1e6 * moved] for waited, moved in calls]))
        profiler.stop()
        rank = os.environ.get("RANK", "0")
        name = f"yalis-{socket.gethostname()}-rank{rank}-{time.strftime('%Y%m%dT%H%M%S')}.json"
        path = Path(self._folder) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            self.last_trace = str(path)
        except (OSError, RuntimeError) as error:  # a full disk must not end the engine
            self.last_trace = ""
            logger.warning("cannot write the trace %s: %s", path, error)
