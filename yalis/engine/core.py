"""The step loop that every rank runs: the same commands in, the same decisions, the same tokens out.

Up to ``depth`` steps are in flight: one per pipeline stage, or two when scheduling runs one step ahead. `step` starts
at most one step and finishes at most one.
"""

from __future__ import annotations

import dataclasses
import operator
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from yalis.engine.messages import StepCommand, StepTimes
from yalis.engine.profiler import StepProfiler
from yalis.engine.request import FinishReason, Sequence
from yalis.engine.runner import PendingStep, Runner, StepCounts, StepResult
from yalis.engine.scheduler import ScheduledStep, Scheduler, SequenceUpdate
from yalis.kvcache.block_manager import BlockManager

_STEPS_KEPT = 4096


@dataclass(frozen=True)
class FinishedStep:
    """A step whose tokens are known.

    Attributes:
        step: what was scheduled.
        updates: what it did to the sequences that were still alive.
        result: tokens and, on rank 0, log-probabilities.
        started_s: monotonic time at which the step was scheduled.
    """

    step: ScheduledStep
    updates: list[SequenceUpdate]
    result: StepResult
    started_s: float


class EngineCore:
    """Scheduler and runner of one rank.

    Args:
        runner: holds the model and its KV pages, already loaded.
        max_model_len: most tokens in a sequence, KV capacity taken into account.

    Attributes:
        profiler: writes traces of this rank's steps.
        step_tokens: tokens of the latest steps, oldest first; whoever reports them takes them out.
    """

    def __init__(self, runner: Runner, *, max_model_len: int):
        user = runner.resolved.user
        self.runner = runner
        self.blocks = BlockManager(
            runner.num_kv_blocks, user.block_size, enable_prefix_caching=user.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=user.max_num_seqs,
            max_num_batched_tokens=user.max_num_batched_tokens,
            enable_chunked_prefill=user.enable_chunked_prefill,
            eos_token_ids=runner.resolved.eos_token_ids,
            max_model_len=max_model_len,
            num_stages=user.pipeline_parallel_size,
            overlap=runner.resolved.overlap_scheduling,
        )
        self._depth = 2 if runner.resolved.overlap_scheduling else user.pipeline_parallel_size
        self._inflight: deque[PendingStep] = deque()
        self._times = _Clock(runner)
        self.profiler = StepProfiler(runner.tp.call_times)
        self.step_tokens: deque[int] = deque(maxlen=_STEPS_KEPT)

    @property
    def has_work(self) -> bool:
        """Whether another `step` would do anything."""
        return self.scheduler.has_work or bool(self._inflight)

    def apply(self, command: StepCommand) -> None:
        """Take in what rank 0 says is new. Every rank calls this with the same command before the same `step`."""
        if command.profile is not None:
            self.profiler.obey(command.profile)
        for new in command.new:
            params = new.params
            for seq_id, seed in zip(new.seq_ids, new.seeds, strict=True):
                self.scheduler.add(
                    Sequence(
                        seq_id=seq_id,
                        token_ids=list(new.token_ids),
                        num_prompt_tokens=len(new.token_ids),
                        params=params,
                        seed=seed,
                        max_tokens=new.max_tokens,
                    )
                )
                if params.prompt_logprobs is not None:  # the prompt is scored once
                    params = dataclasses.replace(params, prompt_logprobs=None)
        for end in command.ended:
            self.scheduler.finish(end.seq_id, FinishReason(end.reason), end.stop_reason)

    def step(self) -> FinishedStep | None:
        """Start the next step if there is one; finish the oldest if the pipeline is full or nothing started."""
        clock = self._times
        clock.start()
        step = self.scheduler.schedule()
        if step.items:
            self.step_tokens.append(step.num_tokens)
            self._inflight.append(self.runner.execute(step))
        if not self._inflight or (step.items and len(self._inflight) < self._depth):
            clock.stop(None, more=True)
            return None
        pending = self._inflight.popleft()
        result = self.runner.collect(pending)
        updates = self.scheduler.update(pending.step, result.token_ids)
        more = self.has_work
        if not more:
            self.runner.rest()
        clock.stop(pending.step, more=more)
        self.profiler.stepped()
        return FinishedStep(pending.step, updates, result, pending.started_s)

    def step_times(self, *, reset: bool = False) -> tuple[StepTimes, StepTimes]:
        """Time split of the steps since the last reset, on this rank: of all, and of those that only decoded."""
        times = self._times.times(), self._times.decode_times()
        if reset:
            self._times.reset()
        return times


class _Clock:
    """Where the time of the steps went on this host: of all of them, and of those that only decoded.

    Args:
        runner: whose shares, and whose communicator's, are told apart.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._steps = 0
        self._total_s = 0.0
        self._front_s = 0.0
        self._started = 0.0
        self._left: float | None = None
        self._waited = (0.0, 0.0)
        self._decode_steps = 0
        self._decode = self._mark = self._shares()

    def start(self) -> None:
        self._started = time.perf_counter()
        if self._left is not None:
            self._front_s += self._started - self._left

    def stop(self, finished: ScheduledStep | None, *, more: bool) -> None:
        """``finished``: the step that has ended, if any; ``more``: another follows."""
        now = time.perf_counter()
        self._total_s += now - self._started
        self._left = now if more else None
        if finished is None:
            return
        self._steps += 1
        shares = self._shares()
        if all(item.start >= item.seq.num_prompt_tokens for item in finished.items):
            self._decode_steps += 1
            self._decode = self._decode.plus(shares.minus(self._mark))
        self._mark = shares

    def times(self) -> StepTimes:
        """Of all steps since the last reset."""
        return self._shares().times(self._steps, self._runner.counts)

    def decode_times(self) -> StepTimes:
        """Of those that only decoded; how many of each kind there were is not told apart."""
        return self._decode.times(self._decode_steps, StepCounts())

    def reset(self) -> None:
        runner = self._runner
        self._steps, self._total_s, self._front_s = 0, 0.0, 0.0
        self._waited = (runner.tp.waited_s or 0.0, runner.tp.waited_between_nodes_s)
        runner.reset_times()
        runner.tp.stats.reset()
        self._decode_steps = 0
        self._decode = self._mark = self._shares()

    def _shares(self) -> _Shares:
        runner, stats = self._runner, self._runner.tp.stats
        # On a GPU the communicator sees launches only: its time is within the forward passes'.
        on_host = runner.device.type != "cuda"
        return _Shares(
            self._total_s,
            self._front_s,
            runner.forward_s,
            runner.pipeline_s,
            runner.device_idle_s,
            runner.decode_s,
            stats.intra.seconds if on_host else 0.0,
            stats.inter.seconds if on_host else 0.0,
            stats.flat.seconds if on_host else 0.0,
            (runner.tp.waited_s or 0.0) - self._waited[0],
            runner.tp.waited_between_nodes_s - self._waited[1],
        )


class _Shares(NamedTuple):
    """Seconds, as they are measured: ``forward_s`` holds the collectives inside, and those hold the waits."""

    total_s: float
    front_s: float
    forward_s: float
    pipeline_s: float
    device_idle_s: float
    decode_s: float
    intra_s: float
    inter_s: float
    flat_s: float
    wait_intra_s: float
    wait_inter_s: float

    def plus(self, other: _Shares) -> _Shares:
        return _Shares(*map(operator.add, self, other))

    def minus(self, other: _Shares) -> _Shares:
        return _Shares(*map(operator.sub, self, other))

    def times(self, steps: int, counts: StepCounts) -> StepTimes:
        return StepTimes(
            steps=steps,
            total_s=self.total_s,
            compute_s=max(0.0, self.forward_s - self.intra_s - self.inter_s - self.flat_s),
            intra_s=self.intra_s,
            inter_s=self.inter_s,
            flat_s=self.flat_s,
            pipeline_s=self.pipeline_s,
            host_s=max(0.0, self.total_s - self.forward_s - self.pipeline_s),
            device_idle_s=self.device_idle_s,
            decode_s=self.decode_s,
            decode_steps=counts.decode,
            padded_steps=counts.padded,
            other_steps=counts.other,
            sampled_apart=counts.sampled_apart,
            wait_intra_s=self.wait_intra_s,
            wait_inter_s=self.wait_inter_s,
            front_s=self.front_s,
        )
