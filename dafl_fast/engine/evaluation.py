"""Accuracy on labelled images and agreement with the teacher."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def predictions(network: nn.Module, images: Tensor, batch_size: int = 1000) -> Tensor:
    """Lowest-index argmax class [N] of `network`'s logits for images [N, C, H, W], in fp32."""
    device = next(network.parameters(), images).device  # a frozen TorchScript has no parameters
    was_training = network.training
    network.eval()
    classes = [
        network(batch.to(device)).argmax(1).to(images.device) for batch in images.split(batch_size)
    ]
    network.train(was_training)
    return torch.cat(classes)


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
