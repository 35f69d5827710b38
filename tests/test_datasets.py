"""Every layout, on its miniature tree: recognised, read, and what contradicts itself is named."""

import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from biopsy.core.errors import ArchiveError, DataError
from biopsy.data.archives import open_archive
from biopsy.data.datasets import DATASETS, find_dataset
from biopsy.data.prepare import prepare
from refusals import refuses

TREES = Path(__file__).parent / "trees"
# tree -> layout, patches, patients, slides, targets in order, official subsets
EXPECTED = {
    "idc": ("idc", 8, 2, 2, [0, 0, 1, 1, 0, 0, 1, 1], None),
    "pcam": ("pcam", 10, 0, 4, [0, 0, 1, 1, 0, 0, 1, 1, 0, 0], ["train"] * 6 + ["validation"] * 4),
    "hcd": ("hcd", 6, 0, 0, None, None),
    "hcd_sorted": ("hcd", 8, 0, 0, None, None),
    "folders": (
        "folders",
        12,
        0,
        0,
        [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1],
        ["train"] * 8 + ["validation"] * 4,
    ),
    "breakhis": ("breakhis", 8, 4, 6, [0, 0, 1, 2, 3, 4, 5, 5], None),
    "classes": ("folders", 12, 0, 0, [0] * 4 + [1] * 4 + [2] * 4, None),
}


@pytest.fixture
def tree(tmp_path):
    """A copy of a miniature tree that a test may spoil."""

    def copy(name):
        return Path(shutil.copytree(TREES / name, tmp_path / name))

    return copy


def zip_folder(folder, path, prefix=""):
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("name", EXPECTED)
def test_every_tree_is_recognised_and_read(name, tmp_path):
    layout, n_patches, n_patients, n_slides, target, official_subset = EXPECTED[name]
    pack = prepare(TREES / name, tmp_path / "x.pack", mpp=0.65 if DATASETS[layout].needs_mpp else None)
    assert pack.info.dataset == layout
    assert (len(pack), pack.info.counts["patients"], pack.info.counts["slides"]) == (
        n_patches,
        n_patients,
        n_slides,
    )
    assert pack.info.skipped == []
    assert pack.info.counts["duplicates"] == 0
    assert pack.table["patch_id"].is_unique
    if target is not None:
        assert pack.target.tolist() == target
    if official_subset is not None:
        assert pack.table["official_subset"].tolist() == official_subset
    pack.verify()


def test_every_layout_has_an_example_tree_and_a_source():
    of_patches = {name.partition("-")[0] for name, layout in DATASETS.items() if not layout.cuts_slides}
    assert {layout for layout, *_ in EXPECTED.values()} == of_patches
    for layout in DATASETS.values():
        assert layout.title and layout.looks_for and layout.licence
        assert bool(layout.citation) == bool(layout.expected)


@pytest.mark.parametrize("name", ["idc", "hcd", "hcd_sorted", "folders", "classes"])
def test_a_zip_gives_the_pack_of_the_folder(name, tmp_path):
    folder = prepare(TREES / name, tmp_path / "folder.pack")
    packed = prepare(zip_folder(TREES / name, tmp_path / "x.zip"), tmp_path / "zip.pack")
    assert packed.info.content_sha256 == folder.info.content_sha256
    assert np.array_equal(packed.patches, folder.patches)


def test_idc_file_names_give_patient_place_and_class(tmp_path):
    pack = prepare(TREES / "idc", tmp_path / "x.pack")
    row = pack.table.set_index("patch_id").loc["8863_idx5_x51_y1_class1"]
    assert (row["patient_id"], row["slide_id"], row["x"], row["y"], row["target"]) == (
        "8863",
        "8863",
        51,
        1,
        1,
    )
    assert row["source"] == "IDC_regular_ps50_idx5/8863/1/8863_idx5_x51_y1_class1.png"
    assert (pack.class_names, pack.info.positive_class, pack.info.mpp) == (["non_idc", "idc"], "idc", 4.0)
    odd = pack.table.query("width != 16")
    assert odd["patch_id"].tolist() == ["8863_idx5_x51_y51_class1"]
    assert pack.info.counts["padded"] == 1
    patch = pack.patches[odd.index[0]]
    assert (patch[:, 10:] == patch[:, 9:10]).all()


def test_idc_in_every_form_is_one_pack(tmp_path):
    inner = TREES / "idc" / "IDC_regular_ps50_idx5"
    root = zip_folder(inner, tmp_path / "root.zip")
    both = zip_folder(inner, Path(shutil.copy(root, tmp_path / "both.zip")), "IDC_regular_ps50_idx5/")
    unpacked = tmp_path / "unpacked"
    shutil.copytree(inner, unpacked)
    beside = tmp_path / "beside"
    shutil.copytree(inner, beside / "IDC_regular_ps50_idx5")
    shutil.copy(both, beside / "archive.zip")
    twice = Path(shutil.copytree(beside, tmp_path / "twice"))
    shutil.copytree(inner, twice, dirs_exist_ok=True)
    only_zip = tmp_path / "only_zip"
    only_zip.mkdir()
    shutil.copy(root, only_zip)
    (only_zip / "manifest.csv").write_text("path\n")

    reference = prepare(TREES / "idc", tmp_path / "reference.pack")
    n_duplicates = {both: 8, twice: 8}
    for source in (root, both, unpacked, beside, twice, only_zip):
        pack = prepare(source, tmp_path / f"{source.name}.pack")
        assert pack.info.content_sha256 == reference.info.content_sha256, source
        assert pack.info.counts["duplicates"] == n_duplicates.get(source, 0), source
        assert pack.info.skipped == []


def test_idc_contradictions_and_wrong_names_are_named(tree, tmp_path, make_patches):
    folder = tree("idc")
    patients = folder / "IDC_regular_ps50_idx5"
    (patients / "8863/0/8863_idx5_x1_y1_class0.png").rename(patients / "8863/1/8863_idx5_x1_y1_class0.png")
    (patients / "8863/0/8863_idx5_x1_y51_class0.png").rename(patients / "8865/0/8863_idx5_x1_y51_class0.png")
    (patients / "8865/1/8865_idx5_x51_y1_class1.png").rename(patients / "8865/1/8865_x51_y1.png")
    pack = prepare(folder, tmp_path / "x.pack")
    assert len(pack) == 5
    reasons = {Path(item["source"]).name: item["reason"] for item in pack.info.skipped}
    assert reasons == {
        "8863_idx5_x1_y1_class0.png": "is in the folder of class 1, but its name has class 0",
        "8863_idx5_x1_y51_class0.png": "is in the folder of patient 8865, but its name has patient 8863",
        "8865_x51_y1.png": "is not named <patient>_idx5_x<X>_y<Y>_class<0|1>.png",
    }
    assert pack.info.counts["skipped"] == 3


def test_copies_that_differ_are_named(tree, tmp_path):
    folder = tree("idc")
    copy = folder / "8863" / "0"
    copy.mkdir(parents=True)
    shutil.copy(
        folder / "IDC_regular_ps50_idx5/8863/1/8863_idx5_x51_y1_class1.png",
        copy / "8863_idx5_x1_y1_class0.png",
    )
    pack = prepare(folder, tmp_path / "x.pack")
    assert len(pack) == 8
    assert [item["reason"] for item in pack.info.skipped] == [
        "differs from 8863/0/8863_idx5_x1_y1_class0.png, the same patch by name"
    ]


def test_patches_sorted_by_the_posts_script_are_read_by_name(tmp_path):
    for index, file in enumerate(sorted((TREES / "idc").rglob("*.png"))):
        target = tmp_path / "tree" / ("training", "testing")[index % 2] / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    pack = prepare(tmp_path / "tree", tmp_path / "x.pack")
    assert pack.info.content_sha256 == prepare(TREES / "idc", tmp_path / "y.pack").info.content_sha256


def test_pcam_reads_pixels_labels_and_slides(tree, tmp_path):
    folder = tree("pcam")
    with h5py.File(folder / "camelyonpatch_level_2_split_valid_x.h5") as file:
        valid = file["x"][:]
    pack = prepare(folder, tmp_path / "x.pack")
    assert np.array_equal(pack.patches[6:], valid)
    assert pack.table["patch_id"].iloc[[0, 6]].tolist() == ["train_000000", "valid_000000"]
    assert pack.table["slide_id"].iloc[[0, 3, 9]].tolist() == [
        "camelyon16_train_tumor_000",
        "camelyon16_train_tumor_001",
        "camelyon16_valid_tumor_001",
    ]
    assert (pack.unit, pack.info.mpp, pack.info.positive_class) == ("slide", 0.972, "tumour")
    assert pack.table["coord_x"].tolist() == [0, 200, 400, 600, 800, 1000, 0, 200, 400, 600]

    for file in folder.glob("*meta.csv"):
        file.unlink()
    assert prepare(folder, tmp_path / "y.pack").unit == "patch"


def test_pcam_subsets_may_be_absent_but_not_halved(tree, tmp_path):
    folder = tree("pcam")
    (folder / "camelyonpatch_level_2_split_valid_y.h5").unlink()
    pack = prepare(folder, tmp_path / "x.pack")
    assert len(pack) == 6
    assert pack.info.skipped == [
        {"source": "camelyonpatch_level_2_split_valid_x.h5", "reason": "has no labels (..._y.h5)"}
    ]
    (folder / "camelyonpatch_level_2_split_train_x.h5").unlink()
    with refuses(ArchiveError, "PCam"):
        prepare(folder, tmp_path / "y.pack")


def test_pcam_refusals(tree, tmp_path):
    folder = tree("pcam")
    x, y, meta = (
        folder / f"camelyonpatch_level_2_split_train_{part}" for part in ("x.h5", "y.h5", "meta.csv")
    )
    whole = {path: path.read_bytes() for path in (x, y, meta)}

    def refuse(*facts):
        with refuses(DataError, *facts):
            prepare(folder, tmp_path / "x.pack")
        for path, data in whole.items():
            path.write_bytes(data)

    x.write_bytes(whole[x][:1000])
    refuse("train_x.h5", "HDF5")
    meta.write_text("wsi\nonly_one\n")
    refuse("train_meta.csv", "1 rows")
    y.write_bytes((folder / "camelyonpatch_level_2_split_valid_y.h5").read_bytes())
    refuse("6 patches")
    x.write_bytes(whole[y])
    refuse("train_x.h5", "'x'")
    (folder / "camelyonpatch_level_2_split_test_x.h5.gz").write_bytes(b"gz")
    refuse("test_x.h5.gz", "unpacked")
    with refuses(ArchiveError, "h5", "unpack"):
        prepare(zip_folder(TREES / "pcam", tmp_path / "pcam.zip"), tmp_path / "x.pack")


def test_hcd_keeps_the_order_of_its_csv_and_counts_the_unlabelled(tmp_path):
    pack = prepare(TREES / "hcd", tmp_path / "x.pack", patients=TREES / "hcd_slides.csv")
    lines = (TREES / "hcd/train_labels.csv").read_text().split()[1:]
    ids, labels = zip(*(line.split(",") for line in lines), strict=True)
    in_order = pack.table.sort_values("row")
    assert in_order["patch_id"].tolist() == list(ids)
    assert in_order["target"].tolist() == [int(label) for label in labels]
    assert pack.info.counts["unlabelled"] == 2
    assert pack.unit == "slide"
    assert pack.info.counts["slides"] == 2
    assert pack.info.positive_class == "tumour"


def test_hcd_rows_without_image_and_images_without_row_are_named(tree, tmp_path):
    folder = tree("hcd")
    missing, stray = sorted((folder / "train").iterdir())[:2]
    missing.unlink()
    stray.rename(stray.with_name("stray.tif"))
    pack = prepare(folder, tmp_path / "x.pack")
    assert len(pack) == 4
    reasons = sorted(item["reason"] for item in pack.info.skipped)
    assert reasons == sorted(
        [
            "is not in train_labels.csv",
            f"has no image: {missing.name} is missing",
            f"has no image: {stray.name} is missing",
        ]
    )


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("id,label\na,0\nb,\n", ["1 rows", "row 1", "id b", "label None"]),
        ("id,label\na,0\nb,2\n", ["1 rows", "row 1", "id b", "label 2"]),
        ("id,label\n,1\n", ["row 0"]),
        ("id,label\na,0\na,0\n", ["1 repeated ids"]),
        ("name,class\na,0\n", ["name, class", "id, label"]),
        ("", ["empty"]),
    ],
)
def test_hcd_csv_refusals(tree, tmp_path, content, facts):
    folder = tree("hcd")
    (folder / "train_labels.csv").write_text(content)
    with refuses(DataError, "train_labels.csv", *facts):
        prepare(folder, tmp_path / "x.pack")


def test_hcd_sorted_tree(tree, tmp_path):
    folder = tree("hcd_sorted")
    pack = prepare(folder, tmp_path / "x.pack")
    assert pack.class_names == ["normal", "tumour"]
    subset = {file.stem: file.parts[-3] for file in folder.rglob("*.tif")}
    label = {file.stem: int(file.parts[-2] == "pos") for file in folder.rglob("*.tif")}
    assert pack.target.tolist() == [label[name] for name in pack.table["patch_id"]]
    expected = [
        {"validation": "validation"}.get(subset[name], subset[name]) for name in pack.table["patch_id"]
    ]
    assert pack.table["official_subset"].tolist() == expected

    positive = next((folder / "train/pos").iterdir())
    shutil.copy(positive, folder / "test/neg" / positive.name)
    pack = prepare(folder, tmp_path / "y.pack")
    assert len(pack) == 7 + 1
    assert len(pack.info.skipped) == 1
    assert "two folders" in pack.info.skipped[0]["reason"]


def test_folders_keep_their_own_subsets_and_classes(tree, tmp_path):
    pack = prepare(TREES / "folders", tmp_path / "x.pack")
    assert pack.table["patch_id"].iloc[0] == "train/0/patch0000000"
    assert (pack.class_names, pack.info.positive_class, pack.info.mpp) == (["0", "1"], "1", None)

    folder = tree("classes")
    pack = prepare(folder, tmp_path / "y.pack", patients=r"case(\d+)_", mpp=0.5)
    assert (pack.info.positive_class, pack.info.mpp, pack.unit) == (None, 0.5, "patient")
    assert "official_subset" not in pack.table
    assert sorted(set(pack.table["patient_id"])) == ["8863", "8865"]

    shutil.copy(folder / "adenosis/case8863_00.png", folder / "adenosis/case8863_00.jpg")
    (folder / "loose.png").write_bytes(b"")
    pack = prepare(folder, tmp_path / "z.pack")
    assert pack.table["patch_id"].tolist()[:2] == ["adenosis/case8863_00.jpg", "adenosis/case8863_00.png"]
    assert pack.info.skipped == [{"source": "loose.png", "reason": "is in no class folder"}]


def test_breakhis_keeps_subtypes_and_cases_and_wants_its_resolution(tmp_path):
    with refuses(DataError, "--mpp"):
        prepare(TREES / "breakhis", tmp_path / "x.pack")
    pack = prepare(TREES / "breakhis", tmp_path / "x.pack", mpp=0.65)
    assert pack.class_names == [
        *("adenosis", "fibroadenoma", "phyllodes_tumor", "ductal_carcinoma"),
        *("lobular_carcinoma", "mucinous_carcinoma"),
    ]
    assert (pack.info.positive_class, pack.info.mpp, pack.unit) == (None, 0.65, "patient")
    rows = pack.table.set_index("patch_id")
    first = rows.loc["SOB_B_A-14-22549AB-100-001"]
    assert first[["patient_id", "slide_id", "magnification"]].tolist() == ["14-22549", "14-22549AB", "100X"]
    case = rows[rows["patient_id"] == "14-21998"]
    assert sorted(pack.class_names[index] for index in case["target"]) == ["fibroadenoma", "phyllodes_tumor"]

    two = prepare(TREES / "breakhis", tmp_path / "y.pack", mpp=0.65, positive="malignant")
    assert (two.class_names, two.info.positive_class) == (["benign", "malignant"], "malignant")
    assert two.target.tolist() == [0] * 4 + [1] * 4
    assert two.table["original_class"].tolist() == [pack.class_names[index] for index in pack.target]


def test_breakhis_magnifications_are_not_mixed(tree, tmp_path):
    folder = tree("breakhis")
    image = next(folder.rglob("SOB_B_A-14-22549AB-100-001.png"))
    (image.parents[1] / "40X").mkdir()
    shutil.copy(image, image.parents[1] / "40X" / "SOB_B_A-14-22549AB-40-001.png")
    with refuses(DataError, "40X, 100X"):
        prepare(folder, tmp_path / "x.pack", mpp=0.65)
    pack = prepare(folder, tmp_path / "x.pack", mpp=1.6, dataset="breakhis-40x")
    assert pack.table["patch_id"].tolist() == ["SOB_B_A-14-22549AB-40-001"]
    assert pack.info.counts["other_magnifications"] == 8


@pytest.mark.parametrize(
    ("folders", "name", "what"),
    [
        ("benign/SOB/adenosis", "SOB_M_DC-14-1-100-001.png", "benign"),
        ("benign/SOB/adenosis", "SOB_B_F-14-1-100-001.png", "adenosis"),
        ("benign/SOB/adenosis/SOB_B_A-14-1/400X", "SOB_B_A-14-1-100-001.png", "400x"),
    ],
)
def test_breakhis_names_that_contradict_their_folders_are_named(tree, tmp_path, folders, name, what):
    folder = tree("breakhis")
    (folder / folders).mkdir(parents=True)
    shutil.copy(next(folder.rglob("*.png")), folder / folders / name)
    pack = prepare(folder, tmp_path / "x.pack", mpp=0.65)
    assert len(pack) == 8
    assert [item["source"] for item in pack.info.skipped] == [f"{folders}/{name}"]
    assert f"is in the folder {what}" in pack.info.skipped[0]["reason"]


@pytest.mark.data
@pytest.mark.parametrize("positive", [None, "malignant"])
def test_real_breakhis_subset(data_dir, tmp_path, positive):
    pack = prepare(
        data_dir / "breakhis" / "breakhis_100x_subset.zip", tmp_path / "x.pack", mpp=0.65, positive=positive
    )
    manifest = pd.read_csv(data_dir / "breakhis" / "manifest.csv").sort_values(
        "path", key=lambda p: p.str[-31:]
    )
    manifest["patch_id"] = manifest["path"].str.rpartition("/")[2].str.removesuffix(".jpg")
    table = pack.table.merge(manifest, on="patch_id", suffixes=("", "_said"), validate="one_to_one")
    assert len(table) == len(manifest) == len(pack) == 315
    assert (table["patient_id"] == table["case_number"]).all()
    assert (table["slide_id"] == table["slide"]).all()
    said = table["tumor_class" if positive is None else "label"]
    assert (table["target"].map(dict(enumerate(pack.class_names))) == said).all()
    assert (table[["width", "height"]].to_numpy() == table[["width_said", "height_said"]].to_numpy()).all()


def make_tree(root, tops, classes, n=2):
    for seed, (top, name) in enumerate((top, name) for top in tops for name in classes):
        for index in range(n):
            path = root / top / name / f"{top.replace('/', '-')}_{index}.png"
            path.parent.mkdir(parents=True) if not path.parent.exists() else None
            pixels = np.random.default_rng(10 * seed + index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return root


@pytest.mark.parametrize(
    ("tops", "classes"),
    [
        (("P1", "P2", "P3"), ("0", "1")),
        (("fold1", "fold2"), ("Benign", "Malignant")),
        (("train/P1", "test/P2", "val/P3"), ("normal", "tumor")),
        (("0451", "0452"), ("non-IDC", "IDC")),
    ],
)
def test_patients_and_folds_are_not_taken_for_classes(tmp_path, tops, classes):
    folder = make_tree(tmp_path / "x", tops, classes)
    with refuses(DataError, "<class>/<patient>/"):
        prepare(folder, tmp_path / "x.pack")
    zipped = zip_folder(folder, tmp_path / "x.zip")
    with refuses(DataError, "<class>/<patient>/"):
        prepare(zipped, tmp_path / "x.pack")


@pytest.mark.parametrize(
    "tops",
    [("train_set", "val_set", "test_set"), ("Training Data", "Validation Data"), ("TRAIN", "valid-images")],
)
def test_folders_named_like_subsets_are_subsets_and_reported(tmp_path, tops, caplog):
    pack = prepare(make_tree(tmp_path / "x", tops, ("benign", "malignant")), tmp_path / "x.pack")
    assert pack.class_names == ["benign", "malignant"]
    assert set(pack.table["official_subset"]) == {"train", "validation", "test"} - (
        {"test"} if len(tops) == 2 else set()
    )
    assert "interpreted as official subsets" in caplog.text


def test_folders_below_classes_that_may_be_classes_are_reported(tmp_path, caplog):
    prepare(make_tree(tmp_path / "x", ("A", "B"), ("k1", "k2", "k3")), tmp_path / "x.pack", positive="B")
    assert "several contain the folders k1, k2, k3" in caplog.text
    caplog.clear()
    prepare(make_tree(tmp_path / "y", ("benign", "malignant"), ("site1", "site2")), tmp_path / "y.pack")
    assert "interpreted as classes" not in caplog.text


def test_many_classes_may_be_patients(tmp_path, caplog):
    make_tree(tmp_path / "y", [f"{n}" for n in range(8863, 8885)], [""])
    with pytest.raises(DataError):
        prepare(tmp_path / "y", tmp_path / "y.pack")
    make_tree(tmp_path / "x", [f"name {n}" for n in range(22)], [""])
    prepare(tmp_path / "x", tmp_path / "x.pack")
    assert "22 folders are interpreted as classes" in caplog.text


def test_idc_names_from_beyond_any_slide_are_named(tree, tmp_path):
    folder = tree("idc")
    image = next(folder.rglob("*.png"))
    for x in ("50001", "5000001", "9" * 100):
        shutil.copy(image, image.with_name(f"8863_idx5_x{x}_y1_class{image.parent.name}.png"))
    pack = prepare(folder, tmp_path / "x.pack")
    assert len(pack) == 8
    assert ["out of range" in item["reason"] for item in pack.info.skipped] == [True] * 3


def test_numbers_as_class_names_are_in_order_of_value(tmp_path, make_patches):
    source = next((TREES / "classes/adenosis").iterdir())
    for name in ("10", "9", "benign"):
        (tmp_path / "x" / name).mkdir(parents=True)
        shutil.copy(source, tmp_path / "x" / name)
    assert prepare(tmp_path / "x", tmp_path / "x.pack").class_names == ["9", "10", "benign"]


def test_unknown_layouts_are_refused_and_known_ones_listed(tmp_path):
    (tmp_path / "x").mkdir()
    shutil.copy(next((TREES / "classes/adenosis").iterdir()), tmp_path / "x" / "a.png")
    with refuses(DataError, "'a.png'", "idc"):
        prepare(tmp_path / "x", tmp_path / "x.pack")
    with refuses(DataError, "annotated-slides", ".geojson", "breakhis: ") as caught:
        find_dataset(open_archive(tmp_path / "x"))
    assert str(caught.value).count("SOB_") == 1  # one layout of five data sets
    with refuses(DataError, "'annotated-slides'"):
        find_dataset(open_archive(tmp_path / "x"), "annotated_slides")
    with refuses(DataError, "'idx'", "'idc'"):
        find_dataset(open_archive(tmp_path / "x"), "idx")


def test_a_layout_can_be_forced(tmp_path):
    pack = prepare(TREES / "idc", tmp_path / "x.pack", dataset="folders", positive="8865")
    assert (pack.info.dataset, pack.class_names) == ("folders", ["8863", "8865"])


@pytest.mark.data
def test_real_idc_subset(data_dir, tmp_path):
    source = data_dir / "idc" / "idc_kaggle_subset.zip"
    pack = prepare(source, tmp_path / "idc.pack")
    assert pack.info.counts == {
        "patches": 8151,
        "patients": 24,
        "slides": 24,
        "per_class": {"non_idc": 4007, "idc": 4144},
        "duplicates": 0,
        "other_files": 0,
        "skipped": 0,
        "padded": 8,
    }
    sizes = sorted({f"{row.width}x{row.height}" for row in pack.table.itertuples()} - {"50x50"})
    assert sizes == ["12x50", "31x50", "32x50", "41x50", "50x35", "50x49"]
    assert ((pack.table["x"] % 50 == 1) & (pack.table["y"] % 50 == 1)).all()

    nested = tmp_path / "nested.zip"
    shutil.copy(source, nested)
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(nested, "a") as write:
        for name in read.namelist():
            write.writestr(name.removeprefix("IDC_regular_ps50_idx5/"), read.read(name))
    twice = prepare(nested, tmp_path / "nested.pack")
    assert twice.info.content_sha256 == pack.info.content_sha256
    assert twice.info.counts["duplicates"] == 8151
    assert len(twice) == 8151


@pytest.mark.data
def test_real_pcam_subset(data_dir, tmp_path):
    pack = prepare(data_dir / "pcam" / "pcam_train_valid.zip", tmp_path / "pcam.pack")
    assert pack.table.groupby(["official_subset", "target"]).size().to_dict() == {
        ("train", 0): 8000,
        ("train", 1): 8000,
        ("validation", 0): 1500,
        ("validation", 1): 1500,
    }
    same = pack.table["sha256"].value_counts()
    assert (int(same[same > 1].sum()), int((same > 1).sum())) == (1164, 511)
