"""Declaring an emulated network."""

from __future__ import annotations

import time

import pytest

from yalis.comm.emulation import VARIABLE, EmulatedFabric, FabricEnd
from yalis.errors import ConfigError


def test_parse() -> None:
    fabric = EmulatedFabric.parse("alpha_s=0.002,bytes_per_s=1e8,loss=0.01,retransmit_s=0.02,late=3:0.05+1:0.01,seed=7")
    assert fabric == EmulatedFabric(0.002, 1e-8, 0.01, 0.02, {3: 0.05, 1: 0.01}, 7)
    assert "2000 us, 100 MB/s, 1.00% lost" in str(fabric)
    assert EmulatedFabric.from_environment({}) is None
    assert EmulatedFabric.from_environment({VARIABLE: "alpha_s=1"}) == EmulatedFabric(1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed=3", "'speed' is unknown; known: alpha_s"),
        ("alpha_s=fast", "'alpha_s=fast' is no number"),
        ("late=3", "RANK:SECONDS"),
        ("alpha_s=-1", "alpha_s=-1.0: must be 0 to 10"),
        ("loss=1", "loss=1.0: must be 0 to 0.9"),
        ("bytes_per_s=-1", "bytes_per_s=-1"),
        ("late=0:99", "late=0:99.0"),
    ],
)
def test_wrong_words_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EmulatedFabric.parse(text)


def test_arrival_counts_from_when_both_were_ready() -> None:
    end = FabricEnd(EmulatedFabric(alpha_s=0.05), rank=0)
    start = time.perf_counter()
    end.arrive([8], start)
    assert 0.05 <= time.perf_counter() - start < 0.2
    start = time.perf_counter()
    end.arrive([8], start - 0.05)  # was ready long ago
    assert time.perf_counter() - start < 0.025


def test_the_last_of_several_messages_counts_and_not_their_sum() -> None:
    end = FabricEnd(EmulatedFabric(alpha_s=0.02, s_per_byte=1e-6), rank=0)
    start = time.perf_counter()
    end.arrive([1000, 40_000, 10], start)
    assert 0.06 <= time.perf_counter() - start < 0.08
    end.arrive([], start)  # nothing to wait for
