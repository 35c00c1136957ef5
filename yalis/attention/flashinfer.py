"""Attention by the FlashInfer package over the KV pages.

Steps of one query token per sequence go to its decode wrapper, all others to its prefill wrapper. Its planning looks at
host lengths and copies to the device, so it cannot be part of a CUDA graph, and decode steps run uncaptured with this
backend. Written from the package's documentation (0.3 to 0.6); not run yet.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from yalis.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerKV
from yalis.errors import ConfigError

# What the package recommends; it holds partial results of split keys.
_WORKSPACE_BYTES = 128 << 20


@dataclass
class FlashInferPlan:
    """A step in the package's terms, all on the host but ``pages``.

    Attributes:
        batch: the step.
        query_start: [B + 1] int32.
        page_start: [B + 1] int32, where each sequence's pages begin in ``pages``.
        pages: [sum of pages] int32 on the device.
        last_page: [B] int32, keys in each sequence's last page.
        decode: every sequence has one query token.
        planned: wrappers that were planned for this step, by window.
    """

    batch: AttentionBatch
    query_start: torch.Tensor
    page_start: torch.Tensor
    pages: torch.Tensor
    last_page: torch.Tensor
    decode: bool
    planned: dict[int, Any] = field(default_factory=dict)

    @property
    def slot_mapping(self) -> torch.Tensor:
        """[T] int64."""
        return self.batch.slot_mapping


class FlashInferBackend(AttentionBackend):
    """Serves CUDA devices in bf16 and fp16.

    Raises:
        ConfigError: the device or dtype is another one, or the package is not installed.
    """

    name = "flashinfer"
    capturable = False

    def __init__(self, spec: AttentionSpec):
        if spec.device.type != "cuda" or spec.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"attention_backend='flashinfer' serves bf16 and fp16 on CUDA devices, not {spec.dtype} on "
                f"{spec.device}; use auto"
            )
        try:
            self._package: Any = importlib.import_module("flashinfer")
        except ImportError as error:
            raise ConfigError(
                f"attention_backend='flashinfer' needs the package flashinfer-python ({error}); install it with "
                "`pip install flashinfer-python`, or use attention_backend='triton'"
            ) from error
        self._spec = spec
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=spec.device)
        # By (decode, window): a wrapper holds one plan at a time, and layers may differ in their window.
        self._wrappers: dict[tuple[bool, int], Any] = {}

    def plan(self, batch: AttentionBatch) -> FlashInferPlan:
        """Bring lengths and pages into the package's form; wrappers are planned when a layer first needs them."""
        size = self._spec.block_size
        lengths = np.asarray(batch.seq_lens_host, np.int32)
        counts = -(-lengths // size)
        columns = batch.block_table.shape[1]
        where = np.concatenate([np.arange(n) + row * columns for row, n in enumerate(counts)])
        on_device = torch.from_numpy(where).pin_memory().to(self._spec.device, non_blocking=True)
        return FlashInferPlan(
            batch=batch,
            query_start=_starts(np.asarray(batch.query_lens_host, np.int32)),
            page_start=_starts(counts),
            pages=batch.block_table.reshape(-1).index_select(0, on_device),
            last_page=torch.from_numpy(lengths - (counts - 1) * size),
            decode=all(count == 1 for count in batch.query_lens_host),
        )

    def forward(self, q: torch.Tensor, kv: LayerKV, plan: FlashInferPlan, window: int | None) -> torch.Tensor:
        """See `yalis.attention.base.AttentionBackend.forward`."""
        # The package counts the tokens before a query's own; -1 is all of them.
        left = -1 if window is None else window - 1
        wrapper = plan.planned.get(left)
        if wrapper is None:
            wrapper = plan.planned[left] = self._planned(plan, left)
        out: torch.Tensor = wrapper.run(q.contiguous(), (kv.k, kv.v))
        return out

    def _planned(self, plan: FlashInferPlan, left: int) -> Any:
        spec = self._spec
        wrapper = self._wrapper(plan.decode, left)
        lengths = (plan.page_start, plan.pages, plan.last_page)
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size)
        options = dict(window_left=left, sm_scale=spec.scale, q_data_type=spec.dtype, kv_data_type=spec.dtype)
        if plan.decode:
            wrapper.plan(*lengths, *heads, **options)
        else:
            wrapper.plan(plan.query_start, *lengths, *heads, causal=True, **options)
        return wrapper

    def _wrapper(self, decode: bool, left: int) -> Any:
        found = self._wrappers.get((decode, left))
        if found is None:
            if decode:
                # The matrix units pay as soon as several query heads share a KV head.
                found = self._package.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "HND", use_tensor_cores=self._spec.num_heads > self._spec.num_kv_heads
                )
            else:
                found = self._package.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
            self._wrappers[decode, left] = found
        return found


def _starts(counts: np.ndarray) -> torch.Tensor:
    """[B + 1] int32 running sums from 0."""
    return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))
