"""On how many nodes a measurement runs, as far as a stored prediction of it is concerned."""

from __future__ import annotations

import pytest

from yalis.cli.bench_latency import node_count

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "n[1-2]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "ranks", "declared", "nodes"),
    [
        ({}, 1, None, 1),
        ({}, 4, None, 1),
        ({}, 4, 2, 2),
        ({}, 4, 1, 4),
        (TORCHRUN, 8, None, 2),
        (TORCHRUN, 8, 2, 4),
        (SLURM, 8, None, 2),
    ],
)
def test_nodes_are_those_of_the_launch(env: dict[str, str], ranks: int, declared: int | None, nodes: int) -> None:
    assert node_count(env, ranks, declared) == nodes
