"""Reports: one HTML file that says what was done, how sure it is, and shows the mistakes.

Everything a page needs is inside it: styles, vector figures, pictures. It asks nothing of a network and runs
no script.
"""

import base64
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from biopsy.reporting.document import (
    ReportDocument,
    number,
)

NOT_FOR = (
    "Research use only: this is not a medical device, and no number here has been confirmed in a clinic.",
    "It must not be used to diagnose, to grade, to choose a treatment, or to leave a slide unread.",
    "It holds for tissue, stain, scanner and resolution like those tested, and says nothing about others.",
)
HIDDEN = "Patient, slide and patch ids are replaced by numbers in this report."


def render_report(document: ReportDocument) -> str:
    """Write a report as one self-contained HTML page; every text in it is escaped."""
    return render("report.html", report=document)


def render(template: str, **values: object) -> str:
    """Write a page from a template of this room; every text in it is escaped."""
    return _environment().get_template(template).render(**values)


def embed(image: bytes) -> str:
    """Write an encoded image as a data URI."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def breakable(text: object) -> Markup:
    """Escape a text and let a long id break after its underscores."""
    return Markup("_<wbr>").join(escape(part) for part in str(text).split("_"))


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
        embed=embed, number=number, breakable=breakable, drawn=Markup
    )  # drawn: SVG that style.svg escaped
    return environment
