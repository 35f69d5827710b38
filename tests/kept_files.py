"""Files and folders that many tests begin with: made once a process, then written again from memory."""

from collections.abc import Callable
from pathlib import Path

_kept: dict[str, dict[Path, bytes]] = {}


def write_again(path: Path, key: object, make: Callable[[], object]) -> Path:
    """Let ``make`` write a file or folder, or write what it wrote for an equal ``key`` before."""
    name = repr(key)
    if name in _kept:
        for file, content in _kept[name].items():
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_bytes(content)
    else:
        make()
        files = (file for file in (path, *path.rglob("*")) if file.is_file())
        _kept[name] = {file.relative_to(path): file.read_bytes() for file in files}
    return path
