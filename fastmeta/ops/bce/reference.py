"""Binary cross-entropy on logits, per element.

With logits ``z``, targets ``y``, weights ``w`` and positive weights ``q``::

    l = w ((1 - y) z + (1 + (q - 1) y) softplus(-z))

``l`` is linear in ``y``; the derivatives below are all there are up to second order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def loss(z: Tensor, y: Tensor, w: Tensor | None, q: Tensor | None) -> Tensor:
    """``l``."""
    return _times(w, torch.addcmul(z, y, z, value=-1).addcmul(_positive(y, q), F.softplus(-z)))


def by_logit(z: Tensor, y: Tensor, w: Tensor | None, q: Tensor | None) -> Tensor:
    """``dl/dz = w (1 - y - (1 + (q - 1) y) sigmoid(-z))``."""
    return _times(w, 1 - y - _positive(y, q) * torch.sigmoid(-z))


def by_target(z: Tensor, w: Tensor | None, q: Tensor | None) -> Tensor:
    """``dl/dy = w (-z + (q - 1) softplus(-z))``."""
    return _times(w, -z if q is None else (q - 1) * F.softplus(-z) - z)


def by_logit_twice(z: Tensor, y: Tensor, w: Tensor | None, q: Tensor | None) -> Tensor:
    """``d2l/dz2 = w (1 + (q - 1) y) sigmoid(z) sigmoid(-z)``."""
    p = torch.sigmoid(z)
    return _times(w, _positive(y, q) * p * (1 - p))


def by_logit_and_target(z: Tensor, w: Tensor | None, q: Tensor | None) -> Tensor:
    """``d2l/dz dy = w (-1 - (q - 1) sigmoid(-z))``."""
    return _times(w, -torch.ones_like(z) if q is None else -1 - (q - 1) * torch.sigmoid(-z))


def _positive(y: Tensor, q: Tensor | None) -> Tensor:
    return torch.ones_like(y) if q is None else 1 + (q - 1) * y


def _times(w: Tensor | None, value: Tensor) -> Tensor:
    return value if w is None else w * value
