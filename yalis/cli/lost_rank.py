"""Says who was lost before the engine is taken down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lost_rank_is_told() -> Iterator[None]:
    """Turn `PeerLostError` into its words on stderr and exit code 70, inside ``with LLM(...)``.

    Taking the engine down takes a while and gives SIGTERM its ordinary meaning back; a launcher that ends the survivors
    of a lost rank would cut the words short if they came only then.
    """
    from yalis.comm.liveness import EXIT_PEER_LOST, last_words
    from yalis.errors import PeerLostError

    try:
        yield
    except PeerLostError as error:
        last_words(f"yalis: error: {error}")
        raise SystemExit(EXIT_PEER_LOST) from None
