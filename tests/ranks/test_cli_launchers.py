"""``yalis generate`` as srun and mpirun start it: the same command in every process of one host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.checkpoints import DEMO
from tests.support.ranks import ROOT

PROMPT = "This program is free software"


def mpi(rank: int) -> dict[str, str]:
    names = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}


def slurm(rank: int) -> dict[str, str]:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_NODEID": "0", **step}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("launcher", [mpi, slurm])
def test_generate_joins_the_launch(launcher: Callable[[int], dict[str, str]]) -> None:
    options = ["--model", str(DEMO), "--cpu-threads", "1", "--temperature", "0", "--max-tokens", "8"]
    command = [sys.executable, "-m", "yalis", "generate", *options, PROMPT]
    alone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert alone.returncode == 0, alone.stderr
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [*command, "--tp", "2"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": port} | launcher(rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert told == [(alone.stdout, ""), ("", "")]  # once, by rank 0
