"""What the tests of NVRAR's host library run inside the ranks."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.ranks.comm.rank_pool import Rank
from tests.ranks.comm.work import DTYPES, FlagGuard, communicator, outcome, values
from yalis.comm import tuning
from yalis.comm.communicator import Communicator
from yalis.comm.group import Group
from yalis.comm.nvrar import link as nvrar_link
from yalis.comm.nvrar.library import Plan
from yalis.comm.nvrar.link import Link
from yalis.comm.topology import Topology
from yalis.comm.tuning import Row, TunedTable
from yalis.errors import BuildError, CommError, ConfigError

Script = list[tuple[str, str, int, str, int, bool]]  # algorithm, format, blocks, dtype, count, in place


def link_script(me: Rank, nodes: int, per_node: int, blocks: int, max_bytes: int, script: Script) -> list[str]:
    """Calls of many plans on one link; asserts sums of whole numbers, returns digests of sums that round."""
    ranks = nodes * per_node
    group = Group(Topology(me.rank, ranks, per_node), range(ranks), torch.device("cpu"), 20.0)
    group.connect(me.store, "gloo")
    link = Link.connect(group, None, max_bytes=max_bytes, blocks=blocks)
    digests = []
    for number, (algorithm, format_name, grid, dtype_name, count, in_place) in enumerate(script):
        dtype, plan = DTYPES[dtype_name], Plan(algorithm, format_name, grid, 1)
        if number % (ranks + 1) == me.rank:
            time.sleep(0.001)  # one rank late, now and then
        position = torch.arange(count)
        whole = [((position * (r % 5 + 2) + r) % 11 - 5).to(dtype) for r in range(ranks)]
        x = whole[me.rank].clone()
        out = x if in_place else torch.empty_like(x)
        link.all_reduce(x, out, plan)
        assert torch.equal(out.float(), torch.stack([w.float() for w in whole]).sum(0)), script[number]
        if not in_place:
            assert torch.equal(x, whole[me.rank])
        rounding = values(number, me.rank, count, dtype)
        link.all_reduce(rounding, rounding, plan)
        digests.append(hashlib.sha256(rounding.view(torch.uint8).numpy().tobytes()).hexdigest())
    group.exchange("finished", "yes")
    assert link.failed() is None
    link.close()
    group.close()
    return digests


def stamps(me: Rank, delay_s: float) -> tuple[int, list[tuple[float, float]]]:
    """Calls that a fresh link has noted, and (wait, transfer) of calls to which rank 0 came ``delay_s`` late."""
    group = Group(Topology(me.rank, 2, 2), range(2), torch.device("cpu"), 20.0)
    group.connect(me.store, "gloo")
    link = Link.connect(group, None)
    x, calls = torch.ones(4096), 5
    before = len(link.stamps())
    for number in range(calls):
        group.exchange(f"turn-{number}", "")
        if me.rank == 0:
            time.sleep(delay_s)
        link.all_reduce(x, torch.empty_like(x))
    found = [(s.wait_s, s.transfer_s) for s in link.stamps()]
    group.exchange("finished", "yes")
    link.close()
    group.close()
    return before, found


def special(me: Rank, dtype_name: str, format_name: str) -> None:
    """Every bit pattern of a 16-bit type plus another: as torch rounds; NaNs become one."""
    comm, dtype = communicator(me, 1, 2, "nvrar"), DTYPES[dtype_name]
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    both = [patterns.to(torch.int16).view(dtype), (patterns * 40503 + 12345).to(torch.int16).view(dtype)]
    expected = (both[0].float() + both[1].float()).to(dtype)
    bits = torch.where(expected.isnan(), torch.tensor(0x7FFF, dtype=torch.int16), expected.view(torch.int16))
    out = torch.empty_like(expected)
    assert comm.link is not None
    comm.link.all_reduce(both[me.rank], out, Plan("one_shot", format_name, 1, 1))
    wrong = (out.view(torch.int16) != bits).nonzero()
    assert len(wrong) == 0, (len(wrong), [b[wrong[0]] for b in both], out[wrong[0]], expected[wrong[0]])


def norm(me: Rank, nodes: int, per_node: int, dtype_name: str, rows: int, hidden: int) -> tuple[str, dict[str, Any]]:
    """The fused call against its three steps; a digest of its result and what was counted."""
    comm, dtype = communicator(me, nodes, per_node, "nvrar"), DTYPES[dtype_name]
    comm.stats.reset()
    x = values(1, me.rank, rows * hidden, dtype).view(rows, hidden)
    residual = values(2, 77, rows * hidden, dtype).view(rows, hidden)
    weight = values(3, 78, hidden, dtype)
    kept = residual + comm.all_reduce(x.clone())
    wide = kept.float()
    expected = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    normed, fresh = comm.all_reduce_rmsnorm(x.clone(), residual.clone(), weight, 1e-5, tag="norm")
    assert torch.equal(fresh, kept)
    torch.testing.assert_close(normed, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    return hashlib.sha256(normed.view(torch.uint8).numpy().tobytes()).hexdigest(), comm.stats.algorithms


def capacity(me: Rank) -> tuple[list[str], dict[str, list[int]], float]:
    """Forced nvrar with little memory: what is above goes to torch, and this can be seen."""
    topology = Topology(me.rank, 2, 2)
    comm = Communicator.create(topology, [0, 1], algorithm="nvrar", timeout_s=20, store=me.store, nvrar_bytes=8192)
    comm.all_reduce(torch.ones(2048))
    total = comm.all_reduce(torch.ones(2049))
    told, counted = comm.explain(torch.float32), dict(comm.stats.algorithms)
    comm.close()
    return told, counted, float(total.sum())


def compiled(me: Rank) -> dict[str, bool]:
    """The same layer with and without torch.compile, all operators in one graph."""
    comm = communicator(me, 1, 2, "nvrar")

    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = comm.all_reduce(x * 2) + 1
        comm.all_reduce(total, out=total)
        other = torch.empty_like(total)
        comm.all_reduce(total, out=other)
        normed, hidden = comm.all_reduce_rmsnorm(other, residual, weight, 1e-5)
        return total, normed, hidden

    x = values(1, me.rank, 128, torch.float32).view(2, 64)
    residual, weight = values(2, 9, 128, torch.float32).view(2, 64), values(3, 9, 64, torch.float32)
    plain = layer(x, residual.clone(), weight)
    graph = torch.compile(layer, backend="aot_eager", fullgraph=True)
    fast = graph(x, residual.clone(), weight)
    same = {name: torch.equal(a, b) for name, a, b in zip(("total", "normed", "hidden"), plain, fast, strict=True)}
    y = x.clone()
    torch.ops.yalis.nvrar_all_reduce_(y, comm._token)
    z, kept = x.clone(), residual.clone()
    torch.ops.yalis.nvrar_all_reduce_rmsnorm_(z, kept, weight, 1e-5, comm._token)
    normed, hidden = comm.all_reduce_rmsnorm(x.clone(), residual.clone(), weight, 1e-5)
    same |= {"in place": torch.equal(y, comm.all_reduce(x)), "norm in place": torch.equal(z, normed)}
    same["residual in place"] = torch.equal(kept, hidden)
    checks = ("test_schema", "test_faketensor")  # by torch: mutations as declared, fakes like the real ones
    for name, arguments in (
        ("nvrar_all_reduce", (x, comm._token)),
        ("nvrar_all_reduce_", (x.clone(), comm._token)),
        ("nvrar_all_reduce_out", (x, torch.empty_like(x), comm._token)),
        ("nvrar_all_reduce_rmsnorm", (x, residual, weight, 1e-5, comm._token)),
        ("nvrar_all_reduce_rmsnorm_", (x.clone(), residual.clone(), weight, 1e-5, comm._token)),
    ):
        torch.library.opcheck(getattr(torch.ops.yalis, name).default, arguments, test_utils=checks)
    return same


def disagree(me: Rank, what: str) -> str:
    """Rank 1 differs in version or sources; what every rank is told."""
    import yalis

    topology = Topology(me.rank, 2, 2)
    changed = patch.object(yalis, "__version__", "9.9") if what == "version" else patch.object(
        nvrar_link, "source_digest", lambda: "0123"
    )  # fmt: skip
    try:
        if me.rank == 1:
            with changed:
                Communicator.create(topology, [0, 1], algorithm="nvrar", timeout_s=20, store=me.store)
        else:
            Communicator.create(topology, [0, 1], algorithm="nvrar", timeout_s=20, store=me.store)
    except ConfigError as error:
        return str(error)
    return "accepted"


def tuned(me: Rank, folder: str) -> tuple[list[str], tuple[str, ...], list[str]]:
    """Rank 0 alone finds a table; all follow it."""
    table = TunedTable(
        tuning.key_for(torch.device("cpu"), 1, 2),
        {
            "bfloat16": [
                Row(4096, "nvrar", Plan("one_shot", "cells", 1, 1), 1.0, {}),
                Row(65536, "torch", None, 1.0, {}),
            ]
        },
    )
    path = Path(folder) / "table.json"
    if me.rank == 0:
        tuning.save(table, path)
    comm = Communicator.create(
        Topology(me.rank, 2, 2), [0, 1], timeout_s=20, store=me.store, tuned=path if me.rank == 0 else Path("/nowhere")
    )
    used = []
    for count in (8, 2048, 2049, 32768, 32769):
        comm.stats.reset()
        comm.all_reduce(torch.ones(count, dtype=torch.bfloat16))
        used += list(comm.stats.algorithms)
    told = comm.explain(torch.bfloat16)
    names = comm.algorithms
    comm.close()
    return used, names, told


def no_cxx(me: Rank) -> tuple[float, str]:
    """Rank 1 has no C++ compiler: a table that asks for nvrar is followed as far as possible, forced is refused."""
    from yalis.comm.nvrar import library

    real = library.load

    def refuse(kind: Any, arch: int = 0) -> Any:
        if me.rank == 1:
            raise BuildError("cannot build nvrar_host: no C++ compiler found; install g++ or set CXX")
        return real(kind, arch)

    with patch.object(library, "load", refuse):
        table = [(4096, "nvrar"), (1 << 62, "torch")]
        comm = Communicator.create(Topology(me.rank, 2, 2), [0, 1], timeout_s=20, store=me.store, table=table)
        assert comm.algorithms == ("torch",)
        total = float(comm.all_reduce(torch.ones(1)))
        comm.close()
        try:
            Communicator.create(Topology(me.rank, 2, 2), [0, 1], algorithm="nvrar", timeout_s=20, store=me.store)
        except CommError as error:
            return total, str(error)
    return total, "accepted"


def aborted(me: Rank) -> dict[str, Any]:
    """Rank 0 waits for rank 1, which does not come; its own thread aborts. Then rank 1 calls too."""
    comm = me.kept["comm"]
    if me.rank == 0:
        timer = threading.Timer(0.2, comm.link.abort)
        timer.start()
    else:
        time.sleep(0.5)
    x = torch.ones(64)
    result = outcome(comm, lambda: comm.all_reduce(x, out=x, tag="L0"))
    result["nan"] = bool(x.isnan().all())
    result["record"] = comm.link.failed() is not None
    start = time.monotonic()
    comm.close()
    result["closing"] = time.monotonic() - start
    return result


def details(me: Rank) -> dict[str, Any]:
    """One more all-reduce, in which somebody is missing; phase and step of the error."""
    comm = me.kept["comm"]
    x = torch.ones(64)
    start = time.monotonic()
    try:
        comm.all_reduce(x, out=x, tag="L3.mlp.down")
    except CommError as error:
        told = {name: getattr(error, name, None) for name in ("rank", "host", "phase", "step", "waiting_for")}
        told |= {"seconds": time.monotonic() - start, "words": str(error), "kind": type(error).__name__}
        told["nan"] = bool(x.isnan().all())
        try:
            comm.check()
        except CommError as again:
            told["check"] = again is error
        start = time.monotonic()
        comm.close()
        return told | {"closing": time.monotonic() - start}
    return {"kind": "none"}


def close_after_verdict(me: Rank) -> dict[str, Any]:
    """Rank 0 hears of a loss elsewhere and closes; rank 1 goes on, and must not wait for it."""
    guard = FlagGuard()
    comm = Communicator.create(
        Topology(me.rank, 2, 2), [0, 1], algorithm="nvrar", timeout_s=20, store=me.store, guard=guard
    )
    comm.all_reduce(torch.ones(4))
    if me.rank == 0:
        guard.flag.value = 1
        comm.close()
        me.kept["comm"] = comm  # the process lives on
        return {}
    return outcome(comm, lambda: comm.all_reduce(torch.ones(4)))
