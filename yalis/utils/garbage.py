"""The collector's habits in a process of its own: what imports leave is not looked at again and again."""

from __future__ import annotations

import atexit
import gc


def spare_imports() -> None:
    """Collect rarely, and leave what there is at the interpreter's end to the operating system.

    Torch's imports make some 280,000 objects that stay. Looking at them again every 700 costs a tenth of a process's
    start, and taking them apart at its end 0.3 s. Only for the main module of a process: it decides for all of it.
    """
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)  # runs last, after what registers later
