"""Where each adapting parameter lies in a task's packed vector of P elements."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Order, shapes and offsets of parameters in a packed ``[T, P]`` buffer.

    One buffer a step makes the inner update, its adjoint and the Hessian-vector product's direction one call each,
    whatever the number of parameters.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Packing:
        """Pack ``parameters`` in their own order."""
        return cls(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Start of each parameter, and P at the end: ``[S + 1]``."""
        return tuple(accumulate(self.sizes, initial=0))

    @property
    def size(self) -> int:
        """P, the number of adapting elements."""
        return sum(self.sizes)

    def segments(self, device: torch.device) -> Tensor:
        """The offsets as an int64 tensor ``[S + 1]``, for rates given per parameter; not to be written."""
        return _segments(self.offsets, device)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate tensors ``[T, *shape]`` to ``[T, P]``."""
        return torch.cat([t.reshape(t.shape[0], -1) for t in tensors], dim=1)

    def pack_shared(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate tensors ``[*shape]`` to ``[P]``."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Views ``[T, *shape]`` of a packed ``[T, P]``."""
        rows = packed.shape[0]
        pieces = packed.split(self.sizes, dim=1)
        return [piece.view(rows, *shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def unpack_shared(self, packed: Tensor) -> list[Tensor]:
        """Views ``[*shape]`` of a packed ``[P]``."""
        return [piece.view(shape) for piece, shape in zip(packed.split(self.sizes), self.shapes, strict=True)]


@functools.lru_cache(maxsize=64)  # a copy to a GPU waits for it, and cannot be captured in a graph
def _segments(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int64, device=device)
