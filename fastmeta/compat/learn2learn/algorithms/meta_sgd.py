"""Meta-SGD as a module that is cloned and adapted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.algorithms.maml import MetaOutput
from fastmeta.compat.learn2learn.algorithms.base_learner import BaseLearner
from fastmeta.compat.learn2learn.algorithms.engine import Engine, Loss, Tasks
from fastmeta.compat.learn2learn.gradients import gradients
from fastmeta.compat.learn2learn.utils import clone_module, clone_parameters, replace_parameters, require_as_many
from fastmeta.core.checks import fail


def meta_sgd_update(
    model: nn.Module, lrs: Iterable[Tensor] | None = None, grads: Sequence[Tensor | None] | None = None
) -> nn.Module:
    """One step of gradient descent, ``p - lr * g`` with a rate for each element, that autograd sees.

    Tied parameters stay tied, and recurrent layers see their new weights.

    Args:
        model: the module, changed in place; its tensors are not.
        lrs: a rate for each of ``model.parameters()``, in their order, that broadcasts to its shape; their attributes
            ``_lr`` by default.
        grads: likewise the gradients; a parameter with ``None`` stays. Their ``.grad`` by default, which is taken:
            it is ``None`` afterwards.

    Returns:
        The module.

    Raises:
        ValueError: another number of rates or gradients than of parameters, or no rate for a gradient.
    """
    parameters = list(model.parameters())
    if grads is None:
        grads = [_taken(p) for p in parameters]
    rates = [getattr(p, "_lr", None) for p in parameters] if lrs is None else list(lrs)
    require_as_many("meta_sgd_update", "lrs", rates, parameters)
    require_as_many("meta_sgd_update", "grads", grads, parameters)
    steps = []
    for i, (p, lr, g) in enumerate(zip(parameters, rates, grads, strict=True)):
        if g is not None:
            if lr is None:
                fail(ValueError, "meta_sgd_update", "lrs", "given where parameters have no _lr", f"None for number {i}")
            steps.append((p, p - lr * g))
    return replace_parameters(model, steps)


class MetaSGD(BaseLearner):
    """Meta-SGD (Z. Li, F. Zhou, F. Chen, H. Li, 2017): MAML with a learned rate for every element.

    Args:
        model: the module to wrap.
        lr: what every rate starts from.
        first_order: take inner gradients as constants.
        lrs: the rates, one tensor for each of ``model.parameters()``, instead of ``lr``.

    Attributes:
        lrs: the rates; a ``ParameterList`` where they were made here, the clones of them in a clone.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1.0, first_order: bool = False, lrs: Iterable[Tensor] | None = None
    ) -> None:
        super().__init__(model)
        if lrs is None:
            lrs = nn.ParameterList([nn.Parameter(torch.ones_like(p) * lr) for p in model.parameters()])
        self.lrs = lrs
        self.first_order = first_order
        self._engine = Engine()

    def clone(self) -> MetaSGD:
        """A learner whose module and rates are clones of this one's; a clone may be cloned again."""
        return MetaSGD(clone_module(self.module), lrs=clone_parameters(self.lrs), first_order=self.first_order)

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One inner step along the gradient of ``loss``, in place.

        Args:
            loss: a scalar made by this learner.
            first_order: for this step, another than the learner's.

        Raises:
            RuntimeError: a parameter is unused by the loss, or does not require grad.
            ValueError: another number of rates than of parameters.
        """
        found = gradients(
            "MetaSGD.adapt",
            loss,
            self.module.parameters(),
            create_graph=not (self.first_order if first_order is None else first_order),
            names=lambda: [name for name, _ in self.module.named_parameters()],
        )
        self.module = meta_sgd_update(self.module, self.lrs, found)

    def meta_step(self, tasks: Tasks, loss: Loss, steps: int = 1, **options: Any) -> MetaOutput:
        """What a loop over tasks computes, by the engine in one call: :meth:`MAML.meta_step`, with these rates.

        Not in learn2learn. ``.loss.backward()`` leaves the meta-gradient in ``.grad`` of parameters and rates.

        Args:
            tasks: as there.
            loss: as there.
            steps: as there.
            **options: as there.

        Returns:
            As there.

        Raises:
            RuntimeError: a parameter does not require grad.
            ValueError: this learner is a clone, a parameter is unused, or as :class:`fastmeta.MAML`.
        """
        names = [name for name, _ in self.module.named_parameters()]
        rates = list(self.lrs)
        require_as_many("MetaSGD.meta_step", "lrs", rates, names)
        return self._engine.meta_step(
            "MetaSGD.meta_step",
            self.module,
            dict(zip(names, rates, strict=True)),
            tasks,
            loss,
            steps,
            first_order=self.first_order,
            allow_unused=False,
            allow_nograd=False,
            options=options,
        )


def _taken(p: Tensor) -> Tensor | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # one can be put there
        grad, p.grad = p.grad, None
    return grad
