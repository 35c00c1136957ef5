"""Plots of a study's all-reduces: by size beside the model, against a baseline, by nodes, and the fastest of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from yalis.study.engine_plots import EMULATED
from yalis.study.measured import Swept
from yalis.study.plots import COLOURS, Plot, figure, plain_log_axis, plain_ticks

# What a user has without yalis comes first.
_BASELINES = ("nccl", "torch", "gloo", "ring")
_COLUMNS = 3


def baseline_of(names: Sequence[str], wanted: str = "") -> str:
    """The all-reduce that ratios are to: the wanted one, else the library's, else a ring, else the first."""
    return next((name for name in (wanted, *_BASELINES) if name in names), names[0])


def allreduce_plots(found: Sequence[Swept], machine: str, baseline: str = "") -> list[Plot]:
    """Those for which there is something to show."""
    plots = []
    for per_node in sorted({s.cell.ranks_per_node for s in found}):
        here = [s for s in found if s.cell.ranks_per_node == per_node]
        names = list(dict.fromkeys(s.name for s in here))
        base = baseline_of(names, baseline)
        note = EMULATED if any(s.emulated for s in here) else ""
        ranks = f"{per_node} rank{'s' if per_node > 1 else ''} a node"
        on = _network(here, machine)
        model = next((s.model for s in here if s.model), "")
        drawn = f" Lines: {model}." if model else ""
        plots.append(
            Plot(
                f"allreduce-sizes-{per_node}",
                f"All-reduce by message size, {ranks}{note}",
                f"Points: median of the longest time over ranks, bf16.{drawn} {on}.",
                partial(_draw_sizes, here),
            )
        )
        if len(names) > 1:
            plots.append(
                Plot(
                    f"allreduce-ratio-{per_node}",
                    f"Times faster than {base}, {ranks}{note}",
                    f"Median of {base} over the median of the other, the same size and nodes; above 1 it is faster. "
                    f"{on}.",
                    partial(_draw_ratio, here, base),
                )
            )
        if len({s.nodes for s in here}) > 2:
            plots.append(
                Plot(
                    f"allreduce-nodes-{per_node}",
                    f"All-reduce of 1 KiB by nodes, {ranks}{note}",
                    "Recursive doubling takes log2 of the nodes in steps (and two more where they are no power of two)"
                    f", a ring 2(N-1).{drawn} {on}.",
                    partial(_draw_nodes, here),
                )
            )
            if len(names) > 1:
                plots.append(
                    Plot(
                        f"allreduce-map-{per_node}",
                        f"Fastest all-reduce by size and nodes, {ranks}{note}",
                        f"By median; the numbers say how many times faster than the next. {on}.",
                        partial(_draw_map, here),
                    )
                )
    return plots


def _network(found: Sequence[Swept], machine: str) -> str:
    words = next((s.emulated for s in found if s.emulated), "")
    return f"Measured {f'over an {words}, ' if words else ''}on {machine}"


def _colours(found: Sequence[Swept]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(s.name for s in found), COLOURS * 2, strict=False))


def _draw_sizes(found: Sequence[Swept], path: Path, dark: bool) -> None:
    counts = sorted({s.nodes for s in found})
    colours = _colours(found)
    columns = min(_COLUMNS, len(counts))
    rows = math.ceil(len(counts) / columns)
    with figure(path, width=11, height=0.4 + 3.0 * rows, columns=columns, rows=rows, dark=dark) as made:
        panels = made if isinstance(made, list) else [made]
        top = 1e3 * max(t for s in found for t in s.seconds.values())
        low = 1e3 * min(t for s in found for t in s.seconds.values())
        for axes, count in zip(panels, counts, strict=False):
            for s in (s for s in found if s.nodes == count):
                line = {size: t for size, t in s.predicted.items() if min(s.seconds) <= size <= max(s.seconds)}
                axes.plot(list(line), [1e3 * t for t in line.values()], "-", color=colours[s.name], linewidth=1)
                axes.plot(
                    list(s.seconds),
                    [1e3 * t for t in s.seconds.values()],
                    "o",
                    color=colours[s.name],
                    markersize=4,
                    label=s.name,
                )
            _size_axis(axes)
            axes.set_yscale("log")
            axes.set_ylim(low / 1.5, top * 1.5)
            plain_log_axis(axes.yaxis)
            axes.set_title(f"{count} node{'s' if count > 1 else ''}, {found[0].cell.ranks_per_node * count} ranks")
            axes.set_ylabel("ms")
        panels[0].legend()
        for axes in panels[len(counts) :]:
            axes.set_axis_off()


def _draw_ratio(found: Sequence[Swept], base: str, path: Path, dark: bool) -> None:
    slow = {s.nodes: s.seconds for s in found if s.name == base}
    styles = ("-", "--", ":", "-.")
    others = [name for name in dict.fromkeys(s.name for s in found) if name != base]
    counts = dict(zip(sorted({s.nodes for s in found}), COLOURS * 2, strict=False))
    with figure(path, width=9, height=4.2, dark=dark) as axes:
        for s in found:
            if s.name == base or s.nodes not in slow:
                continue
            ratio = {size: slow[s.nodes][size] / t for size, t in s.seconds.items() if size in slow[s.nodes]}
            axes.plot(
                list(ratio),
                list(ratio.values()),
                f"o{styles[others.index(s.name) % len(styles)]}",
                color=counts[s.nodes],
                markersize=4,
                label=f"{s.name}, {s.nodes} node{'s' if s.nodes > 1 else ''}",
            )
        axes.axhline(1.0, color="#888888", linewidth=1)
        _size_axis(axes)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"times faster than {base}")
        axes.figure.legend(loc="outside right upper")


def _draw_nodes(found: Sequence[Swept], path: Path, dark: bool) -> None:
    def at_1k(seconds: Any) -> float:
        return 1e3 * float(seconds[min(seconds, key=lambda size: abs(size - 1024))])

    with figure(path, dark=dark) as axes:
        for name, colour in _colours(found).items():
            line = sorted((s for s in found if s.name == name), key=lambda s: s.nodes)
            axes.plot([s.nodes for s in line], [at_1k(s.seconds) for s in line], "o", color=colour, label=name)
            known = [s for s in line if s.predicted]
            axes.plot(
                [s.nodes for s in known],
                [at_1k(s.predicted) for s in known],
                "-",
                color=colour,
                linewidth=1,
                label=f"{name}, model" if known else None,
            )
        plain_ticks(axes, sorted({s.nodes for s in found}))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("nodes")
        axes.set_ylabel("ms")
        axes.legend()


def _draw_map(found: Sequence[Swept], path: Path, dark: bool) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = _colours(found)
    names = list(colours)
    nodes = sorted({s.nodes for s in found})
    sizes = sorted({size for s in found for size in s.seconds})
    with figure(path, width=9, height=1.5 + 0.42 * len(nodes), dark=dark) as axes:
        best: list[list[float]] = []
        for y, count in enumerate(nodes):
            row = []
            for x, size in enumerate(sizes):
                times = sorted((s.seconds[size], s.name) for s in found if s.nodes == count and size in s.seconds)
                row.append(float(names.index(times[0][1])) if times else math.nan)
                if len(times) > 1:
                    words = f"{times[1][0] / times[0][0]:.1f}"
                    axes.text(x, y, words, ha="center", va="center", fontsize=8, color="white")
            best.append(row)
        palette = ListedColormap(list(colours.values()))
        axes.imshow(best, aspect="auto", cmap=palette, vmin=-0.5, vmax=len(names) - 0.5, origin="lower")
        axes.set_yticks(range(len(nodes)), [str(n) for n in nodes])
        axes.set_xticks(range(len(sizes)), [size_words(s) for s in sizes])
        axes.set_xlabel("message, bytes")
        axes.set_ylabel("nodes")
        axes.grid(visible=False)
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        axes.figure.legend(handles=handles, loc="outside right upper")


def _size_axis(axes: Any) -> None:
    import matplotlib.ticker as ticker

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(ticker.LogLocator(base=4))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: size_words(x)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("message, bytes")


def size_words(nbytes: float) -> str:
    """As ``4K``."""
    for unit, scale in (("M", 1 << 20), ("K", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:g}{unit}"
    return f"{nbytes:g}"
