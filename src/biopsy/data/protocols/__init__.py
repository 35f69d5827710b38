"""Protocols that divide patches into subsets or folds, by name; one function each.

``groups`` divides patients, slides and sites, ``published`` follows official and published splits,
``pseudo_slides`` clusters patches where slides are unknown, ``leakage`` makes the conditions of the leakage
experiment.
"""

from collections.abc import Callable
from functools import partial

from biopsy.data.protocols.groups import (
    NO_TEST,
    Plan,
    Request,
    leave_one_out,
    leave_one_site_out,
    split_by_patient,
    split_into_folds,
    split_without_test,
)
from biopsy.data.protocols.leakage import make_leak_condition
from biopsy.data.protocols.pseudo_slides import split_by_pseudo_slide
from biopsy.data.protocols.published import cut_rows, follow_recipe, take_official_subsets

PROTOCOLS: dict[str, Callable[[Request], Plan]] = {
    "official": take_official_subsets,
    "patients": split_by_patient,
    NO_TEST: split_without_test,
    "folds": split_into_folds,
    "leave-one-out": leave_one_out,
    "site": leave_one_site_out,
    "pseudo-slides": split_by_pseudo_slide,
    "kaggle-rows": cut_rows,
    "as-published": follow_recipe,
    "leak-apart": partial(make_leak_condition, condition="apart", blocked=False),
    "leak-with": partial(make_leak_condition, condition="with", blocked=False),
    "leak-placebo": partial(make_leak_condition, condition="placebo", blocked=False),
    "leak-blocked-with": partial(make_leak_condition, condition="with", blocked=True),
    "leak-blocked-placebo": partial(make_leak_condition, condition="placebo", blocked=True),
}
LEAK_PROTOCOLS = tuple(name for name in PROTOCOLS if name.startswith("leak-"))
# Splits that reproduce a publication, whether or not patients overlap.
PUBLISHED = ("as-published", "kaggle-rows")
# Splits in which patients may be in two subsets.
MAY_OVERLAP = (*PUBLISHED, "leak-with", "leak-blocked-with")
