"""What a meta-step costs, counted without a clock: instructions, calls, kernels, tensors (docs/benchmarking.md)."""

from __future__ import annotations

import shutil

import pytest
import torch

from fastmeta.core import native
from tests.guard import expected
from tests.guard.counting import of_object, of_python

GROWN, FALLEN = 1.03, 0.9
AGAIN = "where that is meant, python -m tests.guard writes the new counts down"

needs_extension = pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}")


def faults(kept: dict[str, int], now: dict[str, int]) -> list[str]:
    """Counts that grew, and those that fell so far that they would let others grow unseen."""
    found = [f"{name} has no count" for name in now if name not in kept]
    for name, was in kept.items():
        share = now[name] / max(was, 1)
        if now[name] != was and not FALLEN < share < GROWN:
            found.append(f"{name}: {was} before, {now[name]} now ({share:.2f})")
    return found


@needs_extension
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_the_kernels_take_no_more_instructions() -> None:
    kept = expected.kept("instructions")
    if kept is None:
        pytest.skip(f"no counts are kept for {expected.kind('instructions')}")
    assert faults(kept, expected.measured_instructions()) == [], AGAIN


@needs_extension
def test_a_meta_step_makes_no_more_calls_and_tensors() -> None:
    kept = expected.kept("python")
    if kept is None:
        pytest.skip(f"no counts are kept for {expected.kind('python')}")
    now = expected.measured_python()
    assert kept.keys() == now.keys()
    assert [f"{case}: {fault}" for case in kept for fault in faults(kept[case], now[case])] == [], AGAIN


def test_the_guard_sees_what_it_should() -> None:
    assert faults({"a": 1000}, {"a": 1029}) == []
    assert faults({"a": 1000}, {"a": 1031}) == ["a: 1000 before, 1031 now (1.03)"]
    assert faults({"a": 1000}, {"a": 880}) == ["a: 1000 before, 880 now (0.88)"]
    assert len(faults({"kernels": 7}, {"kernels": 8})) == 1  # of few, one more is too many
    x = torch.ones(3)

    def step(times: int) -> None:
        for _ in range(times):
            abs(-1)
            x.view(3, 1).add(1)

    one, two = (of_python(lambda n=n: step(n)) for n in (1, 2))
    assert (one["kernels"], one["tensors"]) == (2, 1)  # the view makes nothing
    assert (two["kernels"], two["tensors"]) == (4, 2)
    assert two["python calls"] == one["python calls"]
    assert two["built-in calls"] == one["built-in calls"] + 3


def test_instructions_are_those_of_the_object_alone() -> None:
    lines = """
    fl=(1) a.cpp
    ob=(1) /somewhere/_C.so
    fn=(1) kernel
    10 100
    +3 20
    cob=(2) /lib/libc.so
    cfn=(2) memcpy
    calls=4 0
    * 5000
    -1 7
    ob=(2)
    fn=(2)
    0 5000
    ob=(1)
    fn=(3) other
    5 1
    """
    assert of_object([line.strip() for line in lines.splitlines()], "_C.so") == 128
