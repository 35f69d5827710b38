"""A metric."""

from biopsy.statistics.metrics import metric
from biopsy.statistics.weighted_counts import WeightedCounts


@metric("decision", label="Youden's index", needs=("n_pos", "n_neg"), bounds=(-1.0, 1.0))
def example_youden(counts: WeightedCounts) -> float:
    return counts.tp / counts.n_pos - counts.fp / counts.n_neg
