"""Networks: the published generator and the paper's teachers and students."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .generator import PUBLISHED_BN_EPS, Generator
from .hintonnet import HintonNet
from .lenet import LeNet5, LeNet5Half


def build(name: str) -> nn.Module:
    """A network of the presets by its name, freshly initialised."""
    networks: dict[str, Callable[[], nn.Module]] = {
        "LeNet5": LeNet5,
        "LeNet5Half": LeNet5Half,
        "HintonNet1200": lambda: HintonNet(1200),
        "HintonNet800": lambda: HintonNet(800),
    }
    return networks[name]()


__all__ = ["PUBLISHED_BN_EPS", "Generator", "HintonNet", "LeNet5", "LeNet5Half", "build"]
