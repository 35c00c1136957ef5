"""Which messages of an exchange between CPU ranks tell that both ends have come.

What tells it must go through at once: a long message takes long however early the partner was. gloo sends once the
receiver has asked, so a mark that is gone tells its sender that the receiver has come, and one that is heard tells its
receiver of the sender. The mark of a pair is its first message where that is short, whichever way it goes. One that
leaves may be longer where the kernel takes it whole: it is gone then but for a copy. Else a message of some bytes goes
ahead of one of the two; one is enough for both ends. To gloo every message is three writes and the waking of threads on
both sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# What goes through at once.
SHORT_BYTES = 64 << 10
# What the buffers of a connection within one host take at once (Linux lets them grow to 4 MiB and counts overhead).
BUFFERED_BYTES = 512 << 10


def find_marks(
    index: int,
    sends: Sequence[tuple[torch.Tensor, int]],
    recvs: Sequence[tuple[torch.Tensor, int]],
    short_bytes: int,
    buffered_bytes: int,
) -> tuple[dict[int, bool], dict[int, bool]]:
    """The members whose mark is (ahead of) the first message to them, and those whose mark is (ahead of) the first from
    them.

    Args:
        index: this rank's member.
        sends, recvs: what goes to and comes from whom, none of it empty; the other end names the same messages.
        short_bytes, buffered_bytes: longest message that is its own mark, and longest where both ends send; the same on
            both sides.

    Returns:
        Two mappings from member to whether the mark is a message of its own; a member is in one of them. Both ends find
        the same where it is one. Of two messages that serve each end takes the one that it sends.
    """
    out: dict[int, int] = {}
    into: dict[int, int] = {}
    for t, peer in sends:
        out.setdefault(peer, t.nbytes)
    for t, peer in recvs:
        into.setdefault(peer, t.nbytes)
    leaving: dict[int, bool] = {}
    coming: dict[int, bool] = {}
    for peer, sent in out.items():
        received = into.pop(peer, 0)
        if sent <= short_bytes or (received and max(sent, received) <= buffered_bytes):
            leaving[peer] = False
        elif 0 < received <= short_bytes:
            coming[peer] = False
        elif received and peer < index:
            coming[peer] = True
        else:
            leaving[peer] = True
    for peer, received in into.items():
        coming[peer] = received > short_bytes
    return leaving, coming
