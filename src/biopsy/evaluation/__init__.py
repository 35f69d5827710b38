"""Evaluation: how good predictions are on patients that the model has not seen.

``evaluate`` evaluates a run and assembles ``metrics.json``; ``predictions`` evaluates a classifier or
anybody's table. Both make ``scored`` patches, which ``measure`` (metrics, operating points, subgroups) and
the feature folders measure; ``figures`` and ``sections`` show the results in the report. ``predict`` predicts
patches of any origin, ``neighbours`` knows where patches lie on their slide, ``study_tables`` pools the runs
of a study.

To measure one more thing, return a frozen dataclass from its own module and add a field to
`evaluate.Metrics`.
"""
