"""Omniglot's four algorithms learn, at a reduced size, on made-up characters in Omniglot's form."""

from __future__ import annotations

from pathlib import Path

from examples import omniglot
from tests.examples.data import write_characters

REDUCED = ["--iterations", "25", "--filters", "8", "--tasks", "4", "--steps", "1", "--test-tasks", "20"]


def test_all_learn(tmp_path: Path) -> None:
    data = write_characters(tmp_path / "characters.npz")
    found = omniglot.main([str(data), "--characters", "40", *REDUCED])
    assert list(found) == ["MAML", "ANIL", "Reptile", "MAML++"]
    for name, e in found.items():
        assert e.after.mean > e.before.mean + 0.1, name
        assert e.after.mean > 0.3, name
