"""Grids of the images that a run generates, and pictures from files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import UserError
from .files import reading, write_atomically

if TYPE_CHECKING:
    from PIL import Image

# What is taken for a picture, whatever its name: Pillow runs a program for some others, as EPS.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
MOST_PIXELS = 2**26  # of a picture; a small file can claim any size
# The most pixels that a side of an image takes in a grid.
LARGEST = 256


@contextmanager
def open_image(
    path: Path, formats: tuple[str, ...] = FORMATS, most: int = MOST_PIXELS
) -> Iterator[Image.Image]:
    """The picture in a file, with 8 bits a channel, to be read inside.

    Raises:
        UserError: it is none of these formats, has more than `most` pixels, or is damaged.
    """
    from PIL import Image

    with reading(path, "image"), Image.open(path, formats=formats) as image:
        if image.width * image.height > most:
            raise UserError(
                f"the image {path} is {image.width}x{image.height}, which is more than {most:,} "
                "pixels"
            )
        yield _eight_bits(image)


def _eight_bits(image: Any) -> Any:
    """A picture of PIL with 8 bits a channel, which PIL would make white of one with more."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; save it with 8 or 16")
    return image


def is_transparent(image: Image.Image) -> bool:
    """Whether one can see through some of its pixels."""
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return False
    return any(image.convert("RGBA").getchannel("A").histogram()[:255])


def on_white(image: Image.Image) -> Image.Image:
    """The picture as it looks on white paper."""
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def image_files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """The images in the folder of a class and in those below, in torchvision's order. Links are
    followed, but none to where one is or has been already: that has no end."""
    seen = {os.path.realpath(place) for place in folder.absolute().parents}
    found: list[Path] = []
    walked = []
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        walked.append((root, sorted(files)))
    for root, files in sorted(walked):
        found += [Path(root, name) for name in files if name.lower().endswith(endings)]
    return found


def save_samples(path: Path, images: Tensor, logits: Tensor, count: int = 40) -> None:
    """Writes a PNG grid of images [N, C, H, W] with the teacher's label and confidence.

    The teacher's logits are [N, num_classes]. `count` images at most are shown, spread evenly over
    the classes that it sees in them and sorted by class; grey values are stretched over each
    image's own range. Images of three or four channels are shown in colour, those of any other
    number as their first three channels side by side, in grey.
    """
    from PIL import Image, ImageDraw

    images, probabilities = images.detach().float().cpu(), logits.detach().float().cpu().softmax(1)
    confidence, labels = probabilities.max(1)
    # The k-th image of each class comes before any class's (k + 1)-th.
    one_hot = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    rank = (one_hot.cumsum(0) * one_hot).sum(1)
    chosen = (rank * probabilities.shape[1] + labels).argsort()[:count]
    chosen = chosen[labels[chosen].argsort(stable=True)]

    longest = max(images.shape[2:])
    scale = min(max(1, 64 // longest), LARGEST / longest)
    height, width = (max(1, round(side * scale)) for side in _picture(images[0]).shape[1:])
    caption, margin, columns = 14, 4, 10
    rows = -(-len(chosen) // columns)
    # A narrow image leaves its caption the room that a square one has.
    cell_w, cell_h = max(width, min(height, 56)) + margin, height + caption + margin
    sheet = Image.new("RGB", (columns * cell_w + margin, max(rows, 1) * cell_h + margin), "white")
    draw = ImageDraw.Draw(sheet)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    for place, index in enumerate(chosen.tolist()):
        picture = _picture(images[index])
        low, high = picture.min(), picture.max()
        picture = ((picture - low) / (high - low).clamp_min(1e-8) * 255).round().to(torch.uint8)
        tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        tile = tile.resize((width, height), how)
        row, column = divmod(place, columns)
        x, y = margin + column * cell_w, margin + row * cell_h
        sheet.paste(tile, (x, y))
        text = f"{labels[index]}  {100 * confidence[index]:.0f} %"
        draw.text((x + 2, y + height + 1), text, fill="black")
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _picture(image: Tensor) -> Tensor:
    """An image [C, H, W] in the three colours [3, H, W'] in which it is shown."""
    if len(image) in (3, 4):
        return image[:3]
    return torch.cat([*image[:3]], dim=1).expand(3, -1, -1)
