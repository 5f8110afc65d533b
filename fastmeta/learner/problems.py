"""A problem ready to train: its network, its loss, and its streams of tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.core import checks, environment
from fastmeta.learner.config import TrainConfig
from fastmeta.learner.models import conv_net, modulated_conv_net, sinusoid_mlp
from fastmeta.tasks import ClassPool, EpisodeSampler, Sinusoid, SquareSymmetries, TaskSampler
from fastmeta.tasks.download import Progress

STREAMS = {"train": 0, "validation": 1, "test": 2}  # what keeps the task streams of one seed apart


class Samplers(Protocol):
    """Makes task streams; every call starts one anew."""

    def __call__(self, stream: str, tasks: int, seed: int | None = None) -> TaskSampler:
        """The stream ``"train"``, ``"validation"`` or ``"test"``.

        Args:
            stream: which one.
            tasks: tasks of a batch.
            seed: another seed than the settings'; the class split stays.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """What a :class:`~fastmeta.learner.training.Trainer` works on.

    Attributes:
        model: the network on the settings' device, freshly initialised by their seed.
        loss: ``loss(outputs, targets)``, a mean over samples.
        metric: ``"accuracy"`` (larger is better) or ``"mse"`` (smaller is better).
        sampler: makes its task streams.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: str
    sampler: Samplers


def build(config: TrainConfig, *, progress: Progress | None = None) -> Problem:
    """Load the data and make the network of a problem.

    Args:
        config: the settings.
        progress: told of a download's progress.

    Raises:
        ValueError: data that are damaged or do not suffice for the settings, or no such device.
        FileNotFoundError: no data at ``config.data``.
    """
    device = _device(config.device)
    if config.problem == "sinusoid":
        more = config.context if config.algorithm == "cavia" else 0  # inputs that the context is appended as
        problem = Problem(_seeded(config, lambda: sinusoid_mlp(more)), F.mse_loss, "mse", _sinusoids(config))
    else:
        problem = _digits(config) if config.problem == "digits" else _omniglot(config, progress)
    problem.model.to(device)
    return problem


def _device(name: str) -> torch.device:
    """A device that is there."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        reason = environment.gpu()["reason"] or f"there are {torch.cuda.device_count()} GPUs"
        checks.fail(ValueError, "train", "device", f"one that is there ({reason})", repr(name), "use --device cpu")
    return device


def _sinusoids(config: TrainConfig) -> Samplers:
    def sampler(stream: str, tasks: int, seed: int | None = None) -> TaskSampler:
        # many points judge a task outside training: the figure is the error of the curve, not of a few points
        queries = config.queries if stream == "train" else 100
        return Sinusoid(tasks, config.shots, queries, seed=_stream_seed(config, stream, seed))

    return sampler


def _digits(config: TrainConfig) -> Problem:
    from fastmeta.tasks.digits import load_digits_pools

    digits = load_digits_pools(seed=config.seed)
    pools = {"train": digits.train, "validation": digits.validation, "test": digits.test}
    model = _seeded(config, lambda: _image_network(config, 8, blocks=3))
    return Problem(
        model, F.cross_entropy, "accuracy", _episodes(config, pools, {"train", "validation"}, digits.variants)
    )


def _omniglot(config: TrainConfig, progress: Progress | None) -> Problem:
    from fastmeta.tasks.omniglot import load_omniglot

    train, validation, test = load_omniglot(config.data, progress=progress).split(seed=config.seed)
    pools = {"train": train, "validation": validation, "test": test}
    model = _seeded(config, lambda: _image_network(config, 28, blocks=4))
    return Problem(model, F.cross_entropy, "accuracy", _episodes(config, pools, {"train"}, SquareSymmetries(4)))


def _image_network(config: TrainConfig, size: int, blocks: int) -> nn.Module:
    if config.algorithm == "cavia":
        return modulated_conv_net(1, config.ways, config.filters, size, blocks=blocks, context=config.context)
    return conv_net(1, config.ways, config.filters, size, blocks=blocks)


def _episodes(
    config: TrainConfig, pools: dict[str, ClassPool], turned: set[str], variants: SquareSymmetries
) -> Samplers:
    def sampler(stream: str, tasks: int, seed: int | None = None) -> TaskSampler:
        checks.one_of("train", "stream", stream, STREAMS)
        return EpisodeSampler(
            pools[stream],
            ways=config.ways,
            shots=config.shots,
            queries=config.queries,
            tasks=tasks,
            seed=_stream_seed(config, stream, seed),
            variants=variants if stream in turned else None,
        )

    for stream in STREAMS:  # settings that no pool can meet show before training starts
        sampler(stream, 1)
    return sampler


def _stream_seed(config: TrainConfig, stream: str, seed: int | None) -> int:
    return (config.seed if seed is None else seed) * len(STREAMS) + STREAMS[stream]


def _seeded(config: TrainConfig, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make()
