"""Plots of a study's engine cells: strong scaling, where a step goes, predicted against measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from yalis.study.explain import COMPUTE, COMPUTE_NAME
from yalis.study.measured import Measured
from yalis.study.plots import COLOURS, Plot, figure, plain_log_axis, plain_ticks, stacked_terms
from yalis.study.terms import NAMES

EMULATED = " (emulated network)"
PARTLY = " (partly over an emulated network)"
_GREY = "#888888"


def engine_plots(cells: Sequence[Measured], machine: str) -> list[Plot]:
    """Those for which there is something to show; one of each kind per model and workload."""
    plots = []
    for index, (model, workload) in enumerate(dict.fromkeys((m.cell.model, m.cell.workload) for m in cells)):
        here = [m for m in cells if (m.cell.model, m.cell.workload) == (model, workload)]
        what = f"{Path(model).name}, {workload}"
        if len({m.cell.ranks for m in here if m.cell.kind == "yalis"}) > 1:
            plots.append(
                Plot(
                    f"scaling-{index}",
                    f"Strong scaling: {what}{_note(here)}",
                    "Time from arrival to the last token, speed-up over the smallest number of ranks, and efficiency "
                    f"(speed-up over the ranks it took). Measured on {machine}.",
                    partial(_draw_scaling, here),
                )
            )
        split = [m for m in here if m.terms]
        if split:
            plots.append(
                Plot(
                    f"terms-{index}",
                    f"Where a decode step goes: {what}{_note(split)}",
                    "Terms on rank 0 that add up to the time per output token, and below each bar what was predicted; "
                    "computation is products, attention and launches together unless a trace divides it. Measured on "
                    f"{machine}.",
                    partial(_draw_terms, split),
                )
            )
    predicted = [m for m in cells if m.predicted]
    if predicted:
        plots.append(
            Plot(
                "residuals",
                f"Predicted against measured{_note(predicted)}",
                "Predictions were stored before the runs. On the line they are right, between the dashed ones within "
                f"15 percent. Measured on {machine}.",
                partial(_draw_residuals, predicted),
            )
        )
    return plots


def _note(cells: Sequence[Measured]) -> str:
    if all(m.cell.emulate for m in cells):
        return EMULATED
    return PARTLY if any(m.cell.emulate for m in cells) else ""


def scaling_lines(cells: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Cells by the line they lie on, by ranks: nodes are joined, since they are what the ranks grow over.

    Every line begins with what it grows from: one node of the same kind where the line crosses nodes, and one rank.
    """
    lines: dict[str, list[Measured]] = {}
    for m in cells:
        c = m.cell
        if c.ranks == 1:
            continue
        lines.setdefault(_line_name(m, over_nodes=c.nodes > 1), []).append(m)
    for name, line in lines.items():
        one = line[0]
        per_node = one.cell.ranks_per_node
        if one.cell.nodes > 1:
            line += [
                m
                for m in cells
                if m.cell.ranks == per_node > 1 and m.cell.nodes == 1 and _line_name(m, over_nodes=True) == name
            ]
        line += [m for m in cells if m.cell.ranks == 1 and m.cell.engine == one.cell.engine]
        line.sort(key=lambda m: m.cell.ranks)
    return lines


def _line_name(m: Measured, *, over_nodes: bool) -> str:
    c = m.cell
    kind = "TP" if c.pp == 1 else "PP" if c.tp == 1 else "hybrid"
    reduce = f", {c.all_reduce}" if c.tp > 1 and c.all_reduce != "auto" else ""
    where = f"{c.ranks_per_node} a node" if over_nodes else "one node"
    return f"{c.engine} {kind}{reduce}, {where}"


def _draw_scaling(cells: Sequence[Measured], path: Path, dark: bool) -> None:
    lines = scaling_lines(cells)
    drawn = {m.cell.engine for line in lines.values() for m in line}
    with figure(path, width=11, height=3.8, columns=3, dark=dark) as (time_axes, speed_axes, share_axes):
        for colour, (name, line) in zip(COLOURS * 3, lines.items(), strict=False):
            xs = [m.cell.ranks for m in line]
            base = line[0]
            speeds = [base.e2e_s / m.e2e_s for m in line]
            label = name + (", emulated" if any(m.cell.emulate for m in line) else "")
            time_axes.plot(xs, [m.e2e_s for m in line], "o-", color=colour, label=label)
            speed_axes.plot(xs, speeds, "o-", color=colour)
            shares = [100 * s * base.cell.ranks / x for s, x in zip(speeds, xs, strict=True)]
            share_axes.plot(xs, shares, "o-", color=colour)
        for m in cells:
            if m.cell.engine not in drawn:
                time_axes.axhline(m.e2e_s, color=_GREY, linestyle=":", label=f"{m.cell.engine} {m.cell.scheme}")
        ranks = sorted({m.cell.ranks for m in cells})
        least = min(ranks)
        speed_axes.plot(ranks, [r / least for r in ranks], "--", color=_GREY, linewidth=1, label="ideal")
        share_axes.axhline(100, color=_GREY, linestyle="--", linewidth=1)
        for axes, label in (
            (time_axes, "time, s"),
            (speed_axes, f"speed-up over {least} rank{'s' if least > 1 else ''}"),
            (share_axes, "efficiency, %"),
        ):
            axes.set_xscale("log", base=2)
            plain_ticks(axes, ranks)
            if axes is time_axes:  # engines may differ by an order of magnitude
                axes.set_yscale("log")
                plain_log_axis(axes.yaxis)
            else:
                axes.set_ylim(bottom=0)
            axes.set_xlabel("ranks")
            axes.set_title(label)
        time_axes.figure.legend(loc="outside lower left", ncols=4)


def _draw_terms(cells: Sequence[Measured], path: Path, dark: bool) -> None:
    together = all("breakdown" not in m.record["results"] for m in cells)
    bars: dict[str, Mapping[str, float]] = {}
    for m in cells:
        name = m.cell.scheme + (f", {m.cell.all_reduce}" if m.cell.tp > 1 and m.cell.all_reduce != "auto" else "")
        bars[f"{m.cell.engine} {name}"] = m.terms
        if m.predicted:
            bars[f"predicted {name}"] = _joined(m.predicted["tpot_terms_s"], together)
    with figure(path, height=1.6 + 0.36 * len(bars), dark=dark) as axes:
        stacked_terms(axes, bars, faint=[name for name in bars if name.startswith("predicted ")])
        handles, labels = axes.get_legend_handles_labels()
        labels = [COMPUTE_NAME if together and label == NAMES["other_s"] else label for label in labels]
        axes.figure.legend(handles, labels, ncols=6, loc="outside lower left")
        axes.set_xlabel("ms per output token")


def _joined(terms: Mapping[str, float], together: bool) -> dict[str, float]:
    """Terms with all computation in one where the measurement has it so."""
    found = dict(terms)
    if together:
        found["other_s"] = sum(found.pop(name, 0.0) for name in COMPUTE)
    return found


def _draw_residuals(cells: Sequence[Measured], path: Path, dark: bool) -> None:
    with figure(path, width=9, height=4.4, columns=2, dark=dark) as both:
        for axes, name, label in zip(both, ("ttft_s", "tpot_s"), ("TTFT", "TPOT"), strict=True):
            points = [m for m in cells if getattr(m, name)]
            if not points:  # one output token has no TPOT
                axes.set_axis_off()
                continue
            pairs = [(1e3 * getattr(m, name), 1e3 * m.predicted[name]) for m in points]
            low, high = min(map(min, pairs)) / 1.3, max(map(max, pairs)) * 1.3
            axes.plot([low, high], [low, high], color=_GREY, linewidth=1)
            for factor in (1.15, 1 / 1.15):
                axes.plot([low, high], [low * factor, high * factor], color=_GREY, linewidth=0.8, linestyle="--")
            for colour, scheme in zip(COLOURS * 3, dict.fromkeys(m.cell.scheme for m in points), strict=False):
                some = [pair for pair, m in zip(pairs, points, strict=True) if m.cell.scheme == scheme]
                axes.plot([p[0] for p in some], [p[1] for p in some], "o", color=colour, label=scheme)
            for set_scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
                set_scale("log")
                plain_log_axis(axis)
            axes.set_xlim(low, high)
            axes.set_ylim(low, high)
            mean = sum(abs(m.residual(name) or 0.0) for m in points) / len(points)
            axes.set_title(f"{label}: {100 * mean:.0f} percent off on average")
            axes.set_xlabel("measured, ms")
            axes.set_ylabel("predicted, ms")
            axes.legend()
