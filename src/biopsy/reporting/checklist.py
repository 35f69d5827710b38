"""Items of two reporting guidelines, linked to the sections of a report that address them.

The items are those of TRIPOD+AI (Collins et al. 2024, BMJ 385:e078378) and of STARD 2015 (Bossuyt et al.
2015, BMJ 351:h5527) with the additions of STARD-AI (Sounderajah et al. 2025, Nature Medicine), paraphrased.
Most items without a section are for the authors of a study to write.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from biopsy.reporting.document import Answer, Checklist, Section, Text

TOP = ("answer", "Summary")


@dataclass(frozen=True)
class Item:
    """An item of a guideline.

    Attributes:
        number: Number in the guideline; empty for additions of STARD-AI.
        asks: The item, paraphrased.
        chapters: Ids of the sections that address it; those in the report are linked.
    """

    number: str
    asks: str
    chapters: tuple[str, ...] = ()


TRIPOD_AI = (
    Item("1", "title: development or evaluation of a prediction model, of whom, of what", ("answer",)),
    Item("2", "structured abstract", ("answer",)),
    Item("3a", "the medical context, and which models exist"),
    Item("3b", "for whom it is meant, who would use it, and where in care", ("answer",)),
    Item("3c", "known inequalities between groups of people"),
    Item("4", "objective: to develop, to evaluate or both", ("answer",)),
    Item("5a", "sources of the data, for training and for evaluation apart", ("data",)),
    Item("5b", "dates of collection"),
    Item("6a", "setting, number and place of centres"),
    Item("6b", "who was eligible"),
    Item("6c", "treatments, where they matter"),
    Item("7", "how data were prepared and checked", ("data", "recipe")),
    Item("8a", "what is predicted, and how it was assessed", ("answer", "data")),
    Item("8b", "who assessed it, with which training"),
    Item("8c", "whether that was blinded"),
    Item("9a", "which predictors were considered, and why", ("recipe",)),
    Item("9b", "how predictors are measured: what the model is fed", ("recipe", "training")),
    Item("9c", "who assessed predictors that need judgement"),
    Item("10", "how the sample size came about", ("data",)),
    Item("11", "missing data", ("data",)),
    Item("12a", "how data were divided for training, choosing and testing", ("data",)),
    Item("12b", "how predictors were transformed", ("recipe",)),
    Item(
        "12c",
        "kind of model, all steps of building it, settings, internal validation",
        ("training", "recipe"),
    ),
    Item(
        "12d",
        "differences between centres, slides or patients, and how they are handled",
        ("patients", "slides"),
    ),
    Item("12e", "measures of ranking, calibration and usefulness", ("numbers", "calibration", "decisions")),
    Item("12f", "recalibration", ("calibration",)),
    Item("12g", "how predictions are computed when evaluating", ("recipe", "reproduce")),
    Item("13", "class imbalance, its handling, and recalibration after it", ("recipe", "calibration")),
    Item("14", "what was done for fairness", ("subgroups",)),
    Item("15", "output: probability or class, thresholds and why", ("decisions", "numbers")),
    Item("16", "how training and evaluation data differ", ("data",)),
    Item("17", "ethics approval and consent"),
    Item("18a", "funding"),
    Item("18b", "conflicts of interest"),
    Item("18c", "protocol"),
    Item("18d", "registration"),
    Item("18e", "how to get the data", ("data",)),
    Item("18f", "how to get the code", ("reproduce",)),
    Item("19", "involvement of patients and public"),
    Item("20a", "flow of patients and patches, with and without the outcome", ("data",)),
    Item("20b", "characteristics of patients", ("patients",)),
    Item("20c", "comparison of training and evaluation data", ("data",)),
    Item("21", "number of patients and of outcomes in each analysis", ("data", "numbers")),
    Item("22", "the whole model, so that others can use it", ("training", "reproduce")),
    Item("23a", "performance with intervals, in subgroups too", ("numbers", "patients")),
    Item("23b", "differences between clusters", ("patients", "slides")),
    Item("24", "results of updating the model", ("calibration",)),
    Item("25", "interpretation, fairness included", ("answer",)),
    Item("26", "limits: who is not represented, sample size, overfitting", ("answer", "baseline")),
    Item("27a", "what happens with poor or missing input", ("abstention",)),
    Item("27b", "what users must know and do", ("answer",)),
    Item("27c", "next steps"),
)
STARD_AI = (
    Item("1", "title: a study of accuracy, by which measure", ("answer",)),
    Item("2", "structured abstract", ("answer",)),
    Item("3", "background, intended use and role of the test", ("answer",)),
    Item("4", "objectives and hypotheses", ("answer",)),
    Item("5", "collected before or after the test was planned"),
    Item("6", "eligibility, of patients and of images", ("data",)),
    Item("7", "how patients were identified"),
    Item("8", "where and when"),
    Item("9", "consecutive, random or convenience series"),
    Item("", "where the data set comes from, its labels and their makers", ("data",)),
    Item("", "preparation of images: acquisition, quality, exclusions", ("data", "recipe")),
    Item("", "division into training, validation and test, and at which level", ("data",)),
    Item("10a", "the index test: model, version, how to run it", ("training", "recipe", "reproduce")),
    Item("10b", "the reference standard"),
    Item("11", "why that reference standard"),
    Item("12a", "cut-offs of the index test, chosen before or after", ("decisions", "numbers")),
    Item("12b", "cut-offs of the reference standard"),
    Item("13a", "whether readers of the test knew the reference", ("answer", "data")),
    Item("13b", "whether assessors of the reference knew the test"),
    Item("14", "methods for estimating and comparing accuracy", ("numbers", "baseline")),
    Item("15", "handling of indeterminate results", ("abstention",)),
    Item("16", "missing data", ("data",)),
    Item("17", "analyses of variability", ("patients", "slides", "errors")),
    Item("18", "intended sample size", ("data",)),
    Item("", "analysis of errors, bias and fairness", ("errors", "subgroups")),
    Item("19", "flow of patients", ("data",)),
    Item("20", "characteristics of patients", ("patients",)),
    Item("21a", "spread of severity among those with the condition"),
    Item("21b", "other diagnoses among those without"),
    Item("22", "time between test and reference"),
    Item("", "test on data from elsewhere"),
    Item("23", "cross table of test and reference", ("numbers",)),
    Item("24", "accuracy with its precision", ("numbers",)),
    Item("25", "adverse events"),
    Item("26", "limits: bias, uncertainty, who it may not hold for", ("answer", "baseline")),
    Item("27", "implications for practice", ("answer",)),
    Item("28", "registration"),
    Item("29", "where the protocol is"),
    Item("30", "funding"),
    Item("", "how to get data, code and model", ("reproduce",)),
)
GUIDELINES = (("TRIPOD+AI 2024", TRIPOD_AI), ("STARD 2015 with STARD-AI 2025", STARD_AI))


def describe_checklist(sections: Sequence[Section], *, has_subgroups: bool = False) -> Section:
    """Return the items of both guidelines, each linked to the sections that address it, or "not done".

    Args:
        has_subgroups: Whether the section on patients contains subgroups.
    """
    headings = dict([TOP, *((section.id, section.heading) for section in sections)])
    if has_subgroups and "patients" in headings:
        headings["subgroups"] = headings["patients"]
    lists = [
        Checklist(
            f"{guideline}: {sum(bool(_find(item, headings)) for item in items)} of {len(items)} items have a "
            "section here",
            [Answer(item.number, item.asks, _find(item, headings)) for item in items],
        )
        for guideline, items in GUIDELINES
    ]
    note = Text(
        "A link shows where the report addresses an item, not that it does so completely. Most items without "
        "a link need information from those who collected the data.",
        "note",
    )
    return Section("checklist", "Reporting checklist", [note, *lists])


def _find(item: Item, headings: dict[str, str]) -> list[tuple[str, str]]:
    """Return the anchors and headings of the sections that address an item."""
    return [
        ("patients" if chapter == "subgroups" else chapter, headings[chapter])
        for chapter in item.chapters
        if chapter in headings
    ]
