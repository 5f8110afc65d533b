"""One meta-step as it is handed to an engine: everything that has been checked and nothing that has been decided."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.core.packing import Packing
from fastmeta.engine.objective import Objective, uses_set
from fastmeta.inner.early_stop import EarlyStop
from fastmeta.inner.rates import Shapes
from fastmeta.inner.rule import Group, RuleKind
from fastmeta.inner.sgd_rule import PLAIN

Plan = str | tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Implicit:
    """A proximal inner problem, and how its gradient is solved for by conjugate gradients (``implicit.py``).

    Attributes:
        strength: lambda, the weight of ``|phi - theta|^2 / 2`` beside the support loss.
        iterations: of conjugate gradients, at most.
        tolerance: a task's iterations end where its residual is this share of the right-hand side.
        damping: added to lambda where the system is solved.
        report: what came of it the latest time, once there was one.
    """

    strength: float
    iterations: int
    tolerance: float
    damping: float
    report: list[Any] = field(default_factory=list, repr=False, compare=False)


@dataclass  # not frozen, which would take its time at every meta-step
class Work:
    """The tasks, the parameters and the inner rule of one meta-step.

    Attributes:
        objective: model and loss.
        parameters: every parameter by name.
        buffers: every buffer by name.
        packing: the adapting parameters and their order.
        support, query: pytrees with leaves ``[T, ...]``; ``query`` is ``None`` where only adaptation is wanted.
        steps: K.
        alpha: inner rates ``[1 or K, R]``, of :meth:`fastmeta.inner.rates.Rates.alpha`.
        segments: ``[S + 1]`` where alpha has one rate a parameter.
        rate_shapes: of each adapting parameter's own rates, where not every one has a single rate; otherwise ``None``.
        rule: the inner rule.
        hyper: the values of its hyper-parameters beside the rates, ``[H]``; ``None`` where it has none.
        first_order: drop the Hessian.
        check_finite: stop at the first loss that is not finite.
        differentiate: whether a meta-gradient will be asked for.
        chunk_size: at most so many tasks run at a time; ``None`` lets the plan decide.
        memory_budget: bytes that the meta-step may hold beside its parameters and tasks; ``None`` for no limit.
        executor: ``auto``, ``native`` or ``reference``.
        plan: how weights and tables are to be held: ``auto``, ``dense`` or ``factored``; or pairs of a pattern of
            parameters' names and one of these, of which the first that fits holds.
        keep_mutations: whether new buffer values are wanted.
        cuda_graph: whether meta-steps on a GPU may be captured and replayed.
        implicit: how the implicit gradient is solved for, where the inner problem is a proximal one.
        clip_norm: largest 2-norm of a task's inner gradient; ``None`` for any.
        query_weights: of each task's query losses after 0, 1, .. K steps, whose weighted sum is its loss; ``None``
            where that is the last one.
        stepwise: names of other parameters and of buffers that come as rows, of which passes after k steps read the
            k-th, or the last where there are not so many.
        batch_norm: what batch norm normalises by, one of ``engine/objective.py``'s names; ``None`` for as modules say.
        own_statistics: names of the running statistics that each task has of its own.
        stop: when a task takes no further steps; ``None`` for never.
        micro_batches: how many the support set is cut into, whose gradients one step adds up.
        own: names of the adapting parameters that come for each task, ``[T, *shape]``: rows of tables.
        memory: what an executor keeps for meta-steps that differ from this one in tasks and rates alone.
    """

    objective: Objective
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    packing: Packing
    support: Any
    query: Any
    steps: int
    alpha: Tensor
    segments: Tensor | None
    first_order: bool
    check_finite: bool
    differentiate: bool
    chunk_size: int | None
    executor: str
    plan: Plan
    keep_mutations: bool
    cuda_graph: bool = True
    memory_budget: int | None = None
    rate_shapes: Shapes | None = None
    rule: RuleKind = PLAIN
    hyper: Tensor | None = None
    implicit: Implicit | None = None
    clip_norm: float | None = None
    query_weights: tuple[float, ...] | None = None
    stepwise: frozenset[str] = frozenset()
    batch_norm: str | None = None
    own_statistics: frozenset[str] = frozenset()
    stop: EarlyStop | None = None
    micro_batches: int = 1
    own: frozenset[str] = frozenset()
    memory: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def tasks(self) -> int:
        """T."""
        leaf: Tensor = leaves(self.support)[0]
        return leaf.shape[0]

    @property
    def learned(self) -> bool:
        """Whether rates or other hyper-parameters of the inner rule get a gradient."""
        return self.alpha.requires_grad or (self.hyper is not None and self.hyper.requires_grad)

    def has_rate_an_element(self, name: str) -> bool:
        """Whether a matrix has rates that differ along its rows and along its columns: its steps are of full rank."""
        shape = self._rate_shape(name)
        return len(shape) == 2 and min(shape) > 1

    def has_rates_by_row(self, name: str) -> bool:
        """Whether a matrix has rates that differ between its rows."""
        shape = self._rate_shape(name)
        return len(shape) == 2 and shape[0] > 1

    def _rate_shape(self, name: str) -> tuple[int, ...]:
        return () if self.rate_shapes is None else self.rate_shapes[self.packing.names.index(name)]

    def rule_of(self, name: str) -> RuleKind:
        """The inner rule of an adapting parameter."""
        return self.rule.of(self.packing.names.index(name))[0]

    def group(self, group: Group) -> Work:
        """The inner steps of one group's parameters, at its rates and without its rule."""
        own, rates = (slice(each.start, each.stop) for each in (group.parameters, group.rates))
        packing = Packing(self.packing.names[own], self.packing.shapes[own])
        shapes = () if self.rate_shapes is None else self.rate_shapes[own]
        return replace(
            self,
            packing=packing,
            alpha=self.alpha[:, rates],
            segments=None if any(shapes) else packing.segments(self.alpha.device),
            rate_shapes=shapes if any(shapes) else None,
            rule=PLAIN,
            hyper=None,
        )

    @property
    def outer_names(self) -> tuple[str, ...]:
        """Parameters that do not adapt and whose meta-gradient is wanted."""
        if not self.differentiate:
            return ()
        adapted = set(self.packing.names)
        return tuple(n for n, p in self.parameters.items() if n not in adapted and p.requires_grad)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the query losses after 0, 1, .. K steps."""
        return (*[0.0] * self.steps, 1.0) if self.query_weights is None else self.query_weights

    def fixed(self, k: int) -> dict[str, Tensor]:
        """The parameters that do not adapt and the buffers, as passes after k steps read them."""
        adapted = set(self.packing.names)
        state = {name: p for name, p in self.parameters.items() if name not in adapted}
        state.update(self.buffers)
        state.update((name, state[name][self.row(name, k)]) for name in self.stepwise)
        return state

    def row(self, name: str, k: int) -> int:
        """Which row of what comes stepwise passes after k steps read."""
        rows = self.parameters[name] if name in self.parameters else self.buffers[name]
        return min(k, len(rows) - 1)

    def seen_by(self, *, query: bool) -> Objective:
        """The objective as support passes, or query passes, have it."""
        return self.objective.normalising(uses_set(self.batch_norm, query=query))

    def micro_sets(self) -> list[Any]:
        """The support sets, ``[T, ...]``, or the micro-batches they are cut into, ``[T, n, ...]``."""
        if self.micro_batches == 1:
            return [self.support]
        size = leaves(self.support)[0].shape[1] // self.micro_batches
        starts = [i * size for i in range(self.micro_batches)]
        return [pytree.tree_map(lambda leaf: leaf[:, a : a + size], self.support) for a in starts]  # noqa: B023

    def part(self, tasks: slice) -> Work:
        """The same meta-step for some of the tasks."""

        def cut(tree: Any) -> Any:
            return pytree.tree_map(lambda leaf: leaf[tasks], tree)

        return replace(self, support=cut(self.support), query=None if self.query is None else cut(self.query))

    def on(self, support: Any, query: Any) -> Work:
        """The same meta-step on other tasks of the same shapes, with the same memory."""
        other = Work.__new__(Work)
        other.__dict__.update(self.__dict__)
        other.support, other.query = support, query
        return other

    @property
    def theta(self) -> list[Tensor]:
        """The adapting parameters in packing order, ``[*shape]``, or ``[T, *shape]`` where each task has its own."""
        return [self.parameters[name] for name in self.packing.names]


def leaves(tree: Any) -> tuple[Any, ...] | list[Any]:
    """The tensors of a support or query set; quick for the usual pair."""
    if type(tree) is tuple and len(tree) == 2 and isinstance(tree[0], Tensor) and isinstance(tree[1], Tensor):
        return tree
    return pytree.tree_leaves(tree)


def task_of(tree: Any, index: int) -> Any:
    """One task of a batched pytree."""
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def require_finite(losses: Tensor, what: str) -> None:
    """Raise ``ValueError`` naming the first task whose loss, of ``losses`` ``[T]``, is not finite."""
    bad = torch.isfinite(losses).logical_not().nonzero()
    if bad.numel():
        task = int(bad[0, 0])
        raise ValueError(
            f"MAML: the {what} must be finite, got {losses[task].item()} for task {task}; lower lr or check the input"
        )
