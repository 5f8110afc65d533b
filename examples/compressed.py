"""Adapting a base that was made small: pruned, dynamically quantised, or held in int8 under low-rank corrections.

A network is meta-trained on handwritten digits and compressed; then its compressed form is meta-trained on, and what
the compression fixed stays as it is: pruned weights are zero in every task's weights, quantised ones keep every bit.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fastmeta as fm
from examples.common import meta_train, percent, table
from fastmeta.algorithms.maml import Engine
from fastmeta.learner.evaluation import Estimate, evaluate
from fastmeta.tasks import EpisodeSampler, load_digits_pools

WAYS, SHOTS = 5, 5


def network(width: int) -> nn.Sequential:
    """A body of two layers and a head, on images ``[N, 1, 8, 8]``."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(body, nn.Linear(width, WAYS))


def pruned(model: nn.Sequential, share: float) -> nn.Sequential:
    """A copy that has lost the ``share`` of its linear layers' weights that is smallest, by PyTorch's own masks.

    The layers multiply by the mask in their forward pass, so gradients of all orders are zero where it is: nothing
    more is needed. ``weight_orig`` is made zero there too, so that it can be looked at without the mask.
    """
    made = copy.deepcopy(model)
    layers = [m for m in made.modules() if isinstance(m, nn.Linear)]
    prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=share)
    with torch.no_grad():
        for layer in layers:
            layer.get_parameter("weight_orig").mul_(layer.get_buffer("weight_mask"))
    return made


class Quantised(nn.Module):
    """A body whose linear layers PyTorch quantises: int8 weights, activations in eight bits at every call."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch moves this to torchao
            self.body = torch.ao.quantization.quantize_dynamic(body, {nn.Linear}, dtype=torch.qint8)

    def forward(self, x: Tensor) -> Tensor:
        """Features; the kernels know float32 alone."""
        return self.body(x.float()).to(x.dtype)


def quantised(model: nn.Sequential) -> nn.Sequential:
    """A copy with a quantised body, which passes no derivative, under the head in floating point, which adapts."""
    made = copy.deepcopy(model)
    return nn.Sequential(Quantised(made[0]), made[1])


class Int8Linear(nn.Module):
    """``x (s * Q)^T + b + x A^T B^T``: weights Q of int8 with a scale a row, fixed, and what corrects them.

    A is drawn, B is zero. Q and the scales are buffers, so that nothing can change them.
    """

    scale: Tensor
    quantised: Tensor

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("quantised", (weight / scale).round().to(torch.int8))
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, dtype=weight.dtype) / layer.in_features**0.5)
        self.up = nn.Parameter(weight.new_zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, out]`` of ``[N, in]``."""
        fixed = F.linear(x, self.quantised.to(x.dtype) * self.scale, self.bias)
        return fixed + F.linear(F.linear(x, self.down), self.up)


def int8(model: nn.Sequential, rank: int) -> nn.Sequential:
    """A copy whose body holds its weights in int8; its corrections, its biases and the head adapt."""
    made = copy.deepcopy(model)
    body = made[0]
    for name, layer in list(body.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(body, name, Int8Linear(layer, rank))
    return made


def learner_of(kind: str, model: nn.Module) -> fm.MAML:
    """MAML over all parameters that one form of the network has left: over a quantised body, the head's."""
    # packed weights are not tensors, of which a program is made: autodiff would run with a warning
    engine: Engine = "autodiff" if kind == "quantised body" else "auto"
    return fm.MAML(model, F.cross_entropy, lr=0.3, steps=3, engine=engine)


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[Estimate, Estimate]]:
    """Compress and train on; accuracies after adaptation, as compressed and as trained on, by form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000, help="meta-steps before compression")
    parser.add_argument("--more", type=int, default=500, help="meta-steps of each form after it")
    parser.add_argument("--share", type=float, default=0.8, help="of weights that are pruned")
    parser.add_argument("--rank", type=int, default=4, help="of the corrections")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--test-tasks", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    digits = load_digits_pools(seed=options.seed)
    torch.manual_seed(options.seed)

    def train(learner: fm.MAML, steps: int, label: str) -> None:
        sampler = EpisodeSampler(
            digits.train, ways=WAYS, shots=SHOTS, queries=5, tasks=16, seed=options.seed, variants=digits.variants
        )
        meta_train(learner, sampler, steps, 5e-3, label)

    def judged(learner: fm.MAML) -> Estimate:
        sampler = EpisodeSampler(digits.test, ways=WAYS, shots=SHOTS, queries=5, tasks=20, seed=options.seed + 1)
        return evaluate(learner, sampler, "accuracy", tasks=options.test_tasks, steps=3).after

    dense = network(options.width)
    learner = learner_of("dense", dense)
    fresh = judged(learner)
    train(learner, options.iterations, "dense")
    found = {"dense": (fresh, judged(learner))}
    forms = {
        f"pruned by {options.share:.0%}": pruned(dense, options.share),
        "quantised body": quantised(dense),
        f"int8 body, rank {options.rank}": int8(dense, options.rank),
    }
    adapting = {"dense": sum(p.numel() for p in dense.parameters())}
    for kind, model in forms.items():
        learner = learner_of(kind, model)
        before = judged(learner)
        train(learner, options.more, kind)
        found[kind] = (before, judged(learner))
        adapting[kind] = sum(int(p.count_nonzero()) for p in learner.adapt(first(digits.test)).parameters.values())
    rows = [[kind, str(adapting[kind]), *map(percent, pair)] for kind, pair in found.items()]
    table(
        f"{WAYS}-way {SHOTS}-shot accuracy on unseen digits, after adaptation",
        ["network", "adapting, not zero", "before its training", "after it"],
        rows,
    )
    return found


def first(pool: fm.tasks.ClassPool) -> tuple[Tensor, Tensor]:
    """The support set of one task."""
    return EpisodeSampler(pool, ways=WAYS, shots=SHOTS, queries=1, tasks=1).sample().task(0)[0]


if __name__ == "__main__":
    main()
