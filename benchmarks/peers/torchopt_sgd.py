"""TorchOpt: MetaSGD on the module itself, its state extracted before and recovered after every task."""

from __future__ import annotations

from torch import Tensor

from benchmarks.peers.base import Step, Unavailable, Variant
from benchmarks.workloads import Problem


def prepare(problem: Problem) -> Step:
    try:
        import torchopt
    except ImportError as error:
        raise Unavailable(str(error)) from error

    model, loss = problem.model, problem.loss
    inner = torchopt.MetaSGD(model, lr=problem.lr)
    parameters = dict(model.named_parameters())
    start = torchopt.extract_state_dict(model, by="reference")
    start_inner = torchopt.extract_state_dict(inner, by="reference")
    tasks = list(zip(*problem.support, *problem.query, strict=True))

    def run() -> dict[str, Tensor]:
        for p in parameters.values():
            p.grad = None
        for xs, ys, xq, yq in tasks:
            for _ in range(problem.steps):
                inner.step(loss(model(xs), ys))
            (loss(model(xq), yq) / len(tasks)).backward()
            torchopt.recover_state_dict(model, start)
            torchopt.recover_state_dict(inner, start_inner)
        return {n: p.grad for n, p in parameters.items() if p.grad is not None}

    return Step(run)


TORCHOPT = Variant("torchopt", "torchopt", "eager", prepare, "TorchOpt MetaSGD, tasks in a loop")
