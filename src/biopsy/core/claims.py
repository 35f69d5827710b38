"""Claims: division of work among processes, on one or several machines, that share a folder.

A claim is a file that only one process can create, also on network file systems without locks. Its owner
updates it every few seconds. A claim is abandoned if its owner has died (on this machine) or has not updated
it for `STALE_S`; it is then taken over. Claims avoid duplicate work; the integrity of results does not depend
on them (`biopsy.core.files`).
"""

import contextlib
import errno
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from threading import Event, Thread

from biopsy.core.errors import DataError, FileFormatError
from biopsy.core.files import is_alive, machine_id, temporary_path
from biopsy.core.loaders import load_json

FOLDER = ".biopsy-claims"
HEARTBEAT_S = 10.0
STALE_S = 90.0
_SUFFIX = ".claim"
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_WAIT_S, _POLL_S = 0.2, 2.0


class Claims:
    """Claims of this process in a folder; a context manager that keeps them alive and releases them.

    Args:
        folder: The shared folder; claims are in its subfolder `FOLDER`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder) / FOLDER
        self._held: set[Path] = set()
        self._ended = Event()
        self._thread = Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        for path in self._held:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others have claims there
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim a name; return whether this process has it."""
        path = self.folder / f"{name}{_SUFFIX}"
        if path in self._held:
            return True
        if self._create(path):
            return True
        content = _read(path)
        if self._is_abandoned(path):
            _set_aside(path, content)
            return self._create(path)
        return False

    def release(self, name: str) -> None:
        path = self.folder / f"{name}{_SUFFIX}"
        if path in self._held:
            self._held.discard(path)
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def wait_for(self, name: str) -> Iterator[None]:
        """Wait for a claim, and hold it for the block."""
        while not self.take(name):
            time.sleep(_WAIT_S)
        try:
            yield
        finally:
            self.release(name)

    def list_others(self) -> list[str]:
        """Return the names claimed by other processes, without abandoned claims."""
        paths = sorted(set(self.folder.glob(f"*{_SUFFIX}")) - self._held)
        return [path.name.removesuffix(_SUFFIX) for path in paths if not self._is_abandoned(path)]

    def now(self) -> float:
        """Return the time of the file system, which is common to all machines."""
        while True:
            with (
                contextlib.suppress(FileNotFoundError),  # another process may remove the folder
                temporary_path(self.folder, self.folder) as path,
            ):
                path.write_bytes(b"")
                return path.stat().st_mtime

    def _create(self, path: Path) -> bool:
        owner = json.dumps({"host": platform.node(), "machine": machine_id(), "pid": os.getpid()})
        try:
            with temporary_path(self.folder, path) as partial:
                partial.write_text(owner, encoding="utf-8")
                try:
                    os.link(partial, path)  # atomic
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    _write_new(path, owner)
        except (FileExistsError, FileNotFoundError):  # another process may remove the folder
            return False
        self._held.add(path)
        return True

    def _is_abandoned(self, path: Path) -> bool:
        try:
            touched = path.stat().st_mtime
        except FileNotFoundError:
            return True
        with contextlib.suppress(FileFormatError, KeyError, TypeError):
            owner = load_json(path)
            is_here = owner["machine"] == machine_id() and owner["pid"] != os.getpid()
            if is_here and not is_alive(owner["pid"]):
                return True
        return self.now() - touched > STALE_S

    def _keep_alive(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            for path in tuple(self._held):
                with contextlib.suppress(OSError):
                    os.utime(path)


def first_of_shard(shard: str, n: int) -> int:
    """Return the index of the first of n items for process I of N, ``"I/N"``.

    Raises:
        DataError: If ``shard`` is not ``I/N`` with I from 1 to N.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"shard={shard!r} is invalid: expected I/N with I from 1 to N, such as 3/8")
    return (int(match[1]) - 1) * n // int(match[2])


def share_work(
    claims: Claims,
    names: Sequence[str],
    is_finished: Callable[[str], bool],
    work: Callable[[Iterator[str]], None],
) -> None:
    """Process all names not finished or claimed by other processes, until all are finished.

    Args:
        is_finished: Returns whether a claimed name is finished.
        work: Processes an iterator of names; it may release each one when finished.
    """
    finished = set[str]()

    def choose() -> Iterator[str]:
        for name in names:
            if name in finished or not claims.take(name):
                continue
            if not is_finished(name):
                chosen.append(name)
                yield name
            else:
                finished.add(name)
                claims.release(name)

    while len(finished) < len(names):
        chosen: list[str] = []
        iterator = choose()
        first = next(iterator, None)
        if first is not None:
            work(chain([first], iterator))
        for name in chosen:
            finished.add(name)
            claims.release(name)
        if first is None and len(finished) < len(names):  # other processes work on the others, and may die
            time.sleep(_POLL_S)


def _write_new(path: Path, content: str) -> None:
    """Create a file on a file system without hard links; not atomic if the process is killed."""
    with open(path, "x", encoding="utf-8") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:  # full disk: an empty claim would block others
            path.unlink(missing_ok=True)
            raise


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _set_aside(path: Path, content: bytes) -> None:
    """Remove an abandoned claim, unless another process has just taken it over."""
    with temporary_path(path.parent, path) as aside:
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return
        if _read(aside) != content:
            with contextlib.suppress(OSError):
                os.link(aside, path)
