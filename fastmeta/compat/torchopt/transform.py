"""Optimizers as pairs of pure functions: a state's start, and the update that a gradient becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.core import optimizer_steps as steps
from fastmeta.core.checks import fail
from fastmeta.core.optimizer_steps import Scalar

Rate = Scalar | Callable[[Any], Scalar]
Mask = Any  # a tree of bools like the parameters', or a function from parameters to one

_Start = Callable[[Tensor], Any]
_Step = Callable[..., tuple[Tensor, Any]]


class GradientTransformation(NamedTuple):
    """A transformation of gradients.

    Attributes:
        init: ``init(params)``: the state for a tree of parameters.
        update: ``update(updates, state, *, params=None, inplace=True)``: the updates, a tree like ``params`` with
            ``None`` where there is no gradient, and the next state. Nothing is written in place; ``inplace`` says that
            parameters are constants where their gradient has no graph.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]

    def chain(self, next: GradientTransformation) -> GradientTransformation:
        """This one, then ``next``."""
        return chain(self, next)


class ParameterState(NamedTuple):
    """Of one parameter: the number of updates that it has had, and what its rule keeps."""

    updates: int
    rule: Any


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """One transformation after another; the state is the tuple of theirs."""

    def init(params: Any) -> Any:
        return tuple(t.init(params) for t in transformations)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        if len(state) != len(transformations):
            fail(ValueError, "chain", "state", f"a tuple of {len(transformations)}", f"{len(state)}", "make it by init")
        after = []
        for t, before in zip(transformations, state, strict=True):
            updates, new = t.update(updates, before, params=params, inplace=inplace)
            after.append(new)
        return updates, tuple(after)

    return GradientTransformation(init, update)


def clip_grad_norm(max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> GradientTransformation:
    """All gradients times ``min(1, max_norm / (norm + 1e-6))`` of their common norm, differentiated as well.

    Args:
        max_norm: the largest norm.
        norm_type: of which order; ``inf`` is allowed.
        error_if_nonfinite: raise where the norm is not finite.

    Raises:
        RuntimeError: by an update, the norm is not finite.
    """

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        given = [g for g in pytree.tree_leaves(updates) if g is not None]
        if not given:
            return updates, state
        flat = torch.cat([g.flatten() for g in given])
        norm = steps.root(flat.square().sum()) if norm_type == 2 else torch.linalg.vector_norm(flat, norm_type)
        if error_if_nonfinite and not math.isfinite(norm.item()):
            raise RuntimeError(f"clip_grad_norm: the norm of the gradients must be finite, got {norm.item()}")
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return pytree.tree_map(lambda g: None if g is None else factor * g, updates), state

    return GradientTransformation(lambda _: (), update)


def apply_updates(params: Any, updates: Any, *, inplace: bool = True) -> Any:
    """Parameters plus updates.

    Args:
        params: a tree of tensors.
        updates: a tree like it; ``None`` leaves a parameter as it is.
        inplace: write into the parameters' memory, outside any graph, and return them; new tensors otherwise.
    """

    def moved(p: Tensor, u: Tensor | None) -> Tensor:
        if u is None:
            return p
        if not inplace:
            return p + u
        p.data.add_(u.detach())
        return p

    leaves, tree = pytree.tree_flatten(params)
    changes = pytree.tree_leaves(updates)
    if len(leaves) != len(changes):
        fail(ValueError, "apply_updates", "updates", f"a tree of {len(leaves)} leaves", f"{len(changes)}")
    return pytree.tree_unflatten([moved(p, u) for p, u in zip(leaves, changes, strict=True)], tree)


def sgd(
    lr: Rate,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nesterov: bool = False,
    *,
    moment_requires_grad: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Gradient descent with momentum; see ``core/optimizer_steps.py``, as for all of these.

    Args:
        lr: a number, a tensor, or a function of the number of updates so far.
        momentum: of the buffer, which starts as the first gradient.
        dampening: taken from later gradients.
        weight_decay: added to the gradient.
        nesterov: needs momentum and no dampening.
        moment_requires_grad: without effect: the buffer does not start from zeros.
        maximize: ascend.

    Raises:
        ValueError: a number is negative, or ``nesterov`` goes without momentum or with dampening.
    """
    _check("sgd", lr=lr, momentum=momentum, weight_decay=weight_decay)
    has = {name: isinstance(v, Tensor) or v != 0 for name, v in (("momentum", momentum), ("dampening", dampening))}
    if nesterov and (not has["momentum"] or has["dampening"]):
        raise ValueError(f"sgd: nesterov needs momentum and no dampening, got {momentum} and {dampening}")

    def step(p: Tensor, g: Tensor, state: Any, rate: Scalar) -> tuple[Tensor, Any]:
        return steps.sgd(p, g, state, lr=rate, momentum=momentum, dampening=dampening, nesterov=nesterov)

    transformation = _elementwise("sgd", step, lambda p: steps.SGDState(), lr, weight_decay, maximize)
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    if not (has["momentum"] or decays or maximize or callable(lr) or isinstance(lr, Tensor)):
        transformation.rate = lr
    return transformation


def adam(
    lr: Rate = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    eps_root: Scalar = 0.0,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """Adam.

    Args:
        lr: a number, a tensor, or a function of the number of updates so far.
        betas: decay of the first and of the second moment.
        eps: beside the root.
        weight_decay: added to the gradient.
        eps_root: in the root; no gradient needs it.
        moment_requires_grad: make the moments' first zeros require grad.
        maximize: ascend.
        use_accelerated_op: without effect.

    Raises:
        ValueError: a number is negative, or a beta is not below 1.
    """
    _check("adam", betas, lr=lr, eps=eps, eps_root=eps_root, weight_decay=weight_decay)

    def step(p: Tensor, g: Tensor, state: Any, rate: Scalar) -> tuple[Tensor, Any]:
        return steps.adam(p, g, state, lr=rate, betas=betas, eps=eps, eps_root=eps_root)

    return _elementwise("adam", step, _moments(moment_requires_grad), lr, weight_decay, maximize)


def adamw(
    lr: Rate = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    *,
    eps_root: Scalar = 0.0,
    mask: Mask | None = None,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """:func:`adam` whose update has ``- lr weight_decay p`` beside it.

    Args:
        lr: as for :func:`adam`.
        betas: as for :func:`adam`.
        eps: as for :func:`adam`.
        weight_decay: the rate of decay, times ``lr``.
        eps_root: as for :func:`adam`.
        mask: which parameters decay: a tree of bools like theirs, or a function from parameters to one.
        moment_requires_grad: as for :func:`adam`.
        maximize: as for :func:`adam`.
        use_accelerated_op: without effect.

    Raises:
        ValueError: as :func:`adam`.
    """
    _check("adamw", betas, lr=lr, eps=eps, eps_root=eps_root, weight_decay=weight_decay)

    def step(p: Tensor, g: Tensor, state: Any, rate: Scalar) -> tuple[Tensor, Any]:
        return steps.adam(p, g, state, lr=rate, betas=betas, eps=eps, eps_root=eps_root)

    start = _moments(moment_requires_grad)
    return _elementwise("adamw", step, start, lr, 0.0, maximize, decoupled=weight_decay, mask=mask)


def radam(
    lr: Rate = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Rectified Adam; arguments and errors as for :func:`adam`."""
    _check("radam", betas, lr=lr, eps=eps, weight_decay=weight_decay)

    def step(p: Tensor, g: Tensor, state: Any, rate: Scalar) -> tuple[Tensor, Any]:
        return steps.radam(p, g, state, lr=rate, betas=betas, eps=eps)

    return _elementwise("radam", step, _moments(moment_requires_grad), lr, weight_decay)


def adamax(
    lr: Rate = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Adamax; arguments and errors as for :func:`adam`."""
    _check("adamax", betas, lr=lr, eps=eps, weight_decay=weight_decay)

    def step(p: Tensor, g: Tensor, state: Any, rate: Scalar) -> tuple[Tensor, Any]:
        return steps.adamax(p, g, state, lr=rate, betas=betas, eps=eps)

    def start(p: Tensor) -> Any:
        return steps.AdamaxState(0, _zeros(p, moment_requires_grad), _zeros(p, moment_requires_grad))

    return _elementwise("adamax", step, start, lr, weight_decay)


def adadelta(
    lr: Rate = 1e-3,
    rho: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Adadelta with the decay ``rho``; other arguments and errors as for :func:`adam`."""
    _check("adadelta", lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)

    def step(p: Tensor, g: Tensor, state: Any, rate: Scalar) -> tuple[Tensor, Any]:
        return steps.adadelta(p, g, state, lr=rate, rho=rho, eps=eps)

    def start(p: Tensor) -> Any:
        return steps.AdadeltaState(_zeros(p, moment_requires_grad), _zeros(p, moment_requires_grad))

    return _elementwise("adadelta", step, start, lr, weight_decay)


def adagrad(
    lr: Rate = 1e-2,
    lr_decay: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    initial_accumulator_value: Scalar = 0.0,
    eps: Scalar = 1e-10,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adagrad.

    Args:
        lr: a number, a tensor, or a function of the number of updates so far.
        lr_decay: the rate after ``t`` updates is ``lr / (1 + t lr_decay)``.
        weight_decay: added to the gradient.
        initial_accumulator_value: what the sum of squares starts from.
        eps: beside the root.
        maximize: ascend.

    Raises:
        ValueError: a number is negative.
    """
    first = initial_accumulator_value
    _check("adagrad", lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, initial_accumulator_value=first, eps=eps)

    def step(p: Tensor, g: Tensor, state: Any, rate: Scalar) -> tuple[Tensor, Any]:
        return steps.adagrad(p, g, state, lr=rate, lr_decay=lr_decay, eps=eps)

    def start(p: Tensor) -> Any:
        return steps.AdagradState(0, torch.zeros_like(p).detach() + first)

    return _elementwise("adagrad", step, start, lr, weight_decay, maximize)


def rmsprop(
    lr: Rate = 1e-2,
    alpha: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    momentum: Scalar = 0.0,
    centered: bool = False,
    *,
    initial_scale: Scalar = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """RMSprop.

    Args:
        lr: a number, a tensor, or a function of the number of updates so far.
        alpha: decay of the mean of squares.
        eps: beside the root.
        weight_decay: added to the gradient.
        momentum: of a buffer of updates.
        centered: divide by the root of the variance.
        initial_scale: what the mean of squares starts from.
        nesterov: go on along the buffer; needs momentum.
        maximize: ascend.

    Raises:
        ValueError: a number is negative, or ``nesterov`` goes without momentum.
    """
    _check("rmsprop", lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, scale=initial_scale)
    if nesterov and not (isinstance(momentum, Tensor) or momentum > 0):
        fail(ValueError, "rmsprop", "momentum", "above 0 with nesterov", momentum)

    def step(p: Tensor, g: Tensor, state: Any, rate: Scalar) -> tuple[Tensor, Any]:
        options: dict[str, Any] = {"momentum": momentum, "centered": centered, "nesterov": nesterov}
        return steps.rmsprop(p, g, state, lr=rate, alpha=alpha, eps=eps, **options)

    def start(p: Tensor) -> Any:
        return steps.RMSpropState(torch.zeros_like(p).detach() + initial_scale)

    return _elementwise("rmsprop", step, start, lr, weight_decay, maximize)


def _zeros(p: Tensor, requires_grad: bool) -> Tensor:
    return torch.zeros_like(p, requires_grad=requires_grad)


def _moments(requires_grad: bool) -> _Start:
    return lambda p: steps.AdamState(0, _zeros(p, requires_grad), _zeros(p, requires_grad))


class Elementwise(GradientTransformation):
    """A transformation that can also take the whole step at once.

    ``advance(gradients, state, leaves, params)`` gives the leaves of ``params`` plus updates, as a list, never in
    place, and the next state. ``rate`` is that of a step which is no more than ``p - rate g``, otherwise ``None``.
    """

    rate: float | None
    advance: Callable[[Sequence[Tensor | None], Any, Sequence[Tensor], Any], tuple[list[Tensor], Any]]


def _elementwise(
    name: str,
    step: _Step,
    start: _Start,
    lr: Rate,
    weight_decay: Scalar,
    maximize: bool = False,
    *,
    decoupled: Scalar = 0.0,
    mask: Mask | None = None,
) -> Elementwise:
    """By ``step``, which has neither weight decay nor sign of its own; from a parameter of zero for an update alone."""
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    apart = isinstance(decoupled, Tensor) or decoupled != 0

    def init(params: Any) -> Any:
        flat = type(params) is tuple and all(isinstance(p, Tensor) for p in params)  # has no need of a tree's walk
        return tuple(ParameterState(0, start(p)) for p in (params if flat else pytree.tree_leaves(params)))

    def run(
        gradients: Sequence[Any], known: Sequence[Any], state: Any, params: Any, inplace: bool, onto: bool
    ) -> tuple[list[Any], Any]:
        if len(state) != len(gradients) or len(known) != len(gradients):
            got = f"{len(state)} states and {len(known)} parameters"
            fail(ValueError, name, "updates", f"of {len(gradients)} leaves as state and params are", got)
        if params is None and (decays or apart):
            raise ValueError(f"{name}: params must be given with weight decay; call update(..., params=params)")
        chosen = _chosen(name, mask, params, len(gradients))
        new, after = list[Any](), []
        for g, p, s, decay in zip(gradients, known, state, chosen, strict=True):
            if g is None:
                new.append(p if onto else None)
                after.append(s)
                continue
            if g.is_sparse or g.is_complex():
                fail(TypeError, name, "a gradient", "real and dense", f"{g.layout} of {g.dtype}")
            p = p.detach() if p is not None and inplace and not g.requires_grad else p
            d = -g if maximize else g
            d = d + weight_decay * p if decays else d
            rate = lr(torch.tensor(s.updates, device=g.device)) if callable(lr) else lr
            base = p if onto else torch.zeros_like(d)
            base = base - rate * decoupled * p if apart and decay else base
            moved, rule = step(base, d, s.rule, rate)
            new.append(moved)
            after.append(ParameterState(s.updates + 1, rule))
        return new, tuple(after)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        gradients, tree = pytree.tree_flatten(updates)
        known = [None] * len(gradients) if params is None else pytree.tree_leaves(params)
        new, after = run(gradients, known, state, params, inplace, onto=False)
        return pytree.tree_unflatten(new, tree), after

    transformation = Elementwise(init, update)
    transformation.rate = None
    transformation.advance = lambda gradients, state, leaves, params: run(
        gradients, leaves, state, params, inplace=False, onto=True
    )
    return transformation


def counted(state: Sequence[ParameterState], moved: Sequence[Tensor | None]) -> tuple[ParameterState, ...]:
    """The state after an update of what moved, by a rule that keeps nothing else."""
    return tuple(s if p is None else ParameterState(s.updates + 1, s.rule) for s, p in zip(state, moved, strict=True))


def _chosen(name: str, mask: Mask | None, params: Any, number: int) -> list[bool]:
    if mask is None:
        return [True] * number
    leaves = pytree.tree_leaves(mask(params) if callable(mask) else mask)
    if len(leaves) != number:
        fail(ValueError, name, "mask", f"a tree of {number} leaves, as params are", f"{len(leaves)}")
    return [bool(leaf) for leaf in leaves]


def _check(name: str, betas: tuple[Scalar, Scalar] | None = None, **values: Any) -> None:
    for key, value in values.items():
        if not callable(value) and not isinstance(value, Tensor) and not value >= 0:
            fail(ValueError, name, key, "at least 0", value)
    for i, beta in enumerate(betas or ()):
        if not isinstance(beta, Tensor) and not 0 <= beta < 1:
            fail(ValueError, name, f"betas[{i}]", "at least 0 and below 1", beta)
