"""Validation of the pixel size (mpp) of slides.

Predictions at a wrong magnification are meaningless but look plausible, so slides without a valid pixel size
are refused:

* the recorded value is valid if it is in `PLAUSIBLE_MPP` (the default of image software, 72 dpi, is 353
  um/px), pixels are square, and it fits the objective: mpp times magnification is near 10 for most scanners,
  and as low as 4.7 with camera magnification (20x MIRAX at 0.23);
* if the recorded value is missing or invalid, the user's value is used, if it fits the objective or the
  recorded value;
* a user's value that contradicts a valid recorded one is refused.
"""

from typing import Literal, NamedTuple

from biopsy.core.errors import SlideError

PLAUSIBLE_MPP = (0.05, 20.0)
"""From a 100x objective with oversampling to the coarsest overview that shows glands."""

SAME_MPP = 0.01
"""Relative difference of resolutions up to which pixels are not resampled."""

AGREEING_MPP = 0.05
"""Largest relative difference of given and recorded value, or of width and height of a pixel."""

OBJECTIVE_PRODUCT = (4.0, 25.0)
"""Valid range of mpp times magnification: 10, within a factor of 2.5."""

MAX_UPSAMPLING = 1.5
"""Largest upsampling factor of level 0."""

MppSource = Literal["slide", "stated"]

_STATE = "pass the scanner's value as --mpp (prepare: --slide-mpp), or slide by slide in a csv"


class Recorded(NamedTuple):
    """Resolution recorded in a slide file; None for missing values."""

    mpp_x: float | None = None
    mpp_y: float | None = None
    objective: float | None = None


def resolve_mpp(name: str, recorded: Recorded, stated: float | None = None) -> tuple[float, MppSource]:
    """Return the pixel size of a slide at level 0 in µm, and its source.

    Args:
        stated: The user's value; if it agrees with the recorded one, the latter is used.
    """
    fault = _find_fault(recorded)
    if stated is None:
        if fault:
            raise SlideError(f"{name} {fault}; {_STATE}")
        return _mean_mpp(recorded), "slide"
    low, high = PLAUSIBLE_MPP
    if not low <= stated <= high:
        raise SlideError(f"mpp {stated!r} given for {name} is not in [{low:g}, {high:g}] um/px")
    if not fault:
        recorded_mpp = _mean_mpp(recorded)
        if not _agree(stated, recorded_mpp):
            raise SlideError(
                f"{name} records {recorded_mpp:.4g} um/px, not the given {stated:.4g}; "
                "omit the mpp or, if the file is wrong, correct it"
            )
        return recorded_mpp, "slide"
    supported = any(_agree(stated, value) for value in _values(recorded))
    if recorded.objective and not supported and not _fits_objective(stated, recorded.objective):
        raise SlideError(
            f"given {stated:.4g} um/px contradict the {recorded.objective:g}x objective of {name}, "
            f"for which about {10 / recorded.objective:.2g} are usual; check it or correct the file"
        )
    return stated, "stated"


def check_mpp(
    name: str, slide_mpp: float, target_mpp: float, *, purpose: str = "the classifier was trained"
) -> None:
    """Check that a slide is fine enough for a resolution.

    Raises:
        SlideError: If the slide would be enlarged by more than `MAX_UPSAMPLING`.
    """
    if not target_mpp > 0:
        raise SlideError(f"mpp {target_mpp!r} requested of {name} is not above 0")
    if slide_mpp > MAX_UPSAMPLING * target_mpp:
        raise SlideError(
            f"{purpose} at {target_mpp:.2f} um/px, level 0 of {name} is {slide_mpp:.2f} um/px: "
            f"too coarse to resample (limit {MAX_UPSAMPLING:g}x)"
        )


def _values(recorded: Recorded) -> list[float]:
    return [value for value in recorded[:2] if value is not None]


def _mean_mpp(recorded: Recorded) -> float:
    values = _values(recorded)
    return sum(values) / len(values)


def _find_fault(recorded: Recorded) -> str | None:
    """Return the fault of the recorded value, None if it is valid."""
    values, objective = _values(recorded), recorded.objective
    if not values:
        usual = f" (its {objective:g}x objective suggests about {10 / objective:.2g})" if objective else ""
        return f"has no mpp{usual}"
    low, high = PLAUSIBLE_MPP
    if not all(low <= value <= high for value in values):
        dots = f", {25400 / values[0]:.4g} dots an inch" if values[0] > high else ""
        return f"records {values[0]:.4g} um/px{dots}, which is implausible for a slide"
    if max(values) > (1 + AGREEING_MPP) * min(values):
        return f"records {values[0]:.4g} um/px horizontally and {values[1]:.4g} vertically"
    if objective and not _fits_objective(_mean_mpp(recorded), objective):
        usual = f"about {10 / objective:.2g} are usual"
        return f"records {_mean_mpp(recorded):.4g} um/px and a {objective:g}x objective, for which {usual}"
    return None


def _agree(stated: float, recorded: float) -> bool:
    return abs(stated / recorded - 1) <= AGREEING_MPP


def _fits_objective(mpp: float, objective: float) -> bool:
    low, high = OBJECTIVE_PRODUCT
    return low <= mpp * objective <= high
