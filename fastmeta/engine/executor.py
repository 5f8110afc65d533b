"""The reference executor: runs any program, task-batched, with the operations' own maps.

It is the oracle of the executors to come, and on a CPU it is already ahead of autograd: no graph is built, shared
weights are multiplied once for all tasks, and each pass is one call an operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from fastmeta.core.low_rank import LowRank, Own
from fastmeta.core.task_op import Need, Tensors, plus
from fastmeta.engine.program import Instruction, Program, Route


@dataclass(frozen=True)
class Invariants:
    """What the loop-invariant instructions have left, for every pass over the same data.

    Attributes:
        values: of the slots that others read.
        saved: what their maps need; nothing for the other instructions.
    """

    values: dict[int, Any]
    saved: list[Tensors]


@dataclass
class Tape:
    """What one pass over the program leaves for the passes that follow.

    Attributes:
        first: whether tasks still shared their weights.
        loss: ``[T]``.
        outputs: the model's output tensors, ``[T, ...]``.
        mutations: new values of buffers, ``[T, ...]``.
        invariants: for the next pass over the same data; ``None`` where nothing is kept of this one.
        saved: what each instruction's maps need; nothing where it is computed again.
        starts: by the positions that instructions are run again from, the values there by slot.
        d_y: the cotangents each instruction's backward was given.
    """

    first: bool
    loss: Tensor
    outputs: tuple[Tensor, ...]
    mutations: dict[str, Tensor]
    invariants: Invariants | None
    saved: list[Tensors] = field(default_factory=list)
    starts: dict[int, dict[int, Any]] = field(default_factory=dict)
    d_y: list[Tensors | None] = field(default_factory=list)


@dataclass(frozen=True)
class Gradients:
    """Cotangents of the parameters.

    Attributes:
        adapted: of each task, ``[T, *shape]`` or factors.
        outer: summed over tasks, ``[*shape]``.
        invariants: of the slots between loop-invariant instructions and those whose tangents ran, as the slots are.
    """

    adapted: list[Tensor | LowRank]
    outer: list[Tensor | None]
    invariants: dict[int, Tensor] = field(default_factory=dict)


def forward(
    program: Program,
    adapted: Sequence[Tensor | LowRank],
    state: dict[str, Tensor],
    data: Sequence[Tensor],
    *,
    first: bool,
    invariants: Invariants | None = None,
    again_from: Sequence[int] | None = None,
) -> Tape:
    """Run the objective for all tasks.

    Args:
        program: the planned program.
        adapted: the adapting parameters: ``[*shape]`` if ``first``, else ``[T, *shape]`` or factors.
        state: all other parameters and the buffers by name, ``[*shape]``.
        data: the batch's leaves, ``[T, ...]``.
        first: whether tasks still share their weights.
        invariants: of an earlier pass over the same data, so that loop-invariant instructions need not run again.
        again_from: instead of what the maps need, keep the values at these positions, of which the first is 0:
            :func:`backward` runs the instructions again from there. Empty: keep nothing, for no other map will run.

    Returns:
        The tape, with ``d_y`` still empty.
    """
    graph = program.graph
    tasks = data[0].shape[0]
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(graph.data, data, strict=True))
    for name, slot in (*graph.parameters.items(), *graph.buffers.items()):
        if name in state:
            values[slot] = state[name]
    values.update((graph.parameters[name], value) for name, value in zip(program.adapted, adapted, strict=True))
    if invariants is not None:
        values.update(invariants.values)
    results = {graph.loss, *graph.outputs, *graph.mutations.values()}
    saved: list[Tensors] = []
    starts: dict[int, dict[int, Any]] = {}
    if again_from is None:
        wanted = results if invariants is not None else results | program.boundary
        every = range(len(program.instructions))
        saved = _run(program, values, every, first, tasks, results=wanted, invariants=invariants)
    else:
        for span in _spans(program, again_from):
            if again_from:
                starts[span.start] = dict(values)
            _run(program, values, span, first, tasks, results=results, keep=False, invariants=invariants)
    if invariants is None and again_from is None:
        kept_once = [kept if i.invariant else () for i, kept in zip(program.instructions, saved, strict=True)]
        invariants = Invariants({slot: values[slot] for slot in program.boundary if slot in values}, kept_once)
    tasked = program.tasked(first)

    def per_task(slot: int) -> Tensor:
        value = values[slot]
        return value if slot in tasked else value.unsqueeze(0).expand(tasks, *value.shape)

    return Tape(
        first,
        per_task(graph.loss),
        tuple(per_task(slot) for slot in graph.outputs),
        {name: per_task(slot) for name, slot in graph.mutations.items()},
        invariants,
        saved,
        starts,
    )


def _run(
    program: Program,
    values: dict[int, Any],
    span: range,
    first: bool,
    tasks: int,
    *,
    results: Set[int] = frozenset(),
    keep: bool = True,
    invariants: Invariants | None = None,
) -> list[Tensors]:
    """Run some instructions: fill ``values``, drop from them what none reads later but ``results``.

    Returns:
        What each instruction's maps need; nothing where it is not to be kept.
    """
    saved: list[Tensors] = []
    for i in span:
        instruction = program.instructions[i]
        kept: Tensors = ()
        if invariants is not None and instruction.invariant:
            kept = invariants.saved[i]
        else:
            route = instruction.route(first)
            x = [values[slot] for slot in instruction.inputs]
            if route.single:
                y, kept = instruction.op.forward([v.unsqueeze(0) for v in x])
                y = tuple(v if v is None else v.squeeze(0) for v in y)
            else:
                for position in route.expand:
                    x[position] = x[position].unsqueeze(0).expand(tasks, *x[position].shape)
                y, kept = instruction.op.forward(x)
            values.update((slot, v) for slot, v in zip(instruction.outputs, y, strict=True) if v is not None)
            del x, y
            if not route.active:  # no other map will run
                kept = ()
        saved.append(kept if keep else ())
        for slot in program.last_read[i]:
            if slot not in results:
                values.pop(slot, None)
    return saved


def _spans(program: Program, starts: Iterable[int]) -> list[range]:
    """The instructions from each start to the next; all of them where there is no start."""
    return [range(a, b) for a, b in pairwise((*(starts or (0,)), len(program.instructions)))]


def backward(
    program: Program,
    tape: Tape,
    d_loss: Tensor,
    d_outputs: Sequence[Tensor | None] = (),
    *,
    outer: bool = True,
    last: bool = False,
) -> Gradients:
    """Reverse sweep of one pass; leaves the cotangents on the tape for :func:`hessian_vector_product`.

    Args:
        program: the planned program.
        tape: of :func:`forward`.
        d_loss: cotangent of the loss, ``[T]``.
        d_outputs: cotangents of the outputs, ``[T, ...]``, or ``None`` for zero.
        outer: whether gradients of the parameters that do not adapt are wanted.
        last: no map runs on this tape after it, which is used up: what each instruction has saved is dropped with it.
    """
    graph = program.graph
    tasked = program.tasked(tape.first)
    cotangents: dict[int, Any] = {graph.loss: d_loss if graph.loss in tasked else d_loss.sum(0)}
    for slot, d in zip(graph.outputs, d_outputs, strict=False):
        if d is not None:
            d = d if slot in tasked else d.sum(0)
            cotangents[slot] = cotangents[slot] + d if slot in cotangents else d
    tape.d_y = [None] * len(program.instructions)
    for span in reversed(_spans(program, tape.starts)):
        saved = tape.saved
        if span.start in tape.starts:
            saved = [()] * span.start + _run(program, tape.starts.pop(span.start), span, tape.first, len(tape.loss))
        for i in reversed(span):
            instruction = program.instructions[i]
            route = instruction.route(tape.first)
            need = route.wanted(outer)
            d_y = tuple(cotangents.pop(slot, None) for slot in instruction.outputs) if any(need) else ()
            if any(d is not None for d in d_y):
                d_x = instruction.op.backward(saved[i], _lift(route, d_y), need)
                _accumulate(cotangents, instruction, route, need, d_x)
                del d_x
            if last:
                saved[i] = ()
            elif any(d is not None for d in d_y):
                tape.d_y[i] = d_y
    return _gradients(program, tape, cotangents, outer)


def hessian_vector_product(
    program: Program, tape: Tape, direction: Sequence[Tensor | LowRank], *, outer: bool = True
) -> Gradients:
    """Tangent of :func:`backward`'s gradients in direction ``phi_dot = direction``, forward over reverse.

    One tangent-forward and one tangent-backward over the tape: ``H u`` for the adapting parameters, and
    ``d<g, u>/d psi`` for the others (the last term of eq. 8'). Where loop-invariant instructions come in between, that
    term is linear in the cotangents they would be given: those are returned, for :func:`invariant_backward` to do once
    what every step would do.

    Args:
        program: the planned program.
        tape: on which :func:`backward` has run with ``d_loss = 1``.
        direction: ``u``, one ``[T, *shape]`` a parameter.
        outer: whether the others' term is wanted.
    """
    graph = program.graph
    dots: dict[int, Any] = {graph.parameters[name]: u for name, u in zip(program.adapted, direction, strict=True)}
    saved_dots: list[Tensors | None] = []
    for i, instruction in enumerate(program.instructions):
        x_dot = tuple(dots.get(slot) for slot in instruction.inputs)
        if tape.d_y[i] is None or all(d is None for d in x_dot):
            saved_dots.append(None)
            continue
        y_dot, kept = instruction.op.tangent(tape.saved[i], x_dot)
        saved_dots.append(kept)
        dots.update((slot, v) for slot, v in zip(instruction.outputs, y_dot, strict=True) if v is not None)
    cotangents: dict[int, Any] = {}
    for i in range(len(program.instructions) - 1, -1, -1):
        instruction = program.instructions[i]
        if instruction.invariant:
            continue
        route, d_y, saved_dot = instruction.route(tape.first), tape.d_y[i], saved_dots[i]
        need = route.wanted(outer)
        d_y_dot = tuple(cotangents.pop(slot, None) for slot in instruction.outputs)
        if saved_dot is not None and d_y is not None:
            d_x_dot = instruction.op.tangent_backward(tape.saved[i], saved_dot, d_y, d_y_dot, need)
        elif any(d is not None for d in d_y_dot):  # no tangent comes in, so the map is linear in the cotangent
            d_x_dot = instruction.op.backward(tape.saved[i], _lift(route, d_y_dot), need)
        else:
            continue
        _accumulate(cotangents, instruction, route, need, d_x_dot)
    return _gradients(program, tape, cotangents, outer)


def invariant_backward(program: Program, invariants: Invariants, cotangents: dict[int, Tensor]) -> list[Tensor | None]:
    """Reverse sweep of the loop-invariant instructions.

    Args:
        program: the planned program.
        invariants: of a pass.
        cotangents: of the slots that others read, :attr:`Gradients.invariants`.

    Returns:
        Gradients of the parameters that do not adapt, summed over tasks, ``[*shape]``.
    """
    flowing: dict[int, Any] = dict(cotangents)
    for instruction, saved in zip(reversed(program.instructions), reversed(invariants.saved), strict=True):
        route = instruction.first
        d_y = tuple(flowing.pop(slot, None) for slot in instruction.outputs) if instruction.invariant else ()
        if any(d is not None for d in d_y) and route.active:
            d_x = instruction.op.backward(saved, _lift(route, d_y), route.need)
            _accumulate(flowing, instruction, route, route.need, d_x)
    return [flowing.get(program.graph.parameters[name]) for name in program.outer]


def _lift(route: Route, tensors: Tensors) -> Tensors:
    """Give the cotangents of an instruction that runs once the axis its operation expects."""
    return tuple(d if d is None else d.unsqueeze(0) for d in tensors) if route.single else tensors


def _accumulate(
    cotangents: dict[int, Any], instruction: Instruction, route: Route, need: tuple[Need, ...], d_x: Tensors
) -> None:
    for position, (slot, d) in enumerate(zip(instruction.inputs, d_x, strict=True)):
        if d is None or not need[position]:
            continue
        if need[position] is Need.FACTORS:  # of a parameter with this one reader
            cotangents[slot] = d
            continue
        if route.single:
            d = d.squeeze(0)
        elif position in route.sums:
            d = d.sum(0)
        total = plus(cotangents.get(slot), d)
        if total is not None:
            cotangents[slot] = total


def _gradients(program: Program, tape: Tape, cotangents: dict[int, Any], outer: bool) -> Gradients:
    graph = program.graph
    tasks = tape.loss.shape[0]
    adapted: list[Tensor | LowRank] = []
    for name in program.adapted:
        slot = graph.parameters[name]
        d = cotangents.get(slot)
        if name in program.factored and not isinstance(d, LowRank):
            d = LowRank(None, own=None if d is None else Own(d))
        elif d is None:
            shape, dtype = graph.values[slot].shape, graph.values[slot].dtype
            d = tape.loss.new_zeros((tasks, *shape), dtype=dtype)
        adapted.append(d)
    others = [cotangents.get(graph.parameters[name]) for name in program.outer] if outer else []
    return Gradients(adapted, others, {slot: cotangents[slot] for slot in program.boundary if slot in cotangents})
