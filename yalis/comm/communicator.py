"""The communicator: the collectives of one parallel group, and the deadline on every wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from yalis.comm import policy
from yalis.comm.algorithms import load
from yalis.comm.algorithms.base import Algorithm
from yalis.comm.group import Group, Transfer, WaitFailed, in_line, wait_for
from yalis.comm.guard import Guard, NullGuard
from yalis.comm.nvrar import ops
from yalis.comm.resources import Resources, open_resources
from yalis.comm.stats import CommStats
from yalis.comm.topology import Topology, launcher, rendezvous
from yalis.errors import CommError, ConfigError, PeerLostError, PeerTimeoutError, TopologyError
from yalis.utils.logging import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from yalis.comm.channels import Channels, Passage
    from yalis.comm.nvrar.link import Link
    from yalis.comm.tuning import TunedTable

logger = get_logger(__name__)
_c10d: Any = dist  # its type information does not name the stores
T = TypeVar("T")


def init_distributed(
    topology: Topology,
    backend: str | None = None,
    timeout_s: float = 30.0,
    *,
    store: Any = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Make torch.distributed's default group; does nothing for a world of one or when the same world exists already.

    Args:
        topology: rank and world size.
        backend: ``"gloo"`` or ``"cpu:gloo,cuda:nccl"``; default the second where CUDA is there.
        timeout_s: how long to wait for the other ranks, here and in the default group's collectives.
        store: a ``torch.distributed.Store`` to meet on; default the rendezvous of the launch environment.
        env: the launch environment; default ``os.environ``.

    Raises:
        TopologyError: a default group of another size or rank exists, or there is no rendezvous.
        PeerLostError: the other ranks did not come in time.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (topology.rank, topology.world_size):
            raise TopologyError(
                f"torch.distributed is initialised as rank {dist.get_rank()} of {dist.get_world_size()}, but this is "
                f"rank {topology.rank} of {topology.world_size}; destroy that process group first"
            )
        return
    if topology.world_size == 1:
        return
    env = os.environ if env is None else env
    backend = backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    timeout = timedelta(seconds=timeout_s)
    where = "the given store"
    try:
        if store is None:
            address, port = rendezvous(env)
            where = f"{address}:{port}"
            if launcher(env) == "torchrun":
                # torch's own reading knows about the elastic agent's store, which already listens on that port. It
                # outlives the group: whoever comes back finds the addresses of the time before, unless each time has
                # keys of its own. Ranks count by themselves: where only some of them come back (a retry on one rank, a
                # restart by torchrun after one had not come this far), they wait out the timeout.
                agents = next(iter(_c10d.rendezvous("env://", topology.rank, topology.world_size, timeout=timeout)))[0]
                store = _c10d.PrefixStore(f"yalis/{agents.add(f'yalis/times/{topology.rank}', 1)}", agents)
            else:
                store = _c10d.TCPStore(address, port, topology.world_size, topology.rank == 0, timeout=timeout)
        dist.init_process_group(
            backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise PeerLostError(
            f"rank {topology.rank} of {topology.world_size} on {topology.hostname} could not meet the others at "
            f"{where} within {timeout_s:g} s: {str(error).splitlines()[0]}; check that all ranks started and can reach "
            "that address",
            waiting_for="init_distributed",
        ) from error


class Communicator:
    """Collectives over one group of ranks.

    Peers (``src``, ``dst``) are named by their index in the group, 0 to ``size - 1``, not by world rank. Every member
    must make the same calls in the same order. A group of one needs no torch.distributed: sums are identities. One
    thread at a time may use a communicator.

    Every wait ends: after ``timeout_s`` seconds of silence, or at once when a peer's connection breaks, the call raises
    `PeerLostError`; from then on the communicator is *broken* and every call raises that error again.

    ``tag`` names the call site (``"L3.mlp.down"``) in errors and profiler ranges.
    """

    def __init__(
        self,
        group: Group,
        algorithm: str,
        guard: Guard,
        stats: CommStats,
        resources: Resources,
        table: policy.Table | None,
    ) -> None:
        """Use `create`."""
        self.topology = group.topology
        self.ranks = group.ranks
        self.rank = group.index
        self.size = group.size
        self.device = group.device
        self.algorithm = algorithm
        self.shape = group.shape
        self.stats = stats
        self._group = group
        self._guard = guard
        self._table = table
        self._resources = resources
        self._algorithms: dict[str, Algorithm] = {}
        self._choices: dict[tuple[torch.dtype, int], str] = {}
        self._token = 0
        self._begun = ""  # what CUDA was last told to do; a failure that shows later is of this or of one before
        # The segment serves whole-group collectives only where it holds the whole group.
        segment = resources.segment
        self._whole = segment if segment is not None and segment.ranks == group.size else None
        self._via = "shm" if self._whole is not None else "torch"
        self._broken: CommError | None = None
        self._failing = threading.Lock()  # NVRAR's watchdog may see a failure at the same time as the main thread
        self._closed = False

    @classmethod
    def create(
        cls,
        topology: Topology,
        ranks: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        algorithm: str = "auto",
        timeout_s: float = 30.0,
        guard: Guard | None = None,
        store: Any = None,
        table: policy.Table | None = None,
        tuned: TunedTable | Path | None = None,
        nvrar_bytes: int = 0,
    ) -> Communicator:
        """Build the communicator of the group ``ranks`` (collective over the group: all members, same arguments).

        Args:
            topology: this rank's place in the world.
            ranks: world ranks of the members; their order gives the indices and the order of summation.
            device: where the tensors live, ``"cpu"`` or ``"cuda[:n]"``.
            algorithm: ``"auto"`` or a name in `yalis.comm.policy.ALGORITHMS` for every all-reduce.
            timeout_s: longest wait for a peer, in seconds.
            guard: watches this rank and explains failed waits; default `NullGuard`.
            store: where the members meet; default that of torch's default group (`init_distributed`).
            table: rows (largest bytes, algorithm) in place of the default policy and of a tuned table's.
            tuned: what `yalis tune` measured, or the file it is in; rank 0's counts. Default the usual place
                (`yalis.comm.tuning.find`).
            nvrar_bytes: largest message that NVRAR reserves memory for; larger ones go to torch, or to two_shot, where
                that serves, from above 2 MiB whatever is reserved. 0: its default, 4 MiB.

        Raises:
            TopologyError: the group does not fit the topology, or there is nowhere to meet.
            ConfigError: the algorithm is unknown or cannot serve this group, or NVRAR's ranks do not agree.
            PeerLostError: a member did not come.
        """
        group = Group(topology, ranks, torch.device(device), timeout_s)
        algorithm = policy.plain_name(algorithm, group.device.type)
        stats = CommStats()
        if group.size == 1:
            policy.check_name(algorithm)
            return cls(group, algorithm, guard or NullGuard(), stats, Resources(), table)
        if store is None:
            if not dist.is_initialized():
                raise TopologyError(
                    f"a group of {group.size} ranks needs somewhere to meet; call init_distributed or pass a store"
                )
            store = dist.distributed_c10d._get_default_store()
        policy.check_name(algorithm)
        group.connect(store, "nccl" if group.device.type == "cuda" else "gloo")
        guard = guard or NullGuard({m.rank: m.hostname for m in group.members})
        try:
            resources = open_resources(group, algorithm, guard, table=table, tuned=tuned, nvrar_bytes=nvrar_bytes)
        except BaseException:
            group.close()
            raise
        comm = cls(group, algorithm, guard, stats, resources, table)
        try:
            policy.check_forced(algorithm, group.shape)
            if algorithm == "torch" and group.fabric is not None:
                raise ConfigError(
                    "all-reduce algorithm 'torch' does not pass through the emulated network (YALIS_EMULATED_FABRIC); "
                    "use rd, or unset it"
                )
            for name in comm._candidates():
                comm._algorithms[name] = load(name)(group, comm._resources, stats)
            comm._register()
        except BaseException:
            comm.close()
            raise
        logger.info("group %s: %s, algorithms %s", list(group.ranks), group.shape, ", ".join(comm._algorithms))
        return comm

    @property
    def link(self) -> Link | None:
        """NVRAR between the members, where it is open."""
        return self._resources.link

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Names of the all-reduce algorithms that are ready to serve this group; none in a group of one."""
        return tuple(self._algorithms)

    @property
    def uncapturable(self) -> tuple[str, ...]:
        """Names of this group's algorithms that a CUDA graph cannot hold; empty where it can hold all."""
        return tuple(name for name, algorithm in self._algorithms.items() if not algorithm.capturable)

    @property
    def waited_s(self) -> float | None:
        """Seconds of waiting for late members of this node, part of the times in `stats`; None where nobody measures.

        Measured in shared memory only: other transports do not tell waiting from moving.
        """
        segment = self._resources.segment
        return None if segment is None else segment.waited_s

    def call_times(self) -> list[tuple[float, float]]:
        """(waited, moved) in seconds of NVRAR's latest calls on this rank, oldest first; empty where it is not open.

        Waits for the device to be idle.
        """
        link = self._resources.link
        return [] if link is None else [(stamp.wait_s, stamp.transfer_s) for stamp in link.stamps()]

    @property
    def waited_between_nodes_s(self) -> float:
        """Seconds that the exchanges of `rd` waited for partners that came late; CPU only."""
        return self._group.waited_s

    @property
    def group(self) -> Group:
        """Members and point-to-point exchange, for algorithms made elsewhere."""
        return self._group

    @property
    def emulated(self) -> str:
        """The emulated network between this group's nodes, in words; empty where there is none."""
        return str(self._group.fabric.fabric) if self._group.fabric is not None else ""

    # ---- all-reduce -------------------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None, *, tag: str = "") -> torch.Tensor:
        """Sum of every rank's ``x``, with the same bits on every rank.

        Args:
            x: any shape; any layout. The same shape and dtype on every rank.
            out: where to write, same shape and dtype; ``out=x`` works in place. Default a new tensor (in a group of
                one, ``x`` itself).
            tag: name of the call site.

        Returns:
            ``out``, or the new tensor.

        Raises:
            PeerLostError: a peer is gone or silent past the deadline.
            CommError: ``out`` does not fit, or the forced algorithm cannot reduce this dtype.
        """
        if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
            raise CommError(f"all_reduce: out is {_kind(out)} but x is {_kind(x)}; they must agree")
        if self.size == 1 or x.numel() == 0:
            return x if out is None else (out if out is x else out.copy_(x))
        if torch.compiler.is_compiling():  # an operator that calls this method again, outside of the graph
            return ops.all_reduce(x, out, self._token)
        name = self.choice(x.dtype, x.nbytes)
        self.stats.count(name, x.nbytes)
        source = x if x.is_contiguous() else x.contiguous()
        if out is None:
            target = torch.empty_like(source)
        elif out.is_contiguous():
            target = out
        else:
            target = source if source is not x else torch.empty_like(source)
        self._run(f"{tag}/allreduce[{name},{x.nbytes}B]", self._algorithms[name].all_reduce, source, target)
        return target if out is None or target is out else out.copy_(target)

    def all_reduce_rmsnorm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, tag: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum ``x`` over the ranks, add it to the residual, and normalise: what follows every row-parallel layer.

        Args:
            x: this rank's partial sum, shape [..., hidden]; may be overwritten.
            residual: same shape and dtype, equal on every rank; may be overwritten.
            weight: RMSNorm weight, shape [hidden].
            eps: added to the mean square.
            tag: name of the call site.

        Returns:
            ``(normed, new_residual)``: ``new_residual = residual + sum(x)``, ``normed = weight * rms(new_residual)``
            with the norm in fp32. Same bits on every rank. Do not use ``x`` and ``residual`` afterwards.

        Raises:
            PeerLostError, CommError: as `all_reduce`.
        """
        from yalis.kernels import ops as kernels  # here, because most users of a communicator need no kernels

        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise CommError(f"all_reduce_rmsnorm: residual is {_kind(residual)} but x is {_kind(x)}; they must agree")
        x = x.contiguous()
        if self.size > 1:
            if torch.compiler.is_compiling():
                return ops.all_reduce_rmsnorm(x, residual, weight, eps, self._token)
            algorithm = self._algorithms[self.choice(x.dtype, x.nbytes)]
            if x.numel() and algorithm.fuses(x, residual, weight):
                self.stats.count(algorithm.name, x.nbytes)
                what = f"{tag}/all_reduce_rmsnorm[{algorithm.name},{x.nbytes}B]"
                self._run(what, algorithm.all_reduce_rmsnorm, x, residual, weight, eps)
                return x, residual
            self.all_reduce(x, out=x, tag=tag)
        width = x.shape[-1]
        rows = x.view(-1, width)
        normed, hidden = kernels.add_rms_norm(rows, residual.reshape(-1, width), weight, eps, out=rows)
        return normed.view(x.shape), hidden.view(x.shape)

    # ---- other collectives ------------------------------------------------------------------------------------

    def all_gather(self, x: torch.Tensor, dim: int = -1, *, tag: str = "") -> torch.Tensor:
        """Every rank's ``x`` joined along ``dim`` in index order, contiguous; equal shapes everywhere.

        In a group of one it is ``x`` itself.
        """
        if not -x.dim() <= dim < x.dim():
            raise CommError(
                f"all_gather: dim={dim} of x with shape {tuple(x.shape)}; must be {-x.dim()} to {x.dim() - 1}"
            )
        if self.size == 1:
            return x
        source = x.contiguous()
        parts = torch.empty((self.size, *source.shape), dtype=source.dtype, device=source.device)
        if source.numel():
            self._run(f"{tag}/allgather[{self._via},{x.nbytes}B]", self._gather_into, source, parts)
        place = dim % x.dim()
        joined = (*x.shape[:place], self.size * x.shape[place], *x.shape[place + 1 :])
        # No copy where nothing stands before dim, as for one row of logits. A reshape alone may give a strided view
        # ([S, 1] along the last dim does), which kernels that index by hand would misread.
        return parts.movedim(0, place).reshape(joined).contiguous()

    def _gather_into(self, source: torch.Tensor, parts: torch.Tensor) -> None:
        if self._whole is not None:
            self._whole.all_gather(source, parts)
            return
        # One tensor for all parts: given a list, NCCL gathers into memory of its own and copies each part from there.
        options = in_line(_c10d.distributed_c10d.AllgatherOptions())
        wait_for(self._group.backend._allgather_base(parts.view(-1), source.view(-1), options))

    def broadcast(self, x: torch.Tensor, src: int, *, tag: str = "") -> torch.Tensor:
        """Copy member ``src``'s ``x`` into every rank's ``x`` (contiguous) and return it."""
        self._check_peer("src", src)
        if not x.is_contiguous():
            raise CommError(f"broadcast: x of shape {tuple(x.shape)} is not contiguous; pass x.contiguous()")
        if self.size > 1 and x.numel():
            self._run(f"{tag}/broadcast[{self._via},{x.nbytes}B]", self._broadcast, x, src)
        return x

    def _broadcast(self, x: torch.Tensor, src: int) -> None:
        if self._whole is not None:
            self._whole.broadcast(x, src)
            return
        options = in_line(dist.BroadcastOptions())
        options.rootRank = src
        options.rootTensor = 0
        wait_for(self._group.backend.broadcast([x], options))

    def barrier(self, *, tag: str = "") -> None:
        """Return when every member has come here."""
        if self.size > 1:
            self._run(f"{tag}/barrier[{self._via}]", self._barrier)

    def _barrier(self) -> None:
        if self._whole is not None:
            self._whole.barrier()
            return
        wait_for(self._group.backend.barrier())

    def agree_min(self, value: int, *, tag: str = "") -> int:
        """The least of every rank's ``value`` (fits int64): to agree on sizes such as the number of KV blocks."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        self._run(f"{tag}/agree_min", self._min, box)
        return int(box.item())

    def _min(self, box: torch.Tensor) -> None:
        options = in_line(dist.AllreduceOptions())
        options.reduceOp = _c10d.ReduceOp.MIN
        wait_for(self._group.backend.allreduce([box], options))

    # ---- point to point ---------------------------------------------------------------------------------------

    def isend(self, x: torch.Tensor, dst: int, *, tag: str = "") -> Handle:
        """Start to send ``x`` to member ``dst``; ``x`` must stay unchanged until ``handle.wait()``."""
        self._check_peer("dst", dst, other=True)
        what = f"{tag}/send[{x.nbytes}B to rank {self.ranks[dst]}]"
        start: Callable[..., Transfer | Passage] = self._way(dst).isend
        return Handle(self, what, self._run(what, start, x.contiguous(), dst))

    def irecv(
        self,
        out: torch.Tensor | None = None,
        src: int = 0,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        tag: str = "",
    ) -> Handle:
        """Start to receive from member ``src`` into ``out`` (contiguous), or into a new tensor of ``shape``, ``dtype``.

        ``handle.wait()`` returns the tensor.
        """
        self._check_peer("src", src, other=True)
        if out is None:
            if shape is None or dtype is None:
                raise CommError("irecv: needs out, or both shape and dtype")
            out = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        elif not out.is_contiguous():
            raise CommError(f"irecv: out of shape {tuple(out.shape)} is not contiguous")
        what = f"{tag}/recv[{out.nbytes}B from rank {self.ranks[src]}]"
        start: Callable[..., Transfer | Passage] = self._way(src).irecv
        return Handle(self, what, self._run(what, start, out, src))

    def send(self, x: torch.Tensor, dst: int, *, tag: str = "") -> None:
        """Send ``x`` to member ``dst``; returns when ``x`` may be changed again."""
        self.isend(x, dst, tag=tag).wait()

    def recv(
        self,
        out: torch.Tensor | None = None,
        src: int = 0,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        tag: str = "",
    ) -> torch.Tensor:
        """`irecv` and wait."""
        return self.irecv(out, src, shape=shape, dtype=dtype, tag=tag).wait()

    def _way(self, peer: int) -> Channels | Group:
        """How messages go to and come from ``peer``: through shared memory inside of a node, else through torch."""
        channels = self._resources.channels
        return channels if channels is not None and channels.reaches(peer) else self._group

    # ---- lifetime ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of connections and memory; not collective, may be called twice and after an error."""
        if self._closed:
            return
        self._closed = True
        failed = self._broken is not None
        for algorithm in self._algorithms.values():
            algorithm.close(failed=failed)
        self._algorithms.clear()
        self._whole = None
        self._resources.close(failed=failed)
        self._group.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what was chosen, what went wrong ---------------------------------------------------------------------

    def choice(self, dtype: torch.dtype, nbytes: int) -> str:
        """Name of the algorithm that serves a message of ``nbytes`` bytes."""
        key = (dtype, nbytes)
        name = self._choices.get(key)
        if name is None:
            name = policy.choose(self.shape, dtype, nbytes, self.algorithm, self._rows(dtype))
            self._choices[key] = name
        return name

    def explain(self, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        """The policy in effect for ``dtype``, a line per row: up to how many bytes, which algorithm, which plan."""
        if self.size == 1:
            return ["one rank: nothing to reduce"]
        link = self._resources.link
        lines = []
        for limit, name in policy.explain(self.shape, dtype, self.algorithm, self._rows(dtype)):
            size = "above" if limit >= 1 << 62 else f"up to {limit} B"
            plan = f" ({link.plan(dtype, min(limit, link.capacity))})" if name == "nvrar" and link is not None else ""
            lines.append(f"{size}: {name}{plan}")
        if self.algorithm == "auto" and self._table is None and self._rows(dtype) is not None:
            lines.append("measured by yalis tune")
        return lines

    def check(self) -> None:
        """Notice a failure without a collective, such as one that a replayed CUDA graph met. Never waits.

        Call it after synchronising with the device and before trusting what came out.

        Raises:
            PeerLostError: a peer is gone or late.
            CommError: another collective failed before.
        """
        if self._broken is None and self._resources.link is not None and not self._closed:
            failed = self._resources.link.failed()
            if failed is not None:
                self._fail(self._begun, failed)
        if self._broken is not None:
            raise self._broken

    # ---- inside -----------------------------------------------------------------------------------------------

    def _rows(self, dtype: torch.dtype) -> policy.Table | None:
        """Rows in place of the default policy: the caller's, else the tuned table's."""
        tuned = self._resources.tuned
        if self._table is not None or tuned is None:
            return self._table
        measured = tuned.policy_rows(dtype)
        return None if measured is None else [*measured, *policy.default_table(self.shape)]

    def _candidates(self) -> tuple[str, ...]:
        names = list(policy.candidates(self.shape, self.algorithm, self._table))
        tuned = self._resources.tuned
        if tuned is not None and self._table is None and self.algorithm == "auto":
            names += [name for name in tuned.names() if policy.why_not(name, self.shape) is None]
        return tuple(dict.fromkeys(names))

    def _register(self) -> None:
        """Make this communicator known to the torch operators, and have its failures noticed."""
        self._token = ops.register(self)
        link = self._resources.link
        if link is not None and self.device.type == "cuda":
            link.watch(lambda failed: self._fail(self._begun, failed))

    def _fail(self, what: str, error: WaitFailed) -> CommError:
        """Turn a failed wait into the error that every later call raises."""
        with self._failing:
            if self._broken is None:
                suspect = self.ranks[error.suspect] if error.suspect is not None else None
                lost = self._guard.explain(what, error, suspect)
                failure = getattr(error, "failure", None)
                if failure is not None:
                    words = str(lost)
                    lost = PeerTimeoutError(
                        words if str(failure) in words else f"{words}; this rank stood in {failure}",
                        rank=lost.rank,
                        host=lost.host,
                        waiting_for=lost.waiting_for,
                        phase=failure.phase,
                        step=failure.step,
                    )
                logger.error("%s", lost)
                self._broken = lost
            return self._broken

    def _run(self, what: str, call: Callable[..., T], *args: Any) -> T:
        """Run one collective under the guard's eyes; what fails inside becomes `PeerLostError`."""
        if self._broken is not None:
            raise self._broken
        if self._closed:
            raise CommError(f"{what}: the communicator is closed")
        self._guard.entered(what)
        self._begun = what
        try:
            if torch.autograd.profiler._is_profiler_enabled:
                with torch.profiler.record_function(what):
                    result = call(*args)
            else:
                result = call(*args)
        except WaitFailed as error:
            raise self._fail(what, error) from error
        except CommError as error:
            # The others wait for a call that this rank did not make: no later call could match.
            self._broken = error
            raise
        self._guard.left()
        return result

    def _check_peer(self, name: str, index: int, other: bool = False) -> None:
        if not 0 <= index < self.size or (other and index == self.rank):
            self_words = " other than this one" if other else ""
            raise CommError(
                f"{name}={index}: must be the index of a member{self_words}, 0 to {self.size - 1} (not a world rank)"
            )


class Handle:
    """A send or receive in flight."""

    __slots__ = ("_comm", "_transfer", "_what")

    def __init__(self, comm: Communicator, what: str, transfer: Transfer | Passage):
        self._comm = comm
        self._what = what
        self._transfer = transfer

    def wait(self) -> torch.Tensor:
        """Wait and return the tensor: sent, so that it may change; or received.

        Raises:
            PeerLostError: the peer is gone or silent past the deadline.
        """
        return self._comm._run(self._what, self._transfer.wait)

    def done(self) -> bool:
        """True when `wait` would return at once."""
        return self._transfer.done()


def _kind(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
