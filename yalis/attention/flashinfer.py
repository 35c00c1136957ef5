"""Attention by the FlashInfer package over the KV pages.

Steps of one query token per sequence go to its decode wrapper, all others to its prefill wrapper. The package plans on
the host how the keys are split over the device, writes the plan into pinned memory and enqueues its copy. For decode
steps of fixed size that happens in `FlashInferBackend.renew`, before each replay; the graph holds the kernels alone.

Two hazards. The host plans one step ahead, so the package's own pinned buffer would be overwritten before the copy of
the plan before has read it: plans take turns over buffers whose copies have ended (`_PinnedTurns`). And a copy from
pageable memory would wait for everything enqueued before it: whatever is handed to the package is pinned. (It makes one
of its own where decode runs outside of graphs with grouped heads.)
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from yalis.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerKV
from yalis.errors import ConfigError, EngineDeadError
from yalis.utils.packing import pinned

_cuda: Any = torch.cuda  # its type information lacks the events' methods

# Of the integers of a plan: what the package takes by itself.
_PLAN_BYTES = 8 << 20
# Of partial results of split keys: what the package recommends, and what is left for all but the largest part of it.
_LEAST_WORKSPACE, _WORKSPACE_SLACK = 128 << 20, 16 << 20
# Rows of the package's largest tile, and tiles that it puts on a multiprocessor.
_TILE_ROWS, _TILES_PER_SM = 128, 2
# Where its wrappers keep their pinned buffer. `reset_workspace_buffer` would allocate one anew for every step.
_PINNED = "_pin_memory_int_workspace_buffer"


@dataclass(frozen=True)
class Pages:
    """The pages of a step in the package's terms, on the host. B sequences.

    Attributes:
        page_start: [B + 1] int32, where each sequence's pages begin in the list of all.
        last_page: [B] int32, keys in each sequence's last page.
        where: [sum of pages] int64, each page's place in the flattened block table.
    """

    page_start: np.ndarray
    last_page: np.ndarray
    where: np.ndarray


def pages_of(seq_lens: Sequence[int], block_size: int, columns: int) -> Pages:
    """Pages of sequences with ``seq_lens`` keys (1 or more) in a block table of ``columns``, without holes."""
    lengths = np.asarray(seq_lens, np.int32)
    counts = -(-lengths // block_size)
    start = _starts(counts)
    rows = np.arange(len(counts), dtype=np.int64) * columns - start[:-1]
    where = np.arange(start[-1], dtype=np.int64) + np.repeat(rows, counts)
    return Pages(start, lengths - (counts - 1) * block_size, where)


@dataclass
class FlashInferPlan:
    """How a step is attended.

    Attributes:
        batch: the step.
        decode: every sequence has one query token.
        fixed: it serves all decode steps of its size.
        lengths: keys of each sequence; of a fixed plan, of the step at hand.
        wrappers: those that are planned for ``lengths``, by window; layers add what they need.
        shapes: of a fixed plan, what the graph has of each window's plan; it may not change.
    """

    batch: AttentionBatch
    decode: bool
    fixed: bool
    lengths: Sequence[int]
    wrappers: dict[int, Any] = field(default_factory=dict)
    shapes: dict[int, list[int]] = field(default_factory=dict)

    @property
    def slot_mapping(self) -> torch.Tensor:
        """[T] int64."""
        return self.batch.slot_mapping


class FlashInferBackend(AttentionBackend):
    """Serves CUDA devices in bf16 and fp16. Written for and run with the package's version 0.6.13.

    Raises:
        ConfigError: the device or dtype is another one, or the package is not installed.
    """

    name = "flashinfer"
    capturable = True

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
        self._sms = torch.cuda.get_device_properties(spec.device).multi_processor_count
        self._workspace = torch.zeros(self._workspace_bytes(), dtype=torch.uint8, device=spec.device)
        # What a replay reads is copied on the same stream before it, so the plans of all sizes share their place. Those
        # of different windows do not: they are valid at the same time.
        self._integers: dict[tuple[bool, int], torch.Tensor] = {}
        self._pinned = _PinnedTurns()
        # Wrappers of steps that come once, by (decode, window): one holds one plan at a time.
        self._passing: dict[tuple[bool, int], Any] = {}
        self._buffers: _PageBuffers | None = None

    def plan(self, batch: AttentionBatch) -> FlashInferPlan:
        """Wrappers are planned when a layer first needs them."""
        decode = all(count == 1 for count in batch.query_lens_host)
        return FlashInferPlan(batch, decode, fixed=False, lengths=batch.seq_lens_host)

    def plan_fixed(self, batch: AttentionBatch) -> FlashInferPlan:
        """See `yalis.attention.base.AttentionBackend.plan_fixed`."""
        size, columns = batch.block_table.shape
        # Wrappers keep what they were given before.
        if self._buffers is None or not self._buffers.holds(size, columns):
            self._buffers = _PageBuffers(size, columns, self._spec.device)
        needed = self._workspace_bytes(size)
        if needed > len(self._workspace):
            self._workspace = torch.zeros(needed, dtype=torch.uint8, device=self._spec.device)
        return FlashInferPlan(batch, decode=True, fixed=True, lengths=[1] * size)

    def renew(self, plan: FlashInferPlan, seq_lens_host: Sequence[int]) -> None:
        """Plan this step for the wrappers that the layers have made.

        Raises:
            EngineDeadError: the graph does not fit the plan.
        """
        plan.lengths = [*seq_lens_host, *[1] * (len(plan.lengths) - len(seq_lens_host))]
        for left, wrapper in plan.wrappers.items():
            self._plan_wrapper(wrapper, plan, left)
            if list(wrapper._plan_info) != plan.shapes[left]:
                raise EngineDeadError(
                    f"FlashInfer plans {len(plan.lengths)} sequences of up to {max(plan.lengths)} tokens unlike those "
                    f"that the CUDA graph was captured with ({list(wrapper._plan_info)}, {plan.shapes[left]}); use "
                    "attention_backend='triton' or enforce_eager"
                )

    def forward(self, q: torch.Tensor, kv: LayerKV, plan: FlashInferPlan, window: int | None) -> torch.Tensor:
        """See `yalis.attention.base.AttentionBackend.forward`."""
        # The package counts the tokens before a query's own; -1 is all of them.
        left = -1 if window is None else window - 1
        wrapper = plan.wrappers.get(left)
        if wrapper is None:  # never within a graph: runs before the capture have been here
            wrapper = self._fixed_wrapper(len(plan.lengths), left) if plan.fixed else self._passing_wrapper(plan, left)
            self._plan_wrapper(wrapper, plan, left)
            plan.wrappers[left] = wrapper
            plan.shapes[left] = list(wrapper._plan_info)
        out: torch.Tensor = wrapper.run(q, (kv.k, kv.v))
        return out

    def _workspace_bytes(self, batch: int = 0) -> int:
        spec = self._spec
        return workspace_bytes(spec.num_heads, spec.num_kv_heads, spec.head_dim, self._sms, batch)

    def _plan_wrapper(self, wrapper: Any, plan: FlashInferPlan, left: int) -> None:
        """Enqueue the copies of a plan for ``plan.lengths``."""
        spec, batch = self._spec, plan.batch
        pages = pages_of(plan.lengths, spec.block_size, batch.block_table.shape[1])
        arrays = {"page_start": pages.page_start, "last_page": pages.last_page, "where": pages.where}
        if not plan.decode:
            arrays["query_start"] = _starts(np.asarray(batch.query_lens_host, np.int32))
            arrays["seq_lens"] = np.asarray(plan.lengths, np.int32)  # which it would copy from pageable memory
        host = pinned(arrays, spec.device)
        listed = batch.block_table.reshape(-1).index_select(0, host["where"].to(spec.device, non_blocking=True))
        lengths = (host["page_start"], listed, host["last_page"])
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size)
        options = dict(window_left=left, sm_scale=spec.scale, q_data_type=spec.dtype, kv_data_type=spec.dtype)
        with self._pinned.turn() as buffer:
            setattr(wrapper, _PINNED, buffer)
            if plan.decode:
                wrapper.plan(*lengths, *heads, **options)
            else:
                wrapper.plan(host["query_start"], *lengths, *heads, causal=True, seq_lens=host["seq_lens"], **options)

    def _passing_wrapper(self, plan: FlashInferPlan, left: int) -> Any:
        found = self._passing.get((plan.decode, left))
        if found is None:
            if plan.decode:
                found = self._decode_wrapper(left)
            else:
                made = self._package.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
                found = self._with_integers(made, (False, left))
            self._passing[plan.decode, left] = found
        return found

    def _fixed_wrapper(self, size: int, left: int) -> Any:
        assert self._buffers is not None
        return self._decode_wrapper(
            left,
            use_cuda_graph=True,
            paged_kv_indptr_buffer=self._buffers.page_start[: size + 1],
            paged_kv_indices_buffer=self._buffers.pages,
            paged_kv_last_page_len_buffer=self._buffers.last_page[:size],
        )

    def _decode_wrapper(self, left: int, **options: Any) -> Any:
        # The matrix units pay as soon as several query heads share a KV head.
        grouped = self._spec.num_heads > self._spec.num_kv_heads
        make = self._package.BatchDecodeWithPagedKVCacheWrapper
        return self._with_integers(make(self._workspace, "HND", use_tensor_cores=grouped, **options), (True, left))

    def _with_integers(self, wrapper: Any, key: tuple[bool, int]) -> Any:
        """Give a new wrapper the place of its kind for plans, instead of one of its own."""
        if not hasattr(wrapper, _PINNED):
            raise ConfigError(
                f"attention_backend='flashinfer' does not know version {self._package.__version__} of the package: its "
                f"wrappers have no {_PINNED}; install flashinfer-python==0.6.13, or use attention_backend='triton'"
            )
        place = self._integers.get(key)
        if place is None:
            place = self._integers[key] = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=self._spec.device)
        wrapper.reset_workspace_buffer(self._workspace, place)
        return wrapper


class _PageBuffers:
    """What the package reads within graphs: [size + 1], [size * columns] and [size] int32, for all sizes up to it."""

    def __init__(self, size: int, columns: int, device: torch.device):
        self.page_start = torch.zeros(size + 1, dtype=torch.int32, device=device)
        self.pages = torch.zeros(size * columns, dtype=torch.int32, device=device)
        self.last_page = torch.zeros(size, dtype=torch.int32, device=device)

    def holds(self, size: int, columns: int) -> bool:
        """Whether it is large enough."""
        return size <= len(self.last_page) and size * columns <= len(self.pages)


class _PinnedTurns:
    """Pinned buffers for plans; one serves again when the copy out of it has ended. Never waits: it rather makes one
    more, of which there are as many as there are plans in flight."""

    def __init__(self) -> None:
        self._ended: list[tuple[torch.Tensor, Any]] = []

    def turn(self) -> _Turn:
        """A buffer for one plan, as a context within which the plan's copy is enqueued on the current stream."""
        for index, (buffer, event) in enumerate(self._ended):
            if event.query():
                del self._ended[index]
                return _Turn(self._ended, buffer, event)
        buffer = torch.empty(_PLAN_BYTES, dtype=torch.uint8, pin_memory=True)
        return _Turn(self._ended, buffer, _cuda.Event())


@dataclass
class _Turn:
    ended: list[tuple[torch.Tensor, Any]]
    buffer: torch.Tensor
    event: Any

    def __enter__(self) -> torch.Tensor:
        return self.buffer

    def __exit__(self, *_: object) -> None:
        self.event.record()
        self.ended.append((self.buffer, self.event))


def workspace_bytes(num_heads: int, num_kv_heads: int, head_dim: int, sms: int, batch: int = 0) -> int:
    """Bytes for float32 partial results, of which the package holds one and its weight for each row of a padded tile.

    Args:
        num_heads, num_kv_heads: of a rank.
        sms: multiprocessors.
        batch: largest decode step that a graph holds; there every row has a tile, however few are split. 0: none.
    """
    group = num_heads // num_kv_heads
    tiles = _TILES_PER_SM * sms // num_kv_heads
    most = tiles * _TILE_ROWS
    if group > 1:  # without groups its graphs hold other kernels, which need next to nothing
        rows = 16 if group <= 16 else 64 if group <= 64 or head_dim >= 256 else _TILE_ROWS
        most = max(most, (-(-batch * group // rows) + batch) * rows)
    return max(_LEAST_WORKSPACE, num_heads * most * (head_dim + 1) * 4 + _WORKSPACE_SLACK)


def _starts(counts: np.ndarray) -> np.ndarray:
    """[B + 1] int32 running sums from 0."""
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
