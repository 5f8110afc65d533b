"""Navigation: the surrogate has the expected return's derivatives, the meta-gradient is theirs, and it learns."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from examples import navigation
from examples.navigation import Points, Policy, dice, lvc, meta_batch, surrogate
from tests.oracle import maml_loop, relative_error

STATES, ACTIONS, HORIZON, TASKS, LR = 2, 2, 3, 3, 0.7


class Table(nn.Module):
    """Logits of actions, one row a state."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(STATES, ACTIONS, dtype=torch.float64))

    def forward(self, states: Tensor) -> Tensor:
        return self.logits.log_softmax(-1)[states]


class Process:
    """A decision process with random transitions and rewards, of which everything can be counted."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.rewards = torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
        self.moves = torch.rand(STATES, ACTIONS, STATES, generator=g, dtype=torch.float64)
        self.moves /= self.moves.sum(-1, keepdim=True)

    def value(self, logits: Tensor) -> Tensor:
        """The expected return from state 0, by recursion from the end."""
        pi, v = logits.softmax(-1), torch.zeros(STATES, dtype=torch.float64)
        for _ in range(HORIZON):
            v = (pi * (self.rewards + self.moves @ v)).sum(-1)
        return v[0]

    def every_trajectory(self, logits: Tensor) -> dict[str, Tensor]:
        """All trajectories, each with its probability under a policy, and a baseline of state and time."""
        with torch.no_grad():
            log_pi, rows = logits.log_softmax(-1), []
            for states in itertools.product(range(STATES), repeat=HORIZON - 1):
                for actions in itertools.product(range(ACTIONS), repeat=HORIZON):
                    path = (0, *states)
                    moved = [self.moves[path[t], actions[t], path[t + 1]] for t in range(HORIZON - 1)]
                    rows.append((path, actions, torch.stack(moved).prod()))
            s, a = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
            log_mu = log_pi[s, a]
            to_go = self.rewards[s, a].flip(1).cumsum(1).flip(1)
            baseline = torch.tensor([0.3, -0.8], dtype=torch.float64)[s] + torch.arange(HORIZON)
            chance = torch.stack([row[2] for row in rows]) * log_mu.sum(1).exp()
            assert abs(float(chance.sum()) - 1) < 1e-12
            return {"s": s, "a": a, "log_mu": log_mu, "advantages": to_go - baseline, "chance": chance}


def expected(estimator):
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        log_pi = model(batch["s"]).gather(-1, batch["a"][..., None]).squeeze(-1)
        return (batch["chance"] * estimator(log_pi - batch["log_mu"], batch["advantages"])).sum()

    return loss


def plain(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """The policy gradient's usual surrogate, which is not made to be differentiated twice."""
    return -(log_ratio * advantages).sum(1)


def stacked(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([b[name] for b in batches]) for name in batches[0]}


def counted(estimator) -> tuple[Tensor, Tensor]:
    """The meta-gradient by the estimator's expectation, and that of the value itself."""
    model, processes = Table(), [Process(seed) for seed in range(TASKS)]
    theta = model.logits
    learner = fm.MAML(model, expected(estimator), lr=LR, steps=1)
    support = stacked([p.every_trajectory(theta) for p in processes])
    phi = learner.adapt(fm.TaskBatch(support)).parameters["logits"]
    query = stacked([p.every_trajectory(x) for p, x in zip(processes, phi, strict=True)])
    value = learner.value_and_grad(fm.TaskBatch(support, query))[1]["logits"]
    total = torch.zeros((), dtype=torch.float64)
    for process, adapted in zip(processes, phi, strict=True):
        (g,) = torch.autograd.grad(process.value(theta), theta, create_graph=True)
        assert torch.allclose(theta + LR * g, adapted, rtol=0, atol=1e-12)
        total = total - process.value(theta + LR * g) / TASKS
    return value, torch.autograd.grad(total, theta)[0]


def test_meta_gradient_in_expectation_is_that_of_the_return() -> None:
    assert relative_error(*counted(dice)) < 1e-12


@pytest.mark.parametrize("estimator", [plain, lvc])
def test_others_have_another_hessian(estimator) -> None:
    assert relative_error(*counted(estimator)) > 1e-3


def test_derivatives_are_those_of_dice_with_stopped_gradients() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(5, 4, dtype=torch.float64)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    ours = dice(x - x.detach(), to_go).sum()
    total = x.cumsum(1)
    truth = -((total - total.detach()).exp() * rewards).sum()
    for _ in range(3):
        (ours,) = torch.autograd.grad(ours, x, create_graph=True)
        (truth,) = torch.autograd.grad(truth, x, create_graph=True)
        assert relative_error(ours.detach(), truth.detach()) < 1e-12
        ours, truth = (ours * torch.arange(20.0).reshape(5, 4)).sum(), (truth * torch.arange(20.0).reshape(5, 4)).sum()


@pytest.mark.parametrize("estimator", [dice, lvc])
def test_meta_gradient_on_trajectories_agrees_with_the_loop(estimator) -> None:
    policy = Policy(width=6).double()
    learner = fm.MAML(policy, surrogate(estimator), lr=0.05, steps=1)
    goals = torch.rand(3, 2, dtype=torch.float64) - 0.5
    goals[0] = torch.tensor([0.004, 0.0])  # is reached at once by some
    tasks, _, _ = meta_batch(learner, policy, goals, count=4, horizon=5)
    assert tasks.support["alive"][1:].all()
    _, grads = learner.value_and_grad(tasks)  # the loss has no meaning: advantages add up to nothing
    truth = maml_loop(policy, surrogate(estimator), tasks.support, tasks.query, 0.05, 1)[3]
    assert relative_error(grads, truth) < 1e-9


def test_trajectories_are_of_the_adapted_policy_and_end_at_the_goal() -> None:
    policy = Policy(width=6).double()
    goals = torch.zeros(2, 2, dtype=torch.float64)
    goals[1] = 9.0
    learner = fm.MAML(policy, surrogate(dice), lr=0.01, steps=1)
    tasks, before, _ = meta_batch(learner, policy, goals, count=400, horizon=4)
    alive, query = tasks.support["alive"], tasks.query
    assert alive[1].all()
    assert not alive[0].all()
    assert (alive.diff(dim=2) <= 0).all()
    assert float((tasks.support["advantages"] * (1 - alive)).abs().max()) == 0
    adapted = learner.adapt(tasks)
    mean, log_std = adapted(query["positions"])
    density = navigation.log_density(mean, log_std[:, None, None], query["actions"])
    assert relative_error(density, query["log_mu"]) < 1e-12
    assert before.shape == (2, 400)


def test_points_move_no_farther_than_they_reach() -> None:
    points = Points(torch.tensor([[0.3, 0.4], [0.1, 0.0]]))
    points.reset()
    positions, rewards, arrived = points.step(torch.tensor([[5.0, -5.0], [0.1, 0.0]]))
    assert torch.allclose(positions, torch.tensor([[0.1, -0.1], [0.1, 0.0]]))
    assert torch.allclose(rewards, torch.tensor([-0.29, 0.0]))
    assert arrived.tolist() == [False, True]


def test_learns() -> None:
    reduced = "--iterations 40 --tasks 10 --trajectories 10 --horizon 10 --inner-lr 1.5 --lr 0.01 --test-goals 30"
    found = navigation.main(reduced.split())
    before, after = found["meta-trained"]
    assert after > before + 0.5
    assert after > max(found["random weights"]) + 0.5


def test_in_gymnasium() -> None:
    pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    goal = torch.tensor([0.3, -0.2])
    environment = navigation.gymnasium_environment(goal, 8)
    check_env(environment, skip_render_check=True)
    environment.reset(seed=0)
    points = Points(goal)
    points.reset()
    environment.action_space.seed(0)
    for step in range(8):
        action = environment.action_space.sample()
        position, reward, arrived, late, _ = environment.step(action)
        where, its_reward, _ = points.step(torch.from_numpy(action))
        assert torch.equal(torch.from_numpy(position), where)
        assert reward == float(its_reward)
        assert (arrived, late) == (False, step == 7)
    options = "--iterations 2 --tasks 2 --trajectories 3 --horizon 3 --test-goals 3 --gymnasium"
    navigation.main(options.split())
