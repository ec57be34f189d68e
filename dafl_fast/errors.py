"""How a mistake reaches the person at the keyboard: one clear sentence and an exit code."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable

from . import _C

_MOST = 1000  # characters of a message
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a disk, for any reason
_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


class UserError(Exception):
    """Something that the user can put right; its message is one full sentence.

    What a stranger has written may be part of it: it is made printable here, for every terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class TrainingStopped(RuntimeError):
    """Training cannot usefully go on (collapse, non-finite losses); the message says why."""


def command(main: Callable[[], int | None]) -> Callable[[], int]:
    """Wraps a command's `main`: expected errors become one line on stderr and exit code 2. A reader
    that has gone, as in `... | head`, ends it without a word."""

    @functools.wraps(main)
    def run() -> int:
        _print_anything()
        try:
            log_to_stderr()
            _check_instruction_set()
            code = main() or 0
            if sys.stdout is not None:  # there is none under `>&-`
                sys.stdout.flush()
            return code
        except (UserError, TrainingStopped) as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            _say_no_more()
            return 128 + signal.SIGPIPE
        except OSError as error:
            if error.filename is not None or error.errno not in _FULL:
                raise
            _say_no_more()
            print(f"error: the output could not be written: {error.strerror}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            if not memory_is_full(error):
                raise
            print(
                f"error: the memory is full ({printable(first_line(error))}); smaller images, "
                "batches, networks or a smaller replay bank take less",
                file=sys.stderr,
            )
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run


def _print_anything() -> None:
    """Lets no print fail because a terminal's encoding lacks a letter, such as that of a path."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # none, or not a text file
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _check_instruction_set() -> None:
    """Raises UserError if DAFL_FAST_ISA names none that this machine has."""
    try:
        _C.build_info()
    except RuntimeError as error:
        raise UserError(first_line(error)) from error


def _say_no_more() -> None:
    """Nor is there a reader, or space, for what Python still has to write when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def memory_is_full(error: Exception) -> bool:
    """Whether `error` says that no more memory is to be had, on the host or on a GPU."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


class _PlainLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def log_to_stderr() -> None:
    """Lets a command show warnings, as lines that any terminal can show. Of several processes that
    torchrun started the first one speaks for all."""
    # This handler asks for sys.stderr at each message: a live line has another one.
    handler = logging.lastResort or logging.StreamHandler()
    handler.setFormatter(_PlainLines("%(message)s"))
    if os.environ.get("RANK", "0") != "0":
        handler.setLevel(logging.ERROR)
    logging.basicConfig(handlers=[handler])


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


def first_line(error: BaseException) -> str:
    """What `error` says, as far as it fits into one sentence."""
    try:
        text = str(error)
    except Exception:  # that of a user's own class
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "weights_only" in text:  # torch advises to read the file in a way that runs what is in it
        _, found, reason = text.partition("WeightsUnpickler error: ")
        lines = [reason.strip().splitlines()[0] if found else "it holds more than tensors"]
    return lines[0] if lines else type(error).__name__


def printable_lines(text: str) -> str:
    """`text` with each of its lines as `printable` has it."""
    return "\n".join(map(printable, text.splitlines()))


def printable(text: str) -> str:
    """`text` as one line that any terminal can show: no control characters, and not endless."""
    line = " ".join(text.split()) if not text.isprintable() else text
    if len(line) > _MOST:
        line = f"{line[: _MOST // 2]} ... {line[-_MOST // 2 :]}"
    return line if line.isprintable() else "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in line
    )  # fmt: skip
