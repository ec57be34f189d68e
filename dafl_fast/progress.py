"""What a run says to people at a terminal: a live line while it lasts, a few lines at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from .templates import render


class Progress:
    """A live line on a terminal; silent elsewhere."""

    def __init__(self) -> None:
        self.bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:.0f} %"),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("distilling", total=1.0, text="starting")
        self.accuracy = ""

    def __call__(self, row: dict[str, Any]) -> None:
        if "class_counts" in row:  # an evaluation
            if "accuracy" in row:
                self.accuracy = f" · accuracy {row['accuracy']:.2%}"
            return
        text = (
            f"step {row['step']} · {row['steps_per_second']:.1f} steps/s · "
            f"{row['images_per_second']:,.0f} images/s · G {row['generator_loss']:.3f} · "
            f"S {row['distill_loss']:.3f} · agreement {row['agreement_training']:.1%}"
            f"{self.accuracy}"
        )
        self.bar.update(self.task, completed=min(row["done"], 1.0), text=text)


def describe(summary: dict[str, Any]) -> str:
    """The summary in a few lines for people."""
    page = Path(summary["run"], "report.html")
    return render("summary.txt.j2", {**summary, "page": page}).rstrip()
