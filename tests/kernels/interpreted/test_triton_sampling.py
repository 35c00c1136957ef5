"""Sampling inside a step against `yalis.engine.sampler`: the same tokens, greedy and drawn."""

from __future__ import annotations

import pytest
import torch

from yalis.engine.sampler import Draw, SamplingBatch, VocabShard, sample
from yalis.kernels.triton_sampling import best_keys, feed_tokens, tokens_of_keys

TEMPERATURE = torch.tensor([0.0, 1.0, 0.0, 0.5, 2.0, 0.3])


class Alone:
    """A group of one."""

    size = 1

    def all_gather(self, x: torch.Tensor, dim: int = -1, *, tag: str = "") -> torch.Tensor:
        return x


def logits_and_draws(size: int, valid: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(size)
    logits = torch.randn(6, size).to(dtype)
    logits[2, 7] = logits[2, 100] = 9.0  # of equal logits the lowest id
    logits[:, valid:] = 50.0  # padding means nothing
    return logits, torch.randint(0, 2**63 - 1, (6,)), torch.arange(6) * 1000


def expected(logits: torch.Tensor, valid: int, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    wide = logits.float()
    wide[:, valid:] = -torch.inf
    rows = TEMPERATURE.nonzero()[:, 0]
    draw = Draw(rows, TEMPERATURE[rows, None], seeds[rows], positions[rows])
    return sample(wide, SamplingBatch(6, free=draw), VocabShard(0, logits.shape[1], valid), Alone()).token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "valid"), [(5000, 5000), (2048, 2048), (3000, 2900)])
def test_tokens_of_one_shard(dtype: torch.dtype, size: int, valid: int) -> None:
    logits, seeds, positions = logits_and_draws(size, valid, dtype)
    last, slots = torch.zeros(9, dtype=torch.int64), torch.tensor([3, 1, 8, 0, 2, 5])
    keys = best_keys(logits, TEMPERATURE, seeds, positions, 0, valid)
    tokens = tokens_of_keys(keys, slots, last)
    assert tokens.tolist() == expected(logits, valid, seeds, positions).tolist()
    assert torch.equal(last[slots], tokens)


def test_keys_of_shards_are_joined() -> None:
    logits, seeds, positions = logits_and_draws(5000, 4999, torch.float32)
    shards = [logits[:, :2500].contiguous(), logits[:, 2500:].contiguous()]
    keys = [
        best_keys(shard, TEMPERATURE, seeds, positions, start, valid)
        for shard, start, valid in zip(shards, (0, 2500), (2500, 2499), strict=True)
    ]
    tokens = tokens_of_keys(torch.cat(keys, -1), torch.arange(6), torch.zeros(6, dtype=torch.int64))
    assert tokens.tolist() == expected(logits, 4999, seeds, positions).tolist()


def test_strided_keys_are_refused() -> None:
    keys = torch.zeros(2, 6, dtype=torch.int64).mT
    with pytest.raises(ValueError, match="strides"):
        tokens_of_keys(keys, torch.arange(6), torch.zeros(6, dtype=torch.int64))


def test_tokens_that_the_host_does_not_know_are_fed() -> None:
    last = torch.tensor([10, 11, 12, 13])
    assert feed_tokens(torch.tensor([-1, 4, -1]), torch.tensor([3, 1, 0]), last).tolist() == [13, 4, 10]
