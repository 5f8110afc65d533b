"""Elementwise sums, products and quotients, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core.task_op import Call, Input, Need, TaskOp, Tensors, Unsupported, plus, registry
from fastmeta.ops.arithmetic import reference
from fastmeta.ops.arithmetic.reference import Fit


class Elementwise(TaskOp):
    """What elementwise operations of one or two tensors share: dtypes and broadcasting."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.dtype = call.outputs[0].dtype
        if self.dtype.is_complex or self.dtype is torch.bool:
            raise Unsupported(f"{self.name}: result must be of real numbers, got {self.dtype}")
        if call.arguments.get("rounding_mode") is not None:
            raise Unsupported(f"{self.name}: rounding")
        self.fits = [Fit.of(tuple(i.shape), tuple(call.outputs[0].shape)) for i in call.inputs]
        self.same_dtype = all(i.dtype == self.dtype for i in call.inputs)

    def _spread(self, x: Sequence[Tensor]) -> list[Tensor]:
        if not self.same_dtype:
            x = [v.to(self.dtype) for v in x]
        return [fit.spread(v) for fit, v in zip(self.fits, x, strict=True)]

    def _spread_dots(self, x_dot: Tensors) -> list[Any]:
        return [None if v is None else fit.spread(v.to(self.dtype)) for fit, v in zip(self.fits, x_dot, strict=True)]

    def _fixed(self, x_dot: Tensors) -> bool:
        """Whether no tangent passes: there is none, or the result is of integers."""
        return not self.dtype.is_floating_point or all(v is None for v in x_dot)

    def _fill(self, y_dot: Tensor) -> Tensor:
        shape = self.call.outputs[0].shape
        return y_dot if y_dot.shape[1:] == shape else y_dot.expand(-1, *shape)

    def _cotangent(self, d: Tensor | None, slope: Any, position: int, need: Sequence[Need]) -> Tensor | None:
        """``slope * d`` (``slope = None`` for one) as the input at ``position`` takes it."""
        dtype = self.call.inputs[position].dtype
        if d is None or not need[position] or not (dtype.is_floating_point and self.dtype.is_floating_point):
            return None
        return self.fits[position].gather(d if slope is None else d * slope).to(dtype)


def _number(call: Call, name: str) -> Any:
    """The argument ``name`` where it is a plain number."""
    value = call.arguments.get(name)
    return None if isinstance(value, Input) else value


@registry.register
class Sum(Elementwise):
    """``y = p a + q b + r`` with constants ``p``, ``q``, ``r``; nothing is saved."""

    name: ClassVar[str] = "sum"
    targets: ClassVar[tuple[str, ...]] = (
        *(f"aten.{op}.{kind}" for op in ("add", "sub", "rsub") for kind in ("Tensor", "Scalar")),
        *("aten.mul.Scalar", "aten.div.Scalar", "aten.neg.default"),
    )

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        base = call.target._schema.name.split("::")[-1]
        alpha, other = call.arguments.get("alpha", 1), _number(call, "other")
        self.offset = 0.0
        factors: tuple[float, ...]
        if base == "mul":
            factors = (other,)
        elif base == "div":
            factors = (1 / other,)
        else:
            factors = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1), "neg": (-1,)}[base]
            if other is not None:
                self.offset = factors[1] * other
        self.factors: tuple[float, ...] = factors[: len(call.inputs)]

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        y = reference.combine(self._spread(x), self.factors)
        return (y if self.offset == 0 else y + self.offset,), ()

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return self._scaled(d_y[0], need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        if self._fixed(x_dot):
            return (None,), ()
        given = [(v, f) for v, f in zip(self._spread_dots(x_dot), self.factors, strict=True) if v is not None]
        return (self._fill(reference.combine([v for v, _ in given], [f for _, f in given])),), ()

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        return self._scaled(d_y_dot[0], need)

    def _scaled(self, d: Tensor | None, need: Sequence[Need]) -> Tensors:
        slopes = [None if f == 1 else f for f in self.factors]
        return tuple(self._cotangent(d, slope, i, need) for i, slope in enumerate(slopes))


class Bilinear(Elementwise):
    """``y(a, b)``, where ``b`` may be a constant number.

    Saves the slopes ``dy/da`` and ``dy/db`` and whatever their tangents need; with a number there is one slope, that
    number, and nothing is saved.
    """

    saved_names: ClassVar[tuple[str, ...]] = ("slope of the first", "slope of the second")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.number = _number(call, "other")

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return tuple(self._cotangent(d_y[0], slope, i, need) for i, slope in enumerate(self._slopes(saved)))

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        if self._fixed(x_dot):
            return (None,), (None,) * len(x_dot)
        dots = self._spread_dots(x_dot)
        y_dot = None
        for slope, dot in zip(self._slopes(saved), dots, strict=True):
            y_dot = plus(y_dot, None if dot is None else slope * dot)
        return (self._fill(y_dot),), self._slopes_dot(saved, dots)  # type: ignore[arg-type]

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        straight = self.backward(saved, d_y_dot, need)
        bent = (None if s is None else self._cotangent(d_y[0], s, i, need) for i, s in enumerate(saved_dot))
        return tuple(plus(a, b) for a, b in zip(straight, bent, strict=True))

    def _slopes(self, saved: tuple[Any, ...]) -> tuple[Any, ...]:
        raise NotImplementedError

    def _slopes_dot(self, saved: tuple[Any, ...], dots: Sequence[Any]) -> Tensors:
        raise NotImplementedError


@registry.register
class Product(Bilinear):
    """``y = a b``: the slopes are ``b`` and ``a``."""

    name: ClassVar[str] = "product"
    targets: ClassVar[tuple[str, ...]] = ("aten.mul.Tensor",)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        if len(x) == 1:
            return (self._spread(x)[0] * self.number,), ()
        a, b = self._spread(x)
        return (a * b,), (b, a)

    def _slopes(self, saved: tuple[Any, ...]) -> tuple[Any, ...]:
        return saved or (self.number,)

    def _slopes_dot(self, saved: tuple[Any, ...], dots: Sequence[Any]) -> Tensors:
        return (dots[1], dots[0]) if saved else (None,)


@registry.register
class Quotient(Bilinear):
    """``y = a / b``: the slopes are ``1 / b`` and ``-y / b``."""

    name: ClassVar[str] = "quotient"
    targets: ClassVar[tuple[str, ...]] = ("aten.div.Tensor",)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        if len(x) == 1:
            return (self._spread(x)[0] / self.number,), ()
        a, b = self._spread(x)
        return (a / b,), reference.quotient_slopes(a, b)

    def _slopes(self, saved: tuple[Any, ...]) -> tuple[Any, ...]:
        return saved or (1 / self.number,)

    def _slopes_dot(self, saved: tuple[Any, ...], dots: Sequence[Any]) -> Tensors:
        return reference.quotient_slopes_dot(*saved, *dots) if saved else (None,)
