"""2-D navigation by policy gradient: MAML for reinforcement learning, with an estimator whose second order is right.

A point starts at the origin and shall go to a goal that its observations do not tell; a task is a goal. The policy
tries a few trajectories, takes one gradient step on them, and is judged by trajectories of the adapted policy. The
problem is that of C. Finn, P. Abbeel, S. Levine, ICML 2017, section 5.3.

The meta-gradient holds the Hessian of the expected return, and differentiating a policy gradient once more does not
estimate it: the trajectories' distribution depends on the parameters too. The surrogate :func:`dice` has the expected
return's derivatives of every order. It is handed to ``fm.MAML`` as ``loss(model, batch)``, the trajectories as batches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import fastmeta as fm
from examples.common import CONSOLE, progress, table
from fastmeta.learner.evaluation import Estimate

REACH = 0.1  # the farthest a step goes, in each direction
NEAR = 0.01  # a trajectory ends so close to its goal


def dice(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """The negative return's surrogate of each trajectory, right in every derivative.

    ``-sum_t (w_t - w_{t-1}) A_t`` with ``w_t = prod_{u <= t} pi(a_u | s_u) / mu(a_u | s_u)``, ``w_{-1} = 1``, where mu
    is the policy that drew the trajectories. With rewards to go for A it is the return weighted by importance, less a
    constant; a baseline of the state and time has expectation zero at every pi. So its expectation is the return of pi,
    wherever pi is, and so are all derivatives. At ``pi = mu`` this is DiCE with advantages.

    Args:
        log_ratio: ``log pi - log mu`` of each action, ``[N, H]``, zero behind a trajectory's end.
        advantages: discounted rewards to go less a baseline, ``[N, H]``.

    Returns:
        ``[N]``.

    Source: J. Foerster et al., ICML 2018; G. Farquhar, S. Whiteson, J. Foerster, NeurIPS 2019.
    """
    after = log_ratio.cumsum(1)
    return -((after.exp() - (after - log_ratio).exp()) * advantages).sum(1)


def lvc(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """The same with each action's ratio alone: less variance, the right gradient, a Hessian that is biased.

    ``-sum_t pi(a_t | s_t) / mu(a_t | s_t) A_t``; what it leaves out vanishes where advantages do not depend on the
    policy. (J. Rothfuss et al., ICLR 2019, "low variance curvature".)
    """
    return -(log_ratio.exp() * advantages).sum(1)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dice": dice, "lvc": lvc}


class Policy(nn.Module):
    """A Gaussian about a network's output, ``[..., 2]`` of positions ``[..., 2]``, with a spread that is learned."""

    def __init__(self, width: int = 64, spread: float = 0.1) -> None:
        super().__init__()
        self.mean = fm.models.mlp((2, width, width, 2), nn.Tanh)
        self.log_std = nn.Parameter(torch.full((2,), math.log(spread)))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation."""
        return REACH * self.mean(positions), self.log_std


def log_density(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Logarithm of a Gaussian's density, summed over the last axis."""
    return (-0.5 * ((actions - mean) * (-log_std).exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def surrogate(estimator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """``loss(model, batch)`` on one task's trajectories, as :func:`trajectories` gives them; a mean a step."""

    def loss(policy: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        mean, log_std = policy(batch["positions"])
        log_ratio = (log_density(mean, log_std, batch["actions"]) - batch["log_mu"]) * batch["alive"]
        return estimator(log_ratio, batch["advantages"]).mean() / batch["alive"].shape[1]

    return loss


class Points:
    """Points on the plane, any number at once, one goal each: ``reset`` and ``step`` in gymnasium's manner.

    Args:
        goals: ``[..., 2]``.
    """

    def __init__(self, goals: Tensor) -> None:
        self.goals = goals
        self.positions = torch.zeros_like(goals)

    def reset(self) -> Tensor:
        """Every point to the origin."""
        self.positions = torch.zeros_like(self.goals)
        return self.positions

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions ``[..., 2]``, rewards ``-|position - goal|^2`` ``[...]``, and which points have arrived."""
        self.positions = self.positions + actions.clamp(-REACH, REACH)
        distance = (self.positions - self.goals).square().sum(-1)
        return self.positions, -distance, distance < NEAR**2


def gymnasium_environment(goal: Tensor, horizon: int) -> Any:
    """One point as a ``gymnasium.Env``; ``pip install gymnasium``, or the extra ``rl``."""
    import gymnasium

    class Navigation(gymnasium.Env[Any, Any]):
        def __init__(self) -> None:
            far = REACH * horizon
            self.observation_space = gymnasium.spaces.Box(-far, far, (2,), np.float32)
            self.action_space = gymnasium.spaces.Box(-REACH, REACH, (2,), np.float32)
            self._point = Points(goal)
            self._steps = 0

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            self._steps = 0
            return self._point.reset().numpy(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            position, reward, arrived = self._point.step(torch.as_tensor(action))
            self._steps += 1
            return position.numpy(), float(reward), bool(arrived), self._steps >= horizon, {}

    return Navigation()


@torch.no_grad()
def trajectories(
    policy: Policy, parameters: Mapping[str, Tensor], goals: Tensor, count: int, horizon: int, discount: float
) -> tuple[dict[str, Tensor], Tensor]:
    """``count`` trajectories of every task's policy.

    The baseline is the mean reward to go of the task's other trajectories at the same time, which the trajectory itself
    does not depend on.

    Args:
        policy: the network.
        parameters: its weights for every task, ``[T, *shape]``.
        goals: ``[T, 2]``.
        count: trajectories of a task, N, at least 2.
        horizon: steps of a trajectory, H.
        discount: of rewards, for each step.

    Returns:
        positions and actions ``[T, N, H, 2]``; log_mu, advantages and alive ``[T, N, H]``; and the returns ``[T, N]``,
        without discount.
    """
    act = vmap(lambda weights, positions: functional_call(policy, dict(weights), (positions,)))
    points = Points(goals[:, None].expand(-1, count, -1))
    positions, alive = points.reset(), torch.ones(len(goals), count, dtype=goals.dtype)
    record: dict[str, list[Tensor]] = {n: [] for n in ("positions", "actions", "log_mu", "alive", "rewards")}
    for _ in range(horizon):
        mean, log_std = act(parameters, positions)
        log_std = log_std[:, None]
        actions = mean + log_std.exp() * torch.randn_like(mean)
        after, rewards, arrived = points.step(actions)
        row = (positions, actions, log_density(mean, log_std, actions), alive, rewards * alive)
        for name, value in zip(record, row, strict=True):
            record[name].append(value)
        positions, alive = after, alive * ~arrived
    batch = {name: torch.stack(values, 2) for name, values in record.items()}
    rewards = batch.pop("rewards")
    discounts = discount ** torch.arange(horizon, dtype=goals.dtype)
    to_go = (rewards * discounts).flip(2).cumsum(2).flip(2)  # of discounted rewards: the advantage's own factor is in
    others = (to_go.sum(1, keepdim=True) - to_go) / (count - 1)
    batch["advantages"] = (to_go - others) * batch["alive"]
    return batch, rewards.sum(2)


def meta_batch(
    learner: fm.MAML, policy: Policy, goals: Tensor, count: int, horizon: int, discount: float = 0.99
) -> tuple[fm.TaskBatch, Tensor, Tensor]:
    """Trajectories of the policy to adapt to, and of the policies adapted to them; and the returns of both."""
    shared = {name: p.detach().expand(len(goals), *p.shape) for name, p in policy.named_parameters()}
    support, before = trajectories(policy, shared, goals, count, horizon, discount)
    adapted = learner.adapt(fm.TaskBatch(support)).parameters
    query, after = trajectories(policy, adapted, goals, count, horizon, discount)
    return fm.TaskBatch(support, query), before, after


def draw_goals(tasks: int, generator: torch.Generator) -> Tensor:
    """Goals ``[T, 2]`` in the square of side 1 about the origin."""
    return torch.rand(tasks, 2, generator=generator) - 0.5


def judged(learner: fm.MAML, policy: Policy, options: argparse.Namespace) -> tuple[Estimate, Estimate]:
    """Returns on unseen goals before and after adaptation."""
    goals = draw_goals(options.test_goals, torch.Generator().manual_seed(options.seed + 1))
    _, before, after = meta_batch(learner, policy, goals, options.trajectories, options.horizon)
    return Estimate.of(before.mean(1)), Estimate.of(after.mean(1))


def in_gymnasium(learner: fm.MAML, policy: Policy, options: argparse.Namespace, goals: Tensor) -> Tensor:
    """Return of one trajectory of each goal's adapted policy, its means for actions, in ``gymnasium``."""
    tasks, _, _ = meta_batch(learner, policy, goals, options.trajectories, options.horizon)
    adapted = learner.adapt(tasks)
    returns = []
    for t, goal in enumerate(goals):
        network, environment = adapted.module(t), gymnasium_environment(goal, options.horizon)
        position, _ = environment.reset(seed=options.seed)
        total, over = 0.0, False
        while not over:
            with torch.no_grad():
                action = network(torch.from_numpy(position))[0].clamp(-REACH, REACH).numpy()
            position, reward, arrived, late, _ = environment.step(action)
            total, over = total + reward, arrived or late
        returns.append(total)
    return torch.tensor(returns)


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """Meta-train and compare; mean return before and after adaptation, by what was trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200, help="meta-steps")
    parser.add_argument("--tasks", type=int, default=20, help="goals a meta-step")
    parser.add_argument("--trajectories", type=int, default=20, help="of a task, to adapt to and to be judged by")
    parser.add_argument("--horizon", type=int, default=30, help="steps of a trajectory")
    parser.add_argument("--inner-lr", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=3e-3, help="of Adam")
    parser.add_argument("--estimator", choices=ESTIMATORS, default="dice")
    parser.add_argument("--test-goals", type=int, default=100)
    parser.add_argument("--gymnasium", action="store_true", help="also run adapted policies in a gymnasium.Env")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    policy = Policy()
    learner = fm.MAML(policy, surrogate(ESTIMATORS[options.estimator]), lr=options.inner_lr, steps=1)
    found = {"random weights": judged(learner, policy, options)}
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(learner.parameters(), options.lr)

    def step(_: int) -> str:
        goals = draw_goals(options.tasks, generator)
        tasks, before, after = meta_batch(learner, policy, goals, options.trajectories, options.horizon)
        optimizer.zero_grad()
        learner(tasks).loss.backward()
        optimizer.step()
        return f"return {before.mean():.2f} -> {after.mean():.2f}"

    progress(options.iterations, options.estimator, step)
    found["meta-trained"] = judged(learner, policy, options)
    rows = [[name, *(f"{e.mean:.2f} ± {e.ci95:.2f}" for e in pair)] for name, pair in found.items()]
    table(f"return on {options.test_goals} unseen goals", ["policy", "before adaptation", "after one inner step"], rows)
    if options.gymnasium:
        goals = draw_goals(10, torch.Generator().manual_seed(options.seed + 2))
        CONSOLE.print(f"in gymnasium, means for actions: {in_gymnasium(learner, policy, options, goals).mean():.2f}")
    return {name: (before.mean, after.mean) for name, (before, after) in found.items()}


if __name__ == "__main__":
    main()
