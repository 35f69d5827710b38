"""Exceptions of this package.

::

    BiopsyError
    ├── DataError (ValueError)        patches, labels, tables, images
    │   ├── FileFormatError           a file that is damaged, too large, or not of the format expected
    │   ├── UserFileError             a user's file in the place of an output
    │   ├── ArchiveError              a zip or folder that cannot be read as it stands
    │   ├── PackError                 a pack that is truncated, altered, newer or read-only
    │   ├── SplitError                a split that cannot be made or would leak
    │   └── SlideError                a slide that cannot be read at the requested resolution
    ├── RecipeError (ValueError)      a recipe, a setting, a network or a name that does not exist
    ├── MetricError (ValueError)      data for which a metric is not defined
    ├── RunError (RuntimeError)       a run that cannot be continued, resumed or evaluated
    │   └── TrainingDiverged          a loss that is not finite
    ├── DownloadError (OSError)       a file that could not be downloaded
    │   └── HubError                  a repository of the Hugging Face hub that cannot be read or written
    └── MissingExtra (ImportError)    an optional dependency that is not installed

Messages are one line: what was expected, what was found, what to do. The command line prints them and exits
with 1.
"""

import contextlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path

MAX_MESSAGE = 2000


class BiopsyError(Exception):
    """Base class of the exceptions of this package.

    The message is one line of at most `MAX_MESSAGE` characters.

    Attributes:
        reason: A code for programs, of the classes that list their codes. Of slides, splits, runs and recipes
            whose file or download is at fault, the code of its `FileFormatError` or `DownloadError`; else
            empty.
    """

    def __init__(self, message: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason

    def __str__(self) -> str:
        text = " ".join(line.strip() for line in super().__str__().splitlines())
        return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), str(self), vars(self))


def _restore(kind: type[BiopsyError], message: str, attributes: dict[str, object]) -> BiopsyError:
    """Return an error from another process, whatever the arguments of its class."""
    error = kind.__new__(kind)
    BiopsyError.__init__(error, message)
    vars(error).update(attributes)
    return error


class DataError(BiopsyError, ValueError):
    """Patches, labels, tables or images are invalid."""


@contextlib.contextmanager
def raising(kind: type[BiopsyError]) -> Iterator[None]:
    """Raise errors in the files of a pack, run or split as errors of that kind."""
    try:
        yield
    except DataError as error:
        raise kind(str(error), error.reason) from None


class FileFormatError(DataError):
    """A file is not of the expected format.

    Attributes:
        path: The file.
        reason: A code for programs: ``missing``, ``unreadable``, ``not-regular``, ``too-large``,
            ``too-deep``, ``encoding``, ``syntax``, ``duplicate``, ``value``, ``columns``, ``format``,
            ``architecture`` (weights of another network) or ``altered``.
    """

    def __init__(self, path: Path | str, reason: str, message: str) -> None:
        super().__init__(f"{path} {message}", reason)
        self.path = Path(path)


class UserFileError(DataError):
    """A user's file, or an input, is in the place of an output.

    Attributes:
        path: The file or folder.
        reason: A code for programs: ``foreign`` (not written by this package), ``edited`` (changed since),
            ``input`` (the same command reads it), ``not-empty``, ``not-a-file`` or ``not-a-folder``.
    """

    def __init__(self, path: Path | str, reason: str, message: str) -> None:
        super().__init__(f"{path} {message}", reason)
        self.path = Path(path)


class ArchiveError(DataError):
    """An archive or folder cannot be read."""


class PackError(DataError):
    """A pack is truncated, altered, newer than this version, or read-only.

    Attributes:
        reason: ``missing``, ``truncated``, ``altered``, ``format``, ``value``, ``read-only``, ``patch`` (one
            that it does not hold) or ``exists`` (another pack is in the place of the output), or the code of
            the `FileFormatError` of one of its files.
    """


class SplitError(DataError):
    """A split cannot be made from these patients, or would leak.

    Attributes:
        reason: ``name`` (of a split, protocol, method or subset that does not exist), ``missing`` (ids, lists
            or options that are needed), ``patient`` (one that does not exist or is not suitable),
            ``too-few`` (patients or patches), ``classes``, ``overlap`` (a patient in two subsets), ``folds``
            (a fold that does not exist, or folds where subsets are needed), ``unit``, ``columns`` or
            ``other-pack``, or the code of the `FileFormatError` of its file.
    """


class SlideError(DataError):
    """A slide cannot be read, has no tissue, or lacks the resolution of the classifier."""


class RecipeError(BiopsyError, ValueError):
    """A recipe, a setting or a registered name is wrong.

    Attributes:
        reason: ``name`` (of a recipe, network, layer, method or weights that do not exist), ``setting`` (one
            that is unknown or lacking), ``value`` (of a setting), ``conflict`` (settings that exclude each
            other), ``network`` (one that cannot do this), ``weights`` (unavailable or of another network),
            ``licence`` (not accepted), ``transform`` (a user's, with another result than a batch) or ``data``
            (data that the recipe is not for), or the code of the `FileFormatError` of its file.
    """


class MetricError(BiopsyError, ValueError):
    """A metric is not defined for targets or probabilities.

    Attributes:
        reason: ``empty`` (nothing to measure or draw), ``shape`` (lengths or shapes that differ), ``order``
            (rows that do not correspond), ``missing`` (values that are missing or not finite), ``target``
            (one that is no class), ``prob`` (one that is no probability), ``classes`` (their number or
            names), ``duplicate`` (patch ids), ``undefined`` (for these data), ``name`` (of a metric, method
            or rule that does not exist) or ``value`` (of a setting).
    """


class RunError(BiopsyError, RuntimeError):
    """A run cannot be continued, resumed or evaluated."""


class TrainingDiverged(RunError):
    """The training loss became infinite or not a number."""


class DownloadError(BiopsyError, OSError):
    """A file could not be downloaded.

    Attributes:
        reason: ``offline`` (none or dropped connections), ``refused`` (by the server), ``missing``,
            ``changed`` (other bytes than published) or ``disk`` (no room, or not writable).
    """


class HubError(DownloadError):
    """A repository of the Hugging Face hub cannot be read or written.

    Attributes:
        repository: ``ORG/NAME``.
        reason: A code for programs: ``name``, ``missing``, ``revision``, ``gated``, ``offline``, ``refused``
            or ``not-a-classifier``.
    """

    def __init__(self, repository: str, reason: str, message: str) -> None:
        super().__init__(message, reason)
        self.repository = repository


class MissingExtra(BiopsyError, ImportError):
    """An optional dependency is not installed.

    Attributes:
        extra: The extra that has it.
    """

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the extra {extra!r}: install it with `pip install 'biopsy[{extra}]'` or, in a "
            f"checkout, `uv sync --extra {extra}`"
        )
        self.extra = extra


def first_line(error: BaseException) -> str:
    """Return the first line of the message of any exception, or its type if it has none.

    Example:
        >>> first_line(ValueError("damaged\\nat byte 7")), first_line(EOFError())
        ('damaged', 'EOFError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def suggest(name: str, options: Iterable[str]) -> str:
    """Return a hint on the options closest to ``name``, for an error message.

    Example:
        >>> suggest("cancernet-2002", ["cancernet-2019", "cancernet-2020"])
        "did you mean 'cancernet-2020'?"
    """
    options = sorted(set(options))
    close = get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options) or 'none'}"
