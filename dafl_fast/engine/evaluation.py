"""Accuracy on labelled images and agreement with the teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextlib.contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Afterwards every layer of `network` is in the mode that it is in now."""
    # A frozen TorchScript has no mode.
    training = getattr(network, "training", False)
    modes = [(layer, layer.training) for layer in network.modules() if hasattr(layer, "training")]
    try:
        yield
    finally:
        network.train(training)  # some networks do more here than to set the flags
        for layer, mode in modes:
            layer.training = mode


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """`network` in evaluation mode; afterwards every layer is in the mode that it was in."""
    with modes_kept(network):
        network.eval()
        yield


@contextlib.contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Afterwards the buffers of `network` hold what they hold now. Observers of quantisation note
    what passes in evaluation as well. Those that get their shape inside keep it, with its values.
    """
    # Those of a lazy layer have no values before its first call.
    kept = [(buffer, buffer.clone()) for buffer in network.buffers() if not is_lazy(buffer)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


def training_mode(network: nn.Module) -> None:
    """Puts `network` into training mode. Layers in evaluation mode inside a network in training
    mode were put there on purpose, and stay so."""
    frozen = [layer for layer in network.modules() if network.training and not layer.training]
    network.train()
    for layer in frozen:
        layer.training = False


@torch.no_grad()
def predictions(network: nn.Module, images: Tensor, batch_size: int = 1000) -> Tensor:
    """The classes [N] that `network` chooses for images [N, C, H, W]; at ties the lowest index."""
    device = next(network.parameters(), images).device  # a frozen TorchScript has no parameters
    with evaluation_mode(network), buffers_kept(network):
        parts = [network(batch.to(device)).argmax(1) for batch in images.split(batch_size)]
    return torch.cat(parts).to(images.device)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, C, H, W] whose predicted class is the label [N]."""
    return accuracy_on(network, [(images, labels)])[0]


def accuracy_on(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Accuracy over batches of images [N, C, H, W] and labels [N], and the number of images."""
    right = count = 0
    for images, labels in batches:
        right += int((predictions(network, images) == labels).sum())
        count += len(labels)
    return right / max(count, 1), count


def answers_to_images(network: nn.Module, images: Tensor) -> Tensor:
    """A network's logits in evaluation mode, with a gradient to the images but not to its
    weights."""
    trained = [p for p in network.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluation_mode(network):
            logits: Tensor = network(images)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return logits
