"""Every error this package raises on purpose.

::

    BiopsyError
    ├── DataError (ValueError)        patches, labels, tables, images
    │   ├── FileFormatError           a file that is damaged, too large, or not of the format expected
    │   ├── UserFileError             a file that a user keeps where one would be written
    │   ├── ArchiveError              a zip or folder that cannot be read as it stands
    │   ├── PackError                 a pack that is cut short, altered, newer or read-only
    │   ├── SplitError                a split that cannot be made or would leak
    │   └── SlideError                a slide that cannot be read, or not at the magnification asked for
    ├── RecipeError (ValueError)      a recipe, a setting, a network or a name that does not exist
    ├── MetricError (ValueError)      numbers that allow no metric
    ├── RunError (RuntimeError)       a run that cannot go on, be resumed or be judged
    │   └── TrainingDiverged          a loss that is not finite
    ├── DownloadError (OSError)       a file that could not be fetched whole
    │   └── HubError                  a repository of the Hugging Face hub that cannot be read or written
    └── MissingExtra (ImportError)    an optional dependency that is not installed

Messages are one line: what was asked, what was found, what to do. The command line prints them as they
are and exits with 1.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

MAX_MESSAGE = 2000


class BiopsyError(Exception):
    """Base of every error raised on purpose by this package.

    Its text is one line of at most `MAX_MESSAGE` characters, whatever the names and values quoted in it hold.
    """

    def __str__(self) -> str:
        text = " ".join(line.strip() for line in super().__str__().splitlines())
        return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."


class DataError(BiopsyError, ValueError):
    """Patches, labels, tables or images are not what was asked for."""


class FileFormatError(DataError):
    """A file cannot be read as what it should be.

    Attributes:
        path: The file.
        reason: A code for programs: ``missing``, ``unreadable``, ``not-regular``, ``too-large``,
            ``too-deep``, ``encoding``, ``syntax``, ``duplicate``, ``value``, ``columns``, ``format`` or
            ``altered``.
    """

    def __init__(self, path: Path | str, reason: str, message: str) -> None:
        super().__init__(f"{path} {message}")
        self.path = Path(path)
        self.reason = reason


class UserFileError(DataError):
    """A file that a user keeps, or that is read, stands where one would be written.

    Attributes:
        path: What stands there.
        reason: A code for programs: ``foreign`` (not written by this package), ``edited`` (changed since),
            ``input`` (the same command reads it), ``not-empty``, ``not-a-file`` or ``not-a-folder``.
    """

    def __init__(self, path: Path | str, reason: str, message: str) -> None:
        super().__init__(f"{path} {message}")
        self.path = Path(path)
        self.reason = reason


class ArchiveError(DataError):
    """An archive or folder cannot be read as it stands."""


class PackError(DataError):
    """A pack is cut short, altered, newer than this version, or cannot be written to."""


class SplitError(DataError):
    """A split cannot be made from these patients, or would leak."""


class SlideError(DataError):
    """A slide cannot be read, has no tissue, or not the magnification a classifier needs."""


class RecipeError(BiopsyError, ValueError):
    """A recipe, a setting or a registered name is wrong."""


class MetricError(BiopsyError, ValueError):
    """Targets or probabilities allow no metric."""


class RunError(BiopsyError, RuntimeError):
    """A run cannot go on, be resumed or be judged."""


class TrainingDiverged(RunError):
    """The training loss became infinite or not a number."""


class DownloadError(BiopsyError, OSError):
    """A file could not be fetched whole."""


class HubError(DownloadError):
    """A repository of the Hugging Face hub cannot be read or written.

    Attributes:
        repository: ``ORG/NAME``.
        reason: A code for programs: ``name``, ``missing``, ``revision``, ``gated``, ``offline``, ``refused``
            or ``not-a-classifier``.
    """

    def __init__(self, repository: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.repository = repository
        self.reason = reason


class MissingExtra(BiopsyError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the extra {extra!r}: install it with `uv sync --extra {extra}`")


def suggest(name: str, options: Iterable[str]) -> str:
    """Say what else ``name`` might have been, for the end of an error message.

    Example:
        >>> suggest("cancernet-2002", ["cancernet-2019", "cancernet-2020"])
        "did you mean 'cancernet-2020'?"
    """
    options = sorted(options)
    close = get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options) or 'none'}"
