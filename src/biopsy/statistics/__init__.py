"""Metrics, confidence intervals over patients, calibration, decision thresholds and conformal prediction.

Arrays in, numbers out: no files, figures or patches; torch is not used. To add a metric, write a function of
a `WeightedCounts` in ``metrics.py`` under ``@metric(...)``, with its needs and bounds; tables and intervals
then include it by name. Test it against a law and an independent number in ``tests/test_metrics.py``.
"""
