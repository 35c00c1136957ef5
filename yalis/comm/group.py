"""One parallel group as seen by one rank: members, hosts, and a torch process group of its own.

The process group is built directly on a store and not through ``torch.distributed.new_group``: that call is collective
over the *world*, or else names the group by a counter that differs between ranks of unequal membership.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from yalis.comm.emulation import VARIABLE, EmulatedFabric, FabricEnd
from yalis.comm.policy import GroupShape
from yalis.comm.topology import Topology
from yalis.errors import CommError, PeerLostError, TopologyError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

_c10d: Any = dist  # its type information lacks the stores and the backends' options

_SHUTDOWN_S = 5.0
WHOLE_BYTES = 64 << 10
_HEAD_BYTES = 4 << 10  # a multiple of every dtype's size


class WaitFailed(Exception):
    """A wait inside an algorithm failed; the communicator turns it into `PeerLostError` with the guard's help.

    Args:
        message: what the transport saw.
        suspect: index in the group of the peer to blame, or None.
    """

    def __init__(self, message: str, suspect: int | None = None):
        super().__init__(message)
        self.suspect = suspect


@dataclass(frozen=True)
class Member:
    """One rank of a group: its world rank, host, and where it sits."""

    rank: int
    node: int
    hostname: str
    memory_domain: str  # equal for ranks that can reach each other's memory and name each other's process
    pid: int


class Group:
    """The members of one group and the means to reach them. Peers are named by their *index* in ``ranks``.

    Attributes:
        topology, ranks, device, timeout_s: as given to `connect`.
        index: this rank's position in ``ranks``; size: number of ranks.
        members: one `Member` per index.
        local: indices of the members on this rank's declared node, ascending; position: this rank's place in it.
        shape: what the policy looks at; the same on every rank of the group.
        store: key-value store with a prefix that no other group uses.
        backend: gloo or NCCL process group over exactly these ranks.
        waited_s: seconds in `swap` for partners that came late, beyond the shortest meeting seen; CPU only.
        whole_bytes: longest message that travels in one piece between CPU ranks; the same on every rank.
        fabric: this rank's end of the emulated network between nodes; None where there is none.
    """

    def __init__(self, topology: Topology, ranks: Sequence[int], device: torch.device, timeout_s: float):
        self.topology = topology
        self.ranks = tuple(ranks)
        self.device = device
        self.timeout_s = timeout_s
        if len(set(self.ranks)) != len(self.ranks) or not self.ranks:
            raise TopologyError(f"group {list(ranks)}: ranks must be distinct and at least one")
        nodes = [topology.node_of(rank) for rank in self.ranks]
        if topology.rank not in self.ranks:
            raise TopologyError(f"rank {topology.rank} is not in the group {list(ranks)}; only its members create it")
        self.index = self.ranks.index(topology.rank)
        self.size = len(self.ranks)
        self.local = tuple(i for i, node in enumerate(nodes) if node == nodes[self.index])
        self.position = self.local.index(self.index)
        self.members: tuple[Member, ...] = ()
        self.shape = GroupShape(1, 1, 1, device.type, False, True)
        self.store: Any = None
        self.backend: Any = None
        self.waited_s = 0.0
        self.whole_bytes = WHOLE_BYTES
        self.fabric: FabricEnd | None = None
        self._meeting_s = float("inf")
        self._nodes = nodes

    def connect(self, store: Any, backend: str) -> None:
        """Meet the other members on ``store`` and build the process group (collective over the group).

        Raises:
            PeerLostError: a member did not come within ``timeout_s``.
        """
        # The count of arrivals numbers the generations of a group: one that was closed and is made again must not read
        # the keys of the first. Creation is collective, so nobody can be two generations ahead.
        name = "yalis/comm/" + "_".join(map(str, self.ranks))
        generation = (store.add(f"{name}/arrivals", 1) - 1) // self.size
        self.store = _c10d.PrefixStore(f"{name}/{generation}", store)
        me = Member(
            self.topology.rank,
            self._nodes[self.index],
            self.topology.hostname,
            _memory_domain(),
            os.getpid(),
        )
        members = [Member(**json.loads(word)) for word in self.exchange("member", json.dumps(asdict(me)))]
        self.members = tuple(members)
        for index, member in enumerate(members):
            if (member.rank, member.node) != (self.ranks[index], self._nodes[index]):
                raise TopologyError(
                    f"rank {member.rank} on {member.hostname} stands on node {member.node} by its own account and on "
                    f"node {self._nodes[index]} by rank {me.rank}'s; start all ranks with the same --ranks-per-node"
                )
        self.shape = _shape(self._nodes, members, self.device.type)
        words = [json.loads(word) for word in self.exchange("network", json.dumps([_network(), _fabric()]))]
        self._emulate([fabric for _, fabric in words])
        # Ranks of one kernel may still live in network namespaces of their own, each with a loopback of its own.
        one_host = len({m.memory_domain for m in members}) == 1 and len({network for network, _ in words}) == 1
        self.backend = _backend(backend, self.store, self.index, self.size, self.timeout_s, one_host)

    def exchange(self, key: str, word: str, timeout_s: float | None = None) -> list[str]:
        """Every member's ``word`` in index order, through the store (setup only: milliseconds).

        Args:
            key: used once per group.
            word: this member's.
            timeout_s: longest wait for each member; default the group's.

        Raises:
            PeerLostError: a member did not come within ``timeout_s``.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        self.store.set(f"{key}/{self.index}", word)
        words = []
        for index in range(self.size):
            try:
                self.store.wait([f"{key}/{index}"], timedelta(seconds=timeout_s))
                words.append(self.store.get(f"{key}/{index}").decode())
            except RuntimeError as error:
                host = self.members[index].hostname if self.members else None
                raise PeerLostError(
                    f"rank {self.ranks[index]} did not come to set up the group {list(self.ranks)} ({key}) within "
                    f"{timeout_s:g} s; look at that rank's output: {str(error).splitlines()[0]}",
                    rank=self.ranks[index],
                    host=host,
                    waiting_for=f"setup/{key}",
                ) from error
        return words

    # ---- point to point ---------------------------------------------------------------------------------------

    def isend(self, x: torch.Tensor, dst: int, tag: int = 0) -> Transfer:
        """Start to send contiguous ``x`` to member ``dst``; ``x`` must stay unchanged until the transfer ends."""
        with _blame(dst):
            return Transfer([self.backend.send([piece], dst, tag) for piece in self._pieces(x)], x, dst)

    def irecv(self, out: torch.Tensor, src: int, tag: int = 0) -> Transfer:
        """Start to receive from member ``src`` into contiguous ``out``."""
        fabric = self.fabric if self._nodes[src] != self._nodes[self.index] else None
        with _blame(src):
            return Transfer([self.backend.recv([piece], src, tag) for piece in self._pieces(out)], out, src, fabric)

    def swap(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        recvs: Sequence[tuple[torch.Tensor, int]],
        tag: int,
        *,
        answer: bool = False,
    ) -> None:
        """Send and receive several contiguous tensors at once; returns when all have arrived.

        Empty tensors do not travel; both sides know the sizes. NCCL needs the pieces as one group, since a lone send
        would occupy the stream until its receiver comes.

        Args:
            sends, recvs: (tensor, member). tag: the same on both sides.
            answer: what is received answers something sent before, so that nobody who comes later is late; not counted
                in ``waited_s``.
        """
        sends = [(t, peer) for t, peer in sends if t.numel()]
        recvs = [(t, peer) for t, peer in recvs if t.numel()]
        if self.device.type == "cuda":
            if sends or recvs:
                self.backend._start_coalescing()
                for t, peer in recvs:
                    self.backend.recv([t], peer, tag)
                for t, peer in sends:
                    self.backend.send([t], peer, tag)
                self.backend._end_coalescing().wait()
            return
        if not sends and not recvs:
            return
        if self.fabric is not None and sends and self._crosses(sends):
            self.fabric.enter()
        entered_s = perf_counter()
        arriving = [self.irecv(t, peer, tag) for t, peer in recvs]
        leaving = [self.isend(t, peer, tag) for t, peer in sends]
        # gloo sends once the receiver has asked for it: when the heads have left, the receivers have come. Of others
        # the first that is heard is the head of what they send.
        for transfer in leaving:
            transfer.meet()
        receivers = {peer for _, peer in sends}
        for transfer in arriving:
            if transfer.peer not in receivers:
                transfer.meet()
        met_s = perf_counter()
        if not answer:
            self._meeting_s = min(self._meeting_s, met_s - entered_s)
            self.waited_s += met_s - entered_s - self._meeting_s
        for transfer in (*leaving, *arriving):
            transfer.end()
        if self.fabric is not None:
            self.fabric.arrive([t.nbytes for t, peer in recvs if self._nodes[peer] != self._nodes[self.index]], met_s)

    def _pieces(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """``x`` as it travels: long messages between CPU ranks as a head and the rest.

        When the head has gone through, both ends were there, however long the rest takes; the price is one message
        more (about 50 us through gloo), so short ones, whose own time is little, go whole.
        """
        if x.nbytes <= self.whole_bytes or self.device.type == "cuda":
            return (x,)
        flat, head = x.view(-1), _HEAD_BYTES // x.itemsize
        return (flat[:head], flat[head:])

    def _crosses(self, pieces: Sequence[tuple[torch.Tensor, int]]) -> bool:
        mine = self._nodes[self.index]
        return any(self._nodes[peer] != mine for _, peer in pieces)

    def _emulate(self, words: Sequence[str]) -> None:
        """Put the declared network between the nodes.

        Raises:
            TopologyError: the ranks were told different things, or the tensors are not on the CPU.
            ConfigError: the description is wrong.
        """
        if len(set(words)) > 1:
            raise TopologyError(f"{VARIABLE} differs between the ranks {list(self.ranks)}: {sorted(set(words))}")
        fabric = EmulatedFabric.from_environment({VARIABLE: words[0]})
        if fabric is None or len(set(self._nodes)) == 1:
            return
        if self.device.type != "cpu":
            raise TopologyError(f"{VARIABLE} is set, but an emulated network is for CPU ranks, not {self.device.type}")
        self.fabric = FabricEnd(fabric, self.topology.rank)
        if self.index == 0:
            logger.warning("group %s: %s; its times are not those of a network", list(self.ranks), fabric)

    def close(self) -> None:
        """Let go of the process group (not collective), within `_SHUTDOWN_S`.

        NCCL waits for its kernels, one of which may hang, and for CUDA graphs that hold them: what does not end in time
        is left to the end of the process.
        """
        backend, self.backend = self.backend, None
        if backend is None or not hasattr(backend, "shutdown"):
            return
        thread = threading.Thread(target=backend.shutdown, name="yalis-shutdown", daemon=True)
        thread.start()
        thread.join(_SHUTDOWN_S)
        if thread.is_alive():
            logger.warning(
                "the process group of the ranks %s did not shut down within %g s and is left behind; a collective "
                "hangs, or a CUDA graph that holds one was not dropped before",
                list(self.ranks),
                _SHUTDOWN_S,
            )


class Transfer:
    """A started send or receive; keeps its tensor alive until `wait`."""

    __slots__ = ("_fabric", "_tensor", "_works", "peer")

    def __init__(self, works: Sequence[Any], tensor: torch.Tensor, peer: int, fabric: FabricEnd | None = None):
        self._works = works
        self._tensor = tensor
        self._fabric = fabric
        self.peer = peer

    def meet(self) -> None:
        """Wait until both ends have come: the head has gone through. Once.

        Raises:
            WaitFailed: the peer is gone or silent past the group's timeout.
        """
        self._wait_for_pieces(1)

    def end(self) -> None:
        """Wait until all of it has gone through; an emulated network adds nothing here. Raises as `meet`."""
        self._wait_for_pieces(len(self._works))

    def _wait_for_pieces(self, count: int) -> None:
        over, self._works = self._works[:count], self._works[count:]  # gloo's would wait for another message
        with _blame(self.peer):
            for work in over:
                work.wait()

    def wait(self) -> torch.Tensor:
        """Wait until the tensor may be reused (send) or read (receive) and return it. Raises as `meet`."""
        self.meet()
        met_s = perf_counter()
        self.end()
        fabric, self._fabric = self._fabric, None
        if fabric is not None:
            fabric.arrive([self._tensor.nbytes], met_s)
        return self._tensor

    def done(self) -> bool:
        """True when `wait` would return at once."""
        return all(work.is_completed() for work in self._works)


@contextmanager
def _blame(peer: int | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed raises nothing narrower for lost connections and time-outs
        raise WaitFailed(str(error), peer) from error


def wait_for(work: Any) -> None:
    """Wait for a collective of the process group; who failed cannot be told.

    Args:
        work: None where the backend has waited already.

    Raises:
        WaitFailed: a member is gone or silent past the group's timeout.
    """
    with _blame(None):
        if work is not None:
            work.wait()


def in_line(options: Any) -> Any:
    """Options of a collective that is waited for at once: NCCL then computes on the current stream, where by default it
    takes a stream of its own and two events to go there and back. gloo takes no notice."""
    options.asyncOp = False
    return options


def _network() -> str:
    """Identifies the network namespace."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


def _fabric() -> str:
    return os.environ.get(VARIABLE, "")


def _memory_domain() -> str:
    """Identifies a running kernel and a namespace of process ids in it: there, /proc/PID leads to the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}-{os.getpid()}"  # shared with nobody


def _shape(nodes: Sequence[int], members: Sequence[Member], device_type: str) -> GroupShape:
    counts = {node: nodes.count(node) for node in nodes}
    per_node = next(iter(counts.values())) if len(set(counts.values())) == 1 else 0
    shares_memory = all(
        len({m.memory_domain for m in members if m.node == node}) == 1 and counts[node] >= 1 for node in counts
    )
    return GroupShape(
        ranks=len(members),
        nodes=len(counts),
        ranks_per_node=per_node,
        device=device_type,
        shared_memory=shares_memory and device_type == "cpu",
        one_host=len({m.memory_domain for m in members}) == 1,
        contiguous=all(nodes[i] <= nodes[i + 1] for i in range(len(nodes) - 1)),
    )


def _backend(name: str, store: Any, index: int, size: int, timeout_s: float, one_host: bool) -> Any:
    timeout = timedelta(seconds=timeout_s)
    if name == "gloo":
        options = _c10d.ProcessGroupGloo._Options()
        options._timeout = timeout
        # Ranks of one host meet on loopback whatever the host's name resolves to. The default device looks at the name
        # alone; torch reads the variable only where it makes the group itself.
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        if one_host:
            device = _c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")
        elif interface:
            device = _c10d.ProcessGroupGloo.create_device(interface=interface)
        else:
            device = _c10d.ProcessGroupGloo.create_default_device()
        options._devices = [device]
        with _setup_blame(name, timeout_s):
            return _c10d.ProcessGroupGloo(_c10d.PrefixStore("gloo", store), index, size, options)
    if name == "nccl":
        nccl_options = _c10d.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        with _setup_blame(name, timeout_s):
            return _c10d.ProcessGroupNCCL(_c10d.PrefixStore("nccl", store), index, size, nccl_options)
    raise CommError(f"unknown torch backend {name!r}; use gloo (CPU) or nccl (CUDA)")


@contextmanager
def _setup_blame(name: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CommError(
            f"{name}: the ranks could not connect to each other within {timeout_s:g} s: {str(error).splitlines()[0]}; "
            "check that every rank started; with several interfaces set GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME"
        ) from error
