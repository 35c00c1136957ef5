"""Runs steps on this rank's part of the model: batch tensors, forward pass, sampling, transfers between stages."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from yalis.attention.base import LayerKV
from yalis.attention.null import NullBackend
from yalis.attention.registry import create_backend
from yalis.comm.communicator import Communicator, Handle
from yalis.engine import sampler
from yalis.engine.batch import ForwardBatch, prepare_batch
from yalis.engine.cuda_graphs import GraphLimits
from yalis.engine.decode_steps import DecodeSteps, batch_sizes
from yalis.engine.device_clock import DeviceClock, DeviceStep, StepInterval
from yalis.engine.fixed_steps import FixedSteps, held_nbytes
from yalis.engine.guided import Guides
from yalis.engine.plain_draw import PlainDraw, draw_plain, is_plain
from yalis.engine.prefill_steps import PaddedSize, PrefillSteps
from yalis.engine.resolve import ResolvedConfig, kv_block_bytes, num_kv_blocks
from yalis.engine.results import PromptScores, ResultLayout, Sampled, pack, packed_size, to_host, unpack
from yalis.engine.sampler import PenaltyState, SamplerOutput, VocabShard
from yalis.engine.scheduler import ScheduledSequence, ScheduledStep
from yalis.engine.trial import imaginary_steps
from yalis.errors import EngineDeadError
from yalis.kernels import ops
from yalis.models.base import CausalLM, ModelContext, attention_spec
from yalis.models.registry import build_model
from yalis.utils import packing
from yalis.utils.logging import get_logger, log_once
from yalis.utils.spans import span
from yalis.weights.loader import LoadReceipt, init_dummy, load_weights

logger = get_logger(__name__)
_cuda: Any = torch.cuda  # its type information lacks the arguments

# Logits of a scored prompt that exist at a time: 32 MiB of float32.
_LOGITS_PIECE = 2**23
# Weights of a model for which measuring pays: smaller ones are bound by launches.
_WORTH_TUNING_BYTES = 512 * 2**20
# Longest wait for a step on the device, in seconds, unless ranks are given longer.
_STEP_DEADLINE_S = 60.0
# Longest wait for what is still on the device when the engine is closed, in seconds.
_DRAIN_S = 5.0


@dataclass
class StepCounts:
    """Steps by kind: ``decode`` steps of fixed size and ``padded`` ones with prompts (CUDA graphs where captured), all
    ``other`` ones, and how many of the first were sampled outside of the graph because a request asks for more than
    temperature and seed."""

    decode: int = 0
    padded: int = 0
    other: int = 0
    sampled_apart: int = 0


@dataclass
class PendingStep:
    """A step in flight on this rank.

    Attributes:
        step: what was scheduled.
        results: what it yields.
        started_s: monotonic time at which the step was taken up.
        sampled: its tokens on the last stage, on their way to the host; on the others they are received by
            `Runner.collect`.
        sends: transfers that must end before their tensors may go.
        device_step: its begin and end on a GPU.
        is_decode: it is a decode step of fixed size.
    """

    step: ScheduledStep
    results: ResultLayout
    started_s: float
    sampled: Sampled | None = None
    sends: list[Handle] = field(default_factory=list)
    device_step: DeviceStep | None = None
    is_decode: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step sampled, on the host.

    Attributes:
        token_ids: one per scheduled range that samples, in step order.
        sampled: the same with log-probabilities where asked for; complete on the first and the last stage only.
    """

    token_ids: list[int]
    sampled: Sampled


class Runner:
    """One rank's model, KV pages and sampler.

    Args:
        resolved: the resolved configuration.
        tp: communicator of the ranks that share this stage's layers.
        pp: communicator of the ranks with the same place in every stage, by stage.
        pp_back: the same ranks, for tokens on their way from the last stage to the others.
        check_ranks: raises once a rank of the world is known to be lost; never waits.

    Attributes:
        forward_s: seconds spent in forward passes and sampling, collectives included, since it was last set to 0; on a
            GPU by the device's clock, and with the transfers between stages in it, which graphs hold.
        pipeline_s: seconds spent in transfers between stages, likewise; on a GPU only the host's share, which is small.
        device_idle_s: seconds that the GPU stood still between a step and the next although there was one, likewise.
        decode_s: the part of ``forward_s`` that went into decode steps of fixed size.
        counts: kinds of steps, by name, likewise.
        fixed: steps of fixed sizes, to be prepared after `allocate_kv`; other steps are made anew.
    """

    def __init__(
        self,
        resolved: ResolvedConfig,
        tp: Communicator,
        pp: Communicator,
        pp_back: Communicator,
        check_ranks: Callable[[], None],
    ):
        self.resolved = resolved
        self._check_ranks = check_ranks
        self.tp = tp
        self.pp = pp
        self.pp_back = pp_back
        # Tokens arrive on a stream of their own: on the main one they would wait for the forward pass of the next step.
        self._arrivals = _cuda.Stream(resolved.device) if resolved.device.type == "cuda" and pp.size > 1 else None
        self.device = resolved.device
        self.is_first_stage = pp.rank == 0
        self.is_last_stage = pp.rank == pp.size - 1
        self.forward_s = 0.0
        self.pipeline_s = 0.0
        self.device_idle_s = 0.0
        self.decode_s = 0.0
        self.counts = StepCounts()
        self._released = False
        self._clock = DeviceClock(self.device) if self.device.type == "cuda" else None
        self.kv: list[LayerKV] = []  # one list for good: `fixed` holds it, too
        self.num_kv_blocks = 0
        model = resolved.model
        spec = attention_spec(
            model, tp, block_size=resolved.user.block_size, dtype=resolved.dtype, device=resolved.device
        )
        self.num_kv_heads = spec.num_kv_heads
        self.attention = (
            NullBackend(spec)
            if resolved.user.compute == "null"
            else create_backend(resolved.user.attention_backend, spec)
        )
        self.model: CausalLM = build_model(
            model,
            ModelContext(
                tp=tp,
                stage=pp.rank,
                num_stages=pp.size,
                dtype=resolved.dtype,
                device=resolved.device,
                attention=self.attention,
                max_model_len=resolved.max_model_len,
            ),
        )
        self.vocab = VocabShard(self.model.vocab_start, self.model.vocab_shard_size, model.vocab_size)
        self.penalties = PenaltyState(resolved.user.max_num_seqs, self.vocab, self.device)
        self.guides = Guides(resolved.tokenizer_path, model.vocab_size, resolved.eos_token_ids)
        # Token last sampled in each slot, kept on the device: one-step-ahead scheduling feeds from here. The slot after
        # the last takes the tokens of padding.
        self.last_tokens = torch.zeros(resolved.user.max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self.fixed = FixedSteps(resolved, self.model, self.attention, tp, pp, self.kv, self.last_tokens)

    def load(self, on_progress: Callable[[int, int], None] | None = None) -> LoadReceipt | None:
        """Read this rank's slices of the checkpoint, or make dummy weights.

        Args:
            on_progress: called with (bytes read so far, bytes to read).
        """
        user = self.resolved.user
        receipt = None
        if user.load_format == "dummy":
            init_dummy(self.model, user.seed)
        else:
            receipt = load_weights(self.model, self.resolved.model_path, on_progress=on_progress)
        for use in self.model.products():
            use.packed.skipped = user.compute == "null"
        return receipt

    def tune_products(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Choose by measurement who computes the matrix products of decode steps on a GPU; kept for the next start.

        Args:
            on_progress: called with (products done, products to measure).
        """
        products = list(self.model.products())
        if self.resolved.user.compute == "null":
            return
        nbytes = sum(use.packed.nbytes for use in products)
        if nbytes < _WORTH_TUNING_BYTES:
            logger.info("products of few rows are not measured: the model has only %d MiB", nbytes >> 20)
            return
        ops.tune_products(products, batch_sizes(self.resolved.user.max_num_seqs), on_progress)

    def allocate_kv(self, agree_min: Callable[[int], int], graphs: GraphLimits) -> int:
        """Make the KV pages; every rank ends up with the same number of blocks.

        Args:
            agree_min: least value over all ranks.
            graphs: what will be captured, for which memory is left.

        Returns:
            number of blocks.
        """
        num_layers = len(self.model.layers_of_stage)
        block_bytes = kv_block_bytes(self.resolved, self.num_kv_heads, num_layers)
        activation_bytes = graph_bytes = 0
        if self.device.type == "cuda":
            activation_bytes = self._measure_activations(graphs)
            graph_bytes = held_nbytes(self.resolved, self.model, graphs, last_stage=self.is_last_stage)
        self.num_kv_blocks = agree_min(num_kv_blocks(self.resolved, block_bytes, activation_bytes, graph_bytes))
        self.kv[:] = self._make_pages(self.num_kv_blocks)
        logger.info(
            "KV cache: %d blocks of %d tokens, %.1f GiB; steps take up to %.2f GiB more, CUDA graphs %.2f",
            self.num_kv_blocks,
            self.resolved.user.block_size,
            self.num_kv_blocks * block_bytes / 2**30,
            activation_bytes / 2**30,
            graph_bytes / 2**30,
        )
        return self.num_kv_blocks

    def _make_pages(self, num_blocks: int) -> list[LayerKV]:
        shape = (num_blocks, self.num_kv_heads, self.resolved.user.block_size, self.resolved.model.head_dim)
        # Zeros, not empty: masked lanes of a page's unwritten rows are multiplied by 0, and NaN times 0 is NaN.
        return [
            LayerKV(
                torch.zeros(shape, dtype=self.resolved.dtype, device=self.device),
                torch.zeros(shape, dtype=self.resolved.dtype, device=self.device),
            )
            for _ in self.model.layers_of_stage
        ]

    @torch.inference_mode()
    def _measure_activations(self, graphs: GraphLimits) -> int:
        """Bytes of GPU memory that the largest steps take besides weights and pages; collective over the stage.

        Runs a prefill of as many tokens as a step may hold, one of as many as graphs will hold, and a decode of as many
        sequences as may run, the latter also with every row under filters, penalties and log-probabilities, over a few
        pages that are dropped again. The decode counts twice, or beside the padded prefill if that is more: what runs
        inside of graphs has memory of its own. The counts of tokens for penalties, which the first such request makes
        for good, come on top. Not in it: the graphs (`held_nbytes`), and what penalties of very long sequences take for
        a moment.
        """
        user, block_size = self.resolved.user, self.resolved.user.block_size
        steps = imaginary_steps(
            user.max_num_batched_tokens,
            graphs.prefill_tokens,
            self.resolved.max_model_len,
            user.max_num_seqs,
            block_size,
        )
        self.kv[:] = self._make_pages(max(1 + max(i.seq.table.blocks[-1] for i in step.items) for step in steps))
        peaks = []
        for step in steps:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._run_imaginary(step)
            torch.cuda.synchronize(self.device)
            peaks.append(torch.cuda.max_memory_allocated(self.device) - before)
        self.kv.clear()
        penalties = self.penalties.most_bytes(self.resolved.max_model_len) if self.is_last_stage else 0
        self.penalties = PenaltyState(user.max_num_seqs, self.vocab, self.device)
        torch.cuda.empty_cache()
        prefill, padded, decode, apart = peaks
        return max(prefill, apart) + decode + max(decode, padded) + penalties

    def _run_imaginary(self, step: ScheduledStep) -> None:
        batch = prepare_batch(
            step, block_size=self.resolved.user.block_size, send=self._send_apart, last_tokens=self.last_tokens
        )
        hidden_in = None
        if not self.is_first_stage:
            shape = (step.num_tokens, self.resolved.model.hidden_size)
            hidden_in = torch.zeros(shape, dtype=self.resolved.dtype, device=self.device)
        token_ids = batch.token_ids if self.is_first_stage else None
        plan = self.attention.plan(batch.attention)
        rows = batch.sample_rows if batch.only_samples else None
        hidden = self.model.forward(token_ids, batch.positions, hidden_in, self.kv, plan, rows)
        if self.is_last_stage:
            self._sample(batch, hidden, whole=rows is None)

    @torch.inference_mode()
    def execute(self, step: ScheduledStep) -> PendingStep:
        """Start a step: returns once this stage's part is computed or enqueued and handed on."""
        decode, prefill = self.fixed.decode, self.fixed.prefill
        if decode is not None and decode.takes(step):
            return self._execute_decode(decode, step)
        padded = prefill.fitting(step) if prefill is not None else None
        started_s = time.monotonic()
        with span("yalis.prepare"):
            batch = prepare_batch(
                step,
                block_size=self.resolved.user.block_size,
                send=self._send_apart if prefill is None or padded is None else partial(prefill.inputs.send, padded),
                last_tokens=self.last_tokens if self.is_first_stage else None,
            )
        pending = PendingStep(step, ResultLayout(batch.samplers, batch.prompt_rows), started_s)
        if prefill is not None and padded is not None:
            self._execute_padded(prefill, pending, batch, padded)
            return pending
        self.counts.other += 1
        with span("yalis.prepare"):
            plan = self.attention.plan(batch.attention)
        hidden_in = None if self.is_first_stage else self._receive_hidden(step.num_tokens)
        with self._timed_forward(pending), span(f"yalis.forward[{step.num_tokens} tokens]"):
            token_ids = batch.token_ids if self.is_first_stage else None
            rows = batch.sample_rows if batch.only_samples else None
            hidden = self.model.forward(token_ids, batch.positions, hidden_in, self.kv, plan, rows)
            if self.is_last_stage:
                pending.sampled = self._sample(batch, hidden, whole=rows is None)
        if self.is_last_stage:
            self._return_tokens(pending)
        else:
            handle = self._send(self.pp, hidden, self.pp.rank + 1, "stage.hidden")
            if self._clock is None:
                pending.sends.append(handle)
            else:  # the stream waits, not the host: the next message may be a graph's, and must not overtake this one
                self._timed_transfer(handle.wait)
                assert pending.device_step is not None
                self._clock.extend(pending.device_step)
        return pending

    def _send_apart(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return packing.send(arrays, self.device)

    @torch.inference_mode()
    def collect(self, pending: PendingStep) -> StepResult:
        """Wait for a step's tokens.

        Raises:
            PeerLostError: a rank was lost, or a collective of this step failed; its tokens are not handed on.
            EngineDeadError: a GPU did not finish in time, and nobody knows why.
        """
        sampled = pending.sampled
        if sampled is None:
            full, vocab_size = self.is_first_stage, self.vocab.total
            size = packed_size(pending.results, vocab_size, full=full)
            flat = torch.empty(0, dtype=torch.int64)
            if size:  # nothing travels where nothing was sampled
                with torch.cuda.stream(self._arrivals):
                    received = self._timed_transfer(
                        lambda: self.pp_back.recv(
                            src=self.pp.size - 1, shape=(size,), dtype=torch.int64, tag="stage.tokens"
                        )
                    )
                    flat = to_host(received)
                    if self._clock is not None:  # what came is read below, and a copy that waits has no deadline
                        self._clock.drain(self._deadline_s, self._check)
            sampled = unpack(flat, pending.results, vocab_size, full=full)
        for handle in pending.sends:
            self._timed_transfer(handle.wait)
        if pending.device_step is not None and self._clock is not None:
            with span("yalis.wait"):
                self._count(pending, self._clock.wait(pending.device_step, self._deadline_s, self._check))
        # A replayed graph passes nobody on the host that could raise: what went wrong in it shows here or nowhere.
        self._check()
        return StepResult(sampled.output.token_ids.tolist() if sampled.output is not None else [], sampled)

    # ---- steps of fixed sizes ---------------------------------------------------------------------------------

    def _execute_padded(
        self, prefill: PrefillSteps, pending: PendingStep, batch: ForwardBatch, size: PaddedSize
    ) -> None:
        self.counts.padded += 1
        with self._timed_forward(pending), span(f"yalis.forward[{pending.step.num_tokens} of {size.tokens} tokens]"):
            hidden = prefill.run(size, batch.attention)
            if self.is_last_stage:
                assert hidden is not None
                pending.sampled = self._sample(batch, hidden[: len(batch.samplers)], whole=False)
        if self.is_last_stage:
            self._return_tokens(pending)

    def _execute_decode(self, decode: DecodeSteps, step: ScheduledStep) -> PendingStep:
        started_s = time.monotonic()
        self.counts.decode += 1
        count = len(step.items)
        pending = PendingStep(step, ResultLayout(step.items, []), started_s, is_decode=True)
        with span("yalis.prepare"):
            static = decode.prepare(step)
        with self._timed_forward(pending), span(f"yalis.decode[{count} of {static.size}]"):
            output = decode.run(static)
            if self.is_last_stage:
                assert output.token_ids is not None and output.raw_logits is not None
                eos = self.resolved.eos_token_ids
                if all(is_plain(item, self.vocab.total, eos) for item in step.items):
                    found = SamplerOutput(output.token_ids[:count])
                    if self.pp.size > 1:
                        found = SamplerOutput(found.token_ids.clone())  # still travelling when the next replay writes
                    self.penalties.record([item.seq.slot for item in step.items], found.token_ids)
                else:
                    self.counts.sampled_apart += 1
                    log_once(logger, logging.INFO, "sampling that needs more than temperature and seed runs apart")
                    logits = self.model.widen_logits(output.raw_logits[:count])
                    found = self._sample_apart(step.items, static.slots[:count], logits)
                pending.sampled = self._deliver(Sampled(found, []))
        if self.is_last_stage:
            self._return_tokens(pending)
        return pending

    def _draw_plain(self, raw: torch.Tensor, draw: PlainDraw, slots: torch.Tensor) -> torch.Tensor:
        return draw_plain(self.model, raw, draw, slots, self.last_tokens, self.tp)

    def reset_times(self) -> None:
        """Start all sums and counts from zero."""
        self.forward_s = self.pipeline_s = self.device_idle_s = self.decode_s = 0.0
        self.counts = StepCounts()

    def release(self) -> None:
        """Give a GPU's memory back: graphs, pages and weights; the runner is of no use afterwards. Idempotent.

        Waits for the device (`_DRAIN_S` at most): a graph must not go while it runs. What hangs keeps its memory.
        """
        if self._clock is None or self._released:
            return  # the CPU's memory goes with the last reference
        self._released = True
        try:
            self._clock.drain(_DRAIN_S)
        except (EngineDeadError, RuntimeError) as error:  # the second from a device that failed
            logger.warning("the GPU's memory is not given back before the process ends: %s", error)
            return
        self.fixed.release()
        self.kv.clear()
        del self.fixed, self.model, self.attention, self.penalties, self.last_tokens
        gc.unfreeze()  # a worker's start froze them
        gc.collect()  # layers and backend refer to each other
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a device that failed must not keep anybody from closing
            logger.warning("the GPU's memory could not be given back: %s", error)

    def rest(self) -> None:
        """No step follows for now."""
        if self._clock is not None:
            self._clock.rest()

    def _check(self) -> None:
        """Raise what is known to have gone wrong between the ranks. Never waits."""
        self.tp.check()
        self._check_ranks()

    @property
    def _deadline_s(self) -> float:
        return max(_STEP_DEADLINE_S, self.resolved.user.distributed_timeout_s)

    @contextmanager
    def _timed_forward(self, pending: PendingStep) -> Iterator[None]:
        """Time what runs inside: on the CPU by the wall, on a GPU by events that `collect` reads."""
        if self._clock is None:
            started = time.perf_counter()
            yield
            self._count(pending, StepInterval(time.perf_counter() - started, 0.0))
            return
        begin = self._clock.begin()
        yield
        pending.device_step = self._clock.end(begin)

    def _count(self, pending: PendingStep, interval: StepInterval) -> None:
        self.forward_s += interval.busy_s
        self.decode_s += interval.busy_s if pending.is_decode else 0.0
        self.device_idle_s += interval.idle_s

    # ---- sampling ---------------------------------------------------------------------------------------------

    def _sample(self, batch: ForwardBatch, hidden: torch.Tensor, *, whole: bool) -> Sampled:
        """Sample from the final ``hidden`` states, of all rows if ``whole``, else of ``batch.sample_rows``."""
        output = None
        if batch.samplers:
            raw = self.model.raw_logits(hidden[batch.sample_rows] if whole else hidden)
            eos = self.resolved.eos_token_ids
            if self._clock is not None and all(is_plain(item, self.vocab.total, eos) for item in batch.samplers):
                output = SamplerOutput(self._draw_plain(raw, batch.draw, batch.sample_slots))
                self.penalties.record([item.seq.slot for item in batch.samplers], output.token_ids)
            else:
                output = self._sample_apart(batch.samplers, batch.sample_slots, self.model.widen_logits(raw))
        scores = []
        for rows in batch.prompt_rows:
            k = rows.item.seq.params.prompt_logprobs
            assert k is not None
            targets = torch.tensor(rows.targets, dtype=torch.int64, device=self.device)
            scored = hidden[rows.first_row : rows.first_row + len(rows.targets)]
            scores.append(PromptScores(rows, self._score_prompt(scored, targets, k)))
        return self._deliver(Sampled(output, scores))

    def _sample_apart(
        self, items: Sequence[ScheduledSequence], slots: torch.Tensor, logits: torch.Tensor
    ) -> SamplerOutput:
        """Sample ``logits`` [S, Vs] under whatever the rows ask for."""
        params = sampler.build_batch(items, self.penalties, self.resolved.eos_token_ids, self.device, self.guides)
        output = sampler.sample(logits, params, self.vocab, self.tp)
        self.last_tokens.index_copy_(0, slots, output.token_ids)
        self.penalties.record([item.seq.slot for item in items], output.token_ids)
        return output

    def _deliver(self, sampled: Sampled) -> Sampled:
        """Enqueue the copy to the host; with several stages the device's own tensors are sent on first."""
        return sampled if self.pp.size > 1 else sampled.to_host()

    def _score_prompt(self, hidden: torch.Tensor, targets: torch.Tensor, k: int) -> SamplerOutput:
        """Score ``targets`` [R] given ``hidden`` [R, H], a bounded number of logits at a time."""
        size = max(1, _LOGITS_PIECE // self.vocab.size)
        parts = []
        for start in range(0, len(targets), size):
            logits = self.model.logits(hidden[start : start + size])
            parts.append(sampler.prompt_logprobs(logits, targets[start : start + size], k, self.vocab, self.tp))
        return SamplerOutput.concat(parts)

    # ---- transfers between stages -----------------------------------------------------------------------------

    def _receive_hidden(self, rows: int) -> torch.Tensor:
        shape = (rows, self.resolved.model.hidden_size)
        return self._timed_transfer(
            lambda: self.pp.recv(src=self.pp.rank - 1, shape=shape, dtype=self.resolved.dtype, tag="stage.hidden")
        )

    def _return_tokens(self, pending: PendingStep) -> None:
        """Send tokens from the last stage to all others."""
        if self.pp.size == 1:
            return
        assert pending.sampled is not None
        for stage in range(self.pp.size - 1):
            packed = pack(pending.sampled, full=stage == 0)
            if packed.numel():
                pending.sends.append(self._send(self.pp_back, packed, stage, "stage.tokens"))
        pending.sampled = pending.sampled.to_host()
        if self._clock is not None and pending.device_step is not None:
            self._clock.extend(pending.device_step)

    def _timed_transfer(self, transfer: Callable[[], torch.Tensor]) -> torch.Tensor:
        started = time.perf_counter()
        received = transfer()
        self.pipeline_s += time.perf_counter() - started
        return received

    def _send(self, group: Communicator, x: torch.Tensor, dst: int, tag: str) -> Handle:
        started = time.perf_counter()
        handle = group.isend(x, dst, tag=tag)
        self.pipeline_s += time.perf_counter() - started
        return handle
