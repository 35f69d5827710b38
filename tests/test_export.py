"""The exported tree: the source's own files, sorted as the split says, as Keras scripts expect them."""

import json
import zipfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest

import biopsy
from biopsy.core.errors import DataError, RecipeError, SplitError
from biopsy.data.export_tree import FOLDER_BY_SUBSET, count_tree, export_tree, name_files
from biopsy.data.splits import find_split
from biopsy.data.splits import split as make_split
from biopsy.recipes import load_recipe
from command_line import call
from conftest import draw_patches, encode_png
from refusals import refuses

SUBSET_BY_FOLDER = {folder: subset for subset, folder in FOLDER_BY_SUBSET.items()}


def read_tree(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


@pytest.fixture
def source(make_idc_zip) -> Path:
    return make_idc_zip(n_patients=5)


@pytest.fixture
def tree(tmp_path) -> Path:
    return tmp_path / "datasets" / "idc"


def test_the_tree_holds_the_sources_own_files_where_the_split_puts_them(source, tree, tmp_path):
    pack = biopsy.prepare(source, tmp_path / "idc.pack", export_tree=tree)
    published = load_recipe("cancernet-2020").as_published.split
    subsets = make_split(pack, protocol="as-published", recipe=published, save=False).subsets(pack)
    with zipfile.ZipFile(source) as archive:
        expected = {
            f"{FOLDER_BY_SUBSET[subset]}/{target}/{Path(path).name}": archive.read(path)
            for subset, target, path in zip(subsets, pack.target, pack.table["source"], strict=True)
        }
    assert read_tree(tree) == expected and len(expected) == len(pack)
    counts = count_tree(tree)
    assert list(counts) == ["training", "validation", "testing"]
    assert counts == {
        FOLDER_BY_SUBSET[subset]: {
            str(target): int(((subsets == subset) & (pack.target == target)).sum()) for target in (0, 1)
        }
        for subset in FOLDER_BY_SUBSET
    }


def test_a_tree_prepared_again_is_the_same_pack(source, tree, tmp_path):
    pack = biopsy.prepare(source, tmp_path / "idc.pack", export_tree=tree)
    again = biopsy.prepare(tree, tmp_path / "again.pack")
    assert again.info.dataset == "idc" and again.info.content_sha256 == pack.info.content_sha256


def test_a_folder_gives_the_same_tree_as_its_zip(source, tree, tmp_path):
    with zipfile.ZipFile(source) as archive:
        archive.extractall(tmp_path / "unpacked")
    biopsy.prepare(source, tmp_path / "zip.pack", export_tree=tree)
    biopsy.prepare(tmp_path / "unpacked", tmp_path / "folder.pack", export_tree=tmp_path / "other")
    assert read_tree(tree) == read_tree(tmp_path / "other")


def test_a_pack_that_is_there_already_gets_its_tree(source, tree, tmp_path):
    pack = biopsy.prepare(source, tmp_path / "idc.pack")
    make_split(pack, protocol="patients", test_patients=("8863",), name="mine")
    written = (pack.path / "pack.json").stat().st_mtime_ns
    progress = []
    biopsy.prepare(
        source,
        pack.path,
        export_tree=tree,
        split="mine",
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert (pack.path / "pack.json").stat().st_mtime_ns == written
    patients = {
        folder: {name.split("_")[0] for name in names_in(tree, folder)} for folder in SUBSET_BY_FOLDER
    }
    assert patients["testing"] == {"8863"}
    assert not (patients["training"] & patients["testing"] or patients["training"] & patients["validation"])
    assert progress[-1] == (len(pack), len(pack))


def names_in(tree: Path, folder: str) -> list[str]:
    return [path.name for path in (tree / folder).rglob("*.png")]


def test_padded_and_left_out_patches(tmp_path, tree, caplog):
    images, table = draw_patches(n_patients=4)
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for image, row in zip(images, table.itertuples(), strict=True):
            shown = image[:9] if row.Index % 7 == 0 else image
            archive.writestr(f"{row.patient_id}/{row.target}/{row.patch_id}.png", encode_png(shown))
    (tmp_path / "cases.csv").write_text("case_id,split\n8863,train\n8865,val\n8867,test\n")
    pack = biopsy.prepare(tmp_path / "odd.zip", tmp_path / "odd.pack")
    make_split(pack, protocol="official", cases=tmp_path / "cases.csv", name="listed")
    caplog.set_level("INFO", logger="biopsy")
    biopsy.prepare(tmp_path / "odd.zip", pack.path, export_tree=tree, split="listed")
    assert sum(map(len, map(Counter, count_tree(tree).values()))) == 6
    assert len(read_tree(tree)) == 36 and "12 patches are in no subset of listed" in caplog.text
    with zipfile.ZipFile(tmp_path / "odd.zip") as archive:
        originals = Counter(archive.read(name) for name in archive.namelist() if "8869" not in name)
    assert Counter(read_tree(tree).values()) == originals


def test_where_the_test_subset_validates_it_is_in_both_folders(source, tree, tmp_path):
    pack = biopsy.prepare(source, tmp_path / "idc.pack")
    recipe = {"method": "first-files", "count": 40, "test": 0.25, "test_is_validation": True, "seed": 0}
    split = make_split(pack, protocol="as-published", recipe=recipe, save=False)
    export_tree(pack, source, tree, split)
    assert sorted(names_in(tree, "validation")) == sorted(names_in(tree, "testing"))
    assert len(names_in(tree, "testing")) == 10 and len(names_in(tree, "training")) == 30


def test_names_that_several_files_share_become_their_paths(tmp_path, tree, caplog):
    images, _ = draw_patches(n_patients=2, patches_per_patient=8)
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for index, image in enumerate(images):
            name = "benign" if index < 8 else "malignant"
            archive.writestr(f"{name}/p{index % 4}/{index // 4 % 2}.png", encode_png(image))
        archive.writestr("benign/p9/alone.png", encode_png(images[3][:5]))
    caplog.set_level("INFO", logger="biopsy")
    biopsy.prepare(tmp_path / "mine.zip", tmp_path / "mine.pack", export_tree=tree, split="patients")
    tree_names = {tuple(Path(name).parts[1:]) for name in read_tree(tree)}
    renamed = {
        (str(k), f"{c}__p{p}__{n}.png")
        for k, c in enumerate(("benign", "malignant"))
        for p in range(4)
        for n in (0, 1)
    }
    assert tree_names == renamed | {("0", "alone.png")}
    assert "16 files share a name" in caplog.text


def test_file_names():
    assert name_files(["a/1.png", "b/2.png"]) == ["1.png", "2.png"]
    assert name_files(["a/b/1.png", "c/1.PNG", "2.png"]) == ["a__b__1.png", "c__1.PNG", "2.png"]
    with refuses(DataError, "same file name"):
        name_files(["a/b__1.png", "a__b/1.png", "x/b__1.png", "x/1.png"])


def test_nothing_half_written_is_left(source, tree, tmp_path, monkeypatch):
    pack = biopsy.prepare(source, tmp_path / "idc.pack")
    split = find_split(pack)
    real, calls = Path.write_bytes, []

    def full_disk(self, data):
        calls.append(self)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with refuses(DataError, "disk", "full"):
        export_tree(pack, source, tree, split)
    assert not tree.exists() and list(tree.parent.iterdir()) == []


def test_refusals(source, make_idc_zip, tree, tmp_path):
    out = tmp_path / "idc.pack"
    for options, error, facts in (
        ({"split": "patients"}, DataError, ["--export-tree"]),
        ({"recipe": "cancernet-2020"}, DataError, ["--export-tree"]),
        ({"export_tree": tree, "split": "a", "recipe": "b"}, DataError, ["--split", "--recipe"]),
        ({"export_tree": tree, "recipe": "cancernet-2021"}, RecipeError, ["'cancernet-2020'"]),
        ({"export_tree": source}, DataError, [source, "--export-tree"]),
        ({"export_tree": tmp_path}, DataError, [tmp_path, "--export-tree"]),
    ):
        with refuses(error, *facts):
            biopsy.prepare(source, out, **options)
        assert not out.exists()
    pack = biopsy.prepare(source, out)
    with refuses(SplitError, "'folds'", "subsets"):
        export_tree(pack, source, tree, make_split(pack, protocol="folds", save=False))
    with refuses(DataError, "other.zip", "idc.pack"):
        export_tree(pack, make_idc_zip("other.zip", n_patients=1), tree, find_split(pack))
    with refuses(DataError, pack.path, "a pack"):
        biopsy.prepare(pack.path, tmp_path / "other.pack", export_tree=tree)
    assert not tree.exists()


def test_arrays_have_no_files_to_export(make_patches, tree, tmp_path):
    images, table = make_patches()
    folder = tmp_path / "pcam"
    folder.mkdir()
    for part, values in (("x", images), ("y", table["target"].to_numpy().reshape(-1, 1, 1, 1))):
        with h5py.File(folder / f"camelyonpatch_level_2_split_train_{part}.h5", "w") as file:
            file[part] = values
    with refuses(DataError, "HDF5 arrays"):
        biopsy.prepare(folder, tmp_path / "pcam.pack", export_tree=tree)
    assert not (tmp_path / "pcam.pack").exists()
    pack = biopsy.prepare(folder, tmp_path / "pcam.pack")
    with refuses(DataError, "HDF5 arrays"):
        export_tree(pack, folder, tree, find_split(pack, "patients"))


def test_the_command_line_counts_the_tree(source, tree, tmp_path):
    command = ["prepare", str(source), "--out", str(tmp_path / "idc.pack"), "--export-tree", str(tree)]
    done = call(*command)
    assert done.exit_code == 0 and "warning: patients are in more than one subset" in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[-4:]]
    assert rows[0] == ["subset", "class", "0", "class", "1"]
    assert {row[0]: {"0": int(row[1]), "1": int(row[2])} for row in rows[1:]} == count_tree(tree)
    command = [*command[:-1], str(tree.with_name("second")), "--split", "patients", "--json"]
    done = call(*command)
    assert json.loads(done.stdout)["tree"] == count_tree(tree.with_name("second"))


@pytest.mark.peer
def test_keras_reads_the_tree_as_the_post_does(source, tree, tmp_path):
    keras = pytest.importorskip("keras")
    pack = biopsy.prepare(source, tmp_path / "idc.pack", export_tree=tree)
    generator = keras.src.legacy.preprocessing.image.ImageDataGenerator()
    for folder, counts in count_tree(tree).items():
        flow = generator.flow_from_directory(str(tree / folder), target_size=(16, 16), shuffle=False)
        assert flow.class_indices == {"0": 0, "1": 1} and flow.samples == sum(counts.values())
        ids = [Path(name).stem for name in flow.filenames]
        target = pack.table.set_index("patch_id")["target"].loc[ids]
        np.testing.assert_array_equal(flow.classes, target)


@pytest.mark.data
def test_the_real_subset(data_dir, tree, tmp_path):
    source = data_dir / "idc" / "idc_kaggle_subset.zip"
    pack = biopsy.prepare(source, tmp_path / "idc.pack", export_tree=tree)
    files = {path.name: path for path in tree.rglob("*.png")}
    assert len(files) == len(pack) == 8151
    with zipfile.ZipFile(source) as archive:
        assert all(files[Path(name).name].read_bytes() == archive.read(name) for name in archive.namelist())
    again = biopsy.prepare(tree, tmp_path / "again.pack")
    assert again.info.content_sha256 == pack.info.content_sha256
    assert again.info.counts["padded"] == 8
