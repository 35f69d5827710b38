"""Metrics of a sample whose patients are weighted anew: the raw material of every interval.

Patches of one patient resemble each other, so they are never resampled one by one: patients are left out
(fewer than 100) or drawn with replacement (100 and more).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from biopsy.core.seeds import make_rng
from biopsy.statistics.metrics import Counts, measure
from biopsy.statistics.tallies import Floats

Method = Literal["jackknife", "bootstrap"]
BOOTSTRAP_FROM = 100  # below it the bootstrap's own error shows: docs/concepts/intervals.md
DRAWS = 2000


class GroupedSample(Protocol):
    """Patches in groups that can be weighted anew: `tallies.Ranked` or `multiclass.ClassSample`."""

    @property
    def groups(self) -> Any:
        """Ids in sorted order, ``(n_groups,)``."""

    @property
    def needs(self) -> Mapping[str, str]:
        """What a metric may need, in words."""

    def tally(self, weight: Floats | None = None) -> Counts:
        """Count the sample with one weight per group."""

    def carriers(self) -> dict[str, int]:
        """Count the groups that hold each of `needs`."""


@dataclass(frozen=True)
class Replicates:
    """Metrics of a sample, and of the same sample with its groups weighted anew.

    Attributes:
        value: Each metric on the sample as it is.
        replicates: Each metric on every reweighting, shape ``(n_replicates,)``; for the jackknife, entry
            ``i`` leaves out group ``i`` in the order of sorted ids.
        method: How the groups were reweighted.
        n_groups: Groups in the sample.
    """

    value: dict[str, float]
    replicates: dict[str, Floats]
    method: Method
    n_groups: int


def standard_error(replicates: Floats, method: Method) -> float:
    """Give the standard error that replicates imply (Efron and Tibshirani 1993, eq. 6.6 and 11.5)."""
    n = len(replicates)
    sum_of_squares = float(((replicates - replicates.mean()) ** 2).sum())
    return float(np.sqrt(sum_of_squares * (n - 1) / n if method == "jackknife" else sum_of_squares / (n - 1)))


def reweightings(n_groups: int, *, seed: int, draws: int) -> Iterator[Floats]:
    """Yield weights per group: each group left out once, or from 100 groups whole groups drawn anew."""
    if n_groups < BOOTSTRAP_FROM:
        for left_out in range(n_groups):
            weight = np.ones(n_groups)
            weight[left_out] = 0
            yield weight
    else:
        rng = make_rng(seed, "bootstrap")
        for _ in range(draws):
            yield np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups).astype(np.float64)


def reweigh(sums: Floats, *, seed: int, draws: int = DRAWS) -> tuple[Floats, Method]:
    """Add up what each group has, ``(n_groups, k)``, on every reweighting: ``(n_replicates, k)``, and how."""
    if len(sums) < BOOTSTRAP_FROM:
        return sums.sum(axis=0) - sums, "jackknife"
    weights = reweightings(len(sums), seed=seed, draws=draws)
    return np.stack([weight @ sums for weight in weights]), "bootstrap"


def replicate(
    sample: GroupedSample, *, seed: int, draws: int = DRAWS, names: Iterable[str] | None = None
) -> Replicates:
    """Compute metrics on a sample and on each reweighting of its groups.

    Args:
        sample: From `tallies.rank` or `multiclass.class_sample`, with ``group_ids``.
        seed: For the bootstrap; the same seed and the same groups give the same reweightings.
        draws: Bootstrap draws.
        names: Metrics wanted; all if not given.
    """
    n_groups, value = len(sample.groups), measure(sample.tally(), names)
    defined = [name for name in value if not np.isnan(value[name])]
    weights = reweightings(n_groups, seed=seed, draws=draws)
    rows = [
        list(measure(sample.tally(w), defined).values()) if w.any() else [np.nan] * len(defined)
        for w in weights
    ]
    table = np.array(rows).reshape(len(rows), len(defined))
    replicates = {name: table[:, column] for column, name in enumerate(defined)}
    return Replicates(value, replicates, "jackknife" if n_groups < BOOTSTRAP_FROM else "bootstrap", n_groups)


def average(results: Sequence[Replicates]) -> Replicates:
    """Give the mean over seeds (or classes) of metrics of the same groups, reweighting by reweighting.

    A metric that is undefined in one of them is undefined in the mean.
    """
    names = list(results[0].value)
    everywhere = [name for name in names if all(name in result.replicates for result in results)]
    return Replicates(
        {name: float(np.mean([result.value[name] for result in results])) for name in names},
        {name: np.mean([result.replicates[name] for result in results], axis=0) for name in everywhere},
        results[0].method,
        results[0].n_groups,
    )
