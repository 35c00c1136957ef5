"""Steps of fixed sizes on one rank: decode steps and padded steps with prompts, over tensors that never move.

What a body does here is what a CUDA graph of it holds. Bodies contain the transfers between stages, padding included,
so that a graph is all there is to a step; what needs the host (inputs, plans) happens before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from yalis.attention.base import AttentionBackend, AttentionPlan, LayerKV
from yalis.comm.communicator import Communicator
from yalis.engine.cuda_graphs import CaptureClock, CaptureReceipt, GraphLimits, GraphMemory, graph_nbytes
from yalis.engine.decode_steps import DecodeInputs, DecodeSteps, StaticOutput, StaticStep, batch_sizes
from yalis.engine.plain_draw import draw_plain, feed_tokens
from yalis.engine.prefill_steps import PaddedInputs, PaddedSize, PaddedStep, PrefillSteps, padded_sizes
from yalis.engine.resolve import ResolvedConfig
from yalis.models.base import CausalLM
from yalis.utils.logging import get_logger

logger = get_logger(__name__)


def capture_obstacle(attention: AttentionBackend, tp: Communicator, *, prompts: bool) -> str | None:
    """What a CUDA graph of a decode step (or a step with ``prompts``) could not hold; None if there is nothing."""
    if prompts and not attention.captures_prompts:
        return f"attention backend {attention.name!r} cannot attend to prompts inside of a graph"
    if not attention.capturable:
        return f"attention backend {attention.name!r} looks at host values in every layer"
    if tp.uncapturable:
        return f"all-reduce {', '.join(tp.uncapturable)} waits on the host"
    return None


def held_nbytes(resolved: ResolvedConfig, model: CausalLM, limits: GraphLimits, *, last_stage: bool) -> int:
    """Bytes of GPU memory that no two graphs share: they themselves, and what each leaves on the last stage."""
    most = resolved.user.max_num_seqs
    decodes = batch_sizes(min(limits.decode_batch, most)) if limits.decode_batch else ()
    padded = padded_sizes(limits.prefill_tokens, most) if limits.prefill_tokens else ()
    held = graph_nbytes(len(decodes) + len(padded), len(model.layers_of_stage))
    if last_stage:
        logits, hidden = model.vocab_shard_size, resolved.model.hidden_size
        values = sum(decodes) * logits + sum(size.sequences for size in padded) * hidden
        held += values * resolved.dtype.itemsize
    return held


class FixedSteps:
    """Decode steps and padded steps with prompts of one stage, where they were prepared, and CUDA graphs of them.

    Args:
        resolved: the resolved configuration.
        model: this stage's layers.
        attention: its attention backend.
        tp: communicator of the ranks that share the layers.
        pp: communicator of the ranks with the same place in every stage, by stage.
        kv: pages of each layer; there when steps are prepared.
        last_tokens: [max_num_seqs + 1] int64, the token last sampled in each slot; the last takes those of padding.

    Attributes:
        decode: decode steps; None until `prepare_decode`.
        prefill: padded steps with prompts; None until `prepare_prefill`.
        captured: what capturing took; None until `capture`.
    """

    def __init__(
        self,
        resolved: ResolvedConfig,
        model: CausalLM,
        attention: AttentionBackend,
        tp: Communicator,
        pp: Communicator,
        kv: Sequence[LayerKV],
        last_tokens: torch.Tensor,
    ):
        self._resolved, self._model, self._attention = resolved, model, attention
        self._tp, self._pp = tp, pp
        self._kv, self._last_tokens = kv, last_tokens
        self._is_first, self._is_last = pp.rank == 0, pp.rank == pp.size - 1
        self.decode: DecodeSteps | None = None
        self.prefill: PrefillSteps | None = None
        self.captured: CaptureReceipt | None = None
        self._decode_plans: dict[int, AttentionPlan] = {}
        self._padded_plans: dict[PaddedSize, AttentionPlan] = {}
        # What the stage before sends, for each size of decode steps; padded steps have theirs among their inputs.
        self._hidden_in: dict[int, torch.Tensor] = {}

    def prepare_decode(self, largest: int) -> None:
        """Make fixed inputs for decode steps of up to ``largest`` sequences."""
        user = self._resolved.user
        inputs = DecodeInputs(
            batch_sizes(min(largest, user.max_num_seqs)),
            num_slots=user.max_num_seqs,
            max_blocks=self._max_blocks,
            block_size=user.block_size,
            device=self._resolved.device,
        )
        self._hidden_in = {} if self._is_first else {size: self._hidden(size) for size in inputs.sizes}
        self._decode_plans = {static.size: self._attention.plan_fixed(static.attention) for static in inputs.all()}
        self.decode = DecodeSteps(inputs, self._decode_body, before=self._before_decode)

    def prepare_prefill(self, most_tokens: int) -> None:
        """Make fixed inputs for padded steps of up to ``most_tokens`` tokens."""
        user = self._resolved.user
        inputs = PaddedInputs(
            padded_sizes(most_tokens, user.max_num_seqs),
            max_blocks=self._max_blocks,
            block_size=user.block_size,
            hidden=None if self._is_first else self._hidden(most_tokens),
            device=self._resolved.device,
        )
        self._padded_plans = {
            static.size: self._attention.plan_padded(static.attention, static.size.decodes) for static in inputs.all()
        }
        self.prefill = PrefillSteps(inputs, self._padded_body, before=self._before_padded)

    @property
    def decode_graphs(self) -> str:
        """Batch sizes of decode steps with a CUDA graph, for people; empty where there are none."""
        return ", ".join(map(str, self.decode.captured)) if self.decode is not None else ""

    @property
    def prefill_graphs(self) -> str:
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
        clock = CaptureClock(self._resolved.device)
        memory = GraphMemory(self._resolved.device)
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
            self.decode_graphs or "(none)",
            self.prefill_graphs or "(none)",
        )
        return self.captured

    def release(self) -> None:
        """Drop the graphs and their memory; nothing may run any more."""
        for steps in (self.decode, self.prefill):
            if steps is not None:
                steps.release()

    # ---- what the host does before a body -----------------------------------------------------------------------

    def _before_decode(self, static: StaticStep, keys: Sequence[int]) -> None:
        self._attention.renew(self._decode_plans[static.size], keys)

    def _before_padded(self, static: PaddedStep, queries: Sequence[int], keys: Sequence[int]) -> None:
        self._attention.renew_padded(self._padded_plans[static.size], queries, keys)

    # ---- bodies: what a graph holds -----------------------------------------------------------------------------

    def _decode_body(self, static: StaticStep) -> StaticOutput:
        token_ids = feed_tokens(static.token_ids, static.slots, self._last_tokens) if self._is_first else None
        hidden_in = self._received(self._hidden_in.get(static.size))
        plan = self._decode_plans[static.size]
        hidden = self._model.forward(token_ids, static.positions, hidden_in, self._kv, plan)
        if not self._is_last:
            self._send(hidden)
            return StaticOutput()
        raw = self._model.raw_logits(hidden)
        drawn = draw_plain(self._model, raw, static.draw, static.slots, self._last_tokens, self._tp)
        return StaticOutput(raw_logits=raw, token_ids=drawn)

    def _padded_body(self, static: PaddedStep) -> torch.Tensor | None:
        """To the final hidden states, without sampling."""
        token_ids = static.token_ids if self._is_first else None
        hidden_in = self._received(static.hidden_in)
        plan = self._padded_plans[static.size]
        hidden = self._model.forward(token_ids, static.positions, hidden_in, self._kv, plan, static.rows)
        if self._is_last:
            return hidden
        self._send(hidden)
        return None

    def _received(self, hidden_in: torch.Tensor | None) -> torch.Tensor | None:
        if hidden_in is not None:
            self._pp.recv(hidden_in, self._pp.rank - 1, tag="stage.hidden")
        return hidden_in

    def _send(self, hidden: torch.Tensor) -> None:
        self._pp.send(hidden, self._pp.rank + 1, tag="stage.hidden")

    # ---- sizes --------------------------------------------------------------------------------------------------

    @property
    def _max_blocks(self) -> int:
        """Most pages of a sequence."""
        assert self._kv, "steps are prepared when the pages are there"
        block_size, held = self._resolved.user.block_size, self._kv[0].k.shape[0]
        return min(-(-self._resolved.max_model_len // block_size), held)

    def _hidden(self, rows: int) -> torch.Tensor:
        shape = (rows, self._resolved.model.hidden_size)
        return torch.zeros(shape, dtype=self._resolved.dtype, device=self._resolved.device)
