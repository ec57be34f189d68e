"""What a file or folder from somebody else may do: whether its author is trusted, and what is
in an archive, as torch's own reader sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Trust(NamedTuple):
    """What the user has said of what others have written.

    Attributes:
        run: code that a run's folder names may be imported (--trust-run).
        program: TorchScript may do more than compute on tensors (--trust-teacher).
    """

    run: bool = False
    program: bool = False


NO_TRUST = Trust()


class NeedsCode(Exception):
    """Reading the file can run code; the message names what in it can."""


@contextmanager
def opened_archive(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """torch's reader of an archive, and the names of its entries.

    torch finds entries whatever the case of their letters. So two names that differ in nothing else
    would let a check read one entry, and torch another.

    Raises:
        NeedsCode: there are two such names.
        RuntimeError: it is no archive of torch.
    """
    reader: Any = torch._C.PyTorchFileReader(str(path))
    names: list[str] = reader.get_all_records()
    if len({name.lower() for name in names}) != len(names):
        raise NeedsCode("entries of equal names")
    yield reader, names
