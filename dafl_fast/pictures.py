"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import require
from .files import write_atomically


def save_samples(path: Path, images: Tensor, logits: Tensor, count: int = 40) -> None:
    """Writes a PNG grid of images [N, C, H, W] with the teacher's label and confidence.

    The images are spread evenly over the classes that the teacher sees in them, sorted by class;
    grey values are stretched over each image's own range.

    Args:
        path: the PNG file, written atomically.
        logits: the teacher's, [N, num_classes].
        count: images shown at most.
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
        x = margin + (place % columns) * cell_w
        y = margin + (place // columns) * cell_h
        sheet.paste(tile, (x, y))
        text = f"{labels[index]}  {100 * confidence[index]:.0f} %"
        draw.text((x + 2, y + size + 1), text, fill="black")
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def save_comparison(
    path: Path,
    title: str,
    rows: list[dict[str, Any]],
    curves: dict[str, list[list[tuple[float, float]]]],
) -> None:
    """Plots the accuracies of a table beside the paper's, and those of DAFL over time.

    Args:
        path: the PNG file, written atomically.
        title: of the picture.
        rows: each with `label`, `paper` (per cent), `mean` and `sd` (0..1, or None), and `ours`,
            the text for those two.
        curves: by label, a list of (seconds, accuracy 0..1) for each seed.

    Raises:
        UserError: matplotlib is missing.
    """
    require("matplotlib", "the plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.6 + 0.55 * len(rows)), dpi=120, layout="constrained")
    figure.suptitle(title)
    bars, lines = figure.subplots(1, 2)
    places = range(len(rows))
    means = [100 * (row["mean"] or 0) for row in rows]
    spreads = [100 * (row["sd"] or 0) for row in rows]
    papers = [row["paper"] for row in rows]
    for offset, values, errors, texts, colour, whose in (
        (-0.2, papers, [0.0] * len(rows), [f"{x:.2f}" for x in papers], "#b8c4d0", "paper"),
        (0.2, means, spreads, [row["ours"] for row in rows], "#1f5f99", "ours"),
    ):
        heights = [place + offset for place in places]
        drawn = bars.barh(heights, values, 0.38, xerr=errors, color=colour, label=whose)
        bars.bar_label(drawn, texts, padding=4)
    bars.set_yticks(places, [row["label"] for row in rows])
    bars.invert_yaxis()
    bars.set_xlim(0, 140)  # room for the numbers
    bars.set_xticks(range(0, 101, 20))
    bars.set_xlabel("accuracy in %, ± standard deviation over seeds")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    for number, (label, runs) in enumerate(curves.items()):
        for run in runs:
            seconds, accuracies = [x for x, _ in run], [100 * y for _, y in run]
            name = label if run is runs[0] else None
            lines.plot(seconds, accuracies, ".-", color=f"C{number}", label=name)
    lines.set_xlabel("seconds of training")
    lines.set_ylabel("accuracy of DAFL in %, a line a seed")
    lines.grid(alpha=0.3)
    if len(curves) > 1:
        figure.legend(*lines.get_legend_handles_labels(), loc="outside right center")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
