"""Random numbers without state: a hash of (seed, position, token id), the same on every rank and in every batch.

A draw depends on nothing else, so a token does not change with tensor parallelism (each rank hashes only its own token
ids), with the other rows of a batch, or when a preempted sequence is computed again. The hash is integer arithmetic
with wrap-around in torch operations, so CPU and GPU agree bit for bit; only the two logarithms that shape the noise may
differ in the last place.
"""

from __future__ import annotations

import hashlib

import torch

_INT64_MASK = 2**64 - 1
# Odd constants with well-spread bits: the golden ratio's fraction and the multipliers of two bijective mixers.
_GOLDEN_64 = 0x9E3779B97F4A7C15
_MIX_64_A = 0xBF58476D1CE4E5B9
_MIX_64_B = 0x94D049BB133111EB
_GOLDEN_32 = 0x9E3779B1
_MIX_32_A = 0x21F0AAAD
_MIX_32_B = 0x735A2D97

# Elements hashed at a time on the CPU. The temporaries of a piece stay in the second-level cache (8 x 152000 noise on
# one thread: 4.6 ms in pieces, 9.4 ms at once), and torch starts no threads for so few elements.
_CPU_PIECE = 32768


def request_seed(engine_seed: int, request: int | str, sample_index: int = 0, user_seed: int | None = None) -> int:
    """Seed of sample ``sample_index`` of a request, in [0, 2**63).

    Args:
        engine_seed: the engine's own seed; not looked at when the user gave one.
        request: the request's number or name; not looked at when the user gave a seed, so that the same request with
            the same seed gives the same tokens again.
        sample_index: which of its ``n`` samples.
        user_seed: `SamplingParams.seed`.
    """
    if user_seed is not None:
        key = f"user {user_seed} {sample_index}"
    else:
        key = f"engine {engine_seed} {type(request).__name__} {request!r} {sample_index}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def random_bits(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """31 random bits for each (seed, position, token id).

    Args:
        seeds: [B] int64.
        positions: [B] int64, at least 0.
        token_ids: [V] (the same for every row) or [B, V], int32 or int64, at least 0.

    Returns:
        [B, V] int32 in [0, 2**31).
    """
    key_a, key_b = _row_keys(seeds, positions)
    return _mix_tokens(key_a[:, None], key_b[:, None], token_ids.to(torch.int32))


def gumbel_at(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for given token ids; arguments as `random_bits`. Returns [B, V] float32, finite."""
    return _to_gumbel(random_bits(seeds, positions, token_ids))


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab_start: int, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise for the token ids ``vocab_start .. vocab_start + vocab_size``.

    The arg max of ``logits / temperature + gumbel`` is a draw from the softmax, and an arg max splits over shards.

    Args:
        seeds: [B] int64.
        positions: [B] int64, position of the token to be drawn.

    Returns:
        [B, vocab_size] float32, finite, in about [-2.9, 22.2].
    """
    token_ids = torch.arange(vocab_start, vocab_start + vocab_size, dtype=torch.int32, device=seeds.device)
    if seeds.device.type != "cpu":
        return gumbel_at(seeds, positions, token_ids)
    key_a, key_b = _row_keys(seeds, positions)
    noise = torch.empty(len(seeds), vocab_size, dtype=torch.float32)
    for row in range(len(seeds)):
        for start in range(0, vocab_size, _CPU_PIECE):
            piece = slice(start, start + _CPU_PIECE)
            noise[row, piece] = _to_gumbel(_mix_tokens(key_a[row], key_b[row], token_ids[piece]))
    return noise


def _signed(value: int, bits: int) -> int:
    """The same ``bits`` as a signed integer, as torch wants its scalars."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _shift_right_64(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Logical shift: torch's own copies the sign."""
    return (x >> shift) & (_INT64_MASK >> shift)


def _row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit words per row from 64-bit mixing of seed, then position; each [B] int32."""
    x = seeds.to(torch.int64)
    for word in (0, positions):
        x = x + word * _signed(_MIX_64_B, 64) + _signed(_GOLDEN_64, 64)
        x = (x ^ _shift_right_64(x, 30)) * _signed(_MIX_64_A, 64)
        x = (x ^ _shift_right_64(x, 27)) * _signed(_MIX_64_B, 64)
        x = x ^ _shift_right_64(x, 31)
    return _low_word(x), _low_word(_shift_right_64(x, 32))


def _low_word(x: torch.Tensor) -> torch.Tensor:
    # Fold into the signed range before narrowing: what a narrowing cast does beyond it is nobody's promise.
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def _mix_tokens(key_a: torch.Tensor, key_b: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Hash int32 ``token_ids`` under the row's two words into 31 bits.

    The second word enters between two multiplications: with the first alone, the noise of one row would be a shifted
    copy of another's wherever their words are close.
    """
    x = token_ids * _signed(_GOLDEN_32, 32) + key_a
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(_MIX_32_A, 32)
    x ^= key_b
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(_MIX_32_B, 32)
    x ^= (x >> 15) & 0x1FFFF
    return x & 0x7FFFFFFF


def _to_gumbel(bits: torch.Tensor) -> torch.Tensor:
    """-log(-log(1 - u)) of u = (bits + 1/2) / 2**31.

    Large noise, which decides draws, comes from small u, where float32 is finest; u stays below 1, so noise is finite.
    """
    u = bits.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
