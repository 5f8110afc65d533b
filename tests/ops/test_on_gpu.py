"""Every operation on a GPU gives what it gives on a CPU."""

from __future__ import annotations

import pytest
import torch

from fastmeta.core.task_op import Need
from tests.ops import (
    four_maps,
    test_activation,
    test_arithmetic,
    test_attention,
    test_attention_parts,
    test_batch_norm,
    test_bce,
    test_conv2d,
    test_cross_entropy,
    test_layer_norm,
    test_linear,
    test_mse,
    test_pool,
    test_reduction,
    test_views,
)
from tests.ops.four_maps import Case, Run, compare

MODULES = (
    *(test_activation, test_arithmetic, test_attention, test_attention_parts, test_batch_norm, test_bce, test_conv2d),
    *(test_cross_entropy, test_layer_norm, test_linear, test_mse, test_pool, test_reduction, test_views),
)
CASES = [pytest.param(case, id=f"{m.__name__.split('_', 1)[1]}-{case}") for m in MODULES for case in m.CASES]


def check(case: Case, device: str) -> None:
    """Compare the maps on ``device`` with those on a CPU, in float64; with shared arguments too."""
    shares = [name for name in Run(case).op.shares if Run(case).call.position(name) is not None]
    for shared, need in [((), Need.TASK)] + ([(shares, Need.SHARED)] if shares else []):
        here, there = Run(case, shared=shared, need=need), Run(case, shared=shared, need=need)
        for name in ("x", "x_dot", "d_y", "d_y_dot"):
            setattr(there, name, [value.to(device) for value in getattr(there, name)])
        compare(there.maps().cpu(), here.maps(), four_maps.FLOAT64_BOUND, str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_four_maps(case):
    check(case, "cuda")


@pytest.mark.parametrize("case", [c for module in MODULES for c in module.CASES[:1]], ids=str)
def test_the_comparison_itself(case):
    check(case, "cpu")


@pytest.mark.gpu
def test_labels_are_not_read_back():
    case = test_cross_entropy.CASES[1]
    run = Run(case)
    x = [v.cuda() for v in run.x]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.op.forward(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
