"""The table of the attention kernels' tiles, and the tuner that writes it; without a GPU its times are made up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import tune
from fastmeta.ops.attention import tiles
from fastmeta.ops.attention.tiles import Kind, Tile
from tests.kernels.resources import ROOT

PRESENT = Tile(64, 32, 4, 1)


def test_the_table_has_a_row_for_every_build() -> None:
    table = tiles.read()
    rows = tune.kinds(hopper=False) | tune.kinds(hopper=True)
    for kernel, found in table.items():
        for row, readers in rows.items():
            if kernel != "tangent_backward_values" or any(kind.apart for kind in readers):
                assert all(kind.tile(kernel) == found[row] for kind in readers), (kernel, row)
        assert found.keys() <= rows.keys()
    assert tiles.FILE.read_text() == tiles.written(table)


def test_another_tile_for_a_while() -> None:
    kind = Kind(64, "tf32x3", False, False)
    before = kind.tile("forward")
    with tiles.instead("forward", kind.row, PRESENT._replace(keys=128)):
        assert kind.tile("forward").keys == 128
    assert kind.tile("forward") == before


def test_candidates_are_near() -> None:
    found = tune.candidates(PRESENT)
    assert found[0] == PRESENT
    assert len(found) == len(set(found)) == 3 * 3 * 2 * 2
    assert {tile.queries for tile in found} == {32, 64, 128}
    assert {tile.keys for tile in tune.candidates(Tile(16, 128, 8, 2))} == {64, 128}


@pytest.mark.parametrize(
    ("best", "spilling", "chosen"),
    [
        (0.9, (), Tile(32, 32, 8, 1)),
        (0.98, (), PRESENT),  # which is noise
        (0.9, ("tf32",), PRESENT),  # it is not for all who read the row
        (0.98, ("present",), Tile(32, 32, 8, 1)),
        (0.9, ("every",), PRESENT),
        (0.9, ("all others",), Tile(32, 32, 8, 1)),  # the present one, too
    ],
    ids=str,
)
def test_what_is_chosen(best: float, spilling: tuple[str, ...], chosen: Tile) -> None:
    said: list[str] = []

    def find(kernel: str, kind: Kind, given: list[Tile]) -> list[list[str]]:
        return [
            ["spills"]
            if "every" in spilling
            or ("all others" in spilling and tile != Tile(32, 32, 8, 1))
            or (kind.precision in spilling and tile.warps == 8)
            or ("present" in spilling and tile == PRESENT)
            else []
            for tile in given
        ]

    def times(kernel: str, kind: Kind, given: list[Tile]) -> dict[Tile, float]:
        assert kind.precision == "tf32x3"
        return {tile: best if tile == Tile(32, 32, 8, 1) else 1.0 for tile in given}

    readers = tune.kinds(hopper=False)["64 tf32"]
    assert [kind.precision for kind in readers] == ["tf32x3", "tf32"]
    table = {"forward": {"64 tf32": PRESENT}}
    assert tune.tune(table, "forward", readers, find, times, said.append) == chosen
    assert tune.tune(table, "forward", readers, find, None, said.append) == PRESENT
    assert said


def test_the_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "wrong", lambda capability: lambda kernel, kind, given: [[] for _ in given])
    quick = Tile(32, 32, 8, 2)
    monkeypatch.setattr(tune, "timed", lambda kernel, kind, given: {tile: 1.0 - (tile == quick) / 2 for tile in given})
    before = tiles.read()
    tune.main(["--kernel", "forward", "--row", "64 tf32 hopper", "--out", str(tmp_path / "tiles.json")])
    before["forward"]["64 tf32 hopper"] = quick
    assert (tmp_path / "tiles.json").read_text() == tiles.written(before)


def test_it_needs_a_gpu_for_times(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "--compile 80 or --compile 90 needs none" in capsys.readouterr().err


@pytest.mark.slow
def test_tiles_that_spill_are_found() -> None:
    """In a process of its own: kernels made for the interpreter cannot be compiled."""
    code = (
        "from benchmarks.gpu import tune\n"
        "from fastmeta.ops.attention.tiles import Tile\n"
        "kind = tune.kinds(hopper=True)['64 bf16 hopper'][0]\n"
        "found = tune.wrong(90)('forward', kind, [Tile(64, 64, 4, 2), Tile(128, 128, 4, 2)])\n"
        "assert found[0] == [] and 'spills' in found[1][0], found\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
