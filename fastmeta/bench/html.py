"""A report as one HTML file that needs no network: sortable tables, drawings as SVG, light and dark."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1d2429; --soft: #5b6770; --line: #d9dfe3; --head: #f2f5f6;
  --ours: #2f7f5f; --other: #8a98a3; --bad: #b3362b; }
@media (prefers-color-scheme: dark) { :root { --back: #14181b; --ink: #e4e9ec; --soft: #9aa7b0; --line: #323a40;
  --head: #1e2429; --ours: #58b58d; --other: #74828c; --bad: #f08a7d; } }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .word { text-align: left; }
th { background: var(--head); position: sticky; top: 0; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--ours); outline-offset: 3px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr.ours td { color: var(--ours); font-weight: 600; } tr.bad td { color: var(--bad); }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .ours { fill: var(--ours); } svg .other { fill: var(--other); } svg .bad { fill: var(--bad); }
figure { margin: 1rem 0; }
"""

# Rows are sorted by a cell's number where every filled cell of the column has one, else by its words; empty cells last.
SCRIPT = """
document.querySelectorAll("table").forEach(table => table.querySelectorAll("th").forEach((head, column) =>
  head.querySelector("button").addEventListener("click", () => {
    const body = table.tBodies[0], rows = [...body.rows];
    const down = head.getAttribute("aria-sort") === "ascending";
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const filled = rows.filter(row => value(row) !== "");
    const numbers = filled.every(row => row.cells[column].dataset.value !== undefined);
    filled.sort((a, b) => numbers ? value(a) - value(b) : value(a).localeCompare(value(b)));
    if (down) filled.reverse();
    table.querySelectorAll("th").forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...filled, ...rows.filter(row => value(row) === ""));
  })));
"""

NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header.

    Attributes:
        header: names of the columns.
        rows: texts, of the header's length.
        marks: of each row ``ours``, ``bad`` or nothing; none where there are no marks.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marks: Sequence[str] = ()


@dataclass(frozen=True)
class Bars:
    """Lengths side by side on a logarithmic axis.

    Attributes:
        title: what is drawn.
        bars: of each its name, length (above 0), the text behind it, and ``ours``, ``other`` or ``bad``.
    """

    title: str
    bars: Sequence[tuple[str, float, str, str]]


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    parts: Sequence[str | Table | Bars] = field(default_factory=tuple)


def page(title: str, machine: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    body = [f"<h1>{_text(title)}</h1>", f'<p class="soft">{_text(machine)}</p>']
    for section in sections:
        body.append(f"<section><h2>{_text(section.title)}</h2>")
        body += map(_part, section.parts)
        body.append("</section>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{_text(title)}</title><style>{STYLE}</style>"
    shown = "\n".join([*body, f"<script>{SCRIPT}</script>"])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{shown}\n</body></html>\n'


def _part(part: str | Table | Bars) -> str:
    if isinstance(part, str):
        return f"<p>{_text(part)}</p>"
    return _table(part) if isinstance(part, Table) else _bars(part)


def _table(table: Table) -> str:
    heads = "".join(map(_head, table.header, range(len(table.header)), [table] * len(table.header)))
    lines = []
    marks = table.marks or [""] * len(table.rows)
    for row, mark in zip(table.rows, marks, strict=True):
        start = f'<tr class="{mark}">' if mark else "<tr>"
        lines.append(start + "".join(_cell(cell) for cell in row) + "</tr>")
    rows = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _head(title: str, column: int, table: Table) -> str:
    words = any(row[column] and _value(row[column]) is None for row in table.rows)
    start = '<th class="word" aria-sort="none">' if words else '<th aria-sort="none">'
    return f'{start}<button type="button">{_text(title)}</button></th>'


def _value(text: str) -> float | None:
    """The number that a cell begins with."""
    found = NUMBER.match(text)
    return float(found[0]) if found and (found.end() == len(text) or text[found.end()] in " %") else None


def _cell(text: str) -> str:
    value = _value(text)
    if value is not None:
        return f'<td data-value="{value!r}">{_text(text)}</td>'
    return f'<td class="word">{_text(text)}</td>' if text else "<td></td>"


def _bars(picture: Bars) -> str:
    """Each bar's length is by the logarithm, from half the least value on."""
    if not picture.bars:
        return ""
    height, left, wide, after = 22, 220, 560, 190
    values = [value for _, value, _, _ in picture.bars]
    low, high = math.log(min(values) / 2), math.log(max(values))
    lines = []
    for i, (name, value, text, kind) in enumerate(picture.bars):
        y = i * height
        length = max(2.0, wide * (math.log(value) - low) / max(high - low, 1e-9))
        lines.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{_text(name)}</text>')
        lines.append(f'<rect class="{kind}" x="{left}" y="{y + 3}" width="{length:.1f}" height="15" rx="2"></rect>')
        lines.append(f'<text x="{left + length + 7:.1f}" y="{y + 15}">{_text(text)}</text>')
    box = f'viewBox="0 0 {left + wide + after} {len(picture.bars) * height}" width="{left + wide + after}"'
    drawn = "".join(lines)
    return (
        f'<figure><svg {box} role="img" aria-label="{html.escape(picture.title)}">{drawn}</svg>'
        f"<figcaption>{_text(picture.title)}</figcaption></figure>"
    )


def _text(text: str) -> str:
    return html.escape(text, quote=False)
