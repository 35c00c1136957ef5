"""Sampling without side conditions: greedy rows and plain draws from tensors of fixed shape, no look at the host.

This is what a CUDA graph can hold, so a decode step from embedding to sampled token is one replay. It gives the tokens
that `yalis.engine.sampler.sample` gives for the same rows; whatever else a request may ask for (filters, penalties,
bias, grammars, log-probabilities) stays with the sampler.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from yalis.engine.sampler import Draw, Gather, SamplingBatch, VocabShard, sample
from yalis.engine.scheduler import ScheduledSequence
from yalis.models.base import CausalLM


@dataclass(frozen=True)
class PlainDraw:
    """How S rows are drawn.

    Attributes:
        temperature: [S] float32; 0 is greedy.
        seeds: [S] int64.
        positions: [S] int64, position of the token to be drawn.
    """

    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor


def is_plain(item: ScheduledSequence, vocab_size: int, eos_token_ids: Collection[int]) -> bool:
    """Whether the row asks for nothing but temperature and seed."""
    p = item.seq.params
    if p.logprobs is not None or p.has_penalties or p.logit_bias or p.guided is not None:
        return False
    if p.min_tokens and item.sample_position - item.seq.num_prompt_tokens < p.min_tokens:
        return False
    return p.greedy or not (0 < p.top_k < vocab_size or p.top_p < 1.0 or p.min_p > 0.0)


def temperature_of(item: ScheduledSequence) -> float:
    """The row's temperature for `PlainDraw`: 0 for every greedy one."""
    params = item.seq.params
    return 0.0 if params.greedy else params.temperature


def draw_plain(
    model: CausalLM, raw: torch.Tensor, draw: PlainDraw, slots: torch.Tensor, last_tokens: torch.Tensor, comm: Gather
) -> torch.Tensor:
    """One token per row, [S] int64, also written to ``last_tokens`` at the row's slot.

    Collective over ``comm``; every rank returns the same.

    Args:
        model: whose logits they are.
        raw: [S, Vs], from `CausalLM.raw_logits`.
        draw: how the rows are drawn.
        slots: [S] int64.
        last_tokens: [slots] int64.
    """
    if raw.is_cuda:
        from yalis.kernels.triton_sampling import best_keys, tokens_of_keys

        keys = best_keys(raw, draw.temperature, draw.seeds, draw.positions, model.vocab_start, model.vocab_valid)
        return tokens_of_keys(best_of_shards(keys, comm), slots, last_tokens)
    drawn = (draw.temperature > 0).nonzero()[:, 0]
    free = Draw(drawn, draw.temperature[drawn, None], draw.seeds[drawn], draw.positions[drawn])
    batch = SamplingBatch(len(raw), free=free if len(drawn) else None)
    vocab = VocabShard(model.vocab_start, model.vocab_shard_size, model.config.vocab_size)
    token_ids = sample(model.widen_logits(raw), batch, vocab, comm).token_ids
    last_tokens.index_copy_(0, slots, token_ids)
    return token_ids


def best_of_shards(keys: torch.Tensor, comm: Gather) -> torch.Tensor:
    """[S, N] int64 keys whose largest in each row is the largest of all shards: of every other shard one key travels.

    Args:
        keys: [S, pieces] of this shard.
    """
    if comm.size == 1:
        return keys
    return comm.all_gather(keys.amax(-1, keepdim=True), dim=-1, tag="sample.argmax")


def feed_tokens(known: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    """``known`` [B] int64, with the token last sampled in the row's slot wherever it is negative: a new tensor."""
    if known.is_cuda:
        from yalis.kernels import triton_sampling

        return triton_sampling.feed_tokens(known, slots, last_tokens)
    return torch.where(known < 0, last_tokens.index_select(0, slots), known)
