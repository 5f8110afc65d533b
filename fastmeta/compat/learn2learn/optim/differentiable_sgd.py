"""Gradient descent that autograd sees, on a whole module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastmeta.compat.learn2learn.utils import update_module


class DifferentiableSGD(nn.Module):
    """``p <- p - lr * g`` for every parameter of a module, such that gradients flow to ``p`` and ``g``.

    Args:
        lr: the rate.
    """

    def __init__(self, lr: float | Tensor) -> None:
        super().__init__()
        self.lr = lr

    def forward(self, module: nn.Module, gradients: Sequence[Tensor | None] | None = None) -> None:
        """Update the module in place; its tensors are not changed.

        Args:
            module: the module.
            gradients: ``g`` of each of ``module.parameters()``, in their order; a parameter with ``None`` stays. Their
                ``.grad`` by default.

        Raises:
            ValueError: another number of gradients than of parameters.
        """
        if gradients is None:
            gradients = [p.grad for p in module.parameters()]
        update_module(module, [None if g is None else g.mul(-self.lr) for g in gradients])
