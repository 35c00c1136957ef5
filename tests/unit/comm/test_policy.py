"""The choice of an algorithm, without processes; and how messages are divided."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yalis.comm import algorithms, policy
from yalis.comm.policy import GroupShape, candidates, check_forced, choose, plain_name, why_not
from yalis.comm.shards import shard_bounds
from yalis.errors import CommError, ConfigError

ONE_HOST = GroupShape(ranks=4, nodes=1, ranks_per_node=4, device="cpu", shared_memory=True, contiguous=True)
NO_MEMORY = GroupShape(ranks=4, nodes=1, ranks_per_node=4, device="cpu", shared_memory=False, contiguous=True)
TWO_NODES = GroupShape(ranks=4, nodes=2, ranks_per_node=2, device="cpu", shared_memory=True, contiguous=True)
GPUS = GroupShape(ranks=8, nodes=2, ranks_per_node=4, device="cuda", shared_memory=False, contiguous=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "name"),
    [
        (ONE_HOST, torch.bfloat16, "shm"),
        (ONE_HOST, torch.float32, "shm"),
        (ONE_HOST, torch.int64, "torch"),
        (NO_MEMORY, torch.bfloat16, "torch"),
        (TWO_NODES, torch.float16, "rd"),
        (TWO_NODES, torch.float64, "torch"),
        (GPUS, torch.bfloat16, "torch"),
    ],
)
def test_auto(shape: GroupShape, dtype: torch.dtype, name: str) -> None:
    for nbytes in (2, 8192, 1 << 21, 1 << 40):
        assert choose(shape, dtype, nbytes) == name


def test_a_table_decides_by_size() -> None:
    table = [(8192, "shm"), (65536, "rd"), (1 << 62, "torch")]
    assert [choose(ONE_HOST, torch.float32, n, "auto", table) for n in (8192, 8193, 65536, 65537)] == [
        "shm",
        "rd",
        "rd",
        "torch",
    ]
    assert choose(TWO_NODES, torch.float32, 100, "auto", table) == "rd"  # shm cannot serve two nodes
    assert candidates(TWO_NODES, "auto", table) == ("rd", "torch")


def test_forced_is_used_or_refused() -> None:
    assert choose(ONE_HOST, torch.float32, 64, "rd") == "rd"
    with pytest.raises(CommError, match="int64"):
        choose(ONE_HOST, torch.int64, 64, "shm")
    for name, shape, words in (
        ("shm", TWO_NODES, "spans 2"),
        ("shm", NO_MEMORY, "compiler"),
        ("shm", GPUS, "cuda"),
        ("ring", ONE_HOST, "known: auto, torch, rd, shm"),
        ("nccl", ONE_HOST, "serves cuda tensors, not cpu; use gloo or auto"),
        ("gloo", GPUS, "serves cpu tensors, not cuda; use nccl or auto"),
        ("symm_mem", ONE_HOST, "not on cpu"),
        ("symm_mem", GPUS, "inside one host"),
        ("two_shot", ONE_HOST, "not on cpu"),
        ("two_shot", GPUS, "spans 2"),
        ("two_shot", replace(GPUS, nodes=1, ranks_per_node=8), "inside one host"),
        ("two_shot", replace(GPUS, nodes=1, ranks_per_node=8, one_host=True), "not mapped to each other"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_forced(name, shape)
    check_forced("rd", GPUS)
    check_forced("nccl", GPUS)
    check_forced("symm_mem", replace(GPUS, one_host=True))
    assert why_not("symm_mem", replace(GPUS, one_host=True), torch.float16) is not None
    assert (plain_name("nccl", "cuda"), plain_name("gloo", "cpu"), plain_name("shm", "cpu")) == (
        "torch",
        "torch",
        "shm",
    )


@given(
    shape=st.sampled_from([ONE_HOST, NO_MEMORY, TWO_NODES, GPUS]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int32]),
    nbytes=st.integers(0, 1 << 34),
    forced=st.sampled_from(["auto", *policy.ALGORITHMS]),
)
def test_what_is_chosen_was_built_and_can_serve(
    shape: GroupShape, dtype: torch.dtype, nbytes: int, forced: str
) -> None:
    if forced != "auto" and why_not(forced, shape, dtype) is not None:
        return
    name = choose(shape, dtype, nbytes, forced)
    assert why_not(name, shape, dtype) is None
    assert name in candidates(shape, forced)


def test_every_name_has_a_class() -> None:
    assert [algorithms.load(name).name for name in policy.ALGORITHMS] == list(policy.ALGORITHMS)
    with pytest.raises(ConfigError, match="unknown"):
        algorithms.load("ring")


@given(count=st.integers(0, 10_000), parts=st.integers(1, 64))
def test_shards_cover_everything_once_and_differ_by_one(count: int, parts: int) -> None:
    bounds = [shard_bounds(count, parts, i) for i in range(parts)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == count
    assert all(bounds[i][1] == bounds[i + 1][0] for i in range(parts - 1))
    sizes = [end - start for start, end in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_long_messages_of_nvrar() -> None:
    """To two_shot where the GPUs of one node map each other's memory, and sooner; else to torch. Tables may name it."""
    between = replace(GPUS, nvrar_bytes=1 << 22)
    inside = replace(between, nodes=1, ranks_per_node=8)
    mapped = replace(inside, mapped=True, one_host=True)
    for shape, limit, name in ((between, 1 << 22, "torch"), (inside, 1 << 22, "torch"), (mapped, 1 << 21, "two_shot")):
        assert [choose(shape, torch.bfloat16, n, "nvrar") for n in (limit, limit + 2)] == ["nvrar", name]
        assert policy.explain(shape, torch.bfloat16, "nvrar")[0] == (limit, "nvrar")
        assert policy.explain(shape, torch.bfloat16, "nvrar")[-1][1] == name
        assert set(candidates(shape, "nvrar")) == {"nvrar", name, "torch"}
    little = replace(mapped, nvrar_bytes=1 << 20)  # of a caller who wants less
    assert policy.explain(little, torch.bfloat16, "nvrar") == [(1 << 20, "nvrar"), (1 << 62, "two_shot")]
    table = [(1 << 20, "nvrar"), (1 << 62, "two_shot")]
    assert choose(mapped, torch.float32, 1 << 21, "auto", table) == "two_shot"
    assert choose(inside, torch.float32, 1 << 21, "auto", table) == "torch"
    assert choose(mapped, torch.int64, 1 << 21, "auto", table) == "torch"
