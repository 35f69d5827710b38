"""Common style of the figures, and export to SVG, PNG and JPEG.

Colours of classes are those of Okabe and Ito (2008), of other series Tol's muted scheme (2021); probability
maps use cividis (Nunez et al. 2018). All are suited to colour vision deficiencies. A colour has one meaning
in all figures.
"""

import base64
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

INK = "#1f2933"
MUTED = "#6b7280"
RULE = "#d5d9df"
WASH = "#f3f5f7"
# classes, model, baseline, kinds of errors, subsets of the split
POSITIVE = "#d55e00"
NEGATIVE = "#0072b2"
MODEL = "#6a3d9a"
BASELINE = "#7a7f87"
FALSE_NEGATIVE = "#c51b7d"
FALSE_POSITIVE = "#e6ab02"
TRAIN = "#1b9e77"
VALIDATION = "#a6761d"
TEST = MODEL
TISSUE = "#009e73"
CLASS_COLOURS = (NEGATIVE, POSITIVE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b3a1a", "#f0e442")
SERIES_COLOURS = ("#882255", "#44aa99", "#999933", "#332288", "#cc6677", "#117733", "#aa4499", "#88ccee")
PROBABILITY_MAP = "cividis"
DASHED = (0, (4, 3))

WIDTH_IN = 4.6  # 331 pt: the 9 pt text has 9.5 px on a phone
FONT_STACK = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"

STYLE = matplotlib.RcParams(
    {
        "axes.axisbelow": True,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.labelsize": 9,
        "axes.linewidth": 0.7,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 9.5,
        "axes.titleweight": "normal",
        "figure.autolayout": False,
        "figure.constrained_layout.use": False,
        "figure.facecolor": "white",
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "grid.color": "#e6e9ed",
        "grid.linewidth": 0.6,
        "legend.borderaxespad": 0.3,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "legend.handlelength": 1.4,
        "lines.linewidth": 1.6,
        "svg.fonttype": "none",
        "svg.image_inline": True,
        "text.color": INK,
        "text.parse_math": False,  # ids may contain dollar signs
        "xtick.color": MUTED,
        "xtick.labelcolor": INK,
        "xtick.labelsize": 8.5,
        "ytick.color": MUTED,
        "ytick.labelcolor": INK,
        "ytick.labelsize": 8.5,
    }
)

_LONG_LABEL = 14  # characters; longer legend labels are set in two columns

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorate a drawing function to use the style of this package."""
    return cast(Callable[P, R], matplotlib.rc_context(STYLE)(draw))


def new_figure(width_in: float = WIDTH_IN, height_in: float = 3.3) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.subplots()


def annotate(
    axes: Axes,
    text: str,
    xy: tuple[Any, Any],
    offset: tuple[float, float] = (0, 0),
    *,
    color: str = MUTED,
    fontsize: float = 8,
    **options: Any,
) -> None:
    """Write a text at a point with an offset in points, also outside the axes."""
    options |= {"color": color, "fontsize": fontsize, "annotation_clip": False}
    axes.annotate(text, xy, offset, textcoords="offset points", **options)


def name_rows(axes: Axes, names: Sequence[str], margin: float = 0.45) -> None:
    """Name the rows of a figure, from the top, without ticks and grid lines; ``margin`` in rows."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - margin, margin - 1)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Place the legend above the axes; long labels are set in two columns."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = min(columns, 2 if max(map(len, labels)) > _LONG_LABEL else 3)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=columns,
            borderaxespad=0.1,
            columnspacing=1.2,
        )


def class_colour(index: int) -> str:
    return CLASS_COLOURS[index % len(CLASS_COLOURS)]


def shorten(text: object, limit: int = 18) -> str:
    """Return a text shortened to its start and end, with an ellipsis between."""
    text = str(text)
    keep = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[: limit - 1 - keep]}…{text[-keep:]}"


def svg(figure: Figure, name: str = "figure") -> str:
    """Return a figure as one ``<svg>`` element, deterministic.

    Text is not converted to paths; opaque images are stored as JPEG if that is smaller.

    Args:
        name: Makes element ids unique within a page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        _fix_layout(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _tidy(buffer.getvalue())


def png(picture: Figure | np.ndarray, *, dpi: int = 200) -> bytes:
    """Encode a figure (at ``dpi``) or an image ``(H, W[, 3])`` uint8 as PNG."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            _fix_layout(picture)
            picture.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    else:
        Image.fromarray(np.asarray(picture, dtype=np.uint8)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def jpeg(image: np.ndarray, *, quality: int = 88) -> bytes:
    """Encode an image ``(H, W, 3)`` uint8 as JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.asarray(image, dtype=np.uint8))
    picture.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _fix_layout(figure: Figure) -> None:
    """Compute the layout once, so that repeated export is deterministic."""
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # browsers use other fonts
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)  # a placeholder would draw the figure once more at export


def _tidy(text: str) -> str:
    """Return matplotlib's SVG as one element with short numbers and without repeated font lists."""
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r"; font-family: [^;\"]*\"", '"', text)
    text = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", text)
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", text)  # invalid in XML
    text = re.sub(r"<image [^>]*>", _shrink_image, text)
    text = re.sub(r"<(?!image)[^<>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", _round, tag[0]), text)
    style = f'style="stroke-linejoin: round; font-family: {FONT_STACK}"'
    return text.replace("<svg ", f'<svg role="img" {style} ', 1).strip() + "\n"


def _round(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _shrink_image(tag: re.Match[str]) -> str:
    data = re.search(r'"data:image/png;base64,([^"]*)"', tag[0])
    if data is None:
        return tag[0]
    encoded = base64.b64decode(data[1])
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    pixels = np.asarray(picture)
    if pixels[..., 3].min() == 255:
        smaller = jpeg(pixels[..., :3])
        if len(smaller) < len(encoded):
            replaced = tag[0].replace(
                data[0], f'"data:image/jpeg;base64,{base64.b64encode(smaller).decode()}"'
            )
            return re.sub(r"image-rendering:[^;\"]*;?", "", replaced)
    return tag[0].replace("\n", "")
