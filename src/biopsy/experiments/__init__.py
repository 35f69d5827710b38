"""Studies: functions that combine several features, and runs that make runs.

``folds`` trains recipes over folds and seeds, ``sweeps`` (with ``search``) over settings, ``reproduction`` as
they were published and with patients apart, for as long as ``budget`` allows. ``run_specs`` is what all three
share; ``study_page``, ``sweep_page`` and ``reproduction_page`` are their reports. ``evaluation``,
``catalogue``, ``probes``, ``reports`` and ``demo`` stand behind commands. May import every feature but
``exporting``, ``app``, ``checks`` and the command line.
"""
