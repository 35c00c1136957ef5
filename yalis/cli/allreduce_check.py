"""The all-reduce that `yalis doctor` runs: two ranks on this machine, three sizes, checked and then timed.

`run_check` starts the ranks as ``python -m yalis.cli.allreduce_check STORE RANK``; they meet through a file, so no
port is taken, while the connections between them are made as in any run (this is where a bad host name shows).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yalis.errors import CommError

SIZES = (8 << 10, 128 << 10, 1 << 20)
RANKS = 2
WARMUP, ITERATIONS = 5, 21
PEER_TIMEOUT_S = 10.0

_LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_")
_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_check(env: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> list[dict[str, Any]]:
    """Run the two ranks and return one row per size: ``bytes``, ``algorithm``, ``time_us`` (median), ``wrong``.

    Args:
        env: environment of the ranks, default this process's; variables of a launcher are taken out of it.
        timeout_s: the ranks are killed after so many seconds.

    Raises:
        CommError: a rank failed or took too long; carries the last line that it printed.
    """
    inherited = os.environ if env is None else env
    clean = {k: v for k, v in inherited.items() if k not in _LAUNCHER_NAMES and not k.startswith(_LAUNCHER_PREFIXES)}
    clean["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="yalis-doctor-") as folder:
        store = str(Path(folder) / "store")
        command = [sys.executable, "-m", "yalis.cli.allreduce_check", store]
        deadline = time.monotonic() + timeout_s
        ranks: list[subprocess.Popen[str]] = []
        try:
            for rank in range(RANKS):
                # Output goes to files: nobody drains a pipe while the ranks are waited for in turn.
                with open(Path(folder) / f"{rank}.out", "w") as out, open(Path(folder) / f"{rank}.err", "w") as err:
                    process = subprocess.Popen([*command, str(rank)], env=clean, stdout=out, stderr=err, text=True)
                ranks.append(process)
            for rank, process in enumerate(ranks):
                try:
                    code = process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    raise CommError(f"rank {rank} of {RANKS} did not finish within {timeout_s:g} s") from None
                if code:
                    said = (Path(folder) / f"{rank}.err").read_text(errors="replace").strip().splitlines()
                    raise CommError(f"rank {rank} exited with {code}: {said[-1] if said else 'no message'}")
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "0.out").read_text())
        return rows


def _work(store_path: str, rank: int) -> list[dict[str, Any]]:
    import torch
    import torch.distributed as dist

    from yalis.comm import policy
    from yalis.comm.communicator import Communicator
    from yalis.comm.topology import Topology

    topology = Topology(rank=rank, world_size=RANKS, ranks_per_node=RANKS)
    c10d: Any = dist  # its type information does not name the stores
    store = c10d.FileStore(store_path, RANKS)
    comm = Communicator.create(topology, range(RANKS), timeout_s=PEER_TIMEOUT_S, store=store)
    rows = []
    try:
        for size in SIZES:
            # Small whole numbers: the sum is exact in float32, so any difference is an error.
            base = torch.arange(size // 4, dtype=torch.float32) % 1024
            expected = base * RANKS + sum(range(RANKS))
            wrong = int((comm.all_reduce(base + rank) != expected).sum())
            x, times = torch.zeros_like(base), []
            for _ in range(WARMUP + ITERATIONS):
                comm.barrier()
                start = time.perf_counter()
                comm.all_reduce(x, out=x)
                times.append(time.perf_counter() - start)
            name = policy.choose(comm.shape, x.dtype, x.nbytes)
            median = statistics.median(times[WARMUP:]) * 1e6
            rows.append({"bytes": size, "algorithm": name, "time_us": round(median, 1), "wrong": wrong})
        comm.barrier()
    finally:
        comm.close()
    return rows


if __name__ == "__main__":
    result = _work(sys.argv[1], int(sys.argv[2]))
    if sys.argv[2] == "0":
        print(json.dumps(result))
