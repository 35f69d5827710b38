"""Studies: verbs that put several rooms together, and runs that make runs.

``folds`` trains recipes over folds and seeds, ``sweeps`` (with ``search``) over settings, ``reproduction`` as
they were published and with patients apart: its arms are in ``comparison``, their length in ``budget``, what
they add up to in ``gaps``. ``questions`` is what all three share, ``records`` the `Study` on disk, ``tables``
and ``pages`` its numbers and reports. ``splitting``, ``preparation``, ``prediction`` and ``reporting`` stand
behind the commands of those names. May use every room but upkeep and the command line.
"""
