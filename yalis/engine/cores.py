"""Which CPU cores a rank computes on."""

from __future__ import annotations

from collections.abc import Sequence

from yalis.comm.topology import Launcher, Topology

# srun and mpirun may bind their ranks themselves; torchrun and yalis' own launcher never do.
_BINDING_LAUNCHERS = ("slurm", "openmpi", "pmi")


def cores_of_rank(
    allowed: Sequence[int], num_online: int, topology: Topology, found: Launcher | None
) -> tuple[list[int], bool]:
    """This rank's share of the cores it is allowed on.

    Ranks that meet in an all-reduce of a few microseconds must run at the same time. Left alone, the kernel keeps two
    of them on one core for milliseconds: 15 to 22 us an all-reduce of 2 to 16 KiB against 3 to 4 us with a core each
    (docs/communicator.md).

    Args:
        allowed: cores in this process's affinity mask.
        num_online: cores of the host.
        topology: this rank's place on its host.
        found: the launcher.

    Returns:
        the cores, and whether they are this rank's alone. Not alone when there are fewer cores than ranks.
    """
    count = topology.ranks_on_host or 1
    cores = sorted(allowed)
    if count == 1 or (found in _BINDING_LAUNCHERS and len(cores) < num_online):
        return cores, True
    if len(cores) < count:
        return cores, False
    share = len(cores) // count
    index = (topology.device_index or 0) % count
    return cores[index * share : (index + 1) * share], True
