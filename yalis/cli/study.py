"""``yalis study run`` and ``yalis study report``: a grid of measurements, and one page about it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yalis.study.grid import Study
    from yalis.study.run import Progress

_EPILOG = """examples:
  yalis study run examples/study/small.toml --output results/small
  yalis study report results/small
  yalis study run big.toml --output results/big --submit   # on a login node; again later: takes in what has run"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the subcommand's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "study",
        help="run a grid of measurements and report it on one page",
        description="A study is a TOML file (docs/study.md): engines, schemes, all-reduces and workloads.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner = parser.add_subparsers(dest="study", metavar="WHAT", title="commands", required=True)
    run_parser = inner.add_parser("run", help="measure what is not measured yet", description="Measure, resumably.")
    run_parser.add_argument("file", type=Path, metavar="STUDY.toml")
    run_parser.add_argument("--output", type=Path, metavar="DIR", help="default: results/NAME")
    run_parser.add_argument("--list", action="store_true", help="show the cells and end")
    run_parser.add_argument("--no-retry", action="store_true", help="leave cells alone that failed before")
    run_parser.add_argument(
        "--slurm", action="store_true", help="write a job script per cell instead of measuring; takes in finished ones"
    )
    run_parser.add_argument("--submit", action="store_true", help="the same, and hand the scripts to sbatch, each once")
    report = inner.add_parser("report", help="write report.html, PNG and CSV", description="One page about a study.")
    report.add_argument("folder", type=Path, metavar="DIR", help="what study run wrote into")
    report.add_argument("--title", default="", metavar="TEXT", help="default: the study's name")
    report.add_argument("--baseline", default="", metavar="NAME", help="all-reduce that ratios are to")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run or report."""
    return _report(args) if args.study == "report" else _run(args)


def _run(args: argparse.Namespace) -> int:
    from yalis.study.grid import load_study
    from yalis.study.run import run_study
    from yalis.study.slurm import on_slurm

    study = load_study(args.file)
    if args.slurm or args.submit:
        study = on_slurm(study)
    folder = args.output or Path("results") / study.name
    for words in study.skipped:
        sys.stderr.write(f"left out: {words}\n")
    if args.list:
        for cell in study.cells:
            print(f"{cell.key}  {cell.label}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    _predict(study, folder)
    if args.slurm or args.submit:
        return _slurm(study, folder, submitting=args.submit)
    with _progress(len(study.cells)) as progress:
        failed = run_study(
            study, folder, retry=not args.no_retry, say=lambda line: print(line, flush=True), progress=progress
        )
    print(f"{len(study.cells) - failed} of {len(study.cells)} cells measured; yalis study report {folder}")
    return 1 if failed == len(study.cells) else 0


def _slurm(study: Study, folder: Path, *, submitting: bool) -> int:
    from yalis.study.run import take_in
    from yalis.study.slurm import submit, write_scripts

    measured = take_in(study, folder)
    scripts = write_scripts(study, folder)
    print(f"{measured} of {len(study.cells)} cells measured; {len(scripts)} job scripts in {folder / 'jobs'}")
    if submitting:
        jobs = submit(scripts)
        for script, job in jobs.items():
            print(f"job {job}: {script}")
        if len(jobs) < len(scripts):
            print(
                f"{len(scripts) - len(jobs)} were submitted before; to hand one in again remove its .job file in "
                f"{folder / 'jobs'}"
            )
    print("run the same command again to take in what has finished, then yalis study report")
    return 0


def _predict(study: Study, folder: Path) -> None:
    """Store what the model says of every cell, once, before anything is measured."""
    from yalis.study.cluster import load_cluster
    from yalis.study.forecast import forecast
    from yalis.study.report import PREDICTIONS

    path = folder / PREDICTIONS
    found = json.loads(path.read_text()) if path.exists() else {}
    cluster = load_cluster(study.cluster) if study.cluster else None
    for cell in study.cells:
        if cell.key not in found:
            prediction = forecast(cell, cluster)
            if prediction is not None:
                found[cell.key] = prediction
    if found:
        path.write_text(json.dumps(found, indent=1) + "\n")


@contextmanager
def _progress(cells: int) -> Iterator[Progress | None]:
    """A bar of cells on a terminal, with the present one's label; elsewhere nothing, the lines say enough."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Lines that go to the same terminal must pass above the bar; lines that go to a file must not come here.
    lines_here = sys.stdout.isatty()
    with Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=lines_here) as bar:
        task = bar.add_task("", total=cells)

        class Shown:
            def begin(self, label: str) -> None:
                bar.update(task, description=label)

            def end(self) -> None:
                bar.advance(task)

        yield Shown()


def _report(args: argparse.Namespace) -> int:
    from yalis.study.report import write_report

    print(write_report(args.folder, title=args.title, baseline=args.baseline))
    return 0
