"""A perceptron read off the graph of its loss.

Autograd's graph of a loss says what was computed, whichever module did it. :func:`recognised` reads a squared error or
a cross entropy of a chain of affine maps and activations,

    z_l = a_{l-1} W_l^T + b_l,   a_l = phi_l(z_l),   a_0 = x,

whose ``W_l`` and ``b_l`` are the parameters themselves; anything else is not one. csrc/perceptron pulls its gradient
back in one sweep. Autograd comes to the same through two to three times as many operations, and records each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.core import native

_REDUCTIONS = {1: "mean", 2: "sum"}  # as PyTorch numbers them
_mse_loss_backward = torch.ops.aten.mse_loss_backward.default
_nll_loss_backward = torch.ops.aten.nll_loss_backward.default
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": functools.partial(torch.ops.aten.threshold_backward.default, threshold=0),
    "tanh": torch.ops.aten.tanh_backward.default,
    "sigmoid": torch.ops.aten.sigmoid_backward.default,
}
_OWN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64)
_ACTIVATIONS = {"ReluBackward0": "relu", "TanhBackward0": "tanh", "SigmoidBackward0": "sigmoid"}
_LAYERS = 32  # as many as csrc/perceptron takes
_LARGE = 1 << 23  # products of two numbers in a layer, from which on PyTorch's own take the most time

Tensors = list[Tensor]


class Layer(NamedTuple):
    """An affine map and the activation that follows it.

    Attributes:
        weight: the place of ``W`` among the parameters.
        bias: that of ``b``; ``None`` without one.
        activation: ``"relu"``, ``"tanh"``, ``"sigmoid"`` or ``"identity"``.
        size: features of its input and of its result.
    """

    weight: int
    bias: int | None
    activation: str
    size: tuple[int, int]


class Measure(NamedTuple):
    """``torch.nn.functional.mse_loss``, or ``cross_entropy`` of labels.

    Attributes:
        squared: whether it is the former.
        reduction: ``"mean"`` or ``"sum"``.
        ignored: the label of rows that do not count.
    """

    squared: bool
    reduction: str
    ignored: int = 0


class Passed(NamedTuple):
    """What a forward pass has left.

    Attributes:
        inputs: ``a_{l-1}`` of every layer.
        last: the result of the last layer's activation; ``None`` without one.
        out: what the loss compares; of a cross entropy its log probabilities.
        target: with what.
        total: of a cross entropy, how many rows count.
    """

    inputs: Sequence[Tensor]
    last: Tensor | None
    out: Tensor
    target: Tensor
    total: Tensor | None = None


class Perceptron(NamedTuple):
    """Layers, first to last, and the loss of the last one's result."""

    layers: tuple[Layer, ...]
    loss: Measure

    def value(self, parameters: Sequence[Tensor], passed: Passed) -> Tensor:
        """The loss, in autograd's graph."""
        out = passed.inputs[0]
        for weight, bias, activation, _ in self.layers:
            out = F.linear(out, parameters[weight], None if bias is None else parameters[bias])
            out = out if activation == "identity" else getattr(torch, activation)(out)
        if self.loss.squared:
            return F.mse_loss(out, passed.target, reduction=self.loss.reduction)
        return F.cross_entropy(out, passed.target, reduction=self.loss.reduction, ignore_index=self.loss.ignored)

    def gradient(self, passed: Passed, parameters: Sequence[Tensor]) -> list[Tensor]:
        """By each parameter, by the operations that autograd calls."""
        gradients, reduction = list(parameters), 1 if self.loss.reduction == "mean" else 2
        once = passed.out.new_ones(())
        if self.loss.squared:
            d = _mse_loss_backward(once, passed.out, passed.target, reduction)
        else:
            total: Any = passed.total
            d = _nll_loss_backward(once, passed.out, passed.target, None, reduction, self.loss.ignored, total)
            d = torch._log_softmax_backward_data(d, passed.out, 1, d.dtype)
        results: list[Any] = [*passed.inputs[1:], passed.last]
        for i in range(len(self.layers) - 1, -1, -1):
            weight, bias, activation, _ = self.layers[i]
            if activation != "identity":
                d = _SLOPES[activation](d, results[i])
            gradients[weight] = torch.mm(d.t(), passed.inputs[i])
            if bias is not None:
                gradients[bias] = d.sum(0)
            if i:
                d = torch.mm(d, parameters[weight])
        return gradients

    def descended(self, passed: Passed, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor | None:
        """The derivatives of the loss by every ``z_l``; ``None`` where these do not lead to the ``gradients``."""
        kernel = self._kernel(passed.inputs[0])
        ds = passed.out.new_empty(kernel.elements)
        return ds if kernel.descend(passed, self._by_layer(parameters), self._by_layer(gradients), ds) else None

    def pull_back(
        self,
        passed: Passed,
        parameters: Sequence[Tensor],
        ds: Tensor,
        along: Sequence[Tensor | None],
        rate: float | None,
    ) -> list[Tensor]:
        """The second derivative ``H`` of the loss times ``along``, or with a ``rate`` ``along - rate H along``."""
        kernel = self._kernel(passed.inputs[0])
        results = iter(kernel.pull_back(passed, self._by_layer(parameters), ds, self._by_layer(along), rate))
        found = list[Any](parameters)
        for layer in self.layers:
            found[layer.weight], bias = next(results), next(results)
            if layer.bias is not None:
                found[layer.bias] = bias
        return found

    def _kernel(self, x: Tensor) -> Any:
        return _kernel(self, x.shape[0], x.dtype)

    def _by_layer(self, of: Sequence[Any]) -> list[Any]:
        """A weight and a bias of each layer, ``None`` where there is none."""
        return [None if i is None else of[i] for layer in self.layers for i in layer[:2]]


@functools.lru_cache(maxsize=64)
def _kernel(net: Perceptron, rows: int, dtype: torch.dtype) -> Any:
    extension = native.require("perceptron")
    kind = extension.Perceptron64 if dtype == torch.float64 else extension.Perceptron32
    layers = [(*layer.size, layer.bias is not None, layer.activation) for layer in net.layers]
    return kind(rows, layers, net.loss.squared, net.loss.reduction == "mean", net.loss.ignored)


class Recognised(NamedTuple):
    """A perceptron as part of a graph.

    Attributes:
        net: the perceptron.
        places: of its parameters, among those that were given.
        passed: what its forward pass has left.
        first: the number in sequence of the first node of its graph.
    """

    net: Perceptron
    places: list[int]
    passed: Passed
    first: int


def recognised(loss: Tensor, parameters: Sequence[Tensor]) -> Recognised | None:
    """The perceptron whose ``loss`` this is, if it is one and nothing but ``parameters`` in it is differentiable.

    It has been computed on a matrix of rows, on the CPU, by ``torch``'s own operations, all its weights and biases are
    among the parameters, once each, and none of these depends on another. Neither the parameters nor, as far as the
    graph shows them, the results in between have hooks or retain their gradients: those that an activation is applied
    to are not seen, nor is the argument of a cross entropy.

    Raises:
        RuntimeError: the graph has been freed, or a tensor in it was changed in place, as autograd raises.
    """
    if type(loss) is not Tensor or _watched(loss) or not torch.is_grad_enabled() or torch.is_anomaly_enabled():
        return None
    special = torch._C._are_functorch_transforms_active() or torch._C._is_any_autocast_enabled()
    head = None if special else _head(loss.grad_fn)
    places = None if head is None else _places(parameters)
    if head is None or places is None:
        return None
    measure, out, target, total, node = head
    if not out.is_cpu or out.dtype not in _DTYPES or native.extension() is None:
        return None
    layers, inputs = list[Layer](), Tensors()
    last: Tensor | None = None
    first = loss.grad_fn._sequence_nr()  # type: ignore[union-attr]
    while node is not None:
        activation = _ACTIVATIONS.get(type(node).__name__, "identity")
        if activation != "identity":
            if not layers:
                last = node._saved_result
            if (node, 0) in places:
                return None
            node = node.next_functions[0][0]
        affine = type(node).__name__
        bias: int | None = None
        if affine == "AddmmBackward0":
            added, (before, _), (turned, _) = node.next_functions
            bias = _place(added, places)
            if bias is None or parameters[bias].dim() != 1 or node._saved_alpha != 1 or node._saved_beta != 1:
                return None
            x = node._saved_mat1
        elif affine == "MmBackward0":
            (before, _), (turned, _) = node.next_functions
            x = node._saved_self
        else:
            return None
        if type(turned).__name__ != "TBackward0" or (node, 0) in places or (turned, 0) in places:
            return None
        weight = _place(turned.next_functions[0], places)
        if weight is None or (bias is not None and parameters[bias].shape[0] != parameters[weight].shape[0]):
            return None
        if type(x) is not Tensor or x.layout is not torch.strided or _watched(x):
            return None
        fan_out, fan_in = parameters[weight].shape
        if x.shape[0] * fan_in * fan_out > _LARGE or len(layers) == _LAYERS:
            return None
        layers.append(Layer(weight, bias, activation, (fan_in, fan_out)))
        inputs.append(x)
        first = min(first, turned._sequence_nr())
        node = before
    used = [place for layer in layers for place in layer[:2] if place is not None]
    order = sorted(set(used))
    if len(order) != len(used) or out.dtype != inputs[0].dtype or not out.numel():
        return None
    if len(order) != len(parameters):
        layers = [
            one._replace(weight=order.index(one.weight), bias=None if one.bias is None else order.index(one.bias))
            for one in layers
        ]
    passed = Passed(inputs[::-1], last, out, target, total)
    return Recognised(Perceptron(tuple(layers[::-1]), measure), order, passed, first)


def _watched(tensor: Tensor) -> bool:
    return tensor._backward_hooks is not None or tensor.retains_grad


def _head(node: Any) -> tuple[Measure, Tensor, Tensor, Tensor | None, Any] | None:
    """The loss, what it compares with what, how many rows count, and the node that made its argument."""
    kind = type(node).__name__
    if kind == "MseLossBackward0":
        (before, _), (targets, _) = node.next_functions
        out = node._saved_self
        if targets is not None or node._saved_reduction not in _REDUCTIONS or _watched(out):
            return None
        return Measure(True, _REDUCTIONS[node._saved_reduction]), out, node._saved_target, None, before
    if kind == "NllLossBackward0":
        softmax = node.next_functions[0][0]
        logs = node._saved_self
        if type(softmax).__name__ != "LogSoftmaxBackward0" or softmax._saved_dim != 1 or logs.dim() != 2:
            return None
        if node._saved_weight is not None or node._saved_reduction not in _REDUCTIONS or _watched(logs):
            return None
        target, ignored = node._saved_target, node._saved_ignore_index
        if target.dtype != torch.int64:
            return None
        measure = Measure(False, _REDUCTIONS[node._saved_reduction], ignored - (ignored >> 63 << 64))  # read unsigned
        return measure, logs, target, node._saved_total_weight, softmax.next_functions[0][0]
    return None


def _place(edge: tuple[Any, int], places: dict[Any, int]) -> int | None:
    """That of the parameter which an edge of the graph leads to."""
    return places.get(id(edge[0].variable) if type(edge[0]).__name__ == "AccumulateGrad" else edge)


def _places(parameters: Sequence[Tensor]) -> dict[Any, int] | None:
    """Of each parameter, by what the graph shows of it; ``None`` where one is watched, or may depend on another.

    None does if all are leaves, or results of one node, or different ones of these after cloning.
    """
    places = dict[Any, int]()
    sources, origins = set[Any](), set[Any]()
    for i, p in enumerate(parameters):
        if type(p) not in _OWN or p._backward_hooks is not None:
            return None
        node: Any = p.grad_fn
        edge: Any = id(p) if node is None else (node, p.output_nr)
        places[edge] = i
        if node is not None and node not in sources:  # the source of the one before needs no second look
            while type(node).__name__ == "CloneBackward0":
                edge = node.next_functions[0]
                node = edge[0]
            if type(node).__name__ == "AccumulateGrad":
                edge, node = id(node.variable), None
        origins.add(edge)
        sources.add(node)
    return places if len(sources) == 1 and len(origins) == len(parameters) else None
