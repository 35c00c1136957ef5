"""A study's results as the report looks at them: engine cells and sweeps, each beside its prediction."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yalis.study.explain import explain
from yalis.study.grid import Cell
from yalis.study.workload import parse_workload

Row = list[str]


@dataclass(frozen=True)
class Measured:
    """An engine cell that ran.

    Attributes:
        ttft_s, tpot_s: medians; tpot_s is 0 with one output token.
        e2e_s: from arrival to the last token. tokens_per_s: output tokens of all requests.
        terms: seconds by term of a decode step, where the engine tells them.
        predicted: a row of the plan, if there is a prediction: ``ttft_s``, ``tpot_s``, ...
    """

    cell: Cell
    record: Mapping[str, Any]
    ttft_s: float
    tpot_s: float
    e2e_s: float
    tokens_per_s: float
    terms: Mapping[str, float]
    predicted: Mapping[str, Any]

    def residual(self, name: str) -> float | None:
        """(predicted - measured) / measured of ``ttft_s`` or ``tpot_s``; None where one is missing."""
        value = getattr(self, name)
        return self.predicted[name] / value - 1 if self.predicted and value else None


@dataclass(frozen=True)
class Swept:
    """One all-reduce over message sizes on one group.

    Attributes:
        seconds: median by bytes. predicted: by bytes, empty without a prediction; model: what it rests on.
        emulated: the network in words, empty where it is real.
    """

    cell: Cell
    seconds: Mapping[float, float]
    predicted: Mapping[float, float]
    model: str
    emulated: str

    @property
    def name(self) -> str:
        """The all-reduce."""
        return self.cell.all_reduce

    @property
    def nodes(self) -> int:
        """Declared or real."""
        return self.cell.nodes


def engine_cells(entries: Sequence[Mapping[str, Any]], predictions: Mapping[str, Any]) -> list[Measured]:
    """Engine cells that ran, in the order of the results."""
    found = []
    for entry in entries:
        if entry["status"] != "ok" or entry["cell"]["kind"] == "allreduce":
            continue
        record, cell = entry["record"], Cell(**entry["cell"])
        results = record["results"]
        first, step = (results["summary_ms"].get(name) or {} for name in ("first", "step"))
        ttft_s, tpot_s = first["p50"] / 1e3, step.get("p50", 0.0) / 1e3
        if cell.load:
            e2e_s, tokens_per_s = results["e2e_s"], results["tokens_per_s"]
        else:
            work = parse_workload(cell.workload)
            e2e_s = ttft_s + (work.output_len - 1) * tpot_s
            tokens_per_s = work.tokens_out / e2e_s
        terms = explain(record, entry["label"]).terms.as_dict() if step and "decode_split_s" in results else {}
        predicted = predictions.get(entry["key"]) or {}
        found.append(Measured(cell, record, ttft_s, tpot_s, e2e_s, tokens_per_s, terms, predicted))
    return found


def sweeps(entries: Sequence[Mapping[str, Any]], predictions: Mapping[str, Any]) -> list[Swept]:
    """All-reduces that ran, in the order of the results."""
    found = []
    for entry in entries:
        if entry["status"] != "ok" or entry["cell"]["kind"] != "allreduce":
            continue
        record = entry["record"]
        seconds = {float(name.removesuffix("_s")): statistics.median(v) for name, v in record["samples"].items()}
        prediction = predictions.get(entry["key"]) or {}
        predicted = {float(size): value for size, value in prediction.get("seconds", {}).items()}
        cell = Cell(**entry["cell"])
        emulated = record["config"]["emulated"]
        found.append(Swept(cell, dict(sorted(seconds.items())), predicted, prediction.get("model", ""), emulated))
    return found


def cell_rows(cells: Sequence[Measured]) -> tuple[Row, list[Row]]:
    """Header and rows of engine cells; residuals are (predicted - measured) / measured."""
    header = ["engine", "model", "scheme", "network", "all-reduce", "workload"]
    header += ["TTFT ms", "predicted TTFT ms", "TTFT residual %", "TPOT ms", "predicted TPOT ms", "TPOT residual %"]
    header += ["E2E s", "tokens/s"]
    rows = []
    for m in cells:
        c = m.cell
        row = [c.engine, Path(c.model).name, c.scheme, "emulated" if c.emulate else ""]
        row += [c.all_reduce if c.kind == "yalis" and c.tp > 1 else "-", c.workload]
        for name, digits in (("ttft_s", 2), ("tpot_s", 3)):
            value = getattr(m, name)
            row.append(f"{1e3 * value:.{digits}f}" if value else "")
            row.append(f"{1e3 * m.predicted[name]:.{digits}f}" if m.predicted and value else "")
            row.append(_percent(m.residual(name)))
        rows.append([*row, f"{m.e2e_s:.3f}", f"{m.tokens_per_s:.1f}"])
    return header, rows


def sweep_rows(found: Sequence[Swept]) -> tuple[Row, list[Row]]:
    """Header and rows of sweeps, one a size."""
    rows = []
    for s in found:
        for size, seconds in s.seconds.items():
            model_s = s.predicted.get(size)
            row = [s.name, str(s.cell.ranks), str(s.nodes), f"{size:.0f}", f"{1e6 * seconds:.2f}"]
            row += [f"{1e6 * model_s:.2f}" if model_s else "", _percent(model_s / seconds - 1 if model_s else None)]
            rows.append([*row, "emulated" if s.emulated else ""])
    header = ["all-reduce", "ranks", "nodes", "bytes", "median us", "predicted us", "residual %", "network"]
    return header, rows


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f}"
