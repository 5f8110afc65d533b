"""scikit-learn's bundled handwritten digits (8x8, 1797 images, E. Alpaydin and C. Kaynak 1998) as a few-shot problem.

Ten classes are few to meta-learn from, so the training digits are multiplied by quarter turns, as in MAML's Omniglot:

* to train: 1, 2, 3, 5, 7, each turned by 0, 90, 180 and 270 degrees, which makes twenty classes;
* to validate: the same twenty classes, on images never trained on (one in five);
* to test: 0, 4, 6, 8, 9, upright. Training never saw these digits.

The split follows from the turns: 0 and 8 look the same upside down, which would make two classes of one, and 6 and 9
are each other upside down, so that one must not train while the other tests. All four are digits to test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastmeta.tasks.episodes import SquareSymmetries
from fastmeta.tasks.pool import ClassPool

TRAIN = (1, 2, 3, 5, 7)
TEST = (0, 4, 6, 8, 9)


@dataclass(frozen=True)
class Digits:
    """Pools of images float32 ``[1, 8, 8]`` in [0, 1], ink 1, and the turns that multiply the training digits."""

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
        variants=SquareSymmetries(4),
    )
