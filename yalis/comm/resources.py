"""What the algorithms of one group share: memory and libraries that its ranks open together, or go without together."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from yalis.comm import policy
from yalis.comm.group import Group
from yalis.comm.guard import Guard
from yalis.errors import CommError, ConfigError, PeerLostError
from yalis.utils.logging import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from yalis.comm.channels import Channels
    from yalis.comm.nvrar.link import Link
    from yalis.comm.peer_memory import PeerMemory
    from yalis.comm.shm import SharedSegment
    from yalis.comm.tuning import TunedTable

logger = get_logger(__name__)


@dataclass(frozen=True)
class Resources:
    """What was opened for a group; None where there is none.

    Args:
        segment: shared memory of this rank's node within the group.
        link: NVRAR between the members.
        memory: of the members' GPUs, mapped to each other.
        channels: messages through shared memory within this rank's node.
        tuned: what `yalis tune` measured, where it counts.
    """

    segment: SharedSegment | None = None
    link: Link | None = None
    memory: PeerMemory | None = None
    channels: Channels | None = None
    tuned: TunedTable | None = None

    def close(self, *, failed: bool) -> None:
        """Let go of everything; not collective. ``failed``: a peer was lost."""
        if self.memory is not None:
            self.memory.close(failed=failed)
        if self.link is not None:
            self.link.close(failed=failed)
        if self.channels is not None:
            self.channels.close()
        if self.segment is not None:
            self.segment.close()


def open_resources(
    group: Group,
    algorithm: str,
    guard: Guard,
    *,
    table: policy.Table | None,
    tuned: TunedTable | Path | None,
    nvrar_bytes: int,
) -> Resources:
    """Open what ``algorithm`` may need, and note in ``group.shape`` what there is (collective over the group).

    Args: as of `yalis.comm.communicator.Communicator.create`.

    Raises:
        ConfigError: what was forced cannot serve, the same on every rank; or NVRAR's ranks do not agree.
        CommError: the same of shared memory and NVRAR.
        PeerLostError: a member did not come.
    """
    opened = Resources()
    try:
        segment, channels = _share_memory(group, algorithm, guard)
        opened = replace(opened, segment=segment, channels=channels)
        found = None
        if algorithm == "nvrar" or (algorithm == "auto" and table is None):
            found = _tuned_table(group, tuned)
        opened = replace(opened, link=_open_nvrar(group, algorithm, guard, table, found, nvrar_bytes))
        if opened.link is None and found is not None and "nvrar" in found.names():
            found = None  # measured with it; the default policy knows what serves without
        opened = replace(opened, tuned=found)
        return replace(opened, memory=_map_memory(group, algorithm, table, found))
    except BaseException:
        opened.close(failed=True)
        raise


def _share_memory(group: Group, algorithm: str, guard: Guard) -> tuple[SharedSegment | None, Channels | None]:
    """What this rank's node shares for collectives and for messages; None where there is nobody to share with
    (collective over the group)."""
    shape = group.shape
    if algorithm == "torch" or not shape.shared_memory or shape.ranks == shape.nodes:
        return None, None
    from yalis.comm.channels import Channels  # these load the compiled parts
    from yalis.comm.shm import SharedSegment

    segment = None
    try:
        segment = SharedSegment.connect(group, guard.abort_flag_address())
        return segment, Channels.connect(group, guard.abort_flag_address())
    except CommError as error:
        if segment is not None:
            segment.close()
        if algorithm == "shm" or isinstance(error, PeerLostError):
            raise
        logger.warning(
            "group %s: %s; ranks of one host now talk through torch's backend, slower", list(group.ranks), error
        )
        group.shape = replace(shape, shared_memory=False)
        return None, None


def _open_nvrar(
    group: Group,
    algorithm: str,
    guard: Guard,
    table: policy.Table | None,
    tuned: TunedTable | None,
    max_bytes: int,
) -> Link | None:
    """NVRAR between the members where it may be chosen, else None (collective over the group)."""
    if algorithm not in ("auto", "nvrar"):
        return None
    rows = table if table is not None else policy.default_table(group.shape)
    wanted = [name for _, name in rows] + (tuned.names() if tuned is not None and table is None else [])
    if algorithm == "auto" and "nvrar" not in wanted:
        return None
    from yalis.comm.nvrar.link import MAX_BYTES, Link

    try:
        link = Link.connect(group, tuned, max_bytes=max_bytes or MAX_BYTES, abort_flag=guard.abort_flag_address())
    except PeerLostError:
        raise
    except CommError as error:
        if algorithm == "nvrar":
            raise
        logger.warning("group %s: %s; other algorithms serve", list(group.ranks), error)
        return None
    group.shape = replace(group.shape, nvrar_bytes=link.capacity)
    return link


def _map_memory(
    group: Group, algorithm: str, table: policy.Table | None, tuned: TunedTable | None
) -> PeerMemory | None:
    """Memory for `two_shot` where it may be chosen and the GPUs can map it, else None (collective over the group).

    Raises:
        ConfigError: it was forced and cannot serve; the same on every rank.
        PeerLostError: a member did not come.
    """
    shape = group.shape
    if policy.why_not("two_shot", replace(shape, mapped=True)) is not None:
        return None
    rows = [name for _, name in table or ()] if table is not None or tuned is None else tuned.names()
    if algorithm not in ("nvrar", "two_shot") and not (algorithm == "auto" and "two_shot" in rows):
        return None
    problem, nbytes = "", 0
    try:
        from yalis.comm.algorithms.two_shot import BUFFER_BYTES as nbytes
    except Exception as error:  # whatever keeps Triton from loading
        problem = f"its kernels cannot be loaded ({error}; pip install triton)"
    hello = json.dumps({"gpu": _gpu_of(group), "problem": problem})
    words = [json.loads(word) for word in group.exchange("two-shot", hello)]
    why = next((word["problem"] for word in words if word["problem"]), "")
    if len({word["gpu"] for word in words}) < group.size:
        why = "ranks share a GPU, and memory is mapped between GPUs"
    if not why:
        from yalis.comm.peer_memory import PeerMemory

        try:
            memory = PeerMemory(group, nbytes, "two_shot")
        except PeerLostError:
            raise
        except CommError as error:
            why = str(error)
        else:
            group.shape = replace(shape, mapped=True)
            return memory
    if algorithm == "two_shot":
        raise ConfigError(f"all-reduce algorithm 'two_shot': {why}; use nccl or auto")
    logger.warning("group %s: two_shot does not serve: %s; torch takes long messages", list(group.ranks), why)
    return None


def _gpu_of(group: Group) -> str:
    """Names this rank's GPU among all."""
    return f"{group.members[group.index].hostname}/{torch.cuda.get_device_properties(group.device).uuid}"


def _tuned_table(group: Group, tuned: TunedTable | Path | None) -> TunedTable | None:
    """Rank 0's tuned table, on every rank (collective)."""
    from yalis.comm import tuning

    mine = None
    if group.index == 0:
        nodes, local = tuning.shape_of(group.shape)
        key = tuning.key_for(group.device, nodes, local)
        mine = tuned if isinstance(tuned, tuning.TunedTable) else tuning.find(key, tuned)
    text = group.exchange("tuned", mine.to_json() if mine is not None else "")[0]
    return tuning.TunedTable.from_json(text) if text else None
