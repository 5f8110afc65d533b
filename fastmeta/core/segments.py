"""Numbers of packed parameters that have one entry for all, one a tensor, or one an element, such as rates.

``segments`` holds the offsets at which each packed tensor begins, and P at its end: tensor s is ``[segments[s],
segments[s + 1])``. It is read only where the numbers have one entry a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spread(alpha: Tensor, segments: Tensor | None, P: int) -> Tensor:  # [] or [1] or [P]
    """Give every parameter its entry of ``alpha``: per tensor becomes per element."""
    if segments is not None and per_tensor(alpha, segments):
        return alpha[owner(segments, P, alpha.device)]
    return alpha


def collect(x: Tensor, y: Tensor, alpha: Tensor, segments: Tensor | None) -> Tensor:
    """Sum ``x * y`` over the tasks and over what shares an entry of ``alpha``: the transpose of :func:`spread`.

    Half precision is summed in float32, since d_alpha adds T * P terms of both signs.
    """
    wide = torch.float32 if alpha.dtype in (torch.bfloat16, torch.float16) else alpha.dtype
    product = x.to(wide) * y.to(wide)
    if segments is not None and per_tensor(alpha, segments):
        columns = product.sum(0)
        if columns.is_cuda and not torch.is_grad_enabled():  # index_add sums there in any order
            lengths = segments.diff().to(columns.device)
            return torch.segment_reduce(columns, "sum", lengths=lengths, unsafe=True).to(alpha.dtype)
        sums = columns.new_zeros(alpha.shape).index_add(0, owner(segments, columns.shape[0], alpha.device), columns)
    elif alpha.numel() == 1:
        sums = product.sum().reshape(alpha.shape)
    else:
        sums = product.sum(0)
    return sums.to(alpha.dtype)


def owner(segments: Tensor, P: int, device: torch.device) -> Tensor:  # int64 [P]
    """Number of the tensor to which each packed parameter belongs, a(p)."""
    lengths = segments.diff().to(device)
    numbers = torch.arange(lengths.shape[0], device=device)
    return torch.repeat_interleave(numbers, lengths, output_size=P)


def per_tensor(alpha: Tensor, segments: Tensor) -> bool:
    """Whether ``alpha`` has one entry a packed tensor."""
    return alpha.dim() == 1 and alpha.shape[0] == segments.shape[0] - 1
