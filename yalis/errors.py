"""Exception types of yalis. Each message says who, what, where, and what to do about it."""

from __future__ import annotations


class YalisError(Exception):
    """Base of every error that yalis raises on purpose."""


class ConfigError(YalisError, ValueError):
    """A configuration value is impossible: names the value, the limit and the remedy."""


class CheckpointError(YalisError):
    """A checkpoint folder, tensor name, shape or file is not what the model needs."""


class RequestError(YalisError, ValueError):
    """One request cannot be served (too long, bad sampling values). Other requests are unaffected."""


class TopologyError(YalisError, ValueError):
    """Ranks, nodes and the launch environment do not fit together."""


class CommError(YalisError, RuntimeError):
    """A collective failed for a reason other than a lost peer."""


class PeerLostError(CommError):
    """A peer died or stayed silent past the deadline.

    Attributes:
        rank: world rank of the lost peer, or None when it cannot be told.
        host: host name of that peer, or None.
        waiting_for: what this rank waited for, such as ``"L3.mlp.down/allreduce[shm,8192B]"``.
    """

    def __init__(self, message: str, *, rank: int | None = None, host: str | None = None, waiting_for: str = ""):
        super().__init__(message)
        self.rank = rank
        self.host = host
        self.waiting_for = waiting_for


class PeerTimeoutError(PeerLostError):
    """A wait inside the fused all-reduce ended by its deadline, by a verdict, or because a peer's process ended.

    Attributes:
        phase: where in the protocol, such as ``"between nodes"`` (docs/nvrar.md).
        step: of the exchange between nodes; -1 where there are no steps.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        host: str | None = None,
        waiting_for: str = "",
        phase: str = "",
        step: int = -1,
    ):
        super().__init__(message, rank=rank, host=host, waiting_for=waiting_for)
        self.phase = phase
        self.step = step


class EngineDeadError(YalisError, RuntimeError):
    """The engine's ranks are gone; carries the verdict that they printed."""


class BuildError(YalisError, RuntimeError):
    """A native source could not be compiled: carries the command and the compiler's words."""
