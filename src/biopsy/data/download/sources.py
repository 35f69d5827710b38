"""What is published where: addresses, sizes, checksums, terms."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from biopsy.core.errors import DataError, suggest


@dataclass(frozen=True)
class RemoteFile:
    """One file at a fixed address.

    Attributes:
        url: Where it is.
        size_bytes: Its length as published, or None where no source states it.
        checksum: ``"sha256:<hex>"`` or ``"md5:<hex>"``, or None where no source states one.
        unpacked_bytes: Room its content takes, for a ``.gz`` that is unpacked and then removed; else None.
    """

    url: str
    size_bytes: int | None = None
    checksum: str | None = None
    unpacked_bytes: int | None = None

    @property
    def name(self) -> str:
        """The file's name as published."""
        return PurePosixPath(self.url.partition("?")[0]).name

    @property
    def final_name(self) -> str:
        """The name under which it ends up: without ``.gz`` if it is unpacked."""
        return self.name.removesuffix(".gz") if self.unpacked_bytes is not None else self.name


@dataclass(frozen=True)
class KaggleData:
    """A data set or competition on Kaggle, downloaded and unpacked by kagglehub.

    Attributes:
        handle: Kaggle's name for it.
        kind: Which of Kaggle's two kinds it is; a competition asks for credentials and accepted rules.
        needed_bytes: Room for the archive and its unpacked files together, about.
    """

    handle: str
    kind: Literal["dataset", "competition"]
    needed_bytes: int

    @property
    def folder(self) -> str:
        """The folder it is put in."""
        return PurePosixPath(self.handle).name

    @property
    def page(self) -> str:
        """Its page on Kaggle, where licence and rules are."""
        return f"https://www.kaggle.com/{self.kind}s/{self.handle}"


@dataclass(frozen=True)
class Source:
    """Everything that makes up one data set, and the words said before it is fetched."""

    name: str
    title: str
    licence: str
    credentials: str
    files: tuple[RemoteFile, ...] = ()
    kaggle: KaggleData | None = None


# The commit is named so that the lists cannot change under us. No checksum of them is published; their
# 84, 29 and 49 patients are those of Cruz-Roa et al. 2014 and Janowczyk & Madabhushi 2016.
_CASE_LISTS = (
    "https://raw.githubusercontent.com/choosehappy/public/8560e48bc5eaf41b349d203f6ac0a2b7d9be1b67/"
    "DL%20tutorial%20Code/6-idc/cases_{side}.txt"
)
_PCAM = "https://zenodo.org/records/2546921/files/camelyonpatch_level_2_split_{part}?download=1"
_PCAM_IMAGE_BYTES = 96 * 96 * 3
_HDF5_BYTES = 1 << 16  # headers of an uncompressed HDF5 file, generously


def _pcam_file(part: str, size_bytes: int, sha256: str, unpacked_bytes: int) -> RemoteFile:
    url = _PCAM.format(part=part)
    return RemoteFile(url, size_bytes, f"sha256:{sha256}", unpacked_bytes + _HDF5_BYTES)


# Sizes and SHA-256: TensorFlow Datasets, patch_camelyon/checksums.tsv, taken from these Zenodo files; the
# same SHA-256 stand in torchvision's prototype PCAM for the authors' own copies.
# MD5 of the csv files: github.com/basveeling/pcam issue 4. The README there has them too, but with those of
# validation and test exchanged (issues 1 and 4; torchvision pull request 6644).
_PCAM_FILES = (
    _pcam_file(
        "train_x.h5.gz",
        6_421_353_462,
        "d619e741468a7ab35c7e4a75e6821b7e7e6c9411705d45708f2a0efc8960656c",
        262_144 * _PCAM_IMAGE_BYTES,
    ),
    _pcam_file(
        "train_y.h5.gz",
        21_378,
        "b74126d2c01b20d3661f9b46765d29cf4e4fba6faba29c8e0d09d406331ab75a",
        262_144,
    ),
    _pcam_file(
        "valid_x.h5.gz",
        805_965_320,
        "f82ee1670d027b4ec388048d9eabc2186b77c009655dae76d624c0ecb053ccb2",
        32_768 * _PCAM_IMAGE_BYTES,
    ),
    _pcam_file(
        "valid_y.h5.gz",
        3_038,
        "ce1ae30f08feb468447971cfd0472e7becd0ad96d877c64120c72571439ae48c",
        32_768,
    ),
    _pcam_file(
        "test_x.h5.gz",
        800_875_929,
        "79174c2201ad521602a5888be8f36ee10875f37403dd3f2086caf2182ef87245",
        32_768 * _PCAM_IMAGE_BYTES,
    ),
    _pcam_file(
        "test_y.h5.gz",
        3_040,
        "0a522005fccc8bbd04c5a117bfaf81d8da2676f03a29d7499f71d0a0bd6068ef",
        32_768,
    ),
    RemoteFile(_PCAM.format(part="train_meta.csv"), checksum="md5:5a3dd671e465cfd74b5b822125e65b0a"),
    RemoteFile(_PCAM.format(part="valid_meta.csv"), checksum="md5:67589e00a4a37ec317f2d1932c7502ca"),
    RemoteFile(_PCAM.format(part="test_meta.csv"), checksum="md5:3455fd69135b66734e1008f3af684566"),
)

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="idc",
            title="Breast Histopathology Images (invasive ductal carcinoma), and its published case lists",
            licence="stated on the Kaggle page; read it there, and cite Cruz-Roa 2014 and Janowczyk 2016",
            credentials="usually none; where Kaggle asks for an account, a token as for hcd",
            files=tuple(RemoteFile(_CASE_LISTS.format(side=side)) for side in ("train", "val", "test")),
            # 277,524 PNGs, twice in the archive: 6.0 kB each there (mean of 8,151), 8.1 kB in blocks on disk.
            kaggle=KaggleData(
                "paultimothymooney/breast-histopathology-images", "dataset", needed_bytes=7_900_000_000
            ),
        ),
        Source(
            name="pcam",
            title="PatchCamelyon (PCam), Zenodo record 2546921",
            licence="CC0 1.0, after Camelyon16; cite Veeling 2018 and Ehteshami Bejnordi 2017",
            credentials="none",
            files=_PCAM_FILES,
        ),
        Source(
            name="hcd",
            title="Histopathologic Cancer Detection (PCam without its duplicates), a Kaggle competition",
            licence="CC0 1.0 as PCam, and the competition's rules; cite Veeling 2018",
            credentials=(
                "a Kaggle account that has accepted the competition's rules, and its API token in"
                " ~/.kaggle/access_token, ~/.kaggle/kaggle.json or KAGGLE_API_TOKEN"
            ),
            # 277,483 uncompressed 96-px TIFFs of 28 kB, and an archive at most as large.
            kaggle=KaggleData("histopathologic-cancer-detection", "competition", needed_bytes=16_000_000_000),
        ),
    )
}


def find_source(name: str) -> Source:
    """Give the source of that name.

    Raises:
        DataError: If there is none, with the nearest right name.
    """
    if name not in SOURCES:
        raise DataError(f"no data set {name!r} to fetch; {suggest(name, SOURCES)}")
    return SOURCES[name]
