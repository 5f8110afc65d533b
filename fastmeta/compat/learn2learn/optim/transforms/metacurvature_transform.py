"""Meta-Curvature: a matrix for each axis of a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.core.checks import fail


class MetaCurvatureTransform(nn.Module):
    """The update ``lr * M_in G M_out`` of a gradient G (E. Park, J. Oliva, Meta-Curvature, NeurIPS 2019).

    For a bias it is ``lr * M * G``, element by element; for a convolution's gradient ``[i, o, h, w]``, seen as
    ``[i, o, f]``, the product with a matrix along each axis,
    ``U[i', o', f'] = lr * sum_iof M_in[i', i] M_f[f', f] G[i, o, f] M_out[o, o']``. All start from the identity, in the
    parameter's dtype and on its device.

    Args:
        param: the parameter whose gradients are transformed.
        lr: a fixed factor.

    Raises:
        NotImplementedError: the parameter has another number of axes than 1, 2 or 4.
    """

    def __init__(self, param: Tensor, lr: float = 1.0) -> None:
        super().__init__()
        self.lr = lr
        self.dim = param.dim()
        if self.dim not in (1, 2, 4):
            mend = "leave it out by a TransformDictionary"
            fail(NotImplementedError, "MetaCurvatureTransform", "param", "of 1, 2 or 4 axes", list(param.shape), mend)

        def identity(n: int) -> nn.Parameter:
            return nn.Parameter(torch.eye(n, dtype=param.dtype, device=param.device))

        if self.dim == 1:
            self.mc = nn.Parameter(torch.ones_like(param))
        else:
            self.mc_in, self.mc_out = identity(param.shape[0]), identity(param.shape[1])
        if self.dim == 4:
            self.mc_f = identity(param.shape[2] * param.shape[3])

    def forward(self, grad: Tensor) -> Tensor:
        """The update for a gradient, in its shape."""
        if self.dim == 1:
            return self.lr * (self.mc * grad)
        if self.dim == 2:
            return self.lr * (self.mc_in @ grad @ self.mc_out)
        out = grad.flatten(2).permute(2, 0, 1) @ self.mc_out  # [f, i, o]
        out = torch.tensordot(self.mc_f, out, ([1], [0]))  # [f, i, o]
        out = torch.tensordot(self.mc_in, out, ([1], [1]))  # [i, f, o]
        return self.lr * out.mT.reshape(grad.shape)
