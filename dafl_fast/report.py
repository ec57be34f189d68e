"""`python -m dafl_fast.report`: one run, or several side by side, as one HTML file.

The file holds all it shows and runs no script, so it can be opened from disk, mailed and kept.
Curves are SVG made here and not pictures by matplotlib: they stay sharp on any screen, follow the
reader's light or dark colours, and every run gets them whatever is installed.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import tyro
from markupsafe import Markup

from .config import Config
from .engine.folder import read_config
from .errors import UserError, command
from .files import write_text
from .recipes import make_config

GRIDS = 8  # grids of images in a report of one run,
GRID_BYTES = 200_000  # each of about so many bytes at most: the file stays below 3 MB
COLOURS = 8  # of curves, in the template's style sheet
EMPTY = "—"
PERCENT = "\N{NO-BREAK SPACE}%"

# The curves of a run: title, keys in metrics.jsonl with their labels, the weight's setting if it
# is a loss with one, whether the values are shares. Several runs are compared by the first key.
CURVES: tuple[tuple[str, dict[str, str], str | None, bool], ...] = (
    ("Accuracy on held-out images", {"accuracy": "student"}, None, True),
    (
        "Agreement with the teacher",
        {"agreement": "images it learns from", "agreement_newest": "newest images"},
        None,
        True,
    ),
    ("Distillation loss", {"distill_loss": ""}, None, False),
    ("Generator loss, weighted sum", {"generator_loss": ""}, None, False),
    ("One-hot loss", {"one_hot": ""}, "one_hot", False),
    ("Entropy loss", {"entropy": ""}, "entropy", False),
    ("Activation loss", {"activation": ""}, "activation", False),
    ("BatchNorm loss", {"bn_statistics": ""}, "bn_statistics", False),
    ("Adversarial loss", {"adversarial": ""}, "adversarial", False),
    ("Images per second", {"images_per_second": ""}, None, False),
)


@dataclass
class Run:
    """What the folder of a run says.

    Attributes:
        config: all settings.
        defaults: those that its preset and recipe have by themselves.
        rows: of metrics.jsonl.
        summary: empty while the run goes on, or when it was stopped without one.
        name: the folder's.
    """

    path: Path
    config: Config
    defaults: Config
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]
    name: str

    @classmethod
    def read(cls, path: Path) -> Run:
        """The run in the folder `path`, finished or not.

        Raises:
            UserError: there is none, or it has no metrics yet.
        """
        config = Config(**read_config(path))
        rows = [*_rows(path / "metrics.jsonl")]
        if not rows:
            raise UserError(f"the run in {path} has no metrics yet: nothing to report")
        summary = _json(path / "summary.json")
        # A run that was resumed and then killed still has the summary of its first part.
        if summary.get("steps", -1) < rows[-1]["step"]:
            summary = {}
        return cls(
            path, config, make_config(config.preset, config.recipe), rows, summary,
            _json(path / "environment.json"), path.resolve().name,
        )  # fmt: skip

    def curve(self, key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        """(seconds of training, `scale` times the value) of every row that has `key`."""
        return [(row["train_seconds"], scale * row[key]) for row in self.rows if key in row]

    def last(self, key: str) -> Any:
        """The newest value of `key` among the rows of metrics; None when there is none."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    @property
    def accuracy(self) -> float | None:
        """Of the student, 0..1, as last measured."""
        return self.summary["student_accuracy"] if self.summary else self.last("accuracy")

    @property
    def agreement(self) -> float | None:
        """With the teacher on generated images, 0..1, as last measured."""
        return self.summary["agreement"] if self.summary else self.last("agreement")

    def classes(self) -> list[tuple[float, float]]:
        """(seconds, effective number of classes): the exponential of the entropy of p̄.

        The entropy loss is Σ p̄ log p̄, so with classes equally probable it is their number.
        """
        return [(t, self.config.log_base**-loss) for t, loss in self.curve("entropy")]

    def grids(self) -> list[Path]:
        """The PNG grids of generated images, oldest first."""
        found = (self.path / "samples").glob("step-*.png")
        return sorted(path for path in found if path.stem.removeprefix("step-").isdigit())


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of metrics.jsonl; the last may be half written."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"step", "train_seconds"} <= row.keys():
            yield row


# --- curves and bars as SVG -------------------------------------------------------------------

# Units of the SVGs, which are shown at about this size on a phone and up to half as large again
# elsewhere: text in them keeps its size.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 10, 10, 26


@dataclass
class Line:
    """A curve: points (seconds, value), and how it is named and drawn."""

    label: str
    points: list[tuple[float, float]]
    colour: int = 0
    level: bool = False  # a level to compare with, of one value

    def thinned(self, most: int = 300) -> list[tuple[float, float]]:
        """At most `most` points, each the mean of as many neighbours."""
        size = -(-len(self.points) // most)
        groups = [self.points[i : i + size] for i in range(0, len(self.points), size)]
        return [(sum(x) / len(x), sum(y) / len(y)) for x, y in (zip(*group) for group in groups)]


def ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers within [low, high]."""
    least = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(least))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2 and 5 times a power of ten within [low, high]; of many, every third."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return found if len(found) < 6 else [x for x in found if f"{x:e}".startswith("1.0")] or found


def number(value: float, unit: str = "") -> str:
    """A number for people, in four digits."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text}{unit}".replace("-", "−")


def chart(title: str, lines: Sequence[Line], percent: bool = False) -> Markup:
    """A figure of curves over the seconds of training, with its last values in the legend.

    The vertical axis is logarithmic where positive values span more than a factor of ten.
    """
    values = [y for line in lines for _, y in line.points]
    end = max(x for line in lines for x, _ in line.points)
    unit = PERCENT if percent else ""
    name, seconds = next(
        (name, seconds) for name, seconds, most in
        (("s", 1, 300), ("min", 60, 3 * 3600), ("h", 3600, math.inf)) if end <= most
    )  # fmt: skip
    low, high = min(values), max(values)
    logarithmic = not percent and low > 0 and high > 10 * low
    if high - low < 1e-6 * max(abs(high), 1e-6):
        margin = max(abs(high), 1e-6) * 0.05
        low, high = low - margin, high + margin
    end = max(end, 1e-9)

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / end

    def y_of(y: float) -> float:
        a, b, c = (math.log(v) for v in (low, y, high)) if logarithmic else (low, y, high)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (b - a) / (c - a)

    parts = []
    for value in log_ticks(low, high) if logarithmic else ticks(low, high):
        at = f"{y_of(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 5}" y="{at}">{number(value, unit)}</text>')
    for time in ticks(0, end / seconds):
        at = f"{x_of(time * seconds):.1f}"
        label = number(time) + (f" {name}" if time == 0 else "")
        parts.append(f'<text class="x" x="{at}" y="{HEIGHT - BOTTOM + 15}">{label}</text>')
    for line in lines:
        points = [(x_of(x), y_of(y)) for x, y in line.thinned()]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = "dashed" if line.level or line.colour >= COLOURS else ""
        colour = f"c{line.colour % COLOURS} {dash}"
        parts.append(f'<path class="line {colour}" d="M{path}"/>')
        if len(points) <= 16 and not line.level:
            parts += [
                f'<circle class="{colour}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5">'
                f"<title>{number(y, unit)} after {number(x)} s</title></circle>"
                for x, y in line.points
            ]
    legend = Markup("").join(
        Markup('<span><i class="key c{} {}"></i>{} <b>{}</b></span> ').format(
            line.colour % COLOURS, "level" if line.level else "", line.label or "at the end",
            number(line.points[-1][1], unit),
        )
        for line in lines
    )  # fmt: skip
    return _figure(title + (", logarithmic" if logarithmic else ""), legend, parts)


def bars(title: str, counts: Sequence[int]) -> Markup:
    """A figure of how many images belong to each class; of more than 100, sorted by number."""
    present, total = sum(count > 0 for count in counts), sum(counts)
    shown = list(counts) if len(counts) <= 100 else sorted(counts, reverse=True)[:present]
    top = max(*shown, 1)
    wide = (WIDTH - LEFT - RIGHT) / len(shown)
    base = HEIGHT - BOTTOM
    tall = (base - TOP - 10) / top
    path = "".join(
        f"M{LEFT + wide * (i + 0.1):.1f} {base}v{-count * tall:.1f}h{wide * 0.8:.2f}V{base}"
        for i, count in enumerate(shown)
    )
    even = base - total / len(counts) * tall
    parts = [
        f'<path class="bars" d="{path}"/>',
        f'<path class="line dashed" d="M{LEFT} {even:.1f}H{WIDTH - RIGHT}"/>',
        f'<text class="y" x="{LEFT - 5}" y="{even:.1f}">{number(total / len(counts))}</text>',
    ]
    if len(counts) > 20:  # no room for a number above each bar
        parts.append(f'<text class="y" x="{LEFT - 5}" y="{base - top * tall:.1f}">{top}</text>')
    if len(counts) > 100:
        label = f"classes, the most frequent first ({present:,} of {len(counts):,})"
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="x" x="{middle}" y="{base + 15}">{label}</text>')
    every = 1 if len(counts) <= 20 else 10
    for i in range(0, len(counts) if len(counts) <= 100 else 0, every):
        at = f"{LEFT + wide * (i + 0.5):.1f}"
        parts.append(f'<text class="x" x="{at}" y="{base + 15}">{i}</text>')
        if every == 1 and wide > 14:
            above = base - counts[i] * tall - 4
            parts.append(f'<text class="x" x="{at}" y="{above:.1f}">{counts[i]}</text>')
    legend = Markup("<span>of {:,} images, classes present <b>{:,} of {:,}</b></span>").format(
        total, present, len(counts)
    )
    return _figure(title, legend, parts)


def _figure(title: str, legend: Markup, parts: Sequence[str]) -> Markup:
    """`parts` are SVG made of numbers and of words of our own."""
    return Markup(
        '<figure><figcaption><strong>{}</strong><div class="legend">{}</div></figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(title, legend, WIDTH, HEIGHT, title, Markup("".join(parts)))


def curves(runs: Sequence[Run]) -> list[Markup]:
    """All charts that the runs have values for."""
    charts = []
    for title, keys, weight, percent in CURVES:
        scale = 100.0 if percent else 1.0
        if len(runs) == 1:
            (run,) = runs
            lines = [
                Line(label, run.curve(key, scale), i) for i, (key, label) in enumerate(keys.items())
            ]
            teacher = run.summary.get("teacher_accuracy")
            if "accuracy" in keys and teacher is not None:
                end = run.rows[-1]["train_seconds"]
                lines.append(Line("teacher", [(0, 100 * teacher), (end, 100 * teacher)], 1, True))
            if weight:
                title = f"{title}, weight {getattr(run.config, weight):g}"
        else:
            key = next(iter(keys))
            lines = [Line(run.name, run.curve(key, scale), i) for i, run in enumerate(runs)]
        charts.append((title, lines, percent))
    places = enumerate(runs)
    names = [""] if len(runs) == 1 else [run.name for run in runs]
    balance = [Line(names[i], run.classes(), i) for i, run in places]
    charts.append(("Class balance: effective number of classes", balance, False))
    made = []
    for title, lines, percent in charts:
        lines = [line for line in lines if line.points]
        # The BatchNorm and the adversarial loss are zero throughout when they are off.
        if any(y for line in lines if not line.level for _, y in line.points):
            made.append(chart(title, lines, percent))
    if len(runs) == 1 and (counts := runs[0].last("class_counts")):
        made.append(bars("Class balance of the newest images", counts))
    return made


# --- pictures ---------------------------------------------------------------------------------


@dataclass
class Grid:
    """A grid of generated images for the page: its caption, its size in pixels, and itself."""

    caption: str
    width: int
    height: int
    uri: str


def grid(path: Path, caption: str) -> Grid | None:
    """The picture in `path`, smaller if it is large; None when it cannot be read."""
    from PIL import Image

    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(path) as picture:
            width, height = picture.size
            if len(data) > GRID_BYTES:
                picture.thumbnail((1024, 1024))
                buffer = io.BytesIO()
                picture.convert("RGB").save(buffer, "jpeg", quality=85)
                data, kind = buffer.getvalue(), "jpeg"
                width, height = picture.size
    except OSError:
        return None
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Grid(caption, width, height, uri)


def spread(paths: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of the paths, evenly spread, the first and the last among them."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def _step_of(path: Path) -> str:
    return f"step {int(path.stem.removeprefix('step-')):,}"


# --- the page ---------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows of cells under a heading; `marked` cells (row, column) stand out."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False
    marked: set[tuple[int, int]] = field(default_factory=set)


def share(value: float | None) -> str:
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
    values = dataclasses.asdict(run.config)
    return {k: setting(v) for k, v in values.items() if k not in ("resume", "out_dir")}


def verdict(run: Run) -> str:
    """In one or two sentences, how far the student is."""
    summary, accuracy = run.summary, run.accuracy
    parts = []
    if not summary and (reason := run.rows[-1].get("stopped")):
        parts.append(f"Stopped at step {run.rows[-1]['step']:,}: {reason}.")
    elif not summary:
        parts.append(f"Not finished: this is how it stood at step {run.rows[-1]['step']:,}.")
    elif summary["interrupted"]:
        parts.append(f"Interrupted after step {summary['steps']:,}.")
    agreement = f"agrees with its teacher on {share(run.agreement)} of generated images"
    if accuracy is None:
        parts.append(f"The student {agreement}; no held-out images were given.")
    elif not summary:
        parts.append(f"The student last had an accuracy of {share(accuracy)}, and {agreement}.")
    else:
        teacher = summary["teacher_accuracy"]
        side = "below" if accuracy < teacher else "above"
        parts.append(
            f"The student has an accuracy of {share(accuracy)} on {summary['eval_count']:,} "
            f"held-out images, {100 * abs(teacher - accuracy):.2f} points {side} its teacher's "
            f"{share(teacher)}, and {agreement}."
        )
    return " ".join(parts)


def cards(run: Run) -> list[tuple[str, str, str]]:
    """The figures that come first: label, value, remark."""
    summary = run.summary
    seconds = summary.get("train_seconds", run.rows[-1]["train_seconds"])
    speed = summary.get("images_per_second", run.last("images_per_second"))
    teacher = summary.get("teacher_accuracy")
    found = [
        ("Student", share(run.accuracy), "accuracy on held-out images"),
        ("Teacher", share(teacher), "accuracy on the same images"),
        ("Agreement", share(run.agreement), "same class, generated images"),
        ("Training", f"{seconds:,.0f} s", f"{run.rows[-1]['step']:,} steps"),
    ]
    if speed is not None:
        found.append(("Speed", f"{speed:,.0f}", "images per second"))
    if summary:
        small, large = summary["student_parameters"], summary["teacher_parameters"]
        found.append(("Student size", f"{small:,}", f"parameters; teacher {large:,}"))
    return [card for card in found if card[1] != EMPTY]


SUMMARY = {
    "recipe": "Recipe", "preset": "Preset", "teacher": "Teacher", "student": "Student",
    "teacher_accuracy": "Accuracy of the teacher", "student_accuracy": "Accuracy of the student",
    "agreement": "Agreement on generated images", "eval_set": "Held-out images",
    "eval_count": "Number of held-out images", "steps": "Generator steps",
    "generator_images": "Images the generator learned from",
    "student_images": "Images the student learned from", "train_seconds": "Seconds of training",
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
    if key.endswith("accuracy") or key == "agreement":
        return share(value)
    if key.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,}" if isinstance(value, int) and key != "seed" else number(value)


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
    recipe = f"{run.config.preset}, recipe {run.config.recipe}"
    usual = [(name, value) for name, value in mine.items() if value == defaults[name]]
    shown = [
        (label, figure_of(key, run.summary[key]))
        for key, label in SUMMARY.items()
        if run.summary.get(key) is not None
    ]
    head = ("setting", "this run", "recipe")
    tables = [
        Table("Summary", (), shown),
        Table(
            "Settings that differ from the recipe's", head, differing or [("none", EMPTY, EMPTY)]
        ),
        Table("All other settings", (), usual, folded=True),
        Table("Environment", (), _flat(run.environment), folded=True),
    ]
    pictures = [grid(path, _step_of(path)) for path in spread(run.grids(), GRIDS)]
    return {
        "title": run.name,
        "kind": recipe,
        "verdict": verdict(run),
        "cards": cards(run),
        "charts": curves([run]),
        "grids": [picture for picture in pictures if picture],
        "tables": tables,
        "commands": commands(run),
    }


def page_of_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows of several runs."""
    names = [run.name for run in runs]
    figures = [
        (label, *(figure_of(key, run.summary.get(key)) for run in runs))
        for key, label in SUMMARY.items()
        if any(run.summary.get(key) is not None for run in runs)
    ]
    settings = [settings_of(run) for run in runs]
    rows = [(name, *(values[name] for values in settings)) for name in settings[0]]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    best = max(runs, key=lambda run: run.accuracy or 0)
    many = "setting differs" if len(differing) == 1 else "settings differ"
    words = f"{len(runs)} runs, {len(differing)} {many}."
    if best.accuracy is not None:
        words += f" The most accurate student is that of {best.name}: {share(best.accuracy)}."
    pictures = [grid(paths[-1], f"{run.name}, {_step_of(paths[-1])}")
                for run in runs if (paths := run.grids())]  # fmt: skip
    return {
        "title": " · ".join(names) if len(names) <= 3 else f"{len(names)} runs",
        "kind": "comparison of runs",
        "verdict": words,
        "cards": [(run.name, *_in_short(run)) for run in runs],
        "charts": curves(runs),
        "grids": [picture for picture in pictures if picture],
        "tables": [
            Table("Settings that differ", ("setting", *names), differing, marked=_odd(differing)),
            Table("Summaries", ("", *names), figures),
            Table(
                "Settings that are the same", (),
                [row[:2] for row in rows if row not in differing], folded=True,
            ),
        ],
        "commands": [],
    }  # fmt: skip


def _in_short(run: Run) -> tuple[str, str]:
    """The figure by which a run is known, and a remark."""
    remark = f"{run.rows[-1]['step']:,} steps in {run.rows[-1]['train_seconds']:,.0f} s"
    if run.accuracy is None:
        return share(run.agreement), f"agreement, no held-out images; {remark}"
    return share(run.accuracy), f"accuracy, agreement {share(run.agreement)}; {remark}"


def _odd(rows: Sequence[Sequence[str]]) -> set[tuple[int, int]]:
    """Places of cells that differ from the first run's."""
    return {(i, j) for i, row in enumerate(rows) for j in range(2, len(row)) if row[j] != row[1]}


def render(page: dict[str, Any]) -> str:
    """The page as HTML; whatever comes from files is escaped."""
    source = (files("dafl_fast") / "assets" / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source).render(page)


def write_report(path: Path, out: Path | None = None) -> Path:
    """Writes the report of the run in the folder `path`, into it when `out` is not given.

    Raises:
        UserError: there is no run, it has no metrics yet, or the file cannot be written.
    """
    out = out or path / "report.html"
    write_text(out, render(page_of_run(Run.read(path))))
    return out


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Writes the comparison of the runs in the folders `paths` to `out`.

    Raises:
        UserError: as `write_report`.
    """
    runs = [Run.read(path) for path in paths]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    write_text(out, render(page_of_runs(runs)))
    return out


@dataclass(frozen=True)
class ReportConfig:
    """Write a page about a run, or one that compares several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """The HTML file; report.html in the run's folder, or comparison.html, when not given."""


@command
def main() -> int:
    config = tyro.cli(ReportConfig, prog="python -m dafl_fast.report")
    if not config.runs:
        raise UserError("name the folder of a run, or of several: python -m dafl_fast.report RUN")
    if len(config.runs) == 1:
        print(write_report(config.runs[0], config.out))
    else:
        print(write_comparison(config.runs, config.out or Path("comparison.html")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
