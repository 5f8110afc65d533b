"""Model-agnostic meta-learning: the exact second-order meta-gradient of a batch of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta.algorithms.adapted import AdaptedModel
from fastmeta.algorithms.inner_rule import DEFAULT, InnerRule, to_learned
from fastmeta.algorithms.inputs import (
    BatchNorm,
    Engine,
    Executor,
    Form,
    check_batch_norm,
    check_formed,
    check_masks,
    check_micro_batches,
    check_runner,
    check_tensors,
    checked_count,
    checked_norm,
    checked_plan,
    checked_steps,
    checked_stop,
    select_parameters,
)
from fastmeta.algorithms.memory import Memory
from fastmeta.algorithms.output import MetaOutput as MetaOutput
from fastmeta.algorithms.output import gradients_of, outputs_of
from fastmeta.algorithms.recall import pairs
from fastmeta.core.packing import Packing
from fastmeta.engine import autodiff, running_stats
from fastmeta.engine.adaptation import Adaptation, adaptation
from fastmeta.engine.compiler import Programs
from fastmeta.engine.evaluation import MEAN
from fastmeta.engine.explain import Explanation, explain_autodiff, explain_programs
from fastmeta.engine.function import Step
from fastmeta.engine.meta_step import evaluate
from fastmeta.engine.objective import Objective, uses_set
from fastmeta.engine.profile import by_autodiff, span, watching
from fastmeta.engine.timeline import BACKWARD, PREPARATION
from fastmeta.engine.trace import NotTraceable
from fastmeta.engine.work import Work
from fastmeta.inner.configuration import Configuration
from fastmeta.inner.early_stop import EarlyStop
from fastmeta.inner.groups import Groups
from fastmeta.inner.rates import Rate, registered
from fastmeta.tasks.batch import TaskBatch

# What a prepared meta-step depends on, of a learner's attributes alone.
_settings_of = attrgetter(
    *("first_order", "allow_unused", "clip_norm", "stop", "micro_batches", "batch_norm", "chunk_size"),
    *("engine", "executor", "plan", "cuda_graph", "memory_budget"),
)


class MAML(nn.Module):
    """MAML's meta-gradient (C. Finn, P. Abbeel, S. Levine, ICML 2017), exact and batched over tasks.

    For each task ``phi_0 = theta``, ``phi_{k+1} = phi_k - alpha_k * grad ls(phi_k)``, and the meta-loss is
    ``J = mean_t lq(phi_K)``. The gradient of ``J`` is computed by the adjoint of that loop with forward-over-reverse
    Hessian-vector products; autograd never sees the loop. Differentiable once; a third derivative raises, unless
    ``engine="autodiff"``.

    Args:
        model: any module.
        loss: ``loss(outputs, targets)`` for batches ``(inputs, targets)``, or ``loss(model, batch)`` for any other
            batch, returning the loss or ``(loss, outputs)``; see :class:`fastmeta.TaskBatch`. A scalar for one task.
            A loss that is a module may have parameters of its own; their names start with ``loss.``.
        lr: inner learning rate alpha: a number; a tensor ``[]``, or ``[K]`` with one rate a step, of which steps
            beyond K take the last; or a mapping from the name of every adapting parameter to a number or a tensor that
            broadcasts to its shape, such as ``[out, 1]`` for one rate a row of a linear layer's weight. Tensors that
            require grad get their meta-gradient; those that are ``nn.Parameter`` become parameters of this module. 0.01
            without ``inner``.
        steps: K, the number of inner steps.
        inner: a rule for the inner steps, with its own rates, instead of ``lr``: :class:`fastmeta.inner.SGD` with
            momentum or weight decay, ``RMSprop``, ``Adagrad``, ``Adam`` or ``AdamW`` of the same module. Or a mapping
            from parameter names or ``fnmatch`` patterns to such rules, of which the first that fits holds
            (:class:`fastmeta.inner.Groups`).
        first_order: drop the Hessian (FOMAML).
        parameters: which parameters adapt: ``None`` for all that require grad, an iterable of names or ``fnmatch``
            patterns, or a predicate ``(name, parameter) -> bool``. The others still get their exact meta-gradient if
            they require grad. A parameter named explicitly adapts even if it does not require grad.
        allow_unused: let adapting parameters that the support loss does not use keep their value.
        clip_norm: largest 2-norm of each task's inner gradient over all adapting parameters, which is scaled down to it
            as ``torch.nn.utils.clip_grad_norm_`` does, differentiably; ``None`` for any. Weights are then formed.
        stop: when a task takes no further inner steps, a :class:`fastmeta.inner.EarlyStop`; ``None`` for never. Weights
            are then formed.
        micro_batches: how many equal parts every support set is cut into, along its samples. One inner step takes the
            mean of their losses, whose gradients are added up, part by part, so that one part's activations are held at
            a time; they are computed again for the Hessian-vector products. The result is that of the whole set where
            the loss is a mean over samples and no layer mixes them: batch norm normalises each part by its own. Weights
            are then formed. Autodiff holds all the same.
        batch_norm: what batch norm normalises by and leaves behind: ``"transductive"``, ``"followed"``, ``"running"``
            or ``"per_task"`` (docs/algorithms.md, Batch norm). ``None`` for as each one's training flag says:
            transductive in training mode, running in evaluation mode.
        update_running_stats: after a meta-step in training mode, leave in batch norm's running statistics what a loop
            over the tasks would have left; as ``batch_norm="followed"`` does. By default a meta-step never writes a
            buffer.
        check_finite: raise as soon as a tensor of the tasks or a loss is not finite, naming task and step. Costs a
            synchronisation a step on a GPU.
        chunk_size: run at most so many tasks at a time. By default as many as keep an operation's operands in cache on
            a CPU. The tapes of one chunk only are held at a time, whatever T is.
        memory_budget: bytes that a meta-step may hold beside parameters and tasks. To keep within it fewer tasks run at
            a time, and where keeping the activations of every inner step is too much for one, they are computed again
            for the Hessian-vector products. The first meta-step of a kind then runs one task and two beforehand, to
            see what they take; a warning says if nothing fits. :meth:`explain` shows what is predicted. ``None`` for no
            limit. Autodiff and :meth:`adapt` know no budget.
        engine: ``"program"`` runs the traced program and raises where that is impossible; ``"autodiff"`` runs plain
            autograd over tasks, to any order; ``"auto"`` takes the program if the model can be traced, and otherwise
            autodiff, with one warning that names the cause.
        executor: who runs the program: ``"native"`` the compiled executor, which raises where it lacks a kernel;
            ``"reference"`` the operations in torch; ``"auto"`` the native one where it can. :meth:`explain` says
            which, and why.
        plan: how each task's weights are held: ``"dense"`` forms them; ``"factored"`` keeps linear layers' weights as
            the shared one and products of few rows, and embeddings' tables as the shared one and the rows that a task's
            data name, on the reference executor; ``"auto"`` takes what costs less. Or a mapping from names or
            ``fnmatch`` patterns of parameters to one of these, of which the first that fits holds; what fits none is
            ``"auto"``. :meth:`adapt` forms what it returns.
        cuda_graph: on a GPU, capture the meta-step in a CUDA graph when it comes for the second time with the same
            shapes, and replay it from then on. :meth:`explain` says why where that is not done.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: negative steps, no adapting parameter, a rate that does not fit, or ``lr`` beside ``inner``.
    """

    _batch_norms: ClassVar[tuple[str, ...]] = ("transductive", "followed", "running", "per_task")

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        lr: Rate | None = None,
        steps: int = 1,
        *,
        inner: Configuration | Groups | Mapping[str, Configuration] | None = None,
        first_order: bool = False,
        parameters: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        allow_unused: bool = False,
        clip_norm: float | None = None,
        stop: EarlyStop | None = None,
        micro_batches: int = 1,
        batch_norm: BatchNorm | None = None,
        update_running_stats: bool = False,
        check_finite: bool = False,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        engine: Engine = "auto",
        executor: Executor = "auto",
        plan: Form | Mapping[str, Form] = "auto",
        cuda_graph: bool = True,
    ) -> None:
        super().__init__()
        check_runner(engine, executor, memory_budget)
        self._objective = Objective(model, loss)
        self._selection = parameters
        self._memory = Memory(self._objective.root)
        self.model = model
        if isinstance(loss, nn.Module):
            self.loss = loss
        self.lr = None if lr is None and inner is not None else registered(DEFAULT if lr is None else lr)
        self.inner = Groups(inner) if isinstance(inner, Mapping) else inner
        self.steps = checked_steps(steps)
        self.first_order = first_order
        self.allow_unused = allow_unused
        self.clip_norm = checked_norm(clip_norm)
        self.stop = checked_stop(stop)
        self.micro_batches = checked_count("micro_batches", micro_batches) or 1
        check_formed(
            plan, {"clip_norm": clip_norm is not None, "stop": stop is not None, "micro_batches": micro_batches > 1}
        )
        self.batch_norm, self.update_running_stats = batch_norm, update_running_stats
        check_batch_norm(batch_norm, self._batch_norms, self._objective.root, follows=update_running_stats)
        self.check_finite = check_finite
        self.chunk_size = checked_count("chunk_size", chunk_size)
        self.memory_budget = checked_count("memory_budget", memory_budget)
        self.engine = engine
        self.executor = executor
        self.plan = checked_plan(plan, self._objective.parameters())
        self.cuda_graph = bool(cuda_graph)
        self._rule().check(self._packing(self._objective.parameters()))

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Adapt to every task's support set and evaluate on its query set.

        Where gradients are enabled, the meta-gradient of the mean loss is computed on the way, chunk by chunk, so that
        ``backward()`` has only to scale it; call it under ``torch.no_grad()`` where only the numbers are wanted. If
        something else than ``.loss`` is differentiated, ``backward()`` runs the meta-step again.

        Args:
            tasks: the tasks, on the model's device and in its dtype.
            steps: another number of inner steps than the module's, for evaluation.

        Returns:
            Losses and outputs; ``out.loss.backward()`` gives the meta-gradient.

        Raises:
            TypeError: ``tasks`` is no TaskBatch, or its dtype is not the model's.
            ValueError: no query, another device, an unused parameter, a loss or input that is not finite.
            RuntimeError: ``engine="program"`` and the model cannot be traced.
        """
        work, programs = self._prepare(tasks, steps, differentiate=torch.is_grad_enabled())
        if programs is None:
            return self._autodiff(work)
        step = Step(work, programs, self._memory.custom, work.learned)
        loss, task_losses, *leaves = step.run()
        self._follow(programs, work, step.mutations, step.taken)
        return MetaOutput(loss, task_losses, outputs_of(programs.both[1], leaves), step.support_losses, step.taken)

    def value_and_grad(self, tasks: TaskBatch, *, steps: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean query loss and its meta-gradient, without autograd in between.

        Args:
            tasks: the tasks.
            steps: another number of inner steps than the module's.

        Returns:
            The loss ``[]`` and the gradients by parameter name, in the parameters' shapes. Learned rates appear under
            ``lr`` or ``lr.<name>``, those of ``inner`` and its other hyper-parameters under ``inner.lr``,
            ``inner.momentum`` and so on, where there are groups under ``inner.<pattern>.lr``.

        Raises:
            As :meth:`forward`.
        """
        work, programs = self._prepare(tasks, steps, differentiate=True)
        if programs is None:
            out = self._autodiff(work)
            inputs = {n: p for n, p in self._learned(work).items() if p.requires_grad}
            inputs.update(self._rule().learned())
            with span(BACKWARD):
                d = torch.autograd.grad(out.loss, list(inputs.values()), allow_unused=True)
            return out.loss.detach(), {
                n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(inputs.items(), d, strict=True)
            }
        result = evaluate(work, programs, MEAN, learned=work.learned)
        self._follow(programs, work, result.mutations, result.taken)
        gradient = result.meta_gradient
        gradients = self._to_learned(work, gradients_of(work, programs.both[1], gradient))
        if work.learned:
            learned = self._rule().learned()
            gradients.update(zip(learned, to_learned(work, gradient, list(learned.values())), strict=True))
        return result.loss, gradients

    def adapt(self, support: Any, *, steps: int | None = None) -> AdaptedModel:
        """Adapt to one task, or to all tasks of a batch, without meta-gradients.

        Args:
            support: the support set of one task, without task axis, in a form :class:`fastmeta.TaskBatch` knows; or a
                TaskBatch, of which every task's support set is taken.
            steps: another number of inner steps than the module's.

        Returns:
            The adapted model, a callable.

        Raises:
            As :meth:`forward`.
        """
        single = not isinstance(support, TaskBatch)
        tasks = TaskBatch(pytree.tree_map(_unsqueeze, support)) if single else TaskBatch(support.support)
        with torch.no_grad():
            work, programs = self._prepare(tasks, steps, differentiate=False, need_query=False)
        return self._adapted(work, adaptation(work, programs, allow_unused=self.allow_unused), single)

    def explain(self, tasks: TaskBatch, *, steps: int | None = None) -> Explanation:
        """What runs for these tasks: for every call its operation, backend, cost and memory, and why.

        Where the native executor does not run, the meta-step of one task and of two runs to count what they take.
        """
        work, programs = self.prepare(tasks, steps=steps)
        if programs is None:
            return explain_autodiff(work, self._why_autodiff(work))
        return explain_programs(work, programs)

    def prepare(self, tasks: TaskBatch, *, steps: int | None = None) -> tuple[Work, Programs | None]:
        """The meta-gradient of these tasks as the engine has it, for tools that look inside; it does not run yet.

        Returns:
            The meta-step and the programs that it runs, which are the engine's own and remembered; ``None`` instead of
            programs where autodiff runs.

        Raises:
            As :meth:`forward`, except that parameters may be unused.
        """
        return self._prepare(tasks, steps, differentiate=True, check_unused=False)

    def retrace(self) -> None:
        """Forget every trace, after a change a trace cannot see (a Python attribute the forward pass branches on)."""
        self._memory.forget()

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"steps={self.steps}, first_order={self.first_order}, engine={self.engine!r}"

    # What an algorithm that starts from something else than its own parameters says of itself: the tensors of a
    # meta-step are then functions of what is learned, and gradients go back through them.

    def _asked(self, steps: int) -> dict[str, Any]:
        """What it asks of the engine beside: fields of :class:`Work`, of values that can be compared."""
        return {}

    def _read_tensors(self) -> dict[str, Tensor]:
        """Every tensor that a meta-step starts from or reads, by the objective's names."""
        return dict(self._objective.parameters())

    def _read_buffers(self) -> dict[str, Tensor]:
        """Every buffer that a meta-step reads, by the objective's names."""
        return self._objective.buffers()

    def _learned(self, work: Work) -> dict[str, Tensor]:
        """What gets a meta-gradient, by the names that ``value_and_grad`` has for it, beside the inner rule's."""
        return work.parameters

    def _to_learned(self, work: Work, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients to that, from those to ``work.parameters``."""
        return gradients

    def _seen(self, tasks: TaskBatch) -> TaskBatch:
        """The tasks as the objective takes them."""
        return tasks

    def _adapted(self, work: Work, found: Adaptation, single: bool) -> AdaptedModel:
        """What :meth:`adapt` gives."""
        adapted = dict(zip(work.packing.names, found.phi, strict=True))
        return self._made_of(adapted, found, single)

    def _made_of(
        self, adapted: dict[str, Tensor], found: Adaptation, single: bool, buffers: dict[str, Tensor] | None = None
    ) -> AdaptedModel:
        """The model with these weights, ``[T, *shape]``, and what else was found of the tasks."""
        return AdaptedModel(
            self.model,
            adapted,
            found.support_losses,
            single=single,
            steps_taken=found.taken,
            buffers=buffers,
            statistics=found.statistics,
            by_set=uses_set(self.batch_norm, query=True),
        )

    def _prepare(
        self,
        tasks: TaskBatch,
        steps: int | None,
        *,
        differentiate: bool,
        need_query: bool = True,
        check_unused: bool = True,
    ) -> tuple[Work, Programs | None]:
        runs = watching()
        if runs is None:
            return self._prepared(tasks, steps, differentiate, need_query, check_unused)
        with runs.span(PREPARATION):
            return self._prepared(tasks, steps, differentiate, need_query, check_unused)

    def _prepared(
        self, tasks: TaskBatch, steps: int | None, differentiate: bool, need_query: bool, check_unused: bool
    ) -> tuple[Work, Programs | None]:
        if not isinstance(tasks, TaskBatch):
            raise TypeError(f"MAML: tasks must be a TaskBatch, got {type(tasks).__name__}")
        if need_query and tasks.query is None:
            raise ValueError("MAML: tasks must have a query set, got None")
        tasks = self._seen(tasks)
        tensors = pairs(tasks.support, tasks.query)
        rule = self._rule()
        settings = self._settings(rule, steps, differentiate, need_query, check_unused) if tensors else None
        if settings is not None and (found := self._memory.recall.find(settings, tensors)) is not None:
            earlier, known = found
            again = earlier.on(tasks.support, tasks.query)
            if rule.fixed:
                return again, known
            again.__dict__.update(rule.parts(again.packing, again.theta[0], again.steps, self.steps)._asdict())
            same = again.rate_shapes == earlier.rate_shapes and (again.segments is None) == (earlier.segments is None)
            if same and again.alpha.shape == earlier.alpha.shape:
                return again, known
        parameters = self._read_tensors()
        packing = self._packing(parameters)
        count = self.steps if steps is None else checked_steps(steps)
        theta = [parameters[name] for name in packing.names]
        if len({(p.dtype, p.device) for p in theta}) > 1:
            raise ValueError("MAML: adapting parameters must share one dtype and device; choose them by parameters=")
        parts = rule.parts(packing, theta[0], count, self.steps)
        work = Work(
            self._objective,
            parameters,
            self._buffers_to_read(),
            packing,
            tasks.support,
            tasks.query,
            count,
            parts.alpha,
            parts.segments,
            self.first_order,
            self.check_finite,
            differentiate,
            self.chunk_size,
            self.executor,
            "dense" if self.clip_norm is not None or self.stop is not None or self.micro_batches > 1 else self.plan,
            self._follows,
            self.cuda_graph,
            self.memory_budget,
            parts.rate_shapes,
            parts.rule,
            parts.hyper,
            clip_norm=self.clip_norm,
            batch_norm=self.batch_norm,
            own_statistics=self._objective.statistics() if self.batch_norm == "per_task" else frozenset(),
            stop=self.stop,
            micro_batches=self.micro_batches,
            **self._asked(count),
        )
        if self.micro_batches > 1:
            check_micro_batches(work)
        check_tensors(work, self.engine)
        programs = self._programs(work)
        if programs is not None:
            if check_unused and not self.allow_unused and count and programs.support.unused:
                raise autodiff.unused_error(programs.support.unused)
            check_masks(work, programs)
            if settings is not None:
                self._memory.recall.keep(settings, tensors, work, programs)
        return work, programs

    def _settings(self, rule: InnerRule, steps: int | None, *flags: bool) -> Any:
        """What a prepared meta-step depends on besides modules and tasks; ``None`` where values must be looked at."""
        if self.check_finite or self._follows or callable(self._selection):
            return None
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return None
        count = self.steps if steps is None else checked_steps(steps)
        return count, _settings_of(self), rule.settings(), self._asked(count), flags

    def _programs(self, work: Work) -> Programs | None:
        if self.engine == "autodiff":
            return None
        try:
            return self._memory.compiler.compile(work)
        except NotTraceable as reason:
            if self.engine == "program":
                raise RuntimeError(f"MAML: engine='program' needs a model that can be traced: {reason}") from reason
            return None

    def _why_autodiff(self, work: Work) -> str:
        if self.engine == "autodiff":
            return "it was asked for"
        try:
            self._memory.compiler.compile(work)
        except NotTraceable as reason:
            return str(reason)
        raise RuntimeError("MAML: autodiff ran although the program could be compiled")

    def _autodiff(self, work: Work) -> MetaOutput:
        with by_autodiff(work, self._why_autodiff(work)):
            result = autodiff.run(work, keep_buffers=work.keep_mutations, allow_unused=self.allow_unused)
        if work.keep_mutations:
            running_stats.write(self._read_buffers(), result.buffers)
        if self.engine == "auto":
            reason = self._why_autodiff(work)
            self._memory.warn_once(f"MAML: running on the slower autodiff engine, because {reason}", stacklevel=4)
        evaluated = result.evaluated
        return MetaOutput(evaluated.mean(), evaluated, result.outputs, result.support_losses, result.taken)

    def _follow(self, programs: Programs, work: Work, mutations: list[dict[str, Tensor]], taken: Tensor | None) -> None:
        if work.keep_mutations and mutations:
            with torch.no_grad():
                after = running_stats.updated(programs.both[1], work, mutations, taken)
                running_stats.write(self._read_buffers(), after)
        mutations.clear()

    @property
    def _follows(self) -> bool:
        return self.update_running_stats or self.batch_norm == "followed"

    def _buffers_to_read(self) -> dict[str, Tensor]:
        """The buffers, or copies if this meta-step will write them while its tape still reads them."""
        buffers = self._read_buffers()
        return {name: b.clone() for name, b in buffers.items()} if self._follows else buffers

    def _packing(self, parameters: Mapping[str, Tensor]) -> Packing:
        names = self._rule().ordered(select_parameters(parameters, self._selection))
        if not names:
            raise ValueError("MAML: at least one parameter must adapt, got none; check requires_grad and parameters=")
        return Packing.of({name: parameters[name] for name in names})

    def _rule(self) -> InnerRule:
        return InnerRule(self.lr, self.inner)


def _unsqueeze(leaf: Any) -> Any:
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf
