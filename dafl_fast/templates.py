"""The texts with gaps in assets/*.j2."""

from __future__ import annotations

import re
from typing import Any

import jinja2

from .errors import printable

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("dafl_fast", "assets"),
    autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
)  # fmt: skip
# Names from files and folders, in Markdown: they shall be text there, and nothing else.
_ENVIRONMENT.filters["plain"] = lambda name: re.sub(
    r"([\\`*_\[\]<>&|~])", r"\\\1", printable(str(name))
)


def render(template: str, values: dict[str, Any]) -> str:
    """The template of that name, filled in; in HTML, whatever comes from files is escaped."""
    text = _ENVIRONMENT.get_template(template).render(values)
    # Python reads a path that is not of its encoding as letters that UTF-8 does not have.
    return text.encode(errors="backslashreplace").decode()
