"""The generator at every image size and number of channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dafl_fast.models import Generator


def in_plain_layers(generator: Generator, z: torch.Tensor, starts: list[tuple[int, int]]):
    """Step by step, as the published stages are; `starts` are the sizes before each and at the
    end."""
    x = generator.conv_blocks0(generator.l1(z).unflatten(1, (-1, *starts[0])))
    blocks = (*generator.more_blocks, generator.conv_blocks1, generator.conv_blocks2[:5])
    for block, (height, width) in zip(blocks, starts[1:], strict=True):
        x = block(F.interpolate(x, scale_factor=2))[..., :height, :width]
    return generator.conv_blocks2[5](x)


# Computed before the generator took other sizes.
@pytest.mark.parametrize(
    ("size", "channels", "made", "more", "values"),
    [
        (4, 1, 4, 0, [-0.2017, -0.8437, -0.4047]),
        (28, 1, 196, 0, [-0.1150, 0.3677, 0.6832]),
        (32, 3, 256, 0, [-0.4402, 1.0479, 1.3637]),
        (36, 1, 324, 0, [-0.4726, -1.8390, 0.4013]),
        (64, 3, 256, 1, [0.2128, -0.2685, -0.3013]),
        (100, 3, 2500, 0, [-0.2599, 0.3740, 0.6086]),
    ],
)
def test_published_sizes_keep_their_layers_weights_and_images(size, channels, made, more, values):
    generator = Generator(5, size, channels, 4)
    layers = [(f"more_blocks.{i}.", 4, 4) for i in range(more)] + [("conv_blocks1.", 4, 4)]
    expected = {"l1.0.weight": (made, 5), "l1.0.bias": (made,)}
    norm = ("weight", "bias", "running_mean", "running_var")
    expected |= {f"conv_blocks0.0.{name}": (4,) for name in norm}
    for prefix, before, after in [*layers, ("conv_blocks2.", 4, 2)]:
        expected |= {f"{prefix}0.weight": (after, before, 3, 3), f"{prefix}0.bias": (after,)}
        expected |= {f"{prefix}1.{name}": (after,) for name in norm}
    expected |= {"conv_blocks2.3.weight": (channels, 2, 3, 3), "conv_blocks2.3.bias": (channels,)}
    expected |= {f"conv_blocks2.5.{name}": (channels,) for name in norm[2:]}
    state = generator.state_dict()
    counts = {name for name in state if name.endswith("num_batches_tracked")}
    assert {k: tuple(v.shape) for k, v in state.items() if k not in counts} == expected
    torch.manual_seed(0)
    images = Generator(5, size, channels, 4)(torch.randn(3, 5))
    torch.testing.assert_close(images[1, -1, 2, :3], torch.tensor(values), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("size", "channels", "sizes"),
    [
        ((28, 28), 1, [(7, 7), (14, 14), (28, 28)]),
        ((30, 30), 3, [(8, 8), (15, 15), (30, 30)]),
        ((8, 8), 1, [(2, 2), (4, 4), (8, 8)]),
        ((9, 13), 2, [(3, 4), (5, 7), (9, 13)]),
        ((30, 50), 1, [(4, 7), (8, 13), (15, 25), (30, 50)]),
        ((48, 192), 3, [(3, 12), (6, 24), (12, 48), (24, 96), (48, 192)]),
        ((8, 300), 4, [(1, 38), (2, 75), (4, 150), (8, 300)]),
        ((16, 12), 5, [(4, 3), (8, 6), (16, 12)]),
        ((16, 16), 13, [(4, 4), (8, 8), (16, 16)]),
        ((10, 8), 64, [(3, 2), (5, 4), (10, 8)]),
    ],
)
def test_images_and_gradients_are_those_of_the_plain_layers(size, channels, sizes):
    generator = Generator(7, size, channels, 8).double().to(memory_format=torch.channels_last)
    assert generator.image_shape == (channels, *size)
    assert generator.l1[0].out_features == 8 * sizes[0][0] * sizes[0][1]
    z = torch.randn(3, 7, dtype=torch.float64)
    upstream = torch.randn(3, channels, *size, dtype=torch.float64)
    images = generator(z)
    images.backward(upstream)
    got = [None if p.grad is None else p.grad.clone() for p in generator.parameters()]
    generator.zero_grad()
    expected = in_plain_layers(generator, z, sizes)
    expected.backward(upstream)
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-10)
    for (name, p), grad in zip(generator.named_parameters(), got, strict=True):
        grad = torch.zeros_like(p) if grad is None else grad  # a bias before BatchNorm
        torch.testing.assert_close(grad, p.grad, rtol=1e-7, atol=1e-8, msg=name)
    generator.eval()
    torch.testing.assert_close(
        generator(z), in_plain_layers(generator, z, sizes), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize(
    ("size", "width", "start", "stages"), [((299, 299), 8, 25, 6), ((640, 480), 4, 20, 7)]
)
def test_large_images(size, width, start, stages):
    generator = Generator(10, size, 3, width).to(memory_format=torch.channels_last)
    assert generator.l1[0].out_features == width * start
    assert len(generator.more_blocks) + 2 == stages
    images = generator(torch.randn(2, 10))
    assert images.shape == (2, 3, *size)
    # Of all pixels that there are, and of no others.
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        images.var((0, 2, 3), correction=0), torch.ones(3), atol=0.02, rtol=0
    )
    images.square().mul(images).mean().backward()
    assert generator.l1[0].weight.grad.isfinite().all()
    assert generator.l1[0].weight.grad.any()


def test_one_number_is_both_sides():
    one, two = (Generator(5, size, 1, 4).state_dict() for size in (30, (30, 30)))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}


def test_odd_sizes_run_in_bf16():
    with torch.autocast("cpu", torch.bfloat16):
        for channels in (3, 13):
            images = Generator(7, (9, 13), channels, 8)(torch.randn(4, 7))
            assert images.shape == (4, channels, 9, 13)
            assert images.isfinite().all()
