"""Rules beside the fields of a dataclass of settings:

    steps: Annotated[int | None, POSITIVE, Mark.RESUMABLE] = None

The checks, the bounds in `--help` and the lists of settings for other modules all come from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from numbers import Integral, Real
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from .errors import UserError

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Bound:
    """What a value must be, in words and as a test. None, where a field allows it, is not asked."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Bound("positive", lambda value: value > 0)
NOT_NEGATIVE = Bound("zero or positive", lambda value: value >= 0)
BELOW_ONE = Bound("in [0, 1)", lambda value: 0 <= value < 1)


def at_least(least: int, reason: str = "") -> Bound:
    return Bound(f"at least {least}{f' ({reason})' if reason else ''}", lambda n: n >= least)


BATCH = at_least(2, "BatchNorm needs two images")
THREADS = Bound("auto, or 1 to 4096", lambda number: number == "auto" or 1 <= number <= 4096)
SEED = Bound("between -2^32 and 2^32", lambda seed: abs(seed) <= 2**32)
SEEDS = Bound("between -2^32 and 2^32", lambda seeds: all(map(SEED.holds, seeds)))


class Mark(Enum):
    """What else there is to say of a setting."""

    RESUMABLE = "It may change when a run is resumed: how long, where, and how closely watched."
    OWN_FOLDER = "It is about the run's folder, and is therefore not written into it."
    REPEATED = "On a command line its name stands before each of its values."
    ON_CARD = "A student's model card tells it in words of its own."


# What is accepted for a type (but a bool only for bool), and what that is called.
_KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
    str: ((str, PurePath), "text"),
    Path: ((str, PurePath), "a path"),
}


def check(settings: Any) -> None:
    """Brings every field of a frozen dataclass to its type, and holds it to its bounds.

    Raises:
        UserError: a value has another type or is out of bounds. Infinity and NaN always are.
    """
    for name, (kind, *rules) in _fields(type(settings)).items():
        value = _converted(name, getattr(settings, name), kind)
        object.__setattr__(settings, name, value)
        for rule in rules:
            if isinstance(rule, Bound) and value is not None and not rule.holds(value):
                raise mistake(name, rule.words, value)


def mistake(name: str, wanted: str, got: Any) -> UserError:
    """The sentence for a setting that cannot be what it is."""
    return UserError(f"--{name.replace('_', '-')} must be {wanted}, got {got!r}")


def marked(kind: type, mark: Mark) -> set[str]:
    """The names of the fields of `kind` that bear the mark."""
    return {name for name, (_, *rules) in _fields(kind).items() if mark in rules}


def plain(settings: Any, without: Mark) -> dict[str, Any]:
    """All settings but those with the mark, paths as text, for a file."""
    left_out = marked(type(settings), without)
    values = {name: value for name, value in vars(settings).items() if name not in left_out}
    return {name: _as_text(value) for name, value in values.items()}


def _as_text(value: Any) -> Any:
    """A path as text, also each of several."""
    if isinstance(value, tuple):
        return tuple(map(_as_text, value))
    return str(value) if isinstance(value, Path) else value


def check_unchanged(before: dict[str, Any], settings: Any, place: str, remedy: str = "") -> None:
    """Raises UserError, --NAME cannot change`place` OLD, got NEW`remedy`, if any setting that is
    not `Mark.RESUMABLE` differs from `before`."""
    for name, value in plain(settings, Mark.RESUMABLE).items():
        if before.get(name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} cannot change{place} {before.get(name)}, got {value}"
                f"{remedy}"
            )


def from_arguments(
    kind: type[Settings], default: Settings, arguments: list[str], prog: str, note: str = ""
) -> Settings:
    """The settings on a command line, `default` where that is silent.

    `--help` shows the class's docstring and `note`, and each field's docstring, bounds and default.
    """
    import tyro  # of the commands only

    hints = get_type_hints(kind, include_extras=True)
    for name, (_, *rules) in _fields(kind).items():
        words = "; ".join(rule.words for rule in rules if isinstance(rule, Bound))
        ending = (f"Must be {words}. " if words else "") + "(default: {})"
        hints[name] = Annotated[hints[name], tyro.conf.arg(help_behavior_hint=ending.format)]
        if Mark.REPEATED in rules:
            hints[name] = Annotated[hints[name], tyro.conf.UseAppendAction]
    text = f"{kind.__doc__}\n\n{note}".rstrip()
    names = {"__annotations__": hints, "__module__": kind.__module__}
    told: Any = type(kind.__name__, (kind,), names)  # only its annotations differ, for tyro
    found = tyro.cli(told, prog=prog, description=text, default=default, args=arguments)
    return kind(**vars(found))


def _fields(kind: type) -> dict[str, tuple[Any, ...]]:
    """Of every field its type, and what is annotated to that."""
    hints = get_type_hints(kind, include_extras=True).items()
    return {name: get_args(h) if get_origin(h) is Annotated else (h,) for name, h in hints}


def _converted(name: str, value: Any, kind: Any) -> Any:
    """The value of the setting `name` in the type `kind`."""
    options = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        if value is None and NoneType in options:
            return None
        options = tuple(option for option in options if option is not NoneType)
        several = isinstance(value, (list, tuple))
        named = [option for option in options if get_origin(option) is Literal]
        if any(value in get_args(option) for option in named):
            return value
        options = tuple(option for option in options if option not in named)
        fitting = [option for option in options if (get_origin(option) is tuple) == several]
        return _converted(name, value, (fitting or options)[0])
    if get_origin(kind) is Literal:
        if value in options:
            return value
        raise mistake(name, "one of " + ", ".join(options), value)
    if get_origin(kind) is tuple:
        count = None if Ellipsis in options else len(options)
        if isinstance(value, (list, tuple)) and count in (None, len(value)):
            return tuple(_converted(name, item, options[0]) for item in value)
        raise mistake(name, "a list of values" if count is None else f"{count} values", value)
    accepted, words = _KINDS[kind]
    if isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
        with suppress(OverflowError):  # a whole number beyond all floats
            if kind is int and abs(value) >= 2**63:
                words = "a whole number of 64 bits"
            elif kind is not float or math.isfinite(value):
                return kind(value)
    raise mistake(name, words, value)
