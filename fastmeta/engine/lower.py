"""``lower``: a program as the flat list of operations that the native executor walks, where it has kernels for them.

Neighbouring instructions become one operation: a linear layer and its activation; a convolution with the normalisation,
activation and pooling that follow. Values that only change their shape are renamed. What has no kernel raises
:class:`NotLowered` with the reason, and the reference executor runs the program.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastmeta.engine.program import Instruction, Program

# Calls that leave a contiguous tensor's elements in place.
RENAMES = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.default"),
        *("squeeze.dim", "squeeze.dims", "flatten.using_ints", "unflatten.int", "alias.default", "clone.default"),
    )
)
ACTIVATIONS = {
    "aten.relu.default": "relu",
    "aten.leaky_relu.default": "leaky_relu",
    "aten.tanh.default": "tanh",
    "aten.sigmoid.default": "sigmoid",
    "aten.silu.default": "silu",
    "aten.gelu.default": "gelu",
}
NONE, MEAN = 0, 1  # ATen's codes of a loss's reduction


class NotLowered(Exception):
    """A program the native executor cannot run; the message is the reason ``explain()`` shows."""


@dataclass(frozen=True)
class Lowered:
    """What the native executor is given.

    Attributes:
        program: its operations and counts, as csrc/executor/bind.cpp reads them.
        parameters: names in the program's order: adapted, otherwise differentiated, others.
        output: rows and features of the query output that can be had, if there is exactly one.
    """

    program: dict[str, Any]
    parameters: tuple[str, ...]
    output: tuple[int, int] | None


@dataclass(frozen=True)
class _Data:
    """A tensor of the task's batch: its index among the leaves."""

    index: int


@dataclass(frozen=True)
class _Rows:
    """A value of the native executor: rows of features, whatever shape the graph sees them in."""

    index: int
    rows: int
    features: int


@dataclass(frozen=True)
class _Images:
    """A value of the native executor: images with their channels last."""

    index: int
    count: int
    channels: int
    height: int
    width: int


def lower(program: Program, outer: tuple[str, ...]) -> Lowered:
    """Lower ``program``.

    Args:
        program: the planned program.
        outer: names of the parameters that do not adapt and get a gradient.

    Raises:
        NotLowered: an operation, a shape or a dtype without native kernels.
    """
    return _Lowering(program, outer).run()


@dataclass
class _Lowering:
    program: Program
    outer: tuple[str, ...]
    held: dict[int, _Data | _Rows | _Images] = field(default_factory=dict)  # by slot
    operations: list[dict[str, Any]] = field(default_factory=list)
    names: tuple[str, ...] = ()

    def run(self) -> Lowered:
        graph, program = self.program.graph, self.program
        needed = self._needed()
        read = {slot for i in needed for slot in i.inputs}
        self.slots = {slot: name for name, slot in graph.parameters.items()}
        wanted = (*program.adapted, *self.outer)
        others = [n for n, slot in graph.parameters.items() if slot in read and n not in wanted]
        self.names = (*wanted, *others)
        unread = [n for n in wanted if graph.parameters[n] not in read]
        if unread:
            raise NotLowered(f"parameter {unread[0]} is not used")
        dtypes = {graph.values[graph.parameters[name]].dtype for name in self.names}
        if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
            raise NotLowered(f"parameters must all be float32 or all float64, got {sorted(map(str, dtypes))}")
        self.dtype = dtypes.pop()
        self.held = {slot: _Data(i) for i, slot in enumerate(graph.data)}
        self.readers = Counter(slot for i in needed for slot in i.inputs)
        self.consumed: set[int] = set()  # values of the native program that have their one reader
        pending = needed
        while pending:
            pending = pending[self._next(pending) :]
        return self._result()

    def _needed(self) -> list[Instruction]:
        """The instructions that loss and outputs depend on: those that only count a buffer up are left out."""
        needed = {self.program.graph.loss, *self.program.graph.outputs}
        kept = []
        for instruction in reversed(self.program.instructions):
            if needed.intersection(instruction.outputs):
                needed.update(instruction.inputs)
                kept.append(instruction)
        return kept[::-1]

    def _next(self, pending: list[Instruction]) -> int:
        """Lower the first of the pending instructions, with those it takes along; return how many that were."""
        first = pending[0]
        if self._renames(first):
            return 1
        handler: Callable[[list[Instruction]], int] | None = {
            "linear": self._linear,
            "conv2d": self._convolution,
            "mse": self._squared_error,
            "cross_entropy": self._cross_entropy,
            "bce_with_logits": self._binary_cross_entropy,
        }.get(first.op.name)
        if handler is None:
            raise NotLowered(f"{first.op.name} ({first.op.call.target}) has no native kernel of its own")
        return handler(pending)

    def _renames(self, instruction: Instruction) -> bool:
        call = instruction.op.call
        target = str(call.target)
        same = all(i.shape == o.shape and i.dtype == o.dtype for i, o in zip(call.inputs, call.outputs, strict=False))
        if target == "aten.broadcast_tensors.default" and same:
            pairs = list(zip(instruction.inputs, instruction.outputs, strict=True))
        elif target in RENAMES and call.inputs[0].dtype == call.outputs[0].dtype:
            pairs = [(instruction.inputs[0], instruction.outputs[0])]
        else:
            return False
        for old, new in pairs:
            if old not in self.held:
                raise NotLowered(f"{target} of a parameter or buffer")
            value = self.held[old]
            whole = len(self.program.graph.values[new].shape) != 4  # no longer images, but rows
            self.held[new] = self._flattened(value, new) if isinstance(value, _Images) and whole else value
        return True

    def _linear(self, pending: list[Instruction]) -> int:
        instruction = pending[0]
        op: Any = instruction.op
        source = self._source(instruction.inputs[0], op.rows, op.fan_in)
        weights = [self._parameter(slot) for slot in instruction.inputs[1:]]
        taken, activation, slope = self._activation(pending)
        shape = {"n": op.rows, "in": op.fan_in, "out": op.fan_out, "activation": activation, "slope": slope}
        self._emit("linear_block", shape, [source], weights, pending[taken - 1].outputs[0], op.rows, op.fan_out)
        return taken

    def _flattened(self, value: _Images, slot: int) -> _Rows:
        """Images as rows; a new operation unless they have one pixel, whose layout is that of rows already."""
        shape = self.program.graph.values[slot].shape
        pixels = value.height * value.width
        if shape != (value.count, value.channels * pixels):
            raise NotLowered(f"images read as {shape}")
        if pixels == 1:
            return _Rows(value.index, value.count, value.channels)
        described = {"n": value.count, "channels": value.channels, "pixels": pixels}
        return self._emit("flatten", described, [self._consume(value)], [], slot, value.count, value.channels * pixels)

    def _convolution(self, pending: list[Instruction]) -> int:
        instruction = pending[0]
        geometry = instruction.op.geometry  # type: ignore[attr-defined]
        n, channels, height, width = geometry.x_shape
        out, _, *kernel = geometry.weight_shape
        source = self._image_source(instruction.inputs[0], geometry.x_shape)
        weights = [self._parameter(slot) for slot in instruction.inputs[1:]]
        weights += [-1] * (2 - len(weights))
        shape: dict[str, Any] = {"n": n, "in": channels, "height": height, "width": width, "out": out}
        shape |= {"kernel": tuple(kernel), "stride": geometry.stride, "padding": geometry.padding}
        shape |= {"dilation": geometry.dilation, "groups": geometry.groups}
        taken, norm, scales = self._norm(pending)
        more, activation, slope = self._activation(pending[taken - 1 :])
        taken += more - 1
        shape |= norm | {"activation": activation, "slope": slope}
        more, pool = self._pool(pending[taken - 1 :])
        taken += more
        y = pending[taken - 1].outputs[0]
        index = len(self.operations)
        self._add("conv_block", shape | pool, [source], weights + scales)
        self.held[y] = _Images(index, *self.program.graph.values[y].shape)
        return taken

    def _norm(self, pending: list[Instruction]) -> tuple[int, dict[str, Any], list[int]]:
        """The batch norm that follows the first instruction, as ``(instructions so far, description, weights)``."""
        second = self._follower(pending)
        if second is None or second.op.name != "batch_norm":
            return 1, {"norm": "none", "eps": 0.0}, [-1, -1]
        op: Any = second.op
        if not op.uses_batch_statistics:
            raise NotLowered("batch norm by running statistics")
        if (op.scale is None) != (op.shift is None):
            raise NotLowered("batch norm with one of weight and bias")
        scales = [-1 if at is None else self._parameter(second.inputs[at]) for at in (op.scale, op.shift)]
        return 2, {"norm": "batch", "eps": op.eps}, scales

    def _pool(self, pending: list[Instruction]) -> tuple[int, dict[str, Any]]:
        """The pooling that follows the first instruction, as ``(instructions taken, description)``."""
        second = self._follower(pending)
        kinds = {"max_pool": "max", "average_pool": "average"}
        nothing = {"pool": "none", "pool_kernel": (1, 1), "pool_stride": (1, 1), "pool_padding": (0, 0)}
        if second is None or second.op.name not in kinds:
            return 0, nothing
        window = getattr(second.op, "window", None)
        if window is None or window.ceil_mode or tuple(window.dilation) != (1, 1) or not self._plain_average(second):
            return 0, nothing
        described = {
            "pool": kinds[second.op.name],
            "pool_kernel": tuple(window.kernel),
            "pool_stride": tuple(window.stride),
        }
        return 1, described | {"pool_padding": tuple(window.padding)}

    @staticmethod
    def _plain_average(instruction: Instruction) -> bool:
        """Whether an average divides by the window's size, padding counted, or has no padding to count."""
        arguments = instruction.op.call.arguments
        padded = any(arguments.get("padding", [0]))
        return arguments.get("divisor_override") is None and (
            bool(arguments.get("count_include_pad", True)) or not padded
        )

    def _follower(self, pending: list[Instruction]) -> Instruction | None:
        """The instruction after the first one, if it is the only one to read its result."""
        between = pending[0].outputs[0]
        alone = self.readers[between] == 1 and between not in self.program.graph.outputs
        return pending[1] if len(pending) > 1 and alone and pending[1].inputs[0] == between else None

    def _image_source(self, slot: int, shape: tuple[int, ...]) -> tuple[bool, int]:
        value = self.held.get(slot)
        if isinstance(value, _Data):
            return self._source(slot, 0, 0)
        n, channels, height, width = shape
        if not isinstance(value, _Images) or (value.count, value.channels, value.height, value.width) != shape:
            raise NotLowered(f"a value read as images {n}x{channels}x{height}x{width}")
        return self._consume(value)

    def _activation(self, pending: list[Instruction]) -> tuple[int, str, float]:
        """The activation that follows the first instruction, if nothing else reads what lies between."""
        second = self._follower(pending)
        if second is not None:
            call = second.op.call
            name = ACTIVATIONS.get(str(call.target))
            if name is not None and (name != "gelu" or call["approximate"] == "none"):
                return 2, name, float(call["negative_slope"]) if name == "leaky_relu" else 0.0
        return 1, "identity", 0.0

    def _squared_error(self, pending: list[Instruction]) -> int:
        op: Any = pending[0].op
        prediction, target = pending[0].inputs
        if isinstance(self.held.get(prediction), _Data):
            prediction, target = target, prediction
        return self._loss(pending, "squared_error", prediction, target, op.reduction)

    def _binary_cross_entropy(self, pending: list[Instruction]) -> int:
        op: Any = pending[0].op
        if op.weight is not None or op.positive is not None:
            raise NotLowered("binary cross-entropy with weights")
        return self._loss(pending, "binary_cross_entropy", pending[0].inputs[0], pending[0].inputs[1], op.reduction)

    def _cross_entropy(self, pending: list[Instruction]) -> int:
        op: Any = pending[0].op
        if op.weight is not None or op.smoothing or not op.is_rows:
            raise NotLowered("cross-entropy with class weights, label smoothing or more axes than [N, C]")
        prediction, target = pending[0].inputs
        return self._loss(pending, "cross_entropy", prediction, target, op.reduction, op.ignored)

    def _loss(
        self, pending: list[Instruction], kind: str, prediction: int, target: int, reduction: int, ignored: int = 0
    ) -> int:
        graph = self.program.graph
        if pending[0].outputs[0] != graph.loss or len(pending) > 1 or reduction == NONE:
            raise NotLowered("the loss is not the mean or the sum of one loss function")
        rows, data = self.held.get(prediction), self.held.get(target)
        if not isinstance(rows, _Rows) or not isinstance(data, _Data):
            raise NotLowered("the loss does not compare a prediction with the task's own targets")
        shape, value = graph.values[target], graph.values[prediction].shape
        wanted = (torch.int64, rows.rows) if kind == "cross_entropy" else (self.dtype, rows.rows * rows.features)
        if (shape.dtype, math.prod(shape.shape)) != wanted or (kind == "cross_entropy" and value[-1] != rows.features):
            raise NotLowered(f"targets of {shape.dtype} {shape.shape} for outputs {value}")
        described = {"kind": kind, "n": rows.rows, "features": rows.features, "mean": reduction == MEAN}
        described["ignored"] = ignored
        self._emit("loss", described, [self._consume(rows)], [], graph.loss, 1, 1, target=data.index)
        return 1

    def _source(self, slot: int, rows: int, features: int) -> tuple[bool, int]:
        value = self.held.get(slot)
        if isinstance(value, _Data):
            if self.program.graph.values[slot].dtype != self.dtype:
                raise NotLowered(f"an input of {self.program.graph.values[slot].dtype}")
            return True, value.index
        if value is None:
            raise NotLowered("an operation on parameters or buffers alone")
        if not isinstance(value, _Rows):
            raise NotLowered("images read as rows")
        if (value.rows, value.features) != (rows, features):
            raise NotLowered(f"rows of {value.features} elements read as rows of {features}")
        return self._consume(value)

    def _consume(self, value: _Rows | _Images) -> tuple[bool, int]:
        if value.index in self.consumed:
            raise NotLowered("a value with several readers")
        self.consumed.add(value.index)
        return False, value.index

    def _parameter(self, slot: int) -> int:
        if slot not in self.slots:
            raise NotLowered("a weight that is computed, or a buffer")
        if self.readers[slot] > 1:
            raise NotLowered(f"parameter {self.slots[slot]} has several readers")
        return self.names.index(self.slots[slot])

    def _emit(
        self,
        operation: str,
        shape: dict[str, Any],
        x: list[tuple[bool, int]],
        w: list[int],
        slot: int,
        rows: int,
        features: int,
        target: int = -1,
    ) -> _Rows:
        value = _Rows(len(self.operations), rows, features)
        self._add(operation, shape, x, w, target)
        self.held[slot] = value
        return value

    def _add(
        self, operation: str, shape: dict[str, Any], x: list[tuple[bool, int]], w: list[int], target: int = -1
    ) -> None:
        y = len(self.operations)
        self.operations.append({"operation": operation, **shape, "x": x, "w": w, "target": target, "y": y})

    def _result(self) -> Lowered:
        program = self.program
        outputs = [self.held.get(slot) for slot in program.graph.outputs]
        output = outputs[0] if len(outputs) == 1 and isinstance(outputs[0], _Rows) else None
        described = {
            "operations": self.operations,
            "values": len(self.operations),
            "output": -1 if output is None else output.index,
            "adapted": len(program.adapted),
            "differentiated": len(program.adapted) + len(self.outer),
            "parameters": len(self.names),
        }
        return Lowered(described, self.names, None if output is None else (output.rows, output.features))
