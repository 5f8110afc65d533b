"""The estimator: a model that learns to adapt, with the manners of scikit-learn."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from fastmeta.algorithms.adapted import AdaptedModel
from fastmeta.algorithms.maml import MAML
from fastmeta.core import checks
from fastmeta.engine.objective import call_model
from fastmeta.inner.rates import Rate
from fastmeta.learner import saved
from fastmeta.learner.algorithms import load_weights, make_learner
from fastmeta.learner.callbacks import Callback, Checkpoint
from fastmeta.learner.evaluation import Evaluation, evaluate_batches
from fastmeta.learner.fit import Fit, optimizer_for
from fastmeta.learner.loop import Loop, Progress
from fastmeta.learner.metric import Metric, metric_of
from fastmeta.learner.modes import at_rest, modes, rest, set_modes
from fastmeta.learner.progress import Reporter, Silent, reporter_for
from fastmeta.learner.recommendation import Recommendation, best_items
from fastmeta.learner.sources import judged_batches, training_source
from fastmeta.tasks.batch import TaskBatch
from fastmeta.tasks.sampler import TaskSampler, count


class MetaLearner(BaseEstimator):
    """Meta-trains a model, adapts it to tasks, and judges, saves and loads it.

    A fit trains a copy of ``model`` from where it is, so that fitting again begins anew and ``sklearn.base.clone``
    gives an estimator that has not been fitted. Training runs in the mode, training or evaluation, that the model's
    modules have. Everything else runs in evaluation mode, so that dropout is off; batch norm in training mode goes on
    normalising by the set it is given where training leaves no running statistics (docs/estimator.md).

    Args:
        model: any module, pretrained or not; ``None`` where ``algorithm`` is an instance, which has its own.
        algorithm: a name such as ``"maml"``, ``"anil"``, ``"protomaml"`` or ``"mamlplusplus"``; a class of
            :mod:`fastmeta.algorithms`, or what is called as one; or a configured instance.
        loss: as :class:`fastmeta.MAML` has it, or the name of a function of ``torch.nn.functional``, such as
            ``"cross_entropy"``. ``None`` with an instance, which has its own.
        inner_lr: rate of the inner loop; the algorithm's default where left out.
        inner_steps: steps of the inner loop in training; the algorithm's default where left out.
        options: the other arguments of the algorithm, by name.
        optimizer: of the outer loop: the name of a class of ``torch.optim``, the class, or what is called with the
            parameters, such as ``functools.partial(torch.optim.SGD, momentum=0.9)``. It steps without a closure.
        meta_lr: rate of the optimizer; its own default where left out.
        scheduler: called with the optimizer, gives a scheduler of ``torch.optim.lr_scheduler``.
        schedule: whether the scheduler moves on after every ``"epoch"`` or every meta-``"step"``. A
            ``ReduceLROnPlateau`` sees the validation's metric, or the loss without one.
        clip_norm: largest 2-norm of the meta-gradient, 0 for no limit.
        accumulate: batches of a meta-step. They are computed one after the other, in the memory of one, and the
            meta-gradient is the mean over the tasks of all, as if they were one batch.
        metric: what tasks are judged by: ``"loss"``, ``"accuracy"``, ``"mse"``, ``"ndcg@k"``, or a
            :class:`fastmeta.learner.metric.Metric`.
        eval_steps: steps of the inner loop everywhere but in training; as many as in training where left out.
        warm_start: whether a fit goes on from what an earlier one, or ``load``, has left, with a new optimizer.
        random_state: seed of what random layers draw in a fit, and of the order of tasks given one by one; PyTorch's
            generator as it is where left out. Samplers have seeds of their own.
        verbose: whether a fit shows its progress, on stderr.

    Attributes:
        learner_: the fitted algorithm.
        model_: the model in it.
        history_: one record an epoch: ``epoch``, ``step``, ``loss``, ``meta_lr``, ``tasks_per_s``, ``seconds``, the
            metric in training under its name, and of a validation ``validation`` (the metric after adaptation),
            ``validation_before``, both with ``_ci95``, and ``validation_loss``.
        n_steps_: meta-steps of the last fit.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        algorithm: str | MAML | Callable[..., MAML] = "maml",
        loss: str | Callable[..., Any] | None = None,
        *,
        inner_lr: Rate | None = None,
        inner_steps: int | None = None,
        options: Mapping[str, Any] | None = None,
        optimizer: str | Callable[..., torch.optim.Optimizer] = "Adam",
        meta_lr: float | None = None,
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        schedule: str = "epoch",
        clip_norm: float = 0.0,
        accumulate: int = 1,
        metric: str | Metric = "loss",
        eval_steps: int | None = None,
        warm_start: bool = False,
        random_state: int | None = None,
        verbose: bool = True,
    ) -> None:
        self.model = model
        self.algorithm = algorithm
        self.loss = loss
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.options = options
        self.optimizer = optimizer
        self.meta_lr = meta_lr
        self.scheduler = scheduler
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.metric = metric
        self.eval_steps = eval_steps
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        tasks: Any,
        *,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        tasks_per_step: int = 16,
        validation: Any = None,
        validation_tasks: int = 100,
        callbacks: Iterable[Callback] = (),
        resume: str | os.PathLike[str] | None = None,
    ) -> MetaLearner:
        """Meta-train.

        Args:
            tasks: a :class:`fastmeta.tasks.TaskSampler`; one :class:`fastmeta.TaskBatch`; tasks ``(support, query)``
                by number, as a list or a map-style dataset has them; or batches with a length, such as a list or a
                ``DataLoader`` of TaskBatch.
            epochs: epochs in all, those before an interruption included.
            steps_per_epoch: meta-steps of an epoch; one pass over tasks that have an end, or 100, where left out.
            tasks_per_step: tasks of a batch, where tasks come one by one; a meta-step takes ``accumulate`` of them.
            validation: tasks in any of these forms, judged after every epoch; of a sampler the same ones every time.
            validation_tasks: how many are taken from a sampler.
            callbacks: are told of the progress (:class:`fastmeta.learner.callbacks.Callback`).
            resume: folder of a :class:`~fastmeta.learner.callbacks.Checkpoint`, from which an interrupted fit goes on.
                With the same arguments, and as many threads, it leaves the weights of an uninterrupted one, bit for
                bit.

        Returns:
            the estimator.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: an argument out of range, a loss or metric that is not finite, a checkpoint that is damaged or
                of another fit.
            FileNotFoundError: there is no checkpoint to resume.
            KeyboardInterrupt: Ctrl-C, after the checkpoint is written if there is one; ``learner_`` holds what was
                learned till then.
        """
        epochs, period = count("fit", "epochs", epochs), steps_per_epoch
        if period is not None:
            count("fit", "steps_per_epoch", period)
        count("fit", "tasks_per_step", tasks_per_step)
        accumulate = count("MetaLearner", "accumulate", self.accumulate)
        checks.one_of("MetaLearner", "schedule", self.schedule, ("epoch", "step"))
        metric = metric_of(self.metric)
        if isinstance(validation, Iterator):
            mend = "make a list of it"
            checks.fail(TypeError, "fit", "validation", "tasks that can be gone through again", "an iterator", mend)
        with self._seeded():
            if self.warm_start and resume is None and hasattr(self, "learner_"):
                learner, flags = self.learner_, self._modes
            else:
                learner, flags = self._make()
            seed = self.random_state if self.random_state is not None else int(torch.randint(2**31, ()))
            training = training_source(
                tasks, tasks_per_step=tasks_per_step, steps_per_epoch=period, seed=seed, accumulate=accumulate
            )
            optimizer = optimizer_for(learner, self.optimizer, self.meta_lr)
            loop = Loop(
                learner,
                optimizer,
                training.source,
                Progress(validated=0),
                metric=None if metric.name == "loss" else metric,
                clip_norm=self.clip_norm,
                accumulate=accumulate,
            )

            def validate(stop: Callable[[], bool]) -> Evaluation:
                state = validation.state_dict() if isinstance(validation, TaskSampler) else None
                try:
                    return self._judge(learner, validation, metric, number=validation_tasks, batch=20, stop=stop)
                finally:
                    if state is not None:
                        validation.load_state_dict(state)

            fit = Fit(
                loop,
                epochs=epochs,
                period=training.steps,
                metric=metric,
                validate=None if validation is None else validate,
                scheduler=None if self.scheduler is None else self.scheduler(optimizer),
                schedule=self.schedule,
                callbacks=callbacks,
                reporter=self._reporter(),
                export=lambda folder, history: saved.write(folder, learner, self.get_params(deep=False), history),
                parameters=self.get_params(deep=False),
            )
            if resume is not None:
                fit.resume(resume, Checkpoint.LAST)
            set_modes(learner, flags)
            try:
                interrupted = fit.run()
            finally:
                self._keep(learner, flags, fit.history, fit.step)
        if interrupted == signal.SIGINT:
            raise KeyboardInterrupt
        if interrupted:
            raise SystemExit(128 + interrupted)
        return self

    def adapt(self, support: Any, *, steps: int | None = None) -> AdaptedModel:
        """Adapt to one task's support set, or to every task of a :class:`fastmeta.TaskBatch`.

        Args:
            support: ``(inputs, targets)`` or another form that TaskBatch knows, without task axis; NumPy arrays are
                taken too. Or a TaskBatch.
            steps: inner steps; ``eval_steps`` where left out.

        Returns:
            the adapted model, to be called with inputs or handed to :meth:`predict`.

        Raises:
            NotFittedError: the estimator has not been fitted.
            ValueError, TypeError: as :meth:`fastmeta.MAML.adapt`.
        """
        learner = self._fitted("adapt")
        at = self._place(learner)
        held = support.to(at.device) if isinstance(support, TaskBatch) else _tensors(support, at)
        return learner.adapt(held, steps=self.eval_steps if steps is None else steps)

    @torch.no_grad()
    def predict(
        self, inputs: Any, support: Any = None, *, adapted: AdaptedModel | None = None, steps: int | None = None
    ) -> Any:
        """Outputs of the model after adaptation, without gradients.

        Args:
            inputs: of the task, or ``[T, ...]`` of T tasks; a tuple is passed as ``model(*inputs)``, a dict as
                ``model(**inputs)``.
            support: what to adapt to, as :meth:`adapt` takes it; or
            adapted: what :meth:`adapt` has given.
            steps: inner steps, where ``support`` is given.

        Returns:
            what the model gives: for a classifier scores ``[N, classes]``, whose ``argmax(-1)`` are labels.

        Raises:
            NotFittedError: the estimator has not been fitted.
            TypeError: not exactly one of ``support`` and ``adapted``.
        """
        learner = self._fitted("predict")
        if (support is None) == (adapted is None):
            given = "neither" if support is None else "both"
            checks.fail(TypeError, "predict", "support or adapted", "given, one of them", given)
        model = self.adapt(support, steps=steps) if adapted is None else adapted
        return call_model(model, _tensors(inputs, self._place(learner)))

    def evaluate(self, tasks: Any, *, number: int = 600, batch: int = 20, steps: int | None = None) -> Evaluation:
        """Judge by tasks with query sets, before adaptation and after.

        Args:
            tasks: in any form that :meth:`fit` takes.
            number: how many are taken from a sampler; of other forms every task is.
            batch: tasks adapted at once.
            steps: inner steps; ``eval_steps`` where left out.

        Returns:
            means over tasks of the metric, ``before`` and ``after``, with 95 % confidence intervals.

        Raises:
            NotFittedError: the estimator has not been fitted.
            ValueError: fewer than two tasks.
        """
        learner = self._fitted("evaluate")
        count("evaluate", "number", number)
        count("evaluate", "batch", batch)
        return self._judge(learner, tasks, metric_of(self.metric), number=number, batch=batch, steps=steps)

    def recommend(
        self,
        user_support: Any,
        items: Any,
        k: int = 10,
        *,
        exclude: Sequence[Any] | Tensor | None = None,
        steps: int | None = None,
    ) -> Recommendation:
        """The ``k`` items that a ranking model, adapted to a user, gives the highest scores.

        Args:
            user_support: what the user has rated, as :meth:`adapt` takes it; or a TaskBatch of T users.
            items: inputs of the N items to choose from, the same for all users, without task axis. The model gives one
                score an item, ``[N]`` or ``[N, 1]``.
            k: how many.
            exclude: numbers of items that are not to be recommended, such as those already rated; for T users T
                sequences.
            steps: inner steps; ``eval_steps`` where left out.

        Raises:
            NotFittedError: the estimator has not been fitted.
            ValueError: the model gives something else than scores, one is not finite, an item of ``exclude`` does not
                exist, or fewer than ``k`` items are left.
        """
        learner = self._fitted("recommend")
        k = count("recommend", "k", k)
        adapted = self.adapt(user_support, steps=steps)
        single = not isinstance(user_support, TaskBatch)
        held = pytree.tree_map(lambda t: _expanded(t, adapted.tasks), _tensors(items, self._place(learner)))
        with torch.no_grad():
            scores = call_model(self._for_all(adapted, single), held)
        found = best_items(scores, k, [exclude] if single and exclude is not None else exclude)
        return Recommendation(found.items[0], found.scores[0]) if single else found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator into the folder ``path``: ``learner.json`` and a safetensors file.

        Weights, what else is learned, buffers, history and every parameter that is a plain value, or a name of
        ``fastmeta`` or ``torch``, are written; nothing is pickled. Each file is replaced in one step.

        Raises:
            NotFittedError: the estimator has not been fitted.
            OSError: the folder cannot be written.
        """
        saved.write(path, self._fitted("save"), self.get_params(deep=False), self.history_)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None, **parameters: Any) -> MetaLearner:
        """A fitted estimator from what :meth:`save` or :class:`~fastmeta.learner.callbacks.Checkpoint` wrote.

        Args:
            path: the folder.
            model: a model of the same architecture, whose values do not matter; it is copied.
            parameters: of the constructor, in place of the stored ones; those that are not plain values, such as a loss
                of your own, are not stored and must be given.

        Raises:
            FileNotFoundError: there is no estimator.
            TypeError: an unknown parameter.
            ValueError: a file is damaged, truncated or foreign, a parameter is missing, or the weights do not fit the
                model; the message names the file.
        """
        tensors, known, history = saved.read(path, parameters, {*cls._get_param_names()} - {"model"})
        made = cls(model=model, **known)
        learner, flags = made._make()
        load_weights(learner, tensors, str(Path(path) / f"{saved.NAME}.json"))
        made._keep(learner, flags, history, history[-1]["step"] if history else 0)
        return made

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "learner_")

    def _make(self) -> tuple[MAML, list[bool]]:
        """The algorithm around a copy of the model, and the modes that it trains in."""
        if self.inner_steps is not None:
            count("MetaLearner", "inner_steps", self.inner_steps, least=0)
        given = {"lr": self.inner_lr, "steps": self.inner_steps, **(self.options or {})}
        chosen = {name: value for name, value in given.items() if value is not None}
        learner = make_learner(self.model, self.algorithm, self.loss, chosen)
        return learner, modes(learner)

    def _keep(self, learner: MAML, flags: list[bool], history: list[dict[str, Any]], steps: int) -> None:
        rest(learner)
        self.learner_, self.model_, self._modes = learner, learner.model, flags
        self.history_, self.n_steps_ = history, steps

    def _fitted(self, what: str) -> MAML:
        if not hasattr(self, "learner_"):
            raise NotFittedError(f"MetaLearner: fit or load must come before {what}")
        return self.learner_

    def _judge(
        self,
        learner: MAML,
        tasks: Any,
        metric: Metric,
        *,
        number: int,
        batch: int,
        steps: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation:
        at = self._place(learner)
        moved = (held.to(at.device) for held in judged_batches(tasks, number=number, batch=batch))
        with at_rest(learner):
            return evaluate_batches(
                learner, moved, metric, steps=self.eval_steps if steps is None else steps, stop=stop
            )

    def _reporter(self) -> Reporter:
        if not self.verbose:
            return Silent()
        from rich.console import Console

        return reporter_for(Console(stderr=True))

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """PyTorch's generators at ``random_state``, and afterwards as they were."""
        if self.random_state is None:
            yield
            return
        count("MetaLearner", "random_state", self.random_state, least=0)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.random_state)
            yield

    @staticmethod
    def _place(learner: MAML) -> Tensor:
        """A tensor of the model's dtype on its device."""
        return next(learner.parameters()).detach()

    @staticmethod
    def _for_all(adapted: AdaptedModel, single: bool) -> Callable[..., Any]:
        """The adapted model, called with a task axis even where it has one task."""
        if not single:
            return adapted

        def call(*args: Any, **kwargs: Any) -> Any:
            one = pytree.tree_map(lambda t: t[0] if isinstance(t, Tensor) else t, (args, kwargs))
            return pytree.tree_map(lambda t: t.unsqueeze(0), adapted(*one[0], **one[1]))

        return call


def _tensors(tree: Any, at: Tensor) -> Any:
    """NumPy arrays as tensors, of the model's dtype where they are floating-point; everything on its device."""

    def tensor(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            made = torch.as_tensor(leaf)
            return made.to(at.device, at.dtype if made.is_floating_point() else made.dtype)
        return leaf.to(at.device) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(tensor, tree)


def _expanded(leaf: Any, tasks: int) -> Any:
    return leaf.expand(tasks, *leaf.shape) if isinstance(leaf, Tensor) else leaf
