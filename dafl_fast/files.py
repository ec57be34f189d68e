"""Reading and writing weights and checkpoints. Writes are atomic: no file is ever half written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a temporary file beside `path`, then renames that to `path` at once.

    A crash at any moment leaves the old file or the new one.

    Raises:
        UserError: the file could not be written (disk full, no permission); the old one is kept.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its own.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"could not write {path}: {reason}; what was there before is kept"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomic `path.write_text`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Writes a state dict as safetensors, atomically."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        # Tied weights: safetensors refuses to store the same memory under two names.
        shared = any(tensor.data_ptr() == other.data_ptr() for other in tensors.values())
        tensors[name] = tensor.clone() if shared and tensor.numel() else tensor
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def load_tensors(path: Path, role: str) -> dict[str, Tensor]:
    """Reads a safetensors file; `role` ("teacher") names it in messages.

    Raises:
        UserError: no such file, or not a readable safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"the {role} file {path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"the {role} file {path} is not a readable safetensors file: {error}"
        ) from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts of tensors and plain values; readable with `weights_only=True`."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; all tensors are on the CPU.

    Raises:
        UserError: no such file, or it is not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path} to resume from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error}") from error
