"""The published generator, and the teachers and students that can be named."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError
from .generator import PUBLISHED_BN_EPS, Generator
from .hintonnet import HintonNet
from .lenet import LeNet5, LeNet5Half
from .resnet import ResNet, WideResNet

# By name: functions of the number of classes and of image channels.
_COLOUR: dict[str, Callable[[int, int], nn.Module]] = {
    "ResNet34": lambda classes, channels: ResNet((3, 4, 6, 3), 64, classes, channels),
    "ResNet18": lambda classes, channels: ResNet((2, 2, 2, 2), 64, classes, channels),
    "ResNet20": lambda classes, channels: ResNet((3, 3, 3), 16, classes, channels),
    "ResNet8": lambda classes, channels: ResNet((1, 1, 1), 16, classes, channels),
    "ResNet8Slim": lambda classes, channels: ResNet((1, 1, 1), 8, classes, channels),
    "WRN-40-2": lambda classes, channels: WideResNet(40, 2, classes, channels),
    "WRN-40-1": lambda classes, channels: WideResNet(40, 1, classes, channels),
    "WRN-16-2": lambda classes, channels: WideResNet(16, 2, classes, channels),
    "WRN-16-1": lambda classes, channels: WideResNet(16, 1, classes, channels),
}
# The MNIST networks, for images of one channel.
_GREY: dict[str, Callable[[int], nn.Module]] = {
    "LeNet5": lambda classes: LeNet5(num_classes=classes),
    "LeNet5Half": lambda classes: LeNet5Half(num_classes=classes),
    "HintonNet1200": lambda classes: HintonNet(1200, classes),
    "HintonNet800": lambda classes: HintonNet(800, classes),
}
NETWORKS = (*_GREY, *_COLOUR)
# Networks that take images of one size only, and that size. They also take one channel only.
GREY_SIZES = {"LeNet5": 32, "LeNet5Half": 32, "HintonNet1200": 28, "HintonNet800": 28}


def build(name: str, num_classes: int = 10, channels: int | None = None) -> nn.Module:
    """A network by its name (one of `NETWORKS`), freshly initialised, with `num_classes` logits.

    Without `channels`, the network takes its usual image channels: 1 for LeNets and HintonNets,
    else 3.

    Raises:
        UserError: an unknown name, or a network that does not take that many channels.
    """
    if name in _COLOUR:
        return _COLOUR[name](num_classes, 3 if channels is None else channels)
    if name not in _GREY:
        raise UserError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    if channels not in (None, 1):
        raise UserError(f"the network {name} takes images of one channel, got {channels}")
    return _GREY[name](num_classes)


def identify(state: Mapping[str, Tensor]) -> tuple[str, int, int] | None:
    """Recognises, by names and shapes, to which named network the weights in `state` belong.
    Returns the arguments of `build` (name, classes, image channels), or None if to none."""
    for name in NETWORKS:
        with torch.device("meta"):
            own = build(name).state_dict()
        if own.keys() != state.keys():
            continue
        classes = [state[key].shape[0] for key, value in own.items() if value.dim() == 2][-1]
        first = state[next(iter(own))]
        channels = 1 if name in GREY_SIZES or first.dim() != 4 else first.shape[1]
        with torch.device("meta"):
            own = build(name, classes, channels).state_dict()
        if all(own[key].shape == state[key].shape for key in own):
            return name, classes, channels
    return None


__all__ = [
    "GREY_SIZES",
    "NETWORKS",
    "PUBLISHED_BN_EPS",
    "Generator",
    "HintonNet",
    "LeNet5",
    "LeNet5Half",
    "ResNet",
    "WideResNet",
    "build",
    "identify",
]
