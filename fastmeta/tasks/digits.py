"""scikit-learn's bundled handwritten digits (8x8, 1797 images, E. Alpaydin and C. Kaynak 1998) as a few-shot problem.

Ten classes are few to meta-learn from, so the training digits are multiplied by the eight symmetries of the square:

* to train: digits 0, 1, 2, 3, 4, 7, each turned and mirrored; a task draws distinct digits and a symmetry for each of
  them (two symmetries of one digit never meet in a task, for a 0, 1 or 3 may look the same turned or mirrored);
* to validate: the same digits and symmetries, on images never trained on (one in five);
* to test: digits 5, 6, 8, 9, which training never saw, upright. 6 and 9 are on one side of the split because each is
  the other upside down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastmeta.tasks.episodes import SquareSymmetries
from fastmeta.tasks.pool import ClassPool

TRAIN = (0, 1, 2, 3, 4, 7)
TEST = (5, 6, 8, 9)


@dataclass(frozen=True)
class Digits:
    """Pools of images float32 ``[1, 8, 8]`` in [0, 1], ink 1, and the symmetries that multiply the training digits."""

    train: ClassPool
    validation: ClassPool
    test: ClassPool
    variants: SquareSymmetries


def load_digits_pools(*, seed: int = 0) -> Digits:
    """Split the bundled digits as described above; ``seed`` says which images validate.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError("digits: scikit-learn must be installed for its images; pip install scikit-learn") from error
    bundle = load_digits()
    images = torch.from_numpy(bundle.images).to(torch.float32).div_(16).unsqueeze(1)  # [1797, 1, 8, 8]
    labels = bundle.target
    held_out = np.random.Generator(np.random.PCG64(seed)).random(len(labels)) < 0.2
    seen = np.isin(labels, TRAIN)

    def pool(rows: np.ndarray) -> ClassPool:
        return ClassPool(images[torch.from_numpy(rows)], labels[rows])

    return Digits(
        train=pool(seen & ~held_out),
        validation=pool(seen & held_out),
        test=pool(np.isin(labels, TEST)),
        variants=SquareSymmetries(8),
    )
