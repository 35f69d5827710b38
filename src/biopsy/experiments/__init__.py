"""Experiments: studies of many runs, and commands that combine several features.

``folds`` trains recipes over folds and seeds, ``sweeps`` over settings, ``reproduction`` as published and
split by patient (``leakage`` creates the splits). ``run_specs`` is their common loop; ``study_page``,
``sweep_page`` and ``reproduction_page`` are their reports, which ``reports`` writes. ``evaluation``,
``catalogue``, ``probes`` and ``demo`` implement commands.
"""
