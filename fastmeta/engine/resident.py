"""The resident executor: a small network's whole meta-step in one launch on a CUDA device, one block of threads a task.

csrc/resident holds each task's parameters and activations in shared memory through all inner steps, the query set and
the adjoint (docs/maths.md, eq. 1-8'); a second launch sums over tasks. It takes the native executor's lowered programs
where they are a chain of linear layers, each with its activation, and a loss.

A first layer too wide for shared memory is factored (eq. 10-12): its weight moves along the support set's rows alone.
So blocks need the rows' inner products and their products with the weight, which are formed for all tasks before the
launch, and give the rows' coefficients in its meta-gradient, which is one product after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastmeta.core import native
from fastmeta.engine.callback import Failures
from fastmeta.engine.evaluation import Cotangents, Evaluation, MetaGradient
from fastmeta.engine.lower import Lowered, NotLowered, lower
from fastmeta.engine.program import Program
from fastmeta.engine.work import Work, leaves, require_finite

MOST_LAYERS = 24  # csrc/resident/network.h
DEVICE = "cuda"  # where its kernels run; in tests "cpu", by tests/csrc/cuda_shim.h
_NONE = torch.empty(0)


@dataclass(frozen=True)
class Chain:
    """A lowered program as csrc/resident/bind.cpp reads it.

    Attributes:
        layers: ``(in, out, activation, negative slope, number of the weight, of the bias or -1)`` each.
        loss: its kind, whether it is a mean, the label of rows that do not count, its rows.
        data: which leaves of a set are the inputs and the targets.
        output: number of the value that the loss compares with the targets.
    """

    layers: tuple[tuple[int, int, str, float, int, int], ...]
    loss: tuple[str, bool, int, int]
    data: tuple[int, int]
    output: int


def chain_of(lowered: Lowered) -> Chain:
    """The chain of a lowered program.

    Raises:
        NotLowered: it is none.
    """
    for instruction, reason in (*lowered.cuts, *lowered.prelude):
        raise NotLowered(f"{instruction.op.name}: {reason}")
    *blocks, last = lowered.program["operations"]
    layers = []
    for i, block in enumerate(blocks):
        if block["operation"] != "linear_block":
            raise NotLowered(f"it runs chains of linear layers and a loss, got {block['operation']}")
        if block["x"] != [(i == 0, block["x"][0][1] if i == 0 else blocks[i - 1]["y"])]:
            raise NotLowered("the linear layers are no chain on the task's data")
        bias = block["w"][1] if len(block["w"]) > 1 else -1
        layers.append((block["in"], block["out"], block["activation"], block["slope"], block["w"][0], bias))
    if last["operation"] != "loss" or not blocks or last["x"] != [(False, blocks[-1]["y"])]:
        raise NotLowered("it runs chains of linear layers and a loss, got another ending")
    if len(blocks) > MOST_LAYERS:
        raise NotLowered(f"it runs at most {MOST_LAYERS} layers, got {len(blocks)}")
    if any(block["n"] != last["n"] for block in blocks):
        raise NotLowered("the layers do not all have the rows of the loss")
    if lowered.buffers or lowered.program["parameters"] != sum(1 + (layer[5] >= 0) for layer in layers):
        raise NotLowered("parameters or buffers are read outside of the layers")
    data = blocks[0]["x"][0][1], last["target"]
    return Chain(tuple(layers), (last["kind"], last["mean"], last["ignored"], last["n"]), data, blocks[-1]["y"])


class ResidentStep:
    """A meta-step that csrc/resident runs.

    Raises:
        NotLowered: the programs are no such chain, or the CUDA kernels are missing.
    """

    def __init__(self, support: Program, query: Program) -> None:
        extension = native.cuda_extension()
        if extension is None:
            raise NotLowered(native.cuda_missing_reason())
        graph = query.graph
        lowered = [lower(program, query.outer, Failures()) for program in (support, query)]
        self._chains = [chain_of(one) for one in lowered]
        if self._chains[0].layers != self._chains[1].layers or lowered[0].parameters != lowered[1].parameters:
            raise NotLowered("support and query do not read the same parameters")
        self._lowered = lowered[1]
        double = graph.values[graph.loss].dtype == torch.float64
        self._type = extension.Resident64 if double else extension.Resident32
        self._dtype = torch.float64 if double else torch.float32
        self._both = support, query
        self._has_output = len(graph.outputs) == 1 and lowered[1].program["output"] == self._chains[1].output
        self._outputs = [graph.values[slot] for slot in graph.outputs]
        self._differentiated = len(query.adapted) + len(query.outer)
        self._mutates = bool(graph.mutations)

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        """Whether this is a device that it is for."""
        return device.type == DEVICE

    def refusal(self, work: Work, *, outputs: bool) -> str:
        """Why no work of this kind can run here; empty where it can."""
        everything = (work.alpha, *work.parameters.values(), *leaves(work.support), *leaves(work.query))
        devices = {tensor.device for tensor in everything}
        if len(devices) > 1 or not self.runs_on(work.alpha.device):
            return f"tensors must be on one CUDA device, got {', '.join(sorted(map(str, devices)))}"
        if outputs and self._outputs and not self._has_output:
            return "the query outputs are not what the loss compares"
        if self._mutates and work.keep_mutations:
            return "running statistics are wanted"
        made = self._native(work, gradient=work.differentiate, learned=work.alpha.requires_grad)
        return made if isinstance(made, str) else ""

    def describe(self, work: Work) -> str:
        """What a block of threads holds, for ``explain()``."""
        made = self._native(work, gradient=work.differentiate, learned=work.alpha.requires_grad)
        block = f"one block of {made.threads} threads a task, with {made.shared_bytes / 1024:.1f} KiB of shared memory"
        block += "; inner steps are kept in global memory" if made.spilled else ""
        return f"{block}; the first layer by inner products of its rows" if made.factored else block

    def _native(self, work: Work, *, gradient: bool, learned: bool) -> Any:
        key = ResidentStep, gradient, learned
        made = work.memory.get(key)
        if made is None:
            layers, (kind, mean, ignored, rows) = self._chains[0].layers, self._chains[0].loss
            try:
                made = self._type(
                    layers=list(layers),
                    loss=kind,
                    mean=mean,
                    ignored=ignored,
                    support=rows,
                    query=self._chains[1].loss[3],
                    steps=work.steps,
                    gradient=gradient,
                    second_order=not work.first_order,
                    learned=learned,
                    rates=tuple(work.alpha.shape),
                    adapted=len(self._both[1].adapted),
                    differentiated=self._differentiated,
                    device=work.alpha.device.index or 0,
                )
            except ValueError as reason:
                made = str(reason)
            work.memory[key] = made
        return made

    def call(self, work: Work, cotangents: Cotangents | None, *, learned: bool, outputs: bool) -> ResidentCall | str:
        """What runs meta-steps of this kind, or why nothing does; found out once for a prepared ``work``."""
        if cotangents is not None and cotangents.outputs and any(d is not None for d in cotangents.outputs):
            return "an objective on the query outputs is differentiated"
        gradient = cotangents is not None
        key = ResidentCall, gradient, learned, outputs
        call: ResidentCall | str | None = work.memory.get(key)
        if call is None:
            made = self.refusal(work, outputs=outputs) or self._native(work, gradient=gradient, learned=learned)
            call = made if isinstance(made, str) else self._call(work, made, gradient, learned, outputs)
            work.memory[key] = call
        return call

    def _call(self, work: Work, made: Any, gradient: bool, learned: bool, outputs: bool) -> ResidentCall:
        names = self._lowered.parameters
        parameters = [work.parameters[name] for name in names]
        first = None
        if made.factored:
            number = self._chains[0].layers[0][4]
            moves = not work.first_order and work.steps > 0
            first = FirstLayer(parameters[number], number, gradient and number < self._differentiated, moves)
        differentiated = parameters[: self._differentiated]
        shapes = [tuple(p.shape) for p in differentiated if first is None or p is not first.weight]
        starts = accumulate((math.prod(shape) for shape in shapes), initial=0)
        wanted = [(shape, _strides(shape), start) for shape, start in zip(shapes, starts, strict=False)]
        return ResidentCall(
            made,
            parameters,
            first,
            (len(self._both[1].adapted), wanted) if gradient else None,
            learned and gradient,
            outputs,
            tuple(self._outputs[0].shape) if outputs and self._outputs else None,
            tuple(chain.data for chain in self._chains),
            work.alpha.device,
        )


def _stream(device: int) -> int:
    """Address of the device's current stream, without the object around it."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of elements that lie row by row."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass
class FirstLayer:
    """A factored first layer: what blocks of threads are given of it, and its meta-gradient of what they return.

    Attributes:
        weight: ``[out, in]``.
        number: its place among the parameters.
        differentiated: whether it gets a gradient.
        moves: whether that has a part of the support set: exact ones have, eq. (12).
    """

    weight: Tensor
    number: int
    differentiated: bool
    moves: bool

    def before(self, sets: tuple[Tensor, Tensor]) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        """Inner products of both sets' rows with the support set's, ``[T, N, N_s]``; and ``first`` of a run."""
        rows = [self._rows(x) for x in sets]
        weight, across = self.weight.detach().t(), rows[0].transpose(1, 2)
        bases = [x @ weight for x in rows]
        coefficients = [torch.empty_like(base) if self.differentiated else None for base in bases]
        return [x @ across for x in rows], (*bases, *coefficients)

    def gradient(self, sets: tuple[Tensor, Tensor], first: tuple[Tensor | None, ...]) -> Tensor:
        """``sum_t C_t^T x_t`` over the query set and, where the weight moves, the support set: ``[out, in]``."""
        rows = [self._rows(x).flatten(0, 1) for x in sets]
        support, query = (c.flatten(0, 1).t() for c in first[2:] if c is not None)
        found = query @ rows[1]
        return found.addmm_(support, rows[0]) if self.moves else found

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.weight.shape[1])


@dataclass
class ResidentCall:
    """Runs meta-steps of one kind; see :meth:`ResidentStep.call`.

    Attributes:
        native: ``Resident32`` or ``Resident64`` of the extension.
        parameters: in the program's order.
        first: the first layer, where it is factored.
        wanted: how many adapt, and of all that get a gradient, but a factored first layer's weight, shape, strides and
            place in the flat one; ``None`` where no gradient is wanted.
        learned: whether the rates get a gradient.
        losses: whether the losses of each task and step are wanted.
        outputs: shape of a task's query outputs, where those are wanted.
        data: of support and query set, which leaves are inputs and targets.
        device: where everything lies.
    """

    native: Any
    parameters: list[Tensor]
    first: FirstLayer | None
    wanted: tuple[int, list[tuple[tuple[int, ...], tuple[int, ...], int]]] | None
    learned: bool
    losses: bool
    outputs: tuple[int, ...] | None
    data: tuple[tuple[int, int], ...]
    device: torch.device

    def run(self, work: Work, cotangents: Cotangents | None) -> Evaluation:
        """Run the meta-step on the device's current stream; see :func:`fastmeta.engine.meta_step.evaluate`.

        Nothing waits for the device unless ``work.check_finite``, and a CUDA graph can capture it.
        """
        if torch.cuda.current_device() == self.device.index:
            return self._run(work, cotangents)
        with torch.cuda.device(self.device):
            return self._run(work, cotangents)

    def _run(self, work: Work, cotangents: Cotangents | None) -> Evaluation:
        alpha, empty = work.alpha, self.parameters[0].new_empty
        support, query = leaves(work.support), leaves(work.query)
        (x, y), (query_x, query_y) = self.data
        sets = support[x], query[query_x]
        first: tuple[Tensor | None, ...] = ()
        read: Sequence[Tensor] = sets
        if self.first is not None:
            read, first = self.first.before(sets)
        data = read[0], support[y], read[1], query[query_y]
        tasks = sets[0].shape[0]
        wants_losses = self.losses or work.check_finite
        loss = empty(())
        losses, support_losses = _NONE, _NONE
        if wants_losses:
            losses, support_losses = empty(tasks), empty((work.steps, tasks))
        outputs = None if self.outputs is None else empty((tasks, *self.outputs))
        flat = None if self.wanted is None else empty(self.native.gradient_elements)
        d_alpha = None
        if self.learned:
            d_alpha = empty(alpha.shape) if work.steps else alpha.new_zeros(alpha.shape)
        room = self.native.workspace_elements(tasks)
        self.native.run(
            tasks,
            self.parameters,
            data,
            alpha,
            None if cotangents is None else cotangents.losses,
            loss,
            losses if wants_losses else None,
            support_losses if wants_losses else None,
            outputs,
            flat,
            d_alpha,
            first,
            empty(room),
            room,
            _stream(self.device.index),
        )
        if work.check_finite:
            for k in range(work.steps):
                require_finite(support_losses[k], f"support loss at inner step {k}")
            require_finite(losses, "query loss")
        gradient = None
        if self.wanted is not None and flat is not None:
            adapted, places = self.wanted
            gradients = [flat.as_strided(*place) for place in places]
            if self.first is not None and self.first.differentiated:
                gradients.insert(self.first.number, self.first.gradient(sets, first))
            gradient = MetaGradient(gradients[:adapted], [*gradients[adapted:]], d_alpha)
        return Evaluation(loss, losses, support_losses, [] if outputs is None else [outputs], gradient, [])
