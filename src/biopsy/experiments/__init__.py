"""Experiments: runs that make runs, and commands that combine several features.

``folds`` trains recipes over folds and seeds, ``sweeps`` over settings, ``reproduction`` as they were
published and with patients apart (``leakage`` makes the splits). ``run_specs`` is the loop that all three
share; ``study_page``, ``sweep_page`` and ``reproduction_page`` are their reports, which ``reports`` writes.
``evaluation``, ``catalogue``, ``probes`` and ``demo`` stand behind commands.
"""
