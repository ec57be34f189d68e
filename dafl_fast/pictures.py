"""Grids of the images that a run generates."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .files import write_atomically

# The most pixels that a side of an image takes in a grid.
LARGEST = 256


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
