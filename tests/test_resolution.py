"""The gatekeeper of micrometres per pixel: what it takes, and every refusal."""

import pytest

from biopsy.core.errors import SlideError
from biopsy.slide_io.resolution import Recorded, check_mpp, resolve_mpp
from refusals import refuses

OWN = Recorded(0.499, 0.499, 20.0)


@pytest.mark.parametrize(
    ("recorded", "stated", "expected"),
    [
        (OWN, None, (0.499, "slide")),
        (OWN, 0.5, (0.499, "slide")),
        (Recorded(0.25, 0.252), None, (0.251, "slide")),
        (Recorded(0.25), None, (0.25, "slide")),
        (Recorded(0.2325, 0.2325, 20.0), None, (0.2325, "slide")),  # a MIRAX as OpenSlide's test data has it
        (Recorded(), 0.5, (0.5, "stated")),
        (Recorded(None, None, 20.0), 0.5, (0.5, "stated")),
        (Recorded(352.8, 352.8), 0.5, (0.5, "stated")),
        (Recorded(0.25, 0.5), 0.25, (0.25, "stated")),
        (Recorded(4.99, 4.99, 20.0), 0.499, (0.499, "stated")),
        (Recorded(0.25, 0.25, 4.0), 0.25, (0.25, "stated")),  # the objective is what is wrong
        (Recorded(0.25, 0.25, 4.0), 0.26, (0.26, "stated")),
        (Recorded(0.25, 0.25, 4.0), 2.5, (2.5, "stated")),
        (Recorded(4.0, 4.0), None, (4.0, "slide")),
    ],
)
def test_value_and_where_it_came_from(recorded, stated, expected):
    mpp, source = resolve_mpp("case.svs", recorded, stated)
    assert (mpp, source) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(
    ("recorded", "stated", "facts"),
    [
        (Recorded(), None, ["--mpp", "--slide-mpp", "csv"]),
        (Recorded(None, None, 20.0), None, ["20x", "0.5", "--mpp"]),
        (Recorded(352.78, 352.78), None, ["352.8 um/px", "72 dots", "--mpp"]),
        (Recorded(0.001, 0.001), None, ["0.001 um/px"]),
        (Recorded(0.25, 0.5), None, ["0.25 um/px"]),
        (Recorded(4.99, 4.99, 20.0), None, ["4.99 um/px", "20x", "0.5"]),
        (Recorded(0.05, 0.05, 20.0), None, ["0.05 um/px", "20x"]),
        (OWN, 0.25, ["0.499 um/px", "0.25"]),
        (Recorded(0.25, 0.25, 4.0), 0.5, ["0.5 um/px", "4x", "2.5"]),
        (Recorded(352.8, 352.8, 20.0), 5.0, ["5 um/px", "20x"]),
        (Recorded(None, None, 20.0), 5.0, ["5 um/px", "20x"]),
        (Recorded(), 500.0, ["mpp 500.0", "[0.05, 20]"]),
        (Recorded(), 0.0, ["mpp 0.0"]),
        (Recorded(), float("nan"), ["mpp nan"]),
    ],
)
def test_refusals(recorded, stated, facts):
    with refuses(SlideError, "case.svs", *facts):
        resolve_mpp("case.svs", recorded, stated)


def test_too_coarse_a_slide_is_refused_with_both_numbers():
    check_mpp("case.svs", 0.75, 0.5)
    with refuses(SlideError, "0.50 um/px", "case.svs", "1.01 um/px"):
        check_mpp("case.svs", 1.01, 0.5)
    with refuses(SlideError, "not above 0"):
        check_mpp("case.svs", 0.5, 0.0)
    with refuses(SlideError, "not above 0"):
        check_mpp("case.svs", 0.5, float("nan"))
