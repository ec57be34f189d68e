"""Reads images that a user gives beside the teacher, and that are not its data: no labels needed.

Photographs are much larger than what the teacher takes, and will be cut. All other images are
brought to the teacher's size here, once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .data import Format, ImageSize, check_channels, covering, images_of_npz, resized, sides
from .dead_leaves import SIDE, dead_leaves
from .errors import UserError, first_line
from .pictures import image_files, is_transparent, on_white, open_image
from .sketches import how_many, sketches

log = logging.getLogger(__name__)

# The names of files that count as images in a folder.
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# An image is cut if both of its sides are at least so many times those that the teacher takes.
LARGE = 2
# Photographs are made smaller if they have more pixels than this on a side, or all of a path
# together.
LONGEST_SIDE, PIXELS = 4096, 2**28
LARGEST = 2**28  # pixels of a file; a small one can claim any number


@dataclass(frozen=True)
class Given:
    """Images that are not the data, on the CPU.

    Attributes:
        photographs: each [C, H, W] uint8 of its own size, to be cut.
        whole: [N, C, H, W], of the teacher's size; uint8, or floats that are already as the
            networks take them.
        form: how uint8 images are brought to what the networks take; None if there are none.
        drawn: how many of the photographs, the last ones, are none, but were drawn.
        sketches: how many of the whole images, the last ones, are such.
    """

    photographs: list[Tensor]
    whole: Tensor
    form: Format | None
    drawn: int = 0
    sketches: int = 0

    @property
    def own(self) -> int:
        """How many whole images are the user's, the first ones."""
        return len(self.whole) - self.sketches

    @property
    def bytes_to_cut(self) -> int:
        """The memory that they take on the device to be cut; see `engine.crops.Cutter`."""
        if self.form is None:
            return 0
        return sum(4 * image.nbytes // 3 for image in self.photographs) + self.whole.nbytes

    def part(self, which: Tensor) -> Given:
        """With only these [N] of the whole images."""
        sketches = int(which[self.own :].sum())
        return replace(self, whole=self.whole[which], sketches=sketches)

    @property
    def words(self) -> str:
        """How many there are of which kind."""
        counts = {
            ("photograph", "photographs"): len(self.photographs) - self.drawn,
            ("image", "images"): self.own,
            ("drawn picture", "drawn pictures"): self.drawn,
            ("sketch", "sketches"): self.sketches,
        }
        return " and ".join(f"{n:,} {names[n > 1]}" for names, n in counts.items() if n)

    def fingerprint(self) -> str:
        """SHA-256 of all pixels that the user gave, in their order. A resumed run must have the
        same ones. What is drawn may differ a little on another processor, which does no harm."""
        digest = hashlib.sha256()
        photographs = self.photographs[: len(self.photographs) - self.drawn]
        for images in (*photographs, self.whole[: self.own]):
            digest.update(repr((images.shape, images.dtype)).encode())
            digest.update(images.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def given_tensor(images: Tensor, shape: tuple[int, int, int]) -> Given:
    """Images [N, C, H, W] in the units of the teacher's images.

    Raises:
        UserError: they are of another shape, no floats, or not finite.
    """
    wanted = f"images must be a tensor of floats [N, {', '.join(map(str, shape))}]"
    if not images.is_floating_point() or tuple(images.shape[1:]) != shape or not len(images):
        raise UserError(
            f"{wanted} in the teacher's units, got {images.dtype} {list(images.shape)}; files of "
            "images are given by their paths"
        )
    if not images.isfinite().all():
        raise UserError(f"{wanted} without NaN and infinity")
    return Given([], images.detach().cpu(), None)


def with_dead_leaves(given: Given | None, count: int, form: Format) -> Given:
    """The images that were given, if any, and `count` pictures that are drawn.

    Raises:
        UserError: the images were given as a tensor, in the units of the teacher.
    """
    given = _beside(given, form, f"--dead-leaves {count}")
    side = max(SIDE, LARGE * max(sides(form.image_size)))
    drawn = dead_leaves(count, form.stored_channels, side)
    return replace(given, photographs=[*given.photographs, *drawn], drawn=count)


def with_sketches(given: Given | None, kind: str, form: Format) -> Given:
    """The images that were given, if any, and sketches of this kind, "light" or "dark".

    Raises:
        UserError: the images were given as a tensor, in the units of the teacher.
    """
    given = _beside(given, form, f"--sketches {kind}")
    size = form.stored_channels, *sides(form.image_size)
    drawn = sketches(how_many(*size), *size, light=kind == "light")
    whole = torch.cat([given.whole, drawn]) if len(given.whole) else drawn
    return replace(given, whole=whole, sketches=len(drawn))


def _beside(given: Given | None, form: Format, flag: str) -> Given:
    """The images that were given, beside which `flag` has some drawn."""
    if given is None:
        shape = (0, form.stored_channels, *sides(form.image_size))
        return Given([], torch.empty(shape, dtype=torch.uint8), form)
    if given.form is None:
        raise UserError(
            f"{flag} does not go with images that are a tensor; leave it out, or give their paths"
        )
    return given


def read_images(paths: Sequence[Path], form: Format) -> Given:
    """Reads images for a network that takes images of `form`.

    Files that are no images or damaged are left out. Grey images are repeated over the channels of
    a network that takes more, and what is transparent becomes white. A warning counts each kind.

    Args:
        paths: each is an image, an .npz file with `images`, or a folder, in which images are looked
            for at any depth.

    Raises:
        UserError: a path does not exist or holds no image that can be read, an .npz file has
            another number of channels than 1 and the network's, or the network takes neither 1 nor
            3 from files.
    """
    photographs: list[Tensor] = []
    whole: list[Tensor] = []
    for path in paths:
        images = _npz(path, form) if path.suffix == ".npz" else _files(path, form)
        for image in images:
            if _is_large(image.shape[1:], form.image_size):
                photographs.append(image)
            else:
                whole.append(_fitted(image, form.image_size))
    shape = (0, form.stored_channels, *sides(form.image_size))
    return Given(
        photographs, torch.stack(whole) if whole else torch.empty(shape, dtype=torch.uint8), form
    )


def _npz(path: Path, form: Format) -> list[Tensor]:
    images = images_of_npz(path)
    if images.shape[1] == 1 < form.stored_channels:
        _say_grey(path, len(images), len(images))
        images = images.expand(-1, form.stored_channels, -1, -1)
    try:
        check_channels(images, form.stored_channels)
    except UserError as error:
        raise UserError(f"--images {path}: {error}") from error
    return list(images)


def _say_grey(path: Path, count: int, among: int) -> None:
    log.warning(
        "--images %s: %s of %s images are grey, and are given to the network as equal channels",
        path, f"{count:,}", f"{among:,}",
    )  # fmt: skip


def _files(path: Path, form: Format) -> list[Tensor]:
    """The images [C, H, W] uint8 of a file, or of all files in a folder by the order of their
    paths."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    mode = {1: "L", 3: "RGB"}.get(form.stored_channels)
    if mode is None:
        raise UserError(
            f"--images {path}: files of images are read with 1 or 3 channels, the network takes "
            f"{form.stored_channels}; give them as an .npz file"
        )
    if not path.exists():
        raise UserError(f"--images {path} does not exist")
    files = [path]
    if path.is_dir():
        files = sorted(f for f in image_files(path, SUFFIXES) if not f.name.startswith("."))
    if not files:
        raise UserError(
            f"--images {path} holds no images: no file in it ends in {', '.join(SUFFIXES)}"
        )

    def side_of(file: Path) -> tuple[int, float]:
        """The longer side of a photograph, and its pixels with that as far as allowed."""
        with contextlib.suppress(UserError), open_image(file, most=LARGEST) as opened:
            if _is_large(opened.size[::-1], form.image_size):
                side = max(opened.size)
                return side, opened.width * opened.height * min(1, LONGEST_SIDE / side) ** 2
        return 0, 0.0

    def decode(file: Path) -> Tensor | str:
        try:
            with open_image(file, most=LARGEST) as opened:
                side = max(opened.size)
                large = _is_large(opened.size[::-1], form.image_size)
                most = math.ceil(min(side, LONGEST_SIDE) * factor) if large else side
                if large:  # so that it stays one that is cut
                    pairs = zip(opened.size[::-1], sides(form.image_size), strict=True)
                    most = max(most, math.ceil(side * max(LARGE * w / s for s, w in pairs)))
                # JPEG can be decoded at a half or a quarter of its size.
                opened.draft(mode, (most, most))
                image = ImageOps.exif_transpose(opened)
                if mode == "RGB" and image.mode in ("1", "L", "LA"):
                    grey.add(file)
                if is_transparent(image):
                    transparent.add(file)
                    image = on_white(image)
                image = image.convert(mode)
        except UserError as error:
            return first_line(error)
        if max(image.size) > most:
            image.thumbnail((most, most), Image.Resampling.BOX)
        tensor: Tensor = pil_to_tensor(image)
        # At once, so that a folder of many takes no more than their final sizes.
        if _is_large(tensor.shape[1:], form.image_size):
            return tensor
        return _fitted(tensor, form.image_size)

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        # Of photographs as large as ours may be.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = list(pool.map(side_of, files))
        factor = min(1.0, (PIXELS / max(1.0, sum(pixels for _, pixels in found))) ** 0.5)
        grey: set[Path] = set()
        transparent: set[Path] = set()
        decoded = list(pool.map(decode, files))
    images = [image for image in decoded if isinstance(image, Tensor)]
    broken = [image for image in decoded if isinstance(image, str)]
    if not images:
        raise UserError(f"--images {path}: no image can be read ({broken[0]})")
    if broken:
        log.warning(
            "--images %s: %s of %s files cannot be read and are left out, such as %s",
            path, f"{len(broken):,}", f"{len(files):,}", broken[0],
        )  # fmt: skip
    if grey:
        _say_grey(path, len(grey), len(files))
    if transparent:
        log.warning(
            "--images %s: the transparent parts of %s of %s images are made white",
            path, f"{len(transparent):,}", f"{len(files):,}",
        )  # fmt: skip
    smaller = sum(side > LONGEST_SIDE or side * factor < side for side, _ in found)
    if smaller:
        log.warning(
            "--images %s: %s are made smaller, to at most %s pixels on a side, to take less memory",
            path, f"{smaller:,} photograph(s)",
            f"{math.ceil(LONGEST_SIDE * factor):,}",
        )  # fmt: skip
    return images


def _is_large(size: Sequence[int], wanted: ImageSize) -> bool:
    return all(side >= LARGE * least for side, least in zip(size, sides(wanted), strict=True))


def _fitted(image: Tensor, size: ImageSize) -> Tensor:
    """An image [C, H, W] uint8, resized until it just covers the size, and cut to its middle."""
    height, width = sides(size)
    rows, columns = covering(image.shape[1], image.shape[2], height, width)
    image = resized(image.unsqueeze(0), (rows, columns))[0]
    top, left = (rows - height) // 2, (columns - width) // 2
    return image[:, top : top + height, left : left + width].contiguous()
