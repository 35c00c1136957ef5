"""The report's HTML: one file, readable on a wide and a narrow screen, light and dark, that fetches nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def figure_html(title: str, text: str, light: Path, dark: Path) -> str:
    """A section with a plot for each colour scheme inside it."""

    def data(path: Path) -> str:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

    return (
        f'<section><h2>{html.escape(title)}</h2><figure><div class="wide"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{data(dark)}">'
        f'<img alt="{html.escape(title)}" src="{data(light)}"></picture></div>'
        f"<figcaption>{html.escape(text)}</figcaption></figure></section>"
    )


def table_html(title: str, text: str, header: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    """A section with a table; columns without any value are left out, the first ``names`` columns hold words."""
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]

    def cell(tag: str, i: int, words: str) -> str:
        kind = "" if i < names else ' class="n"'
        return f"<{tag}{kind}>{html.escape(words)}</{tag}>"

    head = "".join(cell("th", i, header[i]) for i in keep)
    body = "".join("<tr>" + "".join(cell("td", i, row[i]) for i in keep) + "</tr>" for row in rows)
    return (
        f'<section><h2>{html.escape(title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="faint">{html.escape(text)}</p></section>'
    )


def failures_html(failures: Sequence[Mapping[str, Any]]) -> str:
    """Cells that failed, with their last words."""
    if not failures:
        return ""
    items = "".join(f"<li>{html.escape(e['label'])}<pre>{html.escape(e.get('error', ''))}</pre></li>" for e in failures)
    return f"<section><h2>Cells that failed</h2><ul>{items}</ul></section>"


def page_html(title: str, summary: str, *, emulated: bool, sections: Sequence[str]) -> str:
    """The whole page."""
    return _PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary),
        warning=_WARNING if emulated else "",
        sections="\n".join(sections),
    )


_WARNING = (
    '<p class="warning">Some of this was measured over an <b>emulated network</b> and is labelled so. It shows the '
    "shape of an algorithm, never the speed of a network.</p>"
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark;
  --ink: #1b1f24; --paper: #ffffff; --faint: #5b6570; --line: #d9dee4; --mark: #fff4d6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #d8dee6; --paper: #14181d; --faint: #98a3af; --line: #303842; --mark: #3a3115; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 74rem; padding: 1.5rem 1rem 4rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.1rem; line-height: 1.3; margin: 2.4rem 0 .6rem; }}
.faint, figcaption {{ color: var(--faint); font-size: .875rem; max-width: 60rem; }}
figure {{ margin: 0; }} img {{ max-width: 100%; min-width: 36rem; height: auto; display: block; }}
figcaption, section > p {{ margin: .4rem 0 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th {{ vertical-align: bottom; font-weight: 600; }} th.n {{ white-space: normal; }}
.n {{ text-align: right; }}
.warning {{ background: var(--mark); padding: .6rem .8rem; border-radius: .3rem; }}
pre {{ overflow-x: auto; font-size: .8rem; }}
</style></head><body>
<h1>{title}</h1>
<p class="faint">{summary}</p>
{warning}
{sections}
</body></html>
"""
