"""Classifiers on the Hugging Face hub, ``hf:ORG/NAME`` or ``hf:ORG/NAME@REVISION``.

Only ``classifier.json``, ``weights.safetensors`` and the model card are downloaded, none of which is code.
``huggingface_hub`` caches them for offline use.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from biopsy.core.errors import HubError, first_line
from biopsy.models.classifier import DOCUMENT, WEIGHTS, Classifier

logger = logging.getLogger(__name__)

PREFIX, CARD = "hf:", "README.md"
_NAME = r"[\w.-]+/[\w.-]+"


def is_on_hub(model: object) -> bool:
    return isinstance(model, str | Path) and str(model).startswith(PREFIX)


def require_repository(name: str) -> str:
    """Return a valid repository name."""
    if not re.fullmatch(_NAME, name):
        raise HubError(name, "name", f"{name!r} is not a repository name of the hub: expected ORG/NAME")
    return name


def open_from_hub(model: Path | str) -> Classifier:
    """Open a classifier of the hub, and log its commit and licence.

    Args:
        model: ``hf:ORG/NAME``, or ``hf:ORG/NAME@REVISION`` with a branch, tag or commit hash.

    Returns:
        The classifier; its ``source`` is ``hf:ORG/NAME@COMMIT``.
    """
    repository, _, revision = str(model).removeprefix(PREFIX).partition("@")
    folder = _download(require_repository(repository), revision or None)
    if not all((folder / name).is_file() for name in (DOCUMENT, WEIGHTS)):
        raise HubError(
            repository,
            "not-a-classifier",
            f"{repository} at commit {folder.name} lacks {DOCUMENT} or {WEIGHTS}: it is no classifier",
        )
    classifier = Classifier.load(folder)
    classifier.source = f"{PREFIX}{repository}@{folder.name}"
    logger.info("%s: licence of the weights: %s", classifier.source, _read_licence(folder, classifier))
    return classifier


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Convert exceptions of huggingface_hub to `HubError`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    of_http = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)  # of its HTTP library
    unreachable: tuple[type[Exception], ...] = (*of_http, OSError, ImportError, ValueError)
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except GatedRepoError:
        message = f"{repository} is gated: request access on its page, then {login}"
        raise HubError(repository, "gated", message) from None
    except RepositoryNotFoundError:
        message = f"the hub has no repository {repository}, or it is private: check the name, or {login}"
        raise HubError(repository, "missing", message) from None
    except RevisionNotFoundError:
        message = f"{repository} has no such revision: name one of its branches, tags or commits"
        raise HubError(repository, "revision", message) from None
    except LocalEntryNotFoundError:
        message = f"the hub cannot be reached and {repository} is not cached at this revision: go online once"
        raise HubError(repository, "offline", message) from None
    except HfHubHTTPError as error:
        reason = first_line(error)
        raise HubError(repository, "refused", f"the hub refused {repository} ({reason}): {login}") from None
    except unreachable as error:  # the connection or the proxy
        reason = first_line(error)
        message = f"the hub cannot be reached for {repository} ({reason}): check the network and HTTPS_PROXY"
        raise HubError(repository, "offline", message) from None


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(repository):
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[DOCUMENT, WEIGHTS, CARD],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    return Path(folder)


def _read_licence(folder: Path, classifier: Classifier) -> str:
    """Return the licence in the metadata of the model card, or that of the classifier."""
    from huggingface_hub.repocard import metadata_load

    card = folder / CARD
    stated = (metadata_load(card) if card.is_file() else None) or {}
    licence = stated.get("license", "other")
    return classifier.info.licence if licence == "other" else str(licence)
