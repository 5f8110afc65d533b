"""Omniglot's four algorithms, each at a reduced size on made-up characters and, where they are, on Omniglot's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import omniglot
from tests.examples.data import write_characters

REDUCED = ["--filters", "8", "--tasks", "4", "--steps", "1", "--test-tasks", "20"]


def test_all_learn(tmp_path: Path) -> None:
    data = write_characters(tmp_path / "characters.npz")
    found = omniglot.main([str(data), "--characters", "40", "--iterations", "25", *REDUCED])
    assert list(found) == ["MAML", "ANIL", "Reptile", "MAML++"]
    for name, e in found.items():
        assert e.after.mean > e.before.mean + 0.15, name
        assert e.after.mean > 0.4, name


def test_on_omniglot_itself(data_folder: Path) -> None:
    data = data_folder / "omniglot28.npz"
    if not data.is_file():
        pytest.skip(f"{data.name} is not in the data folder")
    found = omniglot.main([str(data), "--iterations", "40", "--algorithm", "MAML", *REDUCED])
    assert found["MAML"].after.mean > found["MAML"].before.mean + 0.25
