"""An optimiser whose transforms of the gradients are learned while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.compat.learn2learn.optim.parameter_update import Transform
from fastmeta.compat.learn2learn.utils import replace_parameters
from fastmeta.core.checks import fail


class LearnableOptimizer(nn.Module):
    """Gradient descent ``p <- p - lr * transform_p(grad)`` with transforms that are learned (meta-descent).

    After :meth:`step` the module's parameters depend on the transforms', so that the next ``backward`` of its loss has
    gradients to both. The optimiser's own parameters are those of the transforms; hand them to any ``torch.optim``.
    Sources: R. Sutton, 1992; A. Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent, 2018.

    Args:
        model: the module to update.
        transform: makes of a parameter the module that its gradient goes through, or ``None`` for no transform.
        lr: the rate.

    Raises:
        TypeError: ``model`` is no module.
    """

    def __init__(self, model: nn.Module, transform: Transform, lr: float | Tensor = 1.0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            fail(TypeError, "LearnableOptimizer", "model", "a torch.nn.Module", type(model).__name__)
        self.info = {"model": model}  # in a dict, so that its parameters are not this module's
        made = (transform(p) for p in model.parameters())
        self.transforms = nn.ModuleList([nn.Identity() if t is None else t for t in made])
        self.lr = lr

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Move every parameter that has a gradient, in place of the module; the old tensors are left without a graph.

        Args:
            closure: not used.
        """
        model = self.info["model"]
        steps = []
        for p, transform in zip(model.parameters(), self.transforms, strict=True):
            grad = _grad(p)
            if grad is not None:
                update = -self.lr * transform(grad.detach())
                p.detach_()
                moved = p + update
                steps.append((p, moved.requires_grad_()))  # also where the transform has nothing to learn
        replace_parameters(model, steps)
        for p in model.parameters():
            if p.requires_grad:
                p.retain_grad()

    def zero_grad(self) -> None:  # type: ignore[override]
        """Zero the gradients of the module's parameters, and not those of the transforms."""
        for p in self.info["model"].parameters():
            if _grad(p) is not None:
                p.grad = torch.zeros_like(p.data)


def _grad(p: Tensor) -> Tensor | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        return p.grad
