"""The examples of docs/algorithms.md run, one after the other, each on models and tasks of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmeta as fm
from fastmeta import algorithms

TEXT = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
PRELUDE, *EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: re.search(r"fm\.(\w+)\(", text)[1])  # type: ignore[index]
def test_it_runs_and_leaves_gradients(example: str) -> None:
    names: dict[str, Any] = {}
    exec(PRELUDE + example, names)
    learner = names.get("learner", names.get("anil"))
    moved = [p for p in learner.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved
    assert all(torch.isfinite(p.grad).all() for p in moved)


def test_every_algorithm_has_its_section_and_its_example() -> None:
    names = {name for name in algorithms.__all__ if name != "MetaOutput"}
    assert names == {found for example in EXAMPLES for found in re.findall(r"fm\.(\w+)\(", example)} - {"TaskBatch"}
    assert all(re.search(rf"^## .*\b{name}\b", TEXT, re.MULTILINE) for name in names)
    assert names <= set(fm.__all__)
