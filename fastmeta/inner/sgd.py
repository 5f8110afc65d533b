"""The configuration of inner stochastic gradient descent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.inner.rates import Rate, as_tensor, check_rate, registered
from fastmeta.inner.sgd_rule import SGDKind

_HYPER = ("momentum", "dampening", "weight_decay")


class SGD(nn.Module):
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

    def __init__(
        self,
        lr: Rate,
        momentum: float | Tensor = 0.0,
        dampening: float | Tensor = 0.0,
        nesterov: bool = False,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(lr, Mapping):
            for name, rate in lr.items():
                check_rate("SGD", f"lr[{name!r}]", rate)
        else:
            check_rate("SGD", "lr", lr)
        self.lr = registered(lr)
        self.momentum, self.dampening, self.weight_decay = momentum, dampening, weight_decay
        self.nesterov = nesterov
        self.kind()

    def kind(self) -> SGDKind:
        """The rule without values, from the attributes as they are.

        Raises:
            As the class.
        """
        for name in _HYPER:
            _check(name, getattr(self, name))
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"SGD: nesterov must be a bool, got {type(self.nesterov).__name__}")
        has = {name: isinstance(getattr(self, name), Tensor) or getattr(self, name) != 0 for name in _HYPER}
        if self.nesterov and not has["momentum"]:
            raise ValueError(f"SGD: momentum must not be 0 with nesterov, got {self.momentum}")
        if self.nesterov and has["dampening"]:
            raise ValueError(f"SGD: dampening must be 0 with nesterov, got {self.dampening}")
        has["dampening"] &= has["momentum"]
        learned = {name.partition(".")[0] for name in self.learned()}
        learned = {name for name in learned if has.get(name, True)}
        return SGDKind(**has, nesterov=self.nesterov, learned=frozenset(learned))

    def values(self, like: Tensor) -> Tensor | None:
        """The hyper-parameters that the rule has beside its rates, ``[H]``; ``None`` where there are none."""
        names = self.kind().names
        return torch.stack([as_tensor(getattr(self, name), like) for name in names]) if names else None

    def learned(self) -> dict[str, Tensor]:
        """The tensors that require grad, by name; rates of a mapping are ``lr.<name>``."""
        named: dict[str, Any] = {}
        if isinstance(self.lr, nn.Module):
            named = {f"lr.{name}": rate for name, rate in self.lr.as_mapping().items()}
        named |= {name: getattr(self, name) for name in ("lr", *_HYPER)}
        return {name: v for name, v in named.items() if isinstance(v, Tensor) and v.requires_grad}

    def numbers(self) -> tuple[float | None, ...]:
        """The hyper-parameters, the rate among them; ``None`` for what is no number."""
        every = (getattr(self, name) for name in ("lr", *_HYPER))
        return tuple(v if isinstance(v, (float, int)) else None for v in every)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        names = (*_HYPER, "nesterov") if isinstance(self.lr, nn.Module) else ("lr", *_HYPER, "nesterov")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _check(name: str, value: object) -> None:
    check_rate("SGD", name, value)
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"SGD: {name} must be a number or of shape [], got {tuple(value.shape)}")
    elif isinstance(value, (float, int)) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"SGD: {name} must be finite and not negative, got {value}")
