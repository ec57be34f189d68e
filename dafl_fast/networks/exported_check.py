"""Whether a program of torch.export can be read without running code that is in it.

torch evaluates some strings of such a file as Python, writes others into source code that it runs,
and unpickles what the file's configurations say. So all of them are held to what torch.export.save
writes for networks of plain operators, before torch loads the file.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from .trust import NeedsCode, opened_archive

# The entries of an archive. Weights and constants were one file each before torch 2.9; these, and
# the sample inputs, are read with `weights_only`.
_ENTRY = re.compile(
    r"archive_format|archive_version|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/(version|serialization_id)|extra/[\w./-]+|models/model\.json"
    r"|data/(weights|constants|sample_inputs)/model\.pt|data/weights/model_weights_config\.json"
    r"|data/constants/model_constants_config\.json|data/weights/weight_\d+"
    r"|data/constants/tensor_\d+"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
# Operators that compute. Those of other packages may do anything.
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized|quantized_decomposed|torchvision|dafl_fast)\.(\w+)(\.\w+)?"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|lt|le|gt|ge|eq|ne|and_|or_|not_"
    r"|xor|lshift|rshift|getitem)"
    r"|torch\.(_?sym_\w+)|math\.(ceil|floor|trunc|sqrt)"
)
# Operators of torch's own that read or write files.
FILES = ("save", "from_file")
_NAME = re.compile(r"\w*")
_PLAIN = re.compile(r"[\w.\-+ :/,<>]*")
_QUOTED = re.compile(r"[^'\"\\\x00-\x1f]*")  # between quotes it stays a string
# What torch writes in formulas for sizes: sympy's classes, its own, and Python in guards.
_FUNCTIONS = frozenset((
    "Add", "Mul", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "IntTrueDiv",
    "FloatTrueDiv", "TruncToInt", "TruncToFloat", "CeilToInt", "FloorToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity", "Where", "ModularIndexing",
    "IsNonOverlappingAndDenseIndicator", "Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality",
    "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And", "Or",
    "Not", "floor", "ceiling", "abs", "max", "min", "int", "float", "round", "torch.sym_max",
    "torch.sym_min", "torch.sym_ite", "torch.sym_not", "torch.sym_float", "torch.sym_int",
    "torch._sym_sqrt", "math.ceil", "math.floor", "math.trunc", "math.sqrt", "math.isnan",
))  # fmt: skip
_POWERS = frozenset(("Pow", "PowByNatural", "FloatPow", "LShift", "RShift"))
_NUMBERS = frozenset(("Integer", "Float", "Rational"))
_SYMBOL = re.compile(r"[A-Za-z_]{1,9}\d+|oo|int_oo|inf|nan|pi|true|false")
_SIZES = frozenset(("size", "stride", "storage_offset", "dim"))
_LONGEST, _HIGHEST, _NESTED = 20_000, 16, 3  # formula, exponent, powers of powers
_SYNTAX = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.USub, ast.UAdd, ast.Not,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq,
    ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.IfExp, ast.Name, ast.Load,
)  # fmt: skip


def check_exported(path: Path) -> None:
    """Checks all of the file that torch evaluates, runs or unpickles.

    Raises:
        NeedsCode: something in it is not what `torch.export.save` writes for a network.
    """
    with opened_archive(path) as (archive, names):
        for name in names:
            if not _ENTRY.fullmatch(name):
                raise NeedsCode(_shown("its entry", name))
        for name in names:
            if name.endswith(".json") and not name.startswith("extra/"):
                try:
                    _check(json.loads(archive.get_record(name)), "")
                except RecursionError:
                    raise NeedsCode(f"the deeply nested {name} in it") from None


def _check(value: Any, key: str, in_node: bool = False) -> None:
    """Checks a part of a JSON file, which stands under `key`, and inside of an operator's node."""
    in_node = in_node or key == "nodes"
    if isinstance(value, dict):
        if key == "metadata":
            return  # where the code was from; torch looks up names in it
        for name, item in value.items():
            if key == "range_constraints":
                check_formula(name)
            elif name == "__enum__":
                raise NeedsCode("a class in it")  # which torch would import
            else:
                _match(_PLAIN, name, "the name")
            _check(item, name, in_node)
    elif isinstance(value, list):
        for item in value:
            _check(item, key, in_node)
    if key == "use_pickle" and value is not False:
        raise NeedsCode("pickled objects in it")
    if key in ("as_custom_obj", "custom_obj", "class_fqn") or (
        key == "custom_obj_values" and value
    ):
        raise NeedsCode("the objects in it")
    if isinstance(value, str):
        _check_text(value, key, in_node)


def _check_text(text: str, key: str, in_node: bool) -> None:
    if key in ("expr_str", "guards_code"):
        check_formula(text)
    elif key in ("target", "as_operator"):
        match = _OPERATOR.fullmatch(text)
        if match is None or match[2] in FILES:
            raise NeedsCode(_shown("the operator", text))
    elif key == "path_name":
        _match(_PAYLOAD, text, "the objects in")
    elif key in ("in_spec", "out_spec", "context"):
        try:
            inner = json.loads(text)
        except ValueError:
            inner = text
        _check(inner, "")
    elif key in ("name", "as_name"):
        _match(_NAME, text, "the name")
    elif key in ("as_string", "as_strings"):
        if not in_node:  # there it is escaped, and is a message with quotes as often as not
            _match(_QUOTED, text, "the text")
    else:
        _match(_PLAIN, text, "the name")


def check_formula(text: str) -> None:
    """Checks that a string which torch evaluates is arithmetic and comparisons of sizes.

    Raises:
        NeedsCode: it is anything else, or would take for ever.
    """
    try:
        if len(text) > _LONGEST or not text.isascii():
            raise ValueError
        _formula(ast.parse(text, mode="eval"), 0)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise NeedsCode(_shown("the formula", text)) from None


def _formula(node: ast.AST, powers: int) -> None:
    """Raises ValueError unless `node`, which is inside of that many powers, is allowed."""
    if isinstance(node, ast.Constant):
        if not isinstance(node.value, (int, float)) or abs(node.value) > 2**64:
            raise ValueError
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        _power(node.left, node.right, powers)
    elif isinstance(node, ast.Call):
        _call(node, powers)
    elif isinstance(node, ast.Subscript):
        _input(node)
    elif isinstance(node, ast.Name) and not _SYMBOL.fullmatch(node.id):
        raise ValueError
    elif isinstance(node, _SYNTAX):
        for child in ast.iter_child_nodes(node):
            _formula(child, powers)
    else:
        raise ValueError


def _call(node: ast.Call, powers: int) -> None:
    name = ast.unparse(node.func)
    values = [keyword.value for keyword in node.keywords]
    if not all(isinstance(value, ast.Constant) and _is_small(value.value) for value in values):
        raise ValueError
    if name == "Symbol":
        if not all(isinstance(a, ast.Constant) and str(a.value).isidentifier() for a in node.args):
            raise ValueError
    elif name in _NUMBERS:
        for argument in node.args:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                float(argument.value)  # ValueError
            else:
                _formula(argument, powers)
    elif name in _POWERS and len(node.args) == 2:
        _power(node.args[0], node.args[1], powers)
    elif name in _FUNCTIONS:
        for argument in node.args:
            _formula(argument, powers)
    else:
        _input(node)


def _is_small(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, int)) and abs(value) <= 64)


def _power(base: ast.expr, exponent: ast.expr, powers: int) -> None:
    """A power of numbers grows beyond all memory; those of sizes have small exponents."""
    if powers == _NESTED:
        raise ValueError
    for node in ast.walk(exponent):
        if isinstance(node, ast.Constant) and not abs(float(node.value)) <= _HIGHEST:  # type: ignore[arg-type]
            raise ValueError
        if isinstance(node, ast.Name) and node.id not in _NUMBERS:
            raise ValueError
        if isinstance(node, ast.BinOp):
            raise ValueError
    _formula(exponent, powers)
    _formula(base, powers + 1)


def _input(node: ast.expr) -> None:
    """Raises ValueError unless `node` is a size of an input, as L['x'].size()[2], or an input."""
    if isinstance(node, ast.Subscript):
        place = node.slice
        if not isinstance(place, ast.Constant) or not re.fullmatch(r"\w+", str(place.value)):
            raise ValueError
        if isinstance(node.value, ast.Name) and node.value.id == "L":
            return
        _input(node.value)
    elif isinstance(node, ast.Call) and not node.args and not node.keywords:
        if not isinstance(node.func, ast.Attribute) or node.func.attr not in _SIZES:
            raise ValueError
        _input(node.func.value)
    else:
        raise ValueError


def _match(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise NeedsCode(_shown(what, text))


def _shown(what: str, text: str) -> str:
    """`what` and the beginning of `text`, which is a stranger's, in one printable line."""
    return f"{what} {text[:60]!r}"
