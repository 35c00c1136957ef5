"""The seam between the communicator and whoever watches over the ranks.

The communicator tells its guard what it waits for; when a wait fails, the guard finds out who is to blame. The watch
itself (heartbeats, verdicts) lives in `yalis.comm.liveness`; `NullGuard` knows only what the communicator saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from yalis.errors import PeerLostError


class Guard(Protocol):
    """Watches one rank. `entered` and `left` sit on the hot path: they must only store a reference."""

    def entered(self, what: str) -> None:
        """This rank begins to wait for ``what``, such as ``"L3.mlp.down/allreduce[shm,8192B]"``."""

    def left(self) -> None:
        """The wait ended well."""

    def abort_flag_address(self) -> int:
        """Address of an int32 that turns nonzero when a verdict is out, polled by spinning C code; 0: there is none.

        The memory must outlive every communicator built with this guard.
        """

    def explain(self, what: str, cause: BaseException | None, suspect: int | None) -> PeerLostError:
        """Build the error of a failed wait, after giving a verdict a moment to arrive.

        Args:
            what: what was waited for.
            cause: the transport's own exception, if there was one.
            suspect: world rank that the transport blames, if it can tell.
        """


class NullGuard:
    """A guard without a watch: the error names the peer that the transport itself saw missing.

    Args:
        hosts: host name by world rank, for messages.
    """

    def __init__(self, hosts: Mapping[int, str] | None = None) -> None:
        self._hosts = dict(hosts or {})

    def entered(self, what: str) -> None:
        """Nothing to record."""

    def left(self) -> None:
        """Nothing to record."""

    def abort_flag_address(self) -> int:
        """There is no flag."""
        return 0

    def explain(self, what: str, cause: BaseException | None, suspect: int | None) -> PeerLostError:
        """See `Guard.explain`."""
        host = self._hosts.get(suspect) if suspect is not None else None
        who = "a peer" if suspect is None else f"rank {suspect}" + (f" on host {host}" if host else "")
        words = f": {str(cause).splitlines()[0]}" if cause is not None and str(cause) else ""
        return PeerLostError(
            f"lost {who} while waiting for {what}{words}; look for the first error in that rank's output",
            rank=suspect,
            host=host,
            waiting_for=what,
        )
