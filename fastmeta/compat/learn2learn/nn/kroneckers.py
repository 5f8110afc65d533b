"""A linear map whose matrix is a Kronecker product."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KroneckerLinear(nn.Module):
    """``Y = L X R + b`` on matrices ``[..., n, m]``, which is ``vec(Y) = (R^T kron L) vec(X) + vec(b)``.

    ``vec`` lays columns one after another. n^2 + m^2 weights stand for a matrix of (n m)^2. It starts from the
    identity, with b zero. Sources: C. Jose, M. Cisse, F. Fleuret, Kronecker Recurrent Units, 2018; S. Arnold, S. Iqbal,
    F. Sha, 2019.

    Args:
        n: size of the left factor L.
        m: size of the right factor R.
        bias: whether there is a b ``[n, m]``.
        psd: take ``L^T L`` and ``R^T R`` as factors, so that the matrix is positive semi-definite.
        device: where it computes; inputs are moved there, and results back.
    """

    def __init__(
        self, n: int, m: int, bias: bool = True, psd: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.eye(n, device=device))
        self.right = nn.Parameter(torch.eye(m, device=device))
        self.bias = nn.Parameter(torch.zeros(n, m, device=device)) if bias else None
        self.psd = psd
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        """The map of ``[..., n, m]``, or of a vector ``[n m]`` of columns one after another.

        Raises:
            ValueError: another shape.
        """
        n, m = self.left.shape[0], self.right.shape[0]
        vector = x.dim() == 1
        if (vector and x.shape[0] != n * m) or (not vector and tuple(x.shape[-2:]) != (n, m)):
            raise ValueError(f"KroneckerLinear: x must be of shape [..., {n}, {m}] or [{n * m}], got {list(x.shape)}")
        left: Tensor = self.left
        right: Tensor = self.right
        if self.psd:
            left, right = left.t() @ left, right.t() @ right
        inputs = x if self.device is None else x.to(self.device)
        y = left @ (inputs.reshape(m, n).t() if vector else inputs) @ right
        if self.bias is not None:
            y = y + self.bias
        return (y.t().flatten() if vector else y).to(x.device)
