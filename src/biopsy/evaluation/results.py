"""The result of an evaluation: metrics with intervals, as a table, as JSON and as figures."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from biopsy.core.errors import MetricError
from biopsy.core.loaders import validate
from biopsy.core.results import Result, Table, number
from biopsy.core.text import class_title, count, count_patches
from biopsy.training.metrics import Abstention, Metrics

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

    @cached_property
    def metrics(self) -> Metrics:
        """The content of ``metrics.json``."""
        return validate("metrics.json", Metrics, self.document)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of ``target``."""
        return self.metrics.class_names

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
        names, table = self.class_names, self.predictions
        counts = confusion_matrix(table["target"], table["pred"], labels=range(len(names)))
        return pd.DataFrame(counts, pd.Index(names, name="true"), pd.Index(names, name="predicted"))

    def blocks(self) -> list[str | Table]:
        """Return the data, warnings, and the tables that the report has too."""
        from biopsy.evaluation.sections import (
            table_at_prevalence,
            table_of_classes,
            table_of_points,
            table_of_subgroups,
        )
        from biopsy.reporting.elements import table_of_meanings, table_of_metrics

        m = self.metrics
        unit, subset = m.unit, m.subset
        blocks: list[str | Table] = [*self._describe_data(), *self._describe_model()]
        on_subset = f" on the {subset} subset" if subset else ""
        blocks += [table_of_metrics(m, on_subset, brief=True), table_of_meanings(m)]
        blocks.append(table_of_classes(m.classification_report))
        if m.operating_points:
            blocks.append(table_of_points(m.operating_points, subset))
        if m.at_prevalence:
            blocks.append(table_at_prevalence(m.at_prevalence))
        if m.subgroups:
            blocks.append(table_of_subgroups(m.subgroups, len(m.class_names), unit))
        return blocks

    def _describe_data(self) -> list[str]:
        """Return what was evaluated, and what limits the results."""
        m = self.metrics
        lines = [m.title] if m.title else []
        if m.synthetic:
            lines.append("The patients are synthetic: these results say nothing about real tissue.")
        if m.split.patients_overlap:
            lines.append("PATIENTS OVERLAP on this split: these results do not apply to new patients.")
        lines += [f"WARNING: {warning}" for warning in m.warnings]
        named = f"{m.subset} subset of split {m.split.name}: " if m.subset else ""
        lines.append(named + count_patches(m.n_patches, m.n_patients, m.unit))
        if m.ledger:
            times, runs = count(m.ledger["times"], "time"), count(m.ledger["runs"], "run")
            lines.append(f"this test subset has been evaluated {times}, by {runs}")
        return lines

    def _describe_model(self) -> list[str]:
        """Return the baseline, abstention, and the counts at the threshold."""
        lines, m = [], self.metrics
        if m.baseline:
            text, gain = f"colour-only baseline: AUROC {number(m.baseline.auroc)}", m.baseline.gain
            if gain is not None and gain.low is not None:
                interval = f"{gain.low:+.3f} to {gain.high:+.3f}"
                text += f"; gain of the model {gain.value:+.3f} ({interval})"
            lines.append(text)
        if m.abstention:
            lines.append(abstention_summary(m.abstention))
        if m.positive_class and m.confusion and m.threshold:
            counts = "  ".join(f"{name.upper()} {value:,}" for name, value in vars(m.confusion).items())
            lines.append(f"positive class {class_title(m.positive_class)}: {counts}")
            rule, chosen_on = m.threshold["rule"], m.threshold["chosen_on"]
            chosen = f" ({rule}, chosen on {chosen_on})" if chosen_on else ""
            lines.append(f"at threshold {m.threshold['value']:.3f}{chosen}")
        return lines

    def plot_roc(self) -> "Figure":
        """Draw the ROC curve with the threshold marked; two classes only."""
        from biopsy.evaluation.figures import draw_roc

        truth, prob = self._binary("ROC curve")
        patch = self.metrics.patch
        point = patch["sensitivity"].value, patch["specificity"].value
        return draw_roc(truth, prob, operating_point=point)

    def plot_precision_recall(self) -> "Figure":
        """Draw precision against recall with the threshold marked; two classes only."""
        from biopsy.evaluation.figures import draw_precision_recall

        truth, prob = self._binary("precision-recall curve")
        patch = self.metrics.patch
        point = patch["sensitivity"].value, patch["ppv"].value
        return draw_precision_recall(truth, prob, operating_point=point)

    def plot_calibration(self) -> "Figure":
        """Draw observed frequency against predicted probability (multi-class: of the predicted class)."""
        from biopsy.evaluation.calibration.section import draw_calibration

        bins, positive = self.metrics.calibration["after"].bins, self.metrics.positive_class
        return draw_calibration(bins, positive=positive and class_title(positive))

    def plot_confusion(self) -> "Figure":
        """Draw the confusion matrix."""
        from biopsy.evaluation.figures import draw_confusion_matrix

        titles = [class_title(name) for name in self.class_names]
        return draw_confusion_matrix(self.confusion_matrix().to_numpy(), titles)

    def _binary(self, curve: str) -> tuple[np.ndarray, np.ndarray]:
        """Return whether each patch is positive, and its probability."""
        positive = self.metrics.positive_class
        if positive is None:
            raise MetricError(
                f"a {curve} needs two classes; this evaluation has {len(self.class_names)}", "classes"
            )
        is_positive = self.predictions["target"].to_numpy(int) == self.class_names.index(positive)
        return is_positive.astype(int), self.predictions["prob"].to_numpy(float)


def abstention_summary(abstention: Abstention) -> str:
    """Return how many patches a model abstains on, and whether its coverage guarantee is met."""
    if abstention.patient is None:
        return f"no abstention: {abstention.reason}"
    share = abstention.patient.abstained.value
    scope = "per class" if abstention.guarantee == "class-conditional" else "over all classes"
    target = f"target coverage {abstention.target_coverage:g} {scope}"
    return f"abstains on {100 * share:.1f} % of patches; {target}: {abstention.verdict}"
