"""Topology and rendezvous from synthetic launch environments."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yalis.comm.topology import Topology, expand_nodelist, from_environment, launcher, rendezvous
from yalis.errors import TopologyError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
PMI = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


@pytest.fixture(autouse=True)
def _no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.parametrize(
    ("env", "name"), [(TORCHRUN, "torchrun"), (SLURM, "slurm"), (OPENMPI, "openmpi"), (PMI, "pmi"), ({}, None)]
)
def test_launcher_is_recognised(env: dict[str, str], name: str | None) -> None:
    assert launcher(env) == name


@pytest.mark.parametrize("env", [TORCHRUN, SLURM, OPENMPI, PMI])
def test_two_nodes_of_four(env: dict[str, str]) -> None:
    topology = from_environment(env)
    assert (topology.rank, topology.world_size, topology.ranks_per_node) == (5, 8, 4)
    assert (topology.node, topology.local_rank, topology.num_nodes, topology.device_index) == (1, 1, 2, 1)
    assert [topology.node_of(r) for r in range(8)] == [0] * 4 + [1] * 4


def test_without_a_launcher_the_world_is_one() -> None:
    topology = from_environment({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # a batch script
    assert (topology.rank, topology.world_size) == (0, 1)
    assert rendezvous({}) == ("127.0.0.1", 29500)
    with pytest.raises(TopologyError, match="torchrun, srun or mpirun"):
        from_environment({}, ranks_per_node=2)


def test_the_innermost_launcher_counts() -> None:
    assert launcher(SLURM | TORCHRUN) == "torchrun"
    assert launcher(SLURM | OPENMPI) == "openmpi"
    assert launcher(SLURM | {"PMI_RANK": "5", "PMI_SIZE": "8"}) == "slurm"  # srun --mpi=pmi2 says the same twice
    assert launcher(SLURM | {"PMI_RANK": "1", "PMI_SIZE": "16"}) == "pmi"  # a daemon's SLURM_PROCID


def test_one_host_can_stand_for_several_nodes() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0"}
    topology = from_environment(env, ranks_per_node=2)
    assert (topology.node, topology.local_rank, topology.num_nodes, topology.device_index) == (1, 1, 2, 3)


def test_a_step_may_be_smaller_than_its_job() -> None:
    env = SLURM | {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "8"}
    assert from_environment(env).world_size == 8


@pytest.mark.parametrize(
    ("env", "per_node", "words"),
    [
        (TORCHRUN, 3, ["ranks_per_node=3", "8 ranks", "1, 2, 4, 8"]),
        (TORCHRUN | {"RANK": "8", "GROUP_RANK": "2", "LOCAL_RANK": "0"}, None, ["rank 8", "0 to 7"]),
        (TORCHRUN | {"RANK": "five"}, None, ["RANK='five'"]),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,2"}, None, ["4,2", "--ntasks-per-node"]),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "four"}, None, ["four", "--ranks-per-node"]),
        (SLURM | {"SLURM_PROCID": "4"}, None, ["local rank 1", "--distribution=block"]),
        (SLURM | {"SLURM_PROCID": "1"}, None, ["node 1", "--distribution=block"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, None, ["--ranks-per-node"]),
    ],
)
def test_what_does_not_fit_is_named(env: dict[str, str], per_node: int | None, words: list[str]) -> None:
    with pytest.raises(TopologyError) as caught:
        from_environment(env, ranks_per_node=per_node)
    for word in words:
        assert word in str(caught.value)


def test_rendezvous_of_each_launcher() -> None:
    assert rendezvous(TORCHRUN) == ("host-a", 29400)
    address, port = rendezvous(SLURM)
    assert address == "gpu07"
    assert 20000 <= port < 29000
    assert rendezvous(SLURM | {"SLURM_PROCID": "0"}) == (address, port)
    assert rendezvous(SLURM | {"SLURM_JOB_ID": "4712"})[1] != port
    assert rendezvous(OPENMPI | {"MASTER_ADDR": "host-b", "MASTER_PORT": "1234"}) == ("host-b", 1234)
    assert rendezvous(OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"})[0] == "127.0.0.1"
    with pytest.raises(TopologyError, match="export MASTER_ADDR"):
        rendezvous(OPENMPI)
    with pytest.raises(TopologyError, match="MASTER_PORT=70000"):
        rendezvous(TORCHRUN | {"MASTER_PORT": "70000"})
    with pytest.raises(TopologyError, match="MASTER_ADDR"):
        rendezvous({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login1", ["login1"]),
        ("gpu[01-03,07],login1", ["gpu01", "gpu02", "gpu03", "gpu07", "login1"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
        ("a,b-2", ["a", "b-2"]),
        ("n[9-11]x", ["n9x", "n10x", "n11x"]),
    ],
)
def test_nodelists(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", "gpu[1-", "gpu[a-b]"])
def test_unreadable_nodelists_ask_for_the_address(text: str) -> None:
    with pytest.raises(TopologyError, match="MASTER_ADDR"):
        expand_nodelist(text)


@given(nodes=st.integers(1, 40), per_node=st.integers(1, 16))
def test_every_rank_has_one_place(nodes: int, per_node: int) -> None:
    places = set()
    for rank in range(nodes * per_node):
        t = Topology(rank, nodes * per_node, per_node)
        assert t.num_nodes == nodes
        assert t.node == t.node_of(rank)
        places.add((t.node, t.local_rank))
    assert places == {(n, r) for n in range(nodes) for r in range(per_node)}
