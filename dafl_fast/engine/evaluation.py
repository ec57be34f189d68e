"""Accuracy on labelled images and agreement with the teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..config import Config
from ..data import Format, Normaliser, check_channels, check_labels, load, resized
from ..errors import UserError


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


class Batches:
    """Labelled images, uint8 [N, C, H, W], in batches: [n, C, H, W] fp32 as `form` says, and labels
    [n]. Each is normalised when its turn comes, as all at once would take four times the memory."""

    def __init__(self, images: Tensor, labels: Tensor, form: Format) -> None:
        check_channels(images, form.stored_channels)
        self._images, self._labels = resized(images, form.image_size), labels
        self._normaliser = Normaliser(form)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = at_once(self._images)
        for images, labels in zip(self._images.split(count), self._labels.split(count)):
            yield self._normaliser(images), labels


class HeldOut:
    """A user's labelled images, looked at before they are used: batches of images [n, C, H, W] and
    labels [n].

    Args:
        loader: pairs of images and labels, as tensors or NumPy arrays, in the teacher's units; a
            torch DataLoader for example. One pair may be given alone. What can be gone through
            only once is kept.
        config: the shape of the images, and whether the teacher takes whole numbers.
        num_classes: labels are below it.

    Raises:
        UserError: the first batch, or any of a list, is not of that kind, or there is none. Others
            are looked at when their turn comes.
    """

    def __init__(self, loader: Any, config: Config, num_classes: int) -> None:
        self._shape, self._classes = config.shape, num_classes
        self._integers = config.pixels == "0..255"
        if isinstance(loader, (tuple, list)) and len(loader) == 2 and hasattr(loader[0], "shape"):
            loader = [loader]
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise self._mistake(f"got {type(loader).__name__}")
        self._loader = list(loader) if isinstance(loader, Iterator) else loader
        counts: Iterable[int] = (len(labels) for _, labels in self)
        if isinstance(self._loader, (list, tuple)):
            counts = list(counts)  # all are looked at
        if not any(counts):
            raise self._mistake("got none")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self._loader, 1):
            try:
                yield self._checked(batch)
            except UserError as error:
                raise UserError(f"{error} in batch {number}") from error

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor]:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not all(hasattr(part, "shape") for part in batch):
            parts = batch if isinstance(batch, (tuple, list)) else [batch]
            kinds = ", ".join(type(part).__name__ for part in parts[:4])
            single = pair and getattr(batch[0], "ndim", 0) == 3
            raise self._mistake(f"got {kinds}" + ", as of a Dataset without DataLoader" * single)
        images, labels = map(torch.as_tensor, batch)
        if labels.is_floating_point() and torch.equal(labels, labels.round()):
            labels = labels.long()
        if labels.dim() == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        shapes = f"got {list(images.shape)} and {list(labels.shape)}"
        if tuple(images.shape[1:]) != self._shape or labels.shape != images.shape[:1]:
            raise self._mistake(shapes)
        if self._integers or images.dtype in (torch.float16, torch.bfloat16):
            images = images.float()
        if not images.is_floating_point() or labels.is_floating_point():
            raise self._mistake(f"{shapes} of {images.dtype} and {labels.dtype}")
        labels = labels.long()
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self._classes:
            raise self._mistake(f"got labels from {int(labels.min())} to {int(labels.max())}")
        return images, labels

    def _mistake(self, came: str) -> UserError:
        size = ", ".join(map(str, self._shape))
        return UserError(
            f"eval_loader must give pairs of images [n, {size}], floats in the teacher's units, "
            f"and labels [n], whole numbers below {self._classes}; {came}"
        )


def at_once(images: Tensor) -> int:
    """How many of these images [N, C, H, W] a network is evaluated on at once: large ones take more
    memory."""
    return max(16, min(1000, 2**22 // max(1, images.shape[1:].numel())))


def eval_set(
    name: str, form: Format, num_classes: int, data_dir: Path | None = None, download: bool = False
) -> Batches:
    """Held-out images by `--eval` name, for a network with `num_classes` and images of `form`. The
    other arguments are those of `load`.

    Raises:
        UserError: the images cannot be read, or have labels beyond `num_classes`.
    """
    held_out = load(name, "test", data_dir, download, form.image_size, form.stored_channels)
    check_labels(held_out.labels, num_classes)
    return Batches(held_out.images, held_out.labels, form)


@torch.no_grad()
def predictions(network: nn.Module, images: Tensor, batch_size: int | None = None) -> Tensor:
    """The classes [N] that `network` chooses for images [N, C, H, W]; at ties the lowest index."""
    batch_size = batch_size or at_once(images)
    device = next(network.parameters(), images).device  # a frozen TorchScript has no parameters
    with evaluation_mode(network), buffers_kept(network):
        parts = [network(batch.to(device)).argmax(1) for batch in images.split(batch_size)]
    return torch.cat(parts).to(images.device)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, C, H, W] whose predicted class is the label [N]."""
    return accuracy_on(network, [(images, labels)])[0]


def accuracy_on(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Accuracy over batches of images [N, C, H, W] and labels [N], and the number of images. Images
    in fp64 are made fp32 for a network that has no weights in fp64."""
    wide = any(parameter.dtype == torch.float64 for parameter in network.parameters())
    right = count = 0
    for images, labels in batches:
        if images.dtype == torch.float64 and not wide:
            images = images.float()
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
