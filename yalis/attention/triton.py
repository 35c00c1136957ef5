"""Attention by our own Triton kernels over the KV pages: no gathering, no packages besides torch and triton.

Sequences with one query token go to the split decode kernel, all others to the prefill kernel. A step of the first kind
only is capturable: its launches depend on the batch size and nothing else, lengths are read on the device. Padded steps
with prompts launch both kernels for the most that their size has room for; -1 stands where there is nothing to do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from yalis.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerKV, Rotation
from yalis.errors import ConfigError
from yalis.kernels import triton_attention
from yalis.kernels.gpu import gpu_kernels

# Programs per multiprocessor that a decode launch aims at, and the most that share one sequence's keys.
_PROGRAMS_PER_SM = 4
_MAX_SPLITS = 32
_CPU_SMS = 4  # under Triton's interpreter


@dataclass(frozen=True)
class TritonPlan:
    """Which sequences go to which kernel.

    Attributes:
        batch: the step.
        decodes: [B1] int32 sequences with one query token; None where that is all of them.
        num_decodes: B1.
        splits: programs per sequence and KV head of the decode kernel.
        shape: how the decode kernel is cut.
        fuse: the decode kernel rotates and writes the new keys, too.
        work: [N, 2] int32 tiles of the prefill kernel; None where there are none.
        listed: of padded steps, what ``work`` and ``decodes`` are views of, in this order.
    """

    batch: AttentionBatch
    decodes: torch.Tensor | None
    num_decodes: int
    splits: int
    shape: triton_attention.DecodeShape
    fuse: bool
    work: torch.Tensor | None
    scratch: triton_attention.DecodeScratch | None = field(repr=False)
    listed: torch.Tensor | None = None

    @property
    def slot_mapping(self) -> torch.Tensor:
        """[T] int64."""
        return self.batch.slot_mapping


class TritonBackend(AttentionBackend):
    """Serves CUDA devices, and the CPU under Triton's interpreter (``TRITON_INTERPRET=1``).

    Raises:
        ConfigError: the device is none of these.
    """

    name = "triton"
    capturable = True
    captures_prompts = True

    def __init__(self, spec: AttentionSpec):
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if spec.device.type != "cuda" and not interpreted:
            raise ConfigError(f"attention_backend='triton' serves CUDA devices, not {spec.device}; use native or auto")
        self._spec = spec
        self._group = spec.num_heads // spec.num_kv_heads
        self._prefill = triton_attention.PrefillShape.of(spec.dtype, spec.head_dim, self._group)
        self._decode = {
            crowded: triton_attention.DecodeShape.of(spec.dtype, spec.head_dim, crowded=crowded)
            for crowded in (False, True)
        }
        self._pdl = spec.device.type == "cuda" and gpu_kernels().pdl
        self._sms = _CPU_SMS
        if spec.device.type == "cuda":
            self._sms = torch.cuda.get_device_properties(spec.device).multi_processor_count
        # Captured graphs hold addresses in here: what was made is kept.
        self._scratch: list[triton_attention.DecodeScratch] = []

    def plan(self, batch: AttentionBatch) -> TritonPlan:
        """Sort the sequences. Capturable for steps of one query token per sequence: then nothing is copied."""
        ones = [b for b, count in enumerate(batch.query_lens_host) if count == 1]
        decodes = work = scratch = None
        splits = 1
        pairs = len(ones) * self._spec.num_kv_heads
        shape = self._decode[4 * pairs > self._sms]
        if ones:
            longest = max(batch.seq_lens_host[b] for b in ones)
            splits = self._splits(len(ones), longest, shape)
            scratch = self._scratch_for(len(ones), splits)
        if len(ones) < len(batch.query_lens_host):
            if ones:
                decodes = self._send(np.asarray(ones, np.int32))
            work = self._send(self._tiles(batch.query_lens_host, batch.seq_lens_host))
        # Where programs are many, every split of a sequence would rotate the same queries again: 3 us at 256 pairs.
        fuse = work is None and pairs <= self._sms
        return TritonPlan(batch, decodes, len(ones), splits, shape, fuse, work, scratch)

    def plan_padded(self, batch: AttentionBatch, decodes: int) -> TritonPlan:
        """See `yalis.attention.base.AttentionBackend.plan_padded`."""
        prompts = len(batch.seq_lens) - decodes
        # Each prompt has at most one tile that is not full.
        tiles = len(batch.slot_mapping) // self._prefill.queries(self._group) + prompts
        listed = torch.full((2 * tiles + decodes,), -1, dtype=torch.int32, device=self._spec.device)
        shape = self._decode[4 * decodes * self._spec.num_kv_heads > self._sms]
        splits, scratch = 1, None
        if decodes:
            splits = self._splits(decodes, max(batch.seq_lens_host), shape)
            scratch = self._scratch_for(decodes, splits)
        work, ones = listed[: 2 * tiles].view(-1, 2), listed[2 * tiles :]
        return TritonPlan(batch, ones, decodes, splits, shape, False, work, scratch, listed)

    def renew_padded(self, plan: TritonPlan, query_lens_host: Sequence[int], seq_lens_host: Sequence[int]) -> None:
        """Enqueue the copy of the step's tiles and decodes."""
        assert plan.listed is not None and plan.work is not None
        listed = np.full(len(plan.listed), -1, np.int32)
        tiles = self._tiles(query_lens_host, seq_lens_host)
        listed[: tiles.size] = tiles.reshape(-1)
        ones = [b for b, count in enumerate(query_lens_host) if count == 1]
        listed[plan.work.numel() :][: len(ones)] = ones
        host = torch.from_numpy(listed)
        plan.listed.copy_(host.pin_memory() if plan.listed.is_cuda else host, non_blocking=True)

    def forward(self, q: torch.Tensor, kv: LayerKV, plan: TritonPlan, window: int | None) -> torch.Tensor:
        """See `yalis.attention.base.AttentionBackend.forward`."""
        batch, scale = plan.batch, self._spec.scale
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        where = (batch.query_start, batch.seq_lens, batch.block_table)
        if plan.work is not None:
            triton_attention.prefill(
                q, kv.k, kv.v, out, plan.work, *where, scale, window=window, shape=self._prefill, pdl=self._pdl
            )
        if plan.scratch is not None:
            triton_attention.decode(
                q, kv.k, kv.v, out, plan.scratch, plan.decodes, *where, scale,
                splits=plan.splits, window=window, shape=plan.shape, pdl=self._pdl,
            )  # fmt: skip
        return out

    def rotate_and_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: Rotation,
        kv: LayerKV,
        plan: TritonPlan,
        window: int | None,
    ) -> torch.Tensor:
        """See `yalis.attention.base.AttentionBackend.rotate_and_forward`; one kernel for steps of decodes only."""
        batch = plan.batch
        if plan.scratch is None or not plan.fuse:
            return super().rotate_and_forward(q, k, v, rotation, kv, plan, window)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        new = triton_attention.NewKeys(k, v, rotation.cos_sin, batch.slot_mapping, rotation.norms)
        triton_attention.decode(
            q, kv.k, kv.v, out, plan.scratch, plan.decodes, batch.query_start, batch.seq_lens, batch.block_table,
            self._spec.scale, splits=plan.splits, window=window, shape=plan.shape, pdl=self._pdl, new=new,
        )  # fmt: skip
        return out

    def _splits(self, sequences: int, longest: int, shape: triton_attention.DecodeShape) -> int:
        """Enough programs to fill the device, but no more than there are tiles."""
        wanted = self._sms * _PROGRAMS_PER_SM // (sequences * self._spec.num_kv_heads)
        return max(1, min(wanted, _MAX_SPLITS, -(-longest // shape.keys)))

    def _scratch_for(self, sequences: int, splits: int) -> triton_attention.DecodeScratch:
        programs = sequences * self._spec.num_kv_heads
        for scratch in self._scratch:
            if scratch.holds(programs, splits):
                return scratch
        self._scratch.append(
            triton_attention.DecodeScratch(programs, splits, self._group, self._spec.head_dim, self._spec.device)
        )
        return self._scratch[-1]

    def _tiles(self, query_lens: Sequence[int], seq_lens: Sequence[int]) -> np.ndarray:
        """[N, 2] int32 (sequence, first query), those with most keys first, so that short ones fill the gaps."""
        size = self._prefill.queries(self._group)
        tiles = [
            (seq_lens[b] - count + min(start + size, count), b, start)
            for b, count in enumerate(query_lens)
            if count > 1
            for start in range(0, count, size)
        ]
        tiles.sort(reverse=True)
        return np.asarray([tile[1:] for tile in tiles], np.int32).reshape(-1, 2)

    def _send(self, array: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(array)
        if self._spec.device.type == "cpu":
            return host
        return host.pin_memory().to(self._spec.device, non_blocking=True)
