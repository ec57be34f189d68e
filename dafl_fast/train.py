"""`python -m dafl_fast.train`: distil a student without data, from the command line."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

from .config import Config
from .distill import train
from .engine.folder import check_resumed, read_config
from .errors import UserError, command, printable_lines
from .networks import is_code, is_for_mnist
from .progress import describe
from .recipes import PRESETS, make_config
from .settings import from_arguments

_NOTE = (
    "The preset, when given, comes first: python -m dafl_fast.train mnist --recipe paper. Without "
    "one it is mnist, or custom for a teacher of your own."
)


def parse(arguments: list[str]) -> Config:
    """The Config for a command line: preset and recipe choose the defaults of all the rest."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--preset", *arguments]
    _check_place_of_preset(arguments)
    folder = _value_of(arguments, "--resume")
    if folder is not None:
        try:
            defaults = Config(**read_config(Path(folder)), resume=Path(folder))
        except UserError as error:
            raise UserError(f"--resume: {error}") from error
    else:
        preset = _value_of(arguments, "--preset")
        if preset is None:  # a teacher from elsewhere has nothing to do with MNIST
            teacher = _value_of(arguments, "--teacher")
            preset = "mnist" if teacher is None or is_for_mnist(teacher) else "custom"
        defaults = make_config(preset, _value_of(arguments, "--recipe") or "fast")
    if _value_of(arguments, "--steps") or _value_of(arguments, "--max-seconds"):
        defaults = dataclasses.replace(defaults, steps=None, max_seconds=None)
    if _value_of(arguments, "--images"):
        defaults = dataclasses.replace(defaults, images=())
    config = from_arguments(Config, defaults, arguments, "python -m dafl_fast.train", _NOTE)
    if config.resume is not None:
        check_resumed(config)
        config = dataclasses.replace(
            config, trust_run=config.trust_run or _given(config, arguments)
        )
    return config


def _check_place_of_preset(arguments: list[str]) -> None:
    """Raises UserError if the name of a preset stands where no setting takes it."""
    usual = vars(Config())
    for before, word in itertools.pairwise(arguments):
        switch = any(isinstance(usual.get(name), bool) for name in named([before]))
        if word in PRESETS and (switch or "=" in before or not before.startswith("-")):
            raise UserError(
                f"the preset {word} must come first, and be the only one: python -m "
                f"dafl_fast.train {word} ..."
            )


def _given(config: Config, arguments: list[str]) -> bool:
    """Whether all code that the run in a folder names for its networks is on the command line."""
    names = {"--teacher": config.teacher, "--student": config.student}
    return all(
        name is None or not is_code(name) or _value_of(arguments, flag) == name
        for flag, name in names.items()
    )


def _value_of(arguments: list[str], flag: str) -> str | None:
    """What stands behind the last `flag`, as `--flag value` or `--flag=value`."""
    for index in reversed(range(len(arguments))):
        name, equals, value = arguments[index].partition("=")
        if name.replace("_", "-") == flag:
            if equals:
                return value
            return arguments[index + 1] if index + 1 < len(arguments) else None
    return None


def named(arguments: list[str]) -> set[str]:
    """The settings that a command line names, whatever it says of them."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    names = {flag[2:].replace("-", "_") for flag in flags}
    return names | {name.removeprefix("no_") for name in names}


@command
def main() -> int:
    config = parse(sys.argv[1:])
    summary = train(config, chosen=named(sys.argv[1:]))
    if os.environ.get("RANK", "0") == "0":  # one voice for all processes that torchrun started
        print(printable_lines(describe(summary)))
    return 130 if summary["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
