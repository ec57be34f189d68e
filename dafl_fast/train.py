"""`python -m dafl_fast.train`: distil a student without data, from the command line."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

from .config import Config
from .distill import train
from .engine.folder import check_resumed, read_config
from .errors import UserError, command
from .recipes import make_config
from .settings import from_arguments

_NOTE = "The preset, when given, comes first: python -m dafl_fast.train mnist --recipe paper"


def parse(arguments: list[str]) -> Config:
    """The Config for a command line: preset and recipe choose the defaults of all the rest."""
    folder = _value_of(arguments, "--resume")
    if folder is not None:
        try:
            defaults = Config(**read_config(Path(folder)), resume=Path(folder))
        except UserError as error:
            raise UserError(f"--resume: {error}") from error
    else:
        preset = _value_of(arguments, "--preset") or "mnist"
        if arguments and not arguments[0].startswith("-"):
            preset, arguments = arguments[0], arguments[1:]
        defaults = make_config(preset, _value_of(arguments, "--recipe") or "fast")
    if _value_of(arguments, "--steps") or _value_of(arguments, "--max-seconds"):
        defaults = dataclasses.replace(defaults, steps=None, max_seconds=None)
    config = from_arguments(Config, defaults, arguments, "python -m dafl_fast.train", _NOTE)
    if config.resume is not None:
        check_resumed(config)
    return config


def _value_of(arguments: list[str], flag: str) -> str | None:
    """What stands behind `flag`, as `--flag value` or `--flag=value`."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            if equals:
                return value
            return arguments[index + 1] if index + 1 < len(arguments) else None
    return None


class Progress:
    """A live line on a terminal; silent elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

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
            f"S {row['distill_loss']:.3f} · agreement {row['agreement']:.1%}{self.accuracy}"
        )
        self.bar.update(self.task, completed=min(row["done"], 1.0), text=text)


def describe(summary: dict[str, Any]) -> str:
    """The summary in a few lines for people."""
    lines = [
        f"{summary['steps']:,} steps in {summary['train_seconds']:.1f} s of training "
        f"({summary['images_per_second']:,.0f} images/s, {summary['precision']} on "
        f"{summary['device']}), {summary['wall_seconds']:.1f} s in all"
    ]
    if summary["student_accuracy"] is not None:
        lines.append(
            f"student {summary['student_accuracy']:.2%}, teacher "
            f"{summary['teacher_accuracy']:.2%} on {summary['eval_count']:,} held-out images "
            f"({summary['eval_set']})"
        )
    lines.append(f"agreement with the teacher on generated images {summary['agreement']:.2%}")
    lines.append(
        f"student of {summary['student_parameters']:,} parameters (teacher "
        f"{summary['teacher_parameters']:,}): {summary['run']}/student.safetensors"
    )
    page = Path(summary["run"], "report.html")
    if page.exists():
        lines.append(f"the run at a glance: {page}")
    if summary["interrupted"]:
        again = f"python -m dafl_fast.train --resume {summary['run']}"
        lines.append(f"interrupted; go on with: {again}")
    return "\n".join(lines)


@command
def main() -> int:
    config = parse(sys.argv[1:])
    logging.basicConfig(format="%(message)s")
    progress = Progress()
    with progress.bar:
        summary = train(config, progress)
    if os.environ.get("RANK", "0") == "0":  # one voice for all processes that torchrun started
        print(describe(summary))
    return 130 if summary["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
