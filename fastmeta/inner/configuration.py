"""What a user says an inner rule is: rates and other hyper-parameters, of which tensors may be learned."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.inner.rates import Rate, Shapes, as_tensor, check_rate, registered
from fastmeta.inner.rule import RuleKind


class Parts(NamedTuple):
    """What a meta-step holds of an inner rule; :class:`fastmeta.engine.work.Work` says what each is."""

    alpha: Tensor
    segments: Tensor | None
    rate_shapes: Shapes | None
    rule: RuleKind
    hyper: Tensor | None


class Configuration(nn.Module):
    """An inner rule's hyper-parameters as attributes, which may be set at any time; parameters are registered.

    Args:
        lr: inner learning rates; see :class:`fastmeta.inner.rates.Rates`.

    Raises:
        TypeError: a rate is neither a number nor a floating-point tensor.
    """

    hyper: ClassVar[tuple[str, ...]] = ()  # names of the hyper-parameters beside the rates that a rule of this type has

    def __init__(self, lr: Rate) -> None:
        super().__init__()
        for name, rate in lr.items() if isinstance(lr, Mapping) else [("", lr)]:
            check_rate(type(self).__name__, f"lr[{name!r}]" if name else "lr", rate)
        self.lr = registered(lr)

    @abstractmethod
    def kind(self) -> RuleKind:
        """The rule without values, from the attributes as they are, checked."""

    def values(self, like: Tensor) -> Tensor | None:
        """The hyper-parameters that the rule has beside its rates, ``[H]``; ``None`` where there are none."""
        names = self.kind().names
        return torch.stack([as_tensor(getattr(self, name), like) for name in names]) if names else None

    def learned(self) -> dict[str, Tensor]:
        """The tensors that require grad, by name; rates of a mapping are ``lr.<name>``."""
        named: dict[str, Any] = {}
        if isinstance(self.lr, nn.Module):
            named = {f"lr.{name}": rate for name, rate in self.lr.as_mapping().items()}
        named |= {name: getattr(self, name) for name in ("lr", *self.hyper)}
        return {name: v for name, v in named.items() if isinstance(v, Tensor) and v.requires_grad}

    def numbers(self) -> tuple[float | None, ...]:
        """The hyper-parameters, the rate among them; ``None`` for what is no number."""
        every = (getattr(self, name) for name in ("lr", *self.hyper))
        return tuple(v if isinstance(v, (float, int)) else None for v in every)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        names = self.hyper if isinstance(self.lr, nn.Module) else ("lr", *self.hyper)
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def check_number(op: str, name: str, value: object, below: float = math.inf) -> None:
    """Raise unless ``value`` is a number that is finite, not negative and less than ``below``, or a tensor ``[]``."""
    check_rate(op, name, value)
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{op}: {name} must be a number or of shape [], got {tuple(value.shape)}")
    elif isinstance(value, (float, int)) and not (math.isfinite(value) and 0 <= value < below):
        most = "" if below == math.inf else f", and less than {below:g}"
        raise ValueError(f"{op}: {name} must be finite and not negative{most}, got {value}")
