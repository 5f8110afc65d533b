from __future__ import annotations

from pathlib import Path

import pytest

from fastmeta.learner.log import MetricsLog, read_metrics


def test_records_are_appended_and_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": 0.1 + 0.2})
        size = log.size
        log.write({"step": 2})
    assert read_metrics(path) == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2}]
    with MetricsLog(path, size) as log:
        assert read_metrics(path) == [{"step": 1, "loss": 0.1 + 0.2}]
        log.write({"step": 3})
    assert [r["step"] for r in read_metrics(path)] == [1, 3]
    MetricsLog(path).close()
    assert read_metrics(path) == []


def test_an_unfinished_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n{"ste')
    assert read_metrics(tmp_path / "m") == [{"step": 1}]


def test_a_lost_log_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("{}\n")
    with pytest.raises(ValueError, match="must hold the 10 bytes it had at the checkpoint, got 3"):
        MetricsLog(tmp_path / "m", 10)


@pytest.mark.parametrize(("line", "message"), [("{", "line 2 of .* must be JSON"), ("3", "must be a record, got int")])
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "m").write_text(f"{{}}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path / "m")


def test_numbers_that_are_not_json_are_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m") as log, pytest.raises(ValueError, match="JSON"):
        log.write({"loss": float("nan")})
