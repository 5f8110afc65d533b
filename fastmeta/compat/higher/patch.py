"""Modules whose parameters are tensors of a graph: the fast weights of an inner loop, with their history."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastmeta.compat.higher.utils import copied, get_func_params
from fastmeta.core.checks import fail

_INTERNAL = {*vars(nn.Module()), "_compiled_call_impl"} - {"training"}  # of these a patched module has its own
_STALE = (SpectralNorm, WeightNorm)  # hooks that write a parameter's product, which no hook does in a patched module


class _Patched:
    """What every module of a patched one has: parameters that are any tensors, and that may be assigned."""

    def __setattr__(self, name: str, value: Any) -> None:
        index = self.__dict__.get("_fast_index", {}).get(name)
        if index is None:
            super().__setattr__(name, value)
            return
        if not isinstance(value, Tensor):
            fail(TypeError, type(self).__name__, name, "a torch.Tensor, a fast weight", type(value).__name__)
        root = self.__dict__["_fast_root"]()
        if root is None or root.fast_params is None:
            raise RuntimeError(f"{type(self).__name__}: {name} cannot be assigned before there are fast weights")
        root.update_params([*root.fast_params[:index], value, *root.fast_params[index + 1 :]])

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """The module's own ``forward`` with the latest fast weights, or with ``params``, which become the latest."""
        reference = self.__dict__.get("_fast_root")
        root = None if reference is None else reference()  # a slice of a patched nn.Sequential has none
        if params is not None:
            if root is None:
                raise ValueError(f"{type(self).__name__}: params can be given to a patched module that exists only")
            root.update_params(params)
        elif root is not None and root.fast_params is None:
            raise ValueError(f"{type(self).__name__}: params must be given to a module without fast weights")
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class PatchedModule(_Patched):
    """The root of a patched module: its fast weights, one list a step."""

    _fast_params: list[list[Tensor]] | None
    _fast_slots: list[tuple[dict[str, Any], str, int]]
    _fast_names: list[str]
    _track_higher_grads: bool

    @property
    def track_higher_grads(self) -> bool:
        """Whether earlier fast weights and their graph are kept."""
        return self._track_higher_grads

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            fail(ValueError, type(self).__name__, "track_higher_grads", "a bool", type(value).__name__)
        self._track_higher_grads = value

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The first fast weights; raises unless higher gradients are tracked."""
        if not self.track_higher_grads:
            raise RuntimeError(f"{type(self).__name__}: the first fast weights are kept with track_higher_grads only")
        return self._history()[0]

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The latest fast weights, in the order of the original's ``parameters()``; ``None`` before there are any."""
        return None if self._fast_params is None else self._fast_params[-1]

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        self.update_params(value)

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Make ``params`` the latest fast weights, in the order of the original's ``parameters()``."""
        params = list(params)
        if len(params) != len(self._fast_names):
            fail(ValueError, type(self).__name__, "params", f"{len(self._fast_names)} tensors", str(len(params)))
        history = (self._fast_params or []) if self.track_higher_grads else []
        self._fast_params = [*history, params]
        for parameters, name, index in self._fast_slots:
            parameters[name] = params[index]

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Tensor]:
        """Fast weights.

        Args:
            recurse: ``False`` warns, and still gives those of all submodules.
            time: the number of updates since the module was made: 0 for the first ones, negative ones count from the
                latest, which come by default.

        Raises:
            RuntimeError: there are no fast weights yet.
            ValueError: an earlier time without ``track_higher_grads``.
            IndexError: there was no such time.
        """
        if not recurse:
            warnings.warn(
                "parameters(recurse=False) of a patched module gives the fast weights of its submodules too",
                stacklevel=2,
            )
        return iter(self._at(time))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True, time: int | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Fast weights and the names of the originals; ``time`` as in :meth:`parameters`."""
        weights = self._at(time)
        if time is None and not (recurse and remove_duplicate):
            yield from nn.Module.named_parameters(self, prefix, recurse, remove_duplicate)  # type: ignore[arg-type]
            return
        start = f"{prefix}." if prefix else ""
        yield from ((start + name, weight) for name, weight in zip(self._fast_names, weights, strict=True))

    def __deepcopy__(self, memo: dict) -> Any:
        raise TypeError(f"{type(self).__name__}: a patched module cannot be copied; patch the original once more")

    def _at(self, time: int | None) -> list[Tensor]:
        history = self._history()
        time = -1 if time is None else time
        if not self.track_higher_grads and time not in (-1, 0):
            fail(ValueError, type(self).__name__, "time", "-1 or 0 without track_higher_grads", time)
        if not -len(history) <= time < len(history):
            raise IndexError(
                f"{type(self).__name__}: time must be below {len(history)}, the updates so far, got {time}"
            )
        return history[time]

    def _history(self) -> list[list[Tensor]]:
        if self._fast_params is None:
            raise RuntimeError(f"{type(self).__name__}: the patched module has no fast weights; call update_params")
        return self._fast_params


@functools.lru_cache(maxsize=512)
def _patched_class(kind: Any, mixin: type, prefix: str) -> Any:
    body: dict[str, Any] = {"__module__": kind.__module__}
    if hasattr(kind, "flatten_parameters"):
        body["flatten_parameters"] = _stay_unpacked
    return type(prefix + kind.__name__, (mixin, kind), body)


def _stay_unpacked(module: Any) -> None:
    """Packing a recurrent module's weights in place would take them out of their graph."""


def _copy(module: nn.Module, index: dict[int, int], device: torch.device | None) -> Any:
    """A module of the same structure that shares no container of parameters, buffers, modules or hooks."""
    modules, clones, buffers = list(module.modules()), dict[int, Any](), dict[int, Tensor]()
    slots: list[tuple[dict[str, Any], str, int]] = []
    for m in modules:
        if isinstance(m, _Patched):
            raise ValueError(f"monkeypatch: {type(m).__name__} is patched already; patch the original module")
        if any(isinstance(hook, _STALE) for hook in m._forward_pre_hooks.values()):
            raise ValueError(
                f"monkeypatch: {type(m).__name__} must not have a weight_norm or spectral_norm made of hooks, which "
                "its patched form has not; use torch.nn.utils.parametrizations"
            )
        mixin, prefix = (PatchedModule, "Functional") if m is module else (_Patched, "InnerFunctional")
        original: Any = type(m)
        kind = _patched_class(original, mixin, prefix)
        clones[id(m)] = clone = kind.__new__(kind)
        nn.Module.__init__(clone)
    root = weakref.ref(clones[id(module)])
    for m in modules:
        clone = clones[id(m)]
        own = {name: index[id(p)] for name, p in m._parameters.items() if p is not None}
        clone.__dict__.update(
            {k: _rebound(m, k, v, clones, index) for k, v in vars(m).items() if k not in _INTERNAL},
            _fast_index=own,
            _fast_root=root,
        )
        clone._parameters.update(dict.fromkeys(m._parameters))
        slots += [(clone._parameters, name, place) for name, place in own.items()]
        clone._modules.update({k: None if v is None else clones[id(v)] for k, v in m._modules.items()})
        clone._non_persistent_buffers_set = set(m._non_persistent_buffers_set)
        for name, buffer in m._buffers.items():
            if isinstance(buffer, Tensor) and id(buffer) not in buffers:
                buffers[id(buffer)] = copied(buffer, device)
            clone._buffers[name] = buffers.get(id(buffer), buffer)
    patched = clones[id(module)]
    names = [name for name, _ in module.named_parameters()]
    patched.__dict__.update(_fast_params=None, _fast_slots=slots, _fast_names=names, _track_higher_grads=True)
    return patched


def _rebound(module: nn.Module, name: str, value: Any, clones: dict[int, Any], index: dict[int, int]) -> Any:
    """An attribute as the patched module has it: its modules and bound methods instead of the original's."""
    if isinstance(value, nn.Module):
        return clones.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in clones:
        return types.MethodType(value.__func__, clones[id(value.__self__)])
    if isinstance(value, nn.Parameter) and id(value) in index:
        raise ValueError(
            f"monkeypatch: {type(module).__name__}.{name} must not hold parameters outside the module's registry, "
            "where the patched module would go on with the original ones; use nn.ParameterList or nn.ParameterDict"
        )
    if isinstance(module, nn.RNNBase) and name == "_flat_weights":
        return value  # which it forms anew where its weights are others
    if type(value) is dict:
        parts = {k: _rebound(module, name, v, clones, index) for k, v in value.items()}
        return parts if any(parts[k] is not v for k, v in value.items()) else value
    if type(value) in (list, tuple):
        items = [_rebound(module, name, v, clones, index) for v in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def make_functional(
    module: nn.Module, encapsulator: Callable[[PatchedModule, nn.Module], None] | None = None
) -> PatchedModule:
    """A patched copy of ``module`` without fast weights: calls must give it ``params=``.

    Args:
        module: any module that is not patched.
        encapsulator: called with the patched module and ``module`` at the end.

    Raises:
        ValueError: see :func:`monkeypatch`.
    """
    return _make_functional(module, encapsulator, None)


def _make_functional(
    module: nn.Module,
    encapsulator: Callable[[PatchedModule, nn.Module], None] | None,
    device: torch.device | None,
) -> PatchedModule:
    patched: PatchedModule = _copy(module, {id(p): i for i, p in enumerate(module.parameters())}, device)
    if encapsulator is not None:
        encapsulator(patched, module)
    return patched


def monkeypatch(
    module: nn.Module,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> PatchedModule:
    """A copy of ``module``, of a subclass of its class, whose parameters are fast weights.

    Buffers are copied: what the copy does to them the original does not see. Hooks are not carried over; new ones may
    be registered. Parameters that are shared stay shared, and so do modules.

    Args:
        module: any module that is not patched.
        device: where fast weights and buffers are put; where they are by default.
        copy_initial_weights: the first fast weights are leaves that hold copies. Otherwise they are clones in the graph
            of the module's own parameters, as MAML needs it.
        track_higher_grads: keep the fast weights of every time and their graph.

    Raises:
        ValueError: ``module`` is patched already, has a weight or spectral norm made of hooks, or holds parameters in
            attributes outside its registry; its patched form would silently go on with the original weights.
    """
    patched = _make_functional(module, None, device)
    if copy_initial_weights:
        params = get_func_params(module, device=device)
    else:
        params = [p.clone() if device is None else p.clone().to(device) for p in module.parameters()]
    patched.update_params(params)
    patched.track_higher_grads = track_higher_grads
    return patched


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | None = None) -> None:
    """Copy the buffers of ``module`` into ``fmodule``.

    Raises:
        KeyError: ``fmodule`` lacks a submodule.
    """
    for name, child in module.named_modules():
        other = fmodule
        for part in name.split(".") if name else []:
            if part not in other._modules:
                raise KeyError(f"buffer_sync: the patched module has no submodule {name!r}")
            other = other._modules[part]  # type: ignore[assignment]
        for key, value in child._buffers.items():
            other._buffers[key] = copied(value, device) if isinstance(value, Tensor) else value
