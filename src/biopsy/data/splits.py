"""Splits: assignment of patches to train, validation and test subsets, or to folds, grouped by patient.

A split is stored in the pack as ``splits/<name>.csv`` (one row per patch: its subset or fold) and
``<name>.json`` (protocol, seed, parameters, counts, hash of the pack). `biopsy.data.protocols` divides the
patches.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Required

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from biopsy.core.errors import FileFormatError, SplitError, UserFileError, raising, suggest
from biopsy.core.files import read_json, sha256_file, update_directory, write_json
from biopsy.core.loaders import validate
from biopsy.core.results import Output, Table, number
from biopsy.core.tables import read_csv_table, write_csv
from biopsy.core.text import class_title, normalize_id, plural
from biopsy.data.packs import Pack, Unit, group_by_unit
from biopsy.data.protocols import LEAK_PROTOCOLS, MAY_OVERLAP, PROTOCOLS, PUBLISHED
from biopsy.data.protocols.groups import ALWAYS_TRAIN, NO_TEST, SUBSETS, Cases, Request
from biopsy.data.protocols.pseudo_slides import N_PSEUDO_SLIDES, PSEUDO_SLIDE
from biopsy.recipes import load_recipe
from biopsy.statistics.resampling import MIN_GROUPS

FORMAT = "biopsy-split/1"
_REMEDY = "restore the file, or make the split again with `biopsy split`"
FOLDER = "splits"
LEFT_OUT = -2
"""Fold number of patches that are in no fold and not used for training."""

UnknownPatients = Literal["leave-out", "alone"]
MAX_LISTED = 20  # patches without an id that are listed by name

logger = logging.getLogger(__name__)


class SubsetCounts(TypedDict, total=False):
    """Numbers of patches and groups (units) of a subset; groups are null without patients and slides."""

    patches: Required[int]
    groups: Required[int | None]
    per_class: Required[dict[str, int]]
    groups_per_class: dict[str, int]


class SplitParameters(TypedDict, total=False):
    """Further parameters of a split, as recorded by its protocol, with its counts and warnings."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    test_is_validation: bool
    placebo: str
    unknown_patients: dict[str, object]
    counts: dict[str, SubsetCounts] | dict[str, list[dict[str, SubsetCounts]]]
    warnings: list[str]
    limits: list[str]


@dataclass(frozen=True)
class Split(Output):
    """Assignment of the patches of a pack to subsets or folds.

    Attributes:
        protocol: Key of `biopsy.data.protocols.PROTOCOLS`.
        parameters: Further parameters, and ``counts`` per subset (with folds: a list under ``folds``).
        table: One row per patch: ``patch_id`` and ``subset``, or ``patch_id`` and ``fold``; of the protocol
            ``pseudo-slides`` also ``pseudo_slide``.
        overlap: Whether a patient is in two subsets; None without patients and slides.
    """

    name: str
    protocol: str
    unit: Unit
    seed: int
    parameters: SplitParameters
    table: pd.DataFrame
    overlap: bool | None
    pack_sha256: str = ""

    @property
    def n_folds(self) -> int:
        """Number of folds, 0 for a split with subsets."""
        return int(self.table["fold"].max()) + 1 if "fold" in self.table else 0

    @property
    def is_published(self) -> bool:
        """Whether it reproduces a published split, in which patients may overlap."""
        return self.protocol in PUBLISHED

    @property
    def may_overlap(self) -> bool:
        """Whether patients may be in two subsets: in published splits and in leakage experiments."""
        return self.protocol in MAY_OVERLAP

    @property
    def test_is_validation(self) -> bool:
        """Whether the test subset is also used for validation; the validation subset is then empty."""
        return bool(self.parameters.get("test_is_validation", False))

    def blocks(self) -> list[str | Table]:
        blocks: list[str | Table] = [
            f"split {self.name!r} ({self.protocol}) by {self.unit}, seed {self.seed}"
        ]
        if self.overlap:
            reason = "as published" if self.is_published else "on purpose"
            blocks.append(
                f"PATIENTS OVERLAP between subsets, {reason}: results on it do not apply to new patients"
            )
        if PSEUDO_SLIDE in self.table:
            held_back = "validation" if self.parameters.get("test_named") else "validation and test"
            blocks.append(
                f"{held_back} patches are of other pseudo-slides (groups alike in colour and texture) than "
                "training patches; these are not slides, so neighbours may still be in two subsets, and "
                "intervals are over patches"
            )
        if self.unit == "patch":
            blocks.append(
                "patients are unknown: patches of one patient may be in several subsets, and results may not "
                "apply to new patients; prepare the pack with --patients"
            )
        if self.test_is_validation:
            blocks.append(
                "the test subset is also the validation subset, as published: "
                "all choices are made on test data"
            )
        counts: Any = self.parameters["counts"]
        rows = []
        for fold, subsets in enumerate(counts.get("folds", [counts])):
            for subset, sizes in subsets.items():
                if sizes["patches"]:
                    groups = [] if self.unit == "patch" else [sizes["groups"]]
                    values = sizes["patches"], *groups, *sizes["per_class"].values()
                    rows.append([*([str(fold)] if self.n_folds else []), subset, *map(number, values)])
        groups = [] if self.unit == "patch" else [plural(self.unit)]
        header = [*(["fold"] if self.n_folds else []), "subset", "patches", *groups]
        return [*blocks, Table([*header, *map(class_title, sizes["per_class"])], rows)]

    def to_json(self) -> dict[str, object]:
        names = ("name", "protocol", "unit", "seed", "parameters")
        return {name: getattr(self, name) for name in names} | {"patients_overlap": self.overlap}

    def subsets(self, pack: Pack, fold: int | None = None) -> np.ndarray:
        """Return the subset of each patch, in the pack's order.

        Args:
            fold: Test fold of a split with folds. The next fold (of another patient) is used for validation,
                the others for training.

        Returns:
            ``"train"``, ``"validation"``, ``"test"`` or ``""`` (left out), ``(n_patches,)``.

        Raises:
            SplitError: If the split belongs to another pack, the fold does not exist, or patients overlap
                although `may_overlap` is false.
        """
        subsets = self.assign(pack, fold)
        if not self.may_overlap and pack.unit != "patch":
            check_no_leakage(pack.group_ids, subsets, unit=pack.unit)
        return subsets

    def assign(self, pack: Pack, fold: int | None = None) -> np.ndarray:
        """Return the subset of each patch as `subsets` does, without checking for overlap (for audits)."""
        if not self.n_folds:
            if fold is not None:
                raise SplitError(f"split {self.name!r} has subsets, not folds; omit fold={fold}", "folds")
            return self._align(pack, "subset").astype("<U10")
        if fold is None or not 0 <= fold < self.n_folds:
            raise SplitError(
                f"split {self.name!r} has the folds 0 to {self.n_folds - 1}; got fold={fold}", "folds"
            )
        folds = self._align(pack, "fold")
        subsets = np.full(len(folds), "train", dtype="<U10")
        several_slides = self.unit == "slide" and pack.unit == "patient"
        next_fold = self._next_patient(pack, folds, fold) if several_slides else (fold + 1) % self.n_folds
        if next_fold is not None:
            subsets[folds == next_fold] = "validation"
        subsets[folds == fold] = "test"
        subsets[folds == LEFT_OUT] = ""
        if several_slides:
            leave_out_siblings(pack.group_ids, subsets)
        return subsets

    def _next_patient(self, pack: Pack, folds: np.ndarray, fold: int) -> int | None:
        """Return the next fold without slides of the test patient, None if there is none."""
        tested = set(pack.group_ids[folds == fold])
        following = [(fold + step) % self.n_folds for step in range(1, self.n_folds)]
        return next((other for other in following if tested.isdisjoint(pack.group_ids[folds == other])), None)

    def _align(self, pack: Pack, column: str) -> np.ndarray:
        ids = pack.table["patch_id"]
        table = self.table
        if len(table) == len(ids) and (table["patch_id"].to_numpy() == ids.to_numpy()).all():
            return table[column].to_numpy()
        unknown = len(set(ids) - set(table["patch_id"]))
        surplus = len(set(table["patch_id"]) - set(ids))
        if unknown or surplus or table["patch_id"].duplicated().any():
            raise SplitError(
                f"split {self.name!r} does not match {pack.path.name}: {unknown:,} patches of the pack are "
                f"missing and {surplus:,} are unknown; make it for this pack with `biopsy split`",
                "other-pack",
            )
        return table.set_index("patch_id")[column].loc[ids].to_numpy()


def split(
    pack: Pack | Path | str,
    *,
    protocol: str,
    name: str | None = None,
    seed: int = 0,
    recipe: str | Path | Mapping[str, object] | None = None,
    cases: Cases | None = None,
    test_patients: Sequence[str] = (),
    val_patients: Sequence[str] = (),
    folds: int = 5,
    n_groups: int = N_PSEUDO_SLIDES,
    unit: Unit | None = None,
    unknown_patients: UnknownPatients = "leave-out",
    save: bool = True,
) -> Split:
    """Divide a pack's patients into train, validation and test subsets, or folds, and store the split.

    Args:
        pack: Pack to split.
        protocol: "official", "patients", "no-test", "folds", "leave-one-out", "site", "pseudo-slides",
            "kaggle-rows", "as-published", or one of a leakage experiment: "leak-apart", "leak-with",
            "leak-placebo", "leak-blocked-with" or "leak-blocked-placebo".
        name: Name of the split in the pack (default: the protocol).
        seed: Random seed; the order of patches has no influence.
        recipe: For ``as-published``: the recipe with the published split, or its ``[as_published.split]``
            table.
        cases: For ``official``: lists of cases, a csv with columns ``case_id,split`` or a folder of
            ``cases_train.txt``, ``cases_val.txt`` and ``cases_test.txt``.
        test_patients: Ids of test patients; for ``leave-one-out``, one fold each; for ``site``, sites; for
            ``pseudo-slides``, official subsets or sites; for ``leak-...``, the patient of whom half is
            tested, and optionally the patient of the placebo.
        val_patients: Ids of validation patients.
        folds: Number of folds.
        n_groups: For ``pseudo-slides``: number of groups of patches alike in colour and texture.
        unit: Grouping unit (default: the pack's).
        unknown_patients: Patches without a patient, in a pack where others have one: left out, or each its
            own group (``alone``).
        save: Whether to store the split in the pack, replacing one of the same name.

    Raises:
        SplitError: If the patients cannot be divided as requested, or a patient would be in two subsets.
        RecipeError: If no recipe has that name.
    """
    pack = Pack.open(pack)
    if protocol not in PROTOCOLS:
        raise SplitError(f"there is no protocol {protocol!r}; {suggest(protocol, PROTOCOLS)}", "name")
    unit = _choose_unit(pack, protocol, unit)
    no_group = pack.table[f"{unit}_id"].isna().to_numpy() if unit != "patch" else np.zeros(len(pack), bool)
    keeps_unknown = protocol in PUBLISHED or (protocol == "official" and cases is None)
    excluded = no_group & (unknown_patients == "leave-out" and not keeps_unknown)
    grouped = Pack(pack.path, pack.info, pack.patches, pack.table[~excluded].reset_index(drop=True))
    request = Request(
        pack=grouped,
        unit=unit,
        group_ids=group_by_unit(grouped.table, unit),
        seed=seed,
        n_folds=folds,
        test_ids=tuple(map(normalize_id, test_patients)),
        val_ids=tuple(map(normalize_id, val_patients)),
        cases=cases,
        recipe=load_recipe(recipe).as_published.split if isinstance(recipe, str | Path) else recipe,
        n_groups=n_groups,
    )
    assigned, parameters = PROTOCOLS[protocol](request)
    further = {name: parameters.pop(name) for name in (PSEUDO_SLIDE,) if name in parameters}
    column = "subset" if assigned.dtype.kind == "U" else "fold"
    values = np.full(len(pack), "" if column == "subset" else LEFT_OUT, assigned.dtype)
    values[~excluded] = assigned
    if no_group.any():
        treatment = "left out" if excluded.any() else "as given" if keeps_unknown else "each alone"
        parameters["unknown_patients"] = _note_unknown_groups(pack, unit, no_group, treatment)
    result = Split(
        name=_check_name(name or protocol),
        protocol=protocol,
        unit=unit,
        seed=seed,
        parameters=SplitParameters(**parameters),  # type: ignore[typeddict-item]
        table=pd.DataFrame({"patch_id": pack.table["patch_id"].to_numpy(), column: values, **further}),
        overlap=None,
        pack_sha256=pack.info.content_sha256,
    )
    result = _check_split(result, pack)
    if save:
        save_split(pack, result)
    return result


def with_subsets(
    split: Split, pack: Pack, subsets: np.ndarray, *, name: str, note: Mapping[str, object]
) -> Split:
    """Return a copy of a split with other subsets and another name; ``note`` is added to its parameters."""
    table = pd.DataFrame({"patch_id": pack.table["patch_id"].to_numpy(), "subset": subsets})
    parameters = SplitParameters(**{**split.parameters, **note})  # type: ignore[typeddict-item]
    changed = replace(split, name=_check_name(name), parameters=parameters, table=table)
    return _check_split(changed, pack)


def save_split(pack: Pack, split: Split) -> Path:
    """Write a split into its pack atomically and return the path of its table."""
    names = [f"{_check_name(split.name)}{suffix}" for suffix in (".csv", ".json")]
    with update_directory(pack.path / FOLDER, *names, last=names[1], adopt=True) as partial:
        write_split(partial / names[0], split)
    return pack.path / FOLDER / names[0]


def load_split(pack: Pack, name: str) -> Split:
    """Read a split of a pack.

    Raises:
        SplitError: If the pack has no split of that name, or the split belongs to another pack.
    """
    path = pack.path / FOLDER / f"{_check_name(name)}.csv"
    if not path.is_file():
        raise SplitError(
            f"{pack.path.name} has no split {name!r}; {suggest(name, [*list_splits(pack), *PROTOCOLS])}",
            "name",
        )
    split = read_split(path)
    split.assign(pack, 0 if split.n_folds else None)
    if split.pack_sha256 != pack.info.content_sha256:
        logger.warning("split %s was made before the content of %s changed", name, pack.path.name)
    return split


def list_splits(pack: Pack) -> list[str]:
    return sorted(
        path.stem for path in (pack.path / FOLDER).glob("*.csv") if path.with_suffix(".json").is_file()
    )


def find_split(pack: Pack, name: str | None = None) -> Split:
    """Load a split, or make the split of a protocol that needs no further options.

    Args:
        name: Name of a split or of a protocol (default: ``"official"`` if the data set has official subsets,
            else ``"patients"``).

    Returns:
        The split. A new one is made with seed 0 and stored in the pack if the pack is writable.

    Raises:
        SplitError: If the name is neither a split nor such a protocol.
    """
    if name is None:
        name = "official" if pack.has_official_subsets else "patients"
    if name in list_splits(pack) or name not in PROTOCOLS:
        return load_split(pack, name)
    made = split(pack, protocol=name, save=False)
    try:
        save_split(pack, made)
    except (OSError, UserFileError) as error:
        logger.warning("split %s cannot be written into %s: %s", name, pack.path.name, error)
    return made


def write_split(path: Path | str, split: Split) -> Path:
    """Write a split as csv, and its metadata as json under the same name."""
    path = Path(path)
    write_csv(path, split.table)
    write_json(
        path.with_suffix(".json"),
        {
            "format": FORMAT,
            **{name: getattr(split, name) for name in ("name", "protocol", "unit", "seed", "parameters")},
            "patients_overlap": split.overlap,
            "pack_sha256": split.pack_sha256,
            "table_sha256": sha256_file(path),
        },
    )
    return path


class _Document(BaseModel):
    """Content of the json file of a split."""

    name: str
    protocol: str
    unit: Unit
    seed: int
    parameters: SplitParameters
    patients_overlap: bool | None
    pack_sha256: str
    table_sha256: str = ""


def read_split(path: Path | str) -> Split:
    """Read a split from its csv and json files, as stored in a pack or a run.

    Raises:
        SplitError: If the csv is not a split, or was changed since it was written.
        DataError: If the json is missing, damaged, changed or of a newer format.
    """
    path = Path(path)
    json_path = path.with_suffix(".json")
    document = validate(
        json_path, _Document, read_json(json_path, format=FORMAT, remedy=_REMEDY, may_lack_hash=True)
    )
    with raising(SplitError):
        if document.table_sha256 and sha256_file(path) != document.table_sha256:
            raise FileFormatError(path, "altered", f"was changed since it was written; {_REMEDY}")
        table = read_csv_table(path, required=["patch_id"])
    subsets = set(table["subset"].fillna("")) if "subset" in table else set()
    folds = table["fold"].fillna("") if "fold" in table else pd.Series(dtype=str)
    are_folds = len(folds) > 0 and folds.str.fullmatch(f"{ALWAYS_TRAIN}|{LEFT_OUT}|[0-9]{{1,6}}").all()
    if not subsets <= {*SUBSETS, ""} or not (subsets or are_folds):
        raise SplitError(
            f"{path} is no split: it needs patch_id and subset (train, validation, test) or fold (numbers)",
            "columns",
        )
    values = {"subset": table["subset"].fillna("")} if subsets else {"fold": folds.astype("int64")}
    if PSEUDO_SLIDE in table:
        values[PSEUDO_SLIDE] = table[PSEUDO_SLIDE].fillna("")
    return Split(
        **document.model_dump(exclude={"patients_overlap", "table_sha256"}),
        table=pd.DataFrame({"patch_id": table["patch_id"], **values}),
        overlap=document.patients_overlap,
    )


def _choose_unit(pack: Pack, protocol: str, unit: Unit | None) -> Unit:
    if unit is None or unit == pack.unit:
        return pack.unit
    if unit == "slide" and protocol == "leave-one-out" and pack.table["slide_id"].notna().all():
        return unit
    raise SplitError(
        f"{pack.path.name} is grouped by {pack.unit}; protocol {protocol!r} cannot divide it by {unit}",
        "unit",
    )


def _note_unknown_groups(pack: Pack, unit: Unit, no_group: np.ndarray, treatment: str) -> dict[str, object]:
    first = pack.table["patch_id"][no_group].head(MAX_LISTED).tolist()
    logger.warning(
        "%s of %s patches have no %s_id and are %s: %s%s",
        *(f"{no_group.sum():,}", f"{len(pack):,}", unit, treatment, ", ".join(first[:3])),
        " ..." if no_group.sum() > 3 else "",
    )
    return {"patches": int(no_group.sum()), "treatment": treatment, "first": first}


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SplitError(
            f"a split cannot be called {name!r}; use letters, digits, dots, dashes and underscores", "name"
        )
    return name


def _check_split(split: Split, pack: Pack) -> Split:
    """Refuse empty subsets and patient overlap; return the split with counts, warnings and limits."""
    folds: list[int | None] = list(range(split.n_folds)) if split.n_folds else [None]
    unused = "validation" if split.test_is_validation else "test" if split.protocol == NO_TEST else None
    counts: list[dict[str, SubsetCounts]] = []
    warnings: list[str] = []
    overlap = False
    for fold in folds:
        subsets = split.assign(pack, fold)
        fold_text = "" if fold is None else f" of fold {fold}"
        counts.append({subset or "left_out": _count(pack, subsets == subset) for subset in (*SUBSETS, "")})
        for subset in SUBSETS:
            if subset == unused:
                continue
            n_classes = sum(n_patches > 0 for n_patches in counts[-1][subset]["per_class"].values())
            if n_classes == 0 and not (split.protocol == "official" and (subsets != "").any()):
                raise SplitError(
                    f"no patches are left for {subset}{fold_text}; name other {plural(split.unit)}", "too-few"
                )
            if n_classes < 2:
                warnings.append(f"{subset}{fold_text} has {'one class only' if n_classes else 'no patches'}")
        if pack.unit != "patch":
            if not split.may_overlap:
                check_no_leakage(pack.group_ids, subsets, unit=pack.unit)
            overlap = overlap or bool(find_overlap(pack.group_ids, subsets))
    limits = _state_limits(pack, split.protocol, counts)
    for text in limits:
        logger.warning("split %s: %s", split.name, text)
    if warnings:
        more = f" (and {len(warnings) - 1} more warnings)" if len(warnings) > 1 else ""
        logger.warning("split %s: %s%s", split.name, warnings[0], more)
    counted = SplitParameters(
        counts={"folds": counts} if split.n_folds else counts[0], warnings=warnings, limits=limits
    )
    overlap_known = None if pack.unit == "patch" else overlap
    return replace(split, parameters=split.parameters | counted, overlap=overlap_known)


def _count(pack: Pack, chosen: np.ndarray) -> SubsetCounts:
    per_class = np.bincount(pack.target[chosen], minlength=len(pack.class_names))
    count = SubsetCounts(
        patches=int(chosen.sum()),
        groups=None,
        per_class=dict(zip(pack.class_names, per_class.tolist(), strict=True)),
    )
    if pack.unit != "patch":
        count["groups"] = len(pd.unique(pack.group_ids[chosen]))
        count["groups_per_class"] = _count_groups_per_class(pack, chosen)
    return count


def _count_groups_per_class(pack: Pack, chosen: np.ndarray) -> dict[str, int]:
    """Return the number of patients (slides) with patches of each class."""
    return {
        name: len(pd.unique(pack.group_ids[chosen & (pack.target == index)]))
        for index, name in enumerate(pack.class_names)
    }


def _state_limits(pack: Pack, protocol: str, counts: Sequence[Mapping[str, SubsetCounts]]) -> list[str]:
    """Return one sentence per class whose test patients are too few for a confidence interval."""
    if pack.unit == "patch" or protocol in (NO_TEST, *LEAK_PROTOCOLS):  # test none or one by design
        return []
    tested = {
        name: sum(fold["test"]["groups_per_class"][name] for fold in counts) for name in pack.class_names
    }
    present = _count_groups_per_class(pack, np.full(len(pack), True))
    limits = []
    for name, n_tested in tested.items():
        if n_tested >= MIN_GROUPS or not present[name]:
            continue
        metrics = "AUROC, precision and recall"
        if pack.info.positive_class is not None:
            metrics = f"AUROC and {'sensitivity' if name == pack.info.positive_class else 'specificity'}"
        text = (
            f"{n_tested} of {present[name]} {plural(pack.unit)} with {class_title(name)} patches are tested"
        )
        text += f": no interval for {metrics}, which needs {MIN_GROUPS}"
        if present[name] < MIN_GROUPS:
            text += f"; nor does another split allow one, but leave-one-out reports each {pack.unit}"
        elif len(counts) == 1:
            text += "; --protocol folds or leave-one-out tests all of them"
        limits.append(text)
    return limits


def check_no_leakage(group_ids: np.ndarray, subsets: np.ndarray, *, unit: str = "patient") -> None:
    """Refuse subsets that share a patient.

    Args:
        group_ids: The patient of each patch, ``(n_patches,)``.
        subsets: The subset of each patch; ``""`` if none.

    Example:
        >>> check_no_leakage(np.array(["a", "a", "b"]), np.array(["train", "train", "test"]))
    """
    overlap = find_overlap(group_ids, subsets)
    if overlap:
        patient, group_subsets = next(iter(overlap.items()))
        more = (
            f" (and {len(overlap) - 1:,} more {plural(unit)} are in two subsets)" if len(overlap) > 1 else ""
        )
        raise SplitError(
            f"{unit} {patient} is in {' and '.join(group_subsets)}{more}; split by {unit}, not by patch",
            "overlap",
        )


def leave_out_siblings(patient_ids: np.ndarray, subsets: np.ndarray) -> None:
    """Exclude other slides of the test patient, then of the validation patient, in place."""
    for subset, others in (("test", ("train", "validation")), ("validation", ("train",))):
        in_patients = np.isin(patient_ids, np.unique(patient_ids[subsets == subset]))
        subsets[in_patients & np.isin(subsets, others)] = ""


def find_overlap(group_ids: np.ndarray, subsets: np.ndarray) -> dict[str, list[str]]:
    """Return the subsets of each group that is in two or more subsets."""
    codes, names = pd.factorize(np.asarray(group_ids, dtype=str), sort=True)
    in_subset = np.stack(
        [np.bincount(codes[subsets == subset], minlength=len(names)) > 0 for subset in SUBSETS], axis=1
    )
    return {
        str(names[group]): [
            subset for subset, present in zip(SUBSETS, in_subset[group], strict=True) if present
        ]
        for group in np.flatnonzero(in_subset.sum(axis=1) > 1)
    }
