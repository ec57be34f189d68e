"""A user's own code: what `package.module:attribute` or `/path/nets.py:attribute` names."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

# By folder, the modules that files in it have imported from it, by their names.
_BESIDE: dict[Path, dict[str, ModuleType]] = {}


def imported(name: str) -> Any:
    """The object that `name` means. A file is imported once, and can import what lies beside it.

    Raises:
        Exception: whatever the code raises while it is imported.
    """
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        module = _file(Path(where))
    else:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        where, _, attribute = name.partition(":")
        module = importlib.import_module(where)
    return attrgetter(attribute)(module)


def _file(path: Path) -> ModuleType:
    path = path.expanduser().resolve(strict=True)
    # A name that no other module has, however many files are called nets.py.
    name = f"dafl_fast_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importing_from(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Imports look into `folder` first, and do not find what lies beside files of other folders: a
    teacher's blocks.py is not the student's."""
    foreign = {name for other, names in _BESIDE.items() if other != folder for name in names}
    hidden = {name: sys.modules.pop(name) for name in foreign & sys.modules.keys()}
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in sys.modules.keys() - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and folder in Path(file).parents:
                _BESIDE.setdefault(folder, {})[name] = sys.modules[name]
        for name, module in hidden.items():
            sys.modules.setdefault(name, module)
