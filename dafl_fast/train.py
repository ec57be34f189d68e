"""`python -m dafl_fast.train`: distil a student without data, from the command line."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path

import tyro

from .config import Config, make_config
from .distill import train
from .engine.folder import check_resumed, read_config
from .errors import UserError, command
from .progress import Progress, describe

_EPILOG = "The preset, when given, comes first: python -m dafl_fast.train mnist --recipe paper"


def parse(arguments: list[str]) -> Config:
    """The Config for a command line: preset and recipe, or the run that is
    resumed, choose the defaults of all the rest."""
    resumed = _value_of(arguments, "--resume")
    if resumed is not None:
        try:
            defaults = Config(**read_config(Path(resumed)), resume=Path(resumed))
        except UserError as error:
            raise UserError(f"--resume: {error}") from error
    else:
        preset = _value_of(arguments, "--preset") or "mnist"
        if arguments and not arguments[0].startswith("-"):
            preset, arguments = arguments[0], arguments[1:]
        defaults = make_config(preset, _value_of(arguments, "--recipe") or "fast")
    if _value_of(arguments, "--steps") or _value_of(arguments, "--max-seconds"):
        defaults = dataclasses.replace(defaults, steps=None, max_seconds=None)
    config: Config = tyro.cli(
        Config,
        prog="python -m dafl_fast.train",
        description=f"{Config.__doc__}\n\n{_EPILOG}",
        default=defaults,
        args=arguments,
    )
    if resumed is not None:
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
