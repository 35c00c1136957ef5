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
    # Several files run at a time: threads that wait for each other on the same few cores cost twice what they bring.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests start hundreds of processes, and where an image sets this each of them would compile all of yalis.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Files of 15 s and more, the longest first: several files run at a time, and none of these is to be alone at the end.
# Those that mostly wait for deadlines take turns with those that compute, so that the cores have work beside a wait.
_LONG = (
    "ranks/test_engine_failures.py",  # waits
    "ranks/study/test_study_end_to_end.py",
    "ranks/server/test_loss.py",  # waits
    "ranks/test_engine_parallel.py",
    "ranks/server/test_launches.py",  # waits
    "ranks/study/test_study_small.py",
    "kernels/nvrar/test_protocol.py",
    "ranks/test_cli_bench.py",
    "ranks/study/test_study_fabric.py",  # waits
    "ranks/comm/test_collectives.py",
    "ranks/test_liveness.py",  # waits
    "kernels/nvrar/test_cuda_build.py",
    "ranks/server/test_bench_and_page.py",  # waits
    "unit/models/test_against_transformers.py",
    "ranks/test_launch.py",  # waits
    "unit/engine/test_sampler.py",
    "ranks/server/test_load.py",  # waits
    "ranks/test_guided_parallel.py",
    "ranks/server/test_one_does_not_hold_up_others.py",  # waits
    "unit/weights/test_loader.py",
    "ranks/server/test_openai_client.py",
    "ranks/test_joined_launch.py",
    "unit/bench/test_load_test.py",  # waits
    "ranks/test_tune.py",
    "unit/study/test_study_run.py",  # waits
    "unit/test_bad_input.py",
    "ranks/server/test_forms.py",
    "ranks/test_cli_demo.py",
    "unit/test_cli_generate.py",
    "ranks/comm/test_bench_command.py",
    "ranks/test_cli_launchers.py",
    "unit/server/test_tools.py",
    "ranks/comm/test_nvrar.py",
    "ranks/study/test_study_sweep.py",  # waits
    "unit/engine/test_llm_reference.py",
    "ranks/test_decode_steps.py",
    "kernels/test_cpu_kernels.py",
    "kernels/test_triton_interpreted.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(str(item.path.relative_to(_TESTS)), len(_LONG)))
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in ("unit", "ranks", "kernels", "gpu"):
            item.add_marker(folder)
        if "tests/gpu/nvrar" in item.path.as_posix():  # kernels that wait for others, deadlines, killed ranks
            item.add_marker("alone")
