"""Adapted parameters of a batch of tasks, and their inner rule: packed where they are formed, factors where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.core.low_rank import LowRank
from fastmeta.core.packing import Packing
from fastmeta.engine.work import Work
from fastmeta.inner.sgd import SGD, TaskwiseSGD

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
    """The inner rule on both kinds of parameters: eq. (3) and its adjoint, eq. (5)-(7).

    Args:
        work: the meta-step.
        factored: names of the adapting parameters that no task forms.
    """

    def __init__(self, work: Work, factored: frozenset[str]) -> None:
        self._names = work.packing.names
        self._theta = dict(zip(self._names, work.theta, strict=True))
        self._tasks, self._own = work.tasks, work.own
        self._factored = [name for name in self._names if name in factored]
        self._formed = [name for name in self._names if name not in factored]
        if not factored:
            self._packing, alpha, segments = work.packing, work.alpha, work.segments
        else:
            shapes = dict(zip(self._names, work.packing.shapes, strict=True))
            self._packing = Packing(tuple(self._formed), tuple(shapes[name] for name in self._formed))
            alpha, segments = work.alpha, None
            if work.segments is not None:
                formed = [alpha[:, i : i + 1] for i, name in enumerate(self._names) if name not in factored]
                alpha = torch.cat(formed, 1) if formed else alpha[:, :0]
                segments = self._packing.segments(alpha.device)
        taskwise = bool(work.own) and segments is None and alpha.shape[1] > 1
        self._rule = TaskwiseSGD(alpha, self._packing) if taskwise else SGD(alpha, segments, self._packing)
        self._alpha = work.alpha

    def start(self) -> Vector:
        """``phi_0``, eq. (1)."""
        factors = {name: LowRank(self._theta[name]) for name in self._factored}
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

    def values(self, vector: Vector) -> list[Weight]:
        """Each parameter's, in the packing's order: ``[T, *shape]`` or factors."""
        formed = iter(self._packing.unpack(vector.packed) if self._formed else ())
        return [vector.factors[name] if name in vector.factors else next(formed) for name in self._names]

    def vector(self, values: Sequence[Weight]) -> Vector:
        """The other way round."""
        formed = [v for v in values if isinstance(v, Tensor)]
        factors = {name: v for name, v in zip(self._names, values, strict=True) if isinstance(v, LowRank)}
        return Vector(self._packing.pack(formed) if formed else self._nothing(), factors)

    def step(self, phi: Vector, g: Sequence[Weight], k: int) -> Vector:
        """Eq. (3)."""
        formed = [d for d in g if isinstance(d, Tensor)]
        packed = self._rule.step(phi.packed, formed, k) if formed else phi.packed
        gradient = {name: d for name, d in zip(self._names, g, strict=True) if isinstance(d, LowRank)}
        return Vector(packed, {n: w.plus(gradient[n], -self._rate(n, k)) for n, w in phi.factors.items()})

    def adjoint(self, lam: Vector, g: Vector | None, k: int) -> tuple[Vector, Tensor | None]:
        """``u`` of eq. (5) and, with the step's gradient, ``d_alpha`` of eq. (7), in alpha's shape."""
        packed, d_rate = lam.packed, None if g is None else torch.zeros_like(self._alpha[0])
        if self._formed:
            packed, d_rate = self._rule.adjoint(lam.packed, None if g is None else g.packed, k)
        zero = {name: LowRank(None) for name in self._factored}
        u = Vector(packed, {name: zero[name].plus(part, self._rate(name, k)) for name, part in lam.factors.items()})
        if g is None or d_rate is None or not self._factored:
            return u, d_rate
        of_factors = {name: -g.factors[name].inner(part).sum() for name, part in lam.factors.items()}
        return u, self._joined(d_rate, of_factors)

    def less(self, lam: Vector, product: Sequence[Weight]) -> Vector:
        """``lam - H u``, eq. (6); ``lam`` is overwritten where it is formed."""
        formed = [h for h in product if isinstance(h, Tensor)]
        if formed and lam.packed.is_cuda and self._rule.packs(lam.packed):
            lam.packed.sub_(self._packing.pack(formed))
        elif formed:
            for part, dense in zip(self._packing.unpack(lam.packed), formed, strict=True):
                part.sub_(dense)
        factors = dict(lam.factors)
        for name, h in zip(self._names, product, strict=True):
            if isinstance(h, LowRank):
                factors[name] = factors[name].plus(h, -1.0)
        return Vector(lam.packed, factors)

    def over_tasks(self, lam: Vector) -> list[Tensor]:
        """The sum over tasks, eq. (8), ``[*shape]`` for each parameter in the packing's order.

        Those that came for each task stay so, ``[T, *shape]``.
        """
        if self._own:
            each = self.values(lam)
            return [_summed(part, own=name in self._own) for name, part in zip(self._names, each, strict=True)]
        formed = iter(self._packing.unpack_shared(lam.packed.sum(0)) if self._formed else ())
        return [lam.factors[n].over_tasks() if n in lam.factors else next(formed) for n in self._names]

    def _nothing(self) -> Tensor:
        """What is packed where every parameter is factors."""
        return self._theta[self._names[0]].detach().new_empty(self._tasks, 0)

    def _rate(self, name: str, k: int) -> Tensor:
        rates = self._alpha[k if self._alpha.shape[0] > 1 else 0]
        return rates[self._names.index(name)] if rates.numel() > 1 else rates[0]

    def _joined(self, d_rate: Tensor, of_factors: Mapping[str, Tensor]) -> Tensor:
        if self._alpha.shape[1] == 1:
            return d_rate + torch.stack(list(of_factors.values())).sum()
        formed = iter(d_rate.reshape(-1))
        return torch.stack([of_factors[n] if n in of_factors else next(formed) for n in self._names])


def _summed(part: Weight, *, own: bool) -> Tensor:
    if isinstance(part, LowRank):
        return part.over_tasks()
    return part if own else part.sum(0)
