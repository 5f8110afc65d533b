"""The configuration of inner stochastic gradient descent."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastmeta.inner.configuration import Configuration, check_number
from fastmeta.inner.rates import Rate
from fastmeta.inner.sgd_rule import SGDKind


class SGD(Configuration):
    """Inner stochastic gradient descent as ``torch.optim.SGD`` does it, differentiated exactly through every step.

    Each parameter's step, eq. (15) of docs/maths.md, is::

        d_k       = g_k + weight_decay * phi_k
        b_k       = d_k at the first step, then momentum * b_{k-1} + (1 - dampening) * d_k
        phi_{k+1} = phi_k - lr_k * b_k, or phi_k - lr_k * (d_k + momentum * b_k) with nesterov

    Where the number of a part is 0 the rule goes without it; what is a tensor is there whatever its value, so that at a
    momentum of 0 dampening still counts. A parameter that the support loss does not use has a gradient of zero: under
    weight decay it still shrinks.

    Args:
        lr: inner learning rate: a number; a tensor ``[]``, or ``[K]`` with one rate a step; or a mapping from the name
            of every adapting parameter to a number or a tensor that broadcasts to its shape.
        momentum, dampening, weight_decay: a number or a tensor ``[]``. Tensors that require grad get their
            meta-gradient; those that are ``nn.Parameter`` become parameters of this module.
        nesterov: go along ``d_k + momentum * b_k``.

    Raises:
        TypeError: a hyper-parameter is neither a number nor a floating-point tensor, or ``nesterov`` is no bool.
        ValueError: a tensor is not ``[]``, a number is negative or not finite, or ``nesterov`` goes without momentum or
            with dampening.

    Source: I. Sutskever, J. Martens, G. Dahl, G. Hinton, ICML 2013, as PyTorch has it.
    """

    hyper: ClassVar[tuple[str, ...]] = ("momentum", "dampening", "weight_decay")

    def __init__(
        self,
        lr: Rate,
        momentum: float | Tensor = 0.0,
        dampening: float | Tensor = 0.0,
        nesterov: bool = False,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        super().__init__(lr)
        self.momentum, self.dampening, self.weight_decay = momentum, dampening, weight_decay
        self.nesterov = nesterov
        self.kind()

    def kind(self) -> SGDKind:
        """The rule without values, from the attributes as they are.

        Raises:
            As the class.
        """
        for name in self.hyper:
            check_number("SGD", name, getattr(self, name))
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"SGD: nesterov must be a bool, got {type(self.nesterov).__name__}")
        has = {name: isinstance(getattr(self, name), Tensor) or getattr(self, name) != 0 for name in self.hyper}
        if self.nesterov and not has["momentum"]:
            raise ValueError(f"SGD: momentum must not be 0 with nesterov, got {self.momentum}")
        if self.nesterov and has["dampening"]:
            raise ValueError(f"SGD: dampening must be 0 with nesterov, got {self.dampening}")
        has["dampening"] &= has["momentum"]
        learned = {name.partition(".")[0] for name in self.learned()}
        learned = {name for name in learned if has.get(name, True)}
        return SGDKind(**has, nesterov=self.nesterov, learned=frozenset(learned))

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"{super().extra_repr()}, nesterov={self.nesterov}"
