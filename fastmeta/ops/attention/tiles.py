"""What one program of an attention kernel takes: a table that ``benchmarks/gpu/tune.py`` writes, tiles.json.

Rows are of the kernel and of its kind: a head's width, how operands are multiplied, before Hopper or on its cores,
which multiply 64 rows at a time from shared memory. Tiles much larger than those of the table spill registers, into
which float32 operands are split where tensor cores do not read them from shared memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("tiles.json")
NARROWEST = 32  # that has rows of its own
WIDEST = 128


class Tile(NamedTuple):
    """What one program takes: queries, keys, warps, stages of its loop's loads."""

    queries: int
    keys: int
    warps: int
    stages: int


class Kind(NamedTuple):
    """What decides about a kernel's build: a head's width as a power of two, how products are made, by what cores."""

    width: int
    precision: str
    hopper: bool
    dropout: bool

    @property
    def wide(self) -> bool:
        """Whether operands are read a few columns at a time, for in parts, as float32's accuracy takes them, none fits.

        Dropout is in these kernels alone.
        """
        return self.dropout or (self.precision in ("tf32x3", "bf16x6", "ieee") and self.width == WIDEST)

    @property
    def apart(self) -> bool:
        """Whether keys and values have launches of their own: the sums of both do not fit the registers together."""
        return self.wide or (self.precision in ("bf16x6", "tf32") and self.width == 64)

    @property
    def row(self) -> str:
        """Its row in the table: wide kernels have one for each kind of cores, and with dropout one for any width."""
        operands = "bf16" if self.precision in ("bf16", "bf16 rounded") else "tf32"
        words = ["dropout", operands] if self.dropout else ["wide"] if self.wide else []
        words = words or [str(max(NARROWEST, self.width)), operands]
        return " ".join([*words, "hopper"] if self.hopper else words)

    def tile(self, kernel: str) -> Tile:
        """What a program of ``kernel`` takes."""
        return _table[kernel][self.row]


Table = dict[str, dict[str, Tile]]


def read() -> Table:
    """The table as it is written."""
    written = json.loads(FILE.read_text())
    return {kernel: {row: Tile(*tile) for row, tile in rows.items()} for kernel, rows in written.items()}


def written(table: Table) -> str:
    """A table as :data:`FILE` holds it, a line a row."""
    kernels = []
    for kernel, rows in table.items():
        lines = [f"  {json.dumps(row)}: {json.dumps(list(tile))}" for row, tile in rows.items()]
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


@contextmanager
def instead(kernel: str, row: str, tile: Tile) -> Iterator[None]:
    """Within it, in every thread, a kernel's programs of a kind take another tile: to find out which is the best."""
    before = _table[kernel][row]
    _table[kernel][row] = tile
    try:
        yield
    finally:
        _table[kernel][row] = before


_table = read()
