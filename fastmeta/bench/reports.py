"""What ``fastmeta bench ops`` has found, for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmeta.bench.html import Bars, Section, Table
from fastmeta.bench.networks import NETWORKS
from fastmeta.bench.ops import HEADER, Row, cells
from fastmeta.bench.texts import table

ABOUT = (
    "Times are of one task of one inner step, with all threads at work; FLOPs and bytes are the same formula for every "
    "backend. The error is the map's against float64 on the same operands; (whole) where a backend runs the maps in "
    "a meta-step: then it is the meta-gradient's. Where either error is beyond its bound there is no comparison."
)


def ops_text(content: dict[str, Any], rows: Sequence[Row]) -> str:
    """For the terminal."""
    return "\n".join([content["machine"], content["ceilings"], "", table(HEADER, [cells(row) for row in rows])])


def of_ops(rows: Sequence[Row]) -> list[Section]:
    """A section a network: the share of the floor as bars, everything as a table."""
    sections = []
    for name in dict.fromkeys(row.network for row in rows):
        own = [row for row in rows if row.network == name]
        title = NETWORKS[name].title if name in NETWORKS else name
        best: dict[tuple[str, ...], Row] = {}
        for row in own:
            if row.right and (row.place not in best or row.us < best[row.place].us):
                best[row.place] = row
        bars = [
            (f"{row.op} {row.module} {row.map}", row.us, f"{row.us:.3g} us, {row.backend}", _kind(row))
            for row in best.values()
        ]
        marks = ["" if row.right else "bad" for row in own]
        lines = [cells(row)[1:] for row in own]
        drawn = Bars("microseconds a task of each map by its quickest backend, logarithmic", bars)
        sections.append(Section(title, [drawn, Table(HEADER[1:], lines, marks)]))
    return [Section("How to read this", [ABOUT]), *sections]


def _kind(row: Row) -> str:
    return "other" if row.backend == "reference" else "ours"
