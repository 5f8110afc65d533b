"""Labelled samples, grouped by class, as episodes are drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from fastmeta.tasks.sampler import Indices


class ClassPool:
    """Samples ``[M, ...]`` with one label each, sorted into C classes without copying the samples.

    Args:
        samples: a tensor or array ``[M, ...]``, kept in its own dtype (uint8 images stay uint8 until they are drawn),
            or a map-style ``Dataset`` whose items are read when they are drawn.
        labels: M labels of any type numpy can sort.

    Attributes:
        samples: the tensor ``[M, ...]`` or the ``Dataset``.
        classes: the C distinct labels, sorted.
        order: sample numbers sorted by class, ``[M]``.
        starts: where each class starts in ``order``, ``[C]``.
        counts: samples of each class, ``[C]``.

    Raises:
        TypeError: samples are neither a tensor, an array nor a ``Dataset``.
        ValueError: no samples, or another number of labels than of samples.
    """

    samples: Tensor | Dataset[Any]
    order: Indices
    starts: Indices
    counts: Indices

    def __init__(self, samples: Tensor | ArrayLike | Dataset[Any], labels: Tensor | ArrayLike) -> None:
        if isinstance(samples, (Tensor, Dataset)):
            self.samples = samples
        elif isinstance(samples, np.ndarray):
            self.samples = torch.from_numpy(np.ascontiguousarray(samples))
        else:
            raise TypeError(f"ClassPool: samples must be a tensor, an array or a Dataset, got {type(samples).__name__}")
        flat = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
        size = len(self.samples)  # type: ignore[arg-type]  # map-style datasets have a length
        if flat.ndim != 1 or len(flat) != size:
            raise ValueError(f"ClassPool: labels must be one a sample, [{size}], got shape {list(flat.shape)}")
        if size == 0:
            raise ValueError("ClassPool: samples must hold at least one sample, got none")
        self.classes, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
        self.order = np.argsort(inverse, kind="stable").astype(np.int64)
        self.counts = counts.astype(np.int64)
        self.starts = np.cumsum(self.counts) - self.counts

    @classmethod
    def from_dataset(
        cls, dataset: Dataset[Any], labels: Tensor | ArrayLike | None = None, *, in_memory: bool = True
    ) -> ClassPool:
        """Group a map-style ``Dataset`` of ``(sample, label)`` items.

        Args:
            dataset: items are ``(sample, label)``, the sample a tensor or an array.
            labels: all labels, where they are known; otherwise ``dataset.targets`` or ``dataset.labels`` is used, or
                every item is read once.
            in_memory: read every sample once into one tensor, which makes drawing fast. ``False`` reads samples as they
                are drawn, for data larger than memory.

        Raises:
            TypeError: the dataset has no length, or its items are not pairs of a tensor or array and a label.
            ValueError: samples of different shapes.
        """
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"ClassPool: dataset must have a length and an index, got {type(dataset).__name__}")
        if labels is None:
            labels = next((getattr(dataset, n) for n in ("targets", "labels") if hasattr(dataset, n)), None)
        if labels is not None and not in_memory:
            return cls(dataset, labels)
        samples, found = [], []
        for i in range(len(dataset)):
            sample, label = _item(dataset, i)
            samples += [sample] if in_memory else []
            found.append(int(label) if isinstance(label, Tensor) else label)
        return cls(_stack(samples) if in_memory else dataset, np.asarray(found) if labels is None else labels)

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        return f"ClassPool(classes={len(self)}, samples={int(self.counts.sum())}, smallest={int(self.counts.min())})"

    def select(self, classes: Sequence[int] | Indices) -> ClassPool:
        """The pool of some classes, named by position in ``classes``; samples are shared, not copied.

        Raises:
            ValueError: no class, a position out of range, or one named twice.
        """
        positions = np.asarray(classes, np.int64)
        if positions.size == 0 or positions.min() < 0 or positions.max() >= len(self):
            raise ValueError(f"ClassPool: classes must be positions in [0, {len(self)}), got {positions.tolist()}")
        if len(np.unique(positions)) != len(positions):
            raise ValueError("ClassPool: classes must be named once each, got repetitions")
        part = object.__new__(ClassPool)
        part.samples, part.order = self.samples, self.order
        part.classes, part.starts, part.counts = self.classes[positions], self.starts[positions], self.counts[positions]
        return part

    def to(self, device: torch.device | str) -> ClassPool:
        """The pool with its samples on ``device``; a ``Dataset`` stays where it is."""
        part = self.select(range(len(self)))
        if isinstance(self.samples, Tensor):
            part.samples = self.samples.to(device)
        return part

    def gather(self, index: Indices) -> Tensor:
        """Samples by number: ``[n, ...]``, a copy."""
        if isinstance(self.samples, Tensor):
            return self.samples.index_select(0, torch.from_numpy(index).to(self.samples.device))
        return _stack([_item(self.samples, int(i))[0] for i in index])


def _item(dataset: Dataset[Any], index: int) -> tuple[Tensor, Any]:
    item = dataset[index]
    if not isinstance(item, (tuple, list)) or len(item) < 2 or not isinstance(item[0], (Tensor, np.ndarray)):
        raise TypeError(
            f"ClassPool: items of the dataset must be (tensor or array, label), got {type(item).__name__} at {index}; "
            "turn images into tensors by the dataset's transform"
        )
    return torch.as_tensor(item[0]), item[1]


def _stack(samples: list[Tensor]) -> Tensor:
    shapes = {tuple(s.shape) for s in samples}
    if len(shapes) > 1:
        raise ValueError(f"ClassPool: samples must have one shape, got {sorted(shapes)[:3]}")
    if not samples:
        raise ValueError("ClassPool: samples must hold at least one sample, got none")
    return torch.stack(samples)
