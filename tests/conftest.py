"""Marks every test by its folder (unit, ranks, kernels, gpu), sets hypothesis up for shared machines, hides GPUs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

_TESTS = Path(__file__).resolve().parent

# No deadline for one example: a busy machine is no failure, and pytest's timeout bounds the whole test.
settings.register_profile("yalis", deadline=None, print_blob=True)
settings.load_profile("yalis")

# These tests are about CPU ranks, and NCCL refuses several ranks on one GPU: on a machine with GPUs they must not
# see them. Set before any test imports torch, and inherited by the processes that tests start; workers of pytest-xdist,
# which have no arguments of their own, inherit what was decided here.
if "PYTEST_XDIST_WORKER" not in os.environ and not any("tests/gpu" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Tests start hundreds of processes, and where an image sets this each of them would compile all of yalis.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in ("unit", "ranks", "kernels", "gpu"):
            item.add_marker(folder)
