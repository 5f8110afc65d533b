"""Views and other linear rearrangements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.views import reference
from fastmeta.ops.views.reference import Rule


def _shapes(call: Call) -> list[tuple[int, ...]]:
    return [tuple(i.shape) for i in call.inputs]


def _reshape(call: Call) -> Rule:
    return reference.reshape(_shapes(call)[0], tuple(call.outputs[0].shape))


def _axis(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _dim(call: Call, extra: int = 0, name: str = "dim") -> int:
    return _axis(call[name], len(call.inputs[0].shape) + extra)


def _transpose(call: Call) -> Rule:
    order = list(range(len(call["self"].shape)))
    a, b = _dim(call, name="dim0"), _dim(call, name="dim1")
    if order:
        order[a], order[b] = order[b], order[a]
    return reference.permute(order)


def _permute(call: Call) -> Rule:
    return reference.permute([_axis(d, len(call["self"].shape)) for d in call["dims"]])


def _expand(call: Call) -> Rule:
    return reference.expand(_shapes(call)[0], tuple(call.outputs[0].shape))


def _slice(call: Call) -> Rule:
    return reference.slice_(_shapes(call)[0], _dim(call), call["start"], call["end"], call["step"])


def _select(call: Call) -> Rule:
    return reference.select(_shapes(call)[0], _dim(call), call["index"])


def _flip(call: Call) -> Rule:
    return reference.flip([_axis(d, len(call["self"].shape)) for d in call["dims"]])


def _cast(call: Call) -> Rule:
    inner, outer = call.inputs[0].dtype, call.outputs[0].dtype
    return reference.identity() if inner == outer else reference.cast(inner, outer)


def _pad(call: Call) -> Rule:
    if call.arguments.get("mode", "constant") != "constant" or call["value"] not in (None, 0):
        raise Unsupported("views: a border must be of zeros")
    return reference.pad(call["pad"])


def _cat(call: Call) -> Rule:
    shapes = _shapes(call)
    if len({len(s) for s in shapes}) > 1:
        raise Unsupported("views: cat of tensors of different rank")
    dim = _dim(call)
    return reference.cat([s[dim] for s in shapes], dim)


def _split(call: Call) -> Rule:
    dim = _dim(call)
    return reference.split(_shapes(call)[0], [o.shape[dim] for o in call.outputs], dim)


RULES: dict[str, Callable[[Call], Rule]] = {
    "aten.view.default": _reshape,
    "aten.reshape.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.flatten.using_ints": _reshape,
    "aten.unflatten.int": _reshape,
    "aten.unsqueeze.default": _reshape,
    "aten.squeeze.default": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.squeeze.dims": _reshape,
    "aten.transpose.int": _transpose,
    "aten.permute.default": _permute,
    "aten.t.default": lambda call: reference.permute(range(len(call["self"].shape))[::-1]),
    "aten.expand.default": _expand,
    "aten.broadcast_to.default": _expand,
    "aten.broadcast_tensors.default": lambda call: reference.broadcast(_shapes(call), tuple(call.outputs[0].shape)),
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.flip.default": _flip,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.cat.default": _cat,
    "aten.stack.default": lambda call: reference.stack(len(call.inputs), _dim(call, extra=1)),
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _split,
    "aten.unbind.int": lambda call: reference.unbind(_shapes(call)[0], _dim(call)),
    "aten.clone.default": lambda call: reference.identity(),
    "aten.contiguous.default": lambda call: reference.identity(),
    "aten.alias.default": lambda call: reference.identity(),
    "aten.lift_fresh_copy.default": lambda call: reference.identity(),
    "aten.detach.default": lambda call: reference.detach(),
    "aten.detach_copy.default": lambda call: reference.detach(),
    "aten._to_copy.default": _cast,
    "aten.to.dtype": _cast,
}


@registry.register
class View(TaskOp):
    """``y = L x`` for a linear rearrangement ``L``; nothing is saved.

    Results may share memory with inputs. ``detach`` is here too: values pass, tangents and cotangents do not. Raises
    :class:`Unsupported` where the call is not linear or mixes dtypes.
    """

    name: ClassVar[str] = "view"
    targets: ClassVar[tuple[str, ...]] = tuple(RULES)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if len({i.dtype for i in call.inputs}) > 1 and str(call.target) != "aten.broadcast_tensors.default":
            raise Unsupported(f"views: {call.target} of tensors of different dtypes")
        device = call.arguments.get("device")
        if device is not None and str(call.target) == "aten._to_copy.default":
            raise Unsupported("views: a copy to another device")
        self.rule = RULES[str(call.target)](call)
        self.blocks = str(call.target).startswith("aten.detach") or not call.outputs[0].dtype.is_floating_point

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        return self.rule.apply(x), ()

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return self._transpose(d_y, need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        if self.blocks:
            return (None,) * len(self.call.outputs), ()
        like = next(v for v in x_dot if v is not None)
        dots = [
            like.new_zeros(like.shape[0], *i.shape) if v is None else v
            for v, i in zip(x_dot, self.call.inputs, strict=True)
        ]
        return self.rule.apply(dots), ()

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        return self._transpose(d_y_dot, need)

    def _transpose(self, d: Tensors, need: Sequence[Need]) -> Tensors:
        if self.blocks or all(v is None for v in d):
            return (None,) * len(self.call.inputs)
        return tuple(v if n else None for v, n in zip(self.rule.transpose(d), need, strict=True))
