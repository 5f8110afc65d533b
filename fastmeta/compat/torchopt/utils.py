"""Snapshots of modules and meta-optimizers, and cuts of their graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta.compat.torchopt.optim import Containers, MetaOptimizer, buffer_containers, parameter_containers
from fastmeta.core.checks import fail, one_of

CopyMode = Literal["reference", "copy", "deepcopy", "ref", "clone", "deepclone"]
_MODES = {
    "reference": "reference",
    "ref": "reference",
    "copy": "copy",
    "clone": "copy",
    "deepcopy": "deepcopy",
    "deepclone": "deepcopy",
}


class ModuleState(NamedTuple):
    """Of a module, the contents of its containers.

    Attributes:
        params: parameters, a dict for each module that has some.
        buffers: buffers, likewise.
        visual_contents: names by tensor or by ``grad_fn``, where asked for.
        detach_buffers: whether buffers are copied when they are recovered.
    """

    params: Containers
    buffers: Containers
    visual_contents: dict[Any, Any] | None = None
    detach_buffers: bool = False


def stop_gradient(target: Any) -> None:
    """Cut tensors off their graph, in place; they go on requiring grad where they did.

    Args:
        target: a module (its parameters), a :class:`MetaOptimizer`, the state of either, or a tree of tensors.
    """
    if isinstance(target, ModuleState):
        target = (target.params, target.buffers)
    elif isinstance(target, nn.Module):
        target = list(target.parameters())
    elif isinstance(target, MetaOptimizer):
        target = target.state_dict()
    for leaf in pytree.tree_leaves(target):
        if isinstance(leaf, Tensor):
            requires_grad = leaf.requires_grad
            leaf.detach_().requires_grad_(requires_grad)


def module_detach_(target: Any) -> Any:
    """:func:`stop_gradient`, and ``target`` again."""
    stop_gradient(target)
    return target


def extract_state_dict(
    target: nn.Module | MetaOptimizer,
    *,
    by: CopyMode = "reference",
    device: torch.device | str | int | None = None,
    with_buffers: bool = True,
    detach_buffers: bool = False,
    enable_visual: bool = False,
    visual_prefix: str = "",
) -> Any:
    """A snapshot of a module or a meta-optimizer, for :func:`recover_state_dict`.

    Args:
        target: the module or the meta-optimizer.
        by: ``"reference"`` the tensors themselves; ``"copy"`` clones in their graph; ``"deepcopy"`` copies outside it.
            Tensors that stand in several places do so in the snapshot.
        device: where to put them.
        with_buffers: of a module, buffers as well.
        detach_buffers: of a module, copies of buffers outside their graph whatever ``by``, and again when recovered.
        enable_visual: of a module, ``visual_contents`` as well.
        visual_prefix: before the names in it.

    Returns:
        :class:`ModuleState`, or the tuple of the meta-optimizer's states.

    Raises:
        TypeError: ``target`` is neither.
        ValueError: ``by`` is another word.
    """
    replicate = _replicator("extract_state_dict", by, device)
    if isinstance(target, MetaOptimizer):
        return pytree.tree_map(replicate, target.state_dict())
    if not isinstance(target, nn.Module):
        fail(TypeError, "extract_state_dict", "target", "a module or a MetaOptimizer", type(target).__name__)
    visual = None
    if enable_visual:
        named = [(visual_prefix + name, p) for name, p in target.named_parameters()]
        visual = dict((p, name) if p.grad_fn is None else (p.grad_fn, (name, p)) for name, p in named)
    buffered = _replicator("extract_state_dict", "deepcopy", device) if detach_buffers else replicate
    return ModuleState(
        params=tuple(_tensors(container, replicate) for container in parameter_containers(target)),
        buffers=tuple(_tensors(container, buffered) for container in buffer_containers(target) if with_buffers),
        visual_contents=visual,
        detach_buffers=detach_buffers,
    )


def recover_state_dict(target: nn.Module | MetaOptimizer, state: ModuleState | Sequence[Any]) -> None:
    """Put the tensors of a snapshot back, by reference.

    Args:
        target: what the snapshot was made of, or a module of the same structure.
        state: the snapshot.

    Raises:
        TypeError: ``target`` is neither a module nor a meta-optimizer, or ``state`` is not of its kind.
        ValueError: the snapshot is of another structure.
    """
    if isinstance(target, MetaOptimizer):
        target.load_state_dict(state)
        return
    if not isinstance(target, nn.Module):
        fail(TypeError, "recover_state_dict", "target", "a module or a MetaOptimizer", type(target).__name__)
    if not isinstance(state, ModuleState):
        fail(TypeError, "recover_state_dict", "state", "the ModuleState of a module", type(state).__name__)
    buffers = state.buffers
    if state.detach_buffers:
        apart = _replicator("recover_state_dict", "deepcopy", None)
        buffers = tuple(_tensors(container, apart) for container in buffers)
    places = {"params": (parameter_containers(target), state.params), "buffers": (buffer_containers(target), buffers)}
    for name, (containers, contents) in places.items():
        if not (name == "buffers" and not contents):
            _check_structure(name, containers, contents)
            for container, content in zip(containers, contents, strict=True):
                container.update(content)


def module_clone(
    target: Any,
    *,
    by: CopyMode = "reference",
    detach_buffers: bool = False,
    device: torch.device | str | int | None = None,
) -> Any:
    """A clone of a module, a meta-optimizer, or a tree of tensors.

    Args:
        target: the clone of a module shares nothing with it but, by reference, tensors; that of a meta-optimizer
            optimizes the same modules with a state of its own.
        by: as for :func:`extract_state_dict`.
        detach_buffers: as for :func:`extract_state_dict`.
        device: as for :func:`extract_state_dict`.

    Raises:
        ValueError: ``by`` is another word.
    """
    replicate = _replicator("module_clone", by, device)
    if not isinstance(target, (nn.Module, MetaOptimizer)):
        return pytree.tree_map(replicate, target)
    state = extract_state_dict(target, by=by, device=device, detach_buffers=detach_buffers)
    if isinstance(target, MetaOptimizer):
        cloned: Any = copy.copy(target)
        cloned.param_containers_groups = list(target.param_containers_groups)
        cloned.state_groups = list(state)
        return cloned
    held = [*parameter_containers(target), *buffer_containers(target)]
    cloned = copy.deepcopy(target, {id(t): t for container in held for t in container.values()})
    recover_state_dict(cloned, state)
    return cloned


def _replicator(name: str, by: str, device: torch.device | str | int | None) -> Callable[[Any], Any]:
    """What makes of a tensor the snapshot's; the same of the same, and of anything else itself."""
    one_of(name, "by", by, _MODES)
    mode, place = _MODES[by], None if device is None else torch.device(device)
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, whose id is its own as long as it lives

    def replicate(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor, _replica(tensor, mode, place)
        return seen[id(tensor)][1]

    return replicate


def _replica(tensor: Tensor, mode: str, device: torch.device | None) -> Tensor:
    if mode == "deepcopy":
        value = tensor.detach().clone()
        value = value if device is None else value.to(device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(value, requires_grad=tensor.requires_grad)
        return value.requires_grad_(tensor.requires_grad)
    value = tensor.clone() if mode == "copy" else tensor
    return value if device is None else value.to(device)


def _tensors(container: dict[str, Any], replicate: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: replicate(tensor) for name, tensor in container.items() if isinstance(tensor, Tensor)}


def _check_structure(name: str, containers: Containers, contents: Containers) -> None:
    ours = [[key for key, value in container.items() if isinstance(value, Tensor)] for container in containers]
    theirs = [list(content) for content in contents]
    if ours != theirs:
        got = "one of other names or modules"
        fail(ValueError, "recover_state_dict", "state", f"a snapshot of a module with the same {name}", got)
