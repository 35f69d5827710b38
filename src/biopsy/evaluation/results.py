"""The result of an evaluation: metrics with intervals, as a table, as JSON and as figures."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from biopsy.core.errors import MetricError
from biopsy.core.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """Result of an evaluation; ``evaluation[key]`` is an entry of ``metrics.json``.

    Attributes:
        document: The content of ``metrics.json``.
        predictions: The evaluated patches, in the format of a table of predictions.
        run: Folder of the run that was evaluated; None for predictions from elsewhere.
    """

    predictions: pd.DataFrame
    run: Path | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of ``target``."""
        return list(self.document["class_names"])

    def to_frame(self) -> pd.DataFrame:
        """Return a row per metric: ``value``, ``low``, ``high`` and ``reason`` if one is undefined."""
        frame = pd.DataFrame.from_dict(self.document["patch"], orient="index")
        return frame.rename_axis("metric").astype({"value": float, "low": float, "high": float})

    def classification_report(self) -> pd.DataFrame:
        """Return precision, recall, F1 and patches of each class, and their averages."""
        rows = pd.DataFrame(self.document["classification_report"]).set_index("name").rename_axis("class")
        return rows.astype({"precision": float, "recall": float, "f1": float})

    def confusion_matrix(self) -> pd.DataFrame:
        """Return patches by true class (rows) and predicted class (columns)."""
        names, n_classes = self.class_names, len(self.class_names)
        cell = self.predictions["target"].to_numpy(int) * n_classes + self.predictions["pred"].to_numpy(int)
        counts = np.bincount(cell, minlength=n_classes**2).reshape(n_classes, n_classes)
        return pd.DataFrame(counts, pd.Index(names, name="true"), pd.Index(names, name="predicted"))

    def __repr__(self) -> str:
        return f"{self.heading}\n{self.to_frame()[['value', 'low', 'high']].round(3).to_string()}"

    def _repr_html_(self) -> str:
        table = self.to_frame().round(3).to_html(na_rep="")
        return (
            f"<p>{escape(self.heading)}</p>{table}{self.classification_report().round(3).to_html(na_rep='')}"
        )

    @property
    def heading(self) -> str:
        """Number of patches and patients, and the unit of the intervals."""
        unit, interval = self.document["unit"], self.document["interval"]
        groups = "" if unit == "patch" else f" of {self.document['n_patients']:,} {unit}s"
        title = f"Evaluation of {self.document['n_patches']:,} patches{groups}"
        return (
            f"{title}, {interval['level']:.0%} intervals over {'patches' if unit == 'patch' else unit + 's'}"
        )

    def plot_roc(self) -> "Figure":
        """Draw the ROC curve with the threshold marked; two classes only."""
        from biopsy.evaluation.figures import draw_roc

        point = self._values("sensitivity", "specificity")
        return draw_roc(*self._binary("ROC curve"), operating_point=point)

    def plot_precision_recall(self) -> "Figure":
        """Draw precision against recall with the threshold marked; two classes only."""
        from biopsy.evaluation.figures import draw_precision_recall

        point = self._values("sensitivity", "ppv")
        return draw_precision_recall(*self._binary("precision-recall curve"), operating_point=point)

    def plot_calibration(self) -> "Figure":
        """Draw observed frequency against predicted probability (multi-class: of the predicted class)."""
        from biopsy.evaluation.calibration.section import draw_calibration

        bins = self.document["calibration"]["after"]["bins"]
        return draw_calibration(bins, positive=self.document["positive_class"])

    def plot_confusion(self) -> "Figure":
        """Draw the confusion matrix."""
        from biopsy.evaluation.figures import draw_confusion_matrix

        return draw_confusion_matrix(self.confusion_matrix().to_numpy(), self.class_names)

    def _binary(self, curve: str) -> tuple[np.ndarray, np.ndarray]:
        """Return whether each patch is positive, and its probability."""
        positive = self.document["positive_class"]
        if positive is None:
            raise MetricError(f"a {curve} needs two classes; this evaluation has {len(self.class_names)}")
        is_positive = self.predictions["target"].to_numpy(int) == self.class_names.index(positive)
        return is_positive.astype(int), self.predictions["prob"].to_numpy(float)

    def _values(self, first: str, second: str) -> tuple[float, float] | None:
        patch = self.document["patch"]
        values = patch.get(first, {}).get("value"), patch.get(second, {}).get("value")
        return None if None in values else values
