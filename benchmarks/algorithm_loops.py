"""Each algorithm as the loop over tasks that one writes by hand: plain autograd, which its meta-step is timed beside.

A loop reads the settings and the learned tensors of an algorithm of fastmeta, and runs none of its code. What an
algorithm spares, its loop spares too: the features under ANIL's head are computed once a task, and nothing is kept of
the inner steps of Reptile and iMAML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

Named = dict[str, Tensor]
Run = Callable[[], Named]
TaskLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of (x, y) of the support set and of the query set


def loop_of(name: str, learner: Any, tasks: fm.TaskBatch) -> Run:
    """The loop for an algorithm of classification by ``cross_entropy``.

    Args:
        name: as ``fastmeta train --algorithm`` has it.
        learner: the algorithm, around a ``Sequential`` that ends in a linear layer; CAVIA's around a
            :class:`fastmeta.learner.models.Modulated`.
        tasks: ``(inputs, labels)`` each.

    Returns:
        what gives the gradients that ``learner.value_and_grad(tasks)`` does, by the same names.
    """
    return _LOOPS[name](learner, [(*support, *query) for support, query in map(tasks.task, range(len(tasks)))])


def _summed(wanted: Named, tasks: list[Any], loss: TaskLoss) -> Run:
    """Gradients of the mean of ``loss``, one task after the other, so that one graph is held at a time."""

    def run() -> Named:
        total = {n: torch.zeros_like(p) for n, p in wanted.items()}
        for task in tasks:
            found = torch.autograd.grad(loss(*task) / len(tasks), list(wanted.values()), allow_unused=True)
            for n, d in zip(wanted, found, strict=True):
                if d is not None:
                    total[n] += d
        return total

    return run


def _stepped(
    model: nn.Module, phi: Named, names: Iterable[str], x: Tensor, y: Tensor, create_graph: bool
) -> dict[str, Tensor]:
    """The gradient of the support loss at ``phi``."""
    inner = F.cross_entropy(functional_call(model, phi, (x,)), y)
    found = torch.autograd.grad(inner, [phi[n] for n in names], create_graph=create_graph)
    return dict(zip(names, found, strict=True))


def _maml(learner: Any, tasks: list[Any]) -> Run:
    """MAML, FOMAML and BOIL, whose head stays."""
    theta = dict(learner.model.named_parameters())
    names = [n for n in theta if not (isinstance(learner, fm.BOIL) and n.startswith(f"{len(learner.model) - 1}."))]

    def loss(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        phi = theta
        for _ in range(learner.steps):
            g = _stepped(learner.model, phi, names, xs, ys, not learner.first_order)
            phi = phi | {n: phi[n] - learner.lr * d for n, d in g.items()}
        return F.cross_entropy(functional_call(learner.model, phi, (xq,)), yq)

    return _summed(theta, tasks, loss)


def _anil(learner: Any, tasks: list[Any]) -> Run:
    body, head = learner.model[:-1], learner.model[-1]

    def loss(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        features, phi = body(xs), [head.weight, head.bias]
        for _ in range(learner.steps):
            g = torch.autograd.grad(F.cross_entropy(F.linear(features, *phi), ys), phi, create_graph=True)
            phi = [p - learner.lr * d for p, d in zip(phi, g, strict=True)]
        return F.cross_entropy(F.linear(body(xq), *phi), yq)

    return _summed(dict(learner.model.named_parameters()), tasks, loss)


def _meta_sgd(learner: Any, tasks: list[Any]) -> Run:
    theta, own = dict(learner.model.named_parameters()), dict(learner.named_parameters())
    rates = {n: own[f"lr.{n.replace('.', '/')}"] for n in theta}

    def loss(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        phi = theta
        for _ in range(learner.steps):
            g = _stepped(learner.model, phi, list(phi), xs, ys, True)
            phi = {n: phi[n] - rates[n] * d for n, d in g.items()}
        return F.cross_entropy(functional_call(learner.model, phi, (xq,)), yq)

    return _summed(theta | {f"lr.{n}": r for n, r in rates.items()}, tasks, loss)


def _reptile(learner: Any, tasks: list[Any]) -> Run:
    theta = dict(learner.model.named_parameters())

    def run() -> Named:
        total = {n: torch.zeros_like(p) for n, p in theta.items()}
        for xs, ys, *_ in tasks:
            phi = theta
            for _ in range(learner.steps):
                g = _stepped(learner.model, phi, list(phi), xs, ys, False)
                phi = {n: (phi[n].detach() - learner.lr * d).requires_grad_() for n, d in g.items()}
            for n, p in phi.items():
                total[n] += (theta[n].detach() - p.detach()) / len(tasks)
        return total

    return run


def _imaml(learner: Any, tasks: list[Any]) -> Run:
    """A task's proximal problem, then conjugate gradients on products with its Hessian, by differentiating twice."""
    model, strength = learner.model, learner.strength
    theta = dict(model.named_parameters())

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def of_task(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        phi = theta
        for _ in range(learner.steps):
            g = _stepped(model, phi, list(phi), xs, ys, False)
            phi = {
                n: (phi[n] - learner.lr * (d + strength * (phi[n] - theta[n]))).detach().requires_grad_()
                for n, d in g.items()
            }
        at = list(phi.values())
        b = flat(torch.autograd.grad(F.cross_entropy(functional_call(model, phi, (xq,)), yq) / len(tasks), at))
        slope = flat(_stepped(model, phi, list(phi), xs, ys, True).values())
        v, r, p = torch.zeros_like(b), b, b
        square = r @ r
        enough = learner.tolerance**2 * square
        for _ in range(learner.cg_steps):
            q = flat(torch.autograd.grad(slope, at, p, retain_graph=True)) + (strength + learner.damping) * p
            if square <= enough or p @ q <= 0:
                break
            length = square / (p @ q)
            v, r = v + length * p, r - length * q
            square, before = r @ r, square
            p = r + square / before * p
        return (strength + learner.damping) * v

    def run() -> Named:
        whole = sum(of_task(*task) for task in tasks)
        pieces = whole.split([p.numel() for p in theta.values()])  # type: ignore[union-attr]  # there are tasks
        return {n: d.reshape(p.shape) for (n, p), d in zip(theta.items(), pieces, strict=True)}

    return run


def _proto_maml(learner: Any, tasks: list[Any]) -> Run:
    model = learner.model
    theta, last = dict(model.named_parameters()), len(model) - 1
    ways = model[-1].out_features
    head = [f"{last}.weight", f"{last}.bias"]

    def loss(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        features = model[:-1](xs)
        means = torch.stack([features[ys == n].mean(0) for n in range(ways)])
        # views, so that an inner gradient sees the body and not what the prototypes are made of
        phi = {n: p.view_as(p) for n, p in theta.items()}
        phi |= dict(zip(head, (2 * means, -means.square().sum(1)), strict=True))
        for _ in range(learner.steps):
            g = _stepped(model, phi, list(phi), xs, ys, True)
            phi = {n: phi[n] - learner.lr * d for n, d in g.items()}
        return F.cross_entropy(functional_call(model, phi, (xq,)), yq)

    return _summed({n: p for n, p in theta.items() if n not in head}, tasks, loss)


def _cavia(learner: Any, tasks: list[Any]) -> Run:
    model, start = learner.model.model, learner.model.context

    def loss(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        context = torch.zeros_like(start).requires_grad_()
        for _ in range(learner.steps):
            (d,) = torch.autograd.grad(F.cross_entropy(model(xs, context), ys), context, create_graph=True)
            context = context - learner.lr * d
        return F.cross_entropy(model(xq, context), yq)

    return _summed({f"model.{n}": p for n, p in model.named_parameters()}, tasks, loss)


def _maml_plus_plus(learner: Any, tasks: list[Any]) -> Run:
    """A query loss, rates and a row of batch norm at every step."""
    model, weights = learner.model, learner.loss_weights()
    rows = learner.norms.tensors(statistics=False)
    theta = {n: p for n, p in model.named_parameters() if n not in rows}

    def loss(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        phi, total = theta, torch.zeros_like(xq[:1].sum())
        for k in range(learner.steps + 1):
            at = phi | {n: row[k] for n, row in rows.items()}
            if weights[k]:
                total = total + weights[k] * F.cross_entropy(functional_call(model, at, (xq,)), yq)
            if k < learner.steps:
                g = _stepped(model, at, list(phi), xs, ys, not learner.first_order)
                phi = {n: phi[n] - rate * d for (n, d), rate in zip(g.items(), learner.lr[k], strict=True)}
        return total

    return _summed(theta | rows | {"lr": learner.lr}, tasks, loss)


def _bent(g: Tensor, name: str, matrices: Mapping[str, Tensor]) -> Tensor:
    """A gradient, each axis multiplied by its matrix."""
    if f"{name}.scale" in matrices:
        return matrices[f"{name}.scale"] * g
    x = (matrices[f"{name}.out"] @ g.flatten(1)).reshape(g.shape)
    if g.dim() == 2:
        return x @ matrices[f"{name}.in"].T
    return (matrices[f"{name}.in"] @ x.flatten(2) @ matrices[f"{name}.kernel"].T).reshape(g.shape)


def _meta_curvature(learner: Any, tasks: list[Any]) -> Run:
    theta, matrices = dict(learner.model.named_parameters()), learner.inner.matrices()

    def loss(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        phi = theta
        for _ in range(learner.steps):
            g = _stepped(learner.model, phi, list(phi), xs, ys, True)
            phi = {n: phi[n] - learner.inner.lr * _bent(d, n, matrices) for n, d in g.items()}
        return F.cross_entropy(functional_call(learner.model, phi, (xq,)), yq)

    return _summed(theta | {f"inner.{n}": m for n, m in matrices.items()}, tasks, loss)


_LOOPS: dict[str, Callable[[Any, list[Any]], Run]] = {
    "maml": _maml,
    "fomaml": _maml,
    "anil": _anil,
    "boil": _maml,
    "metasgd": _meta_sgd,
    "reptile": _reptile,
    "imaml": _imaml,
    "protomaml": _proto_maml,
    "cavia": _cavia,
    "mamlpp": _maml_plus_plus,
    "metacurvature": _meta_curvature,
}
