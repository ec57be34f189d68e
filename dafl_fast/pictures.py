"""Grids of the images that a run generates."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .files import write_atomically


def save_samples(path: Path, images: Tensor, logits: Tensor, count: int = 40) -> None:
    """Writes a PNG grid of images [N, C, H, W] with the teacher's label and confidence.

    The teacher's logits are [N, num_classes]. `count` images at most are shown, spread evenly over
    the classes that it sees in them and sorted by class; grey values are stretched over each
    image's own range.
    """
    from PIL import Image, ImageDraw

    images, probabilities = images.detach().float().cpu(), logits.detach().float().cpu().softmax(1)
    confidence, labels = probabilities.max(1)
    # The k-th image of each class comes before any class's (k + 1)-th.
    one_hot = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    rank = (one_hot.cumsum(0) * one_hot).sum(1)
    chosen = (rank * probabilities.shape[1] + labels).argsort()[:count]
    chosen = chosen[labels[chosen].argsort(stable=True)]

    scale = max(1, 64 // images.shape[-1])
    size, caption, margin, columns = images.shape[-1] * scale, 14, 4, 10
    rows = -(-len(chosen) // columns)
    cell_w, cell_h = size + margin, size + caption + margin
    sheet = Image.new("RGB", (columns * cell_w + margin, max(rows, 1) * cell_h + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen.tolist()):
        picture = images[index][:3] if images.shape[1] >= 3 else images[index][:1].expand(3, -1, -1)
        low, high = picture.min(), picture.max()
        picture = ((picture - low) / (high - low).clamp_min(1e-8) * 255).round().to(torch.uint8)
        tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).resize(
            (size, size), Image.Resampling.NEAREST
        )
        row, column = divmod(place, columns)
        x, y = margin + column * cell_w, margin + row * cell_h
        sheet.paste(tile, (x, y))
        text = f"{labels[index]}  {100 * confidence[index]:.0f} %"
        draw.text((x + 2, y + size + 1), text, fill="black")
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))
