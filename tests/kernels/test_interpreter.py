"""The interpreter that kernels are tested in sees an index that leaves its type."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.running import device

triton = pytest.importorskip("triton")
tl = triton.language

from triton.runtime.errors import InterpreterError  # noqa: E402  # triton may be missing


@triton.jit
def combine(x, y, out, OPERATION: tl.constexpr):
    at = tl.arange(0, 2)
    left, right = tl.load(x + at), tl.load(y + at)
    if OPERATION == "add":
        result = left + right
    elif OPERATION == "sub":
        result = left - right
    else:
        result = left * right
    tl.store(out + at, result)


@pytest.mark.parametrize(
    ("operation", "left", "largest"), [("add", 1 << 30, (1 << 30) - 1), ("sub", -(1 << 31), 0), ("mul", 1 << 16, 32767)]
)
def test_integers_do_not_overflow_unseen(operation: str, left: int, largest: int) -> None:
    where = device()
    if where.type == "cuda":
        pytest.skip("a GPU does not look")
    x, y, out = (torch.tensor(values, dtype=torch.int32) for values in ((1, left), (1, largest), (0, 0)))
    combine[(1,)](x, y, out, operation)
    assert out[1] == {"add": left + largest, "sub": left - largest, "mul": left * largest}[operation]
    y += 1
    with pytest.raises(InterpreterError, match="int32 overflow"):
        combine[(1,)](x, y, out, operation)
