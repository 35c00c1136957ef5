"""The NVRAR protocol without a GPU: its own C++ source with threads as ranks, under sanitizers, over a hostile network,
in every interleaving of small cases, and with each rule broken once. docs/nvrar.md numbers the rules.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kernels.nvrar.build import ADDRESS, STRICT, THREAD, build, cxx, run
from tests.kernels.nvrar.mutants import MUTANTS, Mutant, caught, program_of

pytestmark = [
    pytest.mark.skipif(cxx() is None, reason="no C++ compiler; install g++ or set CXX"),
    pytest.mark.timeout(280),  # the first test waits for the compiler: two CPU minutes where nothing is in the cache
]

PLAIN = ("-O1", *STRICT)


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead(request: pytest.FixtureRequest) -> None:
    """Compile what the chosen tests need on two cores; each test then finds its program in the cache."""
    chosen = [
        item for item in request.session.items if isinstance(item, pytest.Function) and item.module is request.module
    ]
    mutants = [item.callspec.params["mutant"] for item in chosen if "mutant" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(program_of, mutant) for mutant in mutants]
        if len(chosen) > len(mutants):
            plain = [("host_driver.cpp", flags) for flags in (ADDRESS, THREAD, PLAIN)]
            jobs += [pool.submit(build, source, flags) for source, flags in [*plain, ("explorer.cpp", PLAIN)]]
    for job in jobs:
        job.result()


def expect_ok(program_flags: tuple[str, ...], arguments: str, source: str = "host_driver.cpp") -> str:
    status, output = run(build(source, program_flags), arguments)
    assert status == 0 and output.startswith("ok "), f"{arguments}: status {status}\n{output}"
    return output


def test_conversions_round_to_nearest_even() -> None:
    expect_ok(PLAIN, "numerics")


def test_conditions_of_use_are_checked() -> None:
    expect_ok(PLAIN, "refusals")


@pytest.mark.parametrize("seed", [1, 2])
def test_sums_on_every_shape(seed: int) -> None:
    """16 shapes up to 5x4; algorithm, type, count, grid, alignment and place drawn; nothing but the sum is written."""
    expect_ok(PLAIN, f"direct {seed} 20")


@pytest.mark.parametrize("seed", [1, 2])
def test_residual_and_norm(seed: int) -> None:
    """Fused with residual add and RMSNorm, between other calls: every bit is known."""
    expect_ok(PLAIN, f"norm {seed} 40")


def test_bits_agree_when_sums_round() -> None:
    expect_ok(PLAIN, "bits 1 40")


def test_wrap_of_epochs() -> None:
    expect_ok(PLAIN, "wrap 1 10")


@pytest.mark.parametrize("wire", ["staged", "signals"])
def test_wrap_of_staged_puts(wire: str) -> None:
    """Staged memory keeps cells of the last era; none of them is posted again."""
    expect_ok(PLAIN, f"{wire}-wrap 1 20")


def test_signals_where_cells_are_torn() -> None:
    """A network that tears 8 bytes: puts that end with a signal pass; without one (below) sums are wrong."""
    words = expect_ok(PLAIN, "signals 1 20").split()
    assert int(words[words.index("out") - 1]) > 10000


def test_cells_that_come_again_after_the_sweep() -> None:
    expect_ok(PLAIN, "late-repeat 1 5")


def test_silent_rank() -> None:
    expect_ok(PLAIN, "silent 1 9")


def test_abort() -> None:
    expect_ok(PLAIN, "abort 1 9")


def test_hostile_network() -> None:
    """Cells late, out of order, twice, with stalls; the counts show that the network did that."""
    words = expect_ok(PLAIN, "network 1 20").split()
    assert int(words[words.index("cells") - 1]) > 1000 and int(words[words.index("out") - 1]) > 10000


def test_staged_puts() -> None:
    """Puts between nodes are staged and posted, the network reads what is staged as late as it likes."""
    words = expect_ok(PLAIN, "staged 1 20").split()
    assert int(words[words.index("cells") - 1]) > 1000 and int(words[words.index("out") - 1]) > 10000


def test_hostile_network_without_repeats() -> None:
    """The dense format's conditions of use: any order and delay, but nothing twice."""
    words = expect_ok(PLAIN, "network-dense 1 20").split()
    assert int(words[words.index("cells") - 1]) == 0 and int(words[words.index("out") - 1]) > 10000


@pytest.mark.parametrize("wire", ["data-then-flag", "dense-repeated", "torn"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_network_that_breaks_a_condition_is_caught(wire: str, seed: int) -> None:
    """The same network breaks a format that needs order between two cells, the dense one by repeats, and cells by
    tearing them."""
    status, output = run(build("host_driver.cpp", PLAIN), f"{wire} {seed} 20 5")
    assert status == 1 and "WRONG" in output, output


@pytest.mark.parametrize(
    "arguments",
    [
        "direct-small 1 6",
        "network 1 3",
        "network-dense 1 3",
        "norm 1 6",
        "staged 1 3",
        "silent 1 3",
        "wrap 1 2",
        "staged-wrap 1 1",
        "signals 1 3",
    ],
)
@pytest.mark.parametrize("flags", [THREAD, ADDRESS], ids=["thread", "address"])
def test_sanitizers(flags: tuple[str, ...], arguments: str) -> None:
    expect_ok(flags, arguments)


def test_every_interleaving_of_small_cases() -> None:
    expect_ok(PLAIN, "", "explorer.cpp")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_caught(mutant: Mutant) -> None:
    good, output = caught(mutant)
    assert good, f"{mutant.name} breaks {mutant.breaks}, and {mutant.program} {mutant.arguments} said\n{output}"
