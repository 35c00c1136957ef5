"""One parallel group as seen by one rank: members, hosts, and a torch process group of its own.

The process group is built directly on a store and not through ``torch.distributed.new_group``: that call is collective
over the *world*, or else names the group by a counter that differs between ranks of unequal membership.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from yalis.comm.emulation import VARIABLE, EmulatedFabric, FabricEnd
from yalis.comm.marks import BUFFERED_BYTES, SHORT_BYTES, find_marks
from yalis.comm.policy import GroupShape
from yalis.comm.topology import Topology
from yalis.errors import CommError, PeerLostError, TopologyError
from yalis.utils.logging import get_logger

logger = get_logger(__name__)

_c10d: Any = dist  # its type information lacks the stores and the backends' options

_SHUTDOWN_S = 5.0
_MARK_BYTES = 8


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
        waited_s: seconds in `swap` for partners that came late, beyond the shortest such meeting seen; CPU only.
        short_bytes, buffered_bytes: longest messages that are their own marks (`yalis.comm.marks`); the same on every
            rank.
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
        self.short_bytes = self.buffered_bytes = SHORT_BYTES
        self.fabric: FabricEnd | None = None
        # What marks say is that they came: all are sent from one place and received in another.
        self._mark_out, self._mark_in = (torch.zeros(_MARK_BYTES, dtype=torch.uint8) for _ in range(2))
        self._meetings_s: dict[int, float] = {}  # the shortest, by kind of mark
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
        if one_host:
            self.buffered_bytes = BUFFERED_BYTES

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
        return self._send(x, dst, tag, self._has_mark(x))

    def irecv(self, out: torch.Tensor, src: int, tag: int = 0) -> Transfer:
        """Start to receive from member ``src`` into contiguous ``out``."""
        return self._receive(out, src, tag, self._has_mark(out))

    def _has_mark(self, x: torch.Tensor) -> bool:
        """Whether ``x`` goes with a mark when it goes alone: an emulated network must know when both ends had come, and
        nobody else asks."""
        return self.fabric is not None and x.nbytes > self.short_bytes

    def _send(self, x: torch.Tensor, dst: int, tag: int, mark: bool) -> Transfer:
        with _Blame(dst):
            works = [self.backend.send([self._mark_out], dst, tag)] if mark else []
            works.append(self.backend.send([x], dst, tag))
        return Transfer(works, x, dst)

    def _receive(self, out: torch.Tensor, src: int, tag: int, mark: bool) -> Transfer:
        with _Blame(src):
            works = [self.backend.recv([self._mark_in], src, tag)] if mark else []
            works.append(self.backend.recv([out], src, tag))
        return Transfer(works, out, src, self.fabric if self._nodes[src] != self._nodes[self.index] else None)

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
        if (
            len(sends) == len(recvs) == 1
            and sends[0][1] == recvs[0][1]
            and max(sends[0][0].nbytes, recvs[0][0].nbytes) <= self.buffered_bytes
        ):
            met_s, kind = self._swap_two(*sends[0], recvs[0][0], tag)
        else:
            met_s, kind = self._swap_many(sends, recvs, tag)
        if not answer:
            meeting_s = met_s - entered_s
            shortest_s = self._meetings_s[kind] = min(meeting_s, self._meetings_s.get(kind, meeting_s))
            self.waited_s += meeting_s - shortest_s
        if self.fabric is not None:
            self.fabric.arrive([t.nbytes for t, peer in recvs if self._nodes[peer] != self._nodes[self.index]], met_s)

    def _swap_two(self, x: torch.Tensor, peer: int, out: torch.Tensor, tag: int) -> tuple[float, int]:
        """`_swap_many` of one message each way, where the one that leaves is the mark. It is what most exchanges are,
        and in microseconds each object counts."""
        with _Blame(peer):
            arriving = self.backend.recv([out], peer, tag)
            leaving = self.backend.send([x], peer, tag)
            leaving.wait()
            met_s = perf_counter()
            arriving.wait()
        return met_s, (x.nbytes // SHORT_BYTES).bit_length()

    def _swap_many(
        self, sends: Sequence[tuple[torch.Tensor, int]], recvs: Sequence[tuple[torch.Tensor, int]], tag: int
    ) -> tuple[float, int]:
        """Exchange all; returns when all had come, and the kind of the marks by what they take anyway: one that this
        rank hears takes a way more than one that it sends, and a long one takes a copy."""
        leave, come = find_marks(self.index, sends, recvs, self.short_bytes, self.buffered_bytes)
        arriving, heard = self._start(self._receive, recvs, tag, come)
        leaving, sent = self._start(self._send, sends, tag, leave)
        kind = -1 if heard else (max(transfer.first_bytes for transfer in sent) // SHORT_BYTES).bit_length()
        for transfer in (*sent, *heard):
            transfer.meet()
        met_s = perf_counter()
        for transfer in (*arriving, *leaving):
            transfer.end()
        return met_s, kind

    def _start(
        self,
        begin: Callable[[torch.Tensor, int, int, bool], Transfer],
        messages: Sequence[tuple[torch.Tensor, int]],
        tag: int,
        marked: dict[int, bool],
    ) -> tuple[list[Transfer], list[Transfer]]:
        """Begin all messages. Those that tell of the meeting are given again: the first of each member in ``marked``,
        with a message ahead where that says so."""
        started, marks = [], []
        for t, peer in messages:
            mark = marked.pop(peer, None)
            transfer = begin(t, peer, tag, bool(mark))
            started.append(transfer)
            if mark is not None:
                marks.append(transfer)
        return started, marks

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

    @property
    def first_bytes(self) -> int:
        """Bytes of what goes first: the mark, where one goes ahead."""
        return self._tensor.nbytes if len(self._works) == 1 else _MARK_BYTES

    def meet(self) -> None:
        """Wait until both ends have come: the first message has gone through. Once.

        Raises:
            WaitFailed: the peer is gone or silent past the group's timeout.
        """
        self._wait_for_pieces(1)

    def end(self) -> None:
        """Wait until all of it has gone through; an emulated network adds nothing here. Raises as `meet`."""
        self._wait_for_pieces(len(self._works))

    def _wait_for_pieces(self, count: int) -> None:
        over, self._works = self._works[:count], self._works[count:]  # gloo's would wait for another message
        if over:
            with _Blame(self.peer):
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


class _Blame:
    """Turns what torch.distributed raises for lost connections and time-outs, which has no narrower type, into
    `WaitFailed` of ``peer``. A class, since a generator takes some microseconds more, several times a message."""

    __slots__ = ("_peer",)

    def __init__(self, peer: int | None):
        self._peer = peer

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise WaitFailed(str(error), self._peer) from error


def wait_for(work: Any) -> None:
    """Wait for a collective of the process group; who failed cannot be told.

    Args:
        work: None where the backend has waited already.

    Raises:
        WaitFailed: a member is gone or silent past the group's timeout.
    """
    with _Blame(None):
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
