"""Residual networks for small images: a 3x3 stem and no max-pooling in front of the stages.

ResNet-34 and ResNet-18 are the networks of the published DAFL code (He et al. 2016, as commonly
adapted to CIFAR). They have the same layer names, so that its weights load. ResNet-20 and ResNet-8
are the networks with three stages in the CIFAR section of He et al. Wide ResNets follow Zagoruyko
and Komodakis 2016, with the layer names of the usual PyTorch code.

All of them take images [N, channels, H, W] of 8x8 pixels or more, because they end in an average
over the positions, and return logits [N, num_classes]. The features are the input of the last
layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))); if shapes differ, x passes a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """A stem and stages of basic blocks; every stage but the first halves the image.

    Args:
        blocks: per stage: (3, 4, 6, 3) is ResNet-34, (2, 2, 2, 2) ResNet-18, (3, 3, 3) ResNet-20.
        width: channels of the stem and the first stage, doubled by each later stage: 64 for the
            four-stage networks, 16 for the three-stage ones.
        num_classes, channels: logits, and image channels.

    The three-stage networks, too, have 1x1 convolutions as shortcuts (option B of the paper). So
    ResNet-20 has 272,474 parameters; without parameters in the shortcuts it would have 269,722.
    """

    def __init__(
        self, blocks: Sequence[int], width: int, num_classes: int = 10, channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        self.stages: list[str] = []
        for stage, count in enumerate(blocks):
            outputs, layers = width << stage, []
            for block in range(count):
                layers.append(BasicBlock(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
                inputs = outputs
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.linear(x.mean((2, 3)))


class WideBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); if shapes differ, the shortcut is a 1x1 convolution of
    relu(bn(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.convShortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        y = F.relu(self.bn2(self.conv1(y)), inplace=True)
        return shortcut + self.conv2(y)


class WideStage(nn.Module):
    """`count` wide blocks, the first of which changes channels and size."""

    def __init__(self, count: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = WideBlock(inputs, outputs, stride)
        others = (WideBlock(outputs, outputs, 1) for _ in range(count - 1))
        self.layer = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`: three stages of n blocks with 16, 32 and 64 channels times `widen`.
    `depth` = 6 n + 4 is the number of layers with weights; `channels` are those of the images."""

    def __init__(self, depth: int, widen: int, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6 n + 4 with n at least 1, got {depth}")
        count, widths = (depth - 4) // 6, [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = _conv3x3(channels, 16)
        self.block1 = WideStage(count, 16, widths[0], 1)
        self.block2 = WideStage(count, widths[0], widths[1], 2)
        self.block3 = WideStage(count, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x), inplace=True).mean((2, 3)))
