"""The inner rule of a MAML: the one configured, or plain descent at a rate given by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.packing import Packing
from fastmeta.engine.evaluation import MetaGradient
from fastmeta.engine.work import Work
from fastmeta.inner.configuration import Configuration, Parts
from fastmeta.inner.groups import Groups
from fastmeta.inner.rates import Rates, RateTable, given
from fastmeta.inner.sgd_rule import PLAIN

DEFAULT = 0.01  # the rate, where nothing is said


class InnerRule:
    """What ``lr`` and ``inner`` of a MAML say at this moment; exactly one of them says it.

    Args:
        lr: rates by themselves, or ``None``.
        inner: a configured rule, or rules of groups, or ``None``.

    Raises:
        TypeError: ``inner`` is no rule.
        ValueError: both are given.
    """

    def __init__(self, lr: float | Tensor | RateTable | None, inner: Configuration | Groups | None) -> None:
        if inner is not None and not isinstance(inner, (Configuration, Groups)):
            raise TypeError(f"MAML: inner must be a rule of fastmeta.inner, got {type(inner).__name__}")
        if inner is not None and lr is not None:
            raise ValueError(f"MAML: lr must be None beside inner, got {lr}; give the rate to inner, as SGD(lr=...)")
        self._lr = lr
        self._inner = inner if isinstance(inner, Configuration) else None
        self._groups = inner if isinstance(inner, Groups) else None
        self._configured = inner

    def settings(self) -> Any:
        """What a prepared meta-step depends on, and everything that is a number."""
        if self._configured is not None:
            return self._configured.kind(), self._configured.numbers()
        return self._lr if isinstance(self._lr, (float, int)) else None

    @property
    def fixed(self) -> bool:
        """Whether the settings say everything."""
        if self._configured is not None:
            return None not in self._configured.numbers()
        return isinstance(self._lr, (float, int))

    def ordered(self, names: Sequence[str]) -> list[str]:
        """The names of the adapting parameters in the order in which the rule has them packed: group by group.

        Raises:
            ValueError: groups do not share them out.
        """
        if self._groups is None:
            return list(names)
        return [name for own in self._groups.shared_out(names).values() for name in own]

    def check(self, packing: Packing) -> None:
        """Raise what :meth:`parts` would, for parameters packed so, but for the number of steps."""
        if self._groups is None:
            self._rates(packing)
        else:
            self._groups.rates(packing)

    def parts(self, packing: Packing, like: Tensor, steps: int, trained: int) -> Parts:
        """As it is for the parameters packed so, in ``like``'s dtype and device.

        Raises:
            ValueError: there is neither, and as :meth:`Rates.alpha`.
        """
        if self._groups is not None:
            return self._groups.parts(packing, like, steps, trained)
        rates = self._rates(packing)
        rule, hyper = (PLAIN, None) if self._inner is None else (self._inner.kind(), self._inner.values(like))
        return Parts(rates.alpha(like, steps, trained), rates.segments(like.device), rates.shapes, rule, hyper)

    def learned(self) -> dict[str, Tensor]:
        """The tensors that require grad, by the names that ``value_and_grad`` has for them."""
        if self._configured is not None:
            return {f"inner.{name}": value for name, value in self._configured.learned().items()}
        if isinstance(self._lr, RateTable):
            table = self._lr.as_mapping()
            return {f"lr.{n}": v for n, v in table.items() if isinstance(v, Tensor) and v.requires_grad}
        return {"lr": self._lr} if isinstance(self._lr, Tensor) and self._lr.requires_grad else {}

    def _rates(self, packing: Packing) -> Rates:
        lr = self._lr if self._inner is None else self._inner.lr
        if lr is None:
            raise ValueError("MAML: lr must be given where there is no inner, got None")
        return Rates(given(lr), packing)


def to_learned(work: Work, gradient: MetaGradient, learned: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to what is learned of the rule, from those to the rates and hyper-parameters of a meta-step."""
    both = ((work.alpha, gradient.alpha), (work.hyper, gradient.hyper))
    pairs = [(value, d) for value, d in both if value is not None and value.requires_grad]
    cotangents = [torch.zeros_like(value) if d is None else d for value, d in pairs]  # without a step there is none
    found = torch.autograd.grad([value for value, _ in pairs], learned, cotangents, allow_unused=True)
    return [torch.zeros_like(value) if d is None else d for value, d in zip(learned, found, strict=True)]
