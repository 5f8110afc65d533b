"""Instructions without a kernel: calls back to their own maps, which cut the native program."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastmeta.engine.callback import Callback, Failures, Operand, Place
from fastmeta.engine.lower.lowering import ABSENT, Data, Lowering, NotLowered, Value
from fastmeta.engine.program import Instruction

MAX_INPUTS, MAX_WEIGHTS = 2, 6  # csrc/executor/operation.h


def call_back(lowering: Lowering, instruction: Instruction, failures: Failures) -> None:
    """Emit an operation that runs ``instruction``'s own maps.

    Raises:
        NotLowered: it draws random numbers, reads nothing but parameters, or more than an operation can, or has a
            result that no value of the executor can hold.
    """
    op, values = instruction.op, lowering.graph.values
    if op.random:
        raise NotLowered(f"{op.call.target} draws random numbers, in an order that native tasks do not keep")
    read = {*lowering.readers, lowering.graph.loss, *lowering.graph.outputs}
    results = [i for i, slot in enumerate(instruction.outputs) if slot in read]
    if len(results) != 1:
        raise NotLowered(f"{op.call.target} has {len(results)} results that are read")
    slot = instruction.outputs[results[0]]
    if values[slot].dtype != lowering.dtype:
        raise NotLowered(f"{op.call.target} gives {values[slot].dtype}")
    sources: list[tuple[bool, int]] = []
    x_rows, x_features, x_bytes = ([0] * MAX_INPUTS for _ in range(3))
    weights: list[int] = []
    sizes: list[int] = []
    places: list[Place | Tensor] = []
    for read_slot in instruction.inputs:
        shape, dtype = values[read_slot].shape, values[read_slot].dtype
        held = lowering.held.get(read_slot)
        if held is not None and len(sources) == MAX_INPUTS:
            raise NotLowered(f"{op.call.target} reads more than {MAX_INPUTS} values")
        if isinstance(held, Value):
            at = len(sources)
            places.append(Place(Operand(shape, dtype, held.shape), False, at))
            x_rows[at], x_features[at] = held.samples * held.pixels, held.channels
            sources.append((False, held.index))
        elif isinstance(held, Data):
            places.append(Place(Operand(shape, dtype), False, len(sources)))
            x_bytes[len(sources)] = math.prod(shape) * dtype.itemsize
            sources.append((True, held.index))
        elif read_slot in lowering.program.constants:
            places.append(lowering.program.constants[read_slot].unsqueeze(0))
        elif dtype != lowering.dtype or len(weights) == MAX_WEIGHTS:
            raise NotLowered(f"{op.call.target} reads a parameter or buffer of {dtype}, or more than {MAX_WEIGHTS}")
        else:
            places.append(Place(Operand(shape, dtype), True, len(weights)))
            number = lowering.parameter if lowering.is_parameter(read_slot) else lowering.buffer
            weights.append(number(read_slot))
            sizes.append(math.prod(shape))
    if not sources:
        raise NotLowered(f"{op.call.target} reads no value: what it gives would be a weight")
    value = _value(values[slot].shape)
    callback = Callback(op, places, results[0], Operand(values[slot].shape, values[slot].dtype, value.shape), failures)
    described: dict[str, Any] = {"rows": value.samples * value.pixels, "features": value.channels, "call": callback}
    described |= {"x_rows": x_rows, "x_features": x_features, "x_bytes": x_bytes}
    described["weights"] = sizes + [0] * (MAX_WEIGHTS - len(sizes))
    index = lowering.emit("callback", described, sources, weights)
    lowering.held[slot] = Value(index, *value.shape)


def _value(shape: tuple[int, ...]) -> Value:
    """What holds a result of ``shape``: images, or rows of its last axis."""
    if 0 in shape:
        raise NotLowered(f"a result of shape {shape}")
    if len(shape) == 4:
        samples, channels, height, width = shape
        return Value(ABSENT, samples, channels, height, width)
    return Value(ABSENT, math.prod(shape[:-1]), math.prod(shape[-1:]))
