"""Block tables of sequences: growth, prefix reuse, release. Sits between the scheduler and the `BlockPool`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from yalis.kvcache.block_pool import ROOT_HASH, BlockHash, BlockPool, hash_block


@dataclass(slots=True)
class BlockTable:
    """KV blocks of one sequence, in order.

    Attributes:
        blocks: block ids; block ``i`` holds tokens ``i * block_size ..``.
        hashes: chain hashes of the sequence's full blocks whose tokens are known, grown on demand.
        num_published: leading blocks that are findable by others.
    """

    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    num_published: int = 0


class BlockManager:
    """Grows and releases `BlockTable`s over one pool.

    Args:
        num_blocks: size of the pool.
        block_size: tokens per block.
        enable_prefix_caching: if off, nothing is ever published or found.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True):
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def capacity_tokens(self) -> int:
        """Most tokens that one sequence can hold."""
        return self.pool.num_blocks * self.block_size

    @property
    def usage(self) -> float:
        """Share of blocks that somebody references, 0 to 1."""
        return 1.0 - self.pool.num_free / self.pool.num_blocks

    def reuse_prefix(self, table: BlockTable, tokens: Sequence[int], num_new: int) -> int | None:
        """Start an empty ``table`` on cached blocks of ``tokens`` if room for ``num_new`` tokens in all remains.

        At least the last token is left to compute, because its logits are wanted.

        Args:
            table: an empty table.
            tokens: the known tokens of the sequence.
            num_new: tokens to compute in the coming step, at most; the part beyond the reused prefix is *not*
                allocated here.

        Returns:
            tokens covered by the reused blocks, or None (nothing changed) if the pool cannot also hold
            ``num_new`` further tokens.
        """
        assert not table.blocks, "a prefix is reused before anything else is allocated"
        found: list[int] = []
        if self.enable_prefix_caching:
            self._extend_hashes(table, tokens)
            reusable = (len(tokens) - 1) // self.block_size
            found = self.pool.lookup(table.hashes[:reusable])
        covered = len(found) * self.block_size
        remaining = min(num_new, len(tokens) - covered)
        if self._blocks_for(covered + remaining) - len(found) > self.pool.num_free - self.pool.num_revived(found):
            return None
        if self.enable_prefix_caching:
            self.prefix_queries += len(tokens)
            self.prefix_hits += covered
        self.pool.acquire(found)
        table.blocks.extend(found)
        table.num_published = len(found)
        return covered

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make ``table`` cover ``num_tokens`` tokens; False (nothing changed) if too few blocks are free."""
        missing = self._blocks_for(num_tokens) - len(table.blocks)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            table.blocks.extend(self.pool.allocate(missing))
        return True

    def publish(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Make the full blocks among the first ``num_computed`` tokens findable; their K and V must be on their way."""
        if not self.enable_prefix_caching:
            return
        num_full = min(num_computed, len(tokens)) // self.block_size
        if num_full <= table.num_published:
            return
        self._extend_hashes(table, tokens, num_full)
        for i in range(table.num_published, num_full):
            self.pool.publish(table.blocks[i], table.hashes[i])
        table.num_published = num_full

    def release(self, table: BlockTable) -> None:
        """Give all blocks back; what was published stays findable until recycled."""
        self.pool.release(table.blocks)
        table.blocks.clear()
        table.num_published = 0

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _extend_hashes(self, table: BlockTable, tokens: Sequence[int], num_full: int | None = None) -> None:
        size = self.block_size
        for i in range(len(table.hashes), len(tokens) // size if num_full is None else num_full):
            parent = table.hashes[-1] if table.hashes else ROOT_HASH
            table.hashes.append(hash_block(parent, tokens[i * size : (i + 1) * size]))
