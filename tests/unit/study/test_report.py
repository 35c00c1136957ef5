"""The report of a study: what it says of made-up results, and how it looks in a browser."""

from __future__ import annotations

import asyncio
import csv
import json
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import browser, chromium
from tests.unit.study.test_grid import TEXT, load
from yalis.cli.main import main
from yalis.study.allreduce_plots import baseline_of
from yalis.study.cluster import load_cluster
from yalis.study.engine_plots import scaling_lines
from yalis.study.forecast import forecast
from yalis.study.grid import Cell, Study
from yalis.study.measured import engine_cells
from yalis.study.report import PREDICTIONS, write_report
from yalis.study.run import RESULTS

SIZES = (256, 1024, 4096, 65536)


def entry(cell: Cell, tpot_ms: float = 4.0) -> dict[str, Any]:
    """A line of results."""
    cpu = {"cores_usable": 2, "model": "Test CPU"}
    record: dict[str, Any] = {
        "time_utc": "2026-01-02T03:04:05Z",
        "machine": {"cpu": cpu, "gpus": [], "versions": {"yalis": "0", "torch": "2"}, "commit": "abc"},
        "env": {},
    }
    if cell.kind == "allreduce":
        steps = {"rd": cell.nodes.bit_length() - 1, "ring": 2 * (cell.nodes - 1)}[cell.all_reduce]
        record["samples"] = {f"{s}_s": [steps * (1.1e-3 + s * 1e-8)] * 5 for s in SIZES}
        record["config"] = {"emulated": "emulated network: 1000 us" if cell.emulate else ""}
    else:
        record["config"] = {"batch_size": 1, "engine": {"model": cell.model}}
        step = {"p50": tpot_ms, "mean": tpot_ms} if tpot_ms else {}
        record["results"] = {"summary_ms": {"first": {"p50": 20.0, "mean": 20.0}, "step": step}}
        if cell.load:
            record["results"] |= {"e2e_s": 0.5, "tokens_per_s": 77.0}
        elif cell.kind == "yalis" and tpot_ms:
            record["results"]["decode_split_s"] = {"other_s": tpot_ms * 0.7e-3, "intra_s": tpot_ms * 0.2e-3}
    line = {"key": cell.key, "label": cell.label, "cell": asdict(cell), "study": "t", "baseline": ""}
    return line | {"status": "ok", "record": record}


def results(folder: Path, study: Study, entries: list[dict[str, Any]]) -> None:
    (folder / RESULTS).write_text("\n".join(json.dumps(e) for e in entries))
    found = {c.key: forecast(c, load_cluster("cpu-host")) for c in study.cells}
    (folder / PREDICTIONS).write_text(json.dumps({key: value for key, value in found.items() if value}))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class _Outside(HTMLParser):
    """Collects whatever a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset") and value and not value.startswith("data:"):
                self.found.append(value)
        assert tag not in ("script", "link", "iframe")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return load(tmp_path_factory.mktemp("study"), TEXT.replace("nodes = [2, 4, 8]", "nodes = [2, 3, 4, 6, 8]"))


@pytest.fixture(scope="module")
def report(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    entries = [entry(c, 4.0 + i) for i, c in enumerate(study.cells)]
    entries[1] |= {"status": "failed", "error": "it <broke>"}
    results(folder, study, entries)
    return write_report(folder, title="A study")


def test_report_is_one_page_that_fetches_nothing_and_labels_emulation(report: Path) -> None:
    page = report.read_text()
    reader = _Outside()
    reader.feed(page)
    assert reader.found == []
    for words in (
        "Strong scaling: demo, balanced:2 (partly over an emulated network)",
        "Where a decode step goes",
        "Predicted against measured",
        "All-reduce by message size, 1 rank a node (emulated network)",
        "Lines: injected constants: emulated network: 1000 us",
        "Times faster than ring",
        "All-reduce of 1 KiB by nodes, 1 rank a node (emulated network)",
        "Fastest all-reduce by size and nodes",
        "on 2 cores of Test CPU, yalis 0, torch 2, commit abc, 2026-01-02",
        "it &lt;broke&gt;",
        "never the speed of a network",
    ):
        assert words in page
    names = {p.name for p in (report.parent / "plots").iterdir()}
    assert names == {
        *(f"{kind}-{i}.png" for kind in ("scaling", "terms") for i in (0, 1)),
        *(f"allreduce-{kind}-1.png" for kind in ("sizes", "ratio", "nodes", "map")),
        "residuals.png",
    }


def test_tables_show_predictions_and_residuals(report: Path) -> None:
    rows = table(report.parent / "cells.csv")
    one = rows[0]
    measured, predicted = float(one["TPOT ms"]), float(one["predicted TPOT ms"])
    assert float(one["TPOT residual %"]) == pytest.approx(100 * (predicted / measured - 1), abs=0.1)
    assert {r["predicted TPOT ms"] for r in rows if r["engine"] == "transformers"} == {""}
    swept = table(report.parent / "allreduce.csv")
    [line] = [r for r in swept if (r["all-reduce"], r["nodes"], r["bytes"]) == ("ring", "8", "1024")]
    # Injected: 14 messages of 1 ms each and no limit on bytes; measured 14 of 1.11 ms.
    assert (line["predicted us"], line["residual %"]) == ("14000.00", "-9.9") and line["network"] == "emulated"
    assert '<th class="n">TPOT residual %</th>' in report.read_text()


def test_between_emulated_nodes_the_injected_constants_count(study: Study) -> None:
    cluster = load_cluster("cpu-host")
    cell = next(c for c in study.cells if c.emulate and c.kind == "yalis")
    slow, real = (forecast(c, cluster) for c in (cell, replace(cell, emulate="")))
    assert slow is not None and real is not None
    # Two all-reduces in each of four layers, one exchange between two nodes each.
    assert slow["tpot_terms_s"]["inter_s"] == pytest.approx(8 * 1e-3, rel=0.01)
    assert real["tpot_terms_s"]["inter_s"] < 2e-3
    assert forecast(next(c for c in study.cells if c.kind == "transformers"), cluster) is None
    sweep = next(c for c in study.cells if c.kind == "allreduce" and c.nodes == 3)
    assert forecast(sweep, None) == forecast(sweep, cluster)  # one rank a node: only the network counts
    assert forecast(replace(sweep, emulate=""), None) is None
    on_cluster = forecast(replace(sweep, emulate=""), cluster)
    assert on_cluster is not None and on_cluster["model"] == "prediction for cpu-host"


def test_one_output_token_has_no_tpot_and_breaks_nothing(tmp_path: Path) -> None:
    study = load(tmp_path, TEXT.replace('["1x16+8", "balanced:2"]', '["4x16+1"]'))
    results(tmp_path, study, [entry(c, 0.0) for c in study.cells if c.kind == "yalis"])
    write_report(tmp_path)
    assert all(r["TPOT ms"] == r["TPOT residual %"] == "" and r["TTFT ms"] for r in table(tmp_path / "cells.csv"))
    assert (tmp_path / "plots" / "residuals.png").exists()


def test_loads_over_time_stand_in_the_table(tmp_path: Path) -> None:
    load_table = "[{ rate = 4, requests = 9, input_len = 16, output_len = 8 }]"
    study = load(tmp_path, TEXT.replace('["1x16+8", "balanced:2"]', load_table))
    results(tmp_path, study, [entry(c) for c in study.cells if c.kind == "yalis"])
    write_report(tmp_path)
    assert {(r["workload"], r["E2E s"], r["tokens/s"]) for r in table(tmp_path / "cells.csv")} == {
        ("9 of 16+8 at 4/s", "0.500", "77.0")
    }


def test_strong_scaling_goes_over_nodes(tmp_path: Path) -> None:
    schemes = "[{ tp = 1 }, { tp = 2 }, { tp = 4 }, { tp = 4, ranks_per_node = 2 }, { tp = 8, ranks_per_node = 2 }]"
    text = TEXT.replace("[{ tp = 1 }, { tp = 2, ranks_per_node = 1 }, { tp = 1, pp = 2 }]", schemes)
    study = load(tmp_path, text.replace('["rd", "shm"]', '["auto"]').replace(', "balanced:2"', ""))
    cells = engine_cells([entry(c) for c in study.cells if c.kind == "yalis"], {})
    lines = scaling_lines(cells)
    assert {name: [(m.cell.ranks, m.cell.nodes) for m in line] for name, line in lines.items()} == {
        "yalis TP, one node": [(1, 1), (2, 1), (4, 1)],
        "yalis TP, 2 a node": [(1, 1), (2, 1), (4, 2), (8, 4)],
    }


def test_ratios_are_to_a_named_baseline(tmp_path: Path) -> None:
    assert baseline_of(["rd", "ring", "torch"]) == "torch"
    assert baseline_of(["rd", "ring", "torch"], "rd") == "rd"
    assert baseline_of(["rd", "shm"]) == "rd"
    study = load(tmp_path, TEXT.replace("[slurm]", 'baseline = "rd"\n[slurm]'))
    results(tmp_path, study, [entry(c) | {"baseline": study.baseline} for c in study.cells if c.kind == "allreduce"])
    assert "Times faster than rd" in write_report(tmp_path).read_text()
    assert "Times faster than ring" in write_report(tmp_path, baseline="ring").read_text()


def test_a_study_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "report", str(tmp_path / "out")]) == 1
    assert "no results; run yalis study run" in capsys.readouterr().err


@pytest.mark.skipif(chromium() is None, reason="needs a browser: apt-get install chromium")
def test_the_page_in_a_browser(report: Path) -> None:
    """Wide and narrow, light and dark: every plot is there in the scheme's colours, only tables and plots scroll."""

    async def look() -> None:
        async with browser() as tab:
            await tab.open(report.as_uri())
            seen = {}
            for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
                await tab.look(width, 900, dark=dark)
                await tab.until("[...document.images].every(i => i.complete && i.naturalWidth > 300)")
                assert await tab.evaluate("document.images.length") == 9
                assert await tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, dark)
                assert await tab.evaluate("[...document.images].every(i => i.clientWidth >= 500)")
                paper = await tab.evaluate("getComputedStyle(document.body).backgroundColor")
                seen[dark] = paper
                drawn_dark = "i.currentSrc === i.previousElementSibling.srcset"
                await tab.until(f"[...document.images].every(i => ({drawn_dark}) === {str(dark).lower()})")
            assert seen[False] != seen[True]
            assert tab.problems == []

    asyncio.run(look())
