"""The same PCam patches in every layout people have them in, prepared and compared.

From one archive of class folders (``data/<train|valid>/<0|1>/patchNNNNNNN.jpg``) it writes

* ``hcd/``: Kaggle's "Histopathologic Cancer Detection": ``train_labels.csv`` (id, label) beside
  ``train/<id>.tif``; the id is the SHA-1 of the pixels, of patches with the same pixels one is kept, rows are
  in order of id; ``sites.csv`` (patch_id, site_id: train or valid) is for ``--join``: the protocol ``site``
  then tests on PCam's validation slides, which with Kaggle's csv alone nothing can;
* ``h5/``: the published files ``camelyonpatch_level_2_split_<train|valid>_<x|y>.h5``, in order of file name;

and prepares all three with `biopsy.prepare`. Pixels, labels and subsets must agree patch by patch, or it
stops. The packs stay: ``pcam-folders.pack``, ``pcam-hcd.pack`` (with sites), ``pcam-h5.pack``.

Command::

    python benchmarks/pcam_layouts.py ../shared/data/pcam/pcam_train_valid.zip --out DIR

Writes ``results/pcam-layouts.csv``, a row per layout. Times are of one pass, to see that none takes minutes.
"""

import argparse
import csv
import hashlib
import os
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd

import biopsy
from biopsy.core.files import create_directory
from biopsy.data.packs import Pack
from biopsy.data.splits import Split

RESULTS = Path(__file__).parent / "results" / "pcam-layouts.csv"
SPLIT_OF_SIDE = {"train": "train", "validation": "valid"}


def write_kaggle(pack: Pack, folder: Path) -> None:
    """Write a pack as Kaggle's csv and ``.tif`` files, each picture once, with a csv of sites beside them."""
    ids = [hashlib.sha1(patch.tobytes()).hexdigest() for patch in pack.patches]
    rows = pd.DataFrame({"id": ids, "label": pack.target, "site_id": name_splits(pack)})
    rows = rows.drop_duplicates("id").sort_values("id")
    (folder / "train").mkdir(parents=True)
    for row, patch_id in rows["id"].items():
        if not cv2.imwrite(str(folder / "train" / f"{patch_id}.tif"), pack.patches[row][..., ::-1]):
            raise OSError(f"{patch_id}.tif was not written")
    rows[["id", "label"]].to_csv(folder / "train_labels.csv", index=False)
    rows[["id", "site_id"]].rename(columns={"id": "patch_id"}).to_csv(folder / "sites.csv", index=False)


def write_h5(pack: Pack, folder: Path) -> None:
    """Write a pack as the published HDF5 files, patches in the order of their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = name_splits(pack)
    numbers = pack.table["patch_id"].str.rpartition("/")[2].to_numpy(str)
    for split in sorted(set(splits)):
        rows = np.flatnonzero(splits == split)
        rows = rows[np.argsort(numbers[rows], kind="stable")]
        for part, values in (("x", pack.patches[rows]), ("y", pack.target[rows].reshape(-1, 1, 1, 1))):
            with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_{part}.h5", "w") as file:
                file[part] = values.astype(np.uint8)


def name_splits(pack: Pack) -> np.ndarray:
    """Return PCam's name of each patch's side."""
    return pack.table["official_subset"].map(SPLIT_OF_SIDE).to_numpy(str)


def compare(pack: Pack, first: Pack, *, each_once: bool = False) -> None:
    """Stop unless two packs hold the same pixels with the same labels in the same subsets."""

    def list_patches(one: Pack) -> pd.DataFrame:
        subset = one.table["official_subset" if "official_subset" in one.table else "site_id"].replace(
            "valid", "validation"
        )
        table = pd.DataFrame(
            {"sha256": one.table["sha256"], "target": one.target, "subset": subset.to_numpy(str)}
        )
        return table.sort_values(["sha256", "subset"]).reset_index(drop=True)

    ours, theirs = list_patches(pack), list_patches(first)
    if each_once:
        theirs = theirs.drop_duplicates("sha256").reset_index(drop=True)
    if not ours.equals(theirs):
        raise SystemExit(f"{pack.path.name} and {first.path.name} do not hold the same patches")


def describe(pack: Pack, source: Path, seconds: float, split: Split) -> dict[str, object]:
    """Return a layout's row of the table."""
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    counts = split.parameters["counts"]
    negative, positive = pack.info.counts["per_class"].values()
    return {
        "layout": pack.info.dataset,
        "files": len(files),
        "source_mb": round(sum(path.stat().st_size for path in files) / 1e6, 1),
        "patches": len(pack),
        "negative": negative,
        "positive": positive,
        "patch_px": pack.info.patch_px,
        "mpp": pack.info.mpp,
        "split": split.protocol,
        **{subset: counts[subset]["patches"] for subset in ("train", "validation", "test")},
        "prepare_s": round(seconds, 1),
    }


def prepare_layouts(archive: Path, out: Path) -> list[dict[str, object]]:
    """Write, prepare and compare all layouts."""
    folders, seconds = prepare(archive, out / "pcam-folders.pack", positive="1", mpp=0.972)
    rows = [describe(folders, archive, seconds, keep(folders, "official"))]
    for layout, write in (("hcd", write_kaggle), ("h5", write_h5)):
        source, is_kaggle = out / layout, layout == "hcd"
        if not source.exists():
            with create_directory(source) as partial:
                write(folders, partial)
        sites = {"join": source / "sites.csv"} if is_kaggle else {}
        pack, seconds = prepare(source, out / f"pcam-{layout}.pack", **sites)
        compare(pack, folders, each_once=is_kaggle)
        if is_kaggle:
            keep(pack, "site", test_patients=("valid",))
        split = keep(pack, "kaggle-rows" if is_kaggle else "official")
        rows.append(describe(pack, source, seconds, split))
    return rows


def prepare(source: Path, out: Path, **options: object) -> tuple[Pack, float]:
    """Prepare a pack and take the time."""
    start = time.perf_counter()
    pack = biopsy.prepare(source, out, **options)  # type: ignore[arg-type]
    return pack, time.perf_counter() - start


def keep(pack: Pack, protocol: str, **options: object) -> Split:
    """Make a split and keep it in the pack under its protocol's name."""
    return biopsy.split(pack, protocol=protocol, **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for layouts and packs")
    arguments = parser.parse_args()
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "opencv": cv2.__version__,
        "h5py": version("h5py"),
    }
    table = [row | about for row in prepare_layouts(arguments.archive, arguments.out)]
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    print(pd.DataFrame(table).drop(columns=list(about)).to_string(index=False))
