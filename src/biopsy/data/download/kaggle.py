"""Kaggle's data sets, through Kaggle's own client.

kagglehub resumes, checks and unpacks. It does so in a cache folder; ours lies inside the folder that was
asked for, so that the space is taken where it was checked and the finished folder need only be renamed.
(Its ``output_dir`` would refuse to go on after an interruption.)
"""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from biopsy.core.errors import DownloadError, MissingExtra
from biopsy.data.datasets.sources import KaggleData

CACHE_VARIABLE = "KAGGLEHUB_CACHE"  # kagglehub's documented way to move its cache


def require_kagglehub() -> None:
    """Raise MissingExtra if kagglehub is not installed."""
    try:
        import kagglehub  # noqa: F401
    except ImportError:
        raise MissingExtra("fetch", "downloading from Kaggle") from None


def download_from_kaggle(data: KaggleData, out: Path) -> Path:
    """Download and unpack, and give the folder that holds the files.

    That folder is ``out/<name>``, except inside Kaggle's own notebooks, where the data are mounted already
    and stay where they are.

    Raises:
        MissingExtra: If kagglehub is not installed.
        DownloadError: If Kaggle refuses, or the download fails.
    """
    require_kagglehub()
    import kagglehub
    from kagglehub.exceptions import BackendError, CredentialError, DataCorruptionError, UnauthenticatedError

    cache = out.resolve() / ".biopsy-kagglehub"
    ask = kagglehub.competition_download if data.kind == "competition" else kagglehub.dataset_download
    try:
        with _cache_at(cache):
            result = Path(ask(data.handle))
    except (UnauthenticatedError, CredentialError) as error:
        raise DownloadError(_refusal(data, error)) from error
    except (BackendError, DataCorruptionError, zipfile.BadZipFile, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DownloadError(_refusal(data, error)) from error
        raise DownloadError(
            f"Kaggle's {data.handle} could not be downloaded ({_one_line(error)}); fetch again to go on,"
            f" or download it by hand from {data.page}"
        ) from error
    if not result.is_relative_to(cache):
        return result
    folder = out / data.folder
    os.replace(result, folder)
    shutil.rmtree(cache)
    return folder


def _refusal(data: KaggleData, error: Exception) -> str:
    rules = f", accept the rules at {data.page}/rules" if data.kind == "competition" else ""
    return (
        f"Kaggle refused {data.handle} ({_one_line(error)}); log in at kaggle.com{rules},"
        " create an API token in your account's settings, put it into ~/.kaggle/access_token and fetch again"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _cache_at(folder: Path) -> Iterator[None]:
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE_VARIABLE]
        else:
            os.environ[CACHE_VARIABLE] = before
