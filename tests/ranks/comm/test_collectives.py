"""Collectives over many world shapes: right sums, equal bits, failures that end and name the culprit."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ranks.comm import work
from tests.ranks.comm.rank_pool import RankPool

# No deadline: the ranks share two cores with whatever else runs. Derandomised: a failure in CI must come back.
QUICK = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": [HealthCheck.too_slow]}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(15) as ranks:
        yield ranks
    assert leftovers() == []


def leftovers() -> list[Path]:
    return sorted(Path("/dev/shm").glob("yalis-*"))


@st.composite
def examples(draw: st.DrawFn) -> work.Example:
    nodes, per_node = draw(st.tuples(st.integers(1, 5), st.integers(1, 3)).filter(lambda s: s != (1, 1)))
    algorithm = draw(st.sampled_from(["rd", "rd", "torch"] + ["nvrar"] * 3 + ["shm"] * 3 * (nodes == 1)))
    # Around the largest one-shot message and around slots, for 2 and 3 ranks in 2 and 4 byte elements.
    edges = [8191, 8192, 8193, 16384, 16385, 32769, 65537, 87381, 131073]
    count = draw(st.integers(0, 4097) | (st.sampled_from(edges) if nodes == 1 or algorithm == "nvrar" else st.just(17)))
    return work.Example(
        nodes=nodes,
        per_node=per_node,
        algorithm=algorithm,
        dtype=draw(st.sampled_from(sorted(work.DTYPES))),
        count=count,
        in_place=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "offset", "strided", "transposed"])),
        seed=draw(st.integers(0, 1000)),
        memory=draw(st.booleans()) or algorithm != "rd",
    )


def check(pool: RankPool, example: work.Example) -> None:
    results = pool.run(example.ranks, work.all_reduce, example)
    assert len({digest for digest, _ in results}) == 1, "the ranks got different bits"
    assert max(worst for _, worst in results) <= 1.0


@settings(max_examples=250, **QUICK)
@given(example=examples())
def test_sum_is_right_and_bitwise_equal(pool: RankPool, example: work.Example) -> None:
    check(pool, example)


@pytest.mark.parametrize("algorithm", ["rd", "nvrar"])
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("per_node", [1, 2, 3])
def test_every_world_shape(pool: RankPool, nodes: int, per_node: int, algorithm: str) -> None:
    if nodes * per_node > 1:
        seed = nodes * 10 + per_node
        check(pool, work.Example(nodes, per_node, algorithm, "bfloat16", 1037, False, "contiguous", seed))


_OPERATIONS = st.tuples(
    st.sampled_from(["all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"]),
    st.integers(1, 2200) | st.sampled_from([1, 2, 3, 4, 5, 31, 32, 33, 255, 256, 257]),
    st.sampled_from(sorted(work.DTYPES)),
    st.integers(0, 9),
)


@settings(max_examples=60, **QUICK)
@given(
    ranks=st.integers(2, 5),
    capacity=st.sampled_from([512, 1024, 4096]),
    first_stage=st.sampled_from([0, 1, 2**32 - 2, 2**31 - 3]),
    script=st.lists(_OPERATIONS, min_size=1, max_size=12),
)
def test_any_row_of_operations_through_small_slots(
    pool: RankPool, ranks: int, capacity: int, first_stage: int, script: list[tuple[str, int, str, int]]
) -> None:
    pool.run(ranks, work.segment_script, ranks, capacity, first_stage, script)


@pytest.mark.parametrize(("ranks", "rounds", "count"), [(2, 4000, 512), (4, 1500, 2048), (3, 300, 40000)])
def test_back_to_back_calls_never_mix(pool: RankPool, ranks: int, rounds: int, count: int) -> None:
    assert pool.run(ranks, work.back_to_back, ranks, rounds, count) == [0] * ranks


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (1, 3), (2, 2), (3, 1)])
def test_other_collectives(pool: RankPool, nodes: int, per_node: int) -> None:
    pool.run(nodes * per_node, work.others, nodes, per_node)


@settings(max_examples=60, **QUICK)
@given(
    count=st.integers(2, 3),
    ring=st.sampled_from([(64, 0), (256, 2**32 - 320), (4096, 2**32 - 4096), (1 << 20, 0)]),
    sizes=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 20_000)), min_size=1, max_size=5),
    plan=st.lists(st.integers(0, 30), min_size=1, max_size=12),
)
def test_messages_arrive_whole_and_in_order(
    pool: RankPool, count: int, ring: tuple[int, int], sizes: list[int], plan: list[int]
) -> None:
    """Shorter and longer than the ring, over the end of it, over the wrap of its counters, in any mixture."""
    pool.run(count, work.messages, count, *ring, sizes, plan)


def test_statistics_tell_the_tiers_apart(pool: RankPool) -> None:
    for stats in pool.run(2, work.stats_and_bits, 1, 2):
        assert (stats["intra"]["calls"], stats["intra"]["bytes"]) == (1, 4000)
        assert stats["inter"]["calls"] == stats["flat"]["calls"] == 0
        assert 0 < stats["intra"]["seconds"] < 20
    for stats in pool.run(4, work.stats_and_bits, 2, 2):
        assert (stats["intra"]["calls"], stats["intra"]["bytes"]) == (2, 8000)
        assert (stats["inter"]["calls"], stats["inter"]["bytes"]) == (1, 2000)
        assert stats["inter"]["seconds"] > 0


def test_uneven_group_and_second_generation(pool: RankPool) -> None:
    members = [0, 1, 3]
    pool.start(members, work.uneven)
    assert pool.collect(members) == [[1011.0, 1011.0]] * 3


def test_call_site_is_a_profiler_range(pool: RankPool) -> None:
    assert pool.run(2, work.profiled) == [True, True]


def test_misuse_is_refused_by_name(pool: RankPool) -> None:
    for said in pool.run(2, work.refuse):
        assert len(said) == 7
        assert "float32[5]" in said[0]
        assert "float64" in said[1]
        assert "src=2" in said[2]
        assert "not contiguous" in said[3]
        assert "not a world rank" in said[4]
        assert "shape and dtype" in said[5]
        assert "dim=1" in said[6]


def test_ranks_fall_back_together_without_a_compiler(pool: RankPool) -> None:
    for names, result, refusal in pool.run(2, work.no_compiler):
        assert (names, result) == ("torch", 2.0)
        assert "rank 1" in refusal
        assert "install gcc" in refusal


# ---- failures: every one in processes of its own --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "per_node", "algorithm", "operation", "named"),
    [
        (1, 3, "shm", "all_reduce", True),
        (1, 2, "shm", "barrier", True),
        (2, 1, "rd", "all_reduce", True),
        (1, 3, "nvrar", "all_reduce", True),
        (2, 1, "nvrar", "all_reduce", True),
        (1, 2, "torch", "recv", True),
        (1, 2, "torch", "all_reduce", False),
    ],
)
def test_a_rank_that_does_not_come_is_named_in_time(
    nodes: int, per_node: int, algorithm: str, operation: str, named: bool
) -> None:
    size = nodes * per_node
    with RankPool(size) as ranks:
        ranks.run(size, work.make, nodes, per_node, algorithm, 1.0)
        waiting = [r for r in range(size) if r != 1]
        ranks.start(waiting, work.wait_alone, operation)
        for result in ranks.collect(waiting, 20):
            assert work.lost(result)
            assert result["stays_broken"]
            assert 0.9 < result["seconds"] < 6
            assert operation.replace("all_reduce", "allreduce") in result["waiting_for"]
            if named:
                assert result["rank"] == 1
                assert result["host"] == socket.gethostname()
                assert "rank 1" in result["words"]
            if operation == "all_reduce":
                assert result["waiting_for"] == f"L3.mlp.down/allreduce[{algorithm},64B]"
    assert leftovers() == []


@pytest.mark.parametrize("operation", ["recv", "send"])
@pytest.mark.parametrize("how", ["absent", "stopped", "killed"])
def test_a_message_whose_peer_is_gone(how: str, operation: str) -> None:
    """Shared memory between two ranks of a node: named, within the deadline, and at once where the process ended."""
    with RankPool(2) as ranks:
        ranks.run(2, work.make, 1, 2, "auto", 15.0 if how == "killed" else 2.0)
        if how == "stopped":
            os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        ranks.start([0], work.wait_alone, operation)
        if how == "killed":
            ranks.kill(1)
        result = ranks.collect([0], 30)[0]
        assert work.lost(result)
        assert result["rank"] == 1
        assert result["stays_broken"]
        assert ("ended" if how == "killed" else "silent") in result["words"]
        assert result["seconds"] < 10
        assert f"stage1/{operation}[" in result["waiting_for"]
    assert leftovers() == []


def test_a_message_of_another_size() -> None:
    with RankPool(2) as ranks:
        ranks.run(2, work.make, 1, 2, "auto", 5.0)
        result = ranks.run(2, work.other_message)[0]
        assert result["kind"] == "CommError"
        assert "rank 1 sent a message of 24 bytes where rank 0 expects 16" in result["words"]


@pytest.mark.parametrize(
    ("nodes", "per_node", "algorithm"),
    [(1, 3, "shm"), (3, 1, "rd"), (1, 3, "torch"), (1, 3, "nvrar"), (3, 1, "nvrar")],
)
def test_a_killed_rank_ends_the_wait_at_once(nodes: int, per_node: int, algorithm: str) -> None:
    size = nodes * per_node
    with RankPool(size) as ranks:
        ranks.run(size, work.make, nodes, per_node, algorithm, 15.0)
        ranks.start([0, 1], work.wait_alone)
        ranks.kill(2)
        first = ranks.collect([0], 14)[0]
        assert work.lost(first)
        assert first["seconds"] < 5
        if algorithm in ("shm", "nvrar"):
            assert first["rank"] == 2
            assert "ended" in first["words"]
    assert leftovers() == []


def test_ranks_that_disagree_are_told_so() -> None:
    with RankPool(2) as ranks:
        ranks.run(2, work.make, 1, 2, "shm", 5.0)
        for result in ranks.run(2, work.other_size):
            assert result["kind"] == "CommError"
            assert "another call" in result["words"]
            assert result["seconds"] < 4


@pytest.mark.parametrize("algorithm", ["auto", "nvrar"])
def test_a_verdict_ends_the_wait(algorithm: str) -> None:
    with RankPool(2) as ranks:
        result = ranks.run(2, work.raise_flag, algorithm)[0]
        assert work.lost(result)
        assert 0.1 < result["seconds"] < 5
        assert ("verdict" if algorithm == "auto" else "aborted") in result["words"]


def test_a_rank_that_never_starts_is_named() -> None:
    with RankPool(2) as ranks:
        ranks.start([0], work.join_alone)
        result = ranks.collect([0], 20)[0]
        assert (result["rank"], result["seconds"] < 6) == (1, True)
        assert "rank 1 did not come" in result["words"]
