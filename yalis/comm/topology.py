"""Who is where: ranks, nodes and the rendezvous, read from the launch environment. No torch, no sockets.

Ranks are placed in blocks: node ``n`` holds ranks ``n * ranks_per_node`` up to ``(n + 1) * ranks_per_node - 1``. Every
launcher does so by default; another placement is refused, because rank // ranks_per_node would lie.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from yalis.errors import TopologyError

Launcher = Literal["torchrun", "slurm", "openmpi", "pmi"]

_DEFAULT_PORT = 29500
# Derived ports stay below Linux's ephemeral range (32768 and up), where a short-lived client could sit on them.
_PORT_BASE, _PORT_SPAN = 20000, 9000


@dataclass(frozen=True)
class Topology:
    """Where one rank stands in the world.

    Args:
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.
        ranks_per_node: processes per node, the same on every node; divides world_size. May be *declared*, so that one
            host stands for several nodes.
        hostname: name of this host, for messages.
        device_index: index of this process among those of its host (which GPU is its own); the local rank where the
            launcher says nothing else. Differs from local_rank when nodes are declared.
        ranks_on_host: processes that share this host's cores and memory; ranks_per_node where the launcher
            says nothing.

    Raises:
        TopologyError: the numbers do not fit together.
    """

    rank: int = 0
    world_size: int = 1
    ranks_per_node: int = 1
    hostname: str = field(default_factory=socket.gethostname)
    device_index: int | None = None
    ranks_on_host: int | None = None

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise TopologyError(f"world size {self.world_size}: must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise TopologyError(
                f"rank {self.rank} is outside a world of {self.world_size}: must be 0 to {self.world_size - 1}"
            )
        if self.ranks_per_node < 1 or self.world_size % self.ranks_per_node:
            raise TopologyError(
                f"ranks_per_node={self.ranks_per_node} does not divide the world of {self.world_size} ranks; "
                f"use one of {', '.join(str(n) for n in range(1, self.world_size + 1) if self.world_size % n == 0)}"
            )
        if self.device_index is None:
            object.__setattr__(self, "device_index", self.local_rank)
        if self.ranks_on_host is None:
            object.__setattr__(self, "ranks_on_host", self.ranks_per_node)

    @property
    def node(self) -> int:
        """Node of this rank."""
        return self.node_of(self.rank)

    @property
    def local_rank(self) -> int:
        """Index of this rank within its (perhaps declared) node."""
        return self.rank % self.ranks_per_node

    @property
    def num_nodes(self) -> int:
        """Number of (perhaps declared) nodes."""
        return self.world_size // self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """Node of world rank ``rank``.

        Raises:
            TopologyError: no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise TopologyError(
                f"rank {rank} is outside a world of {self.world_size}: must be 0 to {self.world_size - 1}"
            )
        return rank // self.ranks_per_node


def launcher(env: Mapping[str, str]) -> Launcher | None:
    """Which launcher started this process, or None when none did.

    Order matters: torchrun inside a Slurm allocation sets both sets of variables, and mpirun starts its daemons through
    srun, whose SLURM_PROCID then counts daemons and not ranks. A batch script outside srun has SLURM_PROCID=0 but no
    step, so it is not a rank.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return "torchrun"
    if "OMPI_COMM_WORLD_RANK" in env and "OMPI_COMM_WORLD_SIZE" in env:
        return "openmpi"
    slurm = "SLURM_PROCID" in env and any(name.startswith("SLURM_STEP") for name in env)
    pmi = "PMI_RANK" in env and "PMI_SIZE" in env
    if slurm and not (pmi and env["PMI_SIZE"] != _slurm_tasks(env)):
        return "slurm"
    return "pmi" if pmi else None


def from_environment(env: Mapping[str, str], *, ranks_per_node: int | None = None) -> Topology:
    """Topology of this process as its launcher describes it; a world of one without a launcher.

    Args:
        env: the environment, usually ``os.environ``.
        ranks_per_node: declares the node size instead of reading it; must divide the world.

    Raises:
        TopologyError: a variable is missing or is no number, nodes differ in size, or ranks are not placed in blocks.
    """
    found = launcher(env)
    if found is None:
        if ranks_per_node not in (None, 1):
            raise TopologyError(
                f"ranks_per_node={ranks_per_node} in a world of one rank; start the ranks with torchrun, srun or "
                "mpirun, or leave it out"
            )
        return Topology()
    rank, world, local_rank, local_size, node = _READERS[found](env)
    per_node = ranks_per_node if ranks_per_node is not None else local_size
    if per_node is None:
        raise TopologyError(
            f"{found}: cannot tell how many of the {world} ranks share a node; say it with --ranks-per-node"
        )
    if ranks_per_node is None:
        if local_rank is not None and rank % per_node != local_rank:
            raise TopologyError(_placement(found, rank, f"local rank {local_rank}", f"{rank % per_node}", per_node))
        if node is not None and rank // per_node != node:
            raise TopologyError(_placement(found, rank, f"node {node}", f"{rank // per_node}", per_node))
    return Topology(
        rank=rank, world_size=world, ranks_per_node=per_node, device_index=local_rank, ranks_on_host=local_size
    )


def rendezvous(env: Mapping[str, str]) -> tuple[str, int]:
    """Address and port where rank 0 listens: MASTER_ADDR and MASTER_PORT, else derived from the launcher's words.

    Raises:
        TopologyError: it cannot be derived (several MPI nodes): set MASTER_ADDR.
    """
    found = launcher(env)
    port = _int(env, "MASTER_PORT") if "MASTER_PORT" in env else _derived_port(env)
    if not 0 < port < 65536:
        raise TopologyError(f"MASTER_PORT={port}: a port is 1 to 65535")
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"], port
    if found == "torchrun":
        raise TopologyError(
            "RANK and WORLD_SIZE are set but MASTER_ADDR is not; start with torchrun or export MASTER_ADDR"
        )
    if found == "slurm":
        nodelist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
        if not nodelist:
            raise TopologyError(
                "slurm: no SLURM_STEP_NODELIST or SLURM_JOB_NODELIST; export MASTER_ADDR=<host of rank 0>"
            )
        return expand_nodelist(nodelist)[0], port
    if found in ("openmpi", "pmi"):
        rank, world, _, local_size, _ = _READERS[found](env)
        if local_size != world:
            raise TopologyError(
                f"{found}: rank {rank} of {world}, {local_size or 'who knows how many'} here: mpirun does not say "
                "where rank 0 runs; export MASTER_ADDR=<host of rank 0> (mpirun -x MASTER_ADDR or -genv MASTER_ADDR)"
            )
    return "127.0.0.1", port


def expand_nodelist(nodelist: str) -> list[str]:
    """Host names of a Slurm node list such as ``gpu[01-03,07],login1``.

    Uses ``scontrol show hostnames`` where it is installed, else reads the bracket forms itself.

    Raises:
        TopologyError: the list cannot be read.
    """
    if shutil.which("scontrol"):
        try:
            done = subprocess.run(
                ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=20, check=True
            )
            if done.stdout.split():
                return done.stdout.split()
        except (subprocess.SubprocessError, OSError):
            pass  # an unreachable controller must not matter: the bracket forms are readable without it
    items = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist)
    hosts = [host for item in items for host in _expand_item(item.strip())]
    if not hosts or ",".join(items) != nodelist:  # an unbalanced bracket is skipped by the pattern
        raise TopologyError(f"cannot read the node list {nodelist!r}; export MASTER_ADDR=<host of rank 0>")
    return hosts


def _expand_item(item: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", item)
    if match is None:
        return [item] if item else []
    head, tail = item[: match.start()], item[match.end() :]
    hosts: list[str] = []
    for part in match.group(1).split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if span is None:
            raise TopologyError(
                f"cannot read {part!r} in the node list item {item!r}; export MASTER_ADDR=<host of rank 0>"
            )
        first, last = span.group(1), span.group(2) or span.group(1)
        for number in range(int(first), int(last) + 1):
            hosts += _expand_item(f"{head}{number:0{len(first)}d}{tail}")
    return hosts


# ---- what each launcher says: (rank, world, local rank, ranks on this node, node) ---------------------------------

_Read = tuple[int, int, int | None, int | None, int | None]


def _read_torchrun(env: Mapping[str, str]) -> _Read:
    return (
        _int(env, "RANK"),
        _int(env, "WORLD_SIZE"),
        _optional_int(env, "LOCAL_RANK"),
        _optional_int(env, "LOCAL_WORLD_SIZE"),
        # GROUP_RANK counts agents, which are nodes unless an agent was started with another world size per node
        _optional_int(env, "GROUP_RANK"),
    )


def _slurm_tasks(env: Mapping[str, str]) -> str | None:
    # A step may be smaller than its job, and only the step's tasks are ranks.
    return env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS")


def _read_slurm(env: Mapping[str, str]) -> _Read:
    name = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    world = _int(env, name)
    per_node: int | None = None
    layout = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if layout:
        sizes = _tasks_per_node(layout)
        if len(sizes) != 1:
            raise TopologyError(
                f"slurm: nodes hold different numbers of ranks ({layout}); start with --ntasks-per-node=<n> so that "
                "all are equal"
            )
        per_node = sizes.pop()
    return (
        _int(env, "SLURM_PROCID"),
        world,
        _optional_int(env, "SLURM_LOCALID"),
        per_node,
        _optional_int(env, "SLURM_NODEID"),
    )


def _tasks_per_node(layout: str) -> set[int]:
    sizes = set()
    for part in layout.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x\d+\))?\s*", part)
        if match is None:
            raise TopologyError(
                f"slurm: cannot read SLURM_STEP_TASKS_PER_NODE={layout!r}; say it with --ranks-per-node"
            )
        sizes.add(int(match.group(1)))
    return sizes


def _read_openmpi(env: Mapping[str, str]) -> _Read:
    return (
        _int(env, "OMPI_COMM_WORLD_RANK"),
        _int(env, "OMPI_COMM_WORLD_SIZE"),
        _optional_int(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        _optional_int(env, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        None,
    )


def _read_pmi(env: Mapping[str, str]) -> _Read:
    return (
        _int(env, "PMI_RANK"),
        _int(env, "PMI_SIZE"),
        _optional_int(env, "MPI_LOCALRANKID"),
        _optional_int(env, "MPI_LOCALNRANKS"),
        None,
    )


_READERS = {"torchrun": _read_torchrun, "slurm": _read_slurm, "openmpi": _read_openmpi, "pmi": _read_pmi}


def _int(env: Mapping[str, str], name: str) -> int:
    value = env.get(name)
    if value is None:
        raise TopologyError(f"the launch environment lacks {name}; start with torchrun, srun or mpirun, or export it")
    try:
        return int(value)
    except ValueError:
        raise TopologyError(f"{name}={value!r} is no whole number; unset or correct it") from None


def _optional_int(env: Mapping[str, str], name: str) -> int | None:
    return _int(env, name) if name in env else None


def _placement(found: str, rank: int, got: str, expected: str, per_node: int) -> str:
    return (
        f"{found}: rank {rank} has {got}, but with {per_node} ranks per node placed in blocks it would be {expected}; "
        "place ranks in blocks (srun --distribution=block, mpirun --map-by slot) or declare --ranks-per-node"
    )


def _derived_port(env: Mapping[str, str]) -> int:
    """The same port on every rank of one job and, very likely, another one for another job."""
    parts = [
        env[name]
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
        if env.get(name)
    ]
    return _PORT_BASE + zlib.crc32(".".join(parts).encode()) % _PORT_SPAN if parts else _DEFAULT_PORT
