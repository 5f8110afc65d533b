"""Adapted parameters of a batch of tasks, and their inner rule: packed where they are formed, factors where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.low_rank import LowRank, Met, rank_limit
from fastmeta.core.packing import Packing
from fastmeta.engine.program import Program
from fastmeta.engine.work import Work
from fastmeta.inner.descent import Descent
from fastmeta.inner.rates import collected, rates_of
from fastmeta.inner.rule import Back, Entrywise, Forth, Group

Weight = Tensor | LowRank


@dataclass
class Vector:
    """Something that has one entry an adapting element and task: weights, a gradient, a cotangent, a direction.

    Attributes:
        packed: parameters that are formed, ``[T, P']``.
        factors: the others by name.
    """

    packed: Tensor
    factors: dict[str, LowRank]


class FastWeights:
    """Both kinds of parameters: the inner rule on them, and what that may do with vectors (``inner/rule.py``).

    Args:
        work: the meta-step.
        support: its program on the support sets, which says which parameters are factors.
    """

    def __init__(self, work: Work, support: Program) -> None:
        factored, bounded = support.factored, support.bounded
        self._names = work.packing.names
        self._theta = dict(zip(self._names, work.theta, strict=True))
        self._tasks, self._own = work.tasks, work.own
        self._factored = [name for name in self._names if name in factored]
        self._formed = [name for name in self._names if name not in factored]
        self._limits = {name: rank_limit(*self._theta[name].shape) for name in self._factored if name in bounded}
        self._met = support.met
        self._packing, alpha, segments = work.packing, work.alpha, work.segments
        if factored:
            shapes = dict(zip(self._names, work.packing.shapes, strict=True))
            self._packing = Packing(tuple(self._formed), tuple(shapes[name] for name in self._formed))
        if alpha.shape[1] > 1 and (factored or work.rate_shapes is not None):
            packed = [self._packed_rates(self._own_rates(work, k)) for k in range(alpha.shape[0])]
            alpha, segments = torch.cat([rates for rates, _ in packed]), packed[0][1]
        self._expanded = work.rate_shapes is not None and segments is None
        own = [self._own_rates(work, k) for k in range(work.alpha.shape[0])] if self._factored else []
        self._rates = [{name: rates[name] for name in self._factored} for rates in own]
        self._descents = [{name: -rate for name, rate in rates.items()} for rates in self._rates]
        self._shapes = work.rate_shapes or ((),) * len(self._names)
        self._descent = Descent(alpha, segments, self._packing)
        self._alpha = work.alpha
        self._rule = work.rule.rule(work.hyper)
        self._work, self._support = work, support
        self._parts: dict[Group, FastWeights] = {}

    def start(self) -> Vector:
        """``phi_0``, eq. (1)."""
        factors = {
            name: LowRank(self._theta[name], limit=self._limits.get(name), met=Met() if name in self._met else None)
            for name in self._factored
        }
        if not self._formed:
            return Vector(self._nothing(), factors)
        theta = [self._theta[name] for name in self._formed]
        if self._own:
            each = [
                p if name in self._own else p.expand(self._tasks, *p.shape)
                for name, p in zip(self._formed, theta, strict=True)
            ]
            return Vector(self._packing.pack(each), factors)
        return Vector(self._packing.pack_shared(theta).expand(self._tasks, -1), factors)

    def values(self, vector: Vector, beside: Vector | None = None) -> list[Weight]:
        """Each parameter's, in the packing's order: ``[T, *shape]`` or factors.

        Args:
            vector: of the parameters.
            beside: weights that meet the same rows.
        """
        formed = iter(self._packing.unpack(vector.packed) if self._formed else ())
        factors = vector.factors
        if beside is not None:
            factors = {name: replace(part, met=beside.factors[name].met) for name, part in factors.items()}
        return [factors[name] if name in factors else next(formed) for name in self._names]

    def first_values(self, phi: Vector) -> list[Weight]:
        """What the first pass reads: the parameters that tasks share, ``[*shape]``.

        Those that meet the data's rows come with what they gave, which is wanted again.
        """
        return [phi.factors[name] if name in self._met else self._theta[name] for name in self._names]

    def vector(self, values: Sequence[Weight]) -> Vector:
        """The other way round."""
        formed = [v for v in values if isinstance(v, Tensor)]
        low_rank = {name: v for name, v in zip(self._names, values, strict=True) if isinstance(v, LowRank)}
        factors = {name: replace(v, limit=self._limits.get(name)) for name, v in low_rank.items()}
        return Vector(self._packing.pack(formed) if formed else self._nothing(), factors)

    def step(self, phi: Vector, state: Any, g: Sequence[Weight], k: int, *, keep: bool) -> Forth[Vector]:
        """The rule's step k; see :meth:`fastmeta.inner.rule.Rule.step`."""
        return self._rule.step(self, phi, state, g, k, keep=keep)

    def adjoint(self, lam: Vector, state: Any, record: Any, k: int) -> Back[Vector]:
        """Its adjoint; see :meth:`fastmeta.inner.rule.Rule.adjoint`."""
        return self._rule.adjoint(self, lam, state, record, k)

    def plus(self, a: Vector, b: Vector, scale: Tensor | float = 1.0) -> Vector:
        """``a + scale * b``."""
        if isinstance(scale, Tensor):
            packed = torch.addcmul(a.packed, b.packed, scale)
        else:
            packed = torch.add(a.packed, b.packed, alpha=scale)
        return Vector(packed, {name: part.plus(b.factors[name], scale) for name, part in a.factors.items()})

    def times(self, a: Vector, scale: Tensor) -> Vector:
        """``scale * a``."""
        return Vector(a.packed * scale, {name: part.times(scale) for name, part in a.factors.items()})

    def inner(self, a: Vector, b: Vector) -> Tensor:
        """The entries' products, summed over tasks, ``[]``."""
        total = (a.packed * b.packed).sum()
        for name, part in a.factors.items():
            product = part.inner(b.factors[name])
            total = total if product is None else total + product
        return total

    def descend(self, phi: Vector, s: Vector | Sequence[Weight], k: int) -> Vector:
        """Eq. (3)."""
        packed = phi.packed
        if isinstance(s, Vector):
            along = s.factors
            packed = self._descent.packed_step(packed, s.packed, k) if self._formed else packed
        else:
            along = {name: d for name, d in zip(self._names, s, strict=True) if isinstance(d, LowRank)}
            formed = [d for d in s if isinstance(d, Tensor)]
            packed = self._descent.step(packed, formed, k) if formed else packed
        if not self._factored:
            return Vector(packed, {})
        descents = self._descents[k if len(self._descents) > 1 else 0]
        return Vector(packed, {n: w.plus(along[n], descents[n]) for n, w in phi.factors.items()})

    def descend_adjoint(self, lam: Vector, s: Vector | None, k: int) -> tuple[Vector, Tensor | None]:
        """``u`` of eq. (5) and, with what the step went along, ``d_alpha`` of eq. (7), in alpha's shape."""
        packed, d_rate = lam.packed, None
        if self._formed:
            packed, d_rate = self._descent.adjoint(lam.packed, None if s is None else s.packed, k)
        rates = self._rates[k if len(self._rates) > 1 else 0] if self._factored else {}
        u = Vector(packed, {name: part.times(rates[name]) for name, part in lam.factors.items()})
        if s is None or not (self._factored or self._expanded):
            return u, d_rate
        return u, self._joined(d_rate, s, lam)

    def entrywise(
        self, f: Entrywise, vectors: Sequence[Vector | None], k: int
    ) -> tuple[list[Any], Tensor | None, Tensor | None]:
        """What ``f`` makes of the packed entries; see :meth:`fastmeta.inner.rule.Space.entrywise`."""
        if self._factored:
            raise RuntimeError(f"inner rule: entries must be formed, got factors of {self._factored}")
        entries = [None if v is None else v.packed for v in vectors]
        made, d_rate, others = f(entries, self._descent.rate(k), self._descent.segments)
        if d_rate is not None and self._expanded:
            own = self._of_formed(d_rate)
            d_rate = torch.cat([own[name].reshape(-1) for name in self._names])
        return [None if x is None else Vector(x, {}) for x in made], d_rate, others

    def part(self, group: Group) -> FastWeights:
        """Of one group's parameters alone; see :meth:`fastmeta.inner.rule.Space.part`."""
        if group not in self._parts:
            self._parts[group] = FastWeights(self._work.group(group), self._support)
        return self._parts[group]

    def split(self, a: Vector, groups: Sequence[Group]) -> list[Vector]:
        """What each group has of ``a``: views, and factors."""
        parts = [self.part(group) for group in groups]
        pieces = a.packed.split([part._packing.size for part in parts], 1)
        own = zip(parts, pieces, strict=True)
        return [Vector(piece, {name: a.factors[name] for name in part._factored}) for part, piece in own]

    def joined(self, pieces: Sequence[Vector]) -> Vector:
        """The other way round."""
        factors = {name: part for piece in pieces for name, part in piece.factors.items()}
        return Vector(torch.cat([piece.packed for piece in pieces], 1), factors)

    def less(self, lam: Vector, product: Sequence[Weight], *, alone: bool) -> Vector:
        """``lam - H u``, eq. (6); ``lam`` is overwritten where it is formed.

        Args:
            lam: a cotangent.
            product: ``H u``, what each parameter has.
            alone: no cotangent of a state has matrices of ``lam`` under another scale.
        """
        formed = [h for h in product if isinstance(h, Tensor)]
        if formed:
            self._descent.subtract_(lam.packed, formed)
        factors = dict(lam.factors)
        for name, h in zip(self._names, product, strict=True):
            if isinstance(h, LowRank):
                factors[name] = factors[name].minus_(h) if alone else factors[name].plus(h, -1.0)
        return Vector(lam.packed, factors)

    def over_tasks(self, lam: Vector, onto: Sequence[Tensor | None]) -> list[Tensor]:
        """The sum over tasks, eq. (8), ``[*shape]`` for each parameter in the packing's order.

        Those that came for each task stay so, ``[T, *shape]``.

        Args:
            lam: cotangent of the weights that tasks share.
            onto: for each parameter the sum that its own is added to, and that is overwritten, if there is one.
        """
        if self._own:
            values = zip(self._names, self.values(lam), strict=True)
            each = [d if name in self._own or isinstance(d, LowRank) else d.sum(0) for name, d in values]
        else:
            formed = iter(self._packing.unpack_shared(lam.packed.sum(0)) if self._formed else ())
            each = [lam.factors[name] if name in lam.factors else next(formed) for name in self._names]
        return [_added(d, total) for d, total in zip(each, onto or [None] * len(each), strict=True)]

    def _nothing(self) -> Tensor:
        """What is packed where every parameter is factors."""
        return self._theta[self._names[0]].detach().new_empty(self._tasks, 0)

    def _own_rates(self, work: Work, k: int) -> dict[str, Tensor]:
        """Each parameter's rates at step k."""
        return dict(zip(self._names, rates_of(work.alpha[k], work.rate_shapes, len(self._names)), strict=True))

    def _packed_rates(self, rates: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Those of the parameters that are formed: one each and their segments, or where need be one an element."""
        own = [rates[name] for name in self._formed]
        if all(rate.dim() == 0 for rate in own):
            alpha = torch.stack(own) if own else next(iter(rates.values())).new_empty(0)
            return alpha[None], self._packing.segments(alpha.device)
        each = [rate.expand(shape).reshape(-1) for rate, shape in zip(own, self._packing.shapes, strict=True)]
        return torch.cat(each)[None], None

    def _joined(self, d_rate: Tensor | None, s: Vector, lam: Vector) -> Tensor:
        """Eq. (7) for all parameters, from what it is for those that are formed."""
        shapes = dict(zip(self._names, self._shapes, strict=True))
        own: dict[str, Tensor] = {}
        for name, part in lam.factors.items():
            product = s.factors[name].inner(part, shapes[name])
            own[name] = self._alpha.new_zeros(shapes[name]) if product is None else -product
        if self._alpha.shape[1] == 1:
            total = torch.stack(list(own.values())).sum()
            return total if d_rate is None else d_rate + total
        if d_rate is not None:
            own.update(self._of_formed(d_rate))
        return torch.cat([own[name].reshape(-1) for name in self._names])

    def _of_formed(self, d_rate: Tensor) -> dict[str, Tensor]:
        """Gradients to the rates of parameters that are formed, each in its rates' shape."""
        if not self._expanded:
            return dict(zip(self._formed, d_rate, strict=True))
        shapes = dict(zip(self._names, self._shapes, strict=True))
        own = [shapes[name] for name in self._formed]
        return dict(zip(self._formed, collected(d_rate, self._packing.shapes, own), strict=True))


def _added(d: Weight, total: Tensor | None) -> Tensor:
    if isinstance(d, LowRank):
        return d.over_tasks(total)
    return d if total is None else total.add_(d)
