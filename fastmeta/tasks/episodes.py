"""Few-shot episodes: N-way K-shot classification tasks, a meta-batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastmeta.core import checks
from fastmeta.tasks.batch import TaskBatch
from fastmeta.tasks.pool import ClassPool
from fastmeta.tasks.sampler import TaskSampler, count, draw_distinct


class Variants(Protocol):
    """A family of changes to a sample, each of which makes a class of its own out of a class."""

    count: int

    def __call__(self, samples: Tensor, variant: Tensor) -> Tensor:
        """Apply change ``variant[i]``, below ``count``, to ``samples[i]``; may write into ``samples``."""
        ...


class SquareSymmetries:
    """Quarter turns and mirror images of square images ``[n, ..., S, S]``.

    Args:
        count: 4 for the turns by 0, 90, 180 and 270 degrees, 8 to mirror each of them too.
    """

    def __init__(self, count: int = 4) -> None:
        if count not in (4, 8):
            raise ValueError(f"SquareSymmetries: count must be 4 or 8, got {count}")
        self.count = count

    def __call__(self, samples: Tensor, variant: Tensor) -> Tensor:
        """Turn ``samples[i]`` by ``variant[i] % 4`` quarters, after mirroring it where ``variant[i] >= 4``."""
        if samples.dim() < 3 or samples.shape[-1] != samples.shape[-2]:
            raise ValueError(f"SquareSymmetries: samples must be square images, got shape {list(samples.shape[1:])}")
        for v in range(1, self.count):
            rows = (variant == v).nonzero().squeeze(1)
            if len(rows):
                image = samples[rows]
                samples[rows] = torch.rot90(image.flip(-1) if v >= 4 else image, v % 4, (-2, -1))
        return samples


def to_unit(samples: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]; other samples as they are."""
    return samples.to(torch.float32).div_(255) if samples.dtype == torch.uint8 else samples


class EpisodeSampler(TaskSampler):
    """N-way K-shot tasks from a pool of classes.

    Every task draws ``ways`` distinct classes and, of each, ``shots`` support and ``queries`` query samples, all
    distinct. Labels are 0 .. ways-1 in the order the classes were drawn, which is random. A whole batch is index
    arithmetic and one gather, with no loop over tasks; samples are converted after they are drawn.

    Args:
        pool: labelled samples.
        ways: classes of a task, N.
        shots: support samples of a class, K.
        queries: query samples of a class.
        tasks: tasks of a batch, T.
        seed: seed of the stream.
        variants: changes that make several classes of one, e.g. ``SquareSymmetries()``.
        mix_variants: whether two variants of one class may meet in a task. With ``False`` a task draws ``ways``
            distinct classes first and then one variant for each, which suits classes that look alike when turned.
        prepare: applied to the drawn samples ``[n, ...]``; bytes become float32 in [0, 1] where left out.

    Raises:
        ValueError: a count below 1, fewer classes than ``ways``, or a class with fewer samples than
            ``shots + queries``.
    """

    def __init__(
        self,
        pool: ClassPool,
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        variants: Variants | None = None,
        mix_variants: bool = True,
        prepare: Callable[[Tensor], Tensor] = to_unit,
    ) -> None:
        super().__init__(tasks, seed)
        self.pool = pool
        self.ways = count("EpisodeSampler", "ways", ways)
        self.shots = count("EpisodeSampler", "shots", shots)
        self.queries = count("EpisodeSampler", "queries", queries)
        self.variants = variants
        self.mix_variants = mix_variants
        self.prepare = prepare
        choices = len(pool) * (variants.count if variants is not None and mix_variants else 1)
        if choices < self.ways:
            checks.fail(ValueError, "EpisodeSampler", "ways", f"at most the {choices} classes of the pool", self.ways)
        smallest = int(pool.counts.argmin())
        if pool.counts[smallest] < self.shots + self.queries:
            raise ValueError(
                f"EpisodeSampler: every class must have shots + queries = {self.shots} + {self.queries} samples, got "
                f"{pool.counts[smallest]} in class {pool.classes[smallest]}; ask for fewer or leave out small classes "
                "with pool.select"
            )

    def sample(self, tasks: int | None = None) -> TaskBatch:
        """The next batch.

        Returns:
            support ``([T, N K, ...], [T, N K])`` and query ``([T, N Q, ...], [T, N Q])``, sorted by label; labels are
            int64.
        """
        size, ways, shots = self._batch_size(tasks), self.ways, self.shots
        classes, variant = self._draw_classes(size)  # [T, N] each
        rows = classes.reshape(-1)
        within = draw_distinct(self._rng, len(rows), self.pool.counts[rows], shots + self.queries)
        index = self.pool.order[self.pool.starts[rows][:, None] + within]  # [T N, K + Q]
        samples = self.pool.gather(np.concatenate([index[:, :shots].ravel(), index[:, shots:].ravel()]))
        if self.variants is not None:
            each = variant.reshape(-1)
            chosen = np.concatenate([each.repeat(shots), each.repeat(self.queries)])
            samples = self.variants(samples, torch.from_numpy(chosen).to(samples.device))
        samples = self.prepare(samples)
        cut = size * ways * shots
        return TaskBatch(
            support=self._part(samples[:cut], size, shots), query=self._part(samples[cut:], size, self.queries)
        )

    def _draw_classes(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        forms = 1 if self.variants is None else self.variants.count
        if self.mix_variants:
            drawn = draw_distinct(self._rng, size, len(self.pool) * forms, self.ways)
            return drawn // forms, drawn % forms
        classes = draw_distinct(self._rng, size, len(self.pool), self.ways)
        return classes, self._rng.integers(forms, size=classes.shape)

    def _part(self, samples: Tensor, size: int, each: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(self.ways, device=samples.device).repeat_interleave(each).repeat(size, 1)
        return samples.unflatten(0, (size, self.ways * each)), labels
