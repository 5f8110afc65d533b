"""Two kinds of tasks in one step: the gradients are the sum of both kinds', and both are learned."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from examples import mixed_domains
from examples.mixed_domains import STEPS, WAYS, WIDTH, Domains, Words
from tests.examples.data import write_sentences
from tests.oracle import maml_loop, relative_error

LR, T = 0.2, 3


class Kept(torch.optim.SGD):
    """Remembers the gradients that it was asked to follow."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]


def labels(n: int) -> Tensor:
    return torch.randint(WAYS, (T, n))


def test_a_step_follows_the_sum_of_both_meta_gradients() -> None:
    domains = Domains(nn.Sequential(nn.Flatten(), nn.Linear(16, WIDTH)).double(), Words(11, WIDTH).double(), LR)
    for learner in domains.learners.values():
        learner.double()
    images = fm.TaskBatch(*[(torch.randn(T, n, 1, 4, 4, dtype=torch.float64), labels(n)) for n in (5, 6)])
    tokens = [torch.randint(1, 11, (T, n, 7)) for n in (5, 6)]
    tokens[0][:, :, 4:] = 0
    texts = fm.TaskBatch(*[(x, labels(x.shape[1])) for x in tokens])
    total: dict[Tensor, Tensor] = {}
    losses = {}
    for kind, tasks in (("images", images), ("texts", texts)):
        model = domains.learners[kind].model
        adapted = [n for n, _ in model.named_parameters() if n.startswith("1.")]
        losses[kind], _, _, grads = maml_loop(
            model, F.cross_entropy, tasks.support, tasks.query, LR, STEPS, adapted_names=adapted
        )
        for name, p in model.named_parameters():
            total[p] = total.get(p, 0) + grads[name]
    optimizer = Kept(domains.parameters, lr=0.1)
    found = domains.step(optimizer, {"images": images, "texts": texts})
    assert len(total) == len(domains.parameters) == 4 + 2 + 3
    for p, grad in zip(domains.parameters, optimizer.seen, strict=True):
        assert relative_error(grad, total[p]) < 1e-9
    for kind, loss in losses.items():
        assert relative_error(found[kind], loss) < 1e-12


def test_learns_both_in_turn(tmp_path: Path) -> None:
    texts = write_sentences(tmp_path / "sentences.jsonl")
    found = mixed_domains.main(
        ["--texts", str(texts), "--schedule", "alternate", "--iterations", "60", "--test-tasks", "24", "--tasks", "6"]
    )
    for fresh, trained in found.values():
        assert trained.after.mean > fresh.after.mean + 0.1
        assert trained.after.mean > trained.before.mean + 0.2
