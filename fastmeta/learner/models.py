"""The networks of the MAML paper (Finn, Abbeel, Levine 2017, section 5): small ones, ready to meta-train; CAVIA's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from fastmeta.core import checks


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of the given widths with ``activation`` between them.

    Args:
        sizes: widths from input to output, at least two, e.g. ``(784, 256, 64, 5)``.
        activation: makes one activation module.

    Returns:
        a module from ``[..., sizes[0]]`` to ``[..., sizes[-1]]``.
    """
    if len(sizes) < 2 or any(not isinstance(s, int) or s < 1 for s in sizes):
        checks.fail(ValueError, "mlp", "sizes", "at least two positive widths", tuple(sizes))
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def sinusoid_mlp(more: int = 0) -> nn.Sequential:
    """The paper's regression network: 1-40-40-1 with ReLU, or with so many ``more`` inputs than one."""
    return mlp((1 + more, 40, 40, 1))


def conv_net(
    in_channels: int = 1,
    ways: int = 5,
    filters: int = 64,
    image_size: int = 28,
    *,
    blocks: int = 4,
    pool: str = "max",
) -> nn.Sequential:
    """``blocks`` times 3x3 convolution, batch norm, ReLU and a halving of the image; then one linear layer.

    Batch norm always uses the statistics of the batch it is given (``track_running_stats=False``), in training as in
    evaluation, as the paper does: predictions are transductive, a query image is judged together with the others of its
    task. The convolutions have no bias, which batch norm would cancel.

    Args:
        in_channels: channels of an image.
        ways: classes, the width of the output.
        filters: channels of every block.
        image_size: height and width of an image.
        blocks: how often the image is halved.
        pool: ``"max"`` halves by max pooling 2x2 (odd rows and columns are dropped); ``"stride"`` by convolutions of
            stride 2, the paper's choice for Omniglot (odd sizes are rounded up).

    Returns:
        a module from ``[N, in_channels, image_size, image_size]`` to ``[N, ways]``.

    Raises:
        ValueError: a count below 1, an unknown ``pool``, or images too small to be halved that often.
    """
    for name, value in (("in_channels", in_channels), ("ways", ways), ("filters", filters), ("blocks", blocks)):
        checks.at_least("conv_net", name, value, 1)
    checks.one_of("conv_net", "pool", pool, ("max", "stride"))
    layers: list[nn.Module] = []
    size = image_size
    for i in range(blocks):
        stride = 2 if pool == "stride" else 1
        layers += [
            nn.Conv2d(filters if i else in_channels, filters, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
        ]
        layers += [nn.MaxPool2d(2)] if pool == "max" else []
        size = size // 2 if pool == "max" else (size + 1) // 2
    if size < 1:
        checks.fail(ValueError, "conv_net", "image_size", f"at least {2**blocks} for {blocks} blocks", image_size)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * size * size, ways))


def conv4(
    in_channels: int = 1, ways: int = 5, filters: int = 64, image_size: int = 28, *, pool: str = "max"
) -> nn.Sequential:
    """The four-block network of few-shot image classification; see :func:`conv_net`."""
    return conv_net(in_channels, ways, filters, image_size, blocks=4, pool=pool)


class Modulated(nn.Module):
    """A network that reads a context: the channels of one place are scaled and shifted by functions of it (FiLM).

    ``h[n, c] -> h[n, c] * (1 + scale[c]) + shift[c]``, ``(scale, shift) = W context + b``. It starts from ``b = 0``, so
    that the network for a context of zeros is the one without.

    Args:
        model: layers in a row; ``[N, channels, ...]`` is what the first ``place`` of them give.
        place: number of layers before the scaling.
        channels: channels there.
        context: number of context parameters.

    Source: E. Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.
    """

    def __init__(self, model: nn.Sequential, place: int, channels: int, context: int) -> None:
        super().__init__()
        self.before, self.after = model[:place], model[place:]
        self.film = nn.Linear(context, 2 * channels)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Outputs for inputs of one task, under its context ``[context]``."""
        h = self.before(x)
        scale, shift = self.film(context).reshape(2, -1, *[1] * (h.dim() - 2))
        return self.after(h * (1 + scale) + shift)


def read_context(model: nn.Module, context: Tensor, *inputs: Tensor) -> Tensor:
    """How :class:`fastmeta.CAVIA` calls a :class:`Modulated` network, as its ``condition=``."""
    outputs: Tensor = model(*inputs, context)
    return outputs


def modulated_conv_net(
    in_channels: int = 1, ways: int = 5, filters: int = 64, image_size: int = 28, *, blocks: int = 4, context: int = 100
) -> Modulated:
    """:func:`conv_net` for :class:`fastmeta.CAVIA`: a context reaches the last block but one, behind its batch norm.

    That is the third of four, as in the paper (L. Zintgraf et al., ICML 2019, section 4.3). What lies before it is the
    same for all contexts, and computed once a meta-step.

    Args:
        in_channels: as :func:`conv_net` has it, likewise
        ways: and
        filters: and
        image_size: and
        blocks: of which there are at least two.
        context: number of context parameters.

    Returns:
        a module from ``[N, in_channels, image_size, image_size]`` and ``[context]`` to ``[N, ways]``.

    Raises:
        ValueError: as :func:`conv_net`, or fewer than two blocks, or no context.
    """
    checks.at_least("modulated_conv_net", "blocks", blocks, 2)
    checks.at_least("modulated_conv_net", "context", context, 1)
    layers = conv_net(in_channels, ways, filters, image_size, blocks=blocks)
    norms = [i for i, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d)]
    return Modulated(layers, norms[-2] + 1, filters, context)
