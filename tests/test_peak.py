"""The measured peak is one that nothing exceeds by much, and that every instruction set and thread count has."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from fastmeta.core import native
from fastmeta.core.peak import copy_rate, peak_flops

SETS = ("plain", "v3", "v4")  # the widest last


def test_a_library_product_stays_below_the_peak(extension: ModuleType, set_threads: Callable[[int], None]) -> None:
    extension.use_instruction_set([s for s in SETS if s in extension.supported_instruction_sets()][-1])
    set_threads(1)
    n = 512
    a, b = torch.rand(n, n), torch.rand(n, n)
    product = torch.empty(n, n)
    library = peak = 0.0
    # In turn, and each at its best of many short times, so that a busy machine is as hard on the one as on the other.
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, b, out=product)
        library = max(library, 2 * n**3 / (time.perf_counter() - begin))
        peak = max(peak, peak_flops(torch.float32, 1))
    extension.use_instruction_set("")
    # A library reaches less than the peak of the registers; 0.7 leaves room for a clock that changed in between.
    assert peak >= 0.7 * library


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_has_a_peak(instruction_set: str, dtype: torch.dtype) -> None:
    # Far below any processor that runs it, far above a loop that waits for each result or leaves the registers.
    assert peak_flops(dtype, 1) > 1e9, instruction_set
    assert peak_flops(dtype, 3) > 1e9, instruction_set


@pytest.mark.parametrize("size", [128, 4096, 1 << 20])
def test_a_copy_has_a_rate(extension: ModuleType, size: int) -> None:
    assert copy_rate(size, 1) > 1e8
    assert copy_rate(size, 2) > 1e8


def test_errors_name_what_is_wrong(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"peak_flops: dtype must be torch.float32 or torch.float64, got torch.float16"):
        peak_flops(torch.float16)
    with pytest.raises(ValueError, match="peak_flops: threads must be at least 1, got 0"):
        peak_flops(threads=0)
    with pytest.raises(ValueError, match="copy_rate: size must be at least 128 bytes, got 127"):
        copy_rate(127)
    with pytest.raises(ValueError, match="copy_rate: threads must be at least 1, got -1"):
        copy_rate(1024, -1)
    monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
    for measured in (peak_flops, lambda: copy_rate(1024)):
        with pytest.raises(RuntimeError, match="not available here: not built"):
            measured()
