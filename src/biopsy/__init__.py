"""Train, judge, explain and run breast-histopathology patch classifiers that can be trusted.

Each function here has the name of a command and its parameters have the names of that command's flags::

    import biopsy

    pack = biopsy.prepare("archive.zip", "idc.pack")
    run = biopsy.train("cancernet-2020", pack)
    print(biopsy.evaluate(run))
    biopsy.report(run)

Functions and records are loaded when they are first used, so that importing this package costs next to
nothing. The rooms below it (``biopsy.statistics``, ``biopsy.data``, ...) hold everything else.
"""

import os
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from biopsy.core.errors import (
    ArchiveError,
    BiopsyError,
    DataError,
    DownloadError,
    FileFormatError,
    MetricError,
    MissingExtra,
    PackError,
    RecipeError,
    RunError,
    SlideError,
    SplitError,
    TrainingDiverged,
    UserFileError,
)

# OpenMP's threads spin while they wait, which on a shared machine takes the cores from those they wait for: a
# short spin is as fast on an idle machine and several times faster on a busy one. Read when OpenMP is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from biopsy.data.packs import Pack
    from biopsy.judging.closeups import mistakes
    from biopsy.judging.illustration import explain
    from biopsy.judging.predictions import evaluate_predictions
    from biopsy.judging.results import Evaluation
    from biopsy.learning.calibration import calibrate
    from biopsy.learning.classifiers import Classifier
    from biopsy.learning.fetching import fetch
    from biopsy.learning.foreign.importing import import_keras
    from biopsy.learning.runs import Run
    from biopsy.learning.training import train
    from biopsy.sharing.bundles import export
    from biopsy.sharing.inspection import inspect
    from biopsy.slides.cohorts import SlideCohort, slide
    from biopsy.slides.maps import SlideMap
    from biopsy.studies.doubts import doubts
    from biopsy.studies.evaluation import evaluate
    from biopsy.studies.folds import study
    from biopsy.studies.prediction import predict
    from biopsy.studies.preparation import prepare
    from biopsy.studies.records import Study
    from biopsy.studies.reporting import report
    from biopsy.studies.reproduction import reproduce
    from biopsy.studies.rivals import compare
    from biopsy.studies.splitting import split_pack as split
    from biopsy.studies.sweeps import sweep
    from biopsy.upkeep.catalogue import list_ as list
    from biopsy.upkeep.demo import demo

    __version__: str

__all__ = [
    "ArchiveError",
    "BiopsyError",
    "Classifier",
    "DataError",
    "DownloadError",
    "Evaluation",
    "FileFormatError",
    "MetricError",
    "MissingExtra",
    "Pack",
    "PackError",
    "RecipeError",
    "Run",
    "RunError",
    "SlideCohort",
    "SlideError",
    "SlideMap",
    "SplitError",
    "Study",
    "TrainingDiverged",
    "UserFileError",
    "__version__",
    "calibrate",
    "compare",
    "demo",
    "doubts",
    "evaluate",
    "evaluate_predictions",
    "explain",
    "export",
    "fetch",
    "import_keras",
    "inspect",
    "list",
    "mistakes",
    "predict",
    "prepare",
    "report",
    "reproduce",
    "slide",
    "split",
    "study",
    "sweep",
    "train",
]

_LAZY = {
    "Classifier": "biopsy.learning.classifiers:Classifier",
    "Evaluation": "biopsy.judging.results:Evaluation",
    "Pack": "biopsy.data.packs:Pack",
    "Run": "biopsy.learning.runs:Run",
    "SlideCohort": "biopsy.slides.cohorts:SlideCohort",
    "SlideMap": "biopsy.slides.maps:SlideMap",
    "Study": "biopsy.studies.records:Study",
    "compare": "biopsy.studies.rivals:compare",
    "calibrate": "biopsy.learning.calibration:calibrate",
    "demo": "biopsy.upkeep.demo:demo",
    "doubts": "biopsy.studies.doubts:doubts",
    "evaluate": "biopsy.studies.evaluation:evaluate",
    "evaluate_predictions": "biopsy.judging.predictions:evaluate_predictions",
    "explain": "biopsy.judging.illustration:explain",
    "export": "biopsy.sharing.bundles:export",
    "fetch": "biopsy.learning.fetching:fetch",
    "import_keras": "biopsy.learning.foreign.importing:import_keras",
    "inspect": "biopsy.sharing.inspection:inspect",
    "list": "biopsy.upkeep.catalogue:list_",
    "mistakes": "biopsy.judging.closeups:mistakes",
    "predict": "biopsy.studies.prediction:predict",
    "prepare": "biopsy.studies.preparation:prepare",
    "report": "biopsy.studies.reporting:report",
    "reproduce": "biopsy.studies.reproduction:reproduce",
    "slide": "biopsy.slides.cohorts:slide",
    "split": "biopsy.studies.splitting:split_pack",
    "study": "biopsy.studies.folds:study",
    "sweep": "biopsy.studies.sweeps:sweep",
    "train": "biopsy.learning.training:train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("biopsy")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> Iterable[str]:
    return sorted({*globals(), *__all__})
