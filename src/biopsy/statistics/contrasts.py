"""Comparison of a measured value between two groups of patches, with intervals over patients."""

from dataclasses import dataclass
from typing import Unpack

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from typing_extensions import TypedDict

from biopsy.core.errors import MetricError
from biopsy.core.loaders import FloatOrNan
from biopsy.statistics.intervals import PatientSummary, summarise_groups
from biopsy.statistics.metrics import METRICS
from biopsy.statistics.resampling import (
    Floats,
    InformativeGroups,
    Interval,
    Resampler,
    Resampling,
    fewest_informative,
    sum_groups,
)
from biopsy.statistics.weighted_counts import sort_scores

AUROC = METRICS["auroc"]


class GroupContrast(TypedDict):
    """Number of chosen patches of a patient and of others, and their AUROC; NaN without both kinds."""

    n_chosen: int
    n_others: int
    auroc: FloatOrNan


@dataclass(frozen=True)
class Contrast:
    """Difference of a measured value between chosen patches and the others.

    Attributes:
        mean_chosen: Mean of the value over the chosen patches; NaN if there are none.
        mean_others: Mean over the others.
        difference_sd: Difference of the means in pooled standard deviations.
        auroc: Probability that a chosen patch has a higher value than another; .5 without a difference.
        within: Summary of the AUROC within patients with both kinds; None if the unit is the patch.
        by_group: By patient; empty if the unit is the patch.
    """

    n_chosen: int
    n_others: int
    mean_chosen: FloatOrNan
    mean_others: FloatOrNan
    difference_sd: Interval
    auroc: Interval
    within: PatientSummary | None
    by_group: dict[str, GroupContrast]


def contrast_groups(
    values: ArrayLike,
    chosen: ArrayLike,
    group_ids: ArrayLike,
    *,
    names: tuple[str, str] = ("chosen", "other"),
    **resampling: Unpack[Resampling],
) -> Contrast:
    """Compare a value between chosen patches and the others.

    Args:
        values: Measured values, shape ``(n,)``.
        chosen: Mask of the patches of interest.
        names: Names of the chosen and the other patches in reasons, such as ``("wrong", "correct")``.
    """
    values, chosen = np.asarray(values, float), np.asarray(chosen, bool)
    group_ids = np.asarray(group_ids, dtype=object)
    if not values.shape == chosen.shape == group_ids.shape or not np.isfinite(values).all():
        raise MetricError(
            f"values {values.shape}, not all finite, or not one each of {chosen.shape} patches", "shape"
        )
    if not 0 < chosen.sum() < len(chosen):
        return _nothing_to_compare(values, chosen, names)
    scores = sort_scores(chosen.astype(int), rankdata(values) / (len(values) + 1), group_ids=group_ids)
    codes, n_groups = pd.factorize(group_ids, sort=True)[0], len(scores.groups)
    sums = _sums(values - values.mean(), chosen, codes, n_groups)
    informative = fewest_informative(
        [InformativeGroups(sums[:, 3 * k], f"{name} patches") for k, name in enumerate(names)]
    )
    resampler = Resampler(n_groups, **resampling)
    [difference] = resampler.estimate(
        lambda weight: _difference_sd(weight @ sums), [informative], undefined="the value does not vary"
    )
    [auroc] = resampler.estimate(
        lambda weight: AUROC.compute(scores.count(weight)), [informative], bounds=AUROC.bounds
    )
    by_group, within = dict[str, GroupContrast](), None
    if resampler.unit != "patch":
        item = [_auroc(values[codes == code], chosen[codes == code]) for code in range(n_groups)]
        columns = {"n_chosen": sums[:, 0].astype(int), "n_others": sums[:, 3].astype(int), "auroc": item}
        by_group = pd.DataFrame(columns, index=scores.groups).to_dict(orient="index")
        within = summarise_groups(AUROC, np.array(item), resampler.level, resampler.unit)
    return Contrast(
        int(chosen.sum()),
        int((~chosen).sum()),
        float(values[chosen].mean()),
        float(values[~chosen].mean()),
        difference,
        auroc,
        within,
        by_group,
    )


def _sums(values: Floats, chosen: NDArray[np.bool_], codes: NDArray[np.intp], n_groups: int) -> Floats:
    """Return count, sum and sum of squares of the chosen, then of the others, ``(n_groups, 6)``."""
    columns = [kind * values**power for kind in (chosen, ~chosen) for power in range(3)]
    return sum_groups(codes, n_groups, *columns)


def _difference_sd(sums: Floats) -> float:
    n_chosen, chosen, chosen_2, n_others, others, others_2 = sums
    if not n_chosen or not n_others:
        return float("nan")
    variance = (chosen_2 - chosen**2 / n_chosen + others_2 - others**2 / n_others) / (n_chosen + n_others)
    return (
        float((chosen / n_chosen - others / n_others) / np.sqrt(variance))
        if variance > 1e-18
        else float("nan")
    )


def _auroc(values: Floats, chosen: NDArray[np.bool_]) -> float:
    scores = sort_scores(chosen.astype(int), rankdata(values) / (len(values) + 1))
    return AUROC.compute(scores.count())


def _nothing_to_compare(values: Floats, chosen: NDArray[np.bool_], names: tuple[str, str]) -> Contrast:
    missing = names[0] if not chosen.any() else names[1]
    nothing = Interval(float("nan"), reason=f"undefined: no {missing} patches")
    mean_chosen, mean_others = (
        float(values[kind].mean()) if kind.any() else float("nan") for kind in (chosen, ~chosen)
    )
    n = int(chosen.sum())
    return Contrast(n, len(chosen) - n, mean_chosen, mean_others, nothing, nothing, None, {})
