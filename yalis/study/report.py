"""One HTML file about a study, with the plots inside it, and the same as PNG and CSV. No external assets.

Every title says what was measured on what. Data from an emulated network is labelled wherever it appears.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yalis.errors import ConfigError
from yalis.study.allreduce_plots import allreduce_plots
from yalis.study.engine_plots import engine_plots
from yalis.study.measured import cell_rows, engine_cells, sweep_rows, sweeps
from yalis.study.page import failures_html, figure_html, page_html, table_html
from yalis.study.run import read_results

PREDICTIONS = "predictions.json"
_RESIDUAL = "Residuals are (predicted - measured) / measured; predictions were stored before the runs."


def write_report(folder: Path, *, title: str = "", baseline: str = "") -> Path:
    """Write ``report.html``, ``plots/*.png`` and ``*.csv`` into ``folder`` from its results; returns the HTML file.

    Args:
        title: default the study's name.
        baseline: all-reduce that ratios are to; default the study's.

    Raises:
        ConfigError: there are no results.
    """
    entries = read_results(folder)
    if not entries:
        raise ConfigError(f"{folder}: no results; run yalis study run STUDY.toml --output {folder} first")
    stored = folder / PREDICTIONS
    predictions = json.loads(stored.read_text()) if stored.exists() else {}
    cells, swept = engine_cells(entries, predictions), sweeps(entries, predictions)
    good = [e for e in entries if e["status"] == "ok"]
    machine = machine_words(good[0]["record"] if good else {})
    sections = []
    if cells:
        header, rows = cell_rows(cells)
        _write_csv(folder / "cells.csv", header, rows)
        sections.append(table_html("Engines", _RESIDUAL, header, rows, names=6))
    drawn = folder / "plots"
    drawn.mkdir(exist_ok=True)
    for plot in [
        *engine_plots(cells, machine),
        *allreduce_plots(swept, machine, baseline or entries[-1].get("baseline", "")),
    ]:
        light, dark = drawn / f"{plot.name}.png", drawn / f"{plot.name}-dark.png"
        plot.draw(light, False)
        plot.draw(dark, True)
        sections.append(figure_html(plot.title, plot.text, light, dark))
        dark.unlink()
    if swept:
        _write_csv(folder / "allreduce.csv", *sweep_rows(swept))
    sections.append(failures_html([e for e in entries if e["status"] != "ok"]))
    path = folder / "report.html"
    path.write_text(
        page_html(
            title or f"Study {entries[0]['study']}",
            f"{len(good)} of {len(entries)} cells measured on {machine}.",
            emulated=any(e["cell"].get("emulate") for e in entries),
            sections=sections,
        )
    )
    return path


def machine_words(record: Mapping[str, Any]) -> str:
    """The machine of a record in a line."""
    machine = record.get("machine", {})
    cpu, gpus = machine.get("cpu", {}), machine.get("gpus", [])
    devices = (
        f"{len(gpus)} x {gpus[0]['name']}" if gpus else f"{cpu.get('cores_usable', '?')} cores of {cpu.get('model')}"
    )
    found = machine.get("versions", {})
    return (
        f"{devices}, yalis {found.get('yalis')}, torch {found.get('torch')}, commit {machine.get('commit')}, "
        f"{record.get('time_utc', '')[:10]}"
    )


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
