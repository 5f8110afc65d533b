"""learn2learn: its MAML wrapper, cloned and adapted for one task after another."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from typing import Any

from torch import Tensor

from benchmarks.peers.base import Step, Unavailable, Variant
from benchmarks.workloads import Problem


@functools.cache
def _maml_class() -> Any:
    """learn2learn's MAML; where the package itself cannot be imported, from its file alone.

    The package imports gym and torchvision for its environments and data sets, which MAML does not need and which
    current Pythons lack.
    """
    try:
        return importlib.import_module("learn2learn").algorithms.MAML
    except ImportError as error:
        spec = importlib.util.find_spec("learn2learn")
        if spec is None or not spec.submodule_search_locations:
            raise Unavailable(f"{error} (version 0.2.0 does not build on Python >= 3.11)") from error
    for name in [n for n in sys.modules if n.split(".")[0] == "learn2learn"]:
        del sys.modules[name]
    for name in ("learn2learn", "learn2learn.algorithms"):
        package = types.ModuleType(name)
        package.__path__ = [f"{place}/{'/'.join(name.split('.')[1:])}" for place in spec.submodule_search_locations]
        sys.modules[name] = package
    try:
        return importlib.import_module("learn2learn.algorithms.maml").MAML
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from error


def prepare(problem: Problem) -> Step:
    loss = problem.loss
    maml = _maml_class()(problem.model, lr=problem.lr)
    tasks = list(zip(*problem.support, *problem.query, strict=True))

    def run() -> dict[str, Tensor]:
        maml.zero_grad(set_to_none=True)
        for xs, ys, xq, yq in tasks:
            learner = maml.clone()
            for _ in range(problem.steps):
                learner.adapt(loss(learner(xs), ys))
            (loss(learner(xq), yq) / len(tasks)).backward()
        return {n: p.grad for n, p in problem.model.named_parameters()}

    return Step(run)


LEARN2LEARN = Variant("learn2learn", "learn2learn", "eager", prepare, "learn2learn MAML, tasks in a loop")
