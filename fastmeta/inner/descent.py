"""A step down along something: eq. (3) and its adjoint, eq. (5) and (7), on packed parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmeta.core.packing import Packing
from fastmeta.ops.inner_update import op as inner_update

# Up to here gradients are packed first, which costs a copy and saves calls; beyond, each is used where it lies.
PACKED_ELEMENTS = 1 << 18


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

    def step(self, phi: Tensor, g: Sequence[Tensor], k: int) -> Tensor:
        """Eq. (3) on packed ``phi`` ``[T, P]`` and what each parameter has for ``s_k`` ``[T, *shape]``: ``[T, P]``."""
        alpha = self.rate(k)
        if phi.is_cuda and inner_update.takes_parts(phi):
            parts = [d.reshape(phi.shape[0], -1) for d in g]
            return inner_update.step_parts(phi, parts, alpha, self.segments, out=phi.new_empty(phi.shape))
        if phi.numel() <= PACKED_ELEMENTS:
            return inner_update.step(phi, self._packing.pack(g), alpha, self.segments)
        result = phi.new_empty(phi.shape)
        offsets = self._packing.offsets
        for i, (d, start, stop) in enumerate(zip(g, offsets[:-1], offsets[1:], strict=True)):
            rate = alpha if alpha.numel() == 1 else alpha[start:stop]
            if self.segments is not None:
                rate = alpha[i : i + 1]
            part = slice(start, stop)
            inner_update.step(phi[:, part], d.reshape(phi.shape[0], -1), rate, out=result[:, part])
        return result

    def subtract_(self, packed: Tensor, parts: Sequence[Tensor]) -> None:
        """Subtract what each parameter has, ``[T, *shape]``, from ``packed`` ``[T, P]``."""
        if packed.is_cuda and inner_update.takes_parts(packed):
            inner_update.step_parts(packed, [d.reshape(packed.shape[0], -1) for d in parts], out=packed)
            return
        for place, d in zip(self._packing.unpack(packed), parts, strict=True):
            place.sub_(d)

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
