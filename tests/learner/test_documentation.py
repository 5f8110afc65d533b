"""The examples of docs/estimator.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fastmeta as fm
from fastmeta.learner.estimator import MetaLearner

TEXT = (Path(__file__).parents[2] / "docs" / "estimator.md").read_text(encoding="utf-8")


def test_examples_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(example, names)
    learner, best = names["learner"], names["best"]
    assert learner.n_steps_ == 15
    assert [r["epoch"] for r in learner.history_] == [1, 2, 3]
    assert len(names["anil"].history_) == 1
    assert best.learner_.steps == 1
    assert (tmp_path / "runs" / "digits" / "learner.json").is_file()


def test_it_names_what_there_is() -> None:
    for name in re.findall(r"`fm\.(\w+)", TEXT):
        assert hasattr(fm, name)
    table = re.search(r"\| `fit\(.*?\n\n", TEXT, re.DOTALL)
    assert table is not None
    for method in re.findall(r"`(?:MetaLearner\.)?(\w+)\(", table[0]):
        assert callable(getattr(MetaLearner, method))
