"""Predictions first, then measurements, on this host's CPU or GPUs: the residual of TTFT and TPOT, cell by cell.

    yalis calibrate --output docs/results/data/plan-validation-host.toml
    python bench/validate_plan.py --cluster docs/results/data/plan-validation-host.toml --output docs/results

Two checkpoint shapes that calibration does not use, with random weights; TP 1, 2, 4, PP 2, TP 2 x PP 2, batch 1 and 8.
All predictions are written before the first run, to data/plan-validation-predicted.json. Then every cell is measured
once a round, for several rounds, with a probe of the memory's speed and the host's load before each; the mean over the
rounds counts. The page is plan-validation.md, raw numbers are in data/plan-validation.json. Goal: mean absolute error
at most 15 percent, worst cell at most 30.

    yalis calibrate --device cuda --max-ranks 2 --output docs/results/data/plan-validation-calibrated.toml
    python bench/validate_plan.py --device cuda --cluster docs/results/data/plan-validation-calibrated.toml

The same on two GPUs: Llama-3.1-8B's shape at TP 1 and 2 and 70B's at TP 2, batch 1, 8 and 32 behind prompts of 512. One
engine serves all batches of a layout, and one round is enough. The files are called plan-validation-calibrated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yalis.errors import ConfigError
from yalis.models.config import ModelConfig
from yalis.study.cluster import load_cluster
from yalis.study.cost import Layout, predict
from yalis.study.plan import as_dict, predict_auto
from yalis.study.workload import Workload
from yalis.utils.machine import machine_record

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"ttft_s": "TTFT", "tpot_s": "TPOT"}
GOAL_MEAN, GOAL_WORST = 0.15, 0.30
_PROBE_BYTES, _PROBE_S = 512 * 2**20, 0.2


@dataclass(frozen=True)
class Grid:
    """What is predicted and measured on one kind of device.

    Attributes:
        name: of the files that are written. where: for the page's title.
        models: folder of a shape and its schemes (TP, PP). batches; input_len, output_len: tokens of a request.
        max_load: load of the last minute at which to begin. rounds.
    """

    name: str
    where: str
    models: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
    batches: tuple[int, ...]
    input_len: int
    output_len: int
    max_load: float
    rounds: int


_ON_CPU = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
GRIDS = {
    "cpu": Grid(
        "plan-validation", "a CPU host",
        (("bench/shapes/llama-254m", _ON_CPU), ("bench/shapes/qwen3-0.6b", _ON_CPU)), (1, 8), 128, 33, 0.5, 3,
    ),
    # The requests are those of `yalis bench latency --table`.
    "cuda": Grid(
        "plan-validation-calibrated", "GPUs, from a calibration",
        (("bench/shapes/llama-3.1-8b", ((1, 1), (2, 1))), ("bench/shapes/llama-3.1-70b", ((2, 1),))),
        (1, 8, 32), 512, 129, math.inf, 1,
    ),
}  # fmt: skip


def predictions(
    cluster_file: str, grid: Grid, wanted: str = "", all_reduces: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Cell name (of those that hold ``wanted``) -> prediction.

    Args:
        all_reduces: one cell each where TP is above 1; empty: the one that the engine takes by itself.

    Raises:
        ConfigError: the description has no steps like those of a cell, or not that all-reduce.
    """
    cluster = load_cluster(cluster_file)
    found = {}
    for shape, schemes in grid.models:
        model = ModelConfig.from_pretrained(ROOT / shape)
        for tp, pp in schemes:
            for reduce in all_reduces if tp > 1 and all_reduces else ("",):
                for batch in grid.batches:
                    work = Workload(
                        f"{batch}x{grid.input_len}+{grid.output_len}", batch, grid.input_len, grid.output_len
                    )
                    name = " ".join(filter(None, (Path(shape).name, f"TP{tp} PP{pp}", reduce, f"batch {batch}")))
                    if wanted not in name:
                        continue
                    layout = Layout(tp, pp, 1)
                    prediction = (
                        predict(model, cluster, layout, reduce, work)
                        if reduce
                        else predict_auto(model, cluster, layout, work)
                    )
                    row = as_dict(prediction)
                    found[name] = {
                        "model": shape,
                        "tp": tp,
                        "pp": pp,
                        "batch": batch,
                        **row,
                        "option": reduce or "auto",
                    }
    return found


def together(predicted: Mapping[str, Mapping[str, Any]], device: str) -> list[list[str]]:
    """Cells that one process measures: each by itself, on GPUs all batches of a layout (engines start slowly there)."""
    if device == "cpu":
        return [[name] for name in predicted]
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, cell in predicted.items():
        found.setdefault(tuple(cell[key] for key in ("model", "tp", "pp", "option")), []).append(name)
    return list(found.values())


def measure(
    predicted: Mapping[str, Mapping[str, Any]], names: Sequence[str], device: str, iters: int, limit_s: float
) -> dict[str, dict[str, list[float]]]:
    """Cell -> TTFT and TPOT in seconds, of ``iters`` runs of the engine's own benchmark, in one process.

    Raises:
        ConfigError: it failed or took longer than ``limit_s``; holds what it printed last.
    """
    cell, grid = predicted[names[0]], GRIDS[device]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, "-m", "yalis", "bench", "latency", "--model", cell["model"], "--device", device]
        command += ["--load-format", "dummy", "--tp", str(cell["tp"]), "--pp", str(cell["pp"])]
        command += ["--all-reduce", cell["option"]]
        if device == "cpu":
            command += ["--max-model-len", str(grid.input_len + grid.output_len), "--batch-size", str(cell["batch"])]
            command += ["--input-len", str(grid.input_len), "--output-len", str(grid.output_len)]
        else:
            # A GPU of 80 GB that holds half of 70B has room for few pages: it may fill up further than by default.
            command += ["--table", "--max-model-len", "4096", "--gpu-memory-utilization", "0.95"]
        command += ["--num-iters", str(iters), "--num-iters-warmup", "1", "--output-json", str(out)]
        try:
            subprocess.run(command, cwd=ROOT, check=True, timeout=limit_s, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise ConfigError(error.stderr.strip()[-500:] or f"exit code {error.returncode}") from None
        except subprocess.TimeoutExpired:
            raise ConfigError(f"took longer than {limit_s:g} s (--limit-s)") from None
        samples = json.loads(out.read_text())["samples"]
    found = {}
    for name in names:
        batch = predicted[name]["batch"]
        prefix = "" if device == "cpu" else f"{batch}x{grid.input_len}+{grid.output_len}."
        found[name] = {"ttft_s": samples[f"{prefix}first_s"], "tpot_s": samples[f"{prefix}step_s"]}
    return found


class Host:
    """What else the host does: the speed of its memory, its load, and who took its cores."""

    def __init__(self) -> None:
        import torch

        self.block = torch.ones(_PROBE_BYTES // 4, dtype=torch.float32)
        self.last = self._clocks()

    def _clocks(self) -> tuple[float, float, float, float]:
        """Seconds: wall, stolen, busy on all cores, and of that by this process and what it has waited for."""
        user, nice, system, _, _, irq, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
        tick = os.sysconf("SC_CLK_TCK")
        mine = sum(os.times()[:4])
        return time.monotonic(), stolen / tick, (user + nice + system + irq + soft) / tick, mine

    def look(self) -> dict[str, float]:
        """GB/s that all cores read together, load of the last minute; since the last look, percent of time stolen and
        how many cores other processes used."""
        now = self._clocks()
        wall, stolen, busy, mine = (a - b for a, b in zip(now, self.last, strict=True))
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < _PROBE_S:
            self.block.sum()
            done += _PROBE_BYTES
        self.last = self._clocks()
        return {
            "read_gb_per_s": done / elapsed / 1e9,
            "load": os.getloadavg()[0],
            "steal_percent": 100 * stolen / max(wall * (os.cpu_count() or 1), 1e-9),
            "others_cores": max(0.0, busy - mine) / max(wall, 1e-9),
        }


def wait_for_quiet(limit: float, patience_s: float) -> None:
    """Until the load of the last minute is at most ``limit``.

    Raises:
        ConfigError: it still is not after ``patience_s``.
    """
    deadline = time.monotonic() + patience_s
    while (load := os.getloadavg()[0]) > limit:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"load {load:.2f} is above {limit:g} for {patience_s:g} s: something else runs here; end it, or allow "
                "more with --max-load"
            )
        time.sleep(2.0)


def run(predicted: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rounds of every cell: samples and what the host did, or the error."""
    host = Host()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in predicted}
    for number in range(args.rounds):
        for names in together(predicted, args.device):
            before, begun = host.look(), time.monotonic()
            try:
                entries: dict[str, Any] = measure(predicted, names, args.device, args.iters, args.limit_s)
            except ConfigError as error:
                entries = {name: {"error": str(error)} for name in names}
            took, after = time.monotonic() - begun, host.look()
            # The memory's speed on both sides of the run; load, theft and others while it ran.
            seen = {**after, "read_gb_per_s": (before["read_gb_per_s"] + after["read_gb_per_s"]) / 2}
            for name, entry in entries.items():
                words = "  ".join(
                    f"{k} {1e3 * statistics.fmean(entry[key]):.2f} ms" for key, k in KINDS.items() if key in entry
                )
                words = words or f"failed: {entry['error']}"
                found[name].append({**entry, **seen})
                print(f"round {number + 1}  {name}  {words}  ({seen['read_gb_per_s']:.0f} GB/s)", flush=True)
            print(f"  in {took:.0f} s", flush=True)
    return found


def of_rounds(rounds: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Mean of each round that was measured."""
    return [statistics.fmean(entry[key]) for entry in rounds if key in entry]


def cells_of(
    predicted: Mapping[str, Mapping[str, Any]], measured: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Cell -> TTFT and TPOT -> predicted, measured (mean over rounds), least, most and error; failed cells left out."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, cell in predicted.items():
        for key in KINDS:
            values = of_rounds(measured[name], key)
            if not values:
                continue
            mean = statistics.fmean(values)
            found.setdefault(name, {})[key] = {
                "predicted": cell[key],
                "measured": mean,
                "least": min(values),
                "most": max(values),
                "error": (cell[key] - mean) / mean,
            }
    return found


def page(record: Mapping[str, Any], data: str) -> str:
    """The whole page in Markdown, from the record alone."""
    cells, measured = record["cells"], record["measured"]
    device = record["device"]
    grid, on_cpu = GRIDS[device], device == "cpu"
    machine, seen = record["machine"], [entry for rounds in record["measured"].values() for entry in rounds]
    probes, loads = ([entry[key] for entry in seen] for key in ("read_gb_per_s", "load"))
    toml = f"{data}/{grid.name}{'-host' if on_cpu else ''}.toml"
    option = "" if on_cpu else f" --device {device}"
    cores = f"{machine['cpu']['cores_usable']} cores of {machine['cpu']['model']}"
    gpus = ", ".join(str(gpu["name"]) for gpu in machine.get("gpus", []))
    lines = [
        f"# Predictions of yalis plan against measurements on {grid.where}",
        "",
        f"    yalis calibrate{option} --output {toml}",
        f"    python bench/validate_plan.py{option} --cluster {toml} --rounds {record['rounds']} "
        f"--iters {record['iters']}",
        "",
        f"{cores if on_cpu else gpus}, commit {machine['commit']}, calibrated "
        f"{record['calibrated']}. All predictions were written to `data/{grid.name}-predicted.json` before the "
        "first run.",
        f"Shapes that calibration does not use, random weights, prompts of {grid.input_len} tokens, {grid.output_len} "
        + ("tokens out; ranks beyond the cores share them." if on_cpu else "tokens out."),
        f"Every cell was measured once in each of {record['rounds']} rounds, {record['iters']} runs a time; the mean "
        "over the rounds counts, and least to most of the rounds stand behind it. ms.",
        "",
        "| cell |" + "".join(f" {k} predicted | measured | least to most | error |" for k in KINDS.values()),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rounds in measured.items():
        if name not in cells:
            lines.append(f"| {name} | failed: {rounds[-1]['error'].splitlines()[-1]} |" + " |" * 7)
            continue
        words = [name]
        for key in KINDS:
            ms = {k: 1e3 * v for k, v in cells[name][key].items()}
            words += [f"{ms['predicted']:.2f}", f"{ms['measured']:.2f}", f"{ms['least']:.2f} to {ms['most']:.2f}"]
            words.append(f"{cells[name][key]['error']:+.0%}")
        lines.append("| " + " | ".join(words) + " |")
    lines.append("")
    for key, label in KINDS.items():
        errors = {name: cell[key]["error"] for name, cell in cells.items()}
        if not errors:
            continue
        mean = statistics.fmean(map(abs, errors.values()))
        worst = max(errors, key=lambda name: abs(errors[name]))
        met = mean <= GOAL_MEAN and abs(errors[worst]) <= GOAL_WORST and len(errors) == len(measured)
        spread = statistics.fmean((c[key]["most"] - c[key]["least"]) / c[key]["measured"] for c in cells.values())
        bias = statistics.fmean(errors.values())
        apart = f"Rounds of one cell lie {spread:.0%} apart" if record["rounds"] > 1 else "One round, so no spread"
        lines.append(
            f"- **{label}**: mean absolute error {mean:.0%}, worst {errors[worst]:+.0%} ({worst}), mean error "
            f"{bias:+.0%}; goal (15 and 30) {'met' if met else 'missed'}. {apart}."
        )
    if on_cpu:
        lines.append(
            f"- **The host meanwhile**: its cores read {min(probes):.0f} to {max(probes):.0f} GB/s (mean "
            f"{statistics.fmean(probes):.0f}) around the runs; load {min(loads):.1f} to {max(loads):.1f} with the "
            f"benchmark's own, other processes used {statistics.fmean(e['others_cores'] for e in seen):.2f} cores on "
            f"average and {max(e['others_cores'] for e in seen):.2f} at most, at most "
            f"{max(e['steal_percent'] for e in seen):.0f} percent of the time was stolen."
        )
    lines += [
        "",
        "## By layout",
        "",
        "Mean error of prediction over the shapes, and the largest predicted terms of a step:",
        "",
        "| layout | TTFT | TPOT | terms of TPOT |",
        "|---|---|---|---|",
    ]
    for place in dict.fromkeys(_place(name) for name in record["predicted"]):
        names = [n for n in cells if _place(n) == place]
        if not names:
            continue
        errors = [f"{statistics.fmean(cells[n][key]['error'] for n in names):+.0%}" for key in KINDS]
        terms = record["predicted"][names[0]]["tpot_terms_s"]
        total = sum(terms.values())
        largest = sorted(terms, key=lambda t: -terms[t])[:3]
        words = ", ".join(f"{t.removesuffix('_s')} {terms[t] / total:.0%}" for t in largest)
        lines.append(f"| {place} | {errors[0]} | {errors[1]} | {words} |")
    lines += [
        "",
        "What the predictions rest on, and what was not measured: the cluster description holds every constant with "
        "its interval",
        f"(`{toml.removeprefix('docs/results/')}`, raw samples beside it); nothing was tuned after the predictions.",
        f"Raw numbers: `data/{grid.name}.json`.",
    ]
    return "\n".join(lines) + "\n"


def _place(name: str) -> str:
    """A cell's layout and batch: its name without the model's."""
    return name.split(" ", 1)[1]


def main() -> int:
    """Predict, write, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--device", choices=tuple(GRIDS), default="cpu")
    parser.add_argument("--all-reduce", default="", metavar="NAMES", help="of cells with TP, such as nccl,nvrar")
    parser.add_argument("--rounds", type=int, help="default: 3, on GPUs 1")
    parser.add_argument("--iters", type=int, default=3, help="runs of a cell in each round")
    parser.add_argument("--limit-s", type=float, default=200.0, help="longest run of one cell")
    parser.add_argument("--max-load", type=float, help="load of the last minute at which to begin (CPU: 0.5)")
    parser.add_argument("--patience-s", type=float, default=120.0, help="longest wait for that load")
    parser.add_argument("--cells", default="", metavar="TEXT", help="only cells whose name holds it; for a try")
    args = parser.parse_args()
    grid = GRIDS[args.device]
    args.rounds = grid.rounds if args.rounds is None else args.rounds
    try:
        cluster = load_cluster(args.cluster)
        predicted = predictions(args.cluster, grid, args.cells, tuple(filter(None, args.all_reduce.split(","))))
        wait_for_quiet(grid.max_load if args.max_load is None else args.max_load, args.patience_s)
    except ConfigError as error:
        print(f"validate_plan: {error}", file=sys.stderr)
        return 1
    data = args.output / "data"
    data.mkdir(parents=True, exist_ok=True)
    stored = {"time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cluster": cluster.title}
    (data / f"{grid.name}-predicted.json").write_text(json.dumps({**stored, "cells": predicted}, indent=1) + "\n")
    measured = run(predicted, args)
    record = {
        "device": args.device,
        "rounds": args.rounds,
        "iters": args.iters,
        "calibrated": cluster.notes.get("date", "on an unknown day"),
        "machine": machine_record(),
        "predicted": predicted,
        "measured": measured,
        "cells": cells_of(predicted, measured),
    }
    (data / f"{grid.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    text = page(record, "docs/results/data")
    (args.output / f"{grid.name}.md").write_text(text)
    print("\n".join(line for line in text.splitlines() if line.startswith("- **")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
