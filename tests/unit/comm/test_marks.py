"""Which messages tell of a meeting, without processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yalis.comm.marks import find_marks

SHORT, LONG, HUGE = 8, 9, 17
LIMITS = (8, 16)


def messages(*pairs: tuple[int, int]) -> list[tuple[torch.Tensor, int]]:
    """One tensor a pair of bytes and member."""
    return [(torch.empty(nbytes, dtype=torch.uint8), peer) for nbytes, peer in pairs]


@pytest.mark.parametrize(
    ("sends", "recvs", "leaving", "coming"),
    [
        ([(SHORT, 2)], [(SHORT, 2)], {2: False}, {}),
        ([(LONG, 0)], [(LONG, 0)], {0: False}, {}),
        ([(HUGE, 2)], [(HUGE, 2)], {2: True}, {}),  # the lower member's
        ([(HUGE, 0)], [(HUGE, 0)], {}, {0: True}),
        ([(LONG, 0)], [(HUGE, 0)], {}, {0: True}),
        ([(HUGE, 0)], [(SHORT, 0)], {}, {0: False}),
        ([(SHORT, 0)], [(HUGE, 0)], {0: False}, {}),
        ([(LONG, 0)], [], {0: True}, {}),
        ([], [(LONG, 0)], {}, {0: True}),
        ([], [(SHORT, 0)], {}, {0: False}),
        ([(LONG, 2), (SHORT, 2)], [], {2: True}, {}),  # the first of several
        ([(LONG, 2)], [(LONG, 0)], {2: True}, {0: True}),  # a ring
    ],
)
def test_the_mark_of_a_pair(
    sends: list[tuple[int, int]], recvs: list[tuple[int, int]], leaving: dict[int, bool], coming: dict[int, bool]
) -> None:
    assert find_marks(1, messages(*sends), messages(*recvs), *LIMITS) == (leaving, coming)


SOME = st.lists(st.sampled_from([1, SHORT, LONG, HUGE]), max_size=3)


@given(SOME, SOME)
def test_both_ends_find_the_same_message_ahead(there: list[int], back: list[int]) -> None:
    if not there and not back:
        return
    leaving, coming = find_marks(0, messages(*((n, 1) for n in there)), messages(*((n, 1) for n in back)), *LIMITS)
    ends = find_marks(1, messages(*((n, 0) for n in back)), messages(*((n, 0) for n in there)), *LIMITS)
    assert len(leaving) + len(coming) == 1
    assert (leaving.get(1, False), coming.get(1, False)) == (ends[1].get(0, False), ends[0].get(0, False))
    first = [sizes[0] for sizes in (there, back) if sizes]
    serves = min(first) <= LIMITS[0] or (len(first) == 2 and max(first) <= LIMITS[1])
    assert (leaving.get(1, False) or coming.get(1, False)) != serves
