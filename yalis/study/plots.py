"""Plots of the study, drawn with matplotlib in one style. Titles say what was measured, or predicted, on what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yalis.study.terms import NAMES

if TYPE_CHECKING:
    from yalis.study.plan import Plan

# Distinguishable in print, and with the common kinds of colour blindness (Okabe and Ito); grey for what is not work.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#555555", "#A6A6A6", "#D4D4D4")
TERM_COLOURS = dict(zip(NAMES, COLOURS, strict=True))


@dataclass(frozen=True)
class Plot:
    """A plot of a report: ``draw(path, dark)`` writes a PNG; ``title`` says of what, ``text`` how to read it."""

    name: str
    title: str
    text: str
    draw: Callable[[Path, bool], None]


@contextmanager
def figure(
    path: Path, *, width: float = 8.0, height: float = 4.5, columns: int = 1, rows: int = 1, dark: bool = False
) -> Iterator[Any]:
    """A figure with axes in ``rows`` and ``columns`` (one, or a list row by row), saved to ``path`` on the way out.

    Args:
        dark: for a dark page.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "axes.titlesize": 10,
        "legend.fontsize": 8,
        "legend.frameon": False,
    }
    if dark:
        ink, paper = "#d8dee6", "#14181d"
        names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
        style |= dict.fromkeys(names, ink) | dict.fromkeys(("figure.facecolor", "axes.facecolor"), paper)
    with plt.rc_context(style):
        made, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
        try:
            yield axes[0][0] if columns * rows == 1 else list(axes.flat)
            made.savefig(path, dpi=120)
        finally:
            plt.close(made)


def plot_plan(plan: Plan, path: Path) -> None:
    """Time per output token by number of GPUs, a line per scheme and all-reduce; hollow where memory is short."""
    lines: dict[str, list[tuple[int, float, bool]]] = {}
    for p in plan.rows:
        scheme = "TP" if p.layout.pp == 1 else "PP" if p.layout.tp == 1 else "hybrid"
        name = scheme if p.layout.tp == 1 else f"{scheme}, {p.algorithm}"
        lines.setdefault(name, []).append((p.layout.ranks, 1e3 * p.tpot.total_s, p.memory.fits))
    with figure(path) as axes:
        for colour, (name, points) in zip(COLOURS * 3, sorted(lines.items()), strict=False):
            best: dict[int, tuple[float, bool]] = {}
            for ranks, value, fits in points:
                if ranks not in best or (not fits, value) < (not best[ranks][1], best[ranks][0]):
                    best[ranks] = (value, fits)
            xs = sorted(best)
            axes.plot(xs, [best[x][0] for x in xs], color=colour, label=name)
            for x in xs:
                axes.plot(x, best[x][0], "o", color=colour, markerfacecolor=colour if best[x][1] else "white")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain_ticks(axes, sorted({p.layout.ranks for p in plan.rows}))
        axes.set_xlabel("GPUs")
        axes.set_ylabel("TPOT, ms")
        word = " (emulated network)" if plan.cluster.emulated else ""
        axes.set_title(
            f"Predicted TPOT: {Path(plan.model).name}, {plan.workload.name}\n{plan.cluster.title}{word}; "
            "hollow: does not fit"
        )
        axes.legend()


def plain_ticks(axes: Any, xs: Sequence[float]) -> None:
    """Whole numbers on a logarithmic axis."""
    import matplotlib.ticker as ticker

    axes.set_xticks(list(xs), [f"{x:g}" for x in xs])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    if axes.get_yscale() == "log":
        plain_log_axis(axes.yaxis)


def plain_log_axis(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of each decade, written as plain numbers."""
    import matplotlib.ticker as ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def stacked_terms(
    axes: Any, bars: Mapping[str, Mapping[str, float]], *, unit: float = 1e3, faint: Collection[str] = ()
) -> None:
    """Stacked horizontal bars: seconds by term (`yalis.study.terms`), one bar a name; ``faint`` ones stand back."""
    names = list(bars)
    left = [0.0] * len(names)
    for term, label in NAMES.items():
        values = [unit * bars[name].get(term, 0.0) for name in names]
        if not any(values):
            continue
        drawn = axes.barh(names, values, left=left, color=TERM_COLOURS[term], label=label, height=0.65)
        for name, bar in zip(names, drawn, strict=True):
            bar.set_alpha(0.5 if name in faint else 1.0)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
