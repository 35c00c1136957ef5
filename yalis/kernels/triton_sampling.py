"""Greedy choice and plain draws over a shard of the vocabulary, in two small Triton kernels.

The first turns each piece of a row into one key, an int64 that orders tokens by score and, among equal scores, by
lowest id; the second takes the largest key of each row and reads its token. Scores of drawn rows carry Gumbel noise
from the hash of `yalis.engine.random`, computed here in registers: as torch operations the noise of 32 rows of a large
vocabulary would cost fifteen passes over 16 MiB.
"""

# Triton's kernels are a language of their own, compiled by an untyped decorator; what calls them is typed.
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

# Columns of one program. 63 programs for a row of 128256 tokens.
_PIECE = 2048
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The constants of `yalis.engine.random` as signed integers.
_GOLDEN_64 = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MIX_64_A = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MIX_64_B = tl.constexpr(0x94D049BB133111EB - 2**64)
_GOLDEN_32 = tl.constexpr(0x9E3779B1 - 2**32)
_MIX_32_A = tl.constexpr(0x21F0AAAD)
_MIX_32_B = tl.constexpr(0x735A2D97)


@triton.jit
def _mix_64(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_64_A
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_64_B
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _gumbel(seed, position, token_ids, EXACT_IN_DOUBLE: tl.constexpr):
    x = _mix_64(seed + _GOLDEN_64)
    x = _mix_64(x + position * _MIX_64_B + _GOLDEN_64)
    key_a = x.to(tl.int32)
    key_b = (x >> 32).to(tl.int32)
    h = token_ids * _GOLDEN_32 + key_a
    h = (h ^ ((h >> 16) & 0xFFFF)) * _MIX_32_A
    h = h ^ key_b
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _MIX_32_B
    h = (h ^ ((h >> 15) & 0x1FFFF)) & 0x7FFFFFFF
    u = tl.minimum((h.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    if EXACT_IN_DOUBLE:  # the interpreter knows no libdevice
        inner = tl.log(1.0 - u.to(tl.float64)).to(tl.float32)
        return -tl.log(-inner)
    return -libdevice.log(-libdevice.log1p(-u))


@triton.jit
def _best_keys(
    logits, row_step, temperature, seeds, positions, keys, first_token, size,
    PIECE: tl.constexpr, EXACT_IN_DOUBLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    piece = tl.program_id(1)
    columns = piece * PIECE + tl.arange(0, PIECE)
    inside = columns < size
    scores = tl.load(logits + row.to(tl.int64) * row_step + columns, mask=inside, other=-float("inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    tokens = columns + first_token
    if heat > 0:
        noise = _gumbel(tl.load(seeds + row), tl.load(positions + row), tokens, EXACT_IN_DOUBLE)
        scores = noise + tl.div_rn(scores, heat + tl.zeros_like(scores))
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) + (0xFFFFFFFF - tokens.to(tl.int64))
    key = tl.where(inside, key, -0x8000000000000000)
    tl.store(keys + row * tl.num_programs(1) + piece, tl.max(key, 0))


@triton.jit
def _tokens_of_keys(keys, tokens, slots, last_tokens, count, COUNT: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, COUNT)
    key = tl.load(keys + row * count + columns, mask=columns < count, other=-0x8000000000000000)
    token = 0xFFFFFFFF - (tl.max(key, 0) & 0xFFFFFFFF)
    tl.store(tokens + row, token)
    tl.store(last_tokens + tl.load(slots + row), token)


@triton.jit
def _feed(known, slots, last_tokens, out, count, COUNT: tl.constexpr):
    rows = tl.arange(0, COUNT)
    inside = rows < count
    token = tl.load(known + rows, mask=inside, other=0)
    slot = tl.load(slots + rows, mask=inside, other=0)
    tl.store(out + rows, tl.where(token < 0, tl.load(last_tokens + slot, mask=inside, other=0), token), mask=inside)


def best_keys(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_token: int,
    valid: int,
) -> torch.Tensor:
    """The best key of each piece of each row: the largest score, or the largest score with noise.

    Args:
        logits: [S, Vs], rows contiguous, any float type; NaN is not expected.
        temperature: [S] float32; 0 takes the largest logit, above 0 draws.
        seeds, positions: [S] int64, of the draws.
        first_token: token id of the first column.
        valid: columns that are tokens; the others are not looked at.

    Returns:
        [S, pieces] int64, equally many for shards of one width. Keys of several shards may be joined along the last
        dimension.
    """
    rows, size = logits.shape
    pieces = triton.cdiv(size, _PIECE)
    keys = torch.empty((rows, pieces), dtype=torch.int64, device=logits.device)
    _best_keys[(rows, pieces)](
        logits, logits.stride(0), temperature, seeds, positions, keys, first_token, valid,
        PIECE=_PIECE, EXACT_IN_DOUBLE=_INTERPRETED,
    )  # fmt: skip
    return keys


def tokens_of_keys(keys: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    """The token of the largest key of each row, also written to ``last_tokens`` at the row's slot.

    Args:
        keys: [S, N] contiguous int64.
        slots: [S] int64.
        last_tokens: [slots] int64.

    Returns:
        [S] int64.

    Raises:
        ValueError: ``keys`` is not contiguous.
    """
    if not keys.is_contiguous():
        raise ValueError(f"tokens_of_keys: keys of shape {tuple(keys.shape)} have strides {keys.stride()}; pass a copy")
    rows, count = keys.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=keys.device)
    _tokens_of_keys[(rows,)](keys, tokens, slots, last_tokens, count, COUNT=triton.next_power_of_2(count))
    return tokens


def feed_tokens(known: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    """``known`` [B] int64, with the token last sampled in the row's slot wherever it is negative: a new tensor."""
    out = torch.empty_like(known)
    _feed[(1,)](known, slots, last_tokens, out, len(known), COUNT=triton.next_power_of_2(len(known)))
    return out
