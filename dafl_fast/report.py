"""`python -m dafl_fast.report`: one run, or several side by side, as one HTML file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from .errors import UserError, command
from .pages import write_comparison, write_report


@dataclass(frozen=True)
class ReportConfig:
    """Write a page about a run, or one that compares several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """The HTML file; report.html in the run's folder, or comparison.html, when not given."""


@command
def main() -> None:
    config = tyro.cli(ReportConfig, prog="python -m dafl_fast.report")
    if not config.runs:
        raise UserError("name the folder of a run, or of several: python -m dafl_fast.report RUN")
    if len(config.runs) == 1:
        print(write_report(config.runs[0], config.out))
    else:
        print(write_comparison(config.runs, config.out or Path("comparison.html")))


if __name__ == "__main__":
    sys.exit(main())
