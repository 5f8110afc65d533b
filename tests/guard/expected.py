"""The counts that are kept, and the same counted now."""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastmeta.core import files, native
from tests.guard import cases
from tests.guard.counting import compiler_of, instructions, of_python

FILE = Path(__file__).with_name("counts.json")
NATIVE = ("perceptron", "convolution")
PYTHON = (("perceptron", "native"), ("perceptron", "reference"), ("encoder", "reference"))
RUNS = {"value_and_grad": lambda maml, tasks: maml.value_and_grad(tasks), "backward": cases.backward}


def kind(of: str) -> str:
    """What counts of this build depend on, beside the sources."""
    if of == "instructions":
        extension = native.extension()
        assert extension is not None
        return compiler_of(Path(extension.__file__)) + f", {platform.machine()}"
    python, torch_version = platform.python_version_tuple(), torch.__version__.split("+")[0].split(".")
    return f"Python {python[0]}.{python[1]}, torch {torch_version[0]}.{torch_version[1]}"


def kept(of: str) -> dict[str, Any] | None:
    """The counts of such a build; ``None`` where nobody has written them down."""
    return json.loads(FILE.read_text())[of].get(kind(of)) if FILE.is_file() else None


def write(of: str, counts: dict[str, Any]) -> None:
    """Keep them."""
    content = json.loads(FILE.read_text()) if FILE.is_file() else {"instructions": {}, "python": {}}
    content[of][kind(of)] = counts
    files.write_json(FILE, content)


def measured_instructions() -> dict[str, int]:
    """Of the extension in one meta-step of each case."""
    extension = native.extension()
    assert extension is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {}
        for case in NATIVE:
            cases.write(case, folder / case)
            found[case] = instructions(Path(extension.__file__), folder / case, times=1)
        return found


def measured_python() -> dict[str, dict[str, int]]:
    """Of each case, by the executor and by the way it is asked for the gradient."""
    found = {}
    for case, executor in PYTHON:
        for name, run in RUNS.items():
            maml, tasks = cases.learner(case, executor=executor)
            for _ in range(3):  # traced, imported, recognised
                run(maml, tasks)
            found[f"{case}, {executor}, {name}"] = of_python(lambda run=run, m=maml, t=tasks: run(m, t))
    return found
