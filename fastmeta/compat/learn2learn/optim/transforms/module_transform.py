"""A transform by any module that takes vectors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class ReshapedTransform(nn.Module):
    """A module on gradients of another shape than it takes.

    Args:
        transform: the module.
        shape: what a gradient is reshaped to for it; its result gets the gradient's shape again.
    """

    def __init__(self, transform: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.transform = transform
        self.in_shape = shape

    def forward(self, grad: Tensor) -> Tensor:
        """The update for a gradient, in its shape."""
        return self.transform(grad.reshape(self.in_shape)).reshape(grad.shape)


class ModuleTransform:
    """Makes of a parameter of n elements the module ``module_cls(n, n)`` on gradients of shape ``[1, n]``.

    A ``torch.nn.Linear`` so has n^2 weights; :class:`KroneckerTransform` has fewer.

    Args:
        module_cls: makes the module of its input and output size.
    """

    def __init__(self, module_cls: Callable[[int, int], nn.Module]) -> None:
        self.module_cls = module_cls

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        """The transform for a parameter."""
        n = parameter.numel()
        return ReshapedTransform(transform=self.module_cls(n, n), shape=(1, n))
