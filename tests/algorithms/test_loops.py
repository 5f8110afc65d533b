"""The loops that algorithms are timed beside compute the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.algorithm_loops import loop_of
from fastmeta import algorithms
from fastmeta.learner.algorithms import CLASSES
from fastmeta.learner.config import ALGORITHMS
from fastmeta.learner.models import Modulated, read_context
from tests.algorithms.problems import EXACT
from tests.algorithms.test_maml_plus_plus import images, normed
from tests.oracle import relative_error


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_loop_is_its_algorithm(name: str) -> None:
    model: nn.Module = normed(track=False)
    options = {} if name in ("imaml", "metacurvature") else {"engine": "autodiff"}  # spares the time of tracing
    if name == "cavia":
        model = Modulated(model, 2, 4, context=3).double()
        options |= {"context": 3, "condition": read_context}
    learner = getattr(algorithms, CLASSES[name])(model, F.cross_entropy, lr=0.2, steps=2, **options)
    torch.manual_seed(6)
    with torch.no_grad():
        for n, p in learner.named_parameters():
            if not n.endswith("context"):
                p += 0.1 * torch.randn_like(p)  # rates, matrices and rows that are not as they start
    tasks = images()
    assert relative_error(loop_of(name, learner, tasks)(), learner.value_and_grad(tasks)[1]) <= EXACT
