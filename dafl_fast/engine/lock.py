"""Locks: one process at a time trains a run or a teacher, or makes a table.

The operating system ends a lock with the process that holds it. The file says which one that is, so
that a lock from another machine, which this one cannot see, is recognised too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock `path`, a file that is made for it. `what` says what others are kept from, as
    in "the run in runs/1 is being trained".

    Raises:
        UserError: another process holds it, or one on another machine has not given it back.
    """
    with _opened(path, what) as file:
        holder = _holder(file)  # one on this machine has ended, or it would still be locked
        if holder.get("machine", _machine()) != _machine():
            raise _held(path, what, holder)
        try:
            _sign(file, path)
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may be gone by now
                if _is_at(path, file):
                    path.unlink()


def _opened(path: Path, what: str) -> Any:
    """The lock's file, locked if its file system can do that."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"the lock {path} cannot be made: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserError(f"the lock {path} is no file; remove it")
        file = os.fdopen(handle, "r+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                raise _held(path, what, _holder(file)) from error
        except OSError as error:
            if (holder := _holder(file)) and _is_alive(holder):
                raise _held(path, what, holder) from error
            log.warning(
                "the file system of %s has no locks (%s): see that no other process writes there",
                path.parent, error.strerror,
            )  # fmt: skip
        with contextlib.suppress(FileNotFoundError):
            if _is_at(path, file):
                return file
        file.close()  # whoever held it has just removed it


def _sign(file: Any, path: Path) -> None:
    """Writes who holds the lock into its file."""
    holder = json.dumps({"process": os.getpid(), "machine": _machine()})
    try:
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), holder.encode(), 0)  # nothing is left for when it is closed
    except OSError as error:
        raise UserError(f"the lock {path} cannot be written: {error.strerror}") from error


def _is_at(path: Path, file: Any) -> bool:
    return os.path.samestat(path.stat(), os.fstat(file.fileno()))


def _holder(file: Any) -> dict[str, Any]:
    """The process and its machine that the file names; empty if it names none."""
    file.seek(0)
    with contextlib.suppress(OSError, ValueError, RecursionError):
        holder = json.loads(file.read(1000))
        if isinstance(holder, dict) and isinstance(holder.get("process"), int):
            return holder
    return {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder, if it was on this machine, still runs."""
    try:
        os.kill(holder["process"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return holder["process"] not in (0, os.getpid())


def _machine() -> str:
    return socket.gethostname()


def _held(path: Path, what: str, holder: dict[str, Any]) -> UserError:
    machine = str(holder.get("machine", _machine()))[:60]
    who = f"process {holder['process']}" if holder else "another process"
    if machine == _machine():
        return UserError(f"{what} by {who} on this machine; wait until it ends, or stop it")
    return UserError(
        f"{what} by {who} on the machine {machine!r}; if that has ended, remove {path}"
    )
