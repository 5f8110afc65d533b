"""On a GPU: linear layers and sums with what follows, after it is settled which layers are factored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastmeta.core import triton_support
from fastmeta.core.task_op import Call, Need, TaskOp, Unsupported
from fastmeta.engine.program import Instruction, Program, Route
from fastmeta.ops.linear_block import GramBlock, HeadBlock, LinearBlock
from fastmeta.ops.linear_block.head import LOSSES
from fastmeta.ops.sum_block import SumBlock

# Beyond these a library's batched product is at its best, and a launch more does not show.
MOST_WEIGHTS = 1 << 19
MOST_ROWS = 256
IN_INTERPRETER = False  # whether to join on a CPU too, where kernels run in Triton's interpreter: for tests


def joined(program: Program, device: torch.device) -> Program:
    """``program`` with fused blocks, where Triton's kernels can run.

    :class:`LinearBlock` for linear layers whose weights are formed, :class:`HeadBlock` for the last with its loss,
    :class:`GramBlock` for those that are factors and read the data alone, :class:`SumBlock` for sums of two and for
    activations that follow neither.
    """
    graph = program.graph
    there = device.type == "cuda" or (IN_INTERPRETER and triton_support.interpreted())
    if not there or triton_support.missing_reason(device, graph.values[graph.loss].dtype):
        return program
    held = {graph.parameters[name] for name in program.factored}  # as factors, if only until a step adds them up
    program = _with_heads(program, held)
    readers = Counter(slot for instruction in program.instructions for slot in instruction.inputs)
    readers.update((*graph.outputs, graph.loss, *graph.mutations.values()))
    followers = {i.inputs[0]: i for i in program.instructions if i.op.name == "activation"}
    taken: set[int] = set()
    instructions = []
    for instruction in program.instructions:
        if instruction.outputs[0] in taken:
            continue
        follower = followers.get(instruction.outputs[0])
        block = _block(instruction, follower if readers[instruction.outputs[0]] == 1 else None, held)
        if block.outputs != instruction.outputs:
            taken.update(block.outputs)
        instructions.append(block)
    return replace(program, instructions=tuple(instructions))


def _with_heads(program: Program, held: set[int]) -> Program:
    """Losses together with the linear layers whose results they alone read; those may be outputs, too."""
    readers = Counter(slot for instruction in program.instructions for slot in instruction.inputs)
    readers.update(program.graph.mutations.values())
    linear = {i.outputs[0]: i for i in program.instructions if _kind_of(i, held) is LinearBlock}
    heads: dict[int, Instruction] = {}  # by the slot of the loss
    within: set[int] = set()  # results of the layers that they have
    for loss in program.instructions:
        layer = linear.get(loss.inputs[0]) if str(loss.op.call.target) in LOSSES else None
        head = None if layer is None or readers[layer.outputs[0]] > 1 else _head(layer, loss)
        if head is not None:
            heads[loss.outputs[0]] = head
            within.add(head.outputs[1])
    instructions = (heads.get(i.outputs[0], i) for i in program.instructions if i.outputs[0] not in within)
    return replace(program, instructions=tuple(instructions)) if heads else program


def _head(layer: Instruction, loss: Instruction) -> Instruction | None:
    routes = layer.first, layer.later, loss.first, loss.later
    if layer.invariant or any(route.single for route in routes) or any(route.need[1] for route in routes[2:]):
        return None
    try:
        op = HeadBlock(layer.op.call, loss.op.call)
    except Unsupported:
        return None

    def both(own: Route, last: Route) -> Route:
        target = (len(layer.inputs),) if 1 in last.expand else ()
        need, inner = ((*wanted, Need.NONE) for wanted in (own.need, own.inner))
        return replace(own, expand=(*own.expand, *target), need=need, inner=inner)

    first, later = both(layer.first, loss.first), both(layer.later, loss.later)
    inputs, outputs = (*layer.inputs, loss.inputs[1]), (*loss.outputs, *layer.outputs)
    return replace(layer, op=op, inputs=inputs, outputs=outputs, first=first, later=later)


def _block(first: Instruction, activation: Instruction | None, held: set[int]) -> Instruction:
    """Both as one instruction, or the first alone; as it is where it is none that a block begins with."""
    kind = _kind_of(first, held)
    if kind is None:
        return first
    for second in (activation, None):
        try:
            block = kind(first.op.call, None if second is None else second.op.call)
        except Unsupported:
            continue
        return replace(first, op=block, outputs=first.outputs if second is None else second.outputs)
    return first


def _kind_of(first: Instruction, held: set[int]) -> Callable[[Call, Call | None], TaskOp] | None:
    """The block that begins with an instruction; ``held`` are the slots of weights that are factors."""
    if first.first.single:
        return None
    op: Any = first.op
    if op.name == "sum":
        return SumBlock
    if op.name == "activation":
        return _activation
    if op.name != "linear" or op.rows > MOST_ROWS:
        return None
    if Need.FACTORS in first.later.need:
        return None if first.later.need[0] else GramBlock  # what it reads is the data's
    formed = held.isdisjoint(first.inputs)
    return LinearBlock if formed and op.fan_in * op.fan_out <= MOST_WEIGHTS else None


def _activation(call: Call, follower: Call | None) -> TaskOp:
    if follower is not None:
        raise Unsupported("sum_block: one activation alone")
    return SumBlock(None, call)
