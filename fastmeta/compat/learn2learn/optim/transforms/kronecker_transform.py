"""A transform by a Kronecker-factored linear map."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastmeta.compat.learn2learn.optim.transforms.module_transform import ReshapedTransform
from fastmeta.core.checks import fail


class KroneckerTransform:
    """Makes of a parameter a Kronecker-factored module (S. Arnold, S. Iqbal, F. Sha, 2019).

    Gradients reach it as ``[-1, n, m]``: a weight ``[n, m]`` and a bias ``[n]``, for which m is 1, as one matrix; a
    convolution's weight ``[out, n, h, w]`` as ``out`` matrices with ``m = h w``.

    Args:
        kronecker_cls: makes the module of the keywords ``n``, ``m``, ``bias`` and ``psd``, such as
            ``l2l.nn.KroneckerLinear``.
        bias: handed on.
        psd: handed on.
    """

    def __init__(self, kronecker_cls: Callable[..., nn.Module], bias: bool = False, psd: bool = True) -> None:
        self.kronecker_cls = kronecker_cls
        self.bias = bias
        self.psd = psd

    def __call__(self, param: Tensor) -> ReshapedTransform:
        """The transform for a parameter.

        Raises:
            NotImplementedError: the parameter has another number of axes than 1, 2 or 4.
        """
        shape = tuple(param.shape)
        sizes = {1: (*shape, 1), 2: shape, 4: (shape[1], shape[2] * shape[3]) if len(shape) == 4 else ()}
        if len(shape) not in sizes:
            mend = "leave it out by a TransformDictionary"
            fail(NotImplementedError, "KroneckerTransform", "param", "of 1, 2 or 4 axes", list(shape), mend)
        n, m = sizes[len(shape)]
        made = self.kronecker_cls(n=n, m=m, bias=self.bias, psd=self.psd)
        return ReshapedTransform(transform=made, shape=(-1, n, m))
