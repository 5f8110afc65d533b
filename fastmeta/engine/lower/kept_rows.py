"""Operations on rows, part of which nothing reads: they go through the others alone, which lie one behind the other.

Where sequences are padded to one length, models multiply what they have computed of the padding by zero, and their
attention gives it no weight. Around the operations that stay among rows, one operation takes the rows that are kept
from each value that comes in, and another puts them back, between zeros, into each that goes out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastmeta.engine.kept_rows import Attended, KeptRows, Picked, Weighted
from fastmeta.engine.lower.lowering import ABSENT, Data, Lowered, Lowering, Value
from fastmeta.engine.lower.operands import Operands
from fastmeta.engine.program import Instruction

WORTH = 16  # multiply-adds of the layers for each element that is moved in or out


def with_kept_rows(lowering: Lowering, whole: Lowered) -> Lowered | None:
    """``whole`` with some operations on the rows that are kept, or ``None`` where nothing says that any are not.

    Their list is the last of a task's data.
    """
    operations = whole.program["operations"]
    for region in sorted(_regions(operations), key=len, reverse=True):
        kept = _kept(lowering, whole.program, region)
        if kept is not None:
            return _rewritten(whole, region, kept, len(lowering.data))
    return None


def alike(support: Lowered, query: Lowered) -> bool:
    """Whether both have the same operations."""
    a, b = ([one["operation"] for one in each.program["operations"]] for each in (support, query))
    return a == b


def _regions(operations: Sequence[dict[str, Any]]) -> list[set[int]]:
    """Operations on the same rows that are connected by values."""
    regions: list[set[int]] = []
    for i, one in enumerate(operations):
        count = _rows(one)
        if count < 2:
            continue
        values = {index for is_data, index in one["x"] if not is_data and _rows(operations[index]) == count}
        joined = [region for region in regions if region & values]
        regions = [region for region in regions if not region & values] + [{i}.union(*joined)]
    return regions


def _rows(operation: dict[str, Any]) -> int:
    """Rows of an operation that computes each from the same one of its inputs, or by attention; 0 of others."""
    name = operation["operation"]
    if any(is_data for is_data, _ in operation["x"][:3]):
        return 0
    if name == "linear_block" and not operation["gram"]:
        return int(operation["n"])
    if name == "pointwise":
        return int(operation["rows"])
    rows_alone = name == "norm" and operation["pixels"] == operation["groups"] == 1
    if rows_alone and all(w == ABSENT for w in operation["w"][2:]):
        return int(operation["samples"])
    if name == "attention" and operation["rows"] == operation["columns"]:
        return int(operation["n"] * operation["rows"])
    return 0


def _features(operation: dict[str, Any]) -> tuple[int, int]:
    """Of a row that such an operation reads, and of one that it makes."""
    name = operation["operation"]
    if name == "linear_block":
        return operation["in"], operation["out"]
    if name == "attention":
        return (operation["heads"] * operation["dim"],) * 2
    return (operation["channels" if name == "norm" else "features"],) * 2


def _kept(lowering: Lowering, program: dict[str, Any], region: set[int]) -> KeptRows | None:
    """What says which rows are read; ``None`` where all may be, or where too little is done with them."""
    operations = program["operations"]
    count = _rows(operations[min(region)])
    attentions = [operations[i] for i in sorted(region) if operations[i]["operation"] == "attention"]
    shapes = {(one["n"], one["rows"]) for one in attentions} or {(1, count)}
    if len(shapes) > 1 or program["output"] in region or len(operations) - 1 in region:
        return None
    readers: list[Weighted | Picked] = []
    moved: dict[int, int] = {}  # elements of a row of each value that comes in or goes out
    for i, one in enumerate(operations):
        for value in {index for is_data, index in one["x"] if not is_data}:
            if i in region and value not in region:
                moved[value] = _features(one)[0]
            elif value in region and i not in region:
                found = _readers(lowering, one, value, count)
                if found is None:
                    return None
                readers += found
                moved[value] = _features(operations[value])[1]
    products = sum(operations[i]["in"] * operations[i]["out"] for i in region if "in" in operations[i])
    if products < WORTH * sum(moved.values()) or all(isinstance(one, Picked) and all(one.flags) for one in readers):
        return None
    (sequences, length), *_ = shapes
    return KeptRows(sequences, length, tuple(readers), tuple(_attended(one) for one in attentions))


def _attended(operation: dict[str, Any]) -> Attended:
    if not operation["mask"]:
        return Attended(None, causal=operation["causal"])
    sizes = (operation["n"], operation["heads"], operation["rows"], operation["columns"])
    shape = tuple(size if step else 1 for size, step in zip(sizes, operation["mask"], strict=True))
    return Attended(operation["x"][3][1], shape, operation["causal"])


def _readers(lowering: Lowering, operation: dict[str, Any], value: int, count: int) -> list[Weighted | Picked] | None:
    """How an operation from outside reads the rows of a value; ``None`` where it may read all."""
    if operation["operation"] != "callback":
        return None
    composite = operation["call"].op
    found: list[Weighted | Picked] = []
    for slot in composite.inputs:
        held = lowering.held.get(slot)
        if not isinstance(held, Value) or held.index != value:
            continue
        for instruction in composite.instructions:
            if slot in instruction.inputs:
                reader = _reader(lowering, instruction, slot, count)
                if reader is None:
                    return None
                found.append(reader)
    return found


def _reader(lowering: Lowering, instruction: Instruction, slot: int, count: int) -> Weighted | Picked | None:
    op: Any = instruction.op
    shape = lowering.graph.values[slot].shape
    if math.prod(shape[:-1]) != count:
        return None
    at = instruction.inputs.index(slot)
    deciding = _deciding(op, at)
    if deciding is not None and instruction.inputs.count(slot) == 1:
        other, zeros = instruction.inputs[deciding[0]], deciding[1]
        weights = lowering.held.get(other)
        if not isinstance(weights, Data) or op.call.outputs[0].shape != shape:
            return None
        return Weighted(weights.index, lowering.graph.values[other].shape, shape, zeros)
    if op.name == "view":
        numbers = torch.arange(count, dtype=lowering.dtype).reshape(1, *shape[:-1], 1).expand(1, *shape)
        (taken,), _ = op.forward([numbers])
        flags = torch.zeros(count, dtype=torch.bool)
        flags[taken.flatten().long()] = True
        return Picked(tuple(flags.tolist()))
    return None


def _deciding(op: Any, at: int) -> tuple[int, bool] | None:
    """Which input says of the one ``at`` what is read of it, and whether by zeros."""
    target = str(op.call.target)
    if op.name == "product" and op.number is None and len(op.call.inputs) == 2:
        return 1 - at, False
    if target == "aten.masked_fill.Scalar" and at == 0:
        return 1, True
    condition = op.call.position("condition") if target.startswith("aten.where.") else None
    return None if condition in (None, at) else (condition, at == op.call.position("other"))


def _rewritten(lowered: Lowered, region: set[int], rows: KeptRows, target: int) -> Lowered:
    """The program with the rows' list as data number ``target``."""
    operations = lowered.program["operations"]
    made: list[dict[str, Any]] = []
    counted: list[Operands] = []
    whole: dict[int, int] = {}  # by the values' numbers before: those with all rows, and with those that are kept
    kept: dict[int, int] = {}

    def emit(operation: dict[str, Any], operands: Operands) -> int:
        made.append({**operation, "y": len(made)})
        counted.append(operands)
        return len(made) - 1

    def move(value: int, source: int, features: int, *, back: bool) -> int:
        described = {"operation": "kept_rows", "n": rows.sequences * rows.length, "features": features}
        described |= {"sequences": rows.sequences, "back": back, "x": [(False, source)], "w": [], "target": target}
        return emit(described, _of_move(lowered.operands[value]))

    def sources(operation: dict[str, Any], place: Callable[[int], int]) -> list[tuple[bool, int]]:
        return [(is_data, index if is_data else place(index)) for is_data, index in operation["x"]]

    others = [one for i, one in enumerate(operations) if i not in region]
    read_outside = {index for one in others for is_data, index in one["x"] if not is_data}
    for i, one in enumerate(operations):
        if i not in region:
            whole[i] = emit({**one, "x": sources(one, whole.__getitem__)}, lowered.operands[i])
            continue
        reads, makes = _features(one)
        for is_data, value in one["x"]:
            if not is_data and value not in kept:
                kept[value] = move(value, whole[value], reads, back=False)
        among = {**one, "x": sources(one, kept.__getitem__), "sequences": rows.sequences, "target": target}
        kept[i] = emit(among, dataclasses.replace(lowered.operands[i], kept_rows=True))
        if i in read_outside:
            whole[i] = move(i, kept[i], makes, back=True)
    output = whole.get(lowered.program["output"], ABSENT)
    program = {**lowered.program, "operations": made, "values": len(made), "output": output}
    return dataclasses.replace(lowered, program=program, operands=tuple(counted), rows=rows)


def _of_move(maker: Operands) -> Operands:
    """Of an operation that moves rows of the value that another has made."""
    y = maker.y
    varies = y if maker.x_varies or maker.w_varies else 0
    active = y if maker.x_active or maker.w_active else 0
    return Operands("kept_rows", None, y, 0, y, varies, 0, active, 0, kept_rows=True)
