"""FlashInfer's backend without the package: what is planned for which lengths, and when a pinned buffer serves again.

The kernels are tested where the package and a GPU are (tests/gpu/engine).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from yalis.attention import flashinfer
from yalis.attention.base import AttentionBatch, AttentionSpec, LayerKV
from yalis.attention.flashinfer import FlashInferBackend, pages_of, workspace_bytes
from yalis.errors import ConfigError, EngineDeadError

CPU = torch.device("cpu")
PAGE = 4


class Wrapper:
    """Notes what it is planned for; its plan's shape is ``shape``."""

    shape = (1, 2, 3)

    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any):
        self.workspace, self.options = workspace, options
        self._pin_memory_int_workspace_buffer = None
        self.plans: list[Any] = []

    def reset_workspace_buffer(self, workspace: torch.Tensor, integers: torch.Tensor) -> None:
        self.integers = integers

    def plan(self, start: torch.Tensor, pages: torch.Tensor, last: torch.Tensor, *heads: int, **options: Any) -> None:
        self._plan_info = list(self.shape)
        self.plans.append((start.tolist(), pages.tolist(), last.tolist(), options["window_left"]))
        self.pinned = self._pin_memory_int_workspace_buffer

    def run(self, q: torch.Tensor, pages: Any) -> torch.Tensor:
        return q


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the copies enqueued so far have ended, as a list of one."""
    state = [True]

    def event() -> Any:
        return SimpleNamespace(record=lambda: None, query=lambda: state[0])

    monkeypatch.setattr(flashinfer, "_cuda", SimpleNamespace(Event=event))
    empty = torch.empty
    # Nothing can be pinned without a GPU.
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **{**how, "pin_memory": False}))
    return state


def backend(num_heads: int = 8, package: Any = None) -> FlashInferBackend:
    made = FlashInferBackend.__new__(FlashInferBackend)
    made._spec = AttentionSpec(num_heads, 2, 64, 0.1, PAGE, torch.bfloat16, CPU)
    made._package = package or SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper, __version__="0.0")
    made._sms, made._workspace = 132, torch.zeros(1)
    made._integers, made._passing, made._buffers = {}, {}, None
    made._pinned = flashinfer._PinnedTurns()
    return made


def fixed(size: int, columns: int = 3) -> AttentionBatch:
    table = torch.arange(size * columns, dtype=torch.int32).view(size, columns)
    starts, ones = torch.arange(size + 1, dtype=torch.int32), torch.ones(size, dtype=torch.int32)
    return AttentionBatch(starts, ones, table, ones.long(), [1] * size, [columns * PAGE] * size)


KV = LayerKV(torch.zeros(1), torch.zeros(1))
Q = torch.zeros(3, 8, 64)


def test_a_fixed_plan_follows_the_lengths_of_each_step(ended: list[bool]) -> None:
    it = backend()
    plan = it.plan_fixed(fixed(3))
    it.renew(plan, [])  # before the first run there is no wrapper: layers make them
    it.forward(Q, KV, plan, None)
    it.forward(Q, KV, plan, 5)
    assert sorted(plan.wrappers) == [-1, 4]
    it.renew(plan, [5, 9])
    for left, wrapper in plan.wrappers.items():
        assert wrapper.options["use_cuda_graph"] and wrapper.options["use_tensor_cores"]
        assert wrapper.plans == [
            ([0, 1, 2, 3], [0, 3, 6], [1, 1, 1], left),
            ([0, 2, 5, 6], [0, 1, 3, 4, 5, 6], [1, 1, 1], left),  # the third row is padding
        ]
    runs = [len(wrapper.plans) for wrapper in plan.wrappers.values()]
    it.forward(Q, KV, plan, None)  # a layer of the same step plans nothing
    assert runs == [len(wrapper.plans) for wrapper in plan.wrappers.values()]


def test_a_plan_that_the_graph_does_not_fit_ends_the_engine(ended: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    it = backend()
    plan = it.plan_fixed(fixed(2))
    it.forward(Q, KV, plan, None)
    monkeypatch.setattr(Wrapper, "shape", (1, 2, 4))
    with pytest.raises(EngineDeadError, match=r"2 sequences of up to 9 tokens.*\[1, 2, 4\], \[1, 2, 3\].*triton"):
        it.renew(plan, [9])


def test_sizes_share_their_place_and_the_largest_makes_it(ended: list[bool]) -> None:
    it = backend()
    large, small = it.plan_fixed(fixed(512)), it.plan_fixed(fixed(2))
    assert len(it._workspace) == workspace_bytes(8, 2, 64, 132, 512)
    for plan in (large, small):
        it.forward(Q, KV, plan, None)
    one, two = large.wrappers[-1], small.wrappers[-1]
    assert one.integers is two.integers and one.workspace is two.workspace is it._workspace
    pages = [w.options["paged_kv_indices_buffer"].data_ptr() for w in (one, two)]
    assert pages[0] == pages[1]
    assert [len(w.options["paged_kv_last_page_len_buffer"]) for w in (one, two)] == [512, 2]


def test_a_pinned_buffer_serves_again_when_its_copy_has_ended(ended: list[bool]) -> None:
    it = backend()
    plan = it.plan_fixed(fixed(2))
    it.forward(Q, KV, plan, None)
    wrapper = plan.wrappers[-1]
    first = wrapper.pinned
    it.renew(plan, [3])
    assert wrapper.pinned is first
    ended[0] = False
    it.renew(plan, [4])
    second = wrapper.pinned
    assert second is not first
    it.renew(plan, [5])
    assert wrapper.pinned is not first and wrapper.pinned is not second
    ended[0] = True
    it.renew(plan, [6])
    assert wrapper.pinned is first


def test_another_package_is_refused(ended: list[bool]) -> None:
    class Other(Wrapper):
        def __init__(self, *given: Any, **options: Any):
            super().__init__(*given, **options)
            del self._pin_memory_int_workspace_buffer

    it = backend(package=SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Other, __version__="9.9"))
    with pytest.raises(ConfigError, match=r"version 9\.9.*flashinfer-python==0\.6\.13"):
        it.forward(Q, KV, it.plan_fixed(fixed(1)), None)


@pytest.mark.parametrize("seq_lens", [[1], [4, 1, 5, 8, 13], [16, 16]])
def test_pages(seq_lens: list[int]) -> None:
    """Each sequence's pages, in order and without holes, out of a table with room for four each."""
    size, columns = PAGE, 4
    table = np.arange(100, 100 + len(seq_lens) * columns).reshape(-1, columns)
    pages = pages_of(seq_lens, size, columns)
    listed = table.reshape(-1)[pages.where]
    assert (pages.page_start[0], pages.page_start.dtype, pages.last_page.dtype) == (0, np.int32, np.int32)
    for row, length in enumerate(seq_lens):
        mine = listed[pages.page_start[row] : pages.page_start[row + 1]]
        assert mine.tolist() == table[row, : -(-length // size)].tolist()
        assert (len(mine) - 1) * size + pages.last_page[row] == length
        assert 1 <= pages.last_page[row] <= size
    assert pages.page_start[-1] == len(listed)


def test_workspace() -> None:
    """What version 0.6.13 asks for on 132 multiprocessors (attention/scheduler.cuh, PrefillPlan with graphs)."""
    mib = 1 << 20
    assert workspace_bytes(32, 32, 128, 132, 512) == 128 * mib  # no groups: the least
    for heads, kv_heads, batch, asked in ((64, 8, 256, 192), (32, 8, 512, 160), (32, 4, 512, 193)):
        found = workspace_bytes(heads, kv_heads, 128, 132, batch)
        assert asked * mib <= found <= (asked + 20) * mib
    # A prefill of the longest tiles, whatever the batch.
    assert workspace_bytes(64, 8, 128, 132) >= 64 * 33 * 128 * 129 * 4
