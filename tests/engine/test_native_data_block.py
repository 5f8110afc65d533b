"""The native first layer, whose statistics and gradients come from patches of the data; against float64 autodiff."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.core import native
from tests.oracle import maml_loop, relative_error

_C = native.extension()
pytestmark = [
    pytest.mark.skipif(_C is None, reason=f"no extension: {native.missing_reason()}"),
    pytest.mark.usefixtures("one_thread", "traced_once"),
]
EXACT = 1e-10  # float64 rounding through batch norm's cancellations (1.1e-11 seen); a wrong term shows above 1e-3
FILTERS, WAYS = 5, 3
SETS = [name for name in ("plain", "v3", "v4") if _C is not None and name in _C.supported_instruction_sets()]
# Channels, kernel, padding, dilation, image.
CASES = {
    "one tap": (1, (1, 1), 0, 1, (6, 8)),
    "one tap of many channels": (32, (1, 1), 0, 1, (4, 9)),
    "even": (7, (2, 2), 0, 1, (5, 12)),
    "wider than a vector": (3, (3, 3), 1, 1, (9, 37)),
    "columns": (10, (3, 1), 1, 1, (6, 18)),
    "rows, dilated": (5, (1, 3), 1, 2, (4, 40)),
    "large": (1, (5, 5), 2, 1, (9, 30)),
    "windows side by side": (1, (3, 3), 0, 3, (9, 17)),
    "windows apart": (1, (3, 3), 4, 4, (4, 20)),
    "padding beyond the kernel": (3, (3, 3), 3, 3, (2, 33)),
}


@functools.cache
def problem(name: str) -> tuple[nn.Module, fm.TaskBatch, dict[str, torch.Tensor]]:
    """A network whose first layer is of that form, tasks, and the meta-gradient."""
    channels, kernel, padding, dilation, size = CASES[name]
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, FILTERS, kernel, padding=padding, dilation=dilation)
    norm = nn.BatchNorm2d(FILTERS, track_running_stats=False)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0]))  # where it is 0 all pixels of a window are equal
        norm.bias.normal_(std=0.2)
    body = nn.Sequential(convolution, norm, nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Flatten())
    features = body(torch.randn(2, channels, *size)).shape[1]
    model = nn.Sequential(*body, nn.Linear(features, WAYS)).double()
    support, query = ((torch.randn(2, n, channels, *size).double() + 3, torch.randint(WAYS, (2, n))) for n in (3, 7))
    truth = maml_loop(model, F.cross_entropy, support, query, 0.1, 2)[3]
    return model, fm.TaskBatch(support, query), truth


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("name", list(CASES))
def test_patches_of_every_form(name: str, isa: str) -> None:
    model, tasks, truth = problem(name)
    _C.use_instruction_set(isa)
    try:
        maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="native")
        ours = maml.value_and_grad(tasks)[1]
    finally:
        _C.use_instruction_set("")
    for parameter, right in truth.items():
        scale = max(float(right.norm()), 1e-2)  # the gradient of the convolution's bias is rounding alone
        assert float((ours[parameter] - right).norm()) <= EXACT * scale, parameter
    assert relative_error(ours, truth) <= EXACT
