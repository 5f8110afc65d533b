"""A few small meta-steps on the resident executor, for compute-sanitizer.

``compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize``; likewise ``racecheck`` and ``synccheck``. With
``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` every tensor is an allocation of its own, so that memcheck sees what reaches beyond
one. It compares nothing: the tests do.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm


def network(*widths: int, activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    """A chain of linear layers on the GPU."""
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*parts[:-1]).cuda()


def batch(loss: Any, tasks: int, n: int, fan_in: int, out: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    x = torch.randn(tasks, n, fan_in, device="cuda")
    if loss is F.cross_entropy:
        return x, torch.randint(out, (tasks, n), device="cuda")
    return x, torch.rand(tasks, n, out, device="cuda")


def main() -> None:
    """Run them."""
    runs: list[tuple[nn.Module, Any, int, int, dict[str, Any]]] = [
        (network(1, 40, 40, 1, activation=nn.ReLU), F.mse_loss, 1, 1, {"steps": 2}),
        (network(5, 33, 7, 3, activation=nn.GELU, bias=False), F.cross_entropy, 5, 3, {"steps": 2}),
        (network(3, 9, 2, activation=nn.Sigmoid), F.binary_cross_entropy_with_logits, 3, 2, {"first_order": True}),
        (network(1, 64, 64, 1), F.mse_loss, 1, 1, {"steps": 12}),  # more than shared memory holds
        (network(784, 64, 64, 5), F.cross_entropy, 784, 5, {"steps": 2}),  # the first layer factored
        (network(2, 6, 2), F.mse_loss, 2, 2, {"steps": 3, "lr": nn.Parameter(torch.full((3,), 0.1, device="cuda"))}),
    ]
    for model, loss, fan_in, out, options in runs:
        maml = fm.MAML(model, loss, **{"lr": 0.1, "steps": 1, "executor": "native", **options})
        for n, nq in [(5, 3), (1, 8)]:
            tasks = fm.TaskBatch(support=batch(loss, 3, n, fan_in, out), query=batch(loss, 3, nq, fan_in, out))
            maml.value_and_grad(tasks)
            maml(tasks).loss.backward()
    torch.cuda.synchronize()
    print(f"{2 * len(runs)} kinds of meta-step ran on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
