"""Writes the attention kernels' table of tiles: ``python -m benchmarks.gpu.tune [--kernel NAME] [--row ROW]``.

For each row of the table that this GPU reads, tiles up to twice or half as large as the present one are compiled ahead
of time. Those that spill registers, or take more shared memory than a block can have, in any kind of build that reads
the row are passed over. With each of the others the map that the kernel belongs to is captured, and their replays are
timed in turns. The quickest is written where it is ahead of the present one by more than the noise; run again until no
row changes. A tile decides in which order sums are made: so the table is written here, and not while training.

``--compile 90`` needs no GPU: it compiles for that compute capability, says what does not spill, and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu.attention import Problem
from fastmeta.bench.gpu_timing import graphed, interleaved
from fastmeta.core import files
from fastmeta.core.triton_support import PRECISIONS
from fastmeta.ops.attention import tiles
from fastmeta.ops.attention.reference import Setting
from fastmeta.ops.attention.tiles import Kind, Table, Tile
from tests.kernels.resources import Build, faults, read

WIDTHS = (32, 64, 128, 16)  # the last reads the rows of the first
SIDES = (16, 32, 64, 128)  # queries or keys of a tile
WARPS, STAGES = (4, 8), (1, 2)
AHEAD = 0.97  # of the present tile's time, that another must take at most
BATCH, HEADS, LENGTH = 4, 8, 1024
DROPOUT = 0.1
HOPPER = 90

Faults = Callable[[str, Kind, list[Tile]], list[list[str]]]
Times = Callable[[str, Kind, list[Tile]], dict[Tile, float]]


def kinds(*, hopper: bool) -> dict[str, list[Kind]]:
    """The kinds of builds that read each row of the table, those of float32's accuracy first."""
    from fastmeta.ops.attention.triton import precision_of

    found: dict[str, list[Kind]] = {}
    for asked, width, dropout in itertools.product(PRECISIONS.values(), WIDTHS, (False, True)):
        kind = Kind(width, precision_of(asked, hopper=hopper), hopper, dropout)
        found.setdefault(kind.row, []).append(kind)
    return found


def candidates(present: Tile) -> list[Tile]:
    """Tiles near the present one, which comes first."""

    def near(size: int) -> list[int]:
        return [side for side in SIDES if size <= 2 * side and side <= 2 * size]

    every = itertools.product(near(present.queries), near(present.keys), WARPS, STAGES)
    return [present, *(tile for one in every if (tile := Tile(*one)) != present)]


def wrong(capability: int) -> Faults:
    """What is wrong with a kernel's builds of a kind, a list for each tile, compiled for a compute capability."""
    from triton.compiler.errors import CompilationError

    from fastmeta.ops.attention.triton import build

    def look(one: Build) -> list[str]:
        try:
            return faults(one.name, read(one), capability, tensor_cores=True)
        except (CompilationError, RuntimeError) as error:  # a tile that tensor cores cannot take
            return [f"{one.name}: {str(error).splitlines()[-1]}"]

    def find(kernel: str, kind: Kind, given: list[Tile]) -> list[list[str]]:
        builds = []
        for tile in given:
            with tiles.instead(kernel, kind.row, tile):
                builds.append(Build(build(kernel, kind, (capability,)), capability))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(look, builds))

    return find


def timed(kernel: str, kind: Kind, given: list[Tile]) -> dict[Tile, float]:
    """Milliseconds of the map that a kernel belongs to, with each tile, on this GPU."""
    from fastmeta.ops.attention import triton

    asked = next(
        name for name in PRECISIONS if triton.precision_of(PRECISIONS[name], hopper=kind.hopper) == kind.precision
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        problem = Problem(BATCH, HEADS, LENGTH, kind.width)
        problem.setting = Setting(problem.setting.scale, False, DROPOUT if kind.dropout else 0.0)
        call = problem.maps(triton)[map_of(kernel)]
        replays = {}
        for tile in given:
            with tiles.instead(kernel, kind.row, tile):
                replays[str(tile)] = graphed(call)
        times = interleaved(replays)
    finally:
        torch.set_float32_matmul_precision(before)
    return {tile: times[str(tile)].median for tile in given}


def map_of(kernel: str) -> str:
    """The map that launches a kernel."""
    for side in ("_queries", "_keys", "_values"):
        kernel = kernel.removesuffix(side)
    return kernel


def tune(
    table: Table, kernel: str, readers: list[Kind], find: Faults, times: Times | None, say: Callable[[str], None]
) -> Tile:
    """The tile for one row of the table: without ``times`` the present one, and what else could be is said."""
    row = readers[0].row
    present = table[kernel][row]
    fit = candidates(present)
    for kind in readers:
        reasons = dict(zip(fit, find(kernel, kind, fit), strict=True))
        fit = [tile for tile in fit if not reasons[tile]]
        for tile in reasons.keys() - fit:
            say(f"  passed over: {reasons[tile][0]}")
    if times is None or fit in ([], [present]):
        say(f"{kernel}, {row}: {len(fit)} fit: {', '.join(map(str, map(tuple, fit)))}")
        return present
    found = times(kernel, readers[0], fit)
    best = min(found, key=lambda tile: found[tile])
    if present in found and found[best] > AHEAD * found[present]:
        best = present
    was = f"{found[present]:.4f} ms" if present in found else "does not fit"
    say(f"{kernel}, {row}: {tuple(best)} {found[best]:.4f} ms; present {tuple(present)} {was}")
    return best


def used(table: Table, rows: dict[str, list[Kind]]) -> Iterable[tuple[str, list[Kind]]]:
    """Each kernel with the kinds that read one of its rows; values alone are a launch of some kinds only."""
    for kernel in table:
        for row, readers in rows.items():
            own = [kind for kind in readers if kind.apart or kernel != "tangent_backward_values"]
            if own and row in table[kernel]:
                yield kernel, own


def main(arguments: list[str] | None = None) -> None:
    """Tune the rows that are asked for."""
    table = tiles.read()
    hopper_or_not = [kinds(hopper=hopper) for hopper in (False, True)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=table, help="only these kernels; may be repeated")
    parser.add_argument(
        "--row", action="append", choices=[r for rows in hopper_or_not for r in rows], help="only these"
    )
    parser.add_argument("--compile", type=int, choices=(80, HOPPER), help="compile alone, for this compute capability")
    parser.add_argument("--out", type=Path, default=tiles.FILE, help="where the table is written")
    chosen = parser.parse_args(arguments)
    if chosen.compile is None and not torch.cuda.is_available():
        parser.error("tiles are timed on a GPU, and none is visible; --compile 80 or --compile 90 needs none")
    capability = chosen.compile
    if capability is None:
        major, minor = torch.cuda.get_device_capability()
        capability = HOPPER if (major, minor) == (9, 0) else 80
    find, times = wrong(capability), None if chosen.compile else timed
    for kernel, readers in used(table, hopper_or_not[capability == HOPPER]):
        if kernel not in (chosen.kernel or table) or readers[0].row not in (chosen.row or [readers[0].row]):
            continue
        table[kernel][readers[0].row] = tune(table, kernel, readers, find, times, lambda line: print(line, flush=True))
        if times is not None:  # after every row: an interrupted run loses the one at work alone
            files.write_text(chosen.out, tiles.written(table))


if __name__ == "__main__":
    main()
