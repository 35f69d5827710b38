"""A metric."""

from biopsy.statistics.metrics import metric
from biopsy.statistics.weighted_counts import Tally


@metric("decision", label="Youden's index", needs=("n_pos", "n_neg"), bounds=(-1.0, 1.0))
def example_youden(tally: Tally) -> float:
    return tally.tp / tally.n_pos - tally.fp / tally.n_neg
