"""The networks: published sizes, the fused upsampling stage, checkpoints of the published code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dafl_fast.models import Generator, HintonNet, LeNet5, LeNet5Half
from dafl_fast.models.generator import PUBLISHED_BN_EPS

from .published import PublishedGenerator, PublishedLeNet5


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_published_parameter_counts():
    assert parameters(LeNet5()) == 61_706
    assert parameters(LeNet5Half()) == 15_738
    assert parameters(HintonNet(1200)) == 2_395_210
    assert parameters(HintonNet(800)) == 1_276_810


@pytest.mark.parametrize("half", [False, True])
def test_lenet_is_the_published_network(half):
    ours = LeNet5Half() if half else LeNet5()
    theirs = PublishedLeNet5(3, 8, 60, 42) if half else PublishedLeNet5()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 1, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_hintonnet_computes_a_two_layer_perceptron():
    net = HintonNet(16).double()
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    h = F.relu(F.linear(x.flatten(1), net.fc1.weight, net.fc1.bias))
    h = F.relu(F.linear(h, net.fc2.weight, net.fc2.bias))
    torch.testing.assert_close(net(x), F.linear(h, net.fc3.weight, net.fc3.bias))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("size", "channels", "width"), [(32, 1, 8), (28, 3, 6), (4, 4, 2)])
def test_generator_equals_the_published_one(size, channels, width, channels_last):
    """Outputs, input and weight gradients and running statistics, training and evaluating."""
    ours = Generator(7, size, channels, width).double()
    theirs = PublishedGenerator(7, width, size, channels).double()
    theirs.load_state_dict(ours.state_dict())
    if channels_last:
        ours = ours.to(memory_format=torch.channels_last)
    for _ in range(2):
        z = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
        z2 = z.detach().clone().requires_grad_()
        x, x2 = ours(z), theirs(z2)
        assert x.shape == (6, channels, size, size)
        torch.testing.assert_close(x, x2, rtol=1e-9, atol=1e-11)
        upstream = torch.randn_like(x2)
        x.backward(upstream)
        x2.backward(upstream)
        torch.testing.assert_close(z.grad, z2.grad, rtol=1e-8, atol=1e-11)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            mine = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(mine, q.grad, rtol=1e-8, atol=1e-11, msg=name)
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-13, msg=name)
    ours.eval()
    theirs.eval()
    z = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(z), theirs(z), rtol=1e-9, atol=1e-11)


def test_generator_keeps_the_published_eps():
    generator = Generator()
    assert PUBLISHED_BN_EPS == 0.8
    assert [generator.conv_blocks1[1].eps, generator.conv_blocks2[1].eps] == [0.8, 0.8]
    assert generator.conv_blocks0[0].eps == 1e-5
    assert Generator(bn_eps=1e-3).conv_blocks1[1].eps == 1e-3


def test_generator_images_are_normalised_per_channel():
    x = Generator(10, 16, 3, 8)(torch.randn(64, 10))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)


def test_reset_draws_new_weights_in_place():
    torch.manual_seed(0)
    generator = Generator(10, 16, 1, 8)
    generator(torch.randn(4, 10))
    pointer, before = generator.l1[0].weight.data_ptr(), generator.l1[0].weight.clone()
    torch.manual_seed(0)
    generator.reset()
    torch.manual_seed(0)
    fresh = Generator(10, 16, 1, 8)
    assert generator.l1[0].weight.data_ptr() == pointer
    assert torch.equal(generator.l1[0].weight, before)  # the same seed, the same draw
    for (name, mine), new in zip(
        generator.state_dict().items(), fresh.state_dict().values(), strict=True
    ):
        if "running" in name or "batches" in name:
            assert torch.equal(mine, new), name
    generator.reset()
    assert not torch.equal(generator.l1[0].weight, before)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"image_size": 3}, "image_size"),
        ({"image_size": (8, 3)}, "image_size"),
        ({"width": 5}, "width"),
        ({"channels": 0}, "channels"),
    ],
)
def test_generator_refuses_sizes_it_cannot_take(arguments, name):
    with pytest.raises(ValueError, match=name):
        Generator(**arguments)


@pytest.mark.parametrize(
    ("size", "start", "stages"), [(28, 7, 2), (32, 8, 2), (64, 8, 3), (96, 6, 4), (224, 7, 5)]
)
def test_generator_stages_follow_the_image_size(size, start, stages):
    generator = Generator(5, size, 3, 4)
    assert generator.l1[0].out_features == 4 * start**2
    convolutions = [m for m in generator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == stages + 1
    images = generator(torch.randn(3, 5))
    assert images.shape == (3, 3, size, size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    # Step by step, as the published stages are.
    generator.eval()
    z = torch.randn(2, 5)
    x = generator.conv_blocks0(generator.l1(z).view(2, 4, start, start))
    for block in (*generator.more_blocks, generator.conv_blocks1, generator.conv_blocks2):
        x = block(F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(generator(z), x, atol=1e-5, rtol=1e-5)
