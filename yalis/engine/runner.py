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

from yalis.attention.base import AttentionPlan, LayerKV
from yalis.attention.null import NullBackend
from yalis.attention.registry import create_backend
from yalis.comm.communicator import Communicator, Handle
from yalis.engine import sampler
from yalis.engine.batch import ForwardBatch, prepare_batch
from yalis.engine.cuda_graphs import CaptureClock, CaptureReceipt, GraphLimits, GraphMemory, graph_nbytes
from yalis.engine.decode_steps import DecodeInputs, DecodeSteps, StaticOutput, StaticStep, batch_sizes
from yalis.engine.device_clock import DeviceClock, DeviceStep, StepInterval
from yalis.engine.guided import Guides
from yalis.engine.plain_draw import PlainDraw, draw_plain, feed_tokens, is_plain
from yalis.engine.prefill_steps import PaddedInputs, PaddedSize, PaddedStep, PrefillSteps, padded_sizes
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
        decode: decode steps of fixed sizes; None where every step is made anew.
        prefill: likewise padded steps with prompts.
        captured: what capturing graphs took; None where there are none.
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
        self.decode: DecodeSteps | None = None
        self.prefill: PrefillSteps | None = None
        self.captured: CaptureReceipt | None = None
        self._hidden_in: dict[int, torch.Tensor] = {}
        self._decode_plans: dict[int, AttentionPlan] = {}
        self._padded_plans: dict[PaddedSize, AttentionPlan] = {}
        self._released = False
        self._clock = DeviceClock(self.device) if self.device.type == "cuda" else None
        self.kv: list[LayerKV] = []
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
        activation_bytes = self._measure_activations(graphs) if self.device.type == "cuda" else 0
        self.num_kv_blocks = agree_min(num_kv_blocks(self.resolved, block_bytes, activation_bytes))
        self.kv = self._make_pages(self.num_kv_blocks)
        logger.info(
            "KV cache: %d blocks of %d tokens, %.1f GiB; steps take up to %.2f GiB more",
            self.num_kv_blocks,
            self.resolved.user.block_size,
            self.num_kv_blocks * block_bytes / 2**30,
            activation_bytes / 2**30,
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
        pages that are dropped again. The decode counts twice, or beside the padded prefill if that is more, because
        graphs keep memory of their own; they themselves and the counts of tokens for penalties, which the first such
        request makes for good, come on top. Not in it is what penalties of very long sequences take for a moment.
        """
        user, block_size = self.resolved.user, self.resolved.user.block_size
        steps = imaginary_steps(
            user.max_num_batched_tokens,
            graphs.prefill_tokens,
            self.resolved.max_model_len,
            user.max_num_seqs,
            block_size,
        )
        self.kv = self._make_pages(max(1 + max(i.seq.table.blocks[-1] for i in step.items) for step in steps))
        peaks = []
        for step in steps:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._run_imaginary(step)
            torch.cuda.synchronize(self.device)
            peaks.append(torch.cuda.max_memory_allocated(self.device) - before)
        self.kv = []
        penalties = self.penalties.most_bytes(self.resolved.max_model_len) if self.is_last_stage else 0
        self.penalties = PenaltyState(user.max_num_seqs, self.vocab, self.device)
        torch.cuda.empty_cache()
        prefill, padded, decode, apart = peaks
        return max(prefill, apart) + decode + max(decode, padded) + self._held_by_graphs(graphs) + penalties

    def _held_by_graphs(self, graphs: GraphLimits) -> int:
        """Bytes of GPU memory that no two graphs share: they themselves, and what each leaves on the last stage."""
        user = self.resolved.user
        decodes = batch_sizes(min(graphs.decode_batch, user.max_num_seqs)) if graphs.decode_batch else ()
        padded = padded_sizes(graphs.prefill_tokens, user.max_num_seqs) if graphs.prefill_tokens else ()
        held = graph_nbytes(len(decodes) + len(padded), len(self.model.layers_of_stage))
        if self.is_last_stage:
            logits, hidden = self.model.vocab_shard_size, self.resolved.model.hidden_size
            values = sum(decodes) * logits + sum(size.sequences for size in padded) * hidden
            held += values * self.resolved.dtype.itemsize
        return held

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

    def prepare_decode(self, largest: int) -> None:
        """Make fixed inputs for decode steps of up to ``largest`` sequences; `allocate_kv` must have been called."""
        user = self.resolved.user
        block_size = user.block_size
        max_blocks = min(-(-self.resolved.max_model_len // block_size), self.num_kv_blocks)
        inputs = DecodeInputs(
            batch_sizes(min(largest, user.max_num_seqs)),
            num_slots=user.max_num_seqs,
            max_blocks=max_blocks,
            block_size=block_size,
            device=self.device,
        )
        hidden_in: dict[int, torch.Tensor] = {}
        if not self.is_first_stage:
            width = self.resolved.model.hidden_size
            for size in inputs.sizes:
                hidden_in[size] = torch.zeros((size, width), dtype=self.resolved.dtype, device=self.device)
        self._hidden_in = hidden_in
        self._decode_plans = {static.size: self.attention.plan_fixed(static.attention) for static in inputs.all()}
        self.decode = DecodeSteps(
            inputs,
            self._decode_body,
            before=lambda static, lengths: self.attention.renew(self._decode_plans[static.size], lengths),
        )

    def prepare_prefill(self, most_tokens: int) -> None:
        """Make fixed inputs for padded steps of up to ``most_tokens`` tokens; `allocate_kv` must have been called."""
        user, resolved = self.resolved.user, self.resolved
        hidden = None
        if not self.is_first_stage:
            shape = (most_tokens, resolved.model.hidden_size)
            hidden = torch.zeros(shape, dtype=resolved.dtype, device=self.device)
        inputs = PaddedInputs(
            padded_sizes(most_tokens, user.max_num_seqs),
            max_blocks=min(-(-resolved.max_model_len // user.block_size), self.num_kv_blocks),
            block_size=user.block_size,
            hidden=hidden,
            device=self.device,
        )
        self._padded_plans = {
            static.size: self.attention.plan_padded(static.attention, static.size.decodes) for static in inputs.all()
        }
        self.prefill = PrefillSteps(
            inputs,
            self._padded_body,
            before=lambda static, queries, keys: self.attention.renew_padded(
                self._padded_plans[static.size], queries, keys
            ),
        )

    def capture_obstacle(self, *, prompts: bool) -> str | None:
        """What a CUDA graph of a decode step (or a step with ``prompts``) could not hold; None if there is nothing."""
        if prompts and not self.attention.captures_prompts:
            return f"attention backend {self.attention.name!r} cannot attend to prompts inside of a graph"
        if not self.attention.capturable:
            return f"attention backend {self.attention.name!r} looks at host values in every layer"
        if self.tp.uncapturable:
            return f"all-reduce {', '.join(self.tp.uncapturable)} waits on the host"
        return None

    @property
    def graph_sizes(self) -> str:
        """Batch sizes of decode steps with a CUDA graph, for people; empty where there are none."""
        return ", ".join(map(str, self.decode.captured)) if self.decode is not None else ""

    @property
    def prefill_graph_sizes(self) -> str:
        """Numbers of tokens of steps with prompts that have a CUDA graph, likewise."""
        return ", ".join(map(str, self.prefill.captured)) if self.prefill is not None else ""

    @property
    def num_graphs(self) -> int:
        """Graphs that `capture` makes."""
        decode = len(self.decode.inputs.sizes) if self.decode is not None else 0
        return decode + (len(self.prefill.inputs.sizes) if self.prefill is not None else 0)

    @torch.inference_mode()
    def capture(self, on_graph: Callable[[], None] | None = None) -> CaptureReceipt:
        """Capture the prepared steps as CUDA graphs, the larger ones first; collective over all ranks: stages send each
        other their steps.

        Args:
            on_graph: called after each graph.
        """
        clock = CaptureClock(self.device)
        memory = GraphMemory(self.device)
        for steps in (self.prefill, self.decode):
            if steps is not None:
                steps.capture(memory, on_graph)
        self.captured = clock.receipt(self.num_graphs)
        torch.cuda.empty_cache()  # what the runs before the captures had on their stream serves no other
        logger.info(
            "captured %d CUDA graphs in %.1f s, %.0f MiB: decode of batch %s; prefill of tokens %s",
            self.captured.num_graphs,
            self.captured.seconds,
            self.captured.nbytes / 2**20,
            self.graph_sizes or "(none)",
            self.prefill_graph_sizes or "(none)",
        )
        return self.captured

    @torch.inference_mode()
    def execute(self, step: ScheduledStep) -> PendingStep:
        """Start a step: returns once this stage's part is computed or enqueued and handed on."""
        if self.decode is not None and self.decode.takes(step):
            return self._execute_decode(self.decode, step)
        padded = self.prefill.fitting(step) if self.prefill is not None else None
        started_s = time.monotonic()
        with span("yalis.prepare"):
            batch = prepare_batch(
                step,
                block_size=self.resolved.user.block_size,
                send=self._send_apart if padded is None else partial(self._padded_inputs.send, padded),
                last_tokens=self.last_tokens if self.is_first_stage else None,
            )
        pending = PendingStep(step, ResultLayout(batch.samplers, batch.prompt_rows), started_s)
        if padded is not None:
            self._execute_padded(pending, batch, padded)
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
    #
    # Their bodies hold the transfers between stages, padding included, so that a graph is all there is to a step.

    def _execute_padded(self, pending: PendingStep, batch: ForwardBatch, size: PaddedSize) -> None:
        assert self.prefill is not None
        self.counts.padded += 1
        with self._timed_forward(pending), span(f"yalis.forward[{pending.step.num_tokens} of {size.tokens} tokens]"):
            hidden = self.prefill.run(size, batch.attention)
            if self.is_last_stage:
                assert hidden is not None
                pending.sampled = self._sample(batch, hidden[: len(batch.samplers)], whole=False)
        if self.is_last_stage:
            self._return_tokens(pending)

    def _padded_body(self, static: PaddedStep) -> torch.Tensor | None:
        """A padded step from fixed inputs to the final hidden states, without sampling: what a graph holds."""
        token_ids = static.token_ids if self.is_first_stage else None
        hidden_in = self._receive_static(static.hidden_in)
        plan = self._padded_plans[static.size]
        hidden = self.model.forward(token_ids, static.positions, hidden_in, self.kv, plan, static.rows)
        if self.is_last_stage:
            return hidden
        self.pp.send(hidden, self.pp.rank + 1, tag="stage.hidden")
        return None

    @property
    def _padded_inputs(self) -> PaddedInputs:
        assert self.prefill is not None
        return self.prefill.inputs

    def _receive_static(self, hidden_in: torch.Tensor | None) -> torch.Tensor | None:
        if hidden_in is not None:
            self.pp.recv(hidden_in, self.pp.rank - 1, tag="stage.hidden")
        return hidden_in

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

    def _decode_body(self, static: StaticStep) -> StaticOutput:
        """A decode step from fixed inputs to fixed outputs: what a graph holds."""
        token_ids = None
        if self.is_first_stage:
            token_ids = feed_tokens(static.token_ids, static.slots, self.last_tokens)
        hidden_in = self._receive_static(self._hidden_in.get(static.size))
        plan = self._decode_plans[static.size]
        hidden = self.model.forward(token_ids, static.positions, hidden_in, self.kv, plan)
        if not self.is_last_stage:
            self.pp.send(hidden, self.pp.rank + 1, tag="stage.hidden")
            return StaticOutput()
        raw = self.model.raw_logits(hidden)
        return StaticOutput(raw_logits=raw, token_ids=self._draw_plain(raw, static.draw, static.slots))

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
        for steps in (self.decode, self.prefill):
            if steps is not None:
                steps.release()
        self.decode = self.prefill = None
        self._hidden_in = {}
        self._decode_plans = {}
        self._padded_plans = {}
        self.kv = []
        del self.model, self.attention, self.penalties, self.last_tokens
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
