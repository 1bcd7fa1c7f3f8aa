"""What all pages share: templates with the same styles and macros."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from floatline.report.need import need
from floatline.report.units import number_text, percent_text


def render_template(name: str, **values: Any) -> str:
    """Fill in a page's template; the macros of figures.html stand before it.

    Args:
        name: File in this package.
        values: What the template shows; all text is escaped.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    jinja2 = need("jinja2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number_text, "percent": percent_text}
    template = environment.from_string(resource("figures.html") + resource(name))
    return str(template.render(style=resource("page.css"), **values))


def resource(name: str) -> str:
    """Return the text of a file of this package."""
    return files("floatline.report").joinpath(name).read_text(encoding="utf-8")
