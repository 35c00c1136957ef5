"""Ranks in processes of their own, seen from the process that drives them: where they connect, and how they ended."""

from __future__ import annotations

import dataclasses
import json
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import zmq

from yalis.comm.liveness import EXIT_PEER_LOST
from yalis.config import EngineConfig
from yalis.errors import ConfigError
from yalis.launch import Nodes, Ranks, adopt_rank, is_stopped, launch_ranks

SHUTDOWN_S = 20.0
"""Longest wait for ranks that end by themselves, in seconds."""
# How often stopped ranks are looked for meanwhile.
_STOPPED_S = 0.25


class EngineProcesses:
    """The ranks' processes. Bind first, then `launch`.

    Attributes:
        endpoint: ZeroMQ address, in a folder that nobody else can enter.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="yalis-")  # mode 0700: nobody else reaches the socket
        self.endpoint = f"ipc://{Path(self._folder.name) / 'engine'}"
        self._ranks: Ranks | None = None

    def bind(self, link: zmq.Socket[Any], endpoint: str | None = None) -> None:
        """Listen on ``endpoint`` (default the attribute).

        Raises:
            ConfigError: it cannot be listened on.
        """
        endpoint = endpoint or self.endpoint
        try:
            link.bind(endpoint)
        except zmq.ZMQError as error:  # a path of more than 107 characters, a full disk
            raise ConfigError(f"cannot listen on {endpoint}: {error}; set TMPDIR to another, shorter folder") from error

    def launch(
        self, config: EngineConfig, *, serving: bool = False, nodes: Nodes | None = None, join: bool = False
    ) -> None:
        """Start the ranks.

        Args:
            config: of the engine.
            serving: see `yalis.engine.worker`.
            nodes: this node's share of a launch over several nodes; default all ranks are here.
            join: this process was started by a launcher as rank 0; start only that rank, as its child.
        """
        args = rank_command(config, self.endpoint, serving=serving)
        if join:
            self._ranks = adopt_rank(args)
        else:
            # A failure becomes an exception of the client, so nothing else reports it.
            self._ranks = launch_ranks(config.world_size, args, report=False, nodes=nodes)

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        assert self._ranks is not None, "launch() comes first"
        return self._ranks

    def obituary(self, message: str) -> str:
        """How the ranks ended, in one line; waits for their end, at most `SHUTDOWN_S`.

        Args:
            message: what rank 0 said, empty if it said nothing.
        """
        ranks = self.ranks
        deadline = time.monotonic() + SHUTDOWN_S
        while ranks.poll() is None and time.monotonic() < deadline:
            ranks.wait(0.5)
        failures = list(ranks.failures.values())
        # If rank 0 could say nothing, the verdict of a survivor tells more than how each process ended.
        # Its code is another where its interpreter took too long to end.
        verdicts = [f.message for f in failures if f.exitcode == EXIT_PEER_LOST or "was lost" in f.message]
        words = message or next(filter(None, verdicts), "") or "; ".join(map(str, failures)) or "the ranks ended"
        # Before the ranks have met, rank 0 only knows that somebody did not come.
        return "; ".join([words, *(str(f) for f in failures if f.stopped and str(f) not in words)])

    def wait_for_end(self) -> str | None:
        """Give ranks that were told to end their time, at most `SHUTDOWN_S`; `close` ends the others.

        Returns:
            which rank was found stopped, as it will never end by itself; else None.
        """
        deadline = time.monotonic() + SHUTDOWN_S
        while self.ranks.wait(_STOPPED_S) is None and time.monotonic() < deadline:
            for rank, pid in self.ranks.pids.items():
                if is_stopped(pid):
                    return f"rank {rank} on {socket.gethostname()} (pid {pid}) was lost: it is stopped"
        return None

    def close(self) -> None:
        """End what still runs. Idempotent."""
        if self._ranks is not None:
            self._ranks.terminate()
        self._folder.cleanup()


def rank_command(config: EngineConfig, endpoint: str, *, serving: bool) -> list[str]:
    """Module and arguments of a rank."""
    command = ["yalis.engine.worker", json.dumps(dataclasses.asdict(config)), endpoint]
    return [*command, "serve"] if serving else command
