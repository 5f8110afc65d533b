"""An operation's four maps by kernels, in float32, beside torch.func in float64: for cases of tests.ops.four_maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.kernels import running
from tests.ops.four_maps import SUMMATION_FACTOR, Case, Maps, Run, Truth, distance

EPS = torch.finfo(torch.float32).eps


def runs(case: Case, layout: str = "plain", **options: Any) -> tuple[Run, Run]:
    """The same drawn numbers in float32, where kernels run, and in float64 on a CPU."""
    run, wide = (Run(case, dtype=dtype, layout=layout, **options) for dtype in (torch.float32, torch.float64))
    there = running.device()
    for name in ("x", "x_dot", "d_y", "d_y_dot"):
        drawn = getattr(run, name)
        setattr(wide, name, [_wide(v) for v in drawn])
        setattr(run, name, [v.to(there) for v in drawn])
    wide.truth = Truth(case, wide.call, wide.x, wide.tasks)
    return run, wide


def check(got: Maps, want: Maps, longest: int, roundings: int = 20) -> None:
    """Some twenty roundings of a formula, and sums of so many terms."""
    bound = EPS * (roundings + SUMMATION_FACTOR * math.sqrt(longest))
    for (name, values), (_, truths) in zip(got.cpu(), want, strict=True):
        for i, (value, truth) in enumerate(zip(values, truths, strict=True)):
            gap = distance(value, truth)
            assert gap <= bound, f"{name}[{i}] is off by {gap:.2e}, allowed {bound:.1e}"


def some(values: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    return [value if there else None for value, there in zip(values, present, strict=True)]


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
