"""``fastmeta profile``: what the command did is untouched, and its profile is there however it ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmeta.cli.main import main
from fastmeta.profiling import report
from fastmeta.profiling.launch import resolved
from fastmeta.profiling.launched import VARIABLE
from tests.profiling.hand import machine

ROOT = Path(__file__).resolve().parent.parent.parent

FAILING = """
import itertools, os, sys, time
import torch
import torch.nn.functional as F

time.perf_counter = itertools.count(0.0, 1e-3).__next__  # what takes long does not depend on the machine's load
import fastmeta as fm

maml = fm.MAML(torch.nn.Linear(4, 3), F.cross_entropy, steps=3, engine="autodiff")
tasks = fm.TaskBatch(*[(torch.randn(6, n, 4), torch.randint(3, (6, n))) for n in (4, 5)])
for _ in range(4):
    maml.value_and_grad(tasks)
child = os.fork()
if child == 0:
    sys.exit(0)  # a copy of this process, whose meta-steps are not its own
os.waitpid(child, 0)
print("said", *sys.argv[1:])
raise KeyError("stopped here")
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # children import the package under test
    monkeypatch.setattr(report, "peaks", machine)


def run(*words: object) -> int:
    """Exit status of ``fastmeta profile``."""
    with pytest.raises(SystemExit) as left:
        main(["profile", *map(str, words)])
    return int(left.value.code or 0)


def test_a_script_that_fails_leaves_its_profile(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text(FAILING)
    assert run("--json", tmp_path / "p.json", "--", "python", script, "--lr", 3) == 1
    told = capfd.readouterr()
    assert told.out == "said --lr 3\n"
    assert "4 meta-steps on the autodiff executor" in told.err
    assert "KeyError: 'stopped here'" in told.err
    assert "What to do" in told.err
    assert "written: " in told.err
    assert "process " not in told.err  # there is one alone
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["kinds"][0]["count"] == found["count"] == 4


def test_a_command_of_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny = ["--meta-batch", 2, "--shots", 3, "--queries", 3, "--val-tasks", 2, "--iterations", 2, "--threads", 1]
    out = tmp_path / "run"
    files = ["--json", tmp_path / "p.json", "--trace", tmp_path / "t.json", "--picture", tmp_path / "p.png"]
    assert run(*files, "--", "fastmeta", "train", "sinusoid", *tiny, "--test-tasks", 2, "--out", out) == 0
    assert "after 10 inner steps" in capfd.readouterr().out
    assert (out / "result.json").is_file()
    found = json.loads((tmp_path / "p.json").read_text())
    training = [kind for kind in found["kinds"] if kind["gradient"]]
    assert [kind["count"] for kind in training] == [2]
    assert [span["name"] for span in found["spans"]].count("outer step") == 2
    assert {"0", "2", "4"} <= {line["module"] for line in training[0]["lines"]}
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert found["where"]["data"] > 0
    assert any("fastmeta: " in str(e.get("name")) for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"])


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, "no process of the command imported fastmeta"),
        ("print('nothing')", 0, "no process of the command imported fastmeta"),
        ("import os; os.kill(os.getpid(), 9)", 128 + signal.SIGKILL, "signal 9 ended the command"),
    ],
)
def test_without_a_meta_step(code: str, status: int, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--", "python", "-c", code) == status
    assert said in capfd.readouterr().err


def test_what_cannot_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--", tmp_path / "nothing") == 1
    assert "nothing cannot be started: No such file or directory" in capfd.readouterr().err
    assert run("--picture", "p.pdf", "--", "python", "-c", "print('ran')") == 1
    told = capfd.readouterr()
    assert "must end in .png or .svg, got p.pdf" in told.err
    assert "ran" not in told.out


def test_a_damaged_order_is_named() -> None:
    code = "import os; os.environ['" + VARIABLE + "'] = '{'; import fastmeta"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "FASTMETA_PROFILE must be what fastmeta profile sets it to, got '{'; unset it" in done.stderr


def test_python_means_this_one(tmp_path: Path) -> None:
    assert resolved(["python", "train.py", "-x"]) == [sys.executable, "train.py", "-x"]
    assert resolved(["fastmeta", "demo"]) == [sys.executable, "-m", "fastmeta", "demo"]
    assert resolved(["train.py"]) == [sys.executable, "train.py"]
    assert resolved(["/usr/bin/python3", "train.py"]) == ["/usr/bin/python3", "train.py"]
