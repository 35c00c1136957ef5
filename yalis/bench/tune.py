"""Measures which algorithm and plan reduce a message fastest, for `yalis.comm.tuning`'s tables.

Every plan is first checked: exact sums of whole numbers, and the same bits on all ranks where sums round. Only then it
is timed; plans take turns, so that a change of the machine's speed meets them all. A sample is the longest over the
ranks; buffers rotate, so that no plan finds its message in a cache that a model would not leave it in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from yalis.bench.allreduce import DTYPES, crafted
from yalis.bench.harness import percentile
from yalis.bench.replay import Captured, time_chain
from yalis.comm import tuning
from yalis.comm.communicator import Communicator
from yalis.comm.nvrar.library import Plan
from yalis.comm.nvrar.link import Link
from yalis.comm.tuning import Row, TunedTable
from yalis.errors import CommError, ConfigError

_BUFFERS = 4
_REPLAYS = 15  # of a captured graph
_TURNS = 5  # on CPU
_EPS = 1e-5


@dataclass(frozen=True)
class Candidate:
    """One way to reduce: ``name`` is what the table will say; ``call(x, out)`` does it."""

    name: str
    plan: Plan | None
    call: Callable[[torch.Tensor, torch.Tensor], object]

    def __str__(self) -> str:
        return self.name if self.plan is None else f"{self.name} {self.plan}"


def candidates(
    link: Link | None, others: Mapping[str, Communicator], dtype: torch.dtype, nbytes: int
) -> list[Candidate]:
    """Everything worth measuring at this size: plans of ``link``, and ``others`` by name."""
    found = []
    if link is not None and nbytes <= link.capacity:
        for plan in tuning.candidate_plans(link.limits, nbytes):
            # The raw call, so that no policy comes between; the plan is bound now.
            found.append(Candidate("nvrar", plan, lambda x, out, plan=plan: link.all_reduce(x, out, plan)))  # type: ignore[misc]
    for name, comm in others.items():
        found.append(Candidate(name, None, lambda x, out, comm=comm: comm.all_reduce(x, out=out)))  # type: ignore[misc]
    return found


def norm_candidates(link: Link, dtype: torch.dtype, nbytes: int, hidden: int) -> list[Candidate]:
    """Plans of the call that is fused with residual and norm; a residual of zeros, so that sums stay in range."""
    rows = nbytes // (hidden * dtype.itemsize)
    weight = torch.ones(hidden, dtype=dtype, device=link.device)
    residuals = [torch.zeros(rows, hidden, dtype=dtype, device=link.device) for _ in range(_BUFFERS)]
    found = []
    for plan in tuning.candidate_norm_plans(link.limits, nbytes, rows):

        def call(x: torch.Tensor, out: torch.Tensor, plan: Plan = plan) -> None:
            residuals.append(residuals.pop(0))  # in turn, as the messages
            link.all_reduce_rmsnorm(x.view(rows, hidden), residuals[0], weight, _EPS, out.view(rows, hidden), plan)

        found.append(Candidate("nvrar", plan, call))
    return found


def verify_norm(pacer: Communicator, link: Link, plan: Plan, dtype: torch.dtype, rows: int, hidden: int) -> str:
    """Why a plan of the fused call must not be used, or an empty string (collective; the same on all ranks).

    The new residual must be exact, and the norm what torch makes of it, within a few units in the last place.
    """
    count, device = rows * hidden, link.device
    expected = torch.zeros(count, device=device)
    for other in range(pacer.size):
        expected += crafted(other, pacer.size, count, dtype, device).float()
    residual = crafted(0, pacer.size, count, dtype, device).view(rows, hidden)
    weight = (1 + torch.arange(hidden, device=device) % 7 / 8).to(dtype)
    wanted = (residual.float().view(-1) + expected).to(dtype).view(rows, hidden)
    x = crafted(pacer.rank, pacer.size, count, dtype, device).view(rows, hidden)
    link.all_reduce_rmsnorm(x, residual, weight, _EPS, x, plan)
    wide = wanted.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(dtype) * weight
    off = (x.float() - normed.float()).abs() > 4 * torch.finfo(dtype).eps * (normed.float().abs() + 1e-3)
    wrong = int((residual != wanted).sum()) + int(off.sum()) + int(x.isnan().sum())
    everyone = pacer.all_gather(torch.tensor([[wrong]], dtype=torch.int64), dim=0)
    return f"{total} wrong elements" if (total := int(everyone.sum())) else ""


def verify(pacer: Communicator, candidate: Candidate, dtype: torch.dtype, count: int, device: torch.device) -> str:
    """Why a candidate must not be used, or an empty string (collective; the same on all ranks)."""
    rank, ranks = pacer.rank, pacer.size
    expected = torch.zeros(count, device=device)
    for other in range(ranks):
        expected += crafted(other, ranks, count, dtype, device).float()
    wrong = 0
    for in_place in (False, True):
        x = crafted(rank, ranks, count, dtype, device)
        out = x if in_place else torch.empty_like(x)
        candidate.call(x, out)
        wrong += int((out.float() != expected).sum())
    generator = torch.Generator().manual_seed(rank)
    noise = torch.randn(count, generator=generator).to(dtype).to(device)
    candidate.call(noise, noise)
    digest = hashlib.sha256(noise.cpu().view(torch.uint8).numpy().tobytes()).digest()[:7]
    mine = torch.tensor([[wrong, int.from_bytes(digest, "big")]], dtype=torch.int64)
    everyone = pacer.all_gather(mine, dim=0)
    total = int(everyone[:, 0].sum())
    if total:
        return f"{total} wrong elements"
    return "" if bool((everyone[:, 1] == everyone[0, 1]).all()) else "bits differ between ranks"


def measure(
    pacer: Communicator, plans: Sequence[Candidate], dtype: torch.dtype, count: int, device: torch.device, iters: int
) -> list[float]:
    """Median over calls of the longest time over ranks, microseconds, for each candidate (collective)."""
    if device.type == "cuda":
        return [_replayed(pacer, plan, dtype, count, device, iters) for plan in plans]
    inputs = [torch.zeros(count, dtype=dtype) for _ in range(_BUFFERS)]
    outputs = [torch.empty_like(x) for x in inputs]
    calls = max(1, iters // _TURNS)
    samples = torch.empty(len(plans), _TURNS, calls, dtype=torch.float64)
    for turn in range(_TURNS):
        for number, plan in enumerate(plans):
            for i in range(-2, calls):  # two to warm up: another candidate ran before
                pacer.barrier()
                start = perf_counter()
                plan.call(inputs[i % _BUFFERS], outputs[i % _BUFFERS])
                if i >= 0:
                    samples[number, turn, i] = perf_counter() - start
    longest = pacer.all_gather(samples.view(1, -1), dim=0).max(dim=0).values.view(len(plans), -1)
    return [percentile(row.tolist(), 0.5) * 1e6 for row in longest]


def _replayed(
    pacer: Communicator, plan: Candidate, dtype: torch.dtype, count: int, device: torch.device, calls: int
) -> float:
    inputs = [torch.zeros(count, dtype=dtype, device=device) for _ in range(_BUFFERS)]
    outputs = [torch.empty_like(x) for x in inputs]
    chain = [partial(plan.call, inputs[i % _BUFFERS], outputs[i % _BUFFERS]) for i in range(calls)]
    replay = Captured(chain, device, align=chain[0])
    try:
        return percentile(time_chain(pacer, replay, calls, iters=_REPLAYS, warmup=2), 0.5) * 1e6
    finally:
        replay.close()


def tune(
    comm: Communicator,
    others: Mapping[str, Communicator],
    pacer: Communicator,
    sizes: Sequence[int],
    dtypes: Sequence[str],
    *,
    iters: int,
    hidden: int = 0,
    emit: Callable[[str], None] = lambda _: None,
) -> tuple[TunedTable, list[str]]:
    """Measure and build the table (collective; the same on all ranks).

    Args:
        comm: over the ranks to tune for, with NVRAR open (``algorithm="nvrar"``).
        others: communicators over the same ranks by the algorithm that each forces.
        pacer: over the same ranks, on CPU: barriers and the gathering of results.
        sizes: bytes, ascending.
        dtypes: names in `yalis.bench.allreduce.DTYPES`.
        iters: timed calls of a candidate.
        hidden: row length, in elements, for which the fused call is measured at sizes of whole rows; 0: not at all.
        emit: takes the lines of the report.

    Returns:
        The table, and what failed its check, one line each.

    Raises:
        ConfigError: a dtype is unknown.
        CommError: at some size nothing passed its check.
        PeerLostError: a rank was lost.
    """
    link = comm.link
    nodes, local = tuning.shape_of(comm.shape)
    rows: dict[str, list[Row]] = {}
    norms: dict[str, list[Row]] = {}
    failures: list[str] = []
    for name in dtypes:
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r}: must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[name]
        rows[name] = []
        norms[name] = []
        row_bytes = hidden * dtype.itemsize
        fused = link is not None and 0 < hidden <= link.max_hidden
        for size in [n for n in sizes if fused and n % row_bytes == 0 and link and n <= link.capacity]:
            assert link is not None
            passed = []
            for candidate in norm_candidates(link, dtype, size, hidden):
                assert candidate.plan is not None
                reason = verify_norm(pacer, link, candidate.plan, dtype, size // row_bytes, hidden)
                if reason:
                    failures.append(f"{name} {size} B with norm, {candidate}: {reason}")
                    emit(f"# WRONG {failures[-1]}")
                else:
                    passed.append(candidate)
            if passed:
                times = measure(pacer, passed, dtype, size // dtype.itemsize, comm.device, iters)
                best = min(range(len(passed)), key=times.__getitem__)
                norms[name].append(Row(size, "nvrar", passed[best].plan, round(times[best], 2), {}))
                emit(f"{name:>9} {size:>9} B  with norm {passed[best]!s:<22} {times[best]:>9.2f} us")
        for size in sizes:
            count = max(1, size // dtype.itemsize)
            good = []
            for candidate in candidates(link, others, dtype, size):
                reason = verify(pacer, candidate, dtype, count, comm.device)
                if reason:
                    failures.append(f"{name} {size} B, {candidate}: {reason}")
                    emit(f"# WRONG {failures[-1]}")
                else:
                    good.append(candidate)
            if not good:
                raise CommError(f"tune: nothing gives right sums of {name} at {size} bytes: {'; '.join(failures)}")
            times = measure(pacer, good, dtype, count, comm.device, iters)
            best = min(range(len(good)), key=times.__getitem__)
            least: dict[str, float] = {}
            for candidate, us in zip(good, times, strict=True):
                least[candidate.name] = min(us, least.get(candidate.name, us))
            chosen = good[best]
            told = {other: round(us, 2) for other, us in least.items() if other != chosen.name}
            rows[name].append(Row(size, chosen.name, chosen.plan, round(times[best], 2), told))
            words = ", ".join(f"{other} {us:.2f}" for other, us in told.items())
            emit(f"{name:>9} {size:>9} B  {chosen!s:<32} {times[best]:>9.2f} us  {words}")
    return TunedTable(tuning.key_for(comm.device, nodes, local), rows, norms), failures
