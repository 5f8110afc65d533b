"""Binary cross-entropy on logits: weights, positive weights, reductions, soft targets that carry derivatives."""

from __future__ import annotations

import pytest
import torch

from tests.ops import four_maps
from tests.ops.four_maps import A, Case

bce = torch.ops.aten.binary_cross_entropy_with_logits.default
z, y = A((4, 3)), A((4, 3), "unit")

CASES = [
    Case("mean", bce, (z, y)),
    Case("sum", bce, (z, y, None, None, 2)),
    Case("none", bce, (z, y, None, None, 0)),
    Case("weight", bce, (z, y, A((3,), "positive")), fixed=("weight",)),
    Case("pos-weight", bce, (z, y, None, A((3,), "positive")), fixed=("pos_weight",)),
    Case("both", bce, (z, y, A((4, 1), "positive"), A((3,), "positive"), 2), fixed=("weight", "pos_weight")),
    Case("one", bce, (A((1,)), A((1,), "unit"))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


def test_large_logits_stay_finite():
    op_case = Case("large", bce, (A((2, 2)), A((2, 2), "unit")))
    run = four_maps.Run(op_case)
    run.x[0] = torch.full((3, 2, 2), 1e4, dtype=torch.float64)
    assert all(torch.isfinite(v).all() for _, values in run.maps() for v in values)
