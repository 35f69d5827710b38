"""Train, evaluate, explain and run breast-histopathology patch classifiers.

Each function here is also a command of ``biopsy``, with the same parameters::

    import biopsy

    pack = biopsy.prepare("archive.zip", "idc.pack")
    run = biopsy.train("cancernet-2020", pack)
    print(biopsy.evaluate(run))
    biopsy.report(run)

The public names are listed in ``__init__.pyi``, each with the module that defines it, which is imported when
the name is first used; everything else may change.
"""

import os

import lazy_loader

# OpenMP's threads spin while they wait, which on a shared machine takes the cores from those they wait for.
# This short spin costs 2 % on an idle machine, and beside one competing process more than a third of the
# speed remains (docs/performance.md). Read when OpenMP is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
