"""``plan``: every call of a graph gets an operation, and every value its place on the task axis."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

import torch
from torch import Tensor

import fastmeta.ops.catalogue  # noqa: F401  fills the registry
from fastmeta.core.task_op import Need, TaskOp, Unsupported, registry
from fastmeta.engine.fuse import Fused, fuse
from fastmeta.engine.program import Instruction, Program, Route
from fastmeta.engine.trace import Graph, Node, NotTraceable
from fastmeta.ops.generic import GenericOp

# Tasks run together up to so many bytes of an operation's largest result, and of the fast weights. More gains nothing
# and leaves the cache; with fewer, small maps cannot run as one call over tasks (Omniglot Conv4, 5 images a task: one
# task at a time 1.4 times slower than four or more; MLP 784: four to eight tasks 1.2 times faster than 32).
CHUNK_BYTES = 16 << 20
CHUNK_WEIGHT_BYTES = 8 << 20
# A GPU wants all tasks at once; the tapes of a chunk are a few dozen times as large as this.
GPU_CHUNK_BYTES = 1 << 30


def plan(
    graph: Graph,
    adapted: Sequence[str],
    outer: Sequence[str],
    device: torch.device,
    own: Collection[str] = (),
    *,
    stepwise: Collection[str] = (),
) -> Program:
    """Choose an operation for every call and decide what each value depends on.

    Args:
        graph: the traced objective of one task.
        adapted: names of the parameters that the inner loop updates.
        outer: names of the other parameters whose meta-gradient is wanted.
        device: where the program will run, which decides what is fused.
        own: names of the parameters and buffers that differ between tasks from the first step on.
        stepwise: names of other parameters and of buffers that differ from one inner step to the next.

    Returns:
        The program.

    Raises:
        NotTraceable: a call that not even the generic operation can represent.
    """
    adapted_slots = {graph.parameters[name] for name in adapted}
    outer_slots = {graph.parameters[name] for name in outer}
    constants, nodes = _fold_constants(graph)
    nodes, refusals = fuse(graph, nodes, device)
    places = graph.parameters | graph.buffers
    given = {*graph.data, *(places[name] for name in own)}
    first = _Dependence(graph, adapted_slots, outer_slots, tasked=set(given))
    later = _Dependence(graph, adapted_slots, outer_slots, tasked=given | adapted_slots)
    instructions = []
    moving = [graph.buffers[name] for name in own if name in graph.buffers]  # a task's statistics follow its steps
    changing = adapted_slots | {places[name] for name in stepwise if name in places} | {*moving}
    for node in nodes:
        op, reason = _choose(node, first.active)
        reason = reason or refusals.get(node.outputs[0], "")
        routes = first.route(node, op), later.route(node, op)
        invariant = not op.random and changing.isdisjoint(node.inputs)
        if not invariant:
            changing.update(node.outputs)
        instructions.append(Instruction(op, node.inputs, node.outputs, node.module, reason, *routes, invariant))
    return Program(
        graph,
        tuple(instructions),
        constants,
        tuple(adapted),
        tuple(outer),
        frozenset(first.tasked),
        frozenset(later.tasked),
    )


def chunk_size(program: Program, elements: int, device: torch.device) -> int:
    """How many tasks to run at a time, so that what an operation reads and writes stays in cache, or a GPU is busy.

    Args:
        program: the planned program.
        elements: P, adapting elements of one task.
        device: of the parameters.
    """
    graph = program.graph
    tasked = [graph.values[slot] for i in program.instructions for slot in i.outputs if slot in program.tasked_later]
    largest = max((prod(v.shape) * v.dtype.itemsize for v in tasked), default=1)
    weights = elements * graph.values[graph.loss].dtype.itemsize
    limits = (CHUNK_BYTES, CHUNK_WEIGHT_BYTES) if device.type == "cpu" else (GPU_CHUNK_BYTES, GPU_CHUNK_BYTES)
    return max(1, min(limits[0] // max(largest, 1), limits[1] // max(weights, 1)))


def _choose(node: Node, active: set[int]) -> tuple[TaskOp, str]:
    if isinstance(node, Fused):
        return node.op, ""
    kind = registry.lookup(node.call.target)
    reason = f"no operation covers {node.call.target}"
    if kind is not None:
        positions = {name: node.call.position(name) for name in kind.fixed}
        wanted = [name for name, p in positions.items() if p is not None and node.inputs[p] in active]
        try:
            if not wanted:
                return kind(node.call), ""
            reason = f"{kind.name} has no derivative by {', '.join(wanted)}"
        except Unsupported as unsupported:
            reason = str(unsupported)
    try:
        return GenericOp(node.call), reason
    except Unsupported as unsupported:
        raise NotTraceable(str(unsupported)) from unsupported


def _fold_constants(graph: Graph) -> tuple[dict[int, Tensor], list[Node]]:
    """Evaluate once what depends on nothing, such as ``arange`` or a causal mask."""
    constants = dict(graph.constants)
    nodes = []
    for node in graph.nodes:
        random = torch.Tag.nondeterministic_seeded in node.call.target.tags
        if random or any(slot not in constants for slot in node.inputs):
            nodes.append(node)
            continue
        result = node.call.run([constants[slot] for slot in node.inputs])
        results = result if isinstance(result, (list, tuple)) else [result]
        tensors = [r for r in results if isinstance(r, Tensor)]
        constants.update(zip(node.outputs, tensors, strict=True))
    return constants, nodes


class _Dependence:
    """Which slots differ between tasks, which depend on what adapts and which on other parameters, in one phase."""

    def __init__(self, graph: Graph, adapted: set[int], outer: set[int], tasked: set[int]) -> None:
        self.graph = graph
        self.tasked = tasked
        self.adapts = set(adapted)
        self.active = adapted | outer

    def route(self, node: Node, op: TaskOp) -> Route:
        """Decide the route of ``node``; nodes come in execution order."""
        inputs = node.inputs
        single = not (
            op.random or any(slot in self.tasked for slot in inputs) or any(slot in self.adapts for slot in inputs)
        )
        shared = op.shared_positions
        expand, need, sums = [], [], []
        for position, slot in enumerate(inputs):
            wanted = slot in self.active and self.graph.values[slot].dtype.is_floating_point
            without_tasks = not single and slot not in self.tasked
            sums_itself = without_tasks and position in shared
            if without_tasks and not sums_itself:
                expand.append(position)
                if wanted and slot not in self.adapts:
                    sums.append(position)
            if not wanted:
                need.append(Need.NONE)
            elif sums_itself and slot not in self.adapts:
                need.append(Need.SHARED)
            else:
                need.append(Need.TASK)
        inner = [n if slot in self.adapts else Need.NONE for n, slot in zip(need, inputs, strict=True)]
        if not single:
            self.tasked.update(node.outputs)
        for table in (self.adapts, self.active):
            if any(slot in table for slot in inputs):
                table.update(node.outputs)
        return Route(single, tuple(expand), tuple(need), tuple(inner), tuple(sums))
