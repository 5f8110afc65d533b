from __future__ import annotations

import torch

from fastmeta.tasks import EpisodeSampler, load_digits_pools
from fastmeta.tasks.digits import TEST, TRAIN


def test_training_never_sees_a_test_digit_or_a_validation_image() -> None:
    digits = load_digits_pools()
    assert tuple(digits.train.classes) == tuple(digits.validation.classes) == TRAIN
    assert tuple(digits.test.classes) == TEST
    assert not set(TRAIN) & set(TEST)
    total = sum(int(pool.counts.sum()) for pool in (digits.train, digits.validation, digits.test))
    assert total == 1797
    rows = [
        {bytes(image.numpy().tobytes()) for image in pool.samples}  # type: ignore[union-attr]
        for pool in (digits.train, digits.validation)
    ]
    assert not rows[0] & rows[1]


def test_images_are_fractions_of_ink() -> None:
    digits = load_digits_pools()
    batch = EpisodeSampler(digits.test, ways=5, shots=1, queries=5, tasks=2).sample()
    assert batch.query[0].shape == (2, 25, 1, 8, 8)
    assert batch.query[0].dtype == torch.float32
    assert batch.query[0].min() == 0
    assert 0.9 < batch.query[0].max() <= 1
