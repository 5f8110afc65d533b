"""What is fixed about a block: sizes of one task's images, windows, and which of its parts there are."""

from __future__ import annotations

import math
from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Equal windows over an image: of a convolution's kernel or of a pooling."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)

    @property
    def taps(self) -> int:
        """Positions of one window."""
        return self.kernel[0] * self.kernel[1]


NO_POOL = Window((1, 1))
SHALLOW_PATCH = 32  # elements that one step of a matrix product takes
SHALLOW_WINDOW = 4  # positions of a pooling's window, for each of which a product is computed


@dataclass(frozen=True)
class Geometry:
    """One task's block ``y = pool(act(norm(x * W + b)))``.

    Attributes:
        images: N.
        channels: I, of the input.
        size: height and width of the input.
        out: O, channels of the result.
        convolution: the convolution's windows.
        conv_size: height and width of the convolution's result ``z``.
        pool: the pooling's windows; :data:`NO_POOL` where there is none.
        pool_size: height and width of the block's result.
        normalised: whether the batch's own statistics normalise.
        eps, momentum: of the normalisation.
        activation: ``"identity"``, ``"relu"`` or ``"leaky_relu"``.
        slope: of the activation below zero.
    """

    images: int
    channels: int
    size: Pair
    out: int
    convolution: Window
    conv_size: Pair
    pool: Window = NO_POOL
    pool_size: Pair = (0, 0)
    normalised: bool = False
    eps: float = 0.0
    momentum: float = 0.0
    activation: str = "identity"
    slope: float = 1.0

    @property
    def positions(self) -> int:
        """Positions of ``z`` over all images of a task."""
        return self.images * math.prod(self.conv_size)

    @property
    def windows(self) -> int:
        """Positions of the result over all images of a task."""
        return self.images * math.prod(self.pool_size)

    @property
    def pooled(self) -> bool:
        """Whether there is a pooling."""
        return self.pool != NO_POOL

    @property
    def shallow(self) -> bool:
        """Whether ``z`` is quicker computed anew from the input than read."""
        return self.normalised and self.patch <= SHALLOW_PATCH and self.pool.taps <= SHALLOW_WINDOW

    @property
    def plain(self) -> bool:
        """Whether nothing follows the convolution."""
        return not self.normalised and self.activation == "identity" and not self.pooled

    @property
    def patch(self) -> int:
        """Elements of the input that one element of ``z`` depends on."""
        return self.convolution.taps * self.channels

    @property
    def flops(self) -> int:
        """Operations of the convolution for one task."""
        return 2 * self.positions * self.patch * self.out

    @property
    def largest(self) -> int:
        """Elements of one task's largest tensor."""
        inputs = self.images * math.prod(self.size) * self.channels
        return max(inputs, self.positions * self.out, self.windows * self.out, self.patch * self.out)
