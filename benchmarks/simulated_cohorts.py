"""Simulated cohorts of which the truth is known: patients who differ, patches who resemble each other.

A score is drawn for each patch and turned into a probability; the patient shifts the scores of all its
patches, moves its positives apart from its negatives more or less, and has its own share of positives. The
pooled AUROC, sensitivity and specificity of the population then have closed forms, which is what the tests of
intervals lean on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from biopsy.core.seeds import make_rng

SHIFT_SD = 0.6  # of patients, beside patches of sd 1
GAP_SD = 0.5
PREVALENCE = (1.5, 3.5)  # Beta: mean .3, sd .19


@dataclass(frozen=True)
class Cohort:
    """One simulated test side; arrays have shape ``(n_patches,)``."""

    target: NDArray[np.int64]
    prob: NDArray[np.float64]
    patient_ids: NDArray[np.int64]


@dataclass(frozen=True)
class Population:
    """Patients who differ strongly, with a stated pooled AUROC where patients have patches of both classes.

    Attributes:
        auroc: Of `draw` with patients of equal size.
        prevalence: Beta parameters of the share of a patient's patches that are positive.
        one_class: Each patient has patches of one class only; the share is then that of positive patients.
        size_exponent: Of the Pareto distribution of a patient's number of patches (smallest a third of the
            mean of the uncut distribution at exponent 1.5, largest 40 times it); None gives all the same.
        hardness: How much closer together the classes lie, in sd of a patch, per sd of a patient's size
            (normal scores): above 0 the patients with more patches are the harder ones.

    Example:
        >>> cohort = Population(auroc=0.83).draw(n_patients=6, patches_per_patient=10, seed=0)
        >>> len(cohort.prob)
        60
    """

    auroc: float = 0.83
    prevalence: tuple[float, float] = PREVALENCE
    one_class: bool = False
    size_exponent: float | None = None
    hardness: float = 0.0

    @property
    def gap(self) -> float:
        """How far positive patches score above negative ones, in sd of a patch."""
        return float(norm.ppf(self.auroc) * np.sqrt(2 * (1 + SHIFT_SD**2) + GAP_SD**2))

    @property
    def prior(self) -> float:
        """Logit of the mean share of positive patches."""
        a, b = self.prevalence
        return float(logit(a / (a + b)))

    def prob_of(self, score: NDArray[np.float64]) -> NDArray[np.float64]:
        """Turn scores into probabilities that are about calibrated over the whole population."""
        return expit((self.gap * score - self.gap**2 / 2) / (1 + SHIFT_SD**2) + self.prior)

    def score_of(self, prob: float) -> float:
        """Return the score that has this probability."""
        return float(((logit(prob) - self.prior) * (1 + SHIFT_SD**2) + self.gap**2 / 2) / self.gap)

    def sensitivity(self, threshold: float) -> float:
        """Return the population's sensitivity where ``prob >= threshold`` is called positive."""
        return float(norm.cdf((self.gap - self.score_of(threshold)) / np.sqrt(1 + SHIFT_SD**2 + GAP_SD**2)))

    def specificity(self, threshold: float) -> float:
        """Return the population's specificity at a threshold."""
        return float(norm.cdf(self.score_of(threshold) / np.sqrt(1 + SHIFT_SD**2)))

    def draw(self, n_patients: int, patches_per_patient: int, *, seed: int) -> Cohort:
        """Draw a cohort; the same seed gives the same cohort."""
        return self.draw_pair(n_patients, patches_per_patient, seed=seed, n_models=1)[0]

    def draw_pair(
        self, n_patients: int, patches_per_patient: int, *, seed: int, n_models: int = 2
    ) -> list[Cohort]:
        """Draw models of one population performance on the same patches.

        Patients shift every model's scores alike and, from the second model on, half of each patient's effect
        and of each patch's noise is a model's own: the models differ on every cohort and in no population.
        """
        rng = make_rng(seed, "cohort", n_patients, patches_per_patient)
        shift = rng.normal(0, SHIFT_SD, n_patients)
        gap = rng.normal(self.gap, GAP_SD, n_patients)
        prevalence = rng.beta(*self.prevalence, n_patients)
        if self.one_class:
            prevalence = (rng.random(n_patients) < prevalence).astype(np.float64)
        sizes = np.full(n_patients, patches_per_patient)
        if self.size_exponent is not None:
            rank = rng.random(n_patients)
            spread = (1 - rank) ** (-1 / self.size_exponent)
            sizes = np.minimum(patches_per_patient / 3 * spread, 40 * patches_per_patient).astype(np.int64)
            gap = gap - self.hardness * norm.ppf(rank)
        patient_ids = np.repeat(np.arange(n_patients), sizes)
        target = (rng.random(len(patient_ids)) < prevalence[patient_ids]).astype(np.int64)
        noise = rng.normal(size=len(patient_ids))
        cohorts = []
        for _ in range(n_models):
            own_shift, own_gap, own_noise = shift, gap, noise
            if n_models > 1:
                mix = np.sqrt(0.5)
                own_shift = mix * (shift + rng.normal(0, SHIFT_SD, n_patients))
                own_gap = self.gap + mix * (gap - self.gap + rng.normal(0, GAP_SD, n_patients))
                own_noise = mix * (noise + rng.normal(size=len(noise)))
            score = own_shift[patient_ids] + own_gap[patient_ids] * target + own_noise
            cohorts.append(Cohort(target, self.prob_of(score), patient_ids))
        return cohorts


POPULATIONS = {
    "mixed": Population(),
    "rare": Population(prevalence=(0.3, 5.7)),
    "one class": Population(prevalence=(2.0, 3.0), one_class=True),
    "Pareto": Population(size_exponent=1.5),
    "Pareto, harder": Population(size_exponent=1.5, hardness=0.5),
}
"""Cohorts of the coverage table: both classes in every patient; few patients with positive patches; patients
of one class each; a few patients with most patches; the same, and those are the harder ones."""


@dataclass(frozen=True)
class UnevenPatients:
    """Patients who differ in how hard their patches are and, if asked for, in how many they have.

    A patch is called right by a margin, normal about the mean of its patient; its probability for its true
    class is ``expit`` of that margin. What share of a new patient's true classes lies in the conformal sets
    of any quantile then has a closed form.

    Attributes:
        margin: Mean margin.
        patient_sd: Of patients, beside patches of sd 1.
        size_sd: Of the logarithm of a patient's number of patches; 0 gives all the same.
        size_with_margin: Correlation of that logarithm with the patient's margin: above 0 the patients with
            more patches are the easier ones.
    """

    margin: float = 1.5
    patient_sd: float = 1.0
    size_sd: float = 0.0
    size_with_margin: float = 0.0

    def coverage(self, quantile: float) -> float:
        """Return the share of patches, every patient weighing the same, that score at most ``quantile``."""
        if quantile >= 1:
            return 1.0
        return float(norm.cdf((self.margin - logit(1 - quantile)) / np.sqrt(1 + self.patient_sd**2)))

    def draw(self, n_patients: int, patches_per_patient: float, *, seed: int) -> Cohort:
        """Draw a cohort of that many patches a patient on average; the same seed gives the same cohort."""
        rng = make_rng(seed, "uneven", n_patients, patches_per_patient)
        ease, other = rng.normal(size=(2, n_patients))
        log_size = self.size_with_margin * ease + np.sqrt(1 - self.size_with_margin**2) * other
        size = patches_per_patient * np.exp(self.size_sd * log_size - self.size_sd**2 / 2)
        patient_ids = np.repeat(np.arange(n_patients), np.maximum(1, size.round()).astype(np.int64))
        target = rng.integers(0, 2, len(patient_ids))
        margin = rng.normal(self.margin + self.patient_sd * ease[patient_ids])
        return Cohort(target, expit(np.where(target == 1, margin, -margin)), patient_ids)
