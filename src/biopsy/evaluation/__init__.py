"""Evaluation of predictions on patients that the model has not seen.

``evaluate`` evaluates a run and assembles ``metrics.json``; ``predictions`` evaluates a classifier or a table
from another program. Both create ``scored`` patches, from which ``measure`` (metrics, operating points,
subgroups) and the feature folders compute results; ``figures`` and ``sections`` show these in the report. No
feature imports another: what several of them use, such as ``saliency`` (maps), has a module of its own.
``predict`` predicts patches of any origin, ``neighbours`` locates patches on their slide, ``study_tables``
pools the runs of a study, ``stored_results`` reads measurements that are kept in a run.

To add a measurement, return a frozen dataclass from its own module and add a field to `evaluate.Metrics`.
"""
