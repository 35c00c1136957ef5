"""Imported by the interpreter when this folder is in its path: the last rank takes its time to load.

``YALIS_TEST_SLOW_S`` says how many seconds; it prints ``loading slowly`` on stderr first.
"""

from __future__ import annotations

import os
import sys
import time

if os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", "0")) - 1):
    from yalis.engine.runner import Runner

    _load = Runner.load

    def load(self, on_progress=None):  # type: ignore[no-untyped-def]
        sys.stderr.write("loading slowly\n")
        sys.stderr.flush()
        time.sleep(float(os.environ["YALIS_TEST_SLOW_S"]))
        return _load(self, on_progress)

    Runner.load = load  # type: ignore[method-assign]
