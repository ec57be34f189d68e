"""Whether a TorchScript program only computes on tensors.

TorchScript is a language of its own: it can write files, and go on for ever. A program's archive
has its source, which looks like Python. It is read here before torch loads the file, because parts
of a program (`__setstate__`) run while it is loaded. The sizes of its tensors are compared with
what the archive holds, because torch takes them as they stand, and would read beyond it.
"""

from __future__ import annotations

import ast
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch

from .exported_check import FILES
from .trust import NeedsCode, opened_archive

# Of ops.NAME; "torch" are those of aten.
_OPERATORS = frozenset((
    "aten", "prim", "prims", "quantized", "_quantized", "quantized_decomposed", "sparse", "mkldnn",
    "mkldnn_prepacked", "prepacked", "onednn", "torchvision", "dafl_fast",
))  # fmt: skip
_CLASSES = frozenset(("quantized", "sparse", "rnn", "xnnpack", "mkldnn"))  # of torch.classes.NAME
_DENIED = frozenset((*FILES, "fork", "awaitable", "rpc_sync", "rpc_async", "rpc_remote"))
_ROOTS = frozenset(("torch", "ops", "__torch__"))
# Quantised layers keep packed weights, and unpack them when they are loaded.
_PACKED = ("code/__torch__/torch/ao/nn/", "code/__torch__/torch/nn/quantized/")
_MOST = 1_000_000  # passes through a loop


def check_script(path: Path) -> None:
    """Checks the source of all modules and functions in the file, and the sizes of its tensors.

    Raises:
        NeedsCode: the message says what it does besides computing on tensors.
        RuntimeError: the file is damaged.
    """
    with opened_archive(path) as (archive, names):
        for name in names:
            if name.lower() in ("data.pkl", "constants.pkl"):
                _Pickle(archive, name).check()
            if name.lower().startswith("code/") and name.lower().endswith(".py"):
                try:
                    tree = ast.parse(archive.get_record(name).decode())
                    for what in _doubtful(tree, name.startswith(_PACKED)):
                        raise NeedsCode(what)
                except (SyntaxError, ValueError, RecursionError, MemoryError):
                    raise NeedsCode(f"has source in {name!r} that cannot be checked") from None


class _Thing(list):  # type: ignore[type-arg]
    """Stands for any object in a pickle: keeps nothing, and runs nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class _Pickle(pickle.Unpickler):
    """Follows a pickle in an archive, and makes nothing but the sizes of its tensors."""

    def __init__(self, archive: Any, name: str) -> None:
        super().__init__(io.BytesIO(archive.get_record(name)))
        self._archive, self._folder, self._name = archive, name.removesuffix(".pkl"), name

    def check(self) -> None:
        """Raises RuntimeError if a tensor has more numbers than are there for it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a storage's dtype is deprecated
                self.load()
        except Exception as error:  # whatever a damaged pickle leads to
            raise RuntimeError(f"{self._name} in it is damaged ({error})") from error

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_qtensor"):
            return self._check_tensor
        if module.startswith("torch._utils") or module in ("torch._tensor", "torch.nested"):
            raise ValueError(f"a tensor made by {name}")
        return type(name, (_Thing,), {})

    def persistent_load(self, pid: Any) -> int:
        """How many numbers a storage has; raises ValueError if the archive has not as many."""
        _, kind, record, _, count = pid
        size = self._archive.get_record_size(f"{self._folder}/{record}")
        if not 0 <= count * getattr(torch, kind.__name__).dtype.itemsize <= size:
            raise ValueError("a storage is too short")
        return int(count)

    def _check_tensor(self, count: int, offset: int, size: Any, stride: Any, *_: Any) -> None:
        if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
            raise ValueError("the sizes of a tensor")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        if 0 not in size and last >= count:
            raise ValueError("a tensor is larger than its storage")


def _doubtful(tree: ast.Module, packed: bool) -> Iterator[str]:
    """What the program does besides computing on tensors, in words."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.While) and not _is_counted(node):
            yield "has a loop without a bound"
        elif isinstance(node, ast.For):
            for part in ast.walk(node.iter):
                if isinstance(part, ast.Constant) and isinstance(part.value, int):
                    if part.value > _MOST:
                        yield f"has a loop of {part.value:,} passes"
        elif isinstance(node, ast.FunctionDef):
            if node.name in ("__setstate__", "__getstate__") and not packed:
                yield f"runs code while it is loaded ({node.name})"
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in _DENIED:
                yield f"calls {ast.unparse(node)[:60]!r}"
            if id(node) not in inner and (wrong := _wrong_name(node)):
                yield f"uses {wrong[:60]!r}"


def _wrong_name(node: ast.expr) -> str | None:
    """The whole name, as ops.image.write_file, if it is of nothing that only computes."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in _ROOTS:
        return None
    parts.insert(0, node.id)
    right = len(parts) > 1 and parts[:2] != ["torch", "ops"]
    if parts[0] == "ops":
        right = len(parts) > 2 and parts[1] in _OPERATORS
    elif "torch.classes" in (".".join(parts[:2]), ".".join(parts[1:3])):
        right = parts[parts.index("classes") + 1 :][:1] in [[name] for name in _CLASSES]
    return None if right else ".".join(parts)


def _is_counted(loop: ast.While) -> bool:
    """Whether a loop ends after a number of passes that is known when it begins. TorchScript writes
    a `for` with `return` or `break` in it like this:

        while more:
          ...
          next = torch.add(count, 1)
          go_on = torch.__and__(torch.lt(next, passes), ...)
          more, count = go_on, next
    """
    *body, last = loop.body
    stored = [node.id for node in ast.walk(loop) if _is_stored(node)]
    once = {name for name in stored if stored.count(name) == 1}
    values: dict[str, ast.expr] = {}
    for line in body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            if line.targets[0].id in once:
                values[line.targets[0].id] = line.value
    if not isinstance(last, ast.Assign) or not isinstance(loop.test, ast.Name):
        return False
    targets, carried = last.targets[0], last.value
    if not isinstance(targets, ast.Tuple) or not isinstance(carried, ast.Tuple):
        return False
    new = dict(zip(map(ast.unparse, targets.elts), carried.elts))

    def called(node: ast.expr | None, name: str) -> list[ast.expr]:
        """The arguments of `node`, or of what it stands for, if it is a call of that name."""
        if isinstance(node, ast.Name):
            node = values.get(node.id)
        is_it = isinstance(node, ast.Call) and ast.unparse(node.func) == f"torch.{name}"
        return node.args if is_it else []  # type: ignore[union-attr]

    go_on = new.get(loop.test.id)
    for test in (go_on, *called(go_on, "__and__")):
        if (
            len(compared := called(test, "lt")) == 2
            and len(added := called(compared[0], "add")) == 2
        ):
            count, passes = added[0], compared[1]
            known = isinstance(passes, ast.Constant) and passes.value <= _MOST  # type: ignore[operator]
            known = known or (isinstance(passes, ast.Name) and passes.id not in stored)
            counted = ast.unparse(new.get(ast.unparse(count), loop)) == ast.unparse(compared[0])
            if known and counted and ast.unparse(added[1]) == "1" and {ast.unparse(count)} <= once:
                return True
    return False


def _is_stored(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
