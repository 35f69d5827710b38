"""Rendering of reports as one HTML file.

A page is self-contained: styles, vector figures, images, and one script, which sorts and filters tables and
enlarges images. It makes no network requests, and is complete without the script.
"""

import base64
import hashlib
import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from biopsy.core.text import plural
from biopsy.reporting.document import Picture, ReportDocument, number


def render_report(document: ReportDocument) -> str:
    """Return a report as one self-contained HTML page; all texts are escaped."""
    script = _environment().loader.get_source(_environment(), "report.js")[0]  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render("report.html", report=document, script=Markup(script), script_hash=f"sha256-{digest}")


def render(template: str, **values: object) -> str:
    """Return a page from a template of this package; all texts are escaped."""
    return _environment().get_template(template).render(**values)


def embed(image: bytes) -> str:
    """Return an encoded image as a data URI."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def breakable(text: object) -> Markup:
    """Escape a text and allow line breaks after underscores."""
    return Markup("_<wbr>").join(escape(part) for part in str(text).split("_"))


def mark_code(text: object) -> Markup:
    """Escape a text, and format text in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def draw_inline(picture: Picture) -> Markup:
    """Return the SVG of a figure, which `style.svg` has escaped, with a description for screen readers."""
    label = escape(picture.alt or picture.caption)
    return Markup(picture.svg.replace("<svg ", f'<svg aria-label="{label}" ', 1))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("biopsy.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        embed=embed, number=number, breakable=breakable, drawn=draw_inline, plural=plural, code=mark_code
    )
    return environment
