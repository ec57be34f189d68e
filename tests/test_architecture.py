"""docs/architecture.md names what is there, and the house keeps the rules that it states."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "dafl_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))


def named_files() -> list[str]:
    """Every `path` on the page; a bare name stands in the folder of the last whole path before it,
    or of its table."""
    found, folder = [], Path()
    for line in PAGE.splitlines():
        if match := re.match(r"Inside `(.+)/`", line):
            folder = Path(match[1])
        for name in re.findall(r"`([\w/.]+(?:/|\.(?:py|h|cpp|inl|cu|md)))`", line):
            if "/" in name.rstrip("/"):
                folder = Path(name).parent if not name.endswith("/") else Path(name)
                found.append(name)
            else:
                found.append(name if name.endswith("/") else str(folder / name))
    return found


def test_what_the_page_names_is_there():
    names = named_files()
    assert len(names) > 50
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_module_has_a_room_on_the_page():
    named = {(ROOT / name).resolve() for name in named_files()}
    # The engine's are listed one by one.
    rooms = named - {PACKAGE, PACKAGE / "engine"}
    missing = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if not path.name.startswith("_") and not ({path, *path.parents} & rooms)
    ]
    assert missing == []


def imports_of(path: Path) -> list[tuple[str, str, bool]]:
    """(module, name, inside a function) of every import of our own modules."""
    package = ["dafl_fast", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name, id(node) in inside) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_keep_the_rules(path):
    imports = imports_of(path)
    assert len(path.read_text().splitlines()) <= 450
    assert [i for i in imports if i[2]] == [], "an import inside a function hides a circle"
    private = [name for _, name, _ in imports if re.match(r"_(?!_|C$)", name)]
    assert private == [], "a private name of another module"
    if path.parent.name == "engine":
        above = ("networks", "report", "pages", "records", "distill", "recipes")
        assert [m for m, n, _ in imports if {*m.split("."), n} & {*above}] == []


def test_the_loop_is_only_the_loop():
    assert len((PACKAGE / "engine" / "loop.py").read_text().splitlines()) <= 400


@pytest.mark.parametrize("folder", ["csrc/cpu", "csrc/cuda"])
def test_kernels_know_nothing_of_torch(folder):
    files = [path for path in (ROOT / folder).iterdir() if path.suffix != ".md"]
    assert len(files) > 5
    for path in files:
        included = re.findall(r'#include [<"](.+)[>"]', path.read_text())
        assert not [name for name in included if name.startswith(("torch", "ATen", "c10"))], path
        assert len(path.read_text().splitlines()) <= 450, path
