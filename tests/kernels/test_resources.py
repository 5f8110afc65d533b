"""No shipped build of a Triton kernel spills, and what each takes of a GPU is what it took when it was looked at."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kernels import resources


@pytest.mark.slow
def test_shipped_builds_take_what_they_took() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.resources"]
    ran = subprocess.run(command, cwd=resources.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"stack": 8}, "spills"),
        ({"LDL": 1}, "spills"),
        ({"STL": 1}, "spills"),
        ({"shared": 164 << 10}, "shared memory"),
        ({"HMMA": 0}, "tensor core"),
        ({}, ""),
    ],
)
def test_what_no_build_may_have(found: dict[str, int], fault: str) -> None:
    clean = {"registers": 64, "stack": 0, "shared": 1 << 10, "HGMMA": 0, "HMMA": 4, "LDL": 0, "STL": 0}
    wrong = resources.faults("build", clean | found, 80, tensor_cores=True)
    assert len(wrong) == bool(fault)
    assert all(fault in line for line in wrong)
