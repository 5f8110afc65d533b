"""Regression on sine waves, the first problem of the MAML paper (Finn, Abbeel, Levine 2017, section 5.1)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastmeta.tasks.batch import TaskBatch
from fastmeta.tasks.sampler import TaskSampler, count


class Sinusoid(TaskSampler):
    """Tasks ``y = a sin(x - p)``: a from U[0.1, 5], p from U[0, pi], x from U[-5, 5].

    Args:
        tasks: tasks of a batch, T.
        shots: support points of a task.
        queries: query points of a task; as many as ``shots`` where left out.
        seed: seed of the stream.
        amplitude: bounds of a.
        phase: bounds of p, in radians.
        inputs: bounds of x.
        dtype: dtype of the tensors; points are drawn in float64 and rounded once.

    Raises:
        ValueError: a count below 1, or bounds that are not finite and rising.
    """

    def __init__(
        self,
        tasks: int = 25,
        shots: int = 10,
        queries: int | None = None,
        *,
        seed: int = 0,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        inputs: tuple[float, float] = (-5.0, 5.0),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(tasks, seed)
        self.shots = count("Sinusoid", "shots", shots)
        self.queries = self.shots if queries is None else count("Sinusoid", "queries", queries)
        for name, (low, high) in {"amplitude": amplitude, "phase": phase, "inputs": inputs}.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"Sinusoid: {name} must be two finite, rising bounds, got {(low, high)}")
        self.amplitude, self.phase, self.inputs = amplitude, phase, inputs
        self.dtype = dtype

    def draw(self, tasks: int | None = None) -> tuple[Tensor, Tensor]:
        """Amplitudes and phases of the next tasks, each ``[T, 1, 1]`` in float64."""
        size = (self._batch_size(tasks), 1, 1)
        amplitude = self._rng.uniform(*self.amplitude, size)
        return torch.from_numpy(amplitude), torch.from_numpy(self._rng.uniform(*self.phase, size))

    def points(self, amplitude: Tensor, phase: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``[T, count, 1]`` of given waves."""
        x = torch.from_numpy(self._rng.uniform(*self.inputs, (amplitude.shape[0], count, 1)))
        return x.to(self.dtype), wave(x, amplitude, phase).to(self.dtype)

    def sample(self, tasks: int | None = None) -> TaskBatch:
        """The next batch: inputs and targets ``[T, shots, 1]`` and ``[T, queries, 1]``."""
        waves = self.draw(tasks)
        return TaskBatch(self.points(*waves, self.shots), self.points(*waves, self.queries))


def wave(x: Tensor, amplitude: Tensor, phase: Tensor) -> Tensor:
    """``amplitude * sin(x - phase)``, broadcast."""
    return amplitude * torch.sin(x - phase)


def grid(points: int = 200, inputs: tuple[float, float] = (-5.0, 5.0)) -> Tensor:
    """Evenly spaced inputs ``[points, 1]`` to draw a wave with."""
    return torch.from_numpy(np.linspace(*inputs, points, dtype=np.float64)).unsqueeze(1)
