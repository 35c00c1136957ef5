"""A pool of KV blocks with reference counts and a prefix index.

A block is *free* when nobody references it. A free block keeps its content and its hash until it is handed out again,
so a prefix can be revived for as long as its blocks have not been recycled; recycling takes the block that has been
free for longest.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BlockHash = bytes

ROOT_HASH: BlockHash = b"\0" * 16


def hash_block(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Hash of a full block: its tokens and, through ``parent``, everything before them.

    A cryptographic hash, because a collision would silently attend to another prompt's keys.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Hands out block ids ``0 .. num_blocks - 1``.

    Invariant: a block is in ``_free`` exactly if its reference count is 0.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(num_blocks))
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody references."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks, least recently used first; forgets what they held.

        Raises:
            ValueError: fewer than ``count`` are free; nothing is taken. Ask `num_free` first.
        """
        if count > len(self._free):
            raise ValueError(f"asked for {count} KV blocks, {len(self._free)} are free")
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block; the last block first, so that a prefix is recycled from its tail."""
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise ValueError(f"KV block {block} is released more often than it was taken")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None

    def lookup(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks that hold the longest known prefix of ``hashes``; takes no reference."""
        found = []
        for h in hashes:
            block = self._by_hash.get(h)
            if block is None:
                break
            found.append(block)
        return found

    def num_revived(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` are free, that is how far `acquire` would lower `num_free`."""
        return sum(self._refs[b] == 0 for b in blocks)

    def acquire(self, blocks: Sequence[int]) -> None:
        """Take one more reference of each block (from `lookup`)."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Make a full block that holds ``block_hash`` findable. The first holder of a hash stays the one found."""
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._hash_of[block] = block_hash

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hash_of[block] = None
