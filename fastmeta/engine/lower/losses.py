"""Losses: the last operation of a native program, which compares a prediction with the task's own targets."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastmeta.engine.lower.lowering import Data, Lowering, NotLowered, Value
from fastmeta.engine.program import Instruction

NONE, MEAN = 0, 1  # ATen's codes of a loss's reduction


def _squared_error(lowering: Lowering, instruction: Instruction) -> None:
    prediction, target = instruction.inputs
    if isinstance(lowering.held.get(prediction), Data):
        prediction, target = target, prediction
    _loss(lowering, instruction, "squared_error", prediction, target)


def _binary_cross_entropy(lowering: Lowering, instruction: Instruction) -> None:
    op: Any = instruction.op
    if op.weight is not None or op.positive is not None:
        raise NotLowered("binary cross-entropy with weights")
    prediction, target = instruction.inputs
    _loss(lowering, instruction, "binary_cross_entropy", prediction, target)


def _cross_entropy(lowering: Lowering, instruction: Instruction) -> None:
    op: Any = instruction.op
    if op.weight is not None or op.smoothing or not op.is_rows:
        raise NotLowered("cross-entropy with class weights, label smoothing or more axes than [N, C]")
    prediction, target = instruction.inputs
    _loss(lowering, instruction, "cross_entropy", prediction, target, op.ignored)


def _loss(
    lowering: Lowering, instruction: Instruction, kind: str, prediction: int, target: int, ignored: int = 0
) -> None:
    graph = lowering.graph
    reduction = instruction.op.reduction  # type: ignore[attr-defined]
    if instruction.outputs[0] != graph.loss or instruction is not lowering.needed[-1] or reduction == NONE:
        raise NotLowered("the loss is not the mean or the sum of one loss function")
    value, data = lowering.held.get(prediction), lowering.held.get(target)
    if not isinstance(value, Value) or not isinstance(data, Data):
        raise NotLowered("the loss does not compare a prediction with the task's own targets")
    rows = lowering.rows(value)
    given, shape = graph.values[target], graph.values[prediction].shape
    labels = kind == "cross_entropy"
    wanted = (torch.int64, rows.samples) if labels else (lowering.dtype, rows.samples * rows.channels)
    if (given.dtype, math.prod(given.shape)) != wanted or (labels and shape[-1] != rows.channels):
        raise NotLowered(f"targets of {given.dtype} {given.shape} for outputs {shape}")
    described = {"kind": kind, "n": rows.samples, "features": rows.channels, "mean": reduction == MEAN}
    lowering.emit("loss", described | {"ignored": ignored}, [(False, rows.index)], target=data.index)


HANDLERS = {"mse": _squared_error, "cross_entropy": _cross_entropy, "bce_with_logits": _binary_cross_entropy}
