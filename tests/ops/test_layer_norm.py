"""Layer norm: with and without scale and shift, over one axis or several."""

from __future__ import annotations

import pytest
import torch

from tests.ops import four_maps
from tests.ops.four_maps import A, Case

layer_norm = torch.ops.aten.layer_norm.default

CASES = [
    Case("features", layer_norm, (A((4, 5)), [5], A((5,)), A((5,)), 1e-5)),
    Case("tokens", layer_norm, (A((2, 3, 5)), [5], A((5,)), A((5,)), 1e-5)),
    Case("two-axes", layer_norm, (A((2, 3, 5)), [3, 5], A((3, 5)), A((3, 5)), 1e-3)),
    Case("no-shift", layer_norm, (A((4, 5)), [5], A((5,)), None, 1e-5)),
    Case("plain", layer_norm, (A((4, 5)), [5], None, None, 1e-5)),
    Case("one-sample", layer_norm, (A((1, 3)), [3], A((3,)), A((3,)), 1e-5)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)
