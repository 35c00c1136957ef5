"""Imported by the interpreter when this folder is in its path: requests of certain seeds bring ranks into trouble.

666 hangs every rank in its own code, 667 rank 0 alone before it tells the others of the step, and 668 makes the last
rank raise. Where ``YALIS_TEST_START_FAILS`` names a file that exists, a rank ends as soon as it starts.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

if "RANK" in os.environ:
    marker = os.environ.get("YALIS_TEST_START_FAILS")
    if marker and Path(marker).exists():
        sys.stderr.write("this rank was told to fail\n")
        os._exit(3)

    from yalis.engine.ranks import RankContext
    from yalis.engine.scheduler import Scheduler

    _schedule, _send_command = Scheduler.schedule, RankContext.send_command

    def schedule(self):  # type: ignore[no-untyped-def]
        seeds = {seq.params.seed for seq in self.waiting}
        if 666 in seeds:
            threading.Event().wait()
        if 668 in seeds and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            raise ValueError("the test wanted it")
        return _schedule(self)

    def send_command(self, command):  # type: ignore[no-untyped-def]
        if any(new.params.seed == 667 for new in command.new):
            threading.Event().wait()
        _send_command(self, command)

    Scheduler.schedule = schedule  # type: ignore[method-assign]
    RankContext.send_command = send_command  # type: ignore[method-assign]
