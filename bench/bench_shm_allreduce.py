"""Two all-reduces of CPU ranks on one host against each other: the tables of docs/communicator.md.

    python bench/bench_shm_allreduce.py [--algorithms shm,torch] [--ranks 2,3,4,5] [--iters 100] [--output-json FILE]

Runs `yalis bench allreduce` once per number of ranks, the two algorithms side by side at every size, and prints a
Markdown table: median of the longest time over ranks, 10th to 90th percentile in brackets, in microseconds, out of
place, bf16. Nothing is bound to cores, unless --bind-cores says so: gloo's own threads need room too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def measure(ranks: int, iters: int, folder: Path, algorithms: str, bind: bool) -> dict[str, Any]:
    """The record of one run."""
    path = folder / f"{ranks}.json"
    command = [sys.executable, "-m", "yalis", "bench", "allreduce", "--ranks", str(ranks), "--device", "cpu"]
    command += ["--algorithm", algorithms, "-b", "2K", "-e", "2M", "-n", str(iters)]
    command += ["--output-json", str(path)] + ["--bind-cores"] * bind
    subprocess.run(
        command, check=True, timeout=600, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,3,4,5", help="numbers of ranks (default: 2,3,4,5)")
    parser.add_argument("--iters", type=int, default=100, help="timed calls per row (default: 100)")
    parser.add_argument("--algorithms", default="shm,torch", help="the two to compare (default: shm,torch)")
    parser.add_argument("--bind-cores", action="store_true", help="bind each rank to one core, in turn")
    parser.add_argument("--output-json", type=Path, help="write all records")
    args = parser.parse_args()
    counts = [int(n) for n in args.ranks.split(",")]
    first, second = args.algorithms.split(",")
    with tempfile.TemporaryDirectory() as folder:
        records = {
            ranks: measure(ranks, args.iters, Path(folder), args.algorithms, args.bind_cores) for ranks in counts
        }
    if args.output_json:
        args.output_json.write_text(json.dumps(records))
    machine = records[counts[0]]["machine"]
    print(f"{machine['cpu']['model']}, {machine['cpu']['cores_usable']} cores, Linux {machine['kernel']}, "
          f"torch {machine['versions']['torch']}, commit {machine['commit']}\n")  # fmt: skip
    print("| bytes | " + " | ".join(f"{n} ranks: {first} | {second} | ratio" for n in counts) + " |")
    print("|---:|" + "---:|---:|---:|" * len(counts))
    sizes = sorted({row["size"] for row in records[counts[0]]["results"]})
    for size in sizes:
        cells = []
        for ranks in counts:
            found = {
                r["algorithm"]: r["out_of_place"]["summary"] for r in records[ranks]["results"] if r["size"] == size
            }
            for name in (first, second):
                s = found[name]
                cells.append(f"{s['median']:.1f} ({s['p10']:.1f}-{s['p90']:.1f})")
            cells.append(f"{found[second]['median'] / found[first]['median']:.2g}x")
        print(f"| {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
