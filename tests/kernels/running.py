"""Where Triton kernels run in tests: on a GPU, else in Triton's interpreter on a CPU; and in which order.

The interpreter proves indexing and algebra. It runs programs one after another, multiplies in float32 whatever
precision is asked for, and is wrong for products of bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import lack


def device() -> torch.device:
    """The device of a kernel test; skips the test where kernels cannot run at all."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.importorskip("triton")
    from fastmeta.core import triton_support

    if not triton_support.interpreted():
        lack("triton", "there is no GPU, and TRITON_INTERPRET was not set before Triton was imported")
    return torch.device("cpu")


@contextlib.contextmanager
def reversed_programs() -> Iterator[None]:
    """Run a grid's programs in the interpreter from the last to the first: none may need what another has written."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_index = builder.set_grid_idx

    def mirrored(x: int, y: int, z: int) -> None:
        dims = builder.grid_dim
        set_index(*(size - 1 - at for size, at in zip(dims, (x, y, z), strict=True)))

    builder.set_grid_idx = mirrored
    try:
        yield
    finally:
        builder.set_grid_idx = set_index


def poisoned(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """A result to be written, full of NaN."""
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)
