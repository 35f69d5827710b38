"""Studies: verbs that put several rooms together, and runs that make runs.

``folds`` trains recipes over folds and seeds, ``records`` is the `Study` on disk, ``tables`` what its runs
add up to; ``splitting``, ``prediction`` and ``reporting`` stand behind the commands of those names. May use
every room but upkeep and the command line.
"""
