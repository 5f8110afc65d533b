"""Optimizers whose steps leave a module with parameters in the graph of the earlier ones."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta.compat import descent
from fastmeta.compat.torchopt import transform
from fastmeta.compat.torchopt.transform import Elementwise, GradientTransformation, Mask, Rate, apply_updates
from fastmeta.core.checks import fail
from fastmeta.core.optimizer_steps import Scalar

Containers = tuple[dict[str, Any], ...]


class UninitializedState:
    """Of an optimizer before its first step."""

    def __repr__(self) -> str:
        return "UninitializedState()"


def parameter_containers(module: nn.Module) -> Containers:
    """The dicts in which ``module`` and its submodules hold parameters, each once, empty ones left out."""
    return tuple(m._parameters for m in _modules(module) if m._parameters)


def buffer_containers(module: nn.Module) -> Containers:
    """Likewise for buffers."""
    return tuple(m._buffers for m in _modules(module) if m._buffers)


def _modules(module: nn.Module) -> Iterable[nn.Module]:
    """``module.modules()``, without the names that it makes up on the way."""
    found, pending = dict[nn.Module, None](), [module]
    while pending:
        one = pending.pop()
        if one not in found:
            found[one] = None
            pending.extend(child for child in reversed(one._modules.values()) if child is not None)
    return found


class MetaOptimizer:
    """Replaces the parameters of modules, in their places, by new tensors in the graph of the old ones.

    Args:
        module: whose parameters are optimized.
        impl: the transformation of gradients.

    Raises:
        TypeError: ``impl`` is no :class:`GradientTransformation`.
    """

    def __init__(self, module: nn.Module, impl: GradientTransformation) -> None:
        _check_transformation(type(self).__name__, impl)
        self.impl = impl
        self.param_containers_groups: list[Containers] = []
        self.state_groups: list[Any] = []
        self.add_param_group(module)

    def add_param_group(self, module: nn.Module) -> None:
        """Optimize the parameters of ``module`` too, with a state of their own."""
        self.param_containers_groups.append(parameter_containers(module))
        self.state_groups.append(UninitializedState())

    def step(self, loss: Tensor) -> None:
        """One step along the gradient of ``loss``, whose graph stays.

        Args:
            loss: ``[]``, in the graph of the parameters.

        Raises:
            ValueError: the loss depends on none of the parameters.
        """
        groups = [tuple(_distinct(containers)) for containers in self.param_containers_groups]
        params = [p for group in groups for p in group]
        at_once = _at_once(self.impl, loss, params)
        gradients = iter(_gradients(type(self).__name__, loss, params) if at_once is None else at_once)
        for i, (containers, group) in enumerate(zip(self.param_containers_groups, groups, strict=True)):
            found = [next(gradients) for _ in group]
            state = self.state_groups[i]
            state = self.impl.init(group) if isinstance(state, UninitializedState) else state
            if at_once is None:
                moved, self.state_groups[i] = _advanced(self.impl, found, state, group, group)
            else:
                moved = [p if new is None else new for p, new in zip(group, found, strict=True)]
                self.state_groups[i] = transform.counted(state, found)
            after = dict(zip(map(id, group), moved, strict=True))
            for container in containers:
                container.update({name: after[id(p)] for name, p in container.items() if isinstance(p, Tensor)})

    def state_dict(self) -> tuple[Any, ...]:
        """The states of all groups, by reference."""
        return tuple(self.state_groups)

    def load_state_dict(self, state_dict: Sequence[Any]) -> None:
        """Take up states, by reference.

        Raises:
            ValueError: another number than there are groups.
        """
        states = list(state_dict)
        if len(states) != len(self.state_groups):
            got = str(len(states))
            fail(ValueError, type(self).__name__, "state_dict", f"of {len(self.state_groups)} groups", got)
        self.state_groups[:] = states


class FuncOptimizer:
    """Keeps the state of a transformation for parameters that the caller keeps.

    Args:
        impl: the transformation of gradients.
        inplace: whether :meth:`step` writes the parameters in place by default.

    Raises:
        TypeError: ``impl`` is no :class:`GradientTransformation`.
    """

    def __init__(self, impl: GradientTransformation, *, inplace: bool = False) -> None:
        _check_transformation(type(self).__name__, impl)
        self.impl = impl
        self.optim_state: Any = UninitializedState()
        self.inplace = bool(inplace)

    def step(self, loss: Tensor, params: Any, inplace: bool | None = None) -> Any:
        """Parameters after one step along the gradient of ``loss``.

        Args:
            loss: ``[]``, in the graph of the parameters.
            params: a tree of tensors.
            inplace: write them in place, outside any graph; otherwise new tensors in their graph.

        Raises:
            ValueError: the loss depends on none of the parameters.
        """
        inplace = self.inplace if inplace is None else inplace
        leaves, tree = pytree.tree_flatten(params)
        if isinstance(self.optim_state, UninitializedState):
            self.optim_state = self.impl.init(params)
        gradients = _gradients(type(self).__name__, loss, leaves, graph=not inplace)
        if not inplace:
            moved, self.optim_state = _advanced(self.impl, gradients, self.optim_state, leaves, params)
            return pytree.tree_unflatten(moved, tree)
        grads = pytree.tree_unflatten(gradients, tree)
        updates, self.optim_state = self.impl.update(grads, self.optim_state, params=params, inplace=True)
        return apply_updates(params, updates, inplace=True)

    def state_dict(self) -> Any:
        """The state, by reference."""
        return self.optim_state

    def load_state_dict(self, state_dict: Any) -> None:
        """Take up a state, by reference."""
        self.optim_state = state_dict


def _advanced(
    impl: GradientTransformation, gradients: list[Tensor | None], state: Any, leaves: Sequence[Tensor], params: Any
) -> tuple[Sequence[Tensor], Any]:
    """The leaves of ``params`` after one step, out of place, and the next state."""
    if isinstance(impl, Elementwise):
        return impl.advance(gradients, state, leaves, params)
    tree = pytree.tree_structure(params)
    updates, state = impl.update(pytree.tree_unflatten(gradients, tree), state, params=params, inplace=False)
    return pytree.tree_leaves(apply_updates(params, updates, inplace=False)), state


def _at_once(impl: GradientTransformation, loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None] | None:
    """The parameters that one step moves, where it can be taken without gradients of its own; otherwise ``None``."""
    rate = impl.rate if isinstance(impl, Elementwise) else None
    if rate is None:
        return None
    places = [i for i, p in enumerate(params) if p.requires_grad]
    moved = descent.descended(loss, [params[i] for i in places], rate, descent.fused)
    if moved is None:
        return None
    spread: list[Tensor | None] = [None] * len(params)
    for i, p in zip(places, moved, strict=True):
        spread[i] = p
    return spread


def _check_transformation(name: str, impl: object) -> None:
    if not isinstance(impl, GradientTransformation):
        fail(TypeError, name, "impl", "a GradientTransformation, such as adam()", type(impl).__name__)


def _distinct(containers: Containers) -> Iterable[Tensor]:
    """Parameters in order; those that stand in several places once."""
    return {id(p): p for container in containers for p in container.values() if isinstance(p, Tensor)}.values()


def _gradients(name: str, loss: Tensor, params: Sequence[Tensor], graph: bool = True) -> list[Tensor | None]:
    """Of ``loss``, by each of ``params``; ``None`` where it is frozen or the loss does not depend on it."""
    places = [i for i, p in enumerate(params) if p.requires_grad]
    wanted = [params[i] for i in places]
    take = descent.gradients if graph else functools.partial(torch.autograd.grad, allow_unused=True)
    found = take(loss, wanted) if wanted else ()
    if all(g is None for g in found):
        raise ValueError(f"{name}: the loss must depend on a parameter that requires grad; it depends on none")
    gradients: list[Tensor | None] = [None] * len(params)
    for i, g in zip(places, found, strict=True):
        gradients[i] = g
    return gradients


class MetaSGD(MetaOptimizer):
    """:class:`MetaOptimizer` with :func:`~fastmeta.compat.torchopt.sgd`; mind the order of its arguments."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate,
        momentum: Scalar = 0.0,
        weight_decay: Scalar = 0.0,
        dampening: Scalar = 0.0,
        nesterov: bool = False,
        moment_requires_grad: bool = True,
        maximize: bool = False,
    ) -> None:
        flags = {"moment_requires_grad": moment_requires_grad, "maximize": maximize}
        super().__init__(module, transform.sgd(lr, momentum, dampening, weight_decay, nesterov, **flags))


class MetaAdam(MetaOptimizer):
    """:class:`MetaOptimizer` with :func:`~fastmeta.compat.torchopt.adam`."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 1e-3,
        betas: tuple[Scalar, Scalar] = (0.9, 0.999),
        eps: Scalar = 1e-8,
        weight_decay: Scalar = 0.0,
        *,
        eps_root: Scalar = 0.0,
        moment_requires_grad: bool = True,
        maximize: bool = False,
        use_accelerated_op: bool = False,
    ) -> None:
        impl = transform.adam(
            lr,
            betas,
            eps,
            weight_decay,
            eps_root=eps_root,
            moment_requires_grad=moment_requires_grad,
            maximize=maximize,
            use_accelerated_op=use_accelerated_op,
        )
        super().__init__(module, impl)


class MetaAdamW(MetaOptimizer):
    """:class:`MetaOptimizer` with :func:`~fastmeta.compat.torchopt.adamw`."""

    def __init__(
        self,
        module: nn.Module,
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
    ) -> None:
        impl = transform.adamw(
            lr,
            betas,
            eps,
            weight_decay,
            eps_root=eps_root,
            mask=mask,
            moment_requires_grad=moment_requires_grad,
            maximize=maximize,
            use_accelerated_op=use_accelerated_op,
        )
        super().__init__(module, impl)


class MetaRAdam(MetaOptimizer):
    """:class:`MetaOptimizer` with :func:`~fastmeta.compat.torchopt.radam`."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 1e-3,
        betas: tuple[Scalar, Scalar] = (0.9, 0.999),
        eps: Scalar = 1e-8,
        weight_decay: Scalar = 0.0,
        *,
        moment_requires_grad: bool = True,
    ) -> None:
        impl = transform.radam(lr, betas, eps, weight_decay, moment_requires_grad=moment_requires_grad)
        super().__init__(module, impl)


class MetaAdaMax(MetaOptimizer):
    """:class:`MetaOptimizer` with :func:`~fastmeta.compat.torchopt.adamax`."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 2e-3,
        betas: tuple[Scalar, Scalar] = (0.9, 0.999),
        eps: Scalar = 1e-8,
        weight_decay: Scalar = 0.0,
        *,
        moment_requires_grad: bool = True,
    ) -> None:
        impl = transform.adamax(lr, betas, eps, weight_decay, moment_requires_grad=moment_requires_grad)
        super().__init__(module, impl)


class MetaAdaDelta(MetaOptimizer):
    """:class:`MetaOptimizer` with :func:`~fastmeta.compat.torchopt.adadelta`."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 1.0,
        rho: Scalar = 0.9,
        eps: Scalar = 1e-6,
        weight_decay: Scalar = 0.0,
        *,
        moment_requires_grad: bool = True,
    ) -> None:
        impl = transform.adadelta(lr, rho, eps, weight_decay, moment_requires_grad=moment_requires_grad)
        super().__init__(module, impl)


class MetaAdaGrad(MetaOptimizer):
    """:class:`MetaOptimizer` with :func:`~fastmeta.compat.torchopt.adagrad`."""

    def __init__(
        self,
        module: nn.Module,
        lr: Rate = 1e-2,
        lr_decay: Scalar = 0.0,
        weight_decay: Scalar = 0.0,
        initial_accumulator_value: Scalar = 0.0,
        eps: Scalar = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        impl = transform.adagrad(lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize=maximize)
        super().__init__(module, impl)


class MetaRMSProp(MetaOptimizer):
    """:class:`MetaOptimizer` with :func:`~fastmeta.compat.torchopt.rmsprop`."""

    def __init__(
        self,
        module: nn.Module,
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
    ) -> None:
        impl = transform.rmsprop(
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            initial_scale=initial_scale,
            nesterov=nesterov,
            maximize=maximize,
        )
        super().__init__(module, impl)


MetaAdamax, MetaAdadelta, MetaAdagrad, MetaRMSprop = MetaAdaMax, MetaAdaDelta, MetaAdaGrad, MetaRMSProp
