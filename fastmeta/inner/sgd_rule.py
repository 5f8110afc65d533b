"""Inner gradient descent with momentum and weight decay, and its adjoint (docs/maths.md, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.inner.rule import Back, Forth, Rule, RuleKind, Space, V


@dataclass(frozen=True)
class SGDKind(RuleKind):
    """Which parts SGD has, and which of its hyper-parameters are learned.

    Attributes:
        momentum, dampening, nesterov, weight_decay: whether it has them.
        learned: names of hyper-parameters, ``lr`` among them.
    """

    momentum: bool = False
    dampening: bool = False
    nesterov: bool = False
    weight_decay: bool = False
    learned: frozenset[str] = frozenset()

    @property
    def plain(self) -> bool:
        """Whether it is eq. (3)."""
        return not (self.momentum or self.weight_decay)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the hyper-parameters beside the rates."""
        return tuple(name for name in ("momentum", "dampening", "weight_decay") if getattr(self, name))

    @property
    def records(self) -> frozenset[str]:
        """Vectors kept of a step."""
        along = "b" if self.momentum and not self.nesterov else "s"
        made_of = {"lr": along, "momentum": "b", "dampening": "d", "weight_decay": "phi"}
        return frozenset({"s"} if self.plain else {made_of[name] for name in self.learned})

    def rule(self, values: Tensor | None) -> Rule:
        """With its hyper-parameters."""
        return Plain() if values is None else SGDRule(self, values)

    def explicit(self, phi: Tensor, state: Any, g: Tensor, rate: Tensor, values: Tensor | None) -> tuple[Tensor, Any]:
        """Eq. (15) for one parameter of one task."""
        named = {} if values is None else dict(zip(self.names, values.unbind(), strict=True))
        s = g + named["weight_decay"] * phi if self.weight_decay else g
        if self.momentum:
            damped = (1 - named["dampening"]) * s if self.dampening else s
            d, state = s, s if state is None else named["momentum"] * state + damped
            s = d + named["momentum"] * state if self.nesterov else state
        return phi - rate * s, state

    def described(self) -> str:
        """What it has beside eq. (3)."""
        parts = ["Nesterov momentum" if self.nesterov else "momentum"] * self.momentum
        return " and ".join([*parts, *["weight decay"] * self.weight_decay])


PLAIN = SGDKind()


class Plain(Rule):
    """Eq. (3) and nothing else."""

    def step(self, space: Space[V], phi: V, state: Any, g: Sequence[Any], k: int, *, keep: bool) -> Forth[V]:
        """Eq. (3)."""
        return Forth(space.descend(phi, g, k), None, space.vector(g) if keep else None)

    def adjoint(self, space: Space[V], lam: V, state: Any, record: Any, k: int) -> Back[V]:
        """Eq. (5) and (7)."""
        u, d_alpha = space.descend_adjoint(lam, record, k)
        return Back(lam, None, u, d_alpha)


@dataclass
class _Record:
    """Of a step, what gradients to hyper-parameters are made of; ``None`` where that is not learned.

    Attributes:
        s: what the step went along.
        d: gradient and weight decay.
        before, after: the buffer.
        phi: adapted parameters before it.
    """

    s: Any
    d: Any
    before: Any
    after: Any
    phi: Any


class SGDRule(Rule):
    """Eq. (15), and its adjoint, eq. (16) and (17).

    Args:
        kind: which parts it has.
        values: of ``kind.names``, ``[H]``.
    """

    def __init__(self, kind: SGDKind, values: Tensor) -> None:
        named = dict(zip(kind.names, values.unbind(), strict=True))
        self._kind = kind
        self._momentum = named.get("momentum")
        self._decay = named.get("weight_decay")
        dampening = named.get("dampening")
        self._undamped: Tensor | float = 1.0 if dampening is None else 1 - dampening
        self._zero = values.new_zeros(())

    def step(self, space: Space[V], phi: V, state: Any, g: Sequence[Any], k: int, *, keep: bool) -> Forth[V]:
        """Eq. (15)."""
        d = space.vector(g)
        if self._decay is not None:
            d = space.plus(d, phi, self._decay)
        s, after = d, None
        if self._momentum is not None:
            after = d if state is None else space.plus(space.times(state, self._momentum), d, self._undamped)
            s = space.plus(d, after, self._momentum) if self._kind.nesterov else after
        record = None
        if keep:
            learned = self._kind.learned
            record = _Record(
                s if "lr" in learned else None,
                d if "dampening" in learned else None,
                state if "momentum" in learned else None,
                after if "momentum" in learned and self._kind.nesterov else None,
                phi if "weight_decay" in learned else None,
            )
        return Forth(space.descend(phi, s, k), after, record)

    def adjoint(self, space: Space[V], lam: V, state: Any, record: Any, k: int) -> Back[V]:
        """Eq. (16) and (17)."""
        u, d_alpha = space.descend_adjoint(lam, None if record is None else record.s, k)
        w, q, earlier = u, u, None  # of d_k and of the buffer, and of the buffer before
        if self._momentum is not None:
            q = space.times(u, self._momentum) if self._kind.nesterov else u
            q = q if state is None else space.plus(q, state)
            w = q if k == 0 else self._undamp(space, q)
            w = space.plus(u, w) if self._kind.nesterov else w
            earlier = space.times(q, self._momentum) if k else None
        d_hyper = None if record is None else self._to_hyper(space, record, u, q, w, k)
        if self._decay is not None:
            lam = space.plus(lam, w, -self._decay)
        return Back(lam, earlier, w, d_alpha, d_hyper)

    def _undamp(self, space: Space[V], q: V) -> V:
        return q if isinstance(self._undamped, float) else space.times(q, self._undamped)

    def _to_hyper(self, space: Space[V], record: _Record, u: V, q: V, w: V, k: int) -> Tensor:
        found = {}
        if record.before is not None:
            found["momentum"] = -space.inner(record.before, q)
        if record.after is not None:
            found["momentum"] = found.get("momentum", self._zero) - space.inner(record.after, u)
        if record.d is not None and k:
            found["dampening"] = space.inner(record.d, q)
        if record.phi is not None:
            found["weight_decay"] = -space.inner(record.phi, w)
        return torch.stack([found.get(name, self._zero) for name in self._kind.names])
