"""Lets the native attention backend serve padded steps, so that a CPU can run what a CUDA graph would hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from yalis.attention.base import AttentionBatch, LayerKV


@dataclass
class CutPlan:
    """Of a padded step: the batch without its padding."""

    padded: AttentionBatch
    there: AttentionBatch | None = None

    @property
    def slot_mapping(self) -> torch.Tensor:
        return self.padded.slot_mapping


def pad_native(attention: Any) -> None:
    """Let the native backend serve padded steps: it attends to what is there, and padding gets NaN."""
    forward = attention.forward

    def renew(plan: CutPlan, query_lens: list[int], seq_lens: list[int]) -> None:
        batch, count, rows = plan.padded, len(query_lens), sum(query_lens)
        assert batch.seq_lens[:count].tolist() == seq_lens, "the inputs are there"
        assert batch.query_start.tolist()[count:] == [rows] * (len(batch.query_start) - count)
        plan.there = AttentionBatch(
            batch.query_start[: count + 1],
            batch.seq_lens[:count],
            batch.block_table[:count],
            batch.slot_mapping[:rows],
            query_lens,
            seq_lens,
        )

    def attend(q: torch.Tensor, kv: LayerKV, plan: Any, window: int | None) -> torch.Tensor:
        if not isinstance(plan, CutPlan):
            return forward(q, kv, plan, window)
        assert plan.there is not None
        rows = len(plan.there.slot_mapping)
        out = torch.full(q.shape, torch.nan)
        out[:rows] = forward(q[:rows], kv, plan.there, window)
        return out

    attention.plan_padded = lambda batch, decodes: CutPlan(batch)
    attention.renew_padded = renew
    attention.forward = attend
