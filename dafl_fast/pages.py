"""The page about a run, and the one that compares several, as one HTML file.

The file holds all it shows and runs no script, so it can be opened from disk, mailed and kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from .charts import PERCENT, Line, bars, chart, number
from .files import write_text
from .records import Run, grid, spread, step_of
from .settings import Mark, plain
from .templates import render

_AGREEMENTS = {"agreement_training": "images it learns from", "agreement_newest": "newest images"}
GRIDS = 8  # grids of images in a report of one run
EMPTY = "—"

# The curves of a run: title, keys in metrics.jsonl with their labels, the setting of its weight if
# it is a loss with one, whether in per cent. Several runs are compared by the first key.
CURVES: tuple[tuple[str, dict[str, str], str | None, bool], ...] = (
    ("Accuracy on held-out images", {"accuracy": "student"}, None, True),
    ("Agreement with the teacher", _AGREEMENTS, None, True),
    ("Estimated agreement on real images", {"estimated_agreement": ""}, None, True),
    ("Distillation loss", {"distill_loss": ""}, None, False),
    ("Generator loss, weighted sum", {"generator_loss": ""}, None, False),
    ("One-hot loss", {"one_hot": ""}, "one_hot", False),
    ("Entropy loss", {"entropy": ""}, "entropy", False),
    ("Activation loss", {"activation": ""}, "activation", False),
    ("BatchNorm loss", {"bn_statistics": ""}, "bn_statistics", False),
    ("Diversity loss", {"diversity": ""}, "diversity", False),
    ("Adversarial loss", {"adversarial": ""}, "adversarial", False),
    ("Images per second", {"images_per_second": ""}, None, False),
)


def curves(runs: Sequence[Run]) -> list[Markup]:
    """All charts that the runs have values for."""
    one = len(runs) == 1
    names = [""] if one else [run.name for run in runs]
    charts = []
    for title, keys, weight, percent in CURVES:
        scale = 100.0 if percent else 1.0
        shown = list(keys.items())[: None if one else 1]
        lines = [
            Line(label if one else run.name, run.curve(key, scale), i)
            for i, (run, (key, label)) in enumerate(itertools.product(runs, shown))
        ]
        teacher = runs[0].summary.get("teacher_accuracy")
        if one and "accuracy" in keys and teacher is not None:
            end = runs[0].rows[-1]["train_seconds"]
            lines.append(Line("teacher", [(0, 100 * teacher), (end, 100 * teacher)], 1, True))
        if one and weight:
            title = f"{title}, weight {getattr(runs[0].config, weight):g}"
        charts.append((title, lines, percent))
    balance = [Line(name, run.classes(), i) for i, (name, run) in enumerate(zip(names, runs))]
    charts.append(("Class balance: effective number of classes", balance, False))
    made = []
    for title, lines, percent in charts:
        lines = [line for line in lines if line.points]
        # The BatchNorm and the adversarial loss are zero throughout when they are off.
        if any(y for line in lines if not line.level for _, y in line.points):
            made.append(chart(title, lines, percent))
    if one and (counts := runs[0].last("class_counts")):
        made.append(bars("Class balance of the newest images", counts))
    if one and (counts := runs[0].last("images_class_counts")):
        made.append(bars("Class balance of the images not generated", counts))
    return made


class Table(NamedTuple):
    """Rows of cells under a heading; `marked` cells (row, column) stand out."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False
    marked: Set[tuple[int, int]] = frozenset()


def percentage(value: float | None) -> str:
    return EMPTY if value is None else f"{100 * value:.2f}{PERCENT}"


def setting(value: Any) -> str:
    """A setting as it would be typed, roughly."""
    if value is None:
        return EMPTY
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(setting, value))
    return str(value)


def settings_of(run: Run) -> dict[str, str]:
    """All settings but those that name the folder."""
    values = plain(run.config, without=Mark.OWN_FOLDER)
    return {name: setting(value) for name, value in values.items()}


def cards(run: Run) -> list[tuple[str, str, str]]:
    """The figures that come first: label, value, remark."""
    summary = run.summary
    seconds = summary.get("train_seconds", run.rows[-1]["train_seconds"])
    speed = summary.get("images_per_second", run.last("images_per_second"))
    teacher = summary.get("teacher_accuracy")
    found = [
        ("Student", percentage(run.accuracy), "accuracy on held-out images"),
        ("Teacher", percentage(teacher), "accuracy on the same images"),
        ("Agreement", percentage(run.agreement), f"same class, {run.agreed_on}"),
        ("Training", f"{seconds:,.0f} s", f"{run.rows[-1]['step']:,} steps"),
    ]
    if run.estimate is not None:
        estimate, low, high = run.estimate
        remark = f"agreement on real images, {100 * low:.0f} to {100 * high:.0f}"
        found.insert(2, ("Estimate", percentage(estimate), remark))
    if speed is not None:
        found.append(("Speed", f"{speed:,.0f}", "images per second"))
    if summary:
        small, large = summary["student_parameters"], summary["teacher_parameters"]
        remark = f"parameters; teacher {large:,}, {large / max(small, 1):,.1f} times as many"
        found.append(("Student size", f"{small:,}", remark))
    return [card for card in found if card[1] != EMPTY]


SUMMARY = {
    "recipe": "Recipe", "preset": "Preset", "teacher": "Teacher", "student": "Student",
    "teacher_accuracy": "Accuracy of the teacher", "student_accuracy": "Accuracy of the student",
    "estimated_agreement": "Estimated agreement on real images",
    "agreement_held_out": "Agreement on images it never learned from",
    "agreement_fresh": "Agreement on fresh images", "eval_set": "Held-out images",
    "eval_count": "Number of held-out images", "steps": "Generator steps",
    "generator_images": "Images the generator learned from",
    "student_images": "Images the student learned from",
    "images": "Images without labels", "images_share": "Share of them in its batches",
    "train_seconds": "Seconds of training",
    "evaluation_seconds": "Seconds of evaluation", "saving_seconds": "Seconds of saving",
    "wall_seconds": "Seconds in all", "images_per_second": "Images per second",
    "device": "Device", "precision": "Precision", "processes": "Processes",
    "cuda_graph": "CUDA graph", "seed": "Seed", "student_parameters": "Parameters of the student",
    "teacher_parameters": "Parameters of the teacher", "bank_bytes": "Replay bank",
    "peak_host_bytes": "Most memory, host", "peak_device_bytes": "Most memory, device",
    "teacher_sha256": "Teacher's weights, SHA-256", "version": "dafl_fast",
}  # fmt: skip


def figure_of(key: str, value: Any) -> str:
    """A value of summary.json for people."""
    if value is None or isinstance(value, (bool, str)):
        return setting(value)
    if key.endswith("accuracy") or "agreement" in key:
        return percentage(value)
    if key.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,}" if isinstance(value, int) and key != "seed" else number(value)


def _figures(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    return [
        (label, *(figure_of(key, run.summary.get(key)) for run in runs))
        for key, label in SUMMARY.items()
        if any(run.summary.get(key) is not None for run in runs)
    ]


def commands(run: Run) -> list[tuple[str, str]]:
    """How to go on: what for, and the command."""
    folder, config = shlex.quote(str(run.path)), run.config
    found = []
    # The networks of `distill` have no names: its runs go on in Python only.
    if (run.path / "checkpoint.pt").exists() and config.teacher and config.student:
        if run.summary and not run.summary["interrupted"]:
            length = (
                f"--steps {2 * config.steps}" if config.steps is not None
                else f"--max-seconds {2 * (config.max_seconds or 60):g}"
            )  # fmt: skip
            found.append(("Train on, to twice the length", f"train --resume {folder} {length}"))
        elif "stopped" not in run.rows[-1]:
            found.append(("Go on where it stopped", f"train --resume {folder}"))
    if (run.path / "student.safetensors").exists() and config.student:
        # Those MNIST images come with a package.
        data = "mnist-5k" if config.preset in ("mnist", "hintonnet") else config.preset
        if data != "custom":
            found.append(("Evaluate the student", f"evaluate {folder} --data {data}"))
        found.append(("Export the student", f"export {folder} --format onnx"))
    found.append(("Write this page again", f"report {folder}"))
    lines = [(what, f"python -m dafl_fast.{line}") for what, line in found]
    if (run.path / "tensorboard").is_dir():
        lines.append(("See it in TensorBoard", f"tensorboard --logdir {folder}/tensorboard"))
    return lines


def _flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += [(f"{key}: {name}", text) for name, text in _flat(value)]
        else:
            rows.append((key.replace("_", " "), setting(value)))
    return rows


def page_of_run(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    mine, defaults = settings_of(run), settings_of(dataclasses.replace(run, config=run.defaults))
    differing = [(k, v, defaults[k]) for k, v in mine.items() if v != defaults[k]]
    usual = [(name, value) for name, value in mine.items() if value == defaults[name]]
    head, differing = ("setting", "this run", "recipe"), differing or [("none", EMPTY, EMPTY)]
    tables = [
        Table("Summary", (), _figures([run])),
        Table("Settings that differ from the recipe's", head, differing),
        Table("All other settings", (), usual, folded=True),
        Table("Environment", (), _flat(run.environment), folded=True),
    ]
    pictures = [grid(path, step_of(path)) for path in spread(run.grids(), GRIDS)]
    if run.images_grid.exists():
        pictures.append(grid(run.images_grid, "images that no generator made"))
    return {
        "title": run.name,
        "kind": f"{run.config.preset}, recipe {run.config.recipe}",
        "run": run,
        "percentage": percentage,
        "cards": cards(run),
        "charts": curves([run]),
        "grids": [picture for picture in pictures if picture],
        "tables": tables,
        "commands": commands(run),
    }


def page_of_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows of several runs."""
    names = [run.name for run in runs]
    settings = [settings_of(run) for run in runs]
    rows = [(name, *(values[name] for values in settings)) for name in settings[0]]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if row not in differing]
    odd = {  # cells that differ from the first run's
        (i, j) for i, row in enumerate(differing) for j in range(2, len(row)) if row[j] != row[1]
    }
    best = max(runs, key=lambda run: run.accuracy or 0)
    many = "setting differs" if len(differing) == 1 else "settings differ"
    words = f"{len(runs)} runs, {len(differing)} {many}."
    if best.accuracy is not None:
        words += f" The most accurate student is that of {best.name}: {percentage(best.accuracy)}."
    pictures = [grid(paths[-1], f"{run.name}, {step_of(paths[-1])}")
                for run in runs if (paths := run.grids())]  # fmt: skip
    return {
        "title": " · ".join(names) if len(names) <= 3 else f"{len(names)} runs",
        "kind": "comparison of runs",
        "run": None,
        "verdict": words,
        "cards": [(run.name, *_in_short(run)) for run in runs],
        "charts": curves(runs),
        "grids": [picture for picture in pictures if picture],
        "tables": [
            Table("Settings that differ", ("setting", *names), differing, marked=odd),
            Table("Summaries", ("", *names), _figures(runs)),
            Table("Settings that are the same", (), same, folded=True),
        ],
        "commands": [],
    }  # fmt: skip


def _in_short(run: Run) -> tuple[str, str]:
    """The figure by which a run is known, and a remark."""
    remark = f"{run.rows[-1]['step']:,} steps in {run.rows[-1]['train_seconds']:,.0f} s"
    if run.accuracy is None:
        return percentage(run.agreement), f"agreement, no held-out images; {remark}"
    return percentage(run.accuracy), f"accuracy, agreement {percentage(run.agreement)}; {remark}"


def page_of_result(run: Run) -> str:
    """A run in short, as a piece of HTML for a notebook: its figures, its first curves, and the
    newest grid of generated images."""
    pictures = [grid(path, step_of(path)) for path in run.grids()[-1:]]
    values = {
        "run": run,
        "cards": cards(run),
        "charts": curves([run])[:4],
        "grids": [picture for picture in pictures if picture],
    }
    return render("result.html.j2", values)


def write_report(path: Path, out: Path | None = None) -> Path:
    """Writes the report of the run in the folder `path`, into it when `out` is not given.

    Raises:
        UserError: there is no run, it has no metrics yet, or the file cannot be written.
    """
    out = out or path / "report.html"
    write_text(out, render("report.html.j2", page_of_run(Run.read(path))))
    return out


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Writes the comparison of the runs in the folders `paths` to `out`; raises as
    `write_report` does."""
    runs = [Run.read(path) for path in paths]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    write_text(out, render("report.html.j2", page_of_runs(runs)))
    return out
