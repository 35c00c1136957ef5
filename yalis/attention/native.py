"""Attention straight over the KV pages by the CPU kernels: ragged batches, no gathering."""

from __future__ import annotations

import torch

from yalis.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerKV
from yalis.errors import ConfigError
from yalis.kernels import ops


class NativeBackend(AttentionBackend):
    """The batch itself is the plan: the kernel reads its tensors.

    Raises:
        ConfigError: the device is not the CPU.
    """

    name = "native"
    capturable = False

    def __init__(self, spec: AttentionSpec):
        if spec.device.type != "cpu":
            raise ConfigError(f"attention_backend='native' serves the CPU only, not {spec.device}; use sdpa or auto")
        self._scale = spec.scale

    def plan(self, batch: AttentionBatch) -> AttentionBatch:
        """Nothing to prepare."""
        return batch

    def forward(self, q: torch.Tensor, kv: LayerKV, plan: AttentionBatch, window: int | None) -> torch.Tensor:
        """See `yalis.attention.base.AttentionBackend.forward`."""
        return ops.paged_attention(
            q, kv.k, kv.v, plan.query_start, plan.seq_lens, plan.block_table, self._scale, window=window
        )
