"""What a run has left in its folder, read for people: settings, metrics, summary, pictures."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .config import Config
from .engine.estimate import FEW_CLASSES
from .engine.folder import read_config, read_environment, read_metrics, read_summary
from .errors import UserError
from .pictures import open_image
from .recipes import make_config

GRID_BYTES = 200_000  # of a grid of images at most, so that a page of eight stays below 3 MB


# What a page shows of a summary, or nothing of it.
_NEEDED = {
    "steps", "train_seconds", "images_per_second", "student_accuracy", "teacher_accuracy",
    "agreement_fresh", "interrupted", "student_parameters", "teacher_parameters", "eval_count",
}  # fmt: skip


def shown(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary, or nothing of one that lacks what pages and cards show."""
    return summary if summary.keys() >= _NEEDED else {}


@dataclass
class Run:
    """What the folder of a run says.

    Attributes:
        defaults: the settings that its preset and recipe have by themselves.
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
        """The run in the folder `path`, finished or not; raises UserError if there is none, or it
        has no metrics yet."""
        config = Config(**read_config(path))
        rows = read_metrics(path)
        if not rows:
            raise UserError(f"the run in {path} has no metrics yet: nothing to report")
        environment, summary = dict[str, Any](), dict[str, Any]()
        with contextlib.suppress(UserError):  # a page shows whatever can be read
            environment = read_environment(path)
            summary = read_summary(path)
        # A run that was resumed and then killed still has the summary of its first part.
        summary = shown(summary)
        if summary and summary["steps"] < rows[-1]["step"]:
            summary = {}
        defaults, name = make_config(config.preset, config.recipe), path.resolve().name
        return cls(path, config, defaults, rows, summary, environment, name)

    def curve(self, key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        """(seconds of training, `scale` times the value) of every row that has `key`."""
        rows = [row for row in self.rows if row.get(key) is not None]
        return [(row["train_seconds"], scale * row[key]) for row in rows]

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
        return self.summary["agreement_fresh"] if self.summary else self.last("agreement_training")

    @property
    def agreed_on(self) -> str:
        """The images that `agreement` is about."""
        alone = self.config.generator == "none"
        return "images that no generator made" if alone else "generated images"

    @property
    def estimate(self) -> tuple[float, float, float] | None:
        """Of the agreement with the teacher on real images, 0..1, and two values between which it
        probably lies; None if there is none."""
        told = self.summary or next((r for r in reversed(self.rows) if "class_counts" in r), {})
        values = [told.get("estimated_agreement"), *(told.get("estimated_between") or [])]
        if [type(value) for value in values] != [float] * 3:  # there is none, or it is damaged
            return None
        estimate, low, high = values
        return estimate, low, high

    @property
    def cannot_tell(self) -> bool:
        """Whether there is no estimate because the images of a class may all be alike."""
        few = self.summary.get("num_classes", FEW_CLASSES + 1) <= FEW_CLASSES
        return few and not self.config.diversity and self.config.generator != "none"

    def classes(self) -> list[tuple[float, float]]:
        """(seconds, effective number of classes): the exponential of the entropy of p̄.

        The entropy loss is Σ p̄ log p̄, so with classes equally probable it is their number.
        """
        return [(t, self.config.log_base**-loss) for t, loss in self.curve("entropy")]

    def grids(self) -> list[Path]:
        """The PNG grids of generated images, oldest first."""
        found = (self.path / "samples").glob("step-*.png")
        return sorted(path for path in found if path.stem.removeprefix("step-").isdigit())

    @property
    def images_grid(self) -> Path:
        """The PNG grid of images that no generator made; there is none without."""
        return self.path / "samples" / "images.png"


class Grid(NamedTuple):
    """A grid of generated images for the page: its caption, its size in pixels, and itself."""

    caption: str
    width: int
    height: int
    uri: str


def grid(path: Path, caption: str) -> Grid | None:
    """The picture in `path`, smaller if it is large; None when it cannot be read."""
    try:
        with open_image(path, ("PNG",)) as picture:
            data, kind = path.read_bytes(), "png"
            width, height = picture.size
            if len(data) > GRID_BYTES:
                picture.thumbnail((1024, 1024))
                buffer = io.BytesIO()
                picture.convert("RGB").save(buffer, "jpeg", quality=85)
                data, kind = buffer.getvalue(), "jpeg"
                width, height = picture.size
    except UserError:
        return None
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Grid(caption, width, height, uri)


def spread(paths: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of the paths, evenly spread, the first and the last among them."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def step_of(path: Path) -> str:
    return f"step {int(path.stem.removeprefix('step-')):,}"
