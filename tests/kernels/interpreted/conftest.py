"""Triton's interpreter is chosen when a kernel is defined, so these tests run in a process of their own.

`tests/kernels/test_triton_interpreted.py` starts it; without the variable nothing here is collected.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
