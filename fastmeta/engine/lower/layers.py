"""Layers: which instructions become which native operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fastmeta.core.curves import curve_of
from fastmeta.core.task_op import Unsupported
from fastmeta.engine.lower.lowering import ABSENT, Data, Lowering, NotLowered, Value
from fastmeta.engine.program import Instruction

NO_POOL = {"pool": "none", "pool_kernel": (1, 1), "pool_stride": (1, 1), "pool_padding": (0, 0)}


def _linear(lowering: Lowering, instruction: Instruction) -> None:
    op: Any = instruction.op
    source = lowering.source(instruction.inputs[0], (op.rows, op.fan_in))
    weights = [lowering.parameter(slot) for slot in instruction.inputs[1:]]
    slot, activation = activated(lowering, instruction.outputs[0])
    shape = {"n": op.rows, "in": op.fan_in, "out": op.fan_out, "gram": False, **activation}
    lowering.held[slot] = Value(lowering.emit("linear_block", shape, [source], weights), op.rows, op.fan_out)


def _embedding(lowering: Lowering, instruction: Instruction) -> None:
    op: Any = instruction.op
    table, numbers = instruction.inputs
    held, given = lowering.held.get(numbers), lowering.graph.values[numbers]
    if not isinstance(held, Data) or given.dtype != torch.int64 or op.count == 0:
        raise NotLowered("an embedding of indices that are computed, or not of int64")
    described = {"count": op.count, "rows": op.size, "features": op.width, "padding": op.padding}
    described["apart"] = False
    index = lowering.emit("embedding", described, [(True, held.index)], [lowering.parameter(table)])
    lowering.held[instruction.outputs[0]] = Value(index, op.count, op.width)


def _convolution(lowering: Lowering, instruction: Instruction) -> None:
    geometry = instruction.op.geometry  # type: ignore[attr-defined]
    n, channels, height, width = geometry.x_shape
    out, _, *kernel = geometry.weight_shape
    source = lowering.source(instruction.inputs[0], geometry.x_shape)
    weights = [lowering.parameter(slot) for slot in instruction.inputs[1:]]
    weights += [ABSENT] * (2 - len(weights))
    shape: dict[str, Any] = {"n": n, "in": channels, "height": height, "width": width, "out": out}
    shape |= {"kernel": tuple(kernel), "stride": geometry.stride, "padding": geometry.padding}
    shape |= {"dilation": geometry.dilation, "groups": geometry.groups}
    slot, result = instruction.outputs[0], instruction.op.call.outputs[0].shape
    slot, norm, scales = _batch_normalised(lowering, slot, result)
    slot, activation = activated(lowering, slot)
    slot, pool, result = _pooled(lowering, slot, result)
    index = lowering.emit("conv_block", shape | norm | activation | pool, [source], weights + scales)
    lowering.held[slot] = Value(index, *result)


def _batch_normalised(lowering: Lowering, slot: int, shape: tuple[int, ...]) -> tuple[int, dict[str, Any], list[int]]:
    """The batch norm of images of ``shape`` that a convolution can take along: ``(slot, description, weights)``."""
    follower = lowering.follower(slot)
    op: Any = None if follower is None else follower.op
    if follower is None or op.name != "batch_norm" or op.shape != shape or (op.scale is None) != (op.shift is None):
        return slot, {"norm": "none", "eps": 0.0}, []
    weights = norm_weights(lowering, follower)
    kind = "batch" if op.uses_batch_statistics else "running"
    return lowering.take(slot, follower), {"norm": kind, "eps": op.eps}, weights


def norm_weights(lowering: Lowering, instruction: Instruction) -> list[int]:
    """Numbers of what a batch norm reads: weight, bias and, in evaluation mode, running mean and variance."""
    op: Any = instruction.op
    weights = parameters_at(lowering, instruction, op.scale, op.shift)
    if op.uses_batch_statistics:
        return weights
    return weights + [lowering.buffer(instruction.inputs[at]) for at in op.running]


def activated(lowering: Lowering, slot: int) -> tuple[int, dict[str, Any]]:
    """The activation that an operation can take along: ``(slot, description)``."""
    follower = lowering.follower(slot)
    described = None if follower is None else _activation(follower)
    if follower is None or described is None:
        return slot, {"activation": "identity", "slope": 0.0}
    return lowering.take(slot, follower), described


def _activation(instruction: Instruction) -> dict[str, Any] | None:
    try:
        curve = curve_of(instruction.op.call)
    except Unsupported:
        return None
    return {"activation": curve.kind, "slope": curve.below}


def _pooled(lowering: Lowering, slot: int, shape: tuple[int, ...]) -> tuple[int, dict[str, Any], tuple[int, ...]]:
    """The pooling of images of ``shape`` that a convolution can take along: ``(slot, description, shape)``."""
    follower = lowering.follower(slot)
    pool = None if follower is None else _windows(follower)
    if follower is None or pool is None or follower.op.call.inputs[0].shape != shape:
        return slot, NO_POOL, shape
    return lowering.take(slot, follower), pool, follower.op.call.outputs[0].shape


def _windows(instruction: Instruction) -> dict[str, Any] | None:
    """The pooling of an instruction, if its windows are equal and lie in the image or count what lies outside."""
    op: Any = instruction.op
    kind = {"max_pool": "max", "average_pool": "average"}.get(op.name)
    if kind is None:
        return None
    window, get = op.window, op.call.arguments.get
    counts_inside_alone = any(window.padding) and not get("count_include_pad", True)
    if window.ceil_mode or set(window.dilation) != {1} or counts_inside_alone or get("divisor_override") is not None:
        return None
    return _description(kind, window.kernel, window.stride, window.padding)


def _description(kind: str, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> dict[str, Any]:
    return {"pool": kind, "pool_kernel": tuple(kernel), "pool_stride": tuple(stride), "pool_padding": tuple(padding)}


def _lone_pool(lowering: Lowering, instruction: Instruction) -> None:
    windows = _windows(instruction)
    if windows is None:
        raise NotLowered(f"{instruction.op.name} with windows that differ or divisors of their own")
    _pool(lowering, instruction, windows)


def _adaptive_pool(lowering: Lowering, instruction: Instruction) -> None:
    size, wanted = instruction.op.call.inputs[0].shape[-2:], instruction.op.call.outputs[0].shape[-2:]
    if any(whole % part for whole, part in zip(size, wanted, strict=True)):
        raise NotLowered("adaptive pooling by windows that differ")
    window = [whole // part for whole, part in zip(size, wanted, strict=True)]
    _pool(lowering, instruction, _description("average", window, window, (0, 0)))


def _mean(lowering: Lowering, instruction: Instruction) -> None:
    op: Any = instruction.op
    if not op.mean or op.axes != (3, 4) or len(op.shape) != 4:  # counted behind the task axis
        raise NotLowered(f"{op.call.target} that is not the mean of images over their pixels")
    size = op.shape[2:]
    _pool(lowering, instruction, _description("average", size, size, (0, 0)))


def _pool(lowering: Lowering, instruction: Instruction, windows: dict[str, Any]) -> None:
    shape, result = instruction.op.call.inputs[0].shape, instruction.op.call.outputs[0].shape
    value = lowering.value(instruction.inputs[0])
    if value.shape != shape:
        raise NotLowered(f"a value of shape {value.shape} read as {shape}")
    described = {"n": value.samples, "channels": value.channels, "height": value.height, "width": value.width}
    index = lowering.emit("pool", described | windows, [(False, value.index)])
    lowering.held[instruction.outputs[0]] = Value(index, *(*result, 1, 1)[:4])


def _sum(lowering: Lowering, instruction: Instruction) -> None:
    op: Any = instruction.op
    if op.offset or len({i.shape for i in op.call.inputs} | {op.call.outputs[0].shape}) > 1:
        raise NotLowered(f"{op.call.target} that is not a sum of values of one shape")
    if len(op.factors) == 1:
        _scaled(lowering, instruction, op.factors[0])
        return
    first, second = instruction.inputs
    if isinstance(lowering.held.get(first), Value):
        a = lowering.value(first)
        b = lowering.value(second, like=a)
    else:
        b = lowering.value(second)
        a = lowering.value(first, like=b)
    if a.shape != b.shape:
        a, b = lowering.rows(a), lowering.rows(b)
    if a.shape != b.shape:
        raise NotLowered(f"a sum of values of shapes {a.shape} and {b.shape}")
    _pointwise(lowering, [a, b], op.factors, *activated(lowering, instruction.outputs[0]))


def _product(lowering: Lowering, instruction: Instruction) -> None:
    op: Any = instruction.op
    if op.number is None:
        raise NotLowered(f"{op.call.target} of two tensors")
    _scaled(lowering, instruction, op.number)


def _quotient(lowering: Lowering, instruction: Instruction) -> None:
    op: Any = instruction.op
    if op.number is None:
        raise NotLowered(f"{op.call.target} of two tensors")
    _scaled(lowering, instruction, 1 / op.number)


def _scaled(lowering: Lowering, instruction: Instruction, factor: float) -> None:
    value = lowering.value(instruction.inputs[0])
    _pointwise(lowering, [value], (factor,), *activated(lowering, instruction.outputs[0]))


def _lone_activation(lowering: Lowering, instruction: Instruction) -> None:
    activation = _activation(instruction)
    if activation is None:
        raise NotLowered(f"activation ({instruction.op.call.target}) has no native kernel")
    _pointwise(lowering, [lowering.value(instruction.inputs[0])], (1,), instruction.outputs[0], activation)


def _pointwise(
    lowering: Lowering, values: list[Value], factors: Sequence[float], slot: int, activation: dict[str, Any]
) -> None:
    """Emit the activation of the sum of ``values``, each times its factor."""
    first = values[0]
    shape = {"rows": first.samples * first.pixels, "features": first.channels, "factors": list(factors), **activation}
    index = lowering.emit("pointwise", shape, [(False, value.index) for value in values])
    lowering.held[slot] = dataclasses.replace(first, index=index)


def parameters_at(lowering: Lowering, instruction: Instruction, *positions: int | None) -> list[int]:
    """Numbers of the parameters that the instruction reads at ``positions``."""
    return [ABSENT if at is None else lowering.parameter(instruction.inputs[at]) for at in positions]


HANDLERS = {
    "linear": _linear,
    "embedding": _embedding,
    "conv2d": _convolution,
    "sum": _sum,
    "product": _product,
    "quotient": _quotient,
    "activation": _lone_activation,
    "max_pool": _lone_pool,
    "average_pool": _lone_pool,
    "adaptive_average_pool": _adaptive_pool,
    "reduction": _mean,
}
