"""No shipped build of a Triton kernel spills, and what each takes of a GPU is what it took when it was looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.kernels import resources


@pytest.mark.slow
def test_shipped_builds_take_what_they_took() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.resources"]
    ran = subprocess.run(command, cwd=resources.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Named(resources.Build):
        def digest(self) -> str:
            return "new" if "other code" in self.name else "known"

    monkeypatch.setattr(resources, "read", lambda build: {"registers": 1})
    names = ["first", "same code", "other code", "not there"]
    wanted = [Named(SimpleNamespace(name=name), 80) for name in names]
    known = {f"{name} sm_80": {"code": "known", "registers": 0} for name in names[:3]}
    found = resources.gather(wanted, known, {"first sm_80"})
    assert [found[f"{name} sm_80"]["registers"] for name in names] == [1, 0, 1, 1]
    assert [one["code"] for one in found.values()] == ["known", "known", "new", "known"]
    found = resources.gather(wanted, known, {"first sm_80"}, unchanged=True)
    assert [found[f"{name} sm_80"]["registers"] for name in names] == [1, 0, 0, 1]


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
