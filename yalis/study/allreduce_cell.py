"""One all-reduce cell of a study: starts its ranks, or is one of them under a launcher (srun). ``python -m`` entry.

Rank 0's machine writes the record: samples are ``BYTES_s``, seconds of single calls, the longest over ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yalis.bench.harness import write_record
from yalis.comm.topology import from_environment
from yalis.errors import ConfigError
from yalis.launch import is_launched
from yalis.study import sweep
from yalis.study.calibrate import Group, run_sweep
from yalis.study.netns import end_in_order_at_sigterm

_LIMIT_S = 24 * 3600.0  # whoever starts this has the limit of the cell


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", required=True)
    parser.add_argument("--ranks", type=int, help="to start here; not under a launcher")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output-json", type=Path, required=True)
    args = parser.parse_args(argv)
    device = _device(args.device)
    if args.ranks is not None:
        end_in_order_at_sigterm()
        group = Group(args.ranks, args.ranks_per_node, (args.algorithm,))
        env = dict(os.environ)
        found: Mapping[str, Any] = run_sweep(group, device=device, iters=args.iters, env=env, limit_s=_LIMIT_S)
    elif is_launched(os.environ):
        found = _as_rank(args, device)
    else:
        raise ConfigError("--ranks is missing, and no launcher (srun, torchrun, mpirun) started this process")
    if found:
        times = found["all_reduce"][args.algorithm]
        config = {"ranks": found["ranks"], "nodes": found["nodes"], "all_reduce": args.algorithm, "device": device}
        write_record(
            args.output_json,
            "allreduce-sweep",
            config={**config, "emulated": found["emulated"], "timed": found["timed"][args.algorithm]},
            results={},
            samples={f"{size}_s": values for size, values in times.items()},
        )


def _as_rank(args: argparse.Namespace, device: str) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory(prefix="yalis-sweep-") as folder:
        out = Path(folder) / "sweep.json"
        options = ["--out", str(out), "--device", device, "--algorithms", args.algorithm, "--iters", str(args.iters)]
        sweep.main([*options, "--ranks-per-node", str(args.ranks_per_node)])
        if from_environment(os.environ, ranks_per_node=args.ranks_per_node).rank:
            return {}
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"yalis: {error}") from None
