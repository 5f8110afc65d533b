"""The configurations of inner rules that divide by roots of second moments: RMSprop, Adagrad, Adam, AdamW."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.inner.adaptive_rule import AdagradKind, AdamKind, RMSpropKind
from fastmeta.inner.configuration import Configuration, check_number
from fastmeta.inner.rates import Rate


class Adaptive(Configuration):
    """What these rules share: numbers or tensors ``[]`` for hyper-parameters, each of which may be learned."""

    below: ClassVar[dict[str, float]] = {}  # numbers of these names must be less

    def values(self, like: Tensor) -> Tensor | None:
        """The hyper-parameters beside the rates in double precision, which ``1 - beta^t`` needs."""
        return super().values(like.new_empty((), dtype=torch.float64))

    def _parts(self) -> dict[str, Any]:
        """Of a kind: what is learned, and whether there is weight decay; raises where a number cannot be."""
        for name in self.hyper:
            check_number(type(self).__name__, name, getattr(self, name), self.below.get(name, float("inf")))
        learned = frozenset(name.partition(".")[0] for name in self.learned())
        return {"learned": learned, "weight_decay": self._has("weight_decay")}

    def _has(self, name: str) -> bool:
        """Whether it is a tensor, or a number that is not 0."""
        value = getattr(self, name)
        return isinstance(value, Tensor) or value != 0

    def _check_flag(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise TypeError(f"{type(self).__name__}: {name} must be a bool, got {type(value).__name__}")


class RMSprop(Adaptive):
    """Inner RMSprop as ``torch.optim.RMSprop`` does it, differentiated exactly through every step.

    Each parameter's step, eq. (19) of docs/maths.md, is, from ``v = m = b = 0``::

        d   = g + weight_decay * phi
        v   = alpha * v + (1 - alpha) * d^2
        r   = d / (sqrt(v + eps_root) + eps);  where centered, sqrt(v - m^2 + eps_root), m = alpha * m + (1 - alpha) * d
        phi = phi - lr * r, or with momentum  phi - lr * b,  b = momentum * b + r

    At ``v + eps_root = 0`` the root has a derivative of 0, and 0 / 0 is 0: so the step and its derivatives are finite
    for every ``eps`` and ``eps_root``, and where ``eps > 0`` exact (docs/maths.md, section 8).

    Args:
        lr: inner learning rate: a number; a tensor ``[]``, or ``[K]`` with one rate a step; or a mapping from the name
            of every adapting parameter to a number or a tensor that broadcasts to its shape.
        alpha, eps, weight_decay, momentum, eps_root: a number or a tensor ``[]``. Tensors that require grad get their
            meta-gradient; those that are ``nn.Parameter`` become parameters of this module. ``eps_root`` is within the
            root; ``torch.optim`` has none.
        centered: divide by an estimate of the gradient's deviation instead of its mean square.

    Raises:
        TypeError: a hyper-parameter is neither a number nor a floating-point tensor, or ``centered`` is no bool.
        ValueError: a tensor is not ``[]``, a number is negative or not finite.

    Source: T. Tieleman, G. Hinton, lecture 6.5, 2012; A. Graves, arXiv:1308.0850, for the centred form; as PyTorch has
    them.
    """

    hyper: ClassVar[tuple[str, ...]] = ("alpha", "eps", "weight_decay", "momentum", "eps_root")

    def __init__(
        self,
        lr: Rate,
        alpha: float | Tensor = 0.99,
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0.0,
        momentum: float | Tensor = 0.0,
        centered: bool = False,
        *,
        eps_root: float | Tensor = 0.0,
    ) -> None:
        super().__init__(lr)
        self.alpha, self.eps, self.weight_decay, self.momentum = alpha, eps, weight_decay, momentum
        self.eps_root, self.centered = eps_root, centered
        self.kind()

    def kind(self) -> RMSpropKind:
        """The rule without values, from the attributes as they are.

        Raises:
            As the class.
        """
        self._check_flag("centered")
        return RMSpropKind(**self._parts(), momentum=self._has("momentum"), centred=self.centered)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"{super().extra_repr()}, centered={self.centered}"


class Adagrad(Adaptive):
    """Inner Adagrad as ``torch.optim.Adagrad`` does it, differentiated exactly through every step.

    Each parameter's step, eq. (19) of docs/maths.md, is, from ``v = initial_accumulator_value``::

        d   = g + weight_decay * phi
        v   = v + d^2
        phi = phi - lr / (1 + k * lr_decay) * d / (sqrt(v + eps_root) + eps)

    Zeros are as in :class:`RMSprop`.

    Args:
        lr: inner learning rate, as in :class:`RMSprop`.
        lr_decay, weight_decay, eps, eps_root: a number or a tensor ``[]``, which may be learned as there.
        initial_accumulator_value: a number.

    Raises:
        TypeError: a hyper-parameter is neither a number nor a floating-point tensor, or the initial value is no number.
        ValueError: a tensor is not ``[]``, a number is negative or not finite.

    Source: J. Duchi, E. Hazan, Y. Singer, JMLR 12, 2011, as PyTorch has it.
    """

    hyper: ClassVar[tuple[str, ...]] = ("lr_decay", "weight_decay", "eps", "eps_root")

    def __init__(
        self,
        lr: Rate,
        lr_decay: float | Tensor = 0.0,
        weight_decay: float | Tensor = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float | Tensor = 1e-10,
        *,
        eps_root: float | Tensor = 0.0,
    ) -> None:
        super().__init__(lr)
        self.lr_decay, self.weight_decay, self.eps, self.eps_root = lr_decay, weight_decay, eps, eps_root
        self.initial_accumulator_value = initial_accumulator_value
        self.kind()

    def kind(self) -> AdagradKind:
        """The rule without values, from the attributes as they are.

        Raises:
            As the class.
        """
        initial = self.initial_accumulator_value
        if isinstance(initial, Tensor):
            raise TypeError("Adagrad: initial_accumulator_value must be a number, got Tensor")
        check_number("Adagrad", "initial_accumulator_value", initial)
        return AdagradKind(**self._parts(), initial=float(initial))

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"{super().extra_repr()}, initial_accumulator_value={self.initial_accumulator_value}"


class Adam(Adaptive):
    """Inner Adam as ``torch.optim.Adam`` does it, differentiated exactly through every step.

    Each parameter's step, eq. (19) of docs/maths.md, is, from ``m = v = 0``, with ``t = k + 1``::

        d   = g + weight_decay * phi
        m   = beta1 * m + (1 - beta1) * d
        v   = beta2 * v + (1 - beta2) * d^2
        phi = phi - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t) + eps_root) + eps)

    With ``amsgrad`` the largest ``v`` so far stands for it. Zeros are as in :class:`RMSprop`.

    Args:
        lr: inner learning rate, as in :class:`RMSprop`.
        betas: ``(beta1, beta2)``, which become attributes of these names.
        eps, weight_decay: like each of ``betas`` a number or a tensor ``[]``, which may be learned as there.
        amsgrad: divide by the root of the largest second moment so far.
        eps_root: likewise a number or a tensor, within the root; ``torch.optim`` has none.

    Raises:
        TypeError: a hyper-parameter is neither a number nor a floating-point tensor, or ``amsgrad`` is no bool.
        ValueError: a tensor is not ``[]``, a number is negative or not finite, or a beta is not less than 1.

    Source: D. P. Kingma, J. Ba, ICLR 2015; S. J. Reddi, S. Kale, S. Kumar, ICLR 2018, as PyTorch has them.
    """

    hyper: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "eps", "weight_decay", "eps_root")
    below: ClassVar[dict[str, float]] = {"beta1": 1.0, "beta2": 1.0}
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        lr: Rate,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0.0,
        amsgrad: bool = False,
        *,
        eps_root: float | Tensor = 0.0,
    ) -> None:
        super().__init__(lr)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"{type(self).__name__}: betas must be a pair, got {betas!r}")
        self.beta1, self.beta2 = betas
        self.eps, self.weight_decay, self.eps_root, self.amsgrad = eps, weight_decay, eps_root, amsgrad
        self.kind()

    def kind(self) -> AdamKind:
        """The rule without values, from the attributes as they are.

        Raises:
            As the class.
        """
        self._check_flag("amsgrad")
        return AdamKind(**self._parts(), amsgrad=self.amsgrad, decoupled=self.decoupled)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"{super().extra_repr()}, amsgrad={self.amsgrad}"


class AdamW(Adam):
    """Inner AdamW as ``torch.optim.AdamW`` does it: :class:`Adam` whose weight decay is apart from the gradient.

    ``d = g``, and ``phi`` is first multiplied by ``1 - lr * weight_decay``.

    Args:
        lr, betas, eps, weight_decay, amsgrad, eps_root: as in :class:`Adam`.

    Raises:
        As :class:`Adam`.

    Source: I. Loshchilov, F. Hutter, ICLR 2019, as PyTorch has it.
    """

    decoupled: ClassVar[bool] = True

    def __init__(
        self,
        lr: Rate,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        eps_root: float | Tensor = 0.0,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, amsgrad, eps_root=eps_root)
