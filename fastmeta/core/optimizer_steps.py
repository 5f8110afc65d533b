"""One step of every common optimizer, for one parameter: pure, out of place, differentiable to any order.

``name(p, g, state, *, lr, ...) -> (p', state')`` takes a parameter, its gradient of the same shape, and the state that
the step before has left, or ``None`` at the first step. The values are those of ``torch.optim``'s class of that name.
Every hyper-parameter is a number or a tensor that broadcasts to ``p``, which may require grad. One that would be
without effect at 0 (momentum, weight decay) is left out where it is the number 0; a tensor counts whatever its value.

Where a step divides by ``sqrt(v + eps_root) + eps``, :func:`root` takes the square root, whose derivative at 0 is 0. So
a parameter whose gradients have all been zero has the exact derivative of ``m / (sqrt(v) + eps)`` there, that of
``m / eps``: the gradients are factors of ``m``, and what ``sqrt(v)`` adds, their norm times ``m``, is of second order.
``torch.sqrt`` gives NaN. At ``eps = eps_root = 0`` the step itself is 0 / 0 there: it is 0, with all its derivatives,
where ``torch.optim`` gives NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor


class SGDState(NamedTuple):
    """Of :func:`sgd`; ``None`` without momentum."""

    momentum_buffer: Tensor | None


class AdamState(NamedTuple):
    """Of :func:`adam`, :func:`adamw` and :func:`radam`; the largest second moment only with ``amsgrad``."""

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None


class RMSpropState(NamedTuple):
    """Of :func:`rmsprop`; the buffer only with momentum, the mean gradient only where centred."""

    square_avg: Tensor
    momentum_buffer: Tensor | None = None
    grad_avg: Tensor | None = None


class AdagradState(NamedTuple):
    """Of :func:`adagrad`; ``sum`` is of squares."""

    step: int
    sum: Tensor


class AdadeltaState(NamedTuple):
    """Of :func:`adadelta`."""

    square_avg: Tensor
    acc_delta: Tensor


class AdamaxState(NamedTuple):
    """Of :func:`adamax`."""

    step: int
    exp_avg: Tensor
    exp_inf: Tensor


class ASGDState(NamedTuple):
    """Of :func:`asgd`: the rate of the next step, the weight of the next average, the averaged parameter."""

    step: int
    eta: Scalar
    mu: float
    ax: Tensor


class RpropState(NamedTuple):
    """Of :func:`rprop`."""

    prev: Tensor
    step_size: Tensor


def root(v: Tensor) -> Tensor:
    """The square root of what is a sum of squares up to rounding: 0, with all its derivatives, where ``v <= 0``.

    NaN stays NaN.
    """
    none = v <= 0
    return torch.where(none, 0.0, torch.where(none, 1.0, v).sqrt())


def sgd(
    p: Tensor,
    g: Tensor,
    state: SGDState | None = None,
    *,
    lr: Scalar,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, SGDState]:
    """Gradient descent with momentum.

    ``d = g + weight_decay p``; ``b = d`` at the first step, then ``momentum b + (1 - dampening) d``;
    ``p' = p - lr b``, or ``p - lr (d + momentum b)`` with ``nesterov``.

    Source: I. Sutskever, J. Martens, G. Dahl, G. Hinton, ICML 2013, as PyTorch has it.
    """
    d = _decayed(p, g, weight_decay, maximize)
    if not _present(momentum):
        return p - lr * d, SGDState(None)
    before = None if state is None else state.momentum_buffer
    buffer = d if before is None else momentum * before + (1 - dampening) * d
    return p - lr * (d + momentum * buffer if nesterov else buffer), SGDState(buffer)


def adam(
    p: Tensor,
    g: Tensor,
    state: AdamState | None = None,
    *,
    lr: Scalar = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, AdamState]:
    """Adam, with weight decay as a part of the gradient.

    ``m = beta1 m + (1 - beta1) d``, ``v = beta2 v + (1 - beta2) d^2`` and at step ``t``
    ``p' = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t) + eps_root) + eps)``; with ``amsgrad`` the largest ``v``
    so far stands for ``v``.

    Source: D. P. Kingma, J. Ba, ICLR 2015; S. J. Reddi, S. Kale, S. Kumar, ICLR 2018.
    """
    return _adam(p, _decayed(p, g, weight_decay, maximize), state, lr, betas, eps, eps_root, amsgrad)


def adamw(
    p: Tensor,
    g: Tensor,
    state: AdamState | None = None,
    *,
    lr: Scalar = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, AdamState]:
    """:func:`adam` from ``(1 - lr weight_decay) p``.

    Source: I. Loshchilov, F. Hutter, ICLR 2019.
    """
    decayed = p - (lr * weight_decay) * p if _present(weight_decay) else p
    return _adam(decayed, -g if maximize else g, state, lr, betas, eps, eps_root, amsgrad)


def _adam(
    p: Tensor,
    g: Tensor,
    state: AdamState | None,
    lr: Scalar,
    betas: tuple[Scalar, Scalar],
    eps: Scalar,
    eps_root: Scalar,
    amsgrad: bool,
) -> tuple[Tensor, AdamState]:
    if state is None:
        zero = torch.zeros_like(p)
        state = AdamState(0, zero, zero, zero if amsgrad else None)
    beta1, beta2 = betas
    step = state.step + 1
    m = beta1 * state.exp_avg + (1 - beta1) * g
    v = beta2 * state.exp_avg_sq + (1 - beta2) * g.square()
    largest = v if state.max_exp_avg_sq is None else torch.maximum(state.max_exp_avg_sq, v)
    denominator = root(largest / (1 - beta2**step) + eps_root) + eps
    p = p - lr * _over(m / (1 - beta1**step), denominator, eps)
    return p, AdamState(step, m, v, largest if amsgrad else None)


def radam(
    p: Tensor,
    g: Tensor,
    state: AdamState | None = None,
    *,
    lr: Scalar = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    maximize: bool = False,
) -> tuple[Tensor, AdamState]:
    """Rectified Adam.

    :func:`adam`'s ``m`` and ``v``; with ``rho = 2 / (1 - beta2) - 1`` and ``r = rho - 2 t beta2^t / (1 - beta2^t)``,
    ``p' = p - lr m / (1 - beta1^t)`` while ``r <= 5``, then this step times ``sqrt(1 - beta2^t) / (sqrt(v) + eps)`` and
    ``sqrt((r - 4) (r - 2) rho / ((rho - 4) (rho - 2) r))``.

    Source: L. Liu et al., ICLR 2020.
    """
    d = _decayed(p, g, weight_decay, maximize)
    if state is None:
        state = AdamState(0, torch.zeros_like(p), torch.zeros_like(p))
    beta1, beta2 = betas
    step = state.step + 1
    m = beta1 * state.exp_avg + (1 - beta1) * d
    v = beta2 * state.exp_avg_sq + (1 - beta2) * d.square()
    move, left = m / (1 - beta1**step), 1 - beta2**step
    rho = 2 / (1 - beta2) - 1
    r = rho - 2 * step * beta2**step / left
    if r > 5:
        rectified = (left * (r - 4) * (r - 2) * rho / ((rho - 4) * (rho - 2) * r)) ** 0.5
        move = rectified * _over(move, root(v) + eps, eps)
    return p - lr * move, AdamState(step, m, v)


def rmsprop(
    p: Tensor,
    g: Tensor,
    state: RMSpropState | None = None,
    *,
    lr: Scalar = 1e-2,
    alpha: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    momentum: Scalar = 0.0,
    centered: bool = False,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, RMSpropState]:
    """RMSprop.

    ``v = alpha v + (1 - alpha) d^2`` and ``u = d / (sqrt(v + eps_root) + eps)``; where ``centered``, the square of the
    mean gradient is taken from ``v`` in the root. ``p' = p - lr u``; with momentum, ``b = momentum b + u`` stands for
    ``u``, or ``u + momentum b`` with ``nesterov``, which ``torch.optim`` does not have.

    Source: T. Tieleman, G. Hinton, lecture 6.5, 2012; A. Graves, arXiv:1308.0850, for the centred form.
    """
    d = _decayed(p, g, weight_decay, maximize)
    if state is None:
        state = RMSpropState(torch.zeros_like(p))
    v = inside = alpha * state.square_avg + (1 - alpha) * d.square()
    mean = None
    if centered:
        mean = (1 - alpha) * d if state.grad_avg is None else alpha * state.grad_avg + (1 - alpha) * d
        inside = v - mean.square()
    u = _over(d, root(inside + eps_root) + eps, eps)
    if not _present(momentum):
        return p - lr * u, RMSpropState(v, None, mean)
    buffer = u if state.momentum_buffer is None else momentum * state.momentum_buffer + u
    return p - lr * (u + momentum * buffer if nesterov else buffer), RMSpropState(v, buffer, mean)


def adagrad(
    p: Tensor,
    g: Tensor,
    state: AdagradState | None = None,
    *,
    lr: Scalar = 1e-2,
    lr_decay: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    initial_accumulator_value: Scalar = 0.0,
    eps: Scalar = 1e-10,
    eps_root: Scalar = 0.0,
    maximize: bool = False,
) -> tuple[Tensor, AdagradState]:
    """Adagrad.

    ``s = s + d^2``, from ``initial_accumulator_value``, and at step ``t``
    ``p' = p - lr / (1 + (t - 1) lr_decay) d / (sqrt(s + eps_root) + eps)``.

    Source: J. Duchi, E. Hazan, Y. Singer, JMLR 12, 2011.
    """
    d = _decayed(p, g, weight_decay, maximize)
    step, before = (0, initial_accumulator_value) if state is None else state
    total = before + d.square()
    rate = lr / (1 + step * lr_decay)
    return p - rate * _over(d, root(total + eps_root) + eps, eps), AdagradState(step + 1, total)


def adadelta(
    p: Tensor,
    g: Tensor,
    state: AdadeltaState | None = None,
    *,
    lr: Scalar = 1.0,
    rho: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    maximize: bool = False,
) -> tuple[Tensor, AdadeltaState]:
    """Adadelta.

    ``v = rho v + (1 - rho) d^2``, ``u = d sqrt(a + eps) / sqrt(v + eps)``, ``a = rho a + (1 - rho) u^2`` and
    ``p' = p - lr u``: ``eps`` is in the roots already.

    Source: M. D. Zeiler, arXiv:1212.5701.
    """
    d = _decayed(p, g, weight_decay, maximize)
    if state is None:
        state = AdadeltaState(torch.zeros_like(p), torch.zeros_like(p))
    v = rho * state.square_avg + (1 - rho) * d.square()
    u = _over(root(state.acc_delta + eps) * d, root(v + eps), eps)
    return p - lr * u, AdadeltaState(v, rho * state.acc_delta + (1 - rho) * u.square())


def adamax(
    p: Tensor,
    g: Tensor,
    state: AdamaxState | None = None,
    *,
    lr: Scalar = 2e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    maximize: bool = False,
) -> tuple[Tensor, AdamaxState]:
    """Adamax.

    ``m = beta1 m + (1 - beta1) d``, ``u = max(beta2 u, |d| + eps)`` and at step ``t``
    ``p' = p - lr / (1 - beta1^t) m / u``. The derivative of ``|d|`` at 0 is 0, and that of the maximum of two equal
    numbers is half of either's.

    Source: D. P. Kingma, J. Ba, ICLR 2015, section 7.1.
    """
    d = _decayed(p, g, weight_decay, maximize)
    if state is None:
        state = AdamaxState(0, torch.zeros_like(p), torch.zeros_like(p))
    beta1, beta2 = betas
    step = state.step + 1
    m = beta1 * state.exp_avg + (1 - beta1) * d
    norm = torch.maximum(beta2 * state.exp_inf, d.abs() + eps)
    return p - lr / (1 - beta1**step) * _over(m, norm, eps), AdamaxState(step, m, norm)


def asgd(
    p: Tensor,
    g: Tensor,
    state: ASGDState | None = None,
    *,
    lr: Scalar = 1e-2,
    lambd: Scalar = 1e-4,
    alpha: Scalar = 0.75,
    t0: float = 1e6,
    weight_decay: Scalar = 0.0,
    maximize: bool = False,
) -> tuple[Tensor, ASGDState]:
    """Averaged stochastic gradient descent.

    ``p' = (1 - lambd eta) p - eta d`` with ``eta = lr`` at the first step and ``lr / (1 + lambd lr t)^alpha`` after
    step ``t``; ``ax`` averages ``p'`` from step ``t0`` on and is ``p'`` before.

    Source: B. T. Polyak, A. B. Juditsky, SIAM J. Control Optim. 30, 1992.
    """
    d = _decayed(p, g, weight_decay, maximize)
    if state is None:
        state = ASGDState(0, lr, 1.0, torch.zeros_like(p))
    step = state.step + 1
    p = p - (lambd * state.eta) * p - state.eta * d
    ax = p if state.mu == 1 else state.ax + state.mu * (p - state.ax)
    return p, ASGDState(step, lr / (1 + lambd * lr * step) ** alpha, 1 / max(1, step - t0), ax)


def rprop(
    p: Tensor,
    g: Tensor,
    state: RpropState | None = None,
    *,
    lr: Scalar = 1e-2,
    etas: tuple[Scalar, Scalar] = (0.5, 1.2),
    step_sizes: tuple[Scalar, Scalar] = (1e-6, 50.0),
    maximize: bool = False,
) -> tuple[Tensor, RpropState]:
    """Resilient propagation.

    Every element has a step of its own, ``lr`` at first, which is multiplied by ``etas[1]`` where the gradient keeps
    its sign and by ``etas[0]`` where it turns, within ``step_sizes``. ``p' = p - step sign(d)``, and an element whose
    sign turns stays. Only signs count: the derivative by the gradient is zero, that by ``lr`` and ``etas`` is not.

    Source: M. Riedmiller, H. Braun, ICNN 1993.
    """
    d = -g if maximize else g
    if state is None:
        state = RpropState(torch.zeros_like(p), lr * torch.ones_like(p))
    agreement = d * state.prev
    factor = torch.where(agreement > 0, etas[1], torch.ones_like(d))
    factor = torch.where(agreement < 0, etas[0], factor)
    size = _within(state.step_size * factor, *step_sizes)
    d = torch.where(agreement < 0, 0.0, d)
    return p - size * d.sign(), RpropState(d, size)


def _over(x: Tensor, denominator: Tensor, eps: Scalar) -> Tensor:
    """``x / denominator``, and 0 for 0 / 0; there is none where ``eps``, a part of the denominator, is above 0."""
    if not isinstance(eps, Tensor) and eps > 0:
        return x / denominator
    none = (x == 0) & (denominator == 0)
    return torch.where(none, 0.0, x / torch.where(none, 1.0, denominator))


def _within(size: Tensor, least: Scalar, most: Scalar) -> Tensor:
    low, high = (torch.as_tensor(bound, dtype=size.dtype, device=size.device) for bound in (least, most))
    return torch.minimum(torch.maximum(size, low), high)


def _present(value: Scalar) -> bool:
    return isinstance(value, Tensor) or value != 0


def _decayed(p: Tensor, g: Tensor, weight_decay: Scalar, maximize: bool) -> Tensor:
    g = -g if maximize else g
    return g + weight_decay * p if _present(weight_decay) else g
