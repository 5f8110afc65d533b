"""Inner descent along gradients that learned matrices transform, and its adjoint, eq. (27) of docs/maths.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.inner.configuration import Configuration
from fastmeta.inner.rates import Rate, as_tensor
from fastmeta.inner.rule import Back, Forth, Rule, RuleKind

Shape = tuple[int, ...]


def matrices_of(shape: Shape) -> dict[str, Shape]:
    """Which matrices a parameter of this shape has, and their shapes.

    One for its rows, one for its columns, one for what further axes it has, taken as one; of a parameter with one axis
    or none, a number for each element.
    """
    if len(shape) < 2:
        return {"scale": shape}
    out, into, *kernel = shape
    found: dict[str, Shape] = {"out": (out, out), "in": (into, into)}
    return found | ({"kernel": (prod(kernel), prod(kernel))} if kernel else {})


def transformed(g: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``g`` ``[T, *shape]`` with each axis multiplied by its matrix; ``g * scale`` where there is one of numbers."""
    if g.dim() < 3:
        return g * matrices[0]
    x = torch.einsum("oa,ta...->to...", matrices[0], g.flatten(3) if g.dim() > 3 else g)
    x = torch.einsum("ib,tob...->toi...", matrices[1], x)
    if len(matrices) > 2:
        x = torch.einsum("fc,toic->toif", matrices[2], x)
    return x.reshape(g.shape)


def to_matrices(g: Tensor, d: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to the matrices, where ``d`` is the cotangent of what :func:`transformed` gives, summed over tasks."""
    if g.dim() < 3:
        return [(g * d).sum(0)]
    found = []
    for axis in range(len(matrices)):
        others = [torch.eye(len(m), dtype=m.dtype, device=m.device) if i == axis else m for i, m in enumerate(matrices)]
        x, y = (v.flatten(3) if v.dim() > 3 else v for v in (transformed(g, others), d))
        x, y = (v.movedim(1 + axis, 0).flatten(1) for v in (x, y))
        found.append(y @ x.T)
    return found


@dataclass(frozen=True)
class CurvatureKind(RuleKind):
    """The rule without values.

    Attributes:
        shapes: of the adapting parameters, in the packing's order.
        rates: whether rates are learned.
    """

    shapes: tuple[Shape, ...]
    rates: bool

    @property
    def plain(self) -> bool:
        """Never."""
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """All matrices are one hyper-parameter, one after the other."""
        return ("curvature",)

    @property
    def records(self) -> frozenset[str]:
        """The gradient, and what it became where rates are learned."""
        return frozenset({"g", "s"} if self.rates else {"g"})

    def rule(self, values: Tensor | None) -> Rule:
        """With its matrices."""
        if values is None:
            raise RuntimeError("MetaCurvature: matrices must be given, got none")
        wanted = [size for shape in self.shapes for size in matrices_of(shape).values()]
        pieces = iter(values.split([prod(size) for size in wanted]))
        each = [[next(pieces).reshape(size) for size in matrices_of(shape).values()] for shape in self.shapes]
        return Curved(each, rates=self.rates)

    def explicit(self, phi: Tensor, state: Any, g: Tensor, rate: Tensor, values: Tensor | None) -> tuple[Tensor, Any]:
        """There is none, because which matrices are a parameter's cannot be seen from one parameter alone."""
        raise RuntimeError("MetaCurvature: engine must be 'program', got 'autodiff'")

    def described(self) -> str:
        """What it has beside eq. (3)."""
        return "gradients that matrices transform"


class _Record(NamedTuple):
    g: Sequence[Tensor]
    s: Any


class Curved(Rule):
    """Eq. (23) on weights that are formed.

    Args:
        matrices: of each parameter.
        rates: whether rates are learned.
    """

    def __init__(self, matrices: Sequence[Sequence[Tensor]], *, rates: bool) -> None:
        self._matrices, self._rates = matrices, rates

    def step(self, space: Any, phi: Any, state: Any, g: Sequence[Any], k: int, *, keep: bool) -> Forth[Any]:
        """A step along transformed gradients."""
        s = space.vector([transformed(d, own) for d, own in zip(g, self._matrices, strict=True)])
        record = _Record(list(g), s if self._rates else None) if keep else None
        return Forth(space.descend(phi, s, k), None, record)

    def adjoint(self, space: Any, lam: Any, state: Any, record: Any, k: int) -> Back[Any]:
        """Transposed matrices for the gradient's cotangent; products of both sides for the matrices'."""
        v, d_alpha = space.descend_adjoint(lam, None if record is None else record.s, k)
        each = list(zip(space.values(v), self._matrices, strict=True))
        u = space.vector([transformed(d, [m.mT if m.dim() > 1 else m for m in own]) for d, own in each])
        d_hyper = None
        if record is not None:
            found = [to_matrices(g, -d, own) for g, (d, own) in zip(record.g, each, strict=True)]
            d_hyper = torch.cat([d.reshape(-1) for of_parameter in found for d in of_parameter])
        return Back(lam, None, u, d_alpha, d_hyper)


class Curvature(Configuration):
    """Matrices that transform inner gradients, the identity at first, and the rates of the steps.

    Args:
        lr: as :class:`fastmeta.inner.SGD` has it.
        parameters: the adapting parameters by name, in the packing's order.
    """

    def __init__(self, lr: Rate, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(lr)
        self._shapes = tuple(tuple(p.shape) for p in parameters.values())
        self._places: dict[str, str] = {}
        for name, p in parameters.items():
            for which, size in matrices_of(tuple(p.shape)).items():
                first = torch.eye(size[0]) if which != "scale" else torch.ones(size)
                place = f"{name}.{which}".replace(".", "/")
                self._places[f"{name}.{which}"] = place
                self.register_parameter(place, nn.Parameter(first.to(dtype=p.dtype, device=p.device)))

    def matrices(self) -> dict[str, Tensor]:
        """The matrices by ``<parameter's name>.out``, ``.in``, ``.kernel`` or ``.scale``."""
        return {name: getattr(self, place) for name, place in self._places.items()}

    def kind(self) -> CurvatureKind:
        """The rule without values."""
        return CurvatureKind(self._shapes, any(name.partition(".")[0] == "lr" for name in super().learned()))

    def values(self, like: Tensor) -> Tensor:
        """All matrices one after the other, ``[H]``."""
        return torch.cat([as_tensor(m, like).reshape(-1) for m in self.matrices().values()])

    def learned(self) -> dict[str, Tensor]:
        """The rates and matrices that require grad, by name."""
        return super().learned() | {name: m for name, m in self.matrices().items() if m.requires_grad}

    def numbers(self) -> tuple[float | None, ...]:
        """The rate, and nothing for the matrices."""
        return (*super().numbers(), None)
