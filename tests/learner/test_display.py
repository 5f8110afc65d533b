from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastmeta.learner import plots
from fastmeta.learner.progress import Lines, Live, Silent, clock, describe, reporter_for

TRAIN = {"kind": "train", "step": 20, "loss": 0.5, "accuracy": 0.75, "tasks_per_s": 123.4, "eta": 65.0}
VALIDATION = {
    "kind": "validation", "step": 20, "metric": "accuracy", "loss": 0.4,
    "before": 0.2, "before_ci95": 0.01, "after": 0.9, "after_ci95": 0.02,
}  # fmt: skip


def test_records_in_words() -> None:
    assert describe(TRAIN) == "loss 0.5000  accuracy 75.00%  123 tasks/s"
    assert describe(VALIDATION).startswith("validation: accuracy 90.00 % ± 2.00 %, before adaptation accuracy 20.00 %")
    error = describe({**VALIDATION, "metric": "mse"})
    assert "error 0.9000 ± 0.0200" in error


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3725, "1:02:05"), (-1, "0:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def show(terminal: bool) -> str:
    buffer = io.StringIO()
    reporter = reporter_for(Console(file=buffer, force_terminal=terminal, width=120))
    assert isinstance(reporter, Live if terminal else Lines)
    reporter.start(0, 40)
    reporter.advance(20, {k: v for k, v in TRAIN.items() if isinstance(v, float)})
    reporter.record(TRAIN)
    reporter.record(VALIDATION)
    reporter.say("hello [world]")
    reporter.stop()
    return buffer.getvalue()


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines() -> None:
    lines = show(terminal=False)
    assert "20/40  loss 0.5000  accuracy 75.00%  123 tasks/s  ETA 1:05" in lines
    assert "\x1b" not in lines
    live = show(terminal=True)
    assert "20/40" in live
    assert "ETA 1:05" in live
    for text in (lines, live):
        assert "hello [world]" in text
        assert "accuracy 90.00 % ± 2.00 %" in text


def test_silence() -> None:
    silent = Silent()
    silent.start(0, 1)
    silent.advance(1, {})
    silent.record({})
    silent.say("")
    silent.stop()


def is_picture(path: Path) -> bool:
    from matplotlib.image import imread

    return bool(imread(path)[..., :3].std() > 0.01)


@pytest.mark.parametrize("metric", ["accuracy", "mse"])
def test_pictures_are_drawn(tmp_path: Path, metric: str) -> None:
    validations = [{**VALIDATION, "metric": metric, "step": s} for s in (0, 20)]
    plots.learning_curve([TRAIN, *validations, {**VALIDATION, "kind": "test", "metric": metric}], tmp_path / "a.png")
    assert is_picture(tmp_path / "a.png")
    plots.learning_curve([], tmp_path / "empty.png")
    assert is_picture(tmp_path / "empty.png")
    x = torch.linspace(-5, 5, 20).unsqueeze(1)
    true = torch.stack([x.sin(), x.cos()])
    plots.sinusoid_adaptation(x, true, (x.expand(2, -1, -1), true), {0: 0 * true, 1: true, 5: true}, tmp_path / "s.png")
    assert is_picture(tmp_path / "s.png")
    plots.accuracy_by_step({"a": [(0.2, 0.01), (0.8, 0.02)], "b": [(0.2, 0.01), (0.5, 0.02)]}, 0.2, tmp_path / "c.png")
    assert is_picture(tmp_path / "c.png")
