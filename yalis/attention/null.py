"""No attention at all, for measurements: the result has the right shape and holds anything; no page is read or written.

The difference between a run with this and a run with a real backend is what attention costs.
"""

from __future__ import annotations

from typing import Any

import torch

from yalis.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerKV, Rotation


class NullBackend(AttentionBackend):
    """Serves every device."""

    name = "null"
    capturable = True
    captures_prompts = True

    def __init__(self, spec: AttentionSpec):
        pass

    def plan(self, batch: AttentionBatch) -> AttentionBatch:
        """Nothing to prepare."""
        return batch

    def plan_padded(self, batch: AttentionBatch, decodes: int) -> AttentionBatch:
        """Nothing to prepare."""
        return batch

    def forward(self, q: torch.Tensor, kv: LayerKV, plan: Any, window: int | None) -> torch.Tensor:
        """See `yalis.attention.base.AttentionBackend.forward`."""
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def rotate_and_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: Rotation,
        kv: LayerKV,
        plan: Any,
        window: int | None,
    ) -> torch.Tensor:
        """See `yalis.attention.base.AttentionBackend.rotate_and_forward`."""
        return self.forward(q, kv, plan, window)
