"""On a GPU: linear layers and the activations that follow as one operation, after it is settled which are factored."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from fastmeta.core import triton_support
from fastmeta.core.task_op import Need, Unsupported
from fastmeta.engine.program import Instruction, Program
from fastmeta.ops.linear_block import GramBlock, LinearBlock

# Beyond these a library's batched product is at its best, and a launch more does not show.
MOST_WEIGHTS = 1 << 19
MOST_ROWS = 256
IN_INTERPRETER = False  # whether to join on a CPU too, where kernels run in Triton's interpreter: for tests


def joined(program: Program, device: torch.device) -> Program:
    """``program`` with fused blocks for its linear layers, where Triton's kernels can run.

    :class:`LinearBlock` for those whose weights are formed, :class:`GramBlock` for those that are factors and read the
    data alone.
    """
    graph = program.graph
    there = device.type == "cuda" or (IN_INTERPRETER and triton_support.interpreted())
    if not there or triton_support.missing_reason(device, graph.values[graph.loss].dtype):
        return program
    readers = Counter(slot for instruction in program.instructions for slot in instruction.inputs)
    readers.update((*graph.outputs, graph.loss, *graph.mutations.values()))
    followers = {i.inputs[0]: i for i in program.instructions if i.op.name == "activation"}
    taken: set[int] = set()
    instructions = []
    for instruction in program.instructions:
        if instruction.outputs[0] in taken:
            continue
        follower = followers.get(instruction.outputs[0])
        block = _block(instruction, follower if readers[instruction.outputs[0]] == 1 else None)
        if block.outputs != instruction.outputs:
            taken.update(block.outputs)
        instructions.append(block)
    return replace(program, instructions=tuple(instructions))


def _block(linear: Instruction, activation: Instruction | None) -> Instruction:
    """Both as one instruction, or the linear one alone; as it is where it is no linear layer, or none for a block."""
    op: Any = linear.op
    if op.name != "linear" or linear.first.single or op.rows > MOST_ROWS:
        return linear
    kind = LinearBlock
    if Need.FACTORS in linear.later.need:
        if linear.later.need[0]:
            return linear
        kind = GramBlock  # what it reads is the data's
    elif op.fan_in * op.fan_out > MOST_WEIGHTS:
        return linear
    for second in (activation, None):
        try:
            block = kind(op.call, None if second is None else second.op.call)
        except Unsupported:
            continue
        return replace(linear, op=block, outputs=linear.outputs if second is None else second.outputs)
    return linear
