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
    from biopsy.data.inspection import Inspection, inspect
    from biopsy.data.packs import Pack
    from biopsy.data.prepare import prepare
    from biopsy.data.split import split_pack as split
    from biopsy.evaluation.calibration.recalibrate import Recalibration, calibrate
    from biopsy.evaluation.comparison.compare import Comparison, compare
    from biopsy.evaluation.errors.case_views import ErrorAnalysis, errors
    from biopsy.evaluation.explanation.explain import Explanations, explain
    from biopsy.evaluation.label_issues.find import label_issues
    from biopsy.evaluation.predict import predict
    from biopsy.evaluation.predictions import evaluate_predictions
    from biopsy.evaluation.results import Evaluation
    from biopsy.experiments.catalogue import list_ as list
    from biopsy.experiments.demo import demo
    from biopsy.experiments.evaluation import evaluate
    from biopsy.experiments.folds import study
    from biopsy.experiments.reports import report
    from biopsy.experiments.reproduction import reproduce
    from biopsy.experiments.sweeps import sweep
    from biopsy.exporting.bundles import export
    from biopsy.models.classifier import Classifier
    from biopsy.models.fetch import fetch
    from biopsy.models.importers.keras import import_keras
    from biopsy.slides.cohorts import SlideCohort, slide
    from biopsy.slides.maps import SlideMap
    from biopsy.training.runs import Run
    from biopsy.training.study import Study
    from biopsy.training.train import train

    __version__: str

__all__ = [
    "ArchiveError",
    "BiopsyError",
    "Classifier",
    "Comparison",
    "DataError",
    "DownloadError",
    "ErrorAnalysis",
    "Evaluation",
    "Explanations",
    "FileFormatError",
    "Inspection",
    "MetricError",
    "MissingExtra",
    "Pack",
    "PackError",
    "Recalibration",
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
    "errors",
    "evaluate",
    "evaluate_predictions",
    "explain",
    "export",
    "fetch",
    "import_keras",
    "inspect",
    "label_issues",
    "list",
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
    "Recalibration": "biopsy.evaluation.calibration.recalibrate:Recalibration",
    "Inspection": "biopsy.data.inspection:Inspection",
    "Explanations": "biopsy.evaluation.explanation.explain:Explanations",
    "ErrorAnalysis": "biopsy.evaluation.errors.case_views:ErrorAnalysis",
    "Comparison": "biopsy.evaluation.comparison.compare:Comparison",
    "Classifier": "biopsy.models.classifier:Classifier",
    "Evaluation": "biopsy.evaluation.results:Evaluation",
    "Pack": "biopsy.data.packs:Pack",
    "Run": "biopsy.training.runs:Run",
    "SlideCohort": "biopsy.slides.cohorts:SlideCohort",
    "SlideMap": "biopsy.slides.maps:SlideMap",
    "Study": "biopsy.training.study:Study",
    "compare": "biopsy.evaluation.comparison.compare:compare",
    "calibrate": "biopsy.evaluation.calibration.recalibrate:calibrate",
    "demo": "biopsy.experiments.demo:demo",
    "errors": "biopsy.evaluation.errors.case_views:errors",
    "evaluate": "biopsy.experiments.evaluation:evaluate",
    "evaluate_predictions": "biopsy.evaluation.predictions:evaluate_predictions",
    "explain": "biopsy.evaluation.explanation.explain:explain",
    "export": "biopsy.exporting.bundles:export",
    "fetch": "biopsy.models.fetch:fetch",
    "import_keras": "biopsy.models.importers.keras:import_keras",
    "inspect": "biopsy.data.inspection:inspect",
    "label_issues": "biopsy.evaluation.label_issues.find:label_issues",
    "list": "biopsy.experiments.catalogue:list_",
    "predict": "biopsy.evaluation.predict:predict",
    "prepare": "biopsy.data.prepare:prepare",
    "report": "biopsy.experiments.reports:report",
    "reproduce": "biopsy.experiments.reproduction:reproduce",
    "slide": "biopsy.slides.cohorts:slide",
    "split": "biopsy.data.split:split_pack",
    "study": "biopsy.experiments.folds:study",
    "sweep": "biopsy.experiments.sweeps:sweep",
    "train": "biopsy.training.train:train",
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
