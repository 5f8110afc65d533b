"""The contract of an inner rule: what the engine asks of it, and what it may ask of the engine.

A rule has a state of its own, ``(phi_{k+1}, s_{k+1}) = U(phi_k, s_k, g_k)``, and its adjoint gives the cotangents of
all three, eq. (14) of docs/maths.md. It never sees how parameters are held: packed for each task, or as factors that no
task forms; a rule that takes entries one by one says so (:attr:`RuleKind.entrywise`), and then all of them are packed.
The engine in turn knows nothing of states and hyper-parameters but to hand them on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")

# Of vectors' entries, ``[T, P]`` each, the step's rates and their segments, as ``ops/inner_update`` has them: what it
# makes of them entry by entry; and, where they are wanted, gradients to the rates and to numbers that all share.
Entrywise = Callable[
    [Sequence[Tensor | None], Tensor, Tensor | None], tuple[Sequence[Tensor | None], Tensor | None, Tensor | None]
]


class Space(Protocol[V]):
    """What a rule may do with vectors: what has one entry an adapting element and task. None is ever overwritten."""

    def vector(self, values: Sequence[Any]) -> V:
        """One of what each parameter has, such as the gradients of a step."""
        ...

    def plus(self, a: V, b: V, scale: Tensor | float = 1.0) -> V:
        """``a + scale * b``."""
        ...

    def times(self, a: V, scale: Tensor) -> V:
        """``scale * a``."""
        ...

    def inner(self, a: V, b: V) -> Tensor:
        """``[]``: the entries' products, summed over tasks; ``b`` is a cotangent."""
        ...

    def descend(self, phi: V, s: V | Sequence[Any], k: int) -> V:
        """Eq. (3) along ``s``, a vector or what each parameter has: ``phi - alpha_k * s``."""
        ...

    def descend_adjoint(self, lam: V, s: V | None, k: int) -> tuple[V, Tensor | None]:
        """``alpha_k * lam``, eq. (5), and with ``s`` the gradient to alpha_k, eq. (7), in its shape."""
        ...

    def entrywise(
        self, f: Entrywise, vectors: Sequence[V | None], k: int
    ) -> tuple[list[Any], Tensor | None, Tensor | None]:
        """What ``f`` makes of the entries, its gradient to alpha_k in alpha's shape, and the other one.

        Vectors that are ``None`` reach it so, and what it leaves ``None`` is.

        For rules of an entrywise kind alone: there must be no factors.
        """
        ...

    def part(self, group: Group) -> Space[V]:
        """Of vectors of one group's parameters alone, at its own rates."""
        ...

    def split(self, a: V, groups: Sequence[Group]) -> list[V]:
        """What each of ``groups``, which are all, has of ``a``."""
        ...

    def joined(self, pieces: Sequence[V]) -> V:
        """The other way round."""
        ...


@dataclass(frozen=True)
class Group:
    """Adapting parameters that follow each other in the packing's order and have an inner rule of their own.

    Attributes:
        pattern: by which a user has named them.
        kind: the rule without values.
        learned: whether any of its hyper-parameters or rates is.
        dtype: of its hyper-parameters beside the rates; ``None`` where it has none.
        parameters: which they are in that order.
        rates: columns of alpha, which are theirs.
    """

    pattern: str
    kind: RuleKind
    learned: bool
    dtype: torch.dtype | None
    parameters: range
    rates: range


@dataclass
class Forth(Generic[V]):
    """A step.

    Attributes:
        phi: adapted parameters.
        state: of the rule, whatever it is.
        record: what the adjoint needs of the step, where it was to be kept.
    """

    phi: V
    state: Any
    record: Any


@dataclass
class Back(Generic[V]):
    """A step's adjoint.

    Attributes:
        lam: cotangent of ``phi_k``, but for what comes by ``g_k``, the Hessian's term.
        state: cotangent of the state before the step, whatever it is; ``None`` for zero.
        u: the negative of the cotangent of ``g_k``.
        d_alpha: gradient to the step's rates, summed over tasks, where it was wanted.
        d_hyper: likewise to the other hyper-parameters, ``[H]``.
    """

    lam: V
    state: Any
    u: V
    d_alpha: Tensor | None
    d_hyper: Tensor | None = None


class Rule(ABC):
    """An inner rule with the values of its hyper-parameters."""

    @abstractmethod
    def step(self, space: Space[V], phi: V, state: Any, g: Sequence[Any], k: int, *, keep: bool) -> Forth[V]:
        """Step k from ``phi_k`` by what each parameter has for its gradient.

        Args:
            space: of the vectors.
            phi: adapted parameters.
            state: of the step before; ``None`` at the first.
            g: the gradients.
            k: the step.
            keep: whether the adjoint will be asked for, and needs a record: for gradients to rates or
                hyper-parameters, or because the rule is entrywise.
        """

    @abstractmethod
    def adjoint(self, space: Space[V], lam: V, state: Any, record: Any, k: int) -> Back[V]:
        """Adjoint of step k.

        Args:
            space: of the vectors.
            lam: cotangent of ``phi_{k+1}``.
            state: cotangent of the state after the step; ``None`` for zero.
            record: of the step, where it was kept.
            k: the step.
        """


class RuleKind(ABC):
    """An inner rule without values: what plans, captured graphs and remembered meta-steps depend on. Hashable."""

    @property
    def entrywise(self) -> bool:
        """Whether it takes entries one by one and not vectors as a whole.

        Its steps along factors would be of full rank, so that weights are formed; and its adjoint needs the record of a
        step even where nothing is learned.
        """
        return False

    @property
    @abstractmethod
    def plain(self) -> bool:
        """Whether a step is eq. (3) and nothing else, which every executor runs."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the hyper-parameters beside the rates that it has, in the order of their values ``[H]``."""

    @property
    @abstractmethod
    def records(self) -> frozenset[str]:
        """Which vectors are kept of each step, where a record is; ``phi`` is phi_k."""

    @abstractmethod
    def rule(self, values: Tensor | None) -> Rule:
        """With its hyper-parameters, ``[H]``; ``None`` where it has none."""

    def of(self, place: int, values: Tensor | None = None) -> tuple[RuleKind, Tensor | None]:
        """The rule of one parameter, by its place in the packing's order, and the hyper-parameters of that rule."""
        return self, values

    @abstractmethod
    def explicit(self, phi: Tensor, state: Any, g: Tensor, rate: Tensor, values: Tensor | None) -> tuple[Tensor, Any]:
        """One parameter's step of one task in plain torch, for autograd: the parameter and its state after it.

        Of the kind and the values that :meth:`of` gives.
        """

    @abstractmethod
    def described(self) -> str:
        """What it has beside eq. (3), for messages."""
