"""The scheduler against a stand-in model: every mode must produce the same tokens and give every block back."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yalis.engine.request import FinishReason, Sequence
from yalis.engine.sampling_params import SamplingParams
from yalis.engine.scheduler import ScheduledStep, Scheduler
from yalis.kvcache.block_manager import BlockManager

EOS = 7


def next_token(tokens: list[int]) -> int:
    """The stand-in model: any function of all tokens so far."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 1) % 10_007
    return value % 50


def sequence(seq_id: int, prompt: list[int], max_tokens: int = 5, **params) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=0,
        max_tokens=max_tokens,
    )


def scheduler(num_blocks: int = 64, **options) -> Scheduler:
    defaults = dict(
        max_num_seqs=8,
        max_num_batched_tokens=16,
        enable_chunked_prefill=True,
        eos_token_ids=[EOS],
        max_model_len=1000,
    )
    caching = options.pop("caching", True)
    return Scheduler(BlockManager(num_blocks, 4, enable_prefix_caching=caching), **(defaults | options))


class Driver:
    """Runs a scheduler the way `EngineCore` does, with a fake device that remembers what it wrote to the pages."""

    def __init__(self, s: Scheduler, depth: int):
        self.s = s
        self.depth = depth
        self.inflight: deque[tuple[ScheduledStep, list[int]]] = deque()
        self.pages: dict[tuple[int, int], int] = {}
        self.last: dict[int, int] = {}
        self.steps: list[ScheduledStep] = []

    def step(self) -> None:
        step = self.s.schedule()
        self.check(step)
        if step.items:
            self.steps.append(step)
            self.inflight.append((step, self.run(step)))
        if self.inflight and not (step.items and len(self.inflight) < self.depth):
            done, tokens = self.inflight.popleft()
            self.s.update(done, tokens)

    def check(self, step: ScheduledStep) -> None:
        assert sum(i.num_tokens for i in step.items) == step.num_tokens <= self.s.max_num_batched_tokens
        assert len({i.seq.seq_id for i in step.items}) == len(step.items)
        assert len({i.seq.slot for i in step.items}) == len(step.items)
        for item in step.items:
            assert len(item.seq.table.blocks) * 4 >= item.start + item.num_tokens

    def run(self, step: ScheduledStep) -> list[int]:
        """Write each token to its page slot, then read the whole sequence back from the pages to sample."""
        sampled = []
        for item in step.items:
            seq = item.seq
            for p in range(item.start, item.start + item.num_tokens):
                token = seq.token_ids[p] if p < len(seq.token_ids) else self.last[seq.slot]
                self.pages[seq.table.blocks[p // 4], p % 4] = token
        for item in step.items:
            if item.samples:
                seq = item.seq
                seen = [self.pages[seq.table.blocks[p // 4], p % 4] for p in range(item.sample_position)]
                self.last[seq.slot] = next_token(seen)
                sampled.append(self.last[seq.slot])
        return sampled

    def finish(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.s.has_work and not self.inflight:
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")


def expected(prompt: list[int], max_tokens: int, ignore_eos: bool) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


MODES = [
    dict(depth=1),
    dict(depth=2, overlap=True),
    dict(depth=2, num_stages=2),
    dict(depth=3, num_stages=3),
    dict(depth=1, caching=False),
    dict(depth=1, enable_chunked_prefill=False, max_num_batched_tokens=64),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_mode_generates_the_same_tokens_and_leaks_nothing(mode, data):
    options = dict(mode)
    depth = options.pop("depth")
    num_blocks = data.draw(st.integers(16, 40), label="blocks")
    s = scheduler(num_blocks, max_num_seqs=data.draw(st.integers(1, 6), label="seqs"), **options)
    driver = Driver(s, depth)
    shared = data.draw(st.lists(st.integers(0, 3), max_size=12))
    seqs = []
    for i in range(data.draw(st.integers(1, 8), label="requests")):
        prompt = [*shared, *data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=24))]
        seq = sequence(i, prompt, data.draw(st.integers(1, 16)), ignore_eos=data.draw(st.booleans()))
        seqs.append(seq)
        s.add(seq)
        for _ in range(data.draw(st.integers(0, 3))):
            driver.step()
    driver.finish()
    for seq in seqs:
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        assert seq.token_ids[len(prompt) :] == expected(prompt, seq.max_tokens, seq.params.ignore_eos)
        assert seq.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert s.blocks.pool.num_free == num_blocks
    assert len(s._free_slots) == s.max_num_seqs


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_aborts_at_any_time_leak_nothing_and_disturb_nobody(data):
    mode = dict(data.draw(st.sampled_from(MODES)))
    depth = mode.pop("depth")
    s = scheduler(24, max_num_seqs=4, **mode)
    driver = Driver(s, depth)
    seqs = [sequence(i, [i, *range(i % 5)], 12, ignore_eos=True) for i in range(6)]
    for seq in seqs:
        s.add(seq)
    doomed = data.draw(st.sets(st.integers(0, 5), max_size=4))
    for seq_id in sorted(doomed):
        for _ in range(data.draw(st.integers(0, 4))):
            driver.step()
        s.finish(seq_id, FinishReason.ABORT)
    driver.finish()
    for seq in seqs:
        want = expected(seq.token_ids[: seq.num_prompt_tokens], 12, True)
        got = seq.token_ids[seq.num_prompt_tokens :]
        assert got == (want[: len(got)] if seq.seq_id in doomed else want)
    assert s.blocks.pool.num_free == 24


def test_preemption_recomputes_and_still_finishes():
    s = scheduler(num_blocks=10, max_num_seqs=4, caching=False)
    driver = Driver(s, 1)
    seqs = [sequence(i, [i, 1, 2, 3], 20, ignore_eos=True) for i in range(4)]
    for seq in seqs:
        s.add(seq)
    driver.finish()
    assert s.num_preemptions > 0
    for seq in seqs:
        assert seq.token_ids[4:] == expected([seq.seq_id, 1, 2, 3], 20, True)


def test_nobody_is_admitted_while_a_running_sequence_waits_for_blocks():
    s = scheduler(num_blocks=6, overlap=True, caching=False)
    s.add(sequence(0, [1], 9, ignore_eos=True))
    s.add(sequence(1, [2] * 23, 1, ignore_eos=True))
    first = s.schedule()
    assert [(i.seq.seq_id, i.num_tokens) for i in first.items] == [(0, 1), (1, 15)]
    s.add(sequence(2, [3], 1, ignore_eos=True))
    # The rest of the prompt needs two blocks, one is free, and whoever could give way is in flight.
    second = s.schedule()
    assert [i.seq.seq_id for i in second.items] == [0] and s.num_preemptions == 0
    assert s.blocks.pool.num_free == 1
    s.update(first, [5])
    s.update(second, [6])
    # Now the youngest gives way: itself. It waits in front, and nobody overtakes it in the same step.
    assert [i.seq.seq_id for i in s.schedule().items] == [0]
    assert [seq.seq_id for seq in s.waiting] == [1, 2]


def test_long_prompt_is_chunked_beside_decodes():
    s = scheduler(max_num_batched_tokens=16)
    driver = Driver(s, 1)
    s.add(sequence(0, [1, 2, 3], 30, ignore_eos=True))
    driver.step()
    s.add(sequence(1, list(range(40)), 3, ignore_eos=True))
    driver.step()
    sizes = [(i.seq.seq_id, i.num_tokens) for i in driver.steps[-1].items]
    assert sizes == [(0, 1), (1, 15)]


def test_without_chunking_a_prompt_waits_for_room():
    s = scheduler(max_num_batched_tokens=16, enable_chunked_prefill=False)
    driver = Driver(s, 1)
    s.add(sequence(0, [1] * 10, 4, ignore_eos=True))
    s.add(sequence(1, [2] * 10, 4, ignore_eos=True))
    driver.step()
    assert [(i.seq.seq_id, i.num_tokens) for i in driver.steps[-1].items] == [(0, 10)]
    driver.step()
    assert [(i.seq.seq_id, i.num_tokens) for i in driver.steps[-1].items] == [(0, 1), (1, 10)]


def test_pipeline_spreads_sequences_over_steps_in_flight():
    s = scheduler(num_stages=2, max_num_batched_tokens=64)
    driver = Driver(s, 2)
    for i in range(4):
        s.add(sequence(i, [i, 1, 2], 8, ignore_eos=True))
    for _ in range(6):
        driver.step()
    members = [frozenset(i.seq.seq_id for i in step.items) for step in driver.steps[2:]]
    assert all(len(m) == 2 for m in members)
    assert all(a.isdisjoint(b) for a, b in itertools.pairwise(members))


def test_min_tokens_and_stop_tokens():
    s = scheduler(eos_token_ids=[])
    prompt = [3, 1, 4]
    outputs = expected(prompt, 12, True)
    stop = outputs[2]
    seq = sequence(0, prompt, 12, stop_token_ids=[stop])
    s.add(seq)
    Driver(s, 1).finish()
    assert seq.token_ids[3:] == outputs[: outputs.index(stop) + 1]
    assert (seq.finish_reason, seq.stop_reason) == (FinishReason.STOP, stop)
    late = sequence(1, prompt, 12, stop_token_ids=[stop], min_tokens=12)
    s.add(late)
    Driver(s, 1).finish()
    assert late.token_ids[3:] == outputs


def test_context_limit_ends_with_length():
    s = scheduler(max_model_len=6)
    seq = sequence(0, [1, 2, 3], 100, ignore_eos=True)
    s.add(seq)
    Driver(s, 1).finish()
    assert len(seq.token_ids) == 6 and seq.finish_reason is FinishReason.LENGTH


def test_prompt_logprobs_keeps_the_prompt_out_of_prefix_reuse():
    s = scheduler()
    driver = Driver(s, 1)
    s.add(sequence(0, list(range(12)), 2, ignore_eos=True))
    driver.finish()
    seq = sequence(1, list(range(12)), 2, ignore_eos=True, prompt_logprobs=0)
    s.add(seq)
    driver.finish()
    assert seq.num_cached_tokens == 0
    again = sequence(2, list(range(12)), 2, ignore_eos=True)
    s.add(again)
    driver.finish()
    assert again.num_cached_tokens == 8
