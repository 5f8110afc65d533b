"""A step down along something: eq. (3) and its adjoint, eq. (5) and (7), on packed parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmeta.core.packing import Packing
from fastmeta.ops.inner_update import op as inner_update

# Up to here gradients are packed first, which costs a copy and saves calls; beyond, each is used where it lies.
PACKED_ELEMENTS = 1 << 18
# The same on a GPU, for each parameter: a launch takes about as long as copying so many (1.2 us, 3 TB/s).
GPU_PACKED_ELEMENTS = 1 << 19


class Descent:
    """One meta-step's steps ``phi_{k+1} = phi_k - alpha_k * s_k``, and their adjoint.

    Args:
        alpha: ``[1 or K, 1 or S or P]``, of :meth:`Rates.alpha`.
        segments: ``[S + 1]`` where there is one rate a parameter.
        packing: where each parameter lies.

    Attributes:
        segments: as given.
    """

    def __init__(self, alpha: Tensor, segments: Tensor | None, packing: Packing) -> None:
        self._packing = packing
        self._alpha = list(alpha.unbind(0))
        self.segments = segments

    def rate(self, k: int) -> Tensor:
        """The rates of step ``k``."""
        return self._alpha[k if len(self._alpha) > 1 else 0]

    def packs(self, phi: Tensor) -> bool:
        """Whether gradients beside ``phi`` ``[T, P]`` are best packed first."""
        if phi.is_cuda:
            return phi.numel() <= GPU_PACKED_ELEMENTS * len(self._packing.names)
        return phi.numel() <= PACKED_ELEMENTS

    def step(self, phi: Tensor, g: Sequence[Tensor], k: int) -> Tensor:
        """Eq. (3) on packed ``phi`` ``[T, P]`` and what each parameter has for ``s_k`` ``[T, *shape]``: ``[T, P]``."""
        tasks, elements = phi.shape
        if self.packs(phi):
            return inner_update.step(phi, self._packing.pack(g), self.rate(k), self.segments)
        alpha = self.rate(k)
        result = phi.new_empty(tasks, elements)
        offsets = self._packing.offsets
        for i, (d, start, stop) in enumerate(zip(g, offsets[:-1], offsets[1:], strict=True)):
            rate = alpha if alpha.numel() == 1 else alpha[start:stop]
            if self.segments is not None:
                rate = alpha[i : i + 1]
            part = slice(start, stop)
            inner_update.step(phi[:, part], d.reshape(tasks, -1), rate, out=result[:, part])
        return result

    def packed_step(self, phi: Tensor, s: Tensor, k: int) -> Tensor:
        """Eq. (3) on packed ``phi`` and ``s_k``, ``[T, P]``."""
        return inner_update.step(phi, s, self.rate(k), self.segments)

    def adjoint(self, lam: Tensor, s: Tensor | None, k: int) -> tuple[Tensor, Tensor | None]:
        """Eq. (5) and (7): ``u = alpha * lam`` and ``d_alpha = -sum_t s_k * lam``.

        Args:
            lam: cotangent of ``phi_{k+1}``, ``[T, P]``.
            s: what the step went along, ``[T, P]``, where ``d_alpha`` is wanted.
            k: the step.

        Returns:
            ``u`` ``[T, P]`` and ``d_alpha`` in alpha's shape, summed over tasks, or ``None``.
        """
        if s is None:
            return inner_update.adjoint(lam, lam, self.rate(k), self.segments, need_alpha=False)
        return inner_update.adjoint(lam, s, self.rate(k), self.segments, need_alpha=True)
