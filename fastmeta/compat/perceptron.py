"""A perceptron read off the graph of its loss, with its gradient and the gradient's pull-back in one sweep each.

Autograd's graph of a loss says what was computed, whichever module did it. :func:`recognised` reads a squared error or
a cross entropy of a chain of affine maps and activations,

    z_l = a_{l-1} W_l^T + b_l,   a_l = phi_l(z_l),   a_0 = x,

whose ``W_l`` and ``b_l`` are the parameters themselves; anything else is not one. Its gradient is ``d_l^T a_{l-1}`` and
``sum d_l`` with ``d_l = dL/dz_l = phi_l'(z_l) (d_{l+1} W_{l+1})`` (docs/maths.md, section 2), by the operations that
autograd calls. The gradient's derivative is symmetric. So its pull-back of cotangents ``V_l, v_l`` is the tangent of
both sweeps along them,

    z'_l = a'_{l-1} W_l^T + a_{l-1} V_l^T + v_l,   a'_l = phi_l' z'_l,   a'_0 = 0,
    d'_l = phi_l' (d'_{l+1} W_{l+1} + d_{l+1} V_{l+1}) + phi_l'' z'_l (d_{l+1} W_{l+1}),

begun by the loss's second derivative times ``z'``: ``d'_l^T a_{l-1} + d_l^T a'_{l-1}`` and ``sum d'_l``. Autograd comes
to the same through two to three times as many operations, and records each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_threshold_backward = torch.ops.aten.threshold_backward.default
_tanh_backward = torch.ops.aten.tanh_backward.default
_sigmoid_backward = torch.ops.aten.sigmoid_backward.default
_mse_loss_backward = torch.ops.aten.mse_loss_backward.default
_nll_loss_backward = torch.ops.aten.nll_loss_backward.default
_REDUCTIONS = {1: "mean", 2: "sum"}  # as PyTorch numbers them
_OWN = (Tensor, torch.nn.Parameter)

Tensors = list[Tensor]
Partial = Sequence[Tensor | None]


class Curve(NamedTuple):
    """An activation, whose derivatives are functions of its result.

    Attributes:
        value: ``phi``.
        slope: ``(g, a) -> phi' g``, as autograd computes it.
        bend: ``(phi' g, a, z') -> phi'' z' g``; ``None`` where ``phi''`` is 0.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    bend: Callable[[Tensor, Tensor, Tensor], Tensor] | None


_CURVES = {
    "ReluBackward0": Curve(torch.relu, lambda g, a: _threshold_backward(g, a, 0), None),
    "TanhBackward0": Curve(torch.tanh, _tanh_backward, lambda d, a, dot: (d * a).mul_(dot).mul_(-2)),
    "SigmoidBackward0": Curve(
        torch.sigmoid, _sigmoid_backward, lambda d, a, dot: torch.addcmul(d, d, a, value=-2).mul_(dot)
    ),
}


class Layer(NamedTuple):
    """An affine map and the activation that follows it.

    Attributes:
        weight: the place of ``W`` among the parameters.
        bias: that of ``b``; ``None`` without one.
        curve: the activation; ``None`` without one.
    """

    weight: int
    bias: int | None
    curve: Curve | None


class SquaredError(NamedTuple):
    """``torch.nn.functional.mse_loss``; keeps the targets."""

    reduction: int

    def value(self, out: Tensor, kept: Tensors) -> Tensor:
        """The loss of ``out``."""
        return F.mse_loss(out, kept[0], reduction=_REDUCTIONS[self.reduction])

    def gradient(self, out: Tensor, targets: Tensor) -> tuple[Tensor, Tensors]:
        """By ``out``, and what is kept."""
        return _mse_loss_backward(out.new_ones(()), out, targets, self.reduction), [targets]

    def second(self, dot: Tensor, kept: Tensors) -> Tensor:
        """The second derivative times ``dot``."""
        return dot * (2 / dot.numel() if self.reduction == 1 else 2)


class CrossEntropy(NamedTuple):
    """``torch.nn.functional.cross_entropy`` of classes; keeps targets, log probabilities and the gradient by these."""

    reduction: int
    ignored: int

    def value(self, out: Tensor, kept: Tensors) -> Tensor:
        """The loss of ``out``."""
        return F.cross_entropy(out, kept[0], reduction=_REDUCTIONS[self.reduction], ignore_index=self.ignored)

    def gradient(self, logs: Tensor, targets: Tensor, total: Tensor) -> tuple[Tensor, Tensors]:
        """``G - p sum G`` with ``G`` that by the log probabilities, and what is kept."""
        by_logs = _nll_loss_backward(logs.new_ones(()), logs, targets, None, self.reduction, self.ignored, total)
        return torch._log_softmax_backward_data(by_logs, logs, 1, logs.dtype), [targets, logs, by_logs]

    def second(self, dot: Tensor, kept: Tensors) -> Tensor:
        """The second derivative times ``dot``: ``-sum G (p dot - p (p . dot))``."""
        _, logs, by_logs = kept
        return torch._softmax_backward_data(dot, logs.exp(), 1, dot.dtype).mul_(by_logs.sum(1, keepdim=True).neg_())


class Sweep(NamedTuple):
    """What the gradient's pull-back needs of the sweeps before.

    Attributes:
        inputs: ``a_{l-1}`` of every layer.
        transposed: ``W_l^T`` of every layer but the first.
        last: the result of the last layer's activation; ``None`` without one.
        ds: ``d_l`` of every layer.
        kept: what the loss keeps.
    """

    inputs: Tensors
    transposed: Tensors
    last: Tensor | None
    ds: Tensors
    kept: Tensors


class Perceptron(NamedTuple):
    """Layers, first to last, and the loss of the last one's result."""

    layers: tuple[Layer, ...]
    loss: SquaredError | CrossEntropy

    def value(self, parameters: Sequence[Tensor], sweep: Sweep) -> Tensor:
        """The loss, in autograd's graph."""
        out = sweep.inputs[0]
        for weight, bias, curve in self.layers:
            out = F.linear(out, parameters[weight], None if bias is None else parameters[bias])
            out = out if curve is None else curve.value(out)
        return self.loss.value(out, sweep.kept)

    def gradient(
        self, number: int, of_loss: Tensors, inputs: Tensors, transposed: Tensors, last: Tensor | None
    ) -> tuple[list[Any], Sweep]:
        """By each of ``number`` parameters, and the sweep."""
        gradients: list[Any] = [None] * number
        d, kept = self.loss.gradient(*of_loss)
        ds, results = list(inputs), list[Any]([*inputs[1:], last])
        for i in range(len(self.layers) - 1, -1, -1):
            weight, bias, curve = self.layers[i]
            if curve is not None:
                d = curve.slope(d, results[i])
            ds[i] = d
            gradients[weight] = torch.mm(d.t(), inputs[i])
            if bias is not None:
                gradients[bias] = d.sum(0)
            if i:
                d = torch.mm(d, transposed[i - 1].t())
        return gradients, Sweep(inputs, transposed, last, ds, kept)

    def pullback(self, sweep: Sweep, along: Partial, onto: Partial, rate: float) -> list[Tensor | None]:
        """``onto`` plus ``rate`` times the second derivative of the loss times ``along``, each one for each parameter.

        A result is ``None`` where it is 0.
        """
        inputs, transposed, last, ds, kept = sweep
        results: list[Any] = [*inputs[1:], last]
        dot: Tensor | None = None
        dots, z_dots = [], []
        for i, (weight, bias, curve) in enumerate(self.layers):
            dots.append(dot)
            dot = _affine_tangent(
                inputs[i], transposed[i - 1] if i else None, dot, along[weight], None if bias is None else along[bias]
            )
            z_dots.append(dot)
            if curve is not None and dot is not None:
                dot = curve.slope(dot, results[i])
        found = list(onto)
        d_dot = None if dot is None else self.loss.second(dot, kept)
        for i in range(len(self.layers) - 1, -1, -1):
            weight, bias, curve = self.layers[i]
            d = ds[i]
            if curve is not None:
                d_dot = None if d_dot is None else curve.slope(d_dot, results[i])
                z_dot = z_dots[i]
                if curve.bend is not None and z_dot is not None:
                    d_dot = _sum(d_dot, curve.bend(d, results[i], z_dot), 1.0)
            if dots[i] is not None:
                found[weight] = _product(found[weight], d.t(), dots[i], rate)
            if d_dot is not None:
                found[weight] = _product(found[weight], d_dot.t(), inputs[i], rate)
                if bias is not None:
                    found[bias] = _sum(onto[bias], d_dot.sum(0), rate)
            if i:
                d_dot = None if d_dot is None else torch.mm(d_dot, transposed[i - 1].t())
                if along[weight] is not None:
                    d_dot = _product(d_dot, d, along[weight], 1.0)
        return found


def _affine_tangent(
    x: Tensor, transposed: Tensor | None, x_dot: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """``x' W^T + x W'^T + b'``; ``None`` where it is 0."""
    if x_dot is None:
        if weight is not None:
            return F.linear(x, weight, bias)
        return None if bias is None else bias.expand(x.shape[0], -1)
    z = torch.mm(x_dot, transposed) if bias is None else torch.addmm(bias, x_dot, transposed)  # type: ignore[arg-type]
    return z if weight is None else z.addmm_(x, weight.t())


def _product(base: Tensor | None, a: Tensor, b: Any, rate: float) -> Tensor:
    """``base + rate a b``."""
    if base is not None:
        return torch.addmm(base, a, b, alpha=rate)
    return torch.mm(a, b) if rate == 1 else torch.mm(a, b).mul_(rate)


def _sum(base: Tensor | None, x: Tensor, rate: float) -> Tensor:
    """``base + rate x``."""
    if base is not None:
        return torch.add(base, x, alpha=rate)
    return x if rate == 1 else x * rate


class Recognised(NamedTuple):
    """A perceptron, the places of its parameters among those that were given, and the arguments of ``gradient``."""

    net: Perceptron
    places: list[int]
    tensors: tuple[Tensors, Tensors, Tensors, Tensor | None]


def recognised(loss: Tensor, parameters: Sequence[Tensor]) -> Recognised | None:
    """The perceptron whose ``loss`` this is, if it is one and nothing but ``parameters`` in it is differentiable.

    It has been computed on a matrix of rows by ``torch``'s own operations, all its weights and biases are among the
    parameters, once each, and none of these depends on another. Neither the parameters nor, as far as the graph shows
    them, the results in between have hooks or retain their gradients: those that an activation is applied to are not
    seen, nor is the argument of a cross entropy.

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
    measure, tensors, node = head
    layers, inputs, transposed = list[Layer](), Tensors(), Tensors()
    last: Tensor | None = None
    while node is not None:
        curve = _CURVES.get(type(node).__name__)
        if curve is not None:
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
        if before is not None:
            transposed.append(node._saved_mat2)
        layers.append(Layer(weight, bias, curve))
        inputs.append(x)
        node = before
    used = [place for layer in layers for place in layer[:2] if place is not None]
    order = sorted(set(used))
    if len(order) != len(used) or tensors[0].dtype != inputs[0].dtype:
        return None
    if len(order) != len(parameters):
        layers = [Layer(order.index(w), None if b is None else order.index(b), curve) for w, b, curve in layers]
    net = Perceptron(tuple(layers[::-1]), measure)
    return Recognised(net, order, (tensors, inputs[::-1], transposed[::-1], last))


def _watched(tensor: Tensor) -> bool:
    return tensor._backward_hooks is not None or tensor.retains_grad


def _head(node: Any) -> tuple[SquaredError | CrossEntropy, Tensors, Any] | None:
    """The loss, its tensors, and the node that made its argument."""
    kind = type(node).__name__
    if kind == "MseLossBackward0":
        (before, _), (targets, _) = node.next_functions
        out = node._saved_self
        if targets is not None or node._saved_reduction not in _REDUCTIONS or _watched(out):
            return None
        return SquaredError(node._saved_reduction), [out, node._saved_target], before
    if kind == "NllLossBackward0":
        softmax = node.next_functions[0][0]
        logs = node._saved_self
        if type(softmax).__name__ != "LogSoftmaxBackward0" or softmax._saved_dim != 1 or logs.dim() != 2:
            return None
        if node._saved_weight is not None or node._saved_reduction not in _REDUCTIONS or _watched(logs):
            return None
        ignored = node._saved_ignore_index
        loss = CrossEntropy(node._saved_reduction, ignored - (ignored >> 63 << 64))  # read as if it had no sign
        return loss, [logs, node._saved_target, node._saved_total_weight], softmax.next_functions[0][0]
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
