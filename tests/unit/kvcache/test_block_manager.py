"""Block pool and block manager: ownership, prefix reuse, recycling order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from yalis.kvcache.block_manager import BlockManager, BlockTable
from yalis.kvcache.block_pool import ROOT_HASH, BlockPool, hash_block


def test_allocate_takes_what_it_says_or_nothing():
    pool = BlockPool(4)
    taken = pool.allocate(3)
    assert len(set(taken)) == 3 and pool.num_free == 1
    with pytest.raises(ValueError, match="asked for 2 KV blocks, 1 are free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_release_more_often_than_taken_is_refused():
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.release([block])
    with pytest.raises(ValueError, match="released more often"):
        pool.release([block])


def test_hash_depends_on_everything_before():
    first = hash_block(ROOT_HASH, [1, 2])
    assert hash_block(first, [3, 4]) != hash_block(ROOT_HASH, [3, 4])
    assert hash_block(ROOT_HASH, [1, 2]) == first
    assert hash_block(ROOT_HASH, [1, 3]) != first


def manager(num_blocks: int = 8, *, caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks, 4, enable_prefix_caching=caching)


def filled(m: BlockManager, tokens: list[int]) -> BlockTable:
    table = BlockTable()
    assert m.reuse_prefix(table, tokens, len(tokens)) is not None
    assert m.grow(table, len(tokens))
    m.publish(table, tokens, len(tokens))
    return table


def test_prefix_is_shared_while_its_owner_lives_and_after():
    m = manager()
    prompt = list(range(10))
    first = filled(m, prompt)
    second = BlockTable()
    assert m.reuse_prefix(second, prompt, 10) == 8
    assert second.blocks == first.blocks[:2]
    m.release(first)
    m.release(second)
    third = BlockTable()
    assert m.reuse_prefix(third, [*prompt[:8], 99], 10) == 8
    assert third.blocks == first.blocks or len(third.blocks) == 2


def test_last_token_is_always_left_to_compute():
    m = manager()
    prompt = list(range(8))  # exactly two full blocks
    m.release(filled(m, prompt))
    table = BlockTable()
    assert m.reuse_prefix(table, prompt, 8) == 4


def test_different_prefix_is_not_reused():
    m = manager()
    m.release(filled(m, list(range(10))))
    table = BlockTable()
    assert m.reuse_prefix(table, [7, *range(1, 10)], 10) == 0


def test_no_reuse_when_switched_off():
    m = manager(caching=False)
    m.release(filled(m, list(range(10))))
    table = BlockTable()
    assert m.reuse_prefix(table, list(range(10)), 10) == 0


def test_reuse_that_leaves_no_room_changes_nothing():
    m = manager(num_blocks=3)
    held = filled(m, list(range(100, 104)))  # one block stays taken
    prompt = list(range(8))
    m.release(filled(m, prompt))  # two free blocks, both remembered
    free = m.pool.num_free
    table = BlockTable()
    # one block revived, 8 further tokens need two more: three in all, two are free
    assert m.reuse_prefix(table, [*prompt, *range(50, 58)], 8) is None
    assert table.blocks == [] and m.pool.num_free == free
    m.release(held)


def test_recycling_takes_the_longest_free_block_and_a_prefixs_tail_first():
    m = manager(num_blocks=3)
    prompt = list(range(12))
    table = filled(m, prompt)
    head = table.blocks[:2]
    m.release(table)
    filled(m, list(range(50, 54)))  # recycles one block
    assert m.pool.lookup(table.hashes) == head


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_blocks_cover_tokens_exactly(tokens: list[int], block_size: int):
    m = BlockManager(64, block_size)
    table = BlockTable()
    assert m.reuse_prefix(table, tokens, len(tokens)) == 0
    assert m.grow(table, len(tokens))
    assert (len(table.blocks) - 1) * block_size < len(tokens) <= len(table.blocks) * block_size


class PoolMachine(RuleBasedStateMachine):
    """Random sequences over a small pool: nobody's private block is handed to somebody else, nothing leaks."""

    def __init__(self):
        super().__init__()
        self.m = BlockManager(12, 2)
        self.live: list[tuple[BlockTable, list[int]]] = []
        # What was last written to each block, by the tokens up to and including it.
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def start(self, tokens):
        table = BlockTable()
        covered = self.m.reuse_prefix(table, tokens, len(tokens))
        if covered is None:
            assert table.blocks == []
            return
        for i, block in enumerate(table.blocks):
            assert self.content[block] == tuple(tokens[: 2 * i + 2]), "reused a block that holds something else"
        assert self.m.grow(table, len(tokens)), "reuse_prefix promised room"
        for i, block in enumerate(table.blocks):
            self.content[block] = tuple(tokens[: 2 * i + 2])
        self.m.publish(table, tokens, len(tokens))
        self.live.append((table, list(tokens)))

    @rule(index=st.integers(0, 50), token=st.integers(0, 1))
    def extend(self, index, token):
        if not self.live:
            return
        table, tokens = self.live[index % len(self.live)]
        if self.m.grow(table, len(tokens) + 1):
            tokens.append(token)
            self.content[table.blocks[-1]] = tuple(tokens)
            self.m.publish(table, tokens, len(tokens))

    @rule(index=st.integers(0, 50))
    def stop(self, index):
        if self.live:
            table, _ = self.live.pop(index % len(self.live))
            self.m.release(table)

    @invariant()
    def contents_are_intact(self):
        for table, tokens in self.live:
            for i, block in enumerate(table.blocks):
                want = tuple(tokens[: 2 * i + 2])
                assert self.content[block][: len(want)] == want

    @invariant()
    def nothing_leaks(self):
        held = {block for table, _ in self.live for block in table.blocks}
        assert self.m.pool.num_free == 12 - len(held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
