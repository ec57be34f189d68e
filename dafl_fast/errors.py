"""How a mistake reaches the person at the keyboard: one clear sentence and an exit code."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can put right; its message is one full sentence."""


class TrainingStopped(RuntimeError):
    """Training cannot usefully go on (collapse, non-finite losses); the message says why."""


def command(main: Callable[[], int | None]) -> Callable[[], int]:
    """Wraps a command's `main`: expected errors become one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run() -> int:
        try:
            return main() or 0
        except (UserError, TrainingStopped) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run


def require(module: str, purpose: str, package: str | None = None) -> None:
    """Raises UserError, naming the package to install, unless `module` can be imported.

    `purpose` says what needs it, `package` what brings it, if that has another name.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package {package or module!r}, which cannot be imported "
            f"({error}); run: pip install {package or module}"
        ) from error


def first_line(error: Exception) -> str:
    """What `error` says, as far as it fits into one sentence."""
    return (str(error) or type(error).__name__).splitlines()[0]
