"""What a run says to people while it lasts, wherever they look, and a few lines at its end."""

from __future__ import annotations

import contextlib
import html
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from .config import Config
from .engine.loop import parameters_of
from .engine.step import Step
from .errors import UserError, printable
from .networks.names import is_code
from .templates import render

if TYPE_CHECKING:
    from rich.console import Console

Mode = bool | Literal["auto", "on", "off"]

FIRST, SELDOM = 5.0, 60.0  # seconds until the first plain line, and between two at most


class Progress:
    """What a run says while it lasts: a context manager, and a callback for its rows of metrics.

    On a terminal and in a notebook it is one line that keeps changing. Elsewhere, as in a pipe or a
    log file, it is a plain line on stderr now and then: the first after 5 seconds, the next ones
    more and more seldom, but at least once a minute, and one at the end.

    Args:
        mode: "auto", "on" or True for that; "off" or False for nothing at all.

    Raises:
        UserError: another mode.
    """

    def __init__(self, mode: Mode = "auto") -> None:
        if mode not in ("auto", "on", "off", True, False):
            raise UserError(f'progress must be "auto", "on" or "off", got {mode!r}')
        self._silent = mode in ("off", False)
        self._accuracy: float | None = None
        self._display: _Display | None = None

    def __enter__(self) -> Progress:
        if not self._silent:
            self._display = _display()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._display is not None:
            with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
                self._display.close(failed=kind is not None)

    def announce(self, config: Config, teacher: nn.Module, step: Step) -> None:
        """Says what is about to happen."""
        if self._display is not None:
            self._display.say(printable(headline(config, teacher, step)))

    def begin(self) -> None:
        """Says that training begins, which may take a while to its first row of metrics."""
        if self._display is not None:
            self._display.begin()

    def __call__(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics.jsonl."""
        if "class_counts" in row:  # an evaluation
            self._accuracy = row.get("accuracy", self._accuracy)
        elif self._display is not None:
            self._display.show(min(row["done"], 1.0), figures(row, self._accuracy))

    def end(self, summary: dict[str, Any]) -> None:
        """Says what has come of it, given the content of summary.json."""
        if self._display is not None:
            self._display.end(not summary["interrupted"], printable(outcome(summary)))


def headline(config: Config, teacher: nn.Module, step: Step) -> str:
    """What a run is about to do, in one line."""
    names = [
        config.teacher or type(teacher).__name__,
        config.student or type(step.student).__name__,
    ]
    large, small = (f"{parameters_of(network):,}" for network in (teacher, step.student))
    threads = torch.get_num_threads()
    where = ["the CPU", step.precision, f"{threads} thread{'s' * (threads > 1)}"]
    if step.device.type == "cuda":
        where = [torch.cuda.get_device_name(step.device), step.precision]
    if step.world.size > 1:
        where.append(f"{step.world.size} processes")
    length = [
        *([f"{config.steps:,} steps"] if config.steps is not None else []),
        *([f"{config.max_seconds:g} s"] if config.max_seconds is not None else []),
    ]
    given = f", with {step.found.words}" if step.found is not None else ""
    return (
        f"distilling {names[0]} ({large} parameters) into {names[1]} ({small}) on "
        f"{', '.join(where)}, {' or '.join(length)}{given}"
    )


def figures(row: dict[str, Any], accuracy: float | None) -> str:
    """The figures of a row of losses and the accuracy as last measured, in one line."""
    done = min(row["done"], 1.0)
    begun = "agreement_training" in row  # before, the bank gets its first images
    found = [f"agreement {row['agreement_training']:.1%}"] if begun else []
    if 0 < done < 1:  # seconds and share are those of the whole run, also of a resumed one
        left = timedelta(seconds=round(row["train_seconds"] * (1 - done) / done))
        found.insert(0, f"{left} left")
    if accuracy is not None:
        found.append(f"accuracy {accuracy:.2%}")
    found += [
        f"step {row['step']:,}",
        f"{row['steps_per_second']:.1f} steps/s",
        *([f"generator loss {row['generator_loss']:.3f}"] if "generator_loss" in row else []),
        *([f"student loss {row['distill_loss']:.3f}"] if begun else []),
    ]
    return " · ".join(found)


def outcome(summary: dict[str, Any]) -> str:
    """What has come of a run, in one line."""
    found = [
        f"{'interrupted after ' * summary['interrupted']}{summary['steps']:,} steps in "
        f"{summary['train_seconds']:.1f} s",
        f"agreement {summary['agreement_fresh']:.2%}",
    ]
    if summary.get("estimated_agreement") is not None:
        low, high = summary["estimated_between"]
        found[1] = (
            f"agreement on real images about {summary['estimated_agreement']:.1%} "
            f"({low:.1%} to {high:.1%})"
        )
    if summary["student_accuracy"] is not None:
        teacher = summary["teacher_accuracy"]
        found.append(f"accuracy {summary['student_accuracy']:.2%} (teacher {teacher:.2%})")
    return ", ".join([*found, summary["run"]])


def describe(summary: dict[str, Any]) -> str:
    """The summary in a few lines for people."""
    page = Path(summary["run"], "report.html")
    own_code = any(is_code(summary.get(role) or "") for role in ("teacher", "student"))
    return render("summary.txt.j2", {**summary, "page": page, "own_code": own_code}).rstrip()


class _Display(Protocol):
    """Where the lines go."""

    def say(self, line: str) -> None:
        """Shows a line that stays."""

    def begin(self) -> None:
        """Shows that training has begun."""

    def show(self, done: float, text: str) -> None:
        """Shows how the run stands: the share that is done, and its figures."""

    def end(self, complete: bool, text: str) -> None:
        """Shows what has come of it."""

    def close(self, failed: bool) -> None:
        """Called at last, also if the run has `failed`."""


def _display() -> _Display:
    from rich.console import Console  # only where something is shown

    console = Console(stderr=True)
    if console.is_jupyter:
        return _Notebook()
    # rich also takes a file for a terminal if the environment says FORCE_COLOR.
    if console.is_terminal and console.file.isatty() and not console.is_dumb_terminal:
        return _Terminal(console)
    return _Lines()


class _Lines:
    """Plain lines on stderr."""

    def __init__(self) -> None:
        self.start, self.due = time.monotonic(), FIRST

    def say(self, line: str) -> None:
        # A log whose reader has gone does not end the run.
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)

    def begin(self) -> None:
        pass

    def show(self, done: float, text: str) -> None:
        now = time.monotonic() - self.start
        if now >= self.due:
            self.say(f"{done:.0%} · {text}")
            self.due = now + min(max(now / 3, FIRST), SELDOM)

    def end(self, complete: bool, text: str) -> None:
        if self.due > FIRST:  # a run of a few seconds has said nothing so far
            self.say(text)

    def close(self, failed: bool) -> None:
        pass


class _Terminal:
    """rich's live line. What others print to the terminal meanwhile stands above it."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        self.bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:.0f} %"),
            TextColumn(
                "{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True)
            ),
            console=console,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),  # it would come out on stderr
        )
        self.task = self.bar.add_task("preparing", total=None, text="")
        self.bar.start()

    def say(self, line: str) -> None:
        print(line, file=sys.stderr)

    def begin(self) -> None:
        self.bar.update(self.task, description="distilling")

    def show(self, done: float, text: str) -> None:
        self.bar.update(self.task, total=1.0, completed=done, text=text)

    def end(self, complete: bool, text: str) -> None:
        if complete:
            self.bar.update(self.task, description="distilled", total=1.0, completed=1.0, text=text)
        else:
            self.bar.update(self.task, description="stopped", total=1.0, text=text)

    def close(self, failed: bool) -> None:
        self.bar.live.transient = failed  # the message of the error says what there is to say
        self.bar.stop()


class _Notebook:
    """An output of the cell that is rewritten. rich's own needs the package ipywidgets."""

    def __init__(self) -> None:
        from IPython.display import display

        self.said, self.due = "", 0.0
        self.handle: Any = display({"text/plain": "preparing"}, raw=True, display_id=True)

    def say(self, line: str) -> None:
        self.said += f"<div>{html.escape(line)}</div>"
        self._write("preparing", "<progress></progress>")

    def begin(self) -> None:
        self._write("distilling", "<progress></progress>")

    def show(self, done: float, text: str) -> None:
        now = time.monotonic()
        if now >= self.due:
            self._write(f"{done:.0%} · {text}", f'<progress value="{done:.4f}"></progress>')
            self.due = now + 0.5

    def end(self, complete: bool, text: str) -> None:
        self._write(text, '<progress value="1"></progress>' if complete else "")

    def close(self, failed: bool) -> None:
        if failed:
            self._write("stopped")

    def _write(self, text: str, bar: str = "") -> None:
        page = f"{self.said}<div>{bar} {html.escape(text)}</div>"
        self.handle.update({"text/html": page, "text/plain": text}, raw=True)
