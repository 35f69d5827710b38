"""Inputs of the kinds that users of such tools report: each is read right, or refused and named.

``docs/reliability.md`` tables what becomes of them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile

import biopsy
from annotation_files import asap
from biopsy.core.errors import DataError, RunError, SplitError
from biopsy.data.packs import Pack
from biopsy.data.splits import split as make_split
from command_line import call as run_command
from conftest import PROJECT, encode_png
from refusals import refuses
from scn_files import write_scn

PATIENTS = ("P01", "P02", "P03", "P04")


def draw(seed: int, px: int = 16, dark: bool = False) -> np.ndarray:
    ground = [150, 80, 150] if dark else [225, 170, 200]
    noise = np.random.default_rng(seed).integers(-25, 25, (px, px, 3))
    return np.clip(np.array(ground) + noise, 0, 255).astype(np.uint8)


def write_folders(
    root: Path, patients: Iterable[str] = PATIENTS, classes: tuple[str, ...] = ("benign", "malignant")
) -> list[tuple[str, str]]:
    """Write class folders with two patches a patient and class; return patch ids and their patients."""
    rows = []
    for patient in patients:
        for k, name in enumerate(classes):
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(2):
                path = root / name / f"{patient}_{number}.png"
                path.write_bytes(encode_png(draw(len(rows), dark=k == 1)))
                rows.append((f"{name}/{patient}_{number}", patient))
    return rows


def write_table(path: Path, rows: Iterable[tuple], head: str = "patch_id,patient_id", sep: str = ",") -> Path:
    lines = [head, *(sep.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def call(*arguments: object) -> tuple[int, str, str]:
    """Run a command; return its exit code, what it printed and what it said."""
    done = run_command(*arguments)
    return done.exit_code, done.stdout, done.stderr


def prepare(source: Path, **options: object) -> Pack:
    return biopsy.prepare(source, source.with_name("made.pack"), **options)  # type: ignore[arg-type]


def count_torn(pack: Pack, split: "biopsy.Split") -> int:
    """Count the named patients who stand in two subsets."""
    subsets = split.subsets(pack) if not split.n_folds else split.subsets(pack, 0)
    known = pd.DataFrame({"patient": pack.table["patient_id"], "subset": subsets})
    known = known[(known["subset"] != "") & known["patient"].notna()]
    return int(known.groupby("patient")["subset"].nunique().gt(1).sum())


# --- ids of patients


@pytest.mark.parametrize(
    ("spell", "n_patients"),
    [
        pytest.param(lambda p, n: p + "\t" * n, 4, id="tab after some"),
        pytest.param(lambda p, n: "\u2003" * n + p, 4, id="em space before some"),
        pytest.param(lambda p, n: p + "\u200b" * n, 4, id="zero-width space after some"),
        pytest.param(lambda p, n: f"{int(p[1:])}" + ".00" * n, 4, id="1 and 1.00"),
        pytest.param(lambda p, n: f"{p} a" if n else f"{p}  a", 4, id="one and two spaces inside"),
        pytest.param(
            lambda p, n: unicodedata.normalize("NFD" if n else "NFC", f"Müller {p}"), 4, id="NFC and NFD"
        ),
        pytest.param(lambda p, n: {"P01": "007", "P02": "7.5"}.get(p, p), 4, id="007 stays 007"),
    ],
)
def test_patient_ids_from_spreadsheets(tmp_path, spell, n_patients):
    rows = write_folders(tmp_path / "d")
    spelt = [(patch, spell(patient, patch.endswith("_1"))) for patch, patient in rows]
    pack = prepare(tmp_path / "d", patients=write_table(tmp_path / "a.csv", spelt))
    assert pack.info.counts["patients"] == n_patients
    assert count_torn(pack, make_split(pack, protocol="patients", seed=3, save=False)) == 0
    if "7.5" in set(pack.table["patient_id"]):
        assert "007" in set(pack.table["patient_id"])


@pytest.mark.parametrize(
    "spell",
    [
        pytest.param(lambda p, n: p.lower() if n else p, id="letter case"),
        pytest.param(lambda p, n: p.replace("0", "") if n else p, id="leading zeros"),
        pytest.param(lambda p, n: p.replace("P", "\uff30") if n else p, id="full-width letters"),
    ],
)
def test_patient_ids_that_look_alike_are_named(tmp_path, caplog, spell):
    rows = write_folders(tmp_path / "d")
    spelt = [(patch, spell(patient, patch.endswith("_1"))) for patch, patient in rows]
    pack = prepare(tmp_path / "d", patients=write_table(tmp_path / "a.csv", spelt))
    assert pack.info.counts["patients"] == 8 and "P01" in caplog.text


@pytest.mark.parametrize("invisible", ["\u200c", "\u200d", "\u200e", "\u202a", "\u2066", "\u00ad", "\u180e"])
def test_invisible_characters_in_patient_ids(tmp_path, invisible):
    """As Windows and browsers copy them, with the text, from a line of another direction."""
    rows = write_folders(tmp_path / "d")
    spelt = [(patch, patient + invisible * (n % 2)) for n, (patch, patient) in enumerate(rows)]
    pack = prepare(tmp_path / "d", patients=write_table(tmp_path / "a.csv", spelt))
    assert sorted(pack.table["patient_id"].unique()) == list(PATIENTS)


@pytest.mark.parametrize(
    ("cell", "read"),
    [
        ('"=""007"""', "007"),
        (' "P 7"', "P 7"),
        ('"=""1.0"""', "1"),
        ("'007", "'007"),
        ('"a ""b"" c"', 'a "b" c'),
    ],
)
def test_text_that_was_written_for_a_spreadsheet(tmp_path, cell, read):
    rows = write_folders(tmp_path / "d", patients=["P01"])
    pack = prepare(
        tmp_path / "d", patients=write_table(tmp_path / "a.csv", [(patch, cell) for patch, _ in rows])
    )
    assert pack.table["patient_id"].unique().tolist() == [read]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "sep=;\r\n" + text.replace(",", ";"),
        lambda text: text.replace("patch_id,patient_id", "Patch ID,Patient-ID"),
        lambda text: text.replace("patch_id,patient_id", "PatchID,patient"),
        lambda text: text + " , \n\n,\n\u00a0,\n",
        lambda text: text.replace("benign/", "./benign//"),
    ],
    ids=["sep", "spaces", "camel", "blank", "dots"],
)
def test_tables_of_patients_from_spreadsheets(tmp_path, change):
    rows = write_folders(tmp_path / "d")
    path = write_table(tmp_path / "a.csv", rows)
    path.write_text(change(path.read_text()), encoding="utf-8")
    pack = prepare(tmp_path / "d", patients=path)
    known = dict(zip(pack.table["patch_id"], pack.table["patient_id"], strict=True))
    assert known == dict(rows)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04...", b"PAR1...", b"\xd0\xcf\x11\xe0", b"patch_id,patient_id\n"]
)
def test_tables_that_are_none_are_refused(tmp_path, content):
    write_folders(tmp_path / "d")
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError):
        prepare(tmp_path / "d", patients=tmp_path / "a.csv")


@pytest.mark.parametrize(
    "pair",
    [
        ("A-1", "A\u20131"),
        ("A-1", "A\u22121"),
        ("1E+05", "100000"),
        ("1,0", "1"),
        ("'07", "7"),
        ("\uff301", "P1"),
    ],
    ids=str,
)
def test_ids_that_a_spreadsheet_or_editor_changed_are_named(tmp_path, caplog, pair):
    rows = write_folders(tmp_path / "d", patients=["P01", "P02"])
    ids = dict(zip(("P01", "P02"), pair, strict=True))
    spelt = [(patch, f'"{ids[patient]}"') for patch, patient in rows]
    prepare(tmp_path / "d", patients=write_table(tmp_path / "a.csv", spelt))
    assert all(repr(name) in caplog.text for name in pair)


@pytest.mark.parametrize(
    "names",
    [
        ("NaN", "#N/A", "-", "n/a"),
        ("TRUE", "FALSE", "inf", "1e5"),
        ("NULL", "<NA>", "nil", "."),
        ("None", "undefined", "?", "0"),
    ],
    ids=" ".join,
)
def test_patients_named_like_missing_values(tmp_path, names):
    rows = write_folders(tmp_path / "d")
    given = dict(zip(PATIENTS, names, strict=True))
    table = write_table(tmp_path / "a.csv", [(patch, given[patient]) for patch, patient in rows])
    assert set(prepare(tmp_path / "d", patients=table).table["patient_id"]) == set(names)


@pytest.mark.parametrize(
    "blank",
    [
        pytest.param(lambda rows: {rows[0][0], rows[5][0]}, id="two patches of two patients"),
        pytest.param(
            lambda rows: {patch for patch, p in rows if p == "P02"}, id="all patches of one patient"
        ),
        pytest.param(lambda rows: {patch for patch, _ in rows if "malignant" in patch}, id="a whole class"),
    ],
)
@pytest.mark.parametrize("protocol", ["patients", "folds", "leave-one-out"])
def test_patches_without_a_patient_tear_no_named_one_apart(tmp_path, blank, protocol):
    rows = write_folders(tmp_path / "d", [f"P{n:02d}" for n in range(8)])
    nameless = blank(rows)
    table = write_table(tmp_path / "a.csv", [(p, "" if p in nameless else who) for p, who in rows])
    pack = prepare(tmp_path / "d", patients=table)
    assert pack.unit == "patient"
    try:
        split = make_split(pack, protocol=protocol, folds=3, save=False)
    except SplitError:
        return
    assert count_torn(pack, split) == 0
    subsets = split.assign(pack, 0 if split.n_folds else None)
    assert set(subsets[pack.table["patient_id"].isna()]) == {""}
    assert len(split.parameters["unknown_patients"]["first"]) == len(nameless)


# --- lists of cases


def split_by_list(tmp_path: Path, rows: Iterable[tuple], head: str, sep: str = ",") -> tuple[int, str]:
    people = tuple(f"0{n}" for n in range(8))
    table = write_table(tmp_path / "a.csv", write_folders(tmp_path / "d", people))
    pack = prepare(tmp_path / "d", patients=table)
    cases = write_table(tmp_path / "c.csv", rows, head, sep)
    code, _, said = call("split", pack.path, "--protocol", "official", "--cases", cases)
    return code, said


SUBSET_OF = {f"0{n}": "train" if n < 4 else "validation" if n < 6 else "test" for n in range(8)}


@pytest.mark.parametrize(
    ("rows", "head", "sep", "named"),
    [
        pytest.param(
            [(p.removeprefix("0"), subset) for p, subset in SUBSET_OF.items()],
            "case_id,split",
            ",",
            "none of the 8",
            id="every leading zero lost",
        ),
        pytest.param(
            [(f"{p}.png", subset) for p, subset in SUBSET_OF.items()],
            "case_id,split",
            ",",
            "none of the 8",
            id="file names for ids",
        ),
        pytest.param(
            [(p, subset) for p, subset in SUBSET_OF.items() if p != "03"],
            "case_id,split",
            ",",
            "'03'",
            id="one patient missing from the list",
        ),
        pytest.param(
            [*SUBSET_OF.items(), ("99", "test")],
            "case_id;split",
            ";",
            "'99'",
            id="semicolons, one case too many",
        ),
    ],
)
def test_lists_that_match_in_part_or_not_at_all(tmp_path, rows, head, sep, named):
    code, said = split_by_list(tmp_path, rows, head, sep)
    assert named in said and (code == 1) == (named == "none of the 8")


@pytest.mark.parametrize(
    ("rows", "head"),
    [
        pytest.param([(p + " ", s.upper()) for p, s in SUBSET_OF.items()], "Case_ID,Split", id="capitals"),
        pytest.param(
            [(p, {"validation": "validation"}.get(s, s)) for p, s in SUBSET_OF.items()],
            "case_id,split",
            id="validation spelt out",
        ),
    ],
)
def test_lists_that_differ_in_spelling_alone_are_read(tmp_path, rows, head):
    code, said = split_by_list(tmp_path, rows, head)
    assert code == 0 and "not in" not in said


def test_a_case_listed_on_two_subsets_is_refused(tmp_path):
    code, said = split_by_list(tmp_path, [*SUBSET_OF.items(), ("03", "test")], "case_id,split")
    assert code == 1 and "03" in said


# --- folders and archives


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param(
            [("case_a", "normal"), ("case_a", "tumour"), ("case_b", "normal"), ("case_b", "tumour")],
            id="two cases with normal and tumour",
        ),
        pytest.param([("fold1", "0"), ("fold1", "1"), ("fold2", "0"), ("fold2", "1")], id="folds"),
        pytest.param(
            [("Training", "A"), ("Training", "B"), ("Holdout", "A"), ("Holdout", "B")],
            id="Training and Holdout",
        ),
        pytest.param(
            [("case_a", "A"), ("case_a", "B"), ("case_b", "A"), ("case_b", "B"), ("case_c", "B")],
            id="a case of one class",
        ),
    ],
)
def test_folders_of_patients_or_subsets_are_no_classes(tmp_path, caplog, tree):
    for n, parts in enumerate(tree * 2):
        folder = tmp_path.joinpath("d", *parts)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.png").write_bytes(encode_png(draw(n)))
    tops = {top for top, _ in tree}
    try:
        biopsy.prepare(tmp_path / "d", tmp_path / "p", positive=tree[0][0])
    except DataError as error:
        assert any(name in str(error) for name in tops)
    else:
        assert "are interpreted as classes" in caplog.text


def write_zip(path: Path, names: Iterable[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for n, name in enumerate(names):
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.create_system = 0
            archive.writestr(info, encode_png(draw(n, dark="malignant" in name)))
    return path


CLASS_FILES = [f"{c}/P{n}.png" for c in ("benign", "malignant") for n in range(4)]


@pytest.mark.parametrize(
    "spell",
    [
        pytest.param(lambda n, name: "a b\\" + name.replace("/", "\\"), id="a folder with a blank"),
        pytest.param(lambda n, name: name.replace("/", "\\") if n % 2 else name, id="both kinds of slashes"),
        pytest.param(lambda n, name: "x\\y/z\\" + name, id="mixed in one name"),
    ],
)
def test_zips_of_windows_with_class_folders(tmp_path, spell):
    names = [spell(n, name) for n, name in enumerate(CLASS_FILES)]
    pack = prepare(write_zip(tmp_path / "w.zip", names), positive="malignant")
    assert pack.class_names == ["benign", "malignant"] and len(pack) == 8


@pytest.mark.parametrize("change", ["./{}", "a/./{}", "a//{}", "{}"])
def test_zips_whose_paths_are_not_plain(tmp_path, change):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as file:
        for number in range(4):
            name = f"{('benign', 'malignant')[number % 2]}/{number}.png"
            file.writestr(change.format(name), encode_png(draw(number)))
    pack = prepare(tmp_path / "w.zip")
    assert sorted(pack.table["patch_id"]) == ["benign/0", "benign/2", "malignant/1", "malignant/3"]


@pytest.mark.parametrize(
    "junk",
    [
        "@eaDir/x.jpg",
        "benign/@eaDir/0.png/THUMB.jpg",
        "$RECYCLE.BIN/x.png",
        "lost+found/x.png",
        "#recycle/x.png",
        "System Volume Information/x.png",
        "__MACOSX/benign/._0.png",
        "benign/THUMBS.DB",
        ".Trash-1000/x.png",
    ],
)
@pytest.mark.parametrize("form", ["zip", "folder"])
def test_folders_of_file_systems_are_no_classes(tmp_path, junk, form):
    names = [f"{name}/{n}.png" for name in ("benign", "malignant") for n in range(2)]
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "d", "w") as file:
            for number, name in enumerate([*names, junk]):
                file.writestr(name, encode_png(draw(number)))
    else:
        for number, name in enumerate([*names, junk]):
            (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / name).write_bytes(encode_png(draw(number)))
    pack = prepare(tmp_path / "d")
    assert pack.class_names == ["benign", "malignant"] and len(pack) == 4


@pytest.mark.parametrize("name", ["Мария", "患者", "Müller"])
def test_names_in_zips_of_macos_are_utf8_without_the_flag(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as file:
        for number in range(4):
            plain = "X" * len(name.encode())
            file.writestr(
                f"{('benign', 'malignant')[number % 2]}/{plain}{number}.png", encode_png(draw(number))
            )
    content = (tmp_path / "w.zip").read_bytes()
    (tmp_path / "w.zip").write_bytes(content.replace(b"X" * len(name.encode()), name.encode()))
    assert set(prepare(tmp_path / "w.zip").table["patch_id"]) == {
        f"{('benign', 'malignant')[n % 2]}/{name}{n}" for n in range(4)
    }


def test_a_zip_in_a_zip_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as file:
        file.writestr("inner.zip", b"PK")
    with refuses(DataError, "inner.zip"):
        prepare(tmp_path / "w.zip")


@pytest.mark.parametrize(
    "tops",
    [
        ("8863", "8865", "8867"),
        ("P00", "P1", "P2"),
        ("TCGA-A2-A0T2", "TCGA-A2-A0T3"),
        ("40X", "100X"),
        ("10x", "20x"),
        ("fold_0", "fold_1"),
        ("case 1", "case 2"),
        ("14-4659", "14-9461"),
        ("Slide1", "Slide2"),
        ("site1", "site2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("below", ["", "luminal/", "40X/"])
def test_patients_slides_folds_and_magnifications_are_no_classes(tmp_path, tops, below):
    for number, name in enumerate(tops):
        folder = tmp_path / "d" / name / below
        folder.mkdir(parents=True)
        (folder / f"{number}.png").write_bytes(encode_png(draw(number)))
    with pytest.raises(DataError):
        prepare(tmp_path / "d")
    assert prepare(tmp_path / "d", dataset="folders", positive=tops[0]).class_names


@pytest.mark.parametrize(
    "tops",
    [
        ("0", "1"),
        ("grade1", "grade2", "grade3"),
        ("G1", "G2"),
        ("class_0", "class_1"),
        ("1.0", "01"),
        ("NA", "P1"),
    ],
)
def test_numbered_classes_are_classes(tmp_path, tops):
    for number, name in enumerate(tops):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / f"{number}.png").write_bytes(encode_png(draw(number)))
    positive = tops[0] if len(tops) == 2 else None
    assert set(prepare(tmp_path / "d", positive=positive).class_names) == set(tops)


@pytest.mark.parametrize(
    "below", [("train", "test"), ("images", "masks"), ("Training Set", "Test Set")], ids=str
)
def test_folders_below_the_classes_are_named(tmp_path, caplog, below):
    for number, (name, second) in enumerate((c, b) for c in ("benign", "malignant") for b in below):
        (tmp_path / "d" / name / second).mkdir(parents=True)
        (tmp_path / "d" / name / second / f"{number}.png").write_bytes(encode_png(draw(number)))
    prepare(tmp_path / "d")
    assert below[1] in caplog.text


@pytest.mark.parametrize("start", ["C:\\data\\", "\\\\server\\share\\", "..\\"])
def test_zips_of_windows_whose_names_lead_out_are_refused(tmp_path, start):
    names = [start + name.replace("/", "\\") for name in CLASS_FILES]
    with pytest.raises(DataError):
        prepare(write_zip(tmp_path / "w.zip", names))
    assert not (tmp_path / "made.pack").exists()


def idc_names(spell: Callable[[int, str], str]) -> list[str]:
    names = [
        f"IDC_regular_ps50_idx5/{p}/{c}/{p}_idx5_x{n * 50 + 1}_y{c * 50 + 1}_class{c}.png"
        for p in ("8863", "8865", "8867", "8913")
        for c in (0, 1)
        for n in range(3)
    ]
    return [spell(n, name) for n, name in enumerate(names)]


@pytest.mark.parametrize(
    "spell",
    [
        pytest.param(lambda n, name: name.replace("/", "\\") if n % 2 else name, id="every other file"),
        pytest.param(
            lambda n, name: name.removeprefix("IDC_regular_ps50_idx5/").replace("/", "\\"),
            id="patients at the root",
        ),
        pytest.param(lambda n, name: "my data\\" + name, id="below another folder"),
    ],
)
def test_zips_of_windows_in_the_layout_of_idc(tmp_path, spell):
    pack = prepare(write_zip(tmp_path / "w.zip", idc_names(spell)))
    assert sorted(set(pack.table["patient_id"])) == ["8863", "8865", "8867", "8913"] and len(pack) == 24
    assert count_torn(pack, make_split(pack, protocol="patients", seed=1, save=False)) == 0


def test_both_spellings_of_one_file_in_a_zip_are_one_patch(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for n, name in enumerate(idc_names(lambda n, name: name)):
            for spelt in (name, "copy\\" + name.replace("/", "\\")):
                info = zipfile.ZipInfo("x")
                info.filename = info.orig_filename = spelt
                archive.writestr(info, encode_png(draw(n)))
    pack = prepare(tmp_path / "w.zip")
    assert len(pack) == 24 and pack.info.counts["duplicates"] == 24


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(b"M\xfcller_0.png", id="Latin-1"),
        pytest.param("\u0416\u0438\u0432_0.png".encode("koi8-r"), id="KOI8-R"),
        pytest.param(b"\xff\xfe\x00x"[:2] + b"_0.png", id="no text at all"),
        pytest.param("e\u0301_0.png".encode(), id="decomposed letters"),
    ],
)
def test_file_names_of_older_systems(tmp_path, name, trained_run):
    for k, folder in enumerate((b"benign", b"malignant")):
        place = os.fsencode(tmp_path / "d") + b"/" + folder
        os.makedirs(place)
        for n, spelt in enumerate((name, b"plain.png")):
            with open(place + b"/" + spelt, "wb") as file:
                file.write(encode_png(draw(10 * k + n)))
    code, _, said = call("prepare", tmp_path / "d", "--out", tmp_path / "p")
    assert code == 0 and len(Pack.open(tmp_path / "p")) == 4, said
    code, _, said = call(
        "predict", trained_run.path, tmp_path / "d", "--out", tmp_path / "q.csv", "--device", "cpu"
    )
    assert code == 0 and len(pd.read_csv(tmp_path / "q.csv")) == 4, said


# --- streams


SEVERAL = """
import sys
from biopsy.cli import main
codes = []
for words in sys.argv[1:]:
    sys.argv = ["biopsy", *words.split()]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
    print("\f", flush=True)
sys.exit(any(codes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_streams_that_cannot_hold_a_name(tmp_path, encoding):
    rows = write_folders(tmp_path / "d", ["\u0416A", "\u0416B", "\u0416C"], ("\u4e00", "\u4e8c"))
    table = write_table(tmp_path / "a.csv", rows)
    biopsy.prepare(tmp_path / "d", tmp_path / "p", patients=table, positive="\u4e8c")
    commands = ["inspect p --json", "split p --protocol patients --json", "inspect p"]
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, *commands],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(PROJECT / "src")},
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode(encoding)
    printed = done.stdout.decode(encoding).split("\f")
    assert len(printed) == 4 and all(json.loads(text) for text in printed[:2])


# --- slides


def write_slide(path: Path, pixels: np.ndarray | None = None, **options: object) -> Path:
    """Write a tiled TIFF of 4 um/px with tissue in its middle."""
    if pixels is None:
        pixels = np.full((400, 500, 3), 244, np.uint8)
        pixels[60:340, 80:420] = np.tile(draw(0, 20), (14, 17, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
        "tile": (256, 256),
        "photometric": "rgb",
        "resolution": (2500, 2500),
        "resolutionunit": "CENTIMETER",
        "compression": "deflate",
        "metadata": None,
    }
    tifffile.imwrite(path, pixels, **(plain | options))
    return path


def map_slides(run: "biopsy.Run", source: Path, out: Path) -> pd.DataFrame:
    """Map slides by the command; return ``status.csv``."""
    code, _, said = call("slide", run.path, source, "--out", out, "--device", "cpu")
    assert code in (0, 1, 3), said
    assert (out / "status.csv").exists(), said
    status = pd.read_csv(out / "status.csv", dtype=str, keep_default_na=False)
    if code == 0:
        assert set(status["status"]) == {"done"}
    return status


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda d: write_slide(d / ("é" * 120 + ".tif")), id="a name of 244 bytes"),
        pytest.param(lambda d: (d / "cut.tif").write_bytes((d / "zz.tif").read_bytes()[:999]), id="cut"),
        pytest.param(lambda d: (d / "gone.tif").symlink_to(d / "nowhere.tif"), id="a dangling link"),
        pytest.param(lambda d: (d / "empty.tif").write_bytes(b""), id="an empty file"),
        pytest.param(lambda d: (write_slide(d / "t.tif"), write_slide(d / "T.tif")), id="twins but for case"),
        pytest.param(
            lambda d: (write_slide(d / "a" / "s.tif"), write_slide(d / "b" / "s.tif")),
            id="one name in two folders",
        ),
        pytest.param(lambda d: write_slide(d / "line\nbreak.tif"), id="a line break in the name"),
        pytest.param(lambda d: write_slide(d / "-rf.tif"), id="a name like an option"),
        pytest.param(lambda d: (d / "text.svs").write_text("no slide"), id="text named .svs"),
    ],
)
def test_one_slides_trouble_does_not_end_a_cohort(tmp_path, trained_run, spoil):
    write_slide(tmp_path / "d" / "zz.tif")
    spoil(tmp_path / "d")
    status = map_slides(trained_run, tmp_path / "d", tmp_path / "m")
    assert status.set_index("slide").loc["zz", "status"] == "done"
    assert (tmp_path / "m" / "zz" / "summary.json").exists()
    failed = status[status["status"] == "failed"]
    assert failed["reason"].ne("").all() and not failed["reason"].str.contains("Traceback|Error\\(").any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(
            "\ufeffslide;mpp\r\n001.tif;4,0\r\n;\r\n", id="byte order mark, semicolons, decimal comma"
        ),
        pytest.param("SLIDE\tMpp\n001.tif\t\n", id="tabs, capitals, no resolution"),
        pytest.param('"slide" , "mpp"\n"001.tif\u00a0", "4"\n"",""\n', id="quotes and blanks"),
        pytest.param("slide\n\n001.tif\n\n", id="one column, blank lines"),
    ],
)
def test_lists_of_slides_from_spreadsheets(tmp_path, trained_run, text):
    write_slide(tmp_path / "s" / "001.tif")
    (tmp_path / "s" / "a.csv").write_text(text, encoding="utf-8")
    status = map_slides(trained_run, tmp_path / "s" / "a.csv", tmp_path / "m")
    assert status["slide"].tolist() == ["001"] and status["status"].tolist() == ["done"]


def to_deep(pixels: np.ndarray, bits: int) -> np.ndarray:
    return pixels.astype(np.uint16) << (bits - 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        pytest.param(lambda a: to_deep(a, 10), {}, id="10 of 16 bits"),
        pytest.param(lambda a: to_deep(a[..., 0], 16), {"photometric": "minisblack"}, id="grey of 16 bits"),
        pytest.param(lambda a: a.astype(np.float32) / 255, {}, id="floating point"),
        pytest.param(
            lambda a: np.concatenate([255 - a, a[..., :1]], axis=2), {"photometric": "separated"}, id="CMYK"
        ),
        pytest.param(
            lambda a: np.moveaxis(a, 2, 0),
            {"photometric": "minisblack", "planarconfig": None},
            id="a channel per page",
        ),
        pytest.param(lambda a: np.stack([a, a, a]), {}, id="three focal planes"),
    ],
)
@pytest.mark.parametrize("tile", [(256, 256), None], ids=["tiles", "strips"])
def test_slides_whose_colours_are_not_known_are_refused(tmp_path, trained_run, pixels, options, tile):
    reference = tifffile.imread(write_slide(tmp_path / "d" / "ok.tif"))
    write_slide(tmp_path / "d" / "odd.tif", pixels(reference), **(options | {"tile": tile}))
    status = map_slides(trained_run, tmp_path / "d", tmp_path / "m").set_index("slide")
    assert status.loc["ok", "status"] == "done" and status.loc["odd", "status"] == "failed"
    assert re.search("bit|mode|channel|page|plane|float|CMYK|colour|RGB", status.loc["odd", "reason"])


# --- annotations


def feature(area: shapely.Geometry, name: object, **properties: object) -> dict[str, object]:
    about = {"objectType": "annotation", "classification": {"name": name}, **properties}
    if name is None:
        del about["classification"]
    return {"type": "Feature", "geometry": shapely.geometry.mapping(area), "properties": about}


REGION, TUMOUR = shapely.box(80, 60, 400, 320), shapely.box(120, 100, 280, 260)


def nest(outer: dict, *inner: dict) -> dict:
    return {**outer, "properties": {**outer["properties"], "childObjects": list(inner)}}


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(
            {
                "type": "FeatureCollection",
                "features": [
                    nest(feature(REGION, "Region*"), nest(feature(REGION, None), feature(TUMOUR, "Tumor")))
                ],
            },
            id="nested twice",
        ),
        pytest.param([nest(feature(REGION, "Region*"), feature(TUMOUR, "Tumor"))], id="a bare list"),
        pytest.param(nest(feature(REGION, "Region*"), feature(TUMOUR, "Tumor")), id="one feature alone"),
        pytest.param(
            {
                "type": "FeatureCollection",
                "features": [
                    nest(
                        feature(REGION, "Region*"),
                        feature(
                            shapely.MultiPolygon(
                                [shapely.box(120, 100, 200, 260), shapely.box(200, 100, 280, 260)]
                            ),
                            "Tumor",
                        ),
                    )
                ],
            },
            id="a child of two parts",
        ),
        pytest.param(
            {
                "type": "FeatureCollection",
                "features": [
                    nest(
                        feature(REGION, "Region*", classification={"name": "Region*", "colorRGB": -65536}),
                        feature(
                            TUMOUR,
                            "Tumor",
                            classification={"name": "Tumor", "colorRGB": -65536},
                            isLocked=False,
                            measurements=[],
                        ),
                    )
                ],
            },
            id="classes as before QuPath 0.4",
        ),
    ],
)
def test_nested_objects_of_qupath(tmp_path, document):
    write_slide(tmp_path / "s" / "case01.tif")
    (tmp_path / "s" / "case01.geojson").write_text(json.dumps(document))
    options = {"mpp": 4.0, "patch_px": 20, "classes": ["tumour=Tumor"], "rest": "normal"}
    pack = prepare(tmp_path / "s", **options)
    assert pack.info.counts["per_class"] == {"normal": 208 - 64, "tumour": 64}


@pytest.mark.parametrize("about", [{"name": "Tumor"}, {"label": "Tumor"}, {"class": "Region*"}], ids=str)
def test_an_area_named_as_a_class_without_having_it_is_refused(tmp_path, about):
    """Else its tissue would be labelled as the rest."""
    write_slide(tmp_path / "s" / "case01.tif")
    named = feature(TUMOUR, None)
    document = [feature(REGION, "Region*"), {**named, "properties": {**named["properties"], **about}}]
    (tmp_path / "s" / "case01.geojson").write_text(json.dumps(document))
    with refuses(DataError, "feature 2"):
        prepare(tmp_path / "s", mpp=4.0, patch_px=20, classes=["tumour=Tumor"], rest="normal")


@pytest.mark.parametrize(
    ("unclassified", "counts"),
    [
        ("tumour=Unclassified", {"normal": 208 - 64, "tumour": 64}),
        ("=Unclassified", {"normal": 208 - 64, "tumour": 0}),
        ("normal=Unclassified", {"normal": 208, "tumour": 0}),
    ],
)
@pytest.mark.parametrize("program", ["qupath", "asap"])
def test_an_area_without_a_class_is_labelled_as_requested(tmp_path, program, unclassified, counts):
    write_slide(tmp_path / "s" / "case01.tif")
    if program == "qupath":
        notes = tmp_path / "case01.geojson"
        notes.write_text(json.dumps([feature(REGION, "Region*"), feature(TUMOUR, None)]))
    else:
        notes = tmp_path / "case01.xml"
        corners = [list(area.exterior.coords) for area in (REGION, TUMOUR)]
        notes.write_text(asap(("Region*", corners[0]), ("None", corners[1])))
    options = {"mpp": 4.0, "patch_px": 20, "rest": "normal", "annotations": notes}
    with refuses(DataError, "feature 2"):
        prepare(tmp_path / "s", classes=["tumour=Tumor"], **options)
    pack = prepare(tmp_path / "s", classes=["tumour=Tumor", unclassified], **options)
    assert pack.info.counts["per_class"] == counts


@pytest.mark.parametrize("twin", ["a/case.tif", "case.tiff"])
def test_annotated_slides_of_one_name_do_not_end_a_cohort(tmp_path, twin):
    document = json.dumps([feature(REGION, "Region*"), feature(TUMOUR, "Tumor")])
    for name in (twin, "b/case.tif", "other.tif"):
        write_slide(tmp_path / "s" / name)
        (tmp_path / "s" / f"{name}.geojson").write_text(document)
    options = {"mpp": 4.0, "patch_px": 20, "classes": ["tumour=Tumor"], "rest": "normal"}
    pack = prepare(tmp_path / "s", **options)
    assert pack.table["slide_id"].unique().tolist() == ["other"]
    assert {item["source"] for item in pack.info.skipped} == {twin, "b/case.tif"}
    (tmp_path / "s" / "other.tif").unlink()
    with pytest.raises(DataError):
        biopsy.prepare(tmp_path / "s", tmp_path / "none.pack", **options)


def test_names_of_slides_with_spaces(tmp_path):
    write_slide(tmp_path / "s" / "case 1 .tif")
    (tmp_path / "s" / "case 1 .geojson").write_text(
        json.dumps([feature(REGION, "Region*"), feature(TUMOUR, "Tumor")])
    )
    patients = write_table(tmp_path / "a.csv", [("case 1", "P1")], head="slide,patient")
    options = {"mpp": 4.0, "patch_px": 20, "classes": ["tumour=Tumor"], "rest": "normal"}
    pack = prepare(tmp_path / "s", patients=patients, **options)
    assert pack.table["patient_id"].unique().tolist() == ["P1"]


@pytest.mark.parametrize("corner", [(400, 300), (100, 0), (0, 60)], ids=str)
@pytest.mark.parametrize("crop", [True, False], ids=["cropped", "--no-crop"])
def test_slides_with_bounds_and_qupaths_origin(tmp_path, corner, crop):
    pixels = tifffile.imread(write_slide(tmp_path / "x.tif"))
    (tmp_path / "s").mkdir()
    write_scn(tmp_path / "s" / "case01.scn", pixels, corner=corner, size=(1200, 900), mpp=4.0)
    moved = (0, 0) if crop else corner
    areas = [shapely.affinity.translate(area, *moved) for area in (REGION, TUMOUR)]
    document = [feature(areas[0], "Region*"), feature(areas[1], "Tumor")]
    (tmp_path / "s" / "case01.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": document})
    )
    pack = prepare(tmp_path / "s", mpp=4.0, patch_px=20, classes=["tumour=Tumor"], rest="normal", crop=crop)
    assert pack.info.counts["per_class"] == {"normal": 208 - 64, "tumour": 64}
    tissue = pack.patches.reshape(len(pack), -1).mean(axis=1)
    assert (tissue < 235).all()  # every patch of the region is cut from tissue


# --- runs that were moved


def interrupted(tmp_path: Path, make_pack: Callable[..., Pack]) -> tuple[Path, Path]:
    """Return a run that was stopped after an epoch, and its pack, in one folder."""
    pack = make_pack("d.pack", n_patients=6, official_subsets=("train", "validation", "test"))

    def stop(record: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        biopsy.train(
            "idc-small",
            pack,
            overrides={"preprocessing.input_px": 16, "train.epochs": 2, "model.params.base_channels": 4},
            out=tmp_path / "r",
            device="cpu",
            on_epoch=stop,
        )
    return tmp_path / "r", pack.path


@pytest.mark.slow
@pytest.mark.parametrize("where", ["beside", "named", "renamed", "link"])
def test_a_run_resumes_elsewhere_with_its_pack(tmp_path, make_pack, where):
    run, pack = interrupted(tmp_path, make_pack)
    place = tmp_path / "other"
    place.mkdir()
    shutil.move(run, place / "r")
    target = (
        place
        / ("data" if where in ("named", "link") else ".")
        / ("new.pack" if where == "renamed" else pack.name)
    )
    target.parent.mkdir(exist_ok=True)
    shutil.move(pack, target)
    data = target
    if where == "link":
        data = place / "alias.pack"
        data.symlink_to(target)
    resumed = biopsy.train(resume=place / "r", data=None if where == "beside" else data, device="cpu")
    assert resumed.info["status"] == "finished"
    assert resumed.open_pack(verify=False).path.resolve() == target.resolve()


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_pack(tmp_path, make_pack):
    run, pack = interrupted(tmp_path, make_pack)
    shutil.move(pack, tmp_path / "elsewhere")
    other = make_pack("d.pack", n_patients=6, seed=1, official_subsets=("train", "validation", "test"))
    for data in (None, other.path):
        with pytest.raises(RunError):
            biopsy.train(resume=run, data=data, device="cpu")
    assert biopsy.Run.open(run).info["status"] != "finished"


# --- inputs of the kinds above, tried later


@pytest.mark.parametrize(
    "spell",
    [
        lambda p, n: "P-01" if n else "P01",
        lambda p, n: "P_01" if n else "P-01",
        lambda p, n: "P 1" if n else "P01",
        lambda p, n: "14 4659A" if n else "14-4659-A",
    ],
)
def test_patient_ids_that_differ_by_a_separator_are_named(tmp_path, caplog, spell):
    rows = write_folders(tmp_path / "d", ["P01"])
    spelt = [(patch, spell(patient, patch.endswith("_1"))) for patch, patient in rows]
    pack = prepare(tmp_path / "d", patients=write_table(tmp_path / "a.csv", spelt))
    assert all(repr(name) in caplog.text for name in pack.table["patient_id"].unique())


@pytest.mark.parametrize("name", ["1.00E+05", "#REF!", "########", "unknown", "-1", "NA"])
def test_ids_that_may_stand_for_no_patient_or_for_several_are_named(tmp_path, caplog, name):
    rows = write_folders(tmp_path / "d")
    spelt = [(patch, name if patient < "P03" else patient) for patch, patient in rows]
    pack = prepare(tmp_path / "d", patients=write_table(tmp_path / "a.csv", spelt))
    assert pack.info.counts["patients"] == 3 and repr(name) in caplog.text


def test_patients_that_are_the_classes_are_refused(tmp_path):
    write_folders(tmp_path / "d")
    with pytest.raises(DataError):
        prepare(tmp_path / "d", patients="([^/]+)/")


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param(
            [f"{top}{s}/{c}/{n}.png" for top in ("", "data/") for s in ("train", "test") for c in "AB"
             for n in range(2)],
            id="a copy of the tree inside it",
        ),
        pytest.param(
            [f"site{s}/{p}/{c}/{n}.png" for s in "AB" for p in "xy" for c in ("benign", "malignant")
             for n in range(2)],
            id="classes two levels lower",
        ),
        pytest.param([f"{p}/{n}.png" for p in ("A123", "B234", "C001") for n in range(2)], id="A123"),
        pytest.param([f"2019-01-0{p}/{n}.png" for p in (3, 4) for n in range(2)], id="dates"),
        pytest.param([f"SOB_B_A_14-{p}AB/{n}.png" for p in (3, 4) for n in range(2)], id="BreakHis"),
    ],
)  # fmt: skip
def test_trees_whose_top_folders_are_no_classes_are_refused(tmp_path, paths):
    for n, name in enumerate(paths):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(encode_png(draw(n)))
    with refuses(DataError, "folders"):
        prepare(tmp_path / "d")


def test_class_folders_that_differ_by_letter_case_are_one_class(tmp_path, caplog):
    for n, name in enumerate(["train/benign", "train/malignant", "test/Benign", "test/MALIGNANT"]):
        for k in range(2 + (n < 2)):
            (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / name / f"{n}{k}.png").write_bytes(encode_png(draw(10 * n + k)))
    pack = prepare(tmp_path / "d")
    assert pack.info.counts["per_class"] == {"benign": 5, "malignant": 5}
    assert pack.info.positive_class == "malignant" and "MALIGNANT and malignant" in caplog.text


def test_labels_written_as_numbers_with_a_point_are_indices(tmp_path):
    """As pandas writes a column of numbers with gaps."""
    rows = write_folders(tmp_path / "d", ["P01"])
    labels = write_table(tmp_path / "l.csv", [(rows[0][0], "1.0")], head="patch_id,label")
    pack = prepare(tmp_path / "d", labels=labels)
    assert pack.class_names == ["benign", "malignant"] and pack.target.sum() == 3
    write_table(tmp_path / "l.csv", [(rows[0][0], "7.0")], head="patch_id,label")
    with refuses(DataError, "7"):
        biopsy.prepare(tmp_path / "d", tmp_path / "other.pack", labels=labels)


def test_joined_numbers_with_decimal_commas_are_named(tmp_path, caplog):
    rows = write_folders(tmp_path / "d", ["P01", "P02"])
    patients = write_table(tmp_path / "a.csv", rows)
    ages = [("P01", "51,5"), ("P02", "48")]
    joined = write_table(tmp_path / "j.csv", ages, head="patient_id;age", sep=";")
    prepare(tmp_path / "d", patients=patients, join=joined)
    assert "age" in caplog.text


def test_a_pack_inside_its_source_is_no_part_of_it(tmp_path):
    write_folders(tmp_path / "d")
    pack = biopsy.prepare(tmp_path / "d", tmp_path / "d" / "made.pack")
    again = biopsy.prepare(tmp_path / "d", tmp_path / "d" / "made.pack")
    assert len(pack) == 16 and again.info.content_sha256 == pack.info.content_sha256


def test_closed_streams_end_no_command():
    code = "from biopsy.cli import main; main()"
    command = f'"{sys.executable}" -c "{code}" list recipes >&- 2>&-'
    assert subprocess.run(["bash", "-c", command]).returncode == 0
