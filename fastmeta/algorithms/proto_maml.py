"""ProtoMAML: MAML whose head starts from the support set's prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastmeta.algorithms.adapted import AdaptedModel
from fastmeta.algorithms.head import head_module
from fastmeta.algorithms.inputs import select_parameters
from fastmeta.algorithms.maml import MAML
from fastmeta.engine.adaptation import Adaptation
from fastmeta.engine.objective import by_set, call_model, uses_set
from fastmeta.engine.work import Work, task_of
from fastmeta.inner.groups import Groups
from fastmeta.tasks.batch import TaskBatch


class ProtoMAML(MAML):
    """MAML with the head of a prototypical network for a start, and the gradient through it.

    With ``e`` the features that the head reads, by the initial weights ``theta``, and ``c_n`` their mean over class n
    of a task's support set, the head starts from::

        W_0[n] = 2 c_n(theta);   b_0[n] = -|c_n(theta)|^2

    so that its outputs are, but for what all classes share, minus the squared distances to the prototypes. Then head
    and body take the inner steps of :class:`fastmeta.MAML`, in which the head is what adapts and no function of the
    body. The meta-gradient reaches ``theta`` by both ways, as where the
    body starts and as what the prototypes are made of. The head's own parameters are never read: they get no gradient.

    The head is held as ``W_0(theta) + offset``, where the offset starts from zero and adapts: a step of the offset is a
    step of the head, for any rule without weight decay. What makes ``W_0`` is the same at every step and computed once
    (eq. 9 of docs/maths.md).

    Args:
        model: any module whose outputs are those of its head, ``[N, classes]``.
        loss: ``loss(outputs, targets)``.
        lr: a number, a tensor ``[]``, or ``[K]``; see :class:`fastmeta.MAML`.
        steps: K; 0 is a prototypical network.
        head: name of the head, an ``nn.Linear`` with bias; ``None`` for the last submodule with parameters of its own.
        parameters: which of the other parameters adapt beside the head, as :class:`fastmeta.MAML` has it; an empty list
            for the head alone.
        options: the other arguments of :class:`fastmeta.MAML` but ``update_running_stats`` and ``micro_batches``;
            ``batch_norm`` is transductive or running.

    Raises:
        TypeError: an argument that must be left out, or rates by name.
        ValueError: the head is no linear layer with bias, parameters are tied, weight decay; in a meta-step: targets
            that are not ``[T, N]`` of integers, or a class without a support sample.

    Source: E. Triantafillou et al., Meta-Dataset, ICLR 2020.
    """

    _batch_norms: ClassVar[tuple[str, ...]] = ("transductive", "running")

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        lr: float | Tensor | None = None,
        steps: int = 1,
        *,
        head: str | None = None,
        parameters: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        **options: Any,
    ) -> None:
        for name in ("update_running_stats", "micro_batches"):
            if name in options:
                raise TypeError(f"ProtoMAML: {name} must be left out, because prototypes take a pass more")
        if isinstance(lr, dict):
            raise TypeError("ProtoMAML: lr must be a number or a tensor, got rates by name")
        name = head_module(model, "ProtoMAML") if head is None else head
        layer = dict(model.named_modules()).get(name)
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise ValueError(f"ProtoMAML: head must be a Linear with bias, got {name!r}, {type(layer).__name__}")
        own = dict(model.named_parameters())
        if len(own) < sum(1 for _ in model.named_parameters(remove_duplicate=False)):
            raise ValueError("ProtoMAML: parameters must not be tied, got a model in which some are")
        prefix = f"{name}." if name else ""
        body = {n: p for n, p in own.items() if n not in (f"{prefix}weight", f"{prefix}bias")}
        adapting = select_parameters(body, parameters)
        wrapped = _Prototypical(model, prefix, layer, [n for n in adapting if body[n].requires_grad])
        chosen = ["offset_weight", "offset_bias", *(f"model.{n}" for n in adapting)]
        super().__init__(wrapped, loss, lr, steps, parameters=chosen, **options)
        rules = [self.inner]
        if isinstance(self.inner, Groups):
            rules = [self.inner.rule_of(f"offset_{part}") for part in ("weight", "bias")]
        decays = [getattr(rule, "weight_decay", None) for rule in rules]
        if any(isinstance(decay, Tensor) or decay for decay in decays):
            raise ValueError("ProtoMAML: weight_decay must be 0, because it would shrink the offset and not the head")
        self._wrapped = [wrapped]  # in a list, so that what stands for theta is no parameter of this module
        self.model = model

    def _settings(self, *_: Any) -> None:
        """Nothing is remembered of a meta-step whose tensors are made of others."""

    def _read_tensors(self) -> dict[str, Tensor]:
        wrapped = self._wrapped[0]
        tensors: dict[str, Tensor] = dict(self._objective.parameters())
        own = dict(self.model.named_parameters())
        for name, place in wrapped.starts.items():  # two views, so that an inner gradient sees the body alone
            tensors[f"model.{name}"] = own[name].view_as(own[name])
            tensors[f"start.{place}"] = own[name].view_as(own[name])
        for part in ("weight", "bias"):
            head = own[f"{wrapped.prefix}{part}"].detach()
            tensors[f"model.{wrapped.prefix}{part}"] = head
            offset = getattr(wrapped, f"offset_{part}")
            if offset.device != head.device or offset.dtype != head.dtype:  # the wrapper is not moved with the model
                offset.data = torch.zeros_like(head)
            tensors[f"offset_{part}"] = offset
        return tensors

    def _learned(self, work: Work) -> dict[str, Tensor]:
        head = {f"{self._wrapped[0].prefix}{part}" for part in ("weight", "bias")}
        learned: dict[str, Tensor] = {n: p for n, p in self.model.named_parameters() if n not in head}
        return learned | {n: p for n, p in work.parameters.items() if n.startswith("loss.")}

    def _to_learned(self, work: Work, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        starts, found = self._wrapped[0].starts, {}
        for name, parameter in self._learned(work).items():
            if parameter.requires_grad:
                found[name] = gradients[name if name.startswith("loss.") else f"model.{name}"]
                if name in starts:
                    found[name] = found[name] + gradients[f"start.{starts[name]}"]
        return found

    def _seen(self, tasks: TaskBatch) -> TaskBatch:
        if not isinstance(tasks.support, tuple) or len(tasks.support) != 2:
            raise ValueError("ProtoMAML: support must be (inputs, targets), got another form")
        inputs, targets = tasks.support
        classes = self._wrapped[0].classes
        if targets.dim() != 2 or targets.is_floating_point():
            raise ValueError(f"ProtoMAML: targets must be integers [T, N], got {targets.dtype} {tuple(targets.shape)}")
        present = (targets.unsqueeze(2) == torch.arange(classes, device=targets.device)).any(1)
        if not bool(present.all()):
            task, missing = (int(i) for i in present.logical_not().nonzero()[0])
            raise ValueError(
                f"ProtoMAML: every class must have a support sample, got none of class {missing} in task {task}; "
                f"the head has {classes} outputs"
            )
        support = ((inputs, inputs, targets), targets)
        if tasks.query is None:
            return TaskBatch(support)
        if not isinstance(tasks.query, tuple):
            raise ValueError("ProtoMAML: query must be (inputs, targets), got another form")
        return TaskBatch(support, ((tasks.query[0], inputs, targets), *tasks.query[1:]))

    def _adapted(self, work: Work, found: Adaptation, single: bool) -> AdaptedModel:
        wrapped = self._wrapped[0]
        own: dict[str, Tensor] = dict(self.model.named_parameters())
        phi = dict(zip(work.packing.names, found.phi, strict=True))
        with torch.no_grad(), by_set(self.model, uses_set(self.batch_norm, query=False)):
            heads = [wrapped.prototypes(own, *task_of(work.support[0][1:], t)) for t in range(work.tasks)]
        for part, start in zip(("weight", "bias"), zip(*heads, strict=True), strict=True):
            phi[f"model.{wrapped.prefix}{part}"] = torch.stack(start) + phi.pop(f"offset_{part}")
        adapted = {name.removeprefix("model."): value for name, value in phi.items()}
        return self._made_of(adapted, found, single)


class _Prototypical(nn.Module):
    """A model whose head is made of a support set's features and an offset.

    Its parameters under ``start`` stand for those the model starts from, which have other values than the model's own
    while it adapts; their own values are never read.

    Args:
        model: the model.
        prefix: of the names of the head's parameters.
        head: the head.
        adapting: names of the other parameters that adapt.
    """

    def __init__(self, model: nn.Module, prefix: str, head: nn.Linear, adapting: list[str]) -> None:
        super().__init__()
        own = dict(model.named_parameters())
        self.model, self.prefix = model, prefix
        self.classes, self.features = head.out_features, head.in_features
        self.starts = {name: name.replace(".", "/") for name in adapting}
        self.start = nn.Module()
        for name, place in self.starts.items():
            self.start.register_parameter(place, nn.Parameter(own[name].detach()))
        self.offset_weight = nn.Parameter(torch.zeros_like(head.weight), requires_grad=False)
        self.offset_bias = nn.Parameter(torch.zeros_like(head.bias), requires_grad=False)

    def forward(self, inputs: Any, support: Any, targets: Tensor) -> Any:
        """Outputs for ``inputs`` of the task that has this support set."""
        start = {name: getattr(self.start, place) for name, place in self.starts.items()}
        weight, bias = self.prototypes(start, support, targets)
        head = {f"{self.prefix}weight": weight + self.offset_weight, f"{self.prefix}bias": bias + self.offset_bias}
        return functional_call(self.model, head, *_arguments(inputs))

    def prototypes(self, start: dict[str, Tensor], support: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The head's weight and bias, by a body of these parameters.

        Features are what the model gives under a head that is the identity. Buffers it would write are copies.
        """
        identity = torch.eye(self.features, dtype=self.offset_weight.dtype, device=targets.device)
        head = {f"{self.prefix}weight": identity, f"{self.prefix}bias": identity.new_zeros(self.features)}
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        features: Tensor = functional_call(self.model, {**buffers, **start, **head}, *_arguments(support))
        if features.dim() != 2 or features.shape[1] != self.features:
            raise ValueError(
                f"ProtoMAML: the model's outputs must be its head's, [N, classes], got {tuple(features.shape)} under a "
                f"head of {self.features} outputs; name the last layer by head="
            )
        members = F.one_hot(targets, self.classes).to(features.dtype)
        means = (members.T @ features) / members.sum(0).unsqueeze(1)
        return 2 * means, -means.square().sum(1)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What :func:`call_model` would hand to the model."""
    taken: tuple[tuple[Any, ...], dict[str, Any]] = call_model(lambda *args, **kwargs: (args, kwargs), inputs)
    return taken
