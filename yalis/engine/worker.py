"""Entry point of a rank whose client is another process: ``python -m yalis.engine.worker CONFIG ENDPOINT [serve]``.

With ``serve`` the client is a server, and SIGTERM leaves the ranks alone: launchers and service managers send it to
every process, and the server, which drains first, ends the ranks itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys

from yalis.comm.liveness import EXIT_PEER_LOST, last_words
from yalis.comm.topology import from_environment
from yalis.config import EngineConfig
from yalis.engine.handle import LocalEngine, follow
from yalis.engine.messages import EngineFailed
from yalis.engine.service import ClientLink, serve
from yalis.engine.start import StartedRank, start_rank
from yalis.engine.status import Pulse, StatusSender
from yalis.errors import PeerLostError, YalisError
from yalis.launch import leave_words
from yalis.utils.logging import setup_logging


def main(argv: list[str]) -> int:
    """Be one rank until the client ends the run; the exit code says whether that went well."""
    setup_logging()
    config = EngineConfig.from_mapping(json.loads(argv[0]))
    return run_rank(config, argv[1], serving=argv[2:] == ["serve"])


def run_rank(config: EngineConfig, endpoint: str, *, serving: bool) -> int:
    """Be the rank that the launch environment says, until the client ends the run; the exit code.

    Args:
        endpoint: of the client; only rank 0 connects to it.
        serving: the client is a server.
    """
    # A broken configuration or launch must reach the client, so the link comes first.
    link = ClientLink(endpoint) if _is_root() else None
    try:
        rank = start_rank(config)
        gc.collect()
        gc.freeze()  # what a start leaves lives on: a collection that walked it would hold up a step by tens of ms
        if serving:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with rank.ranks.monitor or contextlib.nullcontext():
            _run(rank, link, endpoint)
            rank.close()
    except PeerLostError as error:
        if link is not None:
            link.send(EngineFailed(str(error)))
        last_words(f"yalis: {error}")
        return EXIT_PEER_LOST
    except YalisError as error:
        if link is not None:
            link.send(EngineFailed(str(error)))
        leave_words(str(error))  # and not on stderr: every rank says the same, and the client says it once
        return 1
    finally:
        if link is not None:
            link.close()
    return 0


def _run(rank: StartedRank, link: ClientLink | None, endpoint: str) -> None:
    if link is None:
        follow(rank)
        return
    engine, pulse = LocalEngine(rank), Pulse()
    sender = StatusSender(engine, pulse, endpoint)
    try:
        serve(engine, link, pulse)
    finally:
        sender.close()


def _is_root() -> bool:
    return from_environment(os.environ, ranks_per_node=1).rank == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
