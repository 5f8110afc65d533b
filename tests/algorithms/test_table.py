"""The table of all algorithms: every one is in it, and it can be read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import algorithms
from benchmarks.algorithm_loops import Run, loop_of
from benchmarks.algorithms import SETTINGS, Row, main, table, timed
from fastmeta.bench.timing import Effort
from fastmeta.learner.config import ALGORITHMS, defaults
from tests.algorithms import exactness
from tests.algorithms.problems import EXACT
from tests.oracle import relative_error


def test_every_algorithm_is_in_it() -> None:
    assert set(exactness._PAIRS) == set(ALGORITHMS)
    assert SETTINGS.keys() < set(ALGORITHMS)


@pytest.mark.parametrize("name", ["reptile", "metasgd"])
def test_errors_are_measured(name: str) -> None:
    found, truth = exactness._PAIRS[name]()
    assert relative_error(found, truth) <= EXACT
    assert relative_error({n: d + 1e-3 for n, d in found.items()}, truth) > EXACT


def test_it_is_markdown() -> None:
    whole = Row("maml", 1e-15, 0.975, 0.01, 0.2, 7, 12.0, defaults("omniglot").to_json())
    quick = Row("boil", 3e-16, loop_ms=30.0, fastmeta_ms=12.0, timed_on="here")
    lines = table([whole, Row("cavia", 2e-16), quick]).splitlines()
    assert lines[2] == "| maml | 1.0e-15 | 97.50 % ± 1.00 | 20.0 % | 0.4 | 7 |  |  |"
    assert lines[3] == "| cavia | 2.0e-16 |  |  |  |  |  |  |"
    assert lines[4] == "| boil | 3.0e-16 |  |  |  |  | 12 ms | 2.50 |"
    assert len({line.count("|") for line in lines}) == 1


def test_runs_into_one_folder_make_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "errors", lambda: dict.fromkeys(ALGORITHMS, 2e-16))
    monkeypatch.setattr(algorithms, "use_threads", lambda threads: threads)
    monkeypatch.setattr(algorithms, "trained", lambda row, *_: dataclasses.replace(row, accuracy=0.5, machine="there"))
    monkeypatch.setattr(algorithms, "timed", lambda row, *_: dataclasses.replace(row, loop_ms=3.0, fastmeta_ms=2.0))
    said = ["--data", "omniglot28.npz", "--iterations", "5", "--results", str(tmp_path)]
    for more in (["--algorithm", "maml"], ["--algorithm", "cavia"], ["--algorithm", "maml", "--speed"]):
        main([*said, *more])
    record = json.loads((tmp_path / "algorithms.json").read_text())
    rows = {row["algorithm"]: (row["accuracy"], row["loop_ms"], row["error"]) for row in record["rows"]}
    assert list(rows) == list(ALGORITHMS)
    assert rows["maml"] == (0.5, 3.0, 2e-16)
    assert rows["cavia"] == (0.5, None, 2e-16)
    assert rows["anil"] == (None, None, 2e-16)
    assert "Trained: there" in (tmp_path / "algorithms.md").read_text()
    with pytest.raises(ValueError, match=r"algorithms\.json must be of this setting, .*choose another folder"):
        main([*said[:-3], "6", *said[-2:]])
    (tmp_path / "algorithms.json").write_text('{"about": 3')
    with pytest.raises(ValueError, match=r"algorithms\.json must be a table of algorithms"):
        main(said)


def test_what_is_timed_is_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    config = defaults("digits").changed(filters=2, meta_batch=2, inner_steps=1)
    effort = Effort(rounds=1, slot_s=0.0, budget_s=0.1)
    row = timed(Row("maml", 0.0), config, effort)
    assert row.loop_ms is not None
    assert row.fastmeta_ms is not None
    assert min(row.loop_ms, row.fastmeta_ms) > 0

    def nearly(*given: Any) -> Run:
        run = loop_of(*given)
        return lambda: {n: d * (1 + 1e-6) for n, d in run().items()}

    monkeypatch.setattr(algorithms, "loop_of", nearly)
    with pytest.raises(RuntimeError, match="maml: loop and fastmeta must agree to 1e-09 in float64, got"):
        timed(Row("maml", 0.0), config, effort)
