from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmeta.learner.models import conv4, conv_net, mlp, modulated_conv_net, read_context, sinusoid_mlp


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_papers_networks_have_their_size() -> None:
    assert count(sinusoid_mlp()) == 40 + 40 + 40 * 40 + 40 + 40 + 1
    assert count(conv4()) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 64 * 5 + 5
    assert [type(m).__name__ for m in sinusoid_mlp()] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]


@pytest.mark.parametrize(
    ("module", "shape", "outputs"),
    [
        (mlp((7, 3)), (2, 7), 3),
        (mlp((7, 5, 3), nn.Tanh), (2, 7), 3),
        (conv4(3, 20, 8, 84), (2, 3, 84, 84), 20),
        (conv4(filters=8, pool="stride"), (2, 1, 28, 28), 5),
        (conv_net(1, 4, 8, 8, blocks=3), (2, 1, 8, 8), 4),
        (conv_net(1, 4, 8, 5, blocks=3, pool="stride"), (2, 1, 5, 5), 4),
    ],
)
def test_shapes(module: nn.Module, shape: tuple[int, ...], outputs: int) -> None:
    assert module(torch.randn(shape)).shape == (shape[0], outputs)


def test_batch_norm_is_transductive_in_either_mode() -> None:
    model, x = conv4(filters=4), torch.randn(6, 1, 28, 28)
    assert torch.equal(model.train()(x), model.eval()(x))
    assert not torch.allclose(model(x)[:3], model(x[:3]))
    assert list(model.buffers()) == []


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_a_context_scales_and_shifts_the_last_block_but_one(blocks: int) -> None:
    torch.manual_seed(0)
    model, x = modulated_conv_net(1, 4, 3, 16, blocks=blocks, context=2), torch.randn(5, 1, 16, 16)
    layers, context = nn.Sequential(*model.before, *model.after), torch.randn(2)
    assert [type(m).__name__ for m in layers] == [type(m).__name__ for m in conv_net(1, 4, 3, 16, blocks=blocks)]
    assert torch.equal(read_context(model, torch.zeros(2), x), layers(x))
    scale, shift = (model.film.weight @ context).view(2, 3, 1, 1)
    place = 4 * (blocks - 2) + 2
    expected = layers[place:](layers[:place](x) * (1 + scale) + shift)
    assert torch.allclose(model(x, context), expected, atol=1e-6)
    assert not torch.allclose(expected, layers(x), atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp((3,)), "mlp: sizes must be at least two positive widths"),
        (lambda: mlp((3, 0)), "mlp: sizes must be at least two positive widths"),
        (lambda: conv4(filters=0), "conv_net: filters must be at least 1, got 0"),
        (lambda: conv4(ways=0), "conv_net: ways must be at least 1, got 0"),
        (lambda: conv4(image_size=15), "conv_net: image_size must be at least 16 for 4 blocks, got 15"),
        (lambda: modulated_conv_net(blocks=1), "modulated_conv_net: blocks must be at least 2, got 1"),
        (lambda: modulated_conv_net(context=0), "modulated_conv_net: context must be at least 1, got 0"),
        (lambda: conv4(pool="mean"), "conv_net: pool must be one of 'max', 'stride', got 'mean'"),
    ],
)
def test_impossible_networks_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
