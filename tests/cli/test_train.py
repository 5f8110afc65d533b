from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastmeta.cli.main import main
from fastmeta.learner import checkpoint
from fastmeta.learner.log import read_metrics

TINY = ["--meta-batch", "2", "--shots", "3", "--queries", "3", "--val-tasks", "2", "--log-every", "2", "--threads", "1"]


def run(*words: object) -> int:
    """Exit status of a command line."""
    with pytest.raises(SystemExit) as left:
        main([str(w) for w in words])
    return int(left.value.code or 0)


def train(out: Path, *more: object) -> int:
    return run("train", "sinusoid", *TINY, "--test-tasks", 4, "--out", out, *more)


def tensors_of(folder: Path) -> str:
    """SHA-256 of the last weights, optimizer state and generator."""
    return str(json.loads((folder / "checkpoints" / "last.json").read_text())["sha256"])


def test_a_run_leaves_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--iterations", 4, "--val-every", 2) == 0
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "learning_curve.png",
        "adaptation.png",
        "checkpoints",
    }
    kinds = [r["kind"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert kinds == ["validation", "train", "validation", "train", "validation", "test"]
    told = capsys.readouterr().out
    assert "sinusoid: 3 points, second order, 1 threads" in told
    assert "2/4  loss" in told
    assert "after 10 inner steps" in told


def test_cavia_takes_the_size_of_its_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--algorithm", "cavia", "--context", 2, "--lr", 1, "--iterations", 1]
    assert train(tmp_path / "run", *options) == 0
    assert "sinusoid: 3 points, cavia" in capsys.readouterr().out
    tensors, _ = checkpoint.load(tmp_path / "run" / "checkpoints", "best")
    assert tensors["model.context"].shape == (2,)
    assert tensors["model.model.0.weight"].shape == (40, 1 + 2)
    assert train(tmp_path / "run", "--resume", "--context", 3) == 1
    assert "context must stay 2" in capsys.readouterr().err


def test_a_resumed_run_is_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "whole", "--iterations", 5, "--val-every", 2) == 0
    assert train(tmp_path / "parts", "--iterations", 5, "--val-every", 2, "--minutes", 0) == 0
    assert "stopped after 0 minutes at step 0 of 5" in capsys.readouterr().out
    assert run("train", "sinusoid", "--out", tmp_path / "parts", "--resume", "--test-tasks", 4) == 0
    assert tensors_of(tmp_path / "whole") == tensors_of(tmp_path / "parts")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts")]
    assert results[0] == results[1]


def test_evaluation_repeats_the_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--iterations", 2)
    record = json.loads((tmp_path / "result.json").read_text())
    capsys.readouterr()
    assert run("eval", tmp_path, "--tasks", 4) == 0
    assert f"error {record['after']:.4f} ± {record['after_ci95']:.4f}" in capsys.readouterr().out
    assert run("eval", tmp_path, "--tasks", 4, "--seed", 7, "--eval-steps", 2, "--checkpoint", "last") == 0
    told = capsys.readouterr().out
    assert "after 2 inner steps" in told
    assert f"error {record['after']:.4f}" not in told


def test_digits_train_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--iterations", 2, "--filters", 4, "--ways", 3, "--first-order", "--test-tasks", 4, "--out", tmp_path]
    assert run("train", "digits", *TINY, *options) == 0
    told = capsys.readouterr().out
    assert "3-way 3-shot, first order" in told
    assert "accuracy" in told
    assert json.loads((tmp_path / "config.json").read_text())["first_order"] is True


def test_omniglot_trains_from_the_real_file(tmp_path: Path, data_folder: Path) -> None:
    data = data_folder / "omniglot28.npz"
    if not data.is_file():
        pytest.skip(f"{data} is missing")
    options = ["--iterations", 2, "--filters", 4, "--ways", 3, "--test-tasks", 4, "--out", tmp_path, "--data", data]
    assert run("train", "omniglot", *TINY, *options) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert 0 <= record["after"] <= 1


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert run(*words) not in (0, 130)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ways", 0], "train: ways must be at least 1, got 0"),
        (["--inner-lr", 0], "train: inner_lr must be positive and finite, got 0.0"),
        (["--ways", 6, "--shots", 1], "ways must be at most the 5 classes of the pool, got 6"),
        (["--shots", 40], r"every class must have shots \+ queries"),
        (["--resume"], "has no config.json"),
    ],
)
def test_bad_settings_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[Any], message: str
) -> None:
    told = error_of(capsys, "train", "digits", "--out", tmp_path / "run", *options)
    assert told.startswith("fastmeta: error: ")
    assert told.count("\n") == 1
    assert re.search(message, told)


def test_bad_files_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "file").write_text("")
    common = ("train", "omniglot", "--out", tmp_path / "run", "--data")
    assert "cut.npz must be a readable .npz archive" in error_of(capsys, *common, tmp_path / "cut.npz")
    assert "does not exist" in error_of(capsys, *common, tmp_path / "nowhere")
    told = error_of(capsys, "train", "sinusoid", "--out", tmp_path / "file" / "run")
    assert "cannot write into folder" in told
    assert "choose another output folder" in told


def test_an_existing_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--iterations", 2)
    before = tensors_of(tmp_path)
    assert "holds a run; go on with --resume" in error_of(capsys, "train", "sinusoid", "--out", tmp_path)
    told = error_of(capsys, "train", "sinusoid", "--out", tmp_path, "--resume", "--shots", 9)
    assert "shots must stay 3" in told
    told = error_of(capsys, "train", "sinusoid", "--out", tmp_path, "--resume", "--accumulate", 2)
    assert "accumulate must stay 1" in told
    told = error_of(capsys, "train", "digits", "--out", tmp_path, "--resume")
    assert "problem must stay 'sinusoid'" in told
    assert tensors_of(tmp_path) == before


def test_a_damaged_checkpoint_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--iterations", 2)
    for file in (tmp_path / "checkpoints").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert "damaged or truncated" in error_of(capsys, "eval", tmp_path)
    assert "damaged or truncated" in error_of(capsys, "train", "sinusoid", "--out", tmp_path, "--resume")
    assert "has no config.json" in error_of(capsys, "eval", tmp_path / "checkpoints")


LONG = 300  # seconds for what a signal leaves to do, which takes less than one


@contextmanager
def under_way(out: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A run of a million steps in a process of its own, and what it has told: training is under way."""
    options = [*TINY, "--val-every", "1000000", "--test-tasks", "4", "--iterations", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmeta.cli", "train", "sinusoid", *options, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        told = ""
        while "/1000000  loss" not in told:
            line = process.stdout.readline()
            assert line, f"the run ended early: {told}"
            told += line
        yield process, told
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with under_way(stopped) as (process, told):
        process.send_signal(signal.SIGINT)
        told += process.communicate(timeout=LONG)[0]
    assert process.returncode == 130, told
    assert "SIGINT: finishing this step, then saving" in told
    assert f"go on with: fastmeta train sinusoid --out {stopped} --resume" in told

    step = checkpoint.load(stopped / "checkpoints", "last")[1]["progress"]["step"]
    assert step > 0
    assert f"saved at step {step};" in told
    more = step + 3
    assert run("train", "sinusoid", "--out", stopped, "--resume", "--iterations", more, "--test-tasks", 4) == 0
    state = checkpoint.load(stopped / "checkpoints", "last")[1]["progress"]
    assert (state["step"], state["validated"]) == (more, more)
    steps = [r["step"] for r in read_metrics(stopped / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(2, more + 1, 2))


def test_terminate_saves_too(tmp_path: Path) -> None:
    with under_way(tmp_path) as (process, told):
        process.terminate()
        told += process.communicate(timeout=LONG)[0]
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "SIGTERM: finishing this step" in told
