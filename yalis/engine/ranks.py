"""Joins this process to the others: world, watch over the ranks, side channel, and the parallel groups.

Rank layout: tensor-parallel neighbours first, so that a TP group stays inside a node as long as it fits. Rank
``stage * tp_size + tp_rank``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from yalis.comm.communicator import Communicator, init_distributed
from yalis.comm.control import ChannelClosedError, ControlChannel
from yalis.comm.liveness import LivenessMonitor
from yalis.comm.topology import Topology, from_environment
from yalis.config import EngineConfig
from yalis.engine.messages import StepCommand
from yalis.errors import ConfigError

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(StepCommand)


class RankContext:
    """This rank among the others. Build with `join`; `close` ends it for good.

    Attributes:
        topology: this rank's place.
        tp: the ranks that share this stage's layers.
        pp: the ranks with the same place in every stage, by stage.
        pp_back: the same ranks, for what travels from the last stage to the others. On GPUs a group of its own: NCCL
            runs the transfers of a pair of ranks one after the other, and hidden states on their way forward would wait
            for tokens on their way back, and these for them.
        monitor: the watch over the ranks; None in a world of one.
    """

    def __init__(
        self,
        topology: Topology,
        tp: Communicator,
        pp: Communicator,
        *,
        pp_back: Communicator | None = None,
        monitor: LivenessMonitor | None = None,
        control: ControlChannel | None = None,
        world: Communicator | None = None,
    ):
        self.topology = topology
        self.tp = tp
        self.pp = pp
        self.pp_back = pp_back or pp
        self.monitor = monitor
        self._control = control
        self._world = world
        self._steps = 0
        self._closed = False

    @classmethod
    def join(cls, config: EngineConfig, topology: Topology, device: torch.device) -> RankContext:
        """Meet the other ranks of the launch; collective.

        Args:
            config: parallel sizes, all-reduce algorithm, deadline.
            topology: this rank's place (`rank_topology`).
            device: where this rank computes.

        Raises:
            PeerLostError, CommError: a rank did not come.
        """
        if topology.world_size == 1:
            return cls(
                topology,
                Communicator.create(topology, [0], device=device, algorithm=config.all_reduce),
                Communicator.create(topology, [0], device=device),
            )
        timeout_s = config.distributed_timeout_s
        init_distributed(topology, timeout_s=timeout_s)
        store = dist.distributed_c10d._get_default_store()
        monitor = LivenessMonitor.connect(topology, store, timeout_s=timeout_s)
        try:
            control = ControlChannel.connect(topology, store, timeout_s=timeout_s, guard=monitor)
            tp_size = config.tensor_parallel_size
            stage, tp_rank = divmod(topology.rank, tp_size)
            tp = Communicator.create(
                topology,
                range(stage * tp_size, (stage + 1) * tp_size),
                device=device,
                algorithm=config.all_reduce,
                timeout_s=timeout_s,
                guard=monitor,
                store=store,
            )
            stages = range(tp_rank, topology.world_size, tp_size)
            means: dict[str, Any] = {"device": device, "timeout_s": timeout_s, "guard": monitor, "store": store}
            pp = Communicator.create(topology, stages, **means)
            apart = device.type == "cuda" and config.pipeline_parallel_size > 1
            pp_back = Communicator.create(topology, stages, **means) if apart else pp
            world = Communicator.create(
                topology, range(topology.world_size), timeout_s=timeout_s, guard=monitor, store=store
            )
        except BaseException as error:
            monitor.failed(error)
            raise
        return cls(
            topology,
            tp,
            pp,
            pp_back=pp_back,
            monitor=monitor,
            control=control,
            world=world,
        )

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which hears the outside world."""
        return self.topology.rank == 0

    @property
    def num_steps(self) -> int:
        """Commands sent or received so far: the number of the present step."""
        return self._steps

    def check(self) -> None:
        """Notice the loss of a rank while nothing is being waited for.

        Raises:
            PeerLostError: a verdict is out.
        """
        if self.monitor is not None and self.monitor.verdict is not None:
            raise self.monitor.explain("idle", None, None)

    def assemble(self, tag: str) -> None:
        """Return when every rank has come here, however long the slowest works. A lost rank ends the wait in time.

        Args:
            tag: what the ranks come from, for messages.

        Raises:
            PeerLostError: a rank was lost.
        """
        if self._control is not None:
            self._control.assemble(tag)

    def agree_min(self, value: int) -> int:
        """The least of every rank's ``value``; waits and raises as `assemble`."""
        self.assemble("agreement")
        return self._world.agree_min(value, tag="startup") if self._world is not None else value

    def meet(self, tag: str) -> None:
        """Return when every rank has come here, within the deadline."""
        if self._world is not None:
            self._world.barrier(tag=tag)

    def send_command(self, command: StepCommand) -> None:
        """Rank 0: tell the other ranks what is new; their next `receive_command` returns it."""
        self._count_step()
        if self._control is not None:
            self._control.broadcast(_ENCODER.encode(command))

    def receive_command(self) -> StepCommand:
        """Other ranks: the next command; ``shutdown`` when rank 0 ended the run."""
        assert self._control is not None, "a world of one has nobody to hear from"
        try:
            command = _DECODER.decode(self._control.recv())
        except ChannelClosedError:
            return StepCommand(shutdown=True)
        self._count_step()
        return command

    def close(self) -> None:
        """Part in good order: others do not take this for a loss. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._control is not None:
            self._control.close()
        if self.monitor is not None:
            self.monitor.close()
        for group in (self._world, self.pp_back, self.pp, self.tp):
            if group is not None:
                group.close()
        if self.topology.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _count_step(self) -> None:
        self._steps += 1
        if self.monitor is not None:
            self.monitor.set_step(self._steps)


def rank_topology(config: EngineConfig, env: Mapping[str, str]) -> Topology:
    """This rank's place, checked against TP x PP.

    Raises:
        ConfigError: the launch has another number of ranks.
    """
    topology = from_environment(env, ranks_per_node=config.ranks_per_node if config.world_size > 1 else None)
    if topology.world_size != config.world_size:
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} x pipeline_parallel_size="
            f"{config.pipeline_parallel_size} needs {config.world_size} ranks, but {topology.world_size} were "
            "launched; change one of them (torchrun --nproc-per-node, srun --ntasks)"
        )
    return topology
