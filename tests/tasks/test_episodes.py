from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fastmeta.tasks import ClassPool, EpisodeSampler, SquareSymmetries, to_unit


def numbered_pool(counts: list[int]) -> ClassPool:
    """Samples ``[class, number within class]``, shuffled, with labels that are not 0 .. C-1."""
    rows = [(c, i) for c, n in enumerate(counts) for i in range(n)]
    order = np.random.default_rng(0).permutation(len(rows))
    samples = torch.tensor(rows, dtype=torch.float32)[torch.from_numpy(order)]
    return ClassPool(samples, samples[:, 0].to(torch.int64) * 10 + 5)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_episodes_are_well_formed(ways: int, shots: int, queries: int, tasks: int, seed: int) -> None:
    pool = numbered_pool([6, 7, 12, 6, 9])
    batch = EpisodeSampler(pool, ways=ways, shots=shots, queries=queries, tasks=tasks, seed=seed).sample()
    (xs, ys), (xq, yq) = batch.support, batch.query
    assert xs.shape == (tasks, ways * shots, 2)
    assert xq.shape == (tasks, ways * queries, 2)
    assert ys.dtype == yq.dtype == torch.int64
    assert ys.tolist() == [[w for w in range(ways) for _ in range(shots)]] * tasks
    assert yq.tolist() == [[w for w in range(ways) for _ in range(queries)]] * tasks
    for t in range(tasks):
        drawn = torch.cat([xs[t], xq[t]])
        labels = torch.cat([ys[t], yq[t]])
        assert len({tuple(row) for row in drawn.tolist()}) == ways * (shots + queries)  # no sample twice
        of_label = [set(drawn[labels == w, 0].tolist()) for w in range(ways)]
        assert all(len(classes) == 1 for classes in of_label)  # one class a label
        assert len(set.union(*of_label)) == ways  # and one label a class


def test_classes_and_samples_are_drawn_evenly() -> None:
    pool = numbered_pool([4, 8, 5])
    batch = EpisodeSampler(pool, ways=1, shots=1, queries=1, tasks=30_000, seed=2).sample()
    drawn = batch.support[0][:, 0]
    for c, count in enumerate([4, 8, 5]):
        of_class = drawn[drawn[:, 0] == c, 1].to(torch.int64)
        assert abs(len(of_class) / 30_000 - 1 / 3) < 0.01  # four standard deviations
        share = torch.bincount(of_class, minlength=count) / len(of_class)
        assert (share - 1 / count).abs().max() < 0.02  # four standard deviations of 10,000 draws at p = 1/4


def test_support_and_query_are_contiguous() -> None:
    batch = EpisodeSampler(numbered_pool([5, 5]), ways=2, shots=2, queries=3, tasks=3).sample()
    assert all(t.is_contiguous() for t in (*batch.support, *batch.query))


def test_a_resumed_stream_goes_on() -> None:
    def sampler(seed: int) -> EpisodeSampler:
        pool = ClassPool(torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 5)
        return EpisodeSampler(
            pool, ways=3, shots=1, queries=2, tasks=2, seed=seed, variants=SquareSymmetries(8), mix_variants=False
        )

    one, other = sampler(0), sampler(1)
    one.sample()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.sample().query[0], other.sample().query[0])


@pytest.mark.parametrize("mix", [True, False])
def test_variants_turn_each_class_its_own_way(mix: bool) -> None:
    images = torch.arange(3 * 4 * 9, dtype=torch.float32).view(12, 1, 3, 3)
    pool = ClassPool(images, torch.arange(12) // 4)
    sampler = EpisodeSampler(
        pool, ways=2, shots=1, queries=2, tasks=200, variants=SquareSymmetries(8), mix_variants=mix, seed=1
    )
    batch = sampler.sample()
    together = 0
    seen = set()
    for t in range(200):
        found = []  # (class, symmetry) of each drawn image
        for image in torch.cat([batch.support[0][t], batch.query[0][t]]):
            number = int(image.min()) // 9
            match = [v for v in range(8) if torch.equal(image[0], turned(images[number, 0], v))]
            found.append((number // 4, match[0]))
        labels = torch.cat([batch.support[1][t], batch.query[1][t]]).tolist()
        by_label = {w: {f for f, label in zip(found, labels, strict=True) if label == w} for w in (0, 1)}
        assert all(len(v) == 1 for v in by_label.values())
        (first,), (second,) = by_label.values()
        assert first != second
        together += first[0] == second[0]
        seen |= {first, second}
    assert len(seen) == 24
    assert (together > 0) == mix


def turned(image: Tensor, variant: int) -> Tensor:
    return torch.rot90(image.flip(-1) if variant >= 4 else image, variant % 4)


def test_bytes_are_drawn_as_fractions() -> None:
    pool = ClassPool(np.full((4, 2, 2), 51, np.uint8), [0, 0, 1, 1])
    batch = EpisodeSampler(pool, ways=2, shots=1, queries=1, tasks=1).sample()
    assert batch.support[0].dtype == torch.float32
    assert torch.all(batch.support[0] == torch.tensor(51.0) / 255)
    kept = EpisodeSampler(pool, ways=2, shots=1, queries=1, tasks=1, prepare=lambda x: x).sample()
    assert kept.support[0].dtype == torch.uint8
    assert to_unit(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


class Squares(Dataset):  # type: ignore[type-arg]
    """Items are read one by one; nothing but ``[]`` and ``len``."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.full((2,), float(i)), i % 3


def test_any_dataset_serves() -> None:
    labels = torch.arange(12) % 3
    in_memory = ClassPool.from_dataset(TensorDataset(torch.arange(12.0).unsqueeze(1).expand(12, 2), labels))
    listed = ClassPool.from_dataset(Squares())
    lazy_set = Squares()
    lazy = ClassPool.from_dataset(lazy_set, labels, in_memory=False)
    assert lazy_set.reads == 0
    pools = (in_memory, listed, lazy)
    batches = [EpisodeSampler(p, ways=2, shots=1, queries=2, tasks=3, seed=4).sample() for p in pools]
    assert lazy_set.reads == 18
    assert torch.equal(batches[0].query[0], batches[1].query[0])
    assert torch.equal(batches[0].query[0], batches[2].query[0])


def test_targets_of_a_dataset_are_used() -> None:
    data = Squares()
    data.targets = [0] * 6 + [1] * 6  # type: ignore[attr-defined]
    assert ClassPool.from_dataset(data).counts.tolist() == [6, 6]


def test_select_shares_samples() -> None:
    pool = numbered_pool([3, 4, 5])
    part = pool.select([2, 0])
    assert part.samples is pool.samples
    assert part.classes.tolist() == [25, 5]
    assert part.counts.tolist() == [5, 3]
    batch = EpisodeSampler(part, ways=2, shots=1, queries=2, tasks=20).sample()
    assert set(batch.support[0][..., 0].flatten().tolist()) == {0.0, 2.0}
    assert len(pool.to("cpu")) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ways": 0}, ValueError, "ways must be at least 1, got 0"),
        ({"shots": 0}, ValueError, "shots must be at least 1, got 0"),
        ({"queries": 0}, ValueError, "queries must be at least 1, got 0"),
        ({"tasks": 0}, ValueError, "tasks must be at least 1, got 0"),
        ({"ways": 4}, ValueError, "ways must be at most the 3 classes of the pool, got 4"),
        ({"queries": 3}, ValueError, r"shots \+ queries = 1 \+ 3 samples, got 3 in class 5"),
        ({"ways": 1.0}, TypeError, "ways must be an integer, got 1.0"),
    ],
)
def test_impossible_episodes_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EpisodeSampler(numbered_pool([3, 4, 5]), **{"ways": 2, "shots": 1, "queries": 1, "tasks": 1, **arguments})  # type: ignore[arg-type]


def test_bad_pools_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be one a sample, \[3\], got shape \[2\]"):
        ClassPool(torch.zeros(3, 1), [0, 1])
    with pytest.raises(ValueError, match="samples must hold at least one sample"):
        ClassPool(torch.zeros(0, 1), [])
    with pytest.raises(TypeError, match="samples must be a tensor, an array or a Dataset, got list"):
        ClassPool([1.0], [0])
    with pytest.raises(ValueError, match=r"classes must be positions in \[0, 2\)"):
        numbered_pool([2, 2]).select([2])
    with pytest.raises(ValueError, match="named once each"):
        numbered_pool([2, 2]).select([1, 1])
    with pytest.raises(TypeError, match="dataset must have a length"):
        ClassPool.from_dataset(iter([]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"items of the dataset must be \(tensor or array, label\), got int at 0"):
        ClassPool.from_dataset(torch.utils.data.Subset([1, 2], [0, 1]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples must have one shape"):
        ClassPool.from_dataset([(torch.zeros(i + 1), 0) for i in range(2)])  # type: ignore[arg-type]


def test_symmetries_need_squares() -> None:
    with pytest.raises(ValueError, match="count must be 4 or 8, got 2"):
        SquareSymmetries(2)
    with pytest.raises(ValueError, match=r"samples must be square images, got shape \[1, 2, 3\]"):
        SquareSymmetries()(torch.zeros(1, 1, 2, 3), torch.zeros(1, dtype=torch.int64))
