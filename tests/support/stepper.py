"""Drives a model without an engine: paged KV for a few sequences, one ragged step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from yalis.attention.base import AttentionBatch, LayerKV
from yalis.attention.registry import create_backend
from yalis.comm.communicator import Communicator
from yalis.comm.topology import Topology
from yalis.models.base import CausalLM, ModelContext, attention_spec
from yalis.models.config import ModelConfig
from yalis.models.registry import build_model
from yalis.weights.loader import load_weights

BLOCK_SIZE = 4
CPU = torch.device("cpu")


def alone() -> Communicator:
    """A group of one."""
    return Communicator.create(Topology(), [0])


def make_model(
    folder: Path,
    *,
    tp: Communicator | None = None,
    backend: str = "native",
    dtype: torch.dtype = torch.float32,
    stage: int = 0,
    num_stages: int = 1,
    load: bool = True,
) -> CausalLM:
    """The model of checkpoint ``folder`` on this rank."""
    tp = tp or alone()
    config = ModelConfig.from_pretrained(folder)
    spec = attention_spec(config, tp, block_size=BLOCK_SIZE, dtype=dtype, device=CPU)
    context = ModelContext(tp, stage, num_stages, dtype, CPU, create_backend(backend, spec))
    model = build_model(config, context)
    if load:
        load_weights(model, folder)
    return model


class Stepper:
    """Runs ``stages`` (the pipeline's models, or one) one after the other, with pages for ``num_sequences``."""

    def __init__(self, stages: Sequence[CausalLM], num_sequences: int = 1, max_len: int = 64):
        self.stages = stages
        first = stages[0]
        spec = attention_spec(
            first.config, first.context.tp, block_size=BLOCK_SIZE, dtype=first.dtype, device=first.device
        )
        per_sequence = -(-max_len // BLOCK_SIZE)
        shape = (num_sequences * per_sequence, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)

        def page() -> torch.Tensor:
            # Whatever was in a page before must not matter.
            return torch.full(shape, torch.nan, dtype=first.dtype)

        self.kv = [[LayerKV(page(), page()) for _ in stage.layers_of_stage] for stage in stages]
        # Pages in a scrambled order.
        order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))
        self.table = order.view(num_sequences, per_sequence).to(torch.int32)
        self.lengths = [0] * num_sequences

    def step(self, tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Append ``tokens`` of some sequences in one ragged batch.

        Returns:
            [len(tokens), vocab shard] logits of each of those sequences.
        """
        logits = self.stages[-1].logits(self.hidden(tokens))
        return dict(zip(tokens, logits.split([len(new) for new in tokens.values()]), strict=True))

    def hidden(self, tokens: dict[int, list[int]], rows: list[int] | None = None) -> torch.Tensor:
        """Append ``tokens``; the final hidden states [R, H] of ``rows`` of the ragged batch, by default all."""
        ids, positions, slots, query_lens, seq_lens = [], [], [], [], []
        for sequence, new in tokens.items():
            start = self.lengths[sequence]
            where = range(start, start + len(new))
            ids += new
            positions += where
            slots += [int(self.table[sequence, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in where]
            self.lengths[sequence] = start + len(new)
            query_lens.append(len(new))
            seq_lens.append(self.lengths[sequence])
        batch = AttentionBatch(
            query_start=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_table=self.table[list(tokens)].contiguous(),
            slot_mapping=torch.tensor(slots),
            query_lens_host=query_lens,
            seq_lens_host=seq_lens,
        )
        hidden = None
        for stage, kv in zip(self.stages, self.kv, strict=True):
            hidden = stage.forward(
                torch.tensor(ids),
                torch.tensor(positions),
                hidden,
                kv,
                stage.context.attention.plan(batch),
                None if rows is None else torch.tensor(rows, dtype=torch.int64),
            )
        assert hidden is not None
        return hidden


def logprobs(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Log-probabilities of whole rows of logits, padding cut off."""
    return logits[:, :vocab_size].log_softmax(-1)
