"""The bridge from a learner to the engine: the meta-step of a loop over tasks as one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastmeta.algorithms.maml import MAML, MetaOutput
from fastmeta.compat.learn2learn.gradients import refuse_frozen
from fastmeta.core.checks import fail
from fastmeta.tasks.batch import TaskBatch

Tasks = TaskBatch | Sequence[tuple[Any, Any]]
Loss = Callable[..., Any]
Rates = float | Tensor | Mapping[str, Tensor]


class Engine:
    """The :class:`fastmeta.MAML` over a learner's module, made at the first meta-step and kept for the next ones.

    It is no module, so that the learner's parameters and state are the learner's alone; a copy of it is empty.
    """

    def __init__(self) -> None:
        self._maml: MAML | None = None
        self._made_of: list[Any] = []
        self._options: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[Engine], tuple[()]]:
        return Engine, ()

    def meta_step(
        self,
        op: str,
        module: nn.Module,
        rates: Rates,
        tasks: Tasks,
        loss: Loss,
        steps: int,
        *,
        first_order: bool,
        allow_unused: bool,
        allow_nograd: bool,
        options: Mapping[str, Any],
    ) -> MetaOutput:
        """One meta-step of ``module``; the learners' ``meta_step`` says what the arguments are."""
        parameters = dict(module.named_parameters())
        if not all(p.is_leaf for p in parameters.values()):
            mend = "call it on the learner that was cloned"
            fail(ValueError, op, "parameters", "leaves of autograd", "those of a clone", mend)
        frozen = [name for name, p in parameters.items() if not p.requires_grad]
        if frozen and not allow_nograd:
            refuse_frozen(op, ", ".join(frozen))
        if isinstance(rates, Mapping):
            rates = {name: rate for name, rate in rates.items() if name not in frozen}
        batch = tasks if isinstance(tasks, TaskBatch) else TaskBatch.stack(list(tasks))
        # A meta-step that may write running statistics prepares more, so one without buffers does not ask for it.
        follows = "batch_norm" not in options and any(True for _ in module.buffers())
        maml = self._made(module, loss, rates, {"update_running_stats": follows, **options})
        maml.first_order, maml.allow_unused = first_order, allow_unused
        if not isinstance(rates, (Tensor, Mapping)):
            maml.lr = rates
        return maml(batch, steps=steps)

    def _made(self, module: nn.Module, loss: Loss, rates: Rates, options: dict[str, Any]) -> MAML:
        """The one there is, if it was made of the same objects."""
        tensors = list(rates.values()) if isinstance(rates, Mapping) else [rates] if isinstance(rates, Tensor) else []
        made_of = [module, loss, *tensors]
        same = len(made_of) == len(self._made_of) and all(a is b for a, b in zip(made_of, self._made_of, strict=True))
        if self._maml is None or not same or options != self._options:
            self._maml = MAML(module, loss, rates, **options)
            self._made_of, self._options = made_of, options
        return self._maml
