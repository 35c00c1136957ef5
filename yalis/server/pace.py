"""Speeds of the last second: tokens per second, and where the time of a step went."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise

from yalis.engine.messages import Status, StepTimes
from yalis.engine.outputs import RequestOutput

_WINDOW_S = 1.0
_PARTS = ("total", "compute", "intra", "inter", "flat", "pipeline", "host")


class Pace:
    """Running means over about a second, fed by `Status` messages."""

    def __init__(self) -> None:
        # (time, step times, tokens computed so far, output tokens so far)
        self._marks: deque[tuple[float, StepTimes, int, int]] = deque()
        self._computed_tokens = 0
        self._output_tokens = 0

    def take(self, status: Status) -> None:
        """A status arrived."""
        now = time.monotonic()
        self._computed_tokens += sum(status.step_tokens)
        self._marks.append((now, status.stats.times, self._computed_tokens, self._output_tokens))
        while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW_S:
            self._marks.popleft()

    def count(self, outputs: list[RequestOutput]) -> None:
        """Outputs arrived."""
        for output in outputs:
            for sample in output.outputs:
                self._output_tokens += len(sample.token_ids)

    @property
    def tokens_per_s(self) -> dict[str, float]:
        """``prompt`` (tokens computed less those generated) and ``generation``."""
        if len(self._marks) < 2:
            return {"prompt": 0.0, "generation": 0.0}
        (t0, _, c0, g0), (t1, _, c1, g1) = self._marks[0], self._marks[-1]
        seconds = max(t1 - t0, 1e-9)
        generated = (g1 - g0) / seconds
        return {"prompt": max(0.0, (c1 - c0) / seconds - generated), "generation": generated}

    @property
    def step_ms(self) -> dict[str, float]:
        """Mean milliseconds per step by part, and the number of ``steps``; zeros without a step."""
        steps = 0
        sums = dict.fromkeys(_PARTS, 0.0)
        for (_, before, _, _), (_, after, _, _) in pairwise(self._marks):
            if after.steps < before.steps:
                continue  # somebody reset the counters
            steps += after.steps - before.steps
            for part in _PARTS:
                sums[part] += getattr(after, f"{part}_s") - getattr(before, f"{part}_s")
        mean = {part: 1e3 * max(0.0, total) / steps if steps else 0.0 for part, total in sums.items()}
        return {"steps": steps, **mean}
