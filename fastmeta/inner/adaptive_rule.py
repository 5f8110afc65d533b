"""Inner rules that divide by roots of second moments, and their adjoint (docs/maths.md, section 8).

Each is eq. (19) with numbers of its own; ``ops/adaptive_update`` has the step and the adjoint, in one pass each. The
numbers are made of the hyper-parameters in double precision, so that ``1 - beta`` and ``1 - beta^t`` lose no digits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core import optimizer_steps
from fastmeta.inner.rule import Back, Forth, Rule, RuleKind, Space, V
from fastmeta.ops.adaptive_update import op as adaptive_update
from fastmeta.ops.adaptive_update.form import Coefficients, Form, State

Number = float | Tensor


@dataclass(frozen=True)
class AdaptiveKind(RuleKind):
    """Which parts a rule has, and which of its hyper-parameters are learned.

    Attributes:
        weight_decay: whether it has one.
        learned: names of hyper-parameters, ``lr`` among them.
    """

    weight_decay: bool = False
    learned: frozenset[str] = frozenset()

    always: ClassVar[tuple[str, ...]] = ()  # names of the hyper-parameters that a rule of this kind has in any case

    @property
    def entrywise(self) -> bool:
        """Always."""
        return True

    @property
    def plain(self) -> bool:
        """Whether it is eq. (3)."""
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the hyper-parameters beside the rates."""
        return (*self.always, *["weight_decay"] * self.weight_decay)

    @property
    def records(self) -> frozenset[str]:
        """Vectors kept of a step."""
        parts = [name for name, has in zip(State._fields, self.form.has, strict=True) if has]
        return frozenset({"g", *parts, *["phi"] * self.weight_decay})

    def rule(self, values: Tensor | None) -> Rule:
        """With its hyper-parameters."""
        if values is None:
            raise RuntimeError(f"inner rule: values must be those of {self.names}, got None")
        return AdaptiveRule(self, values.detach())

    @property
    @abstractmethod
    def form(self) -> Form:
        """Which moments it has."""

    @abstractmethod
    def coefficients(self, named: Mapping[str, Number], k: int) -> Coefficients:
        """The numbers of step k; differentiable where hyper-parameters are tensors."""

    def start(self, like: Tensor) -> State:
        """The state before the first step, of vectors like this one, ``[T, P]``."""
        return State()

    def named(self, values: Sequence[Any]) -> dict[str, Any]:
        """Hyper-parameters by name."""
        return dict(zip(self.names, values, strict=True))

    def named_for(self, phi: Tensor, values: Tensor | None) -> dict[str, Any]:
        """The same from their tensor; where a parameter is a number it would take on their dtype."""
        if values is None:
            raise RuntimeError(f"inner rule: values must be those of {self.names}, got None")
        return self.named((values if phi.dim() else values.to(phi.dtype)).unbind())

    def described(self) -> str:
        """What it has beside eq. (3)."""
        return " and ".join([*self.parts(), *["weight decay"] * self.weight_decay])

    @abstractmethod
    def parts(self) -> list[str]:
        """What it has beside eq. (3) and weight decay, in words."""


@dataclass(frozen=True)
class RMSpropKind(AdaptiveKind):
    """RMSprop.

    Attributes:
        momentum: whether it has one.
        centred: whether the square of the mean gradient is taken from the mean square.
    """

    momentum: bool = False
    centred: bool = False
    always: ClassVar[tuple[str, ...]] = ("alpha", "eps", "eps_root")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the hyper-parameters beside the rates."""
        return (*super().names, *["momentum"] * self.momentum)

    @property
    def form(self) -> Form:
        """Which moments it has."""
        if self.centred:
            return Form.CENTRED_BUFFERED if self.momentum else Form.CENTRED
        return Form.BUFFERED if self.momentum else Form.SECOND

    def coefficients(self, named: Mapping[str, Number], k: int) -> Coefficients:
        """The numbers of step k."""
        keep, take = named["alpha"], 1 - named["alpha"]
        return Coefficients(
            decay=named.get("weight_decay", 0.0),
            keep_first=keep if self.centred else 0.0,
            take_first=take if self.centred else 0.0,
            keep_second=keep,
            take_second=take,
            eps_root=named["eps_root"],
            eps=named["eps"],
            momentum=named.get("momentum", 0.0),
        )

    def explicit(self, phi: Tensor, state: Any, g: Tensor, rate: Tensor, values: Tensor | None) -> tuple[Tensor, Any]:
        """One parameter's step of one task."""
        named = self.named_for(phi, values)
        return optimizer_steps.rmsprop(phi, g, state, lr=rate, centered=self.centred, **named)

    def parts(self) -> list[str]:
        """In words."""
        return ["mean squares of gradients", *["means of them"] * self.centred, *["momentum"] * self.momentum]


@dataclass(frozen=True)
class AdagradKind(AdaptiveKind):
    """Adagrad.

    Attributes:
        initial: the sum of squares that it begins with.
    """

    initial: float = 0.0
    always: ClassVar[tuple[str, ...]] = ("lr_decay", "eps", "eps_root")

    @property
    def form(self) -> Form:
        """Which moments it has."""
        return Form.SECOND

    def coefficients(self, named: Mapping[str, Number], k: int) -> Coefficients:
        """The numbers of step k."""
        return Coefficients(
            decay=named.get("weight_decay", 0.0),
            of_first=1 / (1 + k * named["lr_decay"]),
            eps_root=named["eps_root"],
            eps=named["eps"],
        )

    def start(self, like: Tensor) -> State:
        """The state before the first step."""
        if not self.initial:
            return State()
        return State(second=like.new_full((1, like.shape[1]), self.initial).expand_as(like))

    def explicit(self, phi: Tensor, state: Any, g: Tensor, rate: Tensor, values: Tensor | None) -> tuple[Tensor, Any]:
        """One parameter's step of one task."""
        named = self.named_for(phi, values)
        return optimizer_steps.adagrad(phi, g, state, lr=rate, initial_accumulator_value=self.initial, **named)

    def parts(self) -> list[str]:
        """In words."""
        return ["sums of squares of gradients"]


@dataclass(frozen=True)
class AdamKind(AdaptiveKind):
    """Adam and AdamW.

    Attributes:
        amsgrad: whether the largest second moment so far stands in the root.
        decoupled: whether weight decay shrinks parameters instead of adding to gradients.
    """

    amsgrad: bool = False
    decoupled: bool = False
    always: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "eps", "eps_root")

    @property
    def form(self) -> Form:
        """Which moments it has."""
        return Form.LARGEST if self.amsgrad else Form.AVERAGED

    def coefficients(self, named: Mapping[str, Number], k: int) -> Coefficients:
        """The numbers of step k."""
        beta1, beta2, decay = named["beta1"], named["beta2"], named.get("weight_decay", 0.0)
        return Coefficients(
            decay=0.0 if self.decoupled else decay,
            keep_first=beta1,
            take_first=1 - beta1,
            keep_second=beta2,
            take_second=1 - beta2,
            of_first=1 / (1 - beta1 ** (k + 1)),
            of_second=1 / (1 - beta2 ** (k + 1)),
            eps_root=named["eps_root"],
            eps=named["eps"],
            shrink=decay if self.decoupled else 0.0,
        )

    def explicit(self, phi: Tensor, state: Any, g: Tensor, rate: Tensor, values: Tensor | None) -> tuple[Tensor, Any]:
        """One parameter's step of one task."""
        named = self.named_for(phi, values)
        named["betas"] = named.pop("beta1"), named.pop("beta2")
        step = optimizer_steps.adamw if self.decoupled else optimizer_steps.adam
        return step(phi, g, state, lr=rate, amsgrad=self.amsgrad, **{"weight_decay": 0.0, **named})

    def parts(self) -> list[str]:
        """In words."""
        return ["first moments", ("largest " if self.amsgrad else "") + "second moments of gradients"]


@dataclass
class _Record:
    """Of a step.

    Attributes:
        phi: adapted parameters before it, where it has weight decay.
        g: the gradient.
        state: before it; ``None`` at the first.
    """

    phi: Any
    g: Any
    state: Any


class AdaptiveRule(Rule):
    """Eq. (19), and its adjoint, eq. (20) and (21).

    Args:
        kind: which parts it has.
        values: of ``kind.names``, ``[H]``, in double precision.
    """

    def __init__(self, kind: AdaptiveKind, values: Tensor) -> None:
        self._kind, self._values = kind, values
        # On a GPU they stay tensors: numbers would wait for it, and could not be captured in a graph.
        self._named = kind.named(values.unbind() if values.is_cuda else values.tolist())

    def step(self, space: Space[V], phi: V, state: Any, g: Sequence[Any], k: int, *, keep: bool) -> Forth[V]:
        """Eq. (19)."""
        gradient, c = space.vector(g), self._kind.coefficients(self._named, k)

        def step(entries: Sequence[Any], alpha: Tensor, segments: Tensor | None) -> tuple[Any, None, None]:
            phi, g, *earlier = entries
            before = State(*earlier) if earlier else self._kind.start(g)
            after, moments = adaptive_update.step(self._kind.form, phi, g, before, c, alpha, segments)
            return (after, *moments), None, None

        (after, *moments), _, _ = space.entrywise(step, [phi, gradient, *(state or ())], k)
        record = _Record(phi if self._kind.weight_decay else None, gradient, state) if keep else None
        return Forth(after, tuple(moments), record)

    def adjoint(self, space: Space[V], lam: V, state: Any, record: Any, k: int) -> Back[V]:
        """Eq. (20) and (21)."""
        if record is None:
            raise RuntimeError(f"inner rule: the record of step {k} must be kept, got None; see RuleKind.entrywise")
        c, learned = self._kind.coefficients(self._named, k), self._kind.learned

        def adjoint(entries: Sequence[Any], alpha: Tensor, segments: Tensor | None) -> tuple[Any, Any, Any]:
            lam, phi, g, *states = entries
            d_after, earlier = State(*states[: len(State._fields)]), states[len(State._fields) :]
            before = State(*earlier) if earlier else self._kind.start(g)
            found = adaptive_update.adjoint(
                self._kind.form, lam, d_after, phi, g, before, c, alpha, segments, bool(learned)
            )
            return (found.lam, found.u, *found.state), found.d_alpha, found.d_coefficients

        vectors = [lam, record.phi, record.g, *(state or State()), *(record.state or ())]
        (d_phi, u, *moments), d_alpha, d_coefficients = space.entrywise(adjoint, vectors, k)
        d_hyper = None
        if d_coefficients is not None and learned - {"lr"}:
            d_hyper = self._to_hyper(d_coefficients, k)
        return Back(lam if d_phi is None else d_phi, tuple(moments), u, d_alpha, d_hyper)

    def _to_hyper(self, d_coefficients: Tensor, k: int) -> Tensor:
        """Gradient to the hyper-parameters, of which the numbers of step k are made."""
        with torch.enable_grad():
            values = self._values.detach().requires_grad_()
            c = self._kind.coefficients(self._kind.named(values.unbind()), k)
            made = [(x, d) for x, d in zip(c, d_coefficients.unbind(), strict=True) if isinstance(x, Tensor)]
            found: Tensor = torch.autograd.grad([x for x, _ in made], values, [d for _, d in made])[0]
        return found
