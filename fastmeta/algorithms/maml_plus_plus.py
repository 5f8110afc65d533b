"""MAML++: MAML with a loss at every step, rates for every step and layer, and batch norm for every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmeta.algorithms.adapted import AdaptedModel
from fastmeta.algorithms.inner_rule import DEFAULT
from fastmeta.algorithms.inputs import BatchNorm, select_parameters
from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.step_norms import StepNorms
from fastmeta.algorithms.step_rates import StepRates
from fastmeta.core import checks
from fastmeta.engine.adaptation import Adaptation
from fastmeta.engine.work import Work
from fastmeta.inner.configuration import Configuration


class MAMLPlusPlus(MAML):
    """How to train your MAML: four changes that make MAML's outer loop stable, each exact on the engine.

    *Multi-step loss.* While gradients are enabled, the module is in training mode and takes its own number of steps, a
    task's loss is ``sum_k w_k lq(phi_k)`` with ``w_0 = 0`` and weights that go from equal ones to the last one's
    (:meth:`loss_weights`). All of it is one adjoint, into which the query gradient of every step flows where it belongs
    (docs/maths.md, eq. 26): a query pass forward and back more for each step, not a meta-step more.

    *Rates.* ``alpha[k, j]`` for step k and adapting parameter j, learned: ``learner.lr`` ``[K, S]``, or
    ``learner.inner.lr``. Steps beyond K take the last row.

    *Derivative order.* First order while ``epoch < first_order_epochs``, second order from then on.

    *Batch norm for every step.* Passes at the weights ``phi_k`` read row k of each batch norm's scale, shift and
    running statistics, k = 0..K (the authors' code counts the query pass after a step to the same row as that step);
    passes beyond K read the last row. Scales and shifts are learned by the outer loop and do not adapt. In training
    mode a pass normalises by the statistics of its own set, and the support passes and the last query pass leave theirs
    in the running statistics of their row; in evaluation mode (``learner.eval()``) it normalises by those. The
    rows are ``learner.norms``; the model's own batch norm parameters are where they start, and are read no more.

    The schedule of the outer learning rate, half a cosine in the paper, is the caller's.

    Args:
        model, loss, steps: as :class:`fastmeta.MAML` has them.
        lr: what every rate is at first; 0.01, or that of ``inner``, if left out.
        inner: a rule for the inner steps, of which a copy is made; its ``lr`` is a number, and becomes the table.
        parameters: which parameters adapt, as :class:`fastmeta.MAML` has it, batch norm's apart.
        multi_step_epochs: how long the multi-step loss lasts; 0 for never.
        first_order_epochs: how long first order lasts.
        batch_norm: ``"per_step"``, so that batch norm has rows, or as :class:`fastmeta.MAML` has it. Where tasks may
            stop early, all of them still read the rows of the steps that the loop is at.
        options: the other arguments of :class:`fastmeta.MAML` but ``first_order``; ``update_running_stats`` is true
            where batch norm keeps running statistics, unless it is given.

    Attributes:
        epoch: set it as training goes on.

    Raises:
        TypeError: ``first_order`` is given, or a rate is no number.
        ValueError: no inner step, or a negative number of epochs.

    Source: A. Antoniou, H. Edwards, A. Storkey, ICLR 2019.
    """

    _batch_norms: ClassVar[tuple[str, ...]] = ("transductive", "followed", "running", "per_task", "per_step")

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        lr: float | None = None,
        steps: int = 5,
        *,
        inner: Configuration | None = None,
        parameters: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        multi_step_epochs: int = 15,
        first_order_epochs: int = 0,
        batch_norm: BatchNorm | None = "per_step",
        **options: Any,
    ) -> None:
        if "first_order" in options:
            raise TypeError("MAMLPlusPlus: first_order must be left out, because first_order_epochs= says it")
        for name, value in (("multi_step_epochs", multi_step_epochs), ("first_order_epochs", first_order_epochs)):
            checks.at_least("MAMLPlusPlus", name, value, 0)
        checks.at_least("MAMLPlusPlus", "steps", steps, 1)
        if inner is not None and not isinstance(inner, Configuration):
            why = "whose rates are this algorithm's own table"
            checks.fail(TypeError, "MAMLPlusPlus", "inner", f"one rule of fastmeta.inner, {why}", type(inner).__name__)
        if inner is not None and lr is not None:
            raise ValueError(f"MAMLPlusPlus: lr must be None beside inner, got {lr}; give the rate to inner")
        rate = (DEFAULT if lr is None else lr) if inner is None else inner.lr
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            checks.fail(TypeError, "MAMLPlusPlus", "lr", "a number", type(rate).__name__)
        norms = StepNorms(model, steps + 1) if batch_norm == "per_step" else None
        rows = {} if norms is None else norms.names
        own = dict(model.named_parameters())
        if isinstance(loss, nn.Module):
            own |= {f"loss.{name}": p for name, p in loss.named_parameters()}
        adapting = [name for name in select_parameters(own, parameters) if name not in rows]
        if norms is not None and norms.tensors(statistics=True):
            options.setdefault("update_running_stats", True)
        if not adapting:
            raise ValueError("MAMLPlusPlus: at least one parameter beside batch norm's must adapt, got none")
        table = nn.Parameter(own[adapting[0]].detach().new_full((steps, len(adapting)), float(rate)))
        own_rule = None
        if inner is not None:
            own_rule = copy.copy(inner)
            own_rule._parameters = dict(inner._parameters)  # what is learned of it is the same, beside the rates
            own_rule.lr = table
        of_rates = table if own_rule is None else None
        options |= {"inner": own_rule, "parameters": adapting, "batch_norm": batch_norm}
        super().__init__(model, loss, of_rates, steps, **options)
        self.norms = norms
        self.multi_step_epochs, self.first_order_epochs = multi_step_epochs, first_order_epochs
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """How far the schedules are."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch = value
        self.first_order = value < self.first_order_epochs

    def loss_weights(self, epoch: int | None = None) -> tuple[float, ...]:
        """``w_0 .. w_K`` of the query losses after 0 .. K steps, as the authors anneal them.

        With ``E = multi_step_epochs``: ``w_k = max(1/K - epoch / (K E), 0.03 / K)`` for ``0 < k < K``, and ``w_K`` the
        rest of what adds up to 1, but at most ``1 - 0.03 (K - 1) / K``; from epoch ``E`` on ``w_K`` alone, which is 1.

        Args:
            epoch: instead of the module's.
        """
        at, count, last = self.epoch if epoch is None else epoch, self.steps, self.multi_step_epochs
        if at >= last:
            return (*[0.0] * count, 1.0)
        least = 0.03 / count
        others = max(1 / count - at / (count * last), least)
        rest = min(1 / count + at * (count - 1) / (count * last), 1 - (count - 1) * least)
        return (0.0, *[others] * (count - 1), rest)

    def _asked(self, steps: int) -> dict[str, Any]:
        names = self.norms.names if self.norms is not None else {}
        asked: dict[str, Any] = {"stepwise": frozenset(names)}
        if self.training and torch.is_grad_enabled() and steps == self.steps and self.epoch < self.multi_step_epochs:
            asked["query_weights"] = self.loss_weights()
        return asked

    def _settings(self, *_: Any) -> None:
        """Nothing is remembered: the rows are no parameters of the model, which alone is watched."""

    def _rule(self) -> StepRates:
        return StepRates(self.lr, self.inner)

    def _read_tensors(self) -> dict[str, Tensor]:
        own = super()._read_tensors()
        return own if self.norms is None else own | self.norms.tensors(statistics=False)

    def _read_buffers(self) -> dict[str, Tensor]:
        own = super()._read_buffers()
        return own if self.norms is None else own | self.norms.tensors(statistics=True)

    def _adapted(self, work: Work, found: Adaptation, single: bool) -> AdaptedModel:
        adapted = dict(zip(work.packing.names, found.phi, strict=True))
        after = work.fixed(work.steps)
        rows = {name: after[name].detach() for name in work.stepwise}
        buffers = {name: rows.pop(name) for name in work.stepwise & work.buffers.keys()}
        adapted |= {name: row.expand(work.tasks, *row.shape) for name, row in rows.items()}
        return self._made_of(adapted, found, single, buffers)
