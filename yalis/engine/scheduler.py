"""Continuous batching: which tokens of which sequences the next step computes. Pure host logic, the same on all ranks.

A step is a set of token ranges. There is no prefill phase and decode phase: a sequence has tokens that are not yet
computed, and a step computes some of them; when a step reaches a sequence's last token, it samples the next one.

Several steps may be in flight (pipeline stages, or scheduling one step ahead). A sequence takes part in a later step as
soon as the tokens to compute are known, so chunks of one prompt follow each other through a pipeline, and a decode
waits for its token unless ``overlap`` allows the token to be fed on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from yalis.engine.request import GUIDE_FAILED, FinishReason, Sequence
from yalis.kvcache.block_manager import BlockManager


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens ``start .. start + num_tokens`` of ``seq`` in one step.

    Attributes:
        samples: the range reaches the last token, so the step samples the next one.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def sample_position(self) -> int:
        """Position of the sampled token: the number of tokens before it."""
        return self.start + self.num_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether some row of the range predicts a prompt token whose log-probability was asked for."""
        return self.seq.params.prompt_logprobs is not None and self.start < self.seq.num_prompt_tokens - 1


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One step: sequences in batch order, and the sum of their token counts."""

    items: list[ScheduledSequence]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What a finished step did to one sequence: the token it got, if any, and whether it ended."""

    seq: Sequence
    item: ScheduledSequence
    token_id: int | None


class Scheduler:
    """Forms steps from waiting and running sequences.

    Args:
        blocks: KV block manager.
        max_num_seqs: most sequences that hold KV blocks at once; also the number of slots.
        max_num_batched_tokens: most tokens in one step.
        enable_chunked_prefill: if off, the uncomputed part of a waiting sequence enters whole or not at all.
        eos_token_ids: tokens that end a sequence unless ``ignore_eos``.
        max_model_len: most tokens in a sequence.
        num_stages: pipeline stages; running sequences are spread over so many steps in flight.
        overlap: feed sampled tokens on the device, so that a sequence may be in two consecutive steps.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_chunked_prefill: bool,
        eos_token_ids: Iterable[int],
        max_model_len: int,
        num_stages: int = 1,
        overlap: bool = False,
    ):
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = max_model_len
        self.num_stages = num_stages
        self.overlap = overlap
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._by_id: dict[int, Sequence] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence still waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence, first come, first served."""
        self._by_id[seq.seq_id] = seq
        self.waiting.append(seq)

    def finish(self, seq_id: int, reason: FinishReason, stop_reason: int | str | None = None) -> Sequence | None:
        """End a sequence from outside (abort, stop string). Unknown or ended ids are ignored: they lost a race."""
        seq = self._by_id.get(seq_id)
        if seq is None:
            return None
        seq.stop_reason = stop_reason
        self._end(seq, reason)
        return seq

    def schedule(self) -> ScheduledStep:
        """Choose the next step's tokens and reserve their KV blocks. May be empty."""
        budget = self.max_num_batched_tokens
        items: list[ScheduledSequence] = []
        # With S stages, S steps are in flight: an even share per step keeps every stage busy.
        share = -(-(len(self.running) + min(len(self.waiting), self._room())) // self.num_stages)
        scarce = False
        for seq in list(self.running):
            if budget == 0 or len(items) >= share:
                break
            if seq.slot < 0:
                continue  # preempted earlier in this very loop
            count = min(self._num_computable(seq), budget)
            if count <= 0:
                continue
            while not self.blocks.grow(seq.table, seq.num_computed_tokens + count):
                scarce = True
                victim = self._preempt_youngest()
                if victim is None or victim is seq:
                    count = 0
                    break
            if count > 0:
                items.append(self._take(seq, count))
                budget -= count
        # Nobody new where a running sequence found no block: what is free, given up just now or too little, is for
        # those that run, and a preempted sequence, which waits in front, would take back what it gave up.
        while not scarce and self.waiting and budget > 0 and self._room() > 0 and len(items) < share:
            seq = self.waiting[0]
            admitted = self._admit(seq, budget)
            if admitted == 0:
                break
            self.waiting.popleft()
            self.running.append(seq)
            seq.slot = self._free_slots.pop()
            items.append(self._take(seq, admitted))
            budget -= admitted
        return ScheduledStep(items, self.max_num_batched_tokens - budget)

    def update(self, step: ScheduledStep, token_ids: Seq[int]) -> list[SequenceUpdate]:
        """Take in the sampled tokens of a step, oldest step first.

        Args:
            token_ids: one per item with ``samples``, in order.

        Returns:
            one entry per item whose sequence was still alive.
        """
        updates = []
        sampled = iter(token_ids)
        for item in step.items:
            seq = item.seq
            token = next(sampled) if item.samples else None
            seq.num_inflight -= 1
            if token is not None:
                seq.num_pending_tokens -= 1
            if seq.finished:
                self._release_if_idle(seq)
                continue
            self.blocks.publish(seq.table, seq.token_ids, item.start + item.num_tokens)
            if token == GUIDE_FAILED:
                token = None
                seq.stop_reason = "the grammar of guided decoding became too complex"
                self._end(seq, FinishReason.ERROR)
            elif token is not None:
                seq.token_ids.append(token)
                self._check_stop(seq, token)
            updates.append(SequenceUpdate(seq, item, token))
        return updates

    def _room(self) -> int:
        return len(self._free_slots)

    def _num_computable(self, seq: Sequence) -> int:
        """Tokens of a running sequence that a step could compute now; pending ones count only when overlapping."""
        # A grammar says what may follow only when the host knows the token before.
        if not self.overlap or seq.params.guided is not None:
            return len(seq.token_ids) - seq.num_computed_tokens
        if seq.num_tokens - seq.num_prompt_tokens >= seq.max_tokens:
            return 0  # pending tokens already fill the output
        return seq.num_tokens - seq.num_computed_tokens

    def _take(self, seq: Sequence, count: int) -> ScheduledSequence:
        start = seq.num_computed_tokens
        samples = start + count == seq.num_tokens
        seq.num_computed_tokens += count
        seq.num_inflight += 1
        if samples:
            seq.num_pending_tokens += 1
        return ScheduledSequence(seq, start, count, samples)

    def _admit(self, seq: Sequence, budget: int) -> int:
        """Reserve blocks for a waiting sequence's first range; the number of its tokens, 0 if it must wait."""
        tokens = seq.token_ids
        if not self.enable_chunked_prefill and seq.num_tokens > budget and budget < self.max_num_batched_tokens:
            return 0
        reusable = tokens if seq.params.prompt_logprobs is None else []
        covered = self.blocks.reuse_prefix(seq.table, reusable, budget) if reusable else 0
        if covered is None:
            return 0
        count = min(len(tokens) - covered, budget)
        if not self.blocks.grow(seq.table, covered + count):
            return 0
        seq.num_computed_tokens = covered
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = covered
        return count

    def _preempt_youngest(self) -> Sequence | None:
        """Take the KV blocks of the youngest running sequence that no step in flight uses; it recomputes later."""
        for seq in reversed(self.running):
            if seq.num_inflight == 0:
                self.running.remove(seq)
                self._release(seq)
                seq.num_computed_tokens = 0
                seq.num_preemptions += 1
                self.num_preemptions += 1
                self.waiting.appendleft(seq)
                return seq
        return None

    def _check_stop(self, seq: Sequence, token: int) -> None:
        params = seq.params
        if seq.num_output_tokens >= params.min_tokens:
            if token in params.stop_token_ids:
                seq.stop_reason = token
                self._end(seq, FinishReason.STOP)
                return
            if token in self.eos_token_ids and not params.ignore_eos:
                self._end(seq, FinishReason.STOP)
                return
        if seq.num_output_tokens >= seq.max_tokens or len(seq.token_ids) >= self.max_model_len:
            self._end(seq, FinishReason.LENGTH)

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        """Mark as ended. Blocks are given back when no step in flight writes to them any more."""
        seq.finish_reason = reason
        self._by_id.pop(seq.seq_id, None)
        if seq.slot < 0:
            self.waiting.remove(seq)
        else:
            self.running.remove(seq)
            self._release_if_idle(seq)

    def _release_if_idle(self, seq: Sequence) -> None:
        if seq.num_inflight == 0 and seq.slot >= 0:
            self._release(seq)

    def _release(self, seq: Sequence) -> None:
        self.blocks.release(seq.table)
        self._free_slots.append(seq.slot)
        seq.slot = -1
