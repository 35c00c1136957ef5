"""All-reduce benchmark: nccl-tests' table and JSON keys; every result is checked exactly before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from yalis.bench.harness import summarize, time_collective
from yalis.comm.algorithms import load
from yalis.comm.communicator import Communicator
from yalis.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Whole numbers up to here are exact in the type, so any order of summation gives the same sum.
_EXACT = {torch.float32: 1 << 24, torch.bfloat16: 256, torch.float16: 2048}


@dataclass(frozen=True)
class Measurement:
    """One placement (out of place or in place) at one size, with nccl-tests' names.

    Attributes:
        time: median over iterations of the longest time over ranks, in microseconds.
        alg_bw, bus_bw: GB/s; bus_bw = alg_bw * 2 (n - 1) / n.
        nwrong: elements, over all ranks, that differ from the exact sum.
        summary: of the samples in microseconds (`yalis.bench.harness.summarize`).
        samples: microseconds, one per iteration.
    """

    time: float
    alg_bw: float
    bus_bw: float
    nwrong: int
    summary: Mapping[str, float]
    samples: Sequence[float] = field(repr=False)


@dataclass(frozen=True)
class Row:
    """One size, dtype and algorithm. ``flat_equivalent``: the algorithm does not move what a flat ring would."""

    size: int
    count: int
    type: str
    algorithm: str
    flat_equivalent: bool
    out_of_place: Measurement
    in_place: Measurement

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without raw samples."""
        row = asdict(self)
        for place in ("out_of_place", "in_place"):
            del row[place]["samples"]
        return row | {"redop": "sum", "root": -1}


def message_sizes(begin: int, end: int, factor: float) -> list[int]:
    """Sizes in bytes from ``begin``, each ``factor`` times the one before, up to ``end``.

    Raises:
        ConfigError: no size would come out, or it would not end.
    """
    if begin < 4 or end < begin:
        raise ConfigError(
            f"message sizes from {begin} to {end} bytes: the first must be 4 or more, the last not below it"
        )
    if factor <= 1:
        raise ConfigError(f"step factor {factor:g}: must be above 1")
    sizes = []
    size = float(begin)
    while size <= end:
        sizes.append(int(size) // 4 * 4)
        size *= factor
    return list(dict.fromkeys(sizes))


def crafted(rank: int, ranks: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rank ``rank``'s input [count]: whole numbers that depend on rank and position; every partial sum is exact.

    Raises:
        ConfigError: so many ranks leave no room for exact sums in this dtype.
    """
    modulus = min(17, _EXACT[dtype] // ranks + 1)
    if modulus < 2:
        raise ConfigError(f"{ranks} ranks: sums of {dtype} cannot be checked exactly beyond {_EXACT[dtype]} ranks")
    position = torch.arange(count, dtype=torch.int64, device=device)
    return ((position * (rank % 7 + 3) + position // 13 + rank * 5) % modulus).to(dtype)


def count_wrong(comm: Communicator, count: int, dtype: torch.dtype, in_place: bool) -> int:
    """Elements, over all ranks, at which one all-reduce differs from the exact sum (collective)."""
    x = crafted(comm.rank, comm.size, count, dtype, comm.device)
    expected = torch.zeros(count, dtype=torch.float32, device=comm.device)
    for rank in range(comm.size):
        expected += crafted(rank, comm.size, count, dtype, comm.device).float()
    out = x if in_place else torch.full_like(x, -1)
    comm.all_reduce(x, out=out, tag="bench")
    mine = (out.float() != expected).sum().to(torch.int64).reshape(1)
    return int(comm.all_gather(mine, dim=0).sum())


def measure(comm: Communicator, size: int, dtype: torch.dtype, *, iters: int, warmup: int) -> Row:
    """Check, then time, one size in both placements (collective)."""
    count = max(1, size // dtype.itemsize)
    nbytes = count * dtype.itemsize
    places = []
    for in_place in (False, True):
        wrong = count_wrong(comm, count, dtype, in_place)
        x = torch.zeros(count, dtype=dtype, device=comm.device)
        out = x if in_place else torch.empty_like(x)
        samples = time_collective(comm, lambda x=x, out=out: comm.all_reduce(x, out=out), iters=iters, warmup=warmup)  # type: ignore[misc]
        micros = [s * 1e6 for s in samples]
        summary = summarize(micros)
        alg_bw = nbytes / summary["median"] / 1e3
        bus_bw = alg_bw * 2 * (comm.size - 1) / comm.size
        places.append(Measurement(summary["median"], alg_bw, bus_bw, wrong, summary, micros))
    name = comm.choice(dtype, nbytes) if comm.size > 1 else "none"
    flat = comm.size > 1 and load(name).flat_equivalent
    return Row(nbytes, count, str(dtype).removeprefix("torch."), name, flat, places[0], places[1])


def run_allreduce_bench(
    comms: Sequence[Communicator],
    sizes: Sequence[int],
    dtypes: Sequence[str],
    *,
    iters: int,
    warmup: int,
    emit: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure every communicator (one per algorithm, same group) at every size and dtype (collective).

    Args:
        comms: communicators over the same ranks, such as one per forced algorithm; they take turns at each size.
        sizes: bytes.
        dtypes: names in `DTYPES`.
        iters: timed calls per row; warmup: calls before them.
        emit: takes the lines of the table as they come (rank 0 prints them).

    Returns:
        The rows, equal on all ranks.

    Raises:
        ConfigError: a dtype is unknown.
        PeerLostError: a rank was lost.
    """
    for name in dtypes:
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r}: must be one of {', '.join(DTYPES)}")
    first = comms[0]
    emit(
        f"# all_reduce: {first.size} ranks on {first.shape.nodes} node(s), {first.device.type}; {iters} iterations, "
        f"{warmup} warm-up; time: median of the longest over ranks"
    )
    emit(_HEADER)
    rows = []
    for dtype in dtypes:
        for size in sizes:
            for comm in comms:
                rows.append(measure(comm, size, DTYPES[dtype], iters=iters, warmup=warmup))
                emit(format_row(rows[-1]))
    for line in trailer(rows):
        emit(line)
    return rows


_HEADER = (
    f"# {'':>10} {'':>10} {'':>9} {'':>6} {'':>5} {'':>8} |{'out-of-place':^40}|{'in-place':^40}\n"
    f"# {'size':>10} {'count':>10} {'type':>9} {'redop':>6} {'root':>5} {'algo':>8} |"
    + "|".join(f" {'time':>10} {'algbw':>9} {'busbw':>9} {'#wrong':>7} " for _ in range(2))
    + f"\n# {'(B)':>10} {'(elements)':>10} {'':>9} {'':>6} {'':>5} {'':>8} |"
    + "|".join(f" {'(us)':>10} {'(GB/s)':>9} {'(GB/s)':>9} {'':>7} " for _ in range(2))
)


def format_row(row: Row) -> str:
    """One line of the table; a star marks a flat-ring equivalent bus bandwidth."""
    cells = "|".join(
        f" {m.time:>10.2f} {m.alg_bw:>9.2f} {m.bus_bw:>8.2f}{'*' if row.flat_equivalent else ' '} {m.nwrong:>7} "
        for m in (row.out_of_place, row.in_place)
    )
    return f"  {row.size:>10} {row.count:>10} {row.type:>9} {'sum':>6} {-1:>5} {row.algorithm:>8} |{cells}"


def trailer(rows: Sequence[Row]) -> list[str]:
    """The closing lines: wrong values and average bus bandwidth, as nccl-tests prints them."""
    wrong = sum(row.out_of_place.nwrong + row.in_place.nwrong for row in rows)
    bandwidths = [m.bus_bw for row in rows for m in (row.out_of_place, row.in_place)]
    lines = []
    if any(row.flat_equivalent for row in rows):
        lines.append("# * flat-ring equivalent: what a flat ring would have to carry, not what this algorithm carries")
    lines.append(f"# Out of bounds values : {wrong} {'OK' if wrong == 0 else 'FAILED'}")
    lines.append(f"# Avg bus bandwidth    : {sum(bandwidths) / len(bandwidths):.4f}")
    return lines
