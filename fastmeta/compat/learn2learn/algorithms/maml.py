"""MAML as a module that is cloned and adapted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.algorithms.maml import MetaOutput
from fastmeta.compat.descent import descended, rounded
from fastmeta.compat.learn2learn.algorithms.base_learner import BaseLearner
from fastmeta.compat.learn2learn.algorithms.engine import Engine, Loss, Tasks
from fastmeta.compat.learn2learn.gradients import gradients
from fastmeta.compat.learn2learn.utils import clone_module, replace_parameters, require_as_many, update_module
from fastmeta.core.checks import fail


def maml_update(model: nn.Module, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None) -> nn.Module:
    """One step of gradient descent, ``p - lr * g``, that autograd sees.

    Args:
        model: the module, changed in place; its tensors are not.
        lr: the rate.
        grads: ``g`` of each of ``model.parameters()``, in their order; a parameter with ``None`` stays. If the whole
            is ``None``, parameters move by their attribute ``update``, as :func:`update_module` has it.

    Returns:
        The module.

    Raises:
        ValueError: another number of gradients than of parameters, or no gradients and no ``update`` either.
    """
    parameters = list(model.parameters())
    if grads is None:
        if not any(getattr(p, "update", None) is not None for p in parameters):
            mend = "it does not read .grad; pass [p.grad for p in model.parameters()]"
            fail(ValueError, "maml_update", "grads", "a list where no parameter has an update", "None", mend)
        return update_module(model)
    require_as_many("maml_update", "grads", grads, parameters)
    return _descended(model, parameters, lr, grads)


class MAML(BaseLearner):
    """Model-agnostic meta-learning (C. Finn, P. Abbeel, S. Levine, ICML 2017).

    ``clone()`` gives a copy for one task; ``adapt(loss)`` takes ``p <- p - lr * d loss/d p`` in the copy. A loss of the
    adapted copy has gradients to the wrapped module's parameters, through every step unless ``first_order``.

    Args:
        model: the module to wrap.
        lr: the inner rate; a tensor that requires grad gets its meta-gradient.
        first_order: take inner gradients as constants (FOMAML).
        allow_unused: let parameters that a loss does not use stay; ``allow_nograd`` by default.
        allow_nograd: let parameters that do not require grad stay.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(model)
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused
        self._engine = Engine()

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One inner step along the gradient of ``loss``, in place.

        Args:
            loss: a scalar made by this learner.
            first_order: for this step, another than the learner's.
            allow_unused: likewise.
            allow_nograd: likewise.

        Raises:
            RuntimeError: a parameter is unused by the loss or does not require grad, and that is not allowed.
        """
        parameters, lr = list(self.module.parameters()), self.lr
        second_order = not _chosen(first_order, self.first_order)
        allow_unused = _chosen(allow_unused, self.allow_unused)
        allow_nograd = _chosen(allow_nograd, self.allow_nograd)
        wanted = [p for p in parameters if p.requires_grad]
        if second_order and not isinstance(lr, Tensor) and (allow_nograd or len(wanted) == len(parameters)):
            moved = descended(loss, wanted, lr, rounded)
            if moved is not None and (allow_unused or all(new is not None for new in moved)):
                pairs = [(old, new) for old, new in zip(wanted, moved, strict=True) if new is not None]
                replace_parameters(self.module, pairs)
                return
        found = gradients(
            "MAML.adapt",
            loss,
            parameters,
            create_graph=second_order,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
            names=lambda: [name for name, _ in self.module.named_parameters()],
        )
        _descended(self.module, parameters, lr, found)

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """A learner whose module is :func:`clone_module` of this one's; a clone may be cloned again.

        Args:
            first_order: another than this learner's.
            allow_unused: likewise.
            allow_nograd: likewise.
        """
        return MAML(
            clone_module(self.module),
            lr=self.lr,
            first_order=_chosen(first_order, self.first_order),
            allow_unused=_chosen(allow_unused, self.allow_unused),
            allow_nograd=_chosen(allow_nograd, self.allow_nograd),
        )

    def meta_step(self, tasks: Tasks, loss: Loss, steps: int = 1, **options: Any) -> MetaOutput:
        """What a loop over tasks of clone, ``steps`` times adapt, and query loss computes, by the engine in one call.

        Not in learn2learn. ``meta_step(...).loss.backward()`` leaves in ``.grad`` of this learner's parameters the mean
        over tasks of what each task's ``query_loss.backward()`` would have left, to rounding, and in batch norm's
        running statistics what the loop would have left. Differentiable once.

        Args:
            tasks: a :class:`fastmeta.TaskBatch`, or a sequence of ``(support, query)``, each ``(inputs, targets)``.
            loss: ``loss(outputs, targets)`` of one task. A trace is kept for the function object that is passed here:
                pass the same one every time, not a new ``lambda``.
            steps: the number of inner steps.
            **options: of :class:`fastmeta.MAML`, such as ``memory_budget``.

        Returns:
            The mean query loss ``.loss``, ``.task_losses`` ``[T]``, ``.logits`` and ``.support_losses`` ``[K, T]``.

        Raises:
            RuntimeError: a parameter does not require grad, and that is not allowed.
            ValueError: this learner is a clone, a parameter is unused, or as :class:`fastmeta.MAML`.
        """
        return self._engine.meta_step(
            "MAML.meta_step",
            self.module,
            self.lr,
            tasks,
            loss,
            steps,
            first_order=self.first_order,
            allow_unused=self.allow_unused,
            allow_nograd=self.allow_nograd,
            options=options,
        )


def _descended(
    model: nn.Module, parameters: Sequence[Tensor], lr: float | Tensor, grads: Sequence[Tensor | None]
) -> nn.Module:
    moving = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
    if not moving:
        return model
    old, found = map(list, zip(*moving, strict=True))
    # Two operations in the graph, not two a parameter, with the bits of p + (-lr * g).
    updates = [-lr * g for g in found] if isinstance(lr, Tensor) else torch._foreach_mul(found, -lr)
    return replace_parameters(model, zip(old, torch._foreach_add(old, updates), strict=True))


def _chosen(here: bool | None, otherwise: bool) -> bool:
    return otherwise if here is None else here
