"""The gatekeeper of micrometres per pixel: where a slide's value comes from and whether it can be true.

A classifier asked at the wrong magnification answers with numbers that look like any others. So a slide has a
value that holds up, or it is refused with what to do:

* the slide's own value counts if it lies in `PLAUSIBLE_MPP` (72 dots an inch, image software's default, is
  353 um/px), if its pixels are square, and if it fits the objective: mpp times magnification is near 10 on
  most scanners, and down to 4.7 where the camera adds to the objective (a 20x MIRAX scans at 0.23);
* where the slide's own value is missing or does not hold up, a stated one takes its place, if it fits the
  objective, or agrees with the slide's own, which says that it is the objective that is wrong;
* a stated value that contradicts a slide's own that does hold up is refused: one of the two is wrong, and
  neither the slide nor the user can be asked. If it is the slide's, its file is to be corrected, for every
  program that reads it.
"""

from typing import Literal, NamedTuple

from biopsy.core.errors import SlideError

PLAUSIBLE_MPP = (0.05, 20.0)
"""A 100x objective with oversampling, and the coarsest overview that still shows glands."""

SAME_MPP = 0.01
"""Up to this share apart, pixels are taken as they are; a patch of 100 px is off by less than one."""

AGREEING_MPP = 0.05
"""Stated and own value, or width and height of a pixel, may differ by this share."""

OBJECTIVE_PRODUCT = (4.0, 25.0)
"""What mpp times magnification may be: 10, give or take 2.5 times."""

MAX_UPSAMPLING = 1.5
"""Finer than a slide's level 0 by more than this cannot be had by resampling."""

MppSource = Literal["slide", "stated"]

_STATE = "pass the scanner's value as --mpp (prepare: --slide-mpp), or slide by slide in a csv"


class Recorded(NamedTuple):
    """What a slide's file says of its own resolution; None where it says nothing."""

    mpp_x: float | None = None
    mpp_y: float | None = None
    objective: float | None = None


def resolve_mpp(name: str, recorded: Recorded, stated: float | None = None) -> tuple[float, MppSource]:
    """Decide a slide's micrometres per pixel at level 0, and say where the value came from.

    Args:
        name: The slide's name, for messages.
        stated: What the user says. Where it agrees with the slide's own value, the slide's own is used.

    Raises:
        SlideError: If there is no value, or the one there is cannot be true.
    """
    fault = _find_fault(recorded)
    if stated is None:
        if fault:
            raise SlideError(f"{name} {fault}; {_STATE}")
        return _own(recorded), "slide"
    low, high = PLAUSIBLE_MPP
    if not low <= stated <= high:
        raise SlideError(f"stated mpp {stated!r} for {name} is not in [{low:g}, {high:g}] um/px")
    if not fault:
        own = _own(recorded)
        if not _agree(stated, own):
            raise SlideError(
                f"{name} says {own:.4g} um/px, not the stated {stated:.4g}; "
                "state no mpp for it or, if its file is wrong, correct the file"
            )
        return own, "slide"
    supported = any(_agree(stated, value) for value in _values(recorded))
    if recorded.objective and not supported and not _fits_objective(stated, recorded.objective):
        raise SlideError(
            f"stated {stated:.4g} um/px contradict the {recorded.objective:g}x objective of {name}, where "
            f"about {10 / recorded.objective:.2g} are usual; check it or, if its file is wrong, correct that"
        )
    return stated, "stated"


def check_mpp(
    name: str, slide_mpp: float, wanted_mpp: float, *, purpose: str = "the classifier was trained"
) -> None:
    """Refuse a resolution that a slide does not have.

    Args:
        name: The slide's name, for messages.
        slide_mpp: Micrometres per pixel of its level 0.
        purpose: What is done at that resolution, for the message.

    Raises:
        SlideError: If the slide would have to be enlarged by more than `MAX_UPSAMPLING`.
    """
    if not wanted_mpp > 0:
        raise SlideError(f"mpp {wanted_mpp!r} wanted of {name} is not above 0")
    if slide_mpp > MAX_UPSAMPLING * wanted_mpp:
        raise SlideError(
            f"{purpose} at {wanted_mpp:.2f} um/px, level 0 of {name} is {slide_mpp:.2f} um/px: "
            f"too coarse to resample (limit {MAX_UPSAMPLING:g}x)"
        )


def _values(recorded: Recorded) -> list[float]:
    return [value for value in recorded[:2] if value is not None]


def _own(recorded: Recorded) -> float:
    values = _values(recorded)
    return sum(values) / len(values)


def _find_fault(recorded: Recorded) -> str | None:
    """Say what is wrong with a slide's own value; None if it holds up."""
    values, objective = _values(recorded), recorded.objective
    if not values:
        usual = f" (its {objective:g}x objective suggests about {10 / objective:.2g})" if objective else ""
        return f"has no mpp{usual}"
    low, high = PLAUSIBLE_MPP
    if not all(low <= value <= high for value in values):
        dots = f", {25400 / values[0]:.4g} dots an inch" if values[0] > high else ""
        return f"says {values[0]:.4g} um/px{dots}, which no slide is scanned at"
    if max(values) > (1 + AGREEING_MPP) * min(values):
        return f"says {values[0]:.4g} um/px across and {values[1]:.4g} down, which no scanner gives"
    if objective and not _fits_objective(_own(recorded), objective):
        usual = f"about {10 / objective:.2g} are usual"
        return f"says {_own(recorded):.4g} um/px and a {objective:g}x objective, where {usual}"
    return None


def _agree(stated: float, own: float) -> bool:
    return abs(stated / own - 1) <= AGREEING_MPP


def _fits_objective(mpp: float, objective: float) -> bool:
    low, high = OBJECTIVE_PRODUCT
    return low <= mpp * objective <= high
