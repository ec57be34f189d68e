"""The texts with gaps in assets/*.j2."""

from __future__ import annotations

from typing import Any

import jinja2

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("dafl_fast", "assets"),
    autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
)  # fmt: skip


def render(template: str, values: dict[str, Any]) -> str:
    """The template of that name, filled in; in HTML, whatever comes from files is escaped."""
    return _ENVIRONMENT.get_template(template).render(values)
