"""Layer, group, instance and batch norm that no convolution takes along: one native operation, whose groups differ."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fastmeta.engine.lower.layers import activated, norm_weights, parameters_at
from fastmeta.engine.lower.lowering import ABSENT, Lowering, NotLowered, Value
from fastmeta.engine.program import Instruction


def _layer_norm(lowering: Lowering, instruction: Instruction) -> None:
    """Layer norm, or what a trace leaves of group norm: a layer norm over each group, then scale and shift."""
    op: Any = instruction.op
    value = lowering.value(instruction.inputs[0])
    groups = op.rows // value.samples
    if op.rows * op.features != math.prod(value.shape):
        raise NotLowered(f"layer norm of a value of shape {value.shape} read as {op.rows} rows")
    if op.rows % value.samples == 0 and value.channels % groups == 0:
        shape = {"samples": value.samples, "pixels": value.pixels, "groups": groups}
    elif value.samples % op.rows == 0:  # several rows or images are normalised together
        shape = {"samples": op.rows, "pixels": value.samples * value.pixels // op.rows, "groups": 1}
    else:
        raise NotLowered(f"layer norm over {op.features} elements of a value of shape {value.shape}")
    slot, weights = instruction.outputs[0], parameters_at(lowering, instruction, op.scale, op.shift)
    if weights == [ABSENT, ABSENT]:
        slot, weights = _scaled(lowering, slot, value)
    elif shape["groups"] != 1 or op.features != value.channels:
        raise NotLowered("layer norm with weights that differ between pixels, or that groups share")
    _emit(lowering, slot, value, shape | {"eps": op.eps}, weights)


def _batch_norm(lowering: Lowering, instruction: Instruction) -> None:
    op: Any = instruction.op
    value = lowering.value(instruction.inputs[0])
    if (*op.shape, 1, 1)[:4] != value.shape:
        raise NotLowered(f"a value of shape {value.shape} read as {op.shape}")
    shape = {"samples": 1, "pixels": value.samples * value.pixels, "groups": value.channels, "eps": op.eps}
    _emit(lowering, instruction.outputs[0], value, shape, norm_weights(lowering, instruction))


def _scaled(lowering: Lowering, slot: int, value: Value) -> tuple[int, list[int]]:
    """Scale and shift by a parameter a channel, where they follow: ``(slot, weights)``."""
    weights = [ABSENT, ABSENT]
    for position, name in enumerate(("product", "sum")):
        follower = lowering.follower(slot)
        if follower is None or follower.op.name != name or len(follower.inputs) != 2:
            continue
        parameter = next((i for i, read in enumerate(follower.inputs) if lowering.is_parameter(read)), None)
        if parameter is None or getattr(follower.op, "factors", (1, 1)) != (1, 1):
            continue
        result = follower.op.call.outputs[0].shape
        if math.prod(result) == math.prod(value.shape) and _by_channel(
            follower.op.call.inputs[parameter].shape, result, value
        ):
            weights[position] = lowering.parameter(follower.inputs[parameter])
            slot = lowering.take(slot, follower)
    return slot, weights


def _by_channel(parameter: tuple[int, ...], shape: tuple[int, ...], value: Value) -> bool:
    """Whether a parameter broadcasts along the channels of ``value``, which the graph sees in ``shape``."""
    aligned = (1,) * (len(shape) - len(parameter)) + tuple(parameter)
    for axis in range(len(shape)):
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        if (before, shape[axis], after) == (value.samples, value.channels, value.pixels):
            return aligned == (*(1,) * axis, value.channels, *(1,) * (len(shape) - axis - 1))
    return False


def _emit(lowering: Lowering, slot: int, value: Value, shape: dict[str, Any], weights: list[int]) -> None:
    slot, activation = activated(lowering, slot)
    described = {**shape, "channels": value.channels, **activation}
    index = lowering.emit("norm", described, [(False, value.index)], weights)
    lowering.held[slot] = dataclasses.replace(value, index=index)


HANDLERS = {"layer_norm": _layer_norm, "batch_norm": _batch_norm}
