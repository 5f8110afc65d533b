"""What a training run is made of: one flat, JSON-able record, with documented defaults for every problem."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fastmeta.core import checks

PROBLEMS = ("sinusoid", "digits", "omniglot")
ALGORITHMS = (
    "maml", "fomaml", "anil", "boil", "metasgd", "reptile", "imaml", "protomaml", "cavia", "mamlpp", "metacurvature",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; :func:`defaults` gives those of a problem.

    Attributes:
        problem: ``sinusoid``, ``digits`` or ``omniglot``.
        algorithm: one of :data:`ALGORITHMS`; docs/algorithms.md says what each is.
        data: file or folder of the data, where the problem reads any.
        ways: classes of a task (not used by sinusoid).
        shots: support samples of a class; support points for sinusoid.
        queries: query samples of a class; query points for sinusoid.
        inner_steps: steps of the inner loop in training.
        eval_steps: steps of the inner loop in validation and test.
        inner_lr: learning rate of the inner loop.
        meta_lr: learning rate of Adam on the meta-parameters at the start.
        meta_lr_end: the same at the end; it falls along half a cosine over ``iterations``.
        filters: channels of a convolution (not used by sinusoid).
        context: number of context parameters (used by cavia alone).
        meta_batch: tasks of a meta-step.
        iterations: meta-steps in all.
        accumulate: meta-batches whose gradients are added up before Adam's step.
        first_order: leave out the second-order term.
        clip_norm: largest 2-norm of the meta-gradient, 0 for no limit.
        seed: of the weights, of the class split and of the task streams.
        threads: threads of PyTorch; 0 leaves PyTorch's own choice.
        device: of weights and tasks, as PyTorch names it: ``cpu``, ``cuda``, ``cuda:1``.
        val_every: meta-steps between validations; a checkpoint is written at each.
        val_tasks: tasks of a validation, the same ones every time.
        log_every: meta-steps a training record is the mean of.
    """

    problem: str
    data: str | None = None
    ways: int = 5
    shots: int = 1
    queries: int = 5
    inner_steps: int = 1
    eval_steps: int = 3
    inner_lr: float = 0.4
    meta_lr: float = 1e-3
    meta_lr_end: float = 1e-5
    filters: int = 64
    meta_batch: int = 8
    iterations: int = 1000
    first_order: bool = False
    clip_norm: float = 0.0
    seed: int = 0
    threads: int = 0
    val_every: int = 500
    val_tasks: int = 100
    log_every: int = 20
    algorithm: str = "maml"
    accumulate: int = 1
    device: str = "cpu"
    context: int = 5

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            TypeError: a value of another type.
            ValueError: a value out of range.
        """
        kinds: dict[str, type | tuple[type, ...]] = {
            "str": str, "str | None": (str, type(None)), "int": int, "float": (int, float), "bool": bool,
        }  # fmt: skip
        for field in fields(self):
            value = getattr(self, field.name)
            wrong_bool = isinstance(value, bool) and field.type != "bool"
            if not isinstance(value, kinds[str(field.type)]) or wrong_bool:
                checks.fail(TypeError, "train", field.name, f"of type {field.type}", repr(value))
        checks.one_of("train", "problem", self.problem, PROBLEMS)
        checks.one_of("train", "algorithm", self.algorithm, ALGORITHMS)
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device):
            checks.fail(ValueError, "train", "device", "'cpu', 'cuda' or 'cuda:N'", repr(self.device))
        for name in (
            "ways",
            "shots",
            "queries",
            "filters",
            "meta_batch",
            "iterations",
            "val_every",
            "log_every",
            "accumulate",
            "context",
        ):
            checks.at_least("train", name, getattr(self, name), 1)
        for name in ("inner_steps", "eval_steps", "seed", "threads", "clip_norm", "meta_lr_end"):
            checks.at_least("train", name, getattr(self, name), 0)
        checks.at_least("train", "val_tasks", self.val_tasks, 2)  # an interval needs two
        for name in ("inner_lr", "meta_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                checks.fail(ValueError, "train", name, "positive and finite", getattr(self, name))

    def changed(self, **changes: Any) -> TrainConfig:
        """A copy with some values replaced; ``None`` leaves a value as it is."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Settings from :meth:`to_json`.

        Raises:
            ValueError: names that are missing or unknown, or bad values.
        """
        known = {field.name for field in fields(cls)}
        if isinstance(values, Mapping):
            values = {
                "algorithm": "maml",
                "accumulate": 1,
                "device": "cpu",
                "context": 5,
                **values,
            }  # a run from before there were others
        if not isinstance(values, Mapping) or set(values) != known:
            got = sorted(set(values) ^ known) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"train: the settings must have the names of TrainConfig, got a difference in {got}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from error


_DEFAULTS = {
    "sinusoid": TrainConfig(
        "sinusoid", ways=1, shots=10, queries=10, inner_steps=1, eval_steps=10, inner_lr=0.01, meta_lr=3e-3,
        meta_lr_end=1e-5, filters=40, meta_batch=25, iterations=15_000, val_every=1000, val_tasks=600, log_every=100,
    ),
    "digits": TrainConfig(
        "digits", ways=5, shots=1, queries=5, inner_steps=1, eval_steps=3, inner_lr=0.4, meta_lr=3e-3,
        meta_lr_end=1e-5, filters=32, meta_batch=16, iterations=400, val_every=100, val_tasks=200, log_every=10,
        context=100,
    ),
    "omniglot": TrainConfig(
        "omniglot", ways=5, shots=1, queries=5, inner_steps=1, eval_steps=5, inner_lr=0.4, meta_lr=2e-3,
        meta_lr_end=1e-5, filters=32, meta_batch=8, iterations=10_000, val_every=500, val_tasks=200, log_every=20,
        context=100,
    ),
}  # fmt: skip


def defaults(problem: str) -> TrainConfig:
    """The documented settings of a problem; docs/training.md says where they come from.

    Raises:
        ValueError: an unknown problem.
    """
    checks.one_of("train", "problem", problem, PROBLEMS)
    return _DEFAULTS[problem]
