"""Balanced shards: ``count`` elements over ``parts`` owners, the first ``count % parts`` of them one element longer.

The compiled code (``csrc/shm_allreduce.c``) divides in the same way.
"""

from __future__ import annotations


def shard_bounds(count: int, parts: int, index: int) -> tuple[int, int]:
    """First element and end of shard ``index``; empty when ``count`` is too small.

    Shards are contiguous and in order, cover everything once, and differ in length by one at most.
    """
    base, extra = divmod(count, parts)
    start = base * index + min(index, extra)
    return start, start + base + (index < extra)
