"""Arrays in, numbers out: metrics, their intervals over patients, calibration, thresholds.

Nothing here reads a file, draws a picture or knows what a patch looks like; numpy, scipy, pandas and
scikit-learn are allowed, torch is not. To add a metric, write one function of a `WeightedCounts` in
`metrics.py` under `@metric(...)`, saying what it needs and between which bounds it lives, and give
`tests/test_metrics.py` its law and an independent number: every table and interval then carries it by name.
"""
