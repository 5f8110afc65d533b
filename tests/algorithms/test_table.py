"""The table of all algorithms: every one is in it, and it can be read."""

from __future__ import annotations

import pytest

from benchmarks.algorithms import SETTINGS, Row, table
from fastmeta.learner.config import ALGORITHMS, defaults
from tests.algorithms import exactness
from tests.algorithms.problems import EXACT
from tests.oracle import relative_error


def test_every_algorithm_is_in_it() -> None:
    assert set(exactness._PAIRS) == {*ALGORITHMS, "cavia"}
    assert SETTINGS.keys() < set(ALGORITHMS)


@pytest.mark.parametrize("name", ["reptile", "metasgd"])
def test_errors_are_measured(name: str) -> None:
    found, truth = exactness._PAIRS[name]()
    assert relative_error(found, truth) <= EXACT
    assert relative_error({n: d + 1e-3 for n, d in found.items()}, truth) > EXACT


def test_it_is_markdown() -> None:
    whole = Row("maml", 1e-15, 0.975, 0.01, 0.2, 7, 12.0, defaults("omniglot").to_json())
    lines = table([whole, Row("cavia", 2e-16)]).splitlines()
    assert lines[2] == "| maml | 1.0e-15 | 97.50 % ± 1.00 | 20.0 % | 0.4 | 7 | 12 s |"
    assert lines[3] == "| cavia | 2.0e-16 |  |  |  |  |  |"
    assert len({line.count("|") for line in lines}) == 1
