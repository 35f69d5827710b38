"""Upload of a bundle to the Hugging Face hub."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from typing_extensions import TypedDict

from biopsy.core.errors import RunError
from biopsy.core.files import read_json, sha256_file
from biopsy.core.loaders import validate
from biopsy.core.results import Output
from biopsy.core.text import count
from biopsy.core.version import __version__
from biopsy.models.hub import PREFIX, hub_errors, require_repository

FORMAT: Final = "biopsy-bundle/1"
DOCUMENT, CARD = "bundle.json", "README.md"


class BundleDocument(TypedDict):
    """Hashes of the classifier and of the files of a bundle."""

    classifier_sha256: str
    files: dict[str, str]


@dataclass(frozen=True)
class Publication(Output):
    """Result of `publish`.

    Attributes:
        repository: ``ORG/NAME``.
        commit: Hash of the commit.
        model: ``hf:ORG/NAME@COMMIT``, the name of exactly this version.
        url: Page of the commit.
    """

    repository: str
    commit: str
    model: str
    url: str
    files: list[str]

    def blocks(self) -> list[str]:
        return [self.model, f"{count(len(self.files), 'file')}: {self.url}"]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def publish(bundle: Path | str, repository: str, *, private: bool = False) -> Publication:
    """Upload a bundle to the Hugging Face hub.

    Only files written by ``export`` are uploaded, and only if unchanged; the model card may be edited. The
    token is taken from ``hf auth login`` or ``$HF_TOKEN``.

    Args:
        bundle: Folder written by ``export``.
        repository: Repository on the hub, ``ORG/NAME``; created if missing.
        private: Create the repository as a private one.

    Raises:
        DataError: If the folder is not a bundle.
        RunError: If a file of the bundle is missing or was modified.
        HubError: If the name is invalid, or the hub refuses the upload.
    """
    from huggingface_hub import HfApi

    folder = Path(bundle)
    files = _list_bundle(folder)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with hub_errors(require_repository(repository)):
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            commit_message=f"Classifier exported by biopsy {__version__}",
        )
    model = f"{PREFIX}{repository}@{commit.oid}"
    return Publication(repository, commit.oid, model, commit.commit_url, files)


def read_bundle(folder: Path, *, remedy: str = "export it again") -> BundleDocument:
    """Return what is needed of ``bundle.json``; ``remedy`` is advice for the error.

    Raises:
        FileFormatError: If it is missing, invalid or was changed.
    """
    path = folder / DOCUMENT
    return validate(path, BundleDocument, read_json(path, format=FORMAT, remedy=remedy))


def _list_bundle(folder: Path) -> list[str]:
    """Return the files of a bundle, each checked against its hash."""
    document = read_bundle(folder, remedy="name a folder that `export` wrote")
    for name, digest in document["files"].items():
        path = folder / name
        if not path.is_file() or (name != CARD and sha256_file(path) != digest):
            raise RunError(f"{path} is missing or was altered since the bundle was written: export again")
    return [*document["files"], DOCUMENT]
