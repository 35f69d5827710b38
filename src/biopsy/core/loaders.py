"""Guarded reading of files: the one place where files that others may have made are opened.

Every function here reads regular files only (never a named pipe, a device or an address), bounds what is read
by the constants below, executes nothing, and refuses what it cannot read by one error, `FileFormatError`.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from biopsy.core.errors import FileFormatError


def open_regular(path: Path | str, *, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: The file.
        max_bytes: Size above which it is refused; None for no limit.

    Raises:
        FileFormatError: If it is missing, no regular file, not readable or too large.
    """
    try:
        # Without O_NONBLOCK the opening of a named pipe would wait for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileFormatError(path, "missing", "does not exist") from None
    except OSError as error:
        raise FileFormatError(path, "unreadable", f"cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise FileFormatError(repr(str(path)), "unreadable", f"is no name of a file: {error}") from None
    status = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, device or socket"
            raise FileFormatError(path, "not-regular", f"is {kind} where a file was expected")
        if max_bytes is not None and status.st_size > max_bytes:
            raise FileFormatError(
                path, "too-large", f"has {status.st_size:,} bytes where at most {max_bytes:,} are read"
            )
    except FileFormatError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path | str, *, max_bytes: int) -> bytes:
    """Read a regular file whole; see `open_regular`."""
    with open_regular(path, max_bytes=max_bytes) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:  # it grew, or is a file of /proc, which says it is empty
        raise FileFormatError(path, "too-large", f"has more than the {max_bytes:,} bytes that are read")
    return content
