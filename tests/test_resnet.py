"""Residual networks: values against the transcription, the published sizes, the published step."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dafl_fast.errors import UserError
from dafl_fast.models import NETWORKS, ResNet, WideResNet, build

from .published import CIFAR10, PublishedGenerator, PublishedResNet, PublishedStep


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def randomise(network: nn.Module) -> None:
    """Statistics and scales of BatchNorm that an untrained network does not have."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("ResNet34", 10, 21_282_122),
        ("ResNet34", 100, 21_328_292),
        ("ResNet18", 10, 11_173_962),
        ("ResNet18", 100, 11_220_132),
        ("ResNet20", 10, 272_474),
        # 2,752 = two 1x1 shortcuts with their BatchNorm: (16 32 + 64) + (32 64 + 128).
        ("ResNet8", 10, 75_290 + 2_752),
        ("WRN-40-2", 10, 2_243_546),
        ("WRN-40-1", 10, 563_930),
        ("WRN-16-2", 10, 691_674),
        ("WRN-16-1", 10, 175_066),
    ],
)
def test_parameter_counts(name, classes, count):
    with torch.device("meta"):
        assert parameters(build(name, classes)) == count


@pytest.mark.parametrize("blocks", [(3, 4, 6, 3), (2, 2, 2, 2)])
def test_resnet_is_the_published_network(blocks):
    """Logits and input gradients, with batch statistics and with running ones; statistics too."""
    ours, theirs = ResNet(blocks, 64).double(), PublishedResNet(blocks).double()
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        mine, other = ours(x), theirs(y)
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
        mine.logsumexp(1).sum().backward()
        other.logsumexp(1).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-10)
    for (name, mine), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)


def test_small_resnet_by_hand():
    """ResNet-8, written as one expression per layer, from its state dict alone."""
    network = build("ResNet8", 7, channels=2).double().eval()
    randomise(network)
    w = network.state_dict()

    def conv(x, name, stride=1, padding=1):
        return F.conv2d(x, w[f"{name}.weight"], stride=stride, padding=padding)

    def norm(x, name):
        scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale
        return x * scale[:, None, None] + shift[:, None, None]

    images = torch.randn(3, 2, 17, 12, dtype=torch.float64)
    x = norm(conv(images, "conv1"), "bn1").relu()
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"layer{stage}.0"
        y = norm(conv(x, f"{block}.conv1", stride), f"{block}.bn1").relu()
        y = norm(conv(y, f"{block}.conv2"), f"{block}.bn2")
        if stage > 1:
            x = norm(conv(x, f"{block}.shortcut.0", stride, 0), f"{block}.shortcut.1")
        x = (x + y).relu()
    assert x.shape == (3, 64, 5, 3)
    expected = x.flatten(2).sum(2) / 15 @ w["linear.weight"].T + w["linear.bias"]
    torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("depth", "widen"), [(10, 2), (16, 1)])
def test_wide_resnet_by_hand(depth, widen):
    network = WideResNet(depth, widen, 7, channels=2).double().eval()
    randomise(network)
    w = network.state_dict()

    def conv(x, name, stride=1, padding=1):
        return F.conv2d(x, w[f"{name}.weight"], stride=stride, padding=padding)

    def norm_relu(x, name):
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"]).relu()

    images = torch.randn(3, 2, 17, 12, dtype=torch.float64)
    x = conv(images, "conv1")
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        for index in range((depth - 4) // 6):
            block = f"block{stage}.layer.{index}"
            changes = index == 0 and (stage > 1 or widen > 1)
            assert (f"{block}.convShortcut.weight" in w) == changes
            y = norm_relu(x, f"{block}.bn1")
            if changes:
                x = conv(y, f"{block}.convShortcut", stride, 0)
            y = conv(y, f"{block}.conv1", stride if index == 0 else 1)
            x = x + conv(norm_relu(y, f"{block}.bn2"), f"{block}.conv2")
    x = norm_relu(x, "bn1")
    assert x.shape == (3, 64 * widen, 5, 3)
    expected = x.flatten(2).sum(2) / 15 @ w["fc.weight"].T + w["fc.bias"]
    torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


def test_published_step_for_cifar_with_its_settings():
    """SGD moves first by lr (gradient + weight decay), Adam by lr in each gradient's direction."""
    networks = (
        PublishedGenerator(latent_dim=20, width=4, channels=3),
        PublishedResNet((1, 1, 1, 1)),
        PublishedResNet((1, 1, 1, 1)),
    )
    networks = [network.double() for network in networks]
    step = PublishedStep(*networks, **CIFAR10)
    generator, _, student = networks
    before = [p.detach().clone() for p in (generator.l1[0].weight, student.linear.weight)]
    step(torch.randn(4, 20, dtype=torch.float64))
    gradient = student.linear.weight.grad + 5e-4 * before[1]
    torch.testing.assert_close(student.linear.weight, before[1] - 0.1 * gradient)
    moved = (generator.l1[0].weight.detach() - before[0]).abs()
    assert moved.max() == pytest.approx(0.02, rel=1e-3)


def test_names():
    for name in NETWORKS:
        with torch.device("meta"):
            logits = build(name, 6).eval()(
                torch.empty(2, *((1, 28, 28) if "Hinton" in name else (1, 32, 32) if "LeNet" in name
                                 else (3, 32, 32)))
            )  # fmt: skip
        assert logits.shape == (2, 6), name
    with pytest.raises(UserError, match="unknown network 'ResNet50': choose one of LeNet5"):
        build("ResNet50")
    with pytest.raises(UserError, match="LeNet5 takes images of one channel, got 3"):
        build("LeNet5", channels=3)
    with pytest.raises(ValueError, match=re.escape("depth must be 6 n + 4")):
        WideResNet(18, 2)
