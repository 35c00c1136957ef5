"""Two GPUs hold the same bits after every step: with NVRAR, kernel by kernel and from graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import hidden_states
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("options", [{"ranks_per_node": 2}, {"ranks_per_node": 1}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_both_ranks_hold_the_same_bits(dtype: str, options: dict[str, Any]) -> None:
    wanted = {"device": "cuda", "dtype": dtype, "all_reduce": "nvrar", "gpu_memory_utilization": 0.3, **options}
    ranks = run_ranks(hidden_states.worker, 2, wanted, timeout_s=100, torch_store=True)
    first, second = (rank.value for rank in ranks)
    assert first == second
    assert len(set(first.values())) >= 1 + len(hidden_states.BATCHES), "other batches, other states"
