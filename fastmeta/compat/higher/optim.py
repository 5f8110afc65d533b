"""Differentiable forms of ``torch.optim``'s optimizers, started from the state of an existing one."""

from __future__ import annotations

import abc
import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.compat import descent
from fastmeta.compat.higher.patch import PatchedModule
from fastmeta.compat.higher.trainable import apply_trainable_opt_params, get_trainable_opt_params, per_group
from fastmeta.compat.higher.utils import copied, mapped
from fastmeta.core import optimizer_steps as steps
from fastmeta.core.checks import fail

Override = Mapping[str, Sequence[Any]]
GradCallback = Callable[[list[Tensor | None]], Iterable[Tensor | None]]

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableOptimizer",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]


class DifferentiableOptimizer(abc.ABC):
    """An optimizer whose steps return new parameters in the graph of the old ones.

    A subclass implements ``_update(grouped_grads)``: it puts new parameters into ``group["params"]`` for the groups of
    ``self.param_groups``, whose gradients are the lists of ``grouped_grads``, ``None`` where the loss does not depend
    on a parameter. ``self.state[group][parameter]``, by their numbers, is a dict that keeps what it likes.

    Args:
        other: an optimizer, whose param groups and state are copied.
        reference_params: the parameters of the model that ``other`` was made for.
        fmodel: the patched module whose fast weights are updated.
        device: where the state is put.
        override: hyper-parameters by name, each a list of one value, or of one for each group. Tensors that require
            grad get their gradient.
        grad_callback: maps the list of gradients, in the order of ``reference_params``, to another one at every step.
        track_higher_grads: keep the graph of every step.
        **kwargs: ignored.

    Raises:
        ValueError: ``other`` has a parameter that ``reference_params`` lacks, or ``override`` has a name that ``other``
            has not or as many values as there are groups neither.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: PatchedModule | None = None,
        device: torch.device | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        **kwargs: Any,
    ) -> None:
        reference = list(reference_params)
        index = {id(p): i for i, p in enumerate(reference)}
        self._count = len(reference)
        self.param_groups: list[dict[str, Any]] = []
        self.state: list[collections.defaultdict[int, dict[str, Any]]] = []
        self._places: list[list[int]] = []
        for group in other.param_groups:
            missing = [tuple(p.shape) for p in group["params"] if id(p) not in index]
            if missing:
                raise ValueError(
                    f"{type(self).__name__}: reference_params must have every parameter of the optimizer, lacks one of "
                    f"shape {missing[0]}; make the optimizer with the parameters of the model that is patched"
                )
            self._places.append([index[id(p)] for p in group["params"]])
            self.param_groups.append({**group, "params": [None] * len(group["params"])})
            state = collections.defaultdict[int, dict[str, Any]](dict)
            for i, p in enumerate(group["params"]):
                if p in other.state:
                    state[i] = mapped(lambda x: copied(x, device) if isinstance(x, Tensor) else x, other.state[p])
            self.state.append(state)
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads
        self._apply_override(override or {})

    def _apply_override(self, override: Override) -> None:
        for name, value, group in per_group(type(self).__name__, override, self.param_groups):
            group[name] = value

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """New parameters after one step along the gradient of ``loss``; they become the patched module's latest.

        Args:
            loss: ``[]``, in the graph of the parameters.
            params: the parameters; the patched module's latest ones by default.
            override: as for the class; holds from this step on.
            grad_callback: instead of the class's, for this step.
            **kwargs: ignored.

        Raises:
            ValueError: there are no parameters, another number of them than the optimizer has, or the loss depends on
                none of them.
        """
        self._apply_override(override or {})
        if params is None:
            params = None if self._fmodel is None else self._fmodel.fast_params
            if params is None:
                raise ValueError(
                    f"{type(self).__name__}: params must be given to step where there is no patched module with fast "
                    "weights"
                )
        before = list(params)
        if len(before) != self._count:
            fail(ValueError, type(self).__name__, "params", f"{self._count} tensors", str(len(before)))
        callback = grad_callback or self._grad_callback
        after = self._at_once(loss, before) if callback is None and self._track_higher_grads else None
        if after is None:
            gradients = self._gradients(loss, before)
            after = self._updated(before, gradients if callback is None else list(callback(gradients)))
        if self._fmodel is not None:
            self._fmodel.update_params(after)
        return after

    def _updated(self, before: list[Tensor], gradients: list[Tensor | None]) -> list[Tensor]:
        grouped = []
        for group, places in zip(self.param_groups, self._places, strict=True):
            group["params"] = [before[i] for i in places]
            grouped.append([gradients[i] for i in places])
        with torch.set_grad_enabled(self._track_higher_grads):
            self._update(grouped)
        after = before[:]
        for group, places in zip(self.param_groups, self._places, strict=True):
            for i, p in zip(places, group["params"], strict=True):
                tracked = self._track_higher_grads
                after[i] = p if tracked else p.detach().requires_grad_(before[i].requires_grad)
        return after

    def _at_once(self, loss: Tensor, before: list[Tensor]) -> list[Tensor] | None:
        """All parameters after the step where it can be taken without gradients of its own; otherwise ``None``."""
        return None

    def _gradients(self, loss: Tensor, params: list[Tensor]) -> list[Tensor | None]:
        """Of ``loss``, by each of ``params``; ``None`` where it is frozen or the loss does not depend on it."""
        places = [i for i, p in enumerate(params) if p.requires_grad]
        wanted, graph = [params[i] for i in places], self._track_higher_grads
        take = descent.gradients if graph else functools.partial(torch.autograd.grad, allow_unused=True)
        found = take(loss, wanted) if wanted else ()
        if all(g is None for g in found):
            raise ValueError(
                f"{type(self).__name__}: the loss must depend on a parameter that requires grad; compute it by the "
                "patched module, not by the original"
            )
        gradients: list[Tensor | None] = [None] * len(params)
        for i, g in zip(places, found, strict=True):
            gradients[i] = g
        return gradients

    @abc.abstractmethod
    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        """Put the new parameters into ``self.param_groups``."""


class _Elementwise(DifferentiableOptimizer):
    """By a step of ``core/optimizer_steps.py`` for each parameter."""

    _kind: ClassVar[Callable[..., tuple[Tensor, Any]]]
    _state: ClassVar[Any]
    _options: ClassVar[tuple[str, ...]]

    def _apply_override(self, override: Override) -> None:
        unknown = sorted(set(override) - set(self.param_groups[0]))
        if unknown:
            known = ", ".join(sorted(set(self.param_groups[0]) - {"params"}))
            fail(ValueError, type(self).__name__, "override", f"of {known}", ", ".join(unknown))
        super()._apply_override(override)

    def _step(self, group: dict[str, Any]) -> Callable[..., tuple[Tensor, Any]]:
        return type(self)._kind

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        for group, states, gradients in zip(self.param_groups, self.state, grouped_grads, strict=True):
            options = {name: group[name] for name in self._options if name in group}
            step = self._step(group)
            for i, (p, g) in enumerate(zip(group["params"], gradients, strict=True)):
                if g is None:
                    continue
                if g.is_sparse or g.is_complex():
                    fail(TypeError, type(self).__name__, "a gradient", "real and dense", f"{g.layout} of {g.dtype}")
                state = states[i]
                before = self._state(**_carried(state, self._state._fields)) if state else None
                group["params"][i], after = step(p, g, before, **options)
                state.update(after._asdict())


def _carried(state: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of torch's state, its counters as numbers."""
    known = {name: state[name] for name in names if name in state}
    return known | {k: v.item() for k, v in known.items() if k in ("step", "mu") and isinstance(v, Tensor)}


class DifferentiableSGD(_Elementwise):
    """``torch.optim.SGD``."""

    _kind, _state = steps.sgd, steps.SGDState
    _options = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")

    def _at_once(self, loss: Tensor, before: list[Tensor]) -> list[Tensor] | None:
        lr = self.param_groups[0]["lr"]
        if isinstance(lr, Tensor) or not all(_plain(group, lr) for group in self.param_groups):
            return None
        places = [i for own in self._places for i in own if before[i].requires_grad]
        moved = descent.descended(loss, [before[i] for i in places], lr, descent.fused)
        if moved is None:
            return None
        after = before[:]
        for i, p in zip(places, moved, strict=True):
            after[i] = before[i] if p is None else p
        for group, own in zip(self.param_groups, self._places, strict=True):
            group["params"] = [after[i] for i in own]
        return after


def _plain(group: dict[str, Any], lr: float) -> bool:
    """Whether a group of SGD takes ``p - lr g``."""
    without = (group[name] for name in ("momentum", "weight_decay", "maximize"))
    same = not isinstance(group["lr"], Tensor) and group["lr"] == lr
    return same and not any(isinstance(value, Tensor) or value for value in without)


class DifferentiableAdam(_Elementwise):
    """``torch.optim.Adam``."""

    _kind, _state = steps.adam, steps.AdamState
    _options = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")

    def _step(self, group: dict[str, Any]) -> Callable[..., tuple[Tensor, Any]]:
        return steps.adamw if group.get("decoupled_weight_decay") else steps.adam


class DifferentiableAdamW(_Elementwise):
    """``torch.optim.AdamW``."""

    _kind, _state = steps.adamw, steps.AdamState
    _options = DifferentiableAdam._options


class DifferentiableAdadelta(_Elementwise):
    """``torch.optim.Adadelta``."""

    _kind, _state = steps.adadelta, steps.AdadeltaState
    _options = ("lr", "rho", "eps", "weight_decay", "maximize")


class DifferentiableAdagrad(_Elementwise):
    """``torch.optim.Adagrad``."""

    _kind, _state = steps.adagrad, steps.AdagradState
    _options = ("lr", "lr_decay", "weight_decay", "eps", "maximize")


class DifferentiableAdamax(_Elementwise):
    """``torch.optim.Adamax``."""

    _kind, _state = steps.adamax, steps.AdamaxState
    _options = ("lr", "betas", "eps", "weight_decay", "maximize")


class DifferentiableASGD(_Elementwise):
    """``torch.optim.ASGD``."""

    _kind, _state = steps.asgd, steps.ASGDState
    _options = ("lr", "lambd", "alpha", "t0", "weight_decay", "maximize")


class DifferentiableRMSprop(_Elementwise):
    """``torch.optim.RMSprop``."""

    _kind, _state = steps.rmsprop, steps.RMSpropState
    _options = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")


class DifferentiableRprop(_Elementwise):
    """``torch.optim.Rprop``."""

    _kind, _state = steps.rprop, steps.RpropState
    _options = ("lr", "etas", "step_sizes", "maximize")


_opt_mapping: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    torch.optim.Adadelta: DifferentiableAdadelta,
    torch.optim.Adagrad: DifferentiableAdagrad,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.AdamW: DifferentiableAdamW,
    torch.optim.Adamax: DifferentiableAdamax,
    torch.optim.ASGD: DifferentiableASGD,
    torch.optim.RMSprop: DifferentiableRMSprop,
    torch.optim.Rprop: DifferentiableRprop,
    torch.optim.SGD: DifferentiableSGD,
}


def _differentiable(name: str, kind: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    if kind not in _opt_mapping:
        known = ", ".join(sorted(known.__name__ for known in _opt_mapping))
        fail(ValueError, name, "the optimizer", f"one of {known}", kind.__name__, "see register_optim")
    return _opt_mapping[kind]


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: PatchedModule | None = None,
    device: torch.device | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable form of ``opt``, with its param groups and state; see :class:`DifferentiableOptimizer`.

    Raises:
        ValueError: ``opt`` is of a class without one, or as the class.
    """
    return _differentiable("get_diff_optim", type(opt))(
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: dict[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: PatchedModule | None = None,
    device: torch.device | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable form of a new ``opt_type``; see :class:`DifferentiableOptimizer`.

    Args:
        opt_type: a class of ``torch.optim``, or one that was registered.
        opt_kwargs: its arguments.
        params: parameters, for their shapes, or dicts that make groups of them; those of ``fmodel`` by default. Groups
            beside ``fmodel`` are made of its latest fast weights.
        fmodel: as for the class.
        device: as for the class.
        override: as for the class.
        track_higher_grads: as for the class.
        **kwargs: to the class.

    Raises:
        ValueError: neither ``params`` nor ``fmodel`` is given, groups have a tensor that is not one of ``fmodel``'s
            fast weights, or as :func:`get_diff_optim`.
    """
    kind = _differentiable("create_diff_optim", opt_type)
    if params is None and fmodel is None:
        raise ValueError("create_diff_optim: one of fmodel and params must be given, got neither")
    given = list(params) if params is not None else []
    groups = given if given and isinstance(given[0], dict) else []
    listed = [p for group in groups for p in _tensors(group["params"])] if groups else given
    order = list(fmodel.parameters()) if fmodel is not None and (groups or params is None) else listed
    dummies = {id(p): torch.zeros_like(p, requires_grad=True) for p in order}
    if any(id(p) not in dummies for p in listed):
        raise ValueError("create_diff_optim: params must be fast weights of fmodel; take them from fmodel.parameters()")
    arguments: list[Any] = [
        {**group, "params": [dummies[id(p)] for p in _tensors(group["params"])]} for group in groups
    ] or list(dummies.values())
    return kind(
        opt_type(arguments, **(opt_kwargs or {})),
        dummies.values(),
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def _tensors(params: Any) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else list(params)


def register_optim(optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Make ``diff_optim_type`` the differentiable form of ``optim_type``."""
    _opt_mapping[optim_type] = diff_optim_type
