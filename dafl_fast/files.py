"""Reading and writing weights, checkpoints and texts. Writes are atomic: no file is ever half
written. Whatever goes wrong while a file is read becomes one sentence (`reading`)."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError, first_line, memory_is_full

LONGEST = 2**24  # bytes of a text that is read whole: settings, notes and summaries are short


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a temporary file, in a folder of its own beside `path` as some libraries
    have temporary files themselves, then renames that to `path` at once.

    A crash at any moment leaves the old file or the new one. `write` may raise UserError.

    Raises:
        UserError: the file could not be written (disk full, no permission); the old one is kept.
    """
    check_destination(path)
    place: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{_begin(path)}{secrets.token_hex(4)}")
        fresh.mkdir()
        place, temporary = fresh, fresh / "new"
        place.chmod(0o700)  # whatever the umask leaves
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # less the umask
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        os.chmod(temporary, mode)  # safetensors has its own idea of it
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        _sync(path.parent, os.O_RDONLY)
    except UserError:
        raise
    except Exception as error:  # torch, safetensors and others have their own for a full disk
        reason = error.strerror if isinstance(error, OSError) and error.strerror else None
        reason = reason or first_line(error)
        raise UserError(
            f"could not write {path}: {reason}; what was there before is kept"
        ) from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def check_destination(path: Path) -> None:
    """Raises UserError if `path` is there and no file: a device would be replaced by one."""
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "folder" if os.path.isdir(path) else "pipe or a device"
        raise UserError(f"could not write {path}: it is a {kind}, and must be a file")


def _begin(path: Path) -> str:
    """How the names of temporary folders for `path` begin; 8 hexadecimal digits follow."""
    return f".{path.name[:60]}."


def remove_leftovers(*paths: Path) -> None:
    """Removes what processes have left that were killed while they wrote one of these files. Nobody
    else may be writing them."""
    for path in paths:
        with contextlib.suppress(OSError):  # such as no folder yet
            for name in os.listdir(path.parent):
                begin = _begin(path)
                if name.startswith(begin) and re.fullmatch(r"[0-9a-f]{8}", name[len(begin) :]):
                    discard(path.with_name(name))


def discard(left: Path) -> None:
    """Removes a temporary folder, or a temporary file as older versions had them."""
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left)
    else:
        left.unlink(missing_ok=True)


def _sync(path: Path, how: int) -> None:
    """Waits until the file, or the names in the folder, are on the disk."""
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Atomic `path.write_text`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Writes a state dict as safetensors, atomically."""
    write_atomically(path, lambda temporary: write_weights(temporary, state))


def write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Writes a state dict as safetensors, inside of `write_atomically`."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        # Tied weights: safetensors refuses to store the same memory under two names.
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    save_file(tensors, path)


def check_file(path: Path, what: str) -> None:
    """Raises UserError unless `path` is a regular file; from a pipe or a device a read might never
    end. `what` ("teacher file") names it."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"the {what} {path} does not exist") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the {what} {path} cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"the {what} {path} is {kind}, and must be a file")


@contextlib.contextmanager
def reading(path: Path, what: str, wrong: str = "cannot be read") -> Iterator[None]:
    """Around all that is done to read `path`; `what` ("teacher file") names it.

    Raises:
        UserError: it is no file, or whatever goes wrong inside, in one sentence: the what, its
            path, `wrong`, and the reason. Only full memory stays what it is.
    """
    check_file(path, what)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise anything for damaged files
        if memory_is_full(error):
            raise
        raise UserError(f"the {what} {path} {wrong}: {first_line(error)}") from error


def read_text(path: Path, what: str = "file", longest: int = LONGEST) -> str:
    """The text in a file of at most `longest` bytes.

    Raises:
        UserError: there is no such file, it is longer, or no UTF-8.
    """
    with reading(path, what), path.open("rb") as file:
        content = file.read(longest + 1)
        if len(content) > longest:
            raise UserError(f"the {what} {path} is longer than {longest:,} bytes")
        return content.decode()


def read_json(path: Path, what: str = "file") -> dict[str, Any]:
    """The object in a JSON file; raises UserError as `read_text` does, or if there is none."""
    text = read_text(path, what)
    with reading(path, what):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise UserError(f"the {what} {path} cannot be read: it holds no object")
    return content


def load_tensors(path: Path, role: str) -> dict[str, Tensor]:
    """Reads a safetensors file; `role` ("teacher") names it in messages.

    Raises:
        UserError: no such file, or not a readable safetensors file.
    """
    from safetensors.torch import load_file

    with reading(path, f"{role} file", "is not a readable safetensors file"):
        return load_file(path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts of tensors and plain values; readable with `weights_only=True`."""
    write_atomically(path, lambda temporary: save_at_once(torch.save, state, temporary))


def save_at_once(save: Callable[[Any, io.BytesIO], object], what: Any, path: Path) -> None:
    """Lets torch's `save` write to memory, and writes that. On a disk that becomes full, torch's
    own writer ends the process (its destructor raises)."""
    buffer = io.BytesIO()
    save(what, buffer)
    path.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; all tensors are on the CPU.

    Raises:
        UserError: no such file, or it is not a checkpoint.
    """
    if not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path} to resume from")
    with reading(path, "checkpoint"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("it holds no settings and weights")
    return content
