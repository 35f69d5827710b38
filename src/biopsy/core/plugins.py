"""Registries filled from modules of this package and entry points of plug-ins."""

import logging
from collections import UserDict
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from threading import RLock
from typing import TypeVar

Value = TypeVar("Value")
Function = Callable[..., object]

logger = logging.getLogger(__name__)


class Registry(UserDict[str, Value]):
    """A registry by name, loaded on first use.

    Args:
        group: Entry point group of plug-ins.
        package: Package whose modules register the built-in values.
        patterns: File names of these modules.
    """

    def __init__(self, group: str, package: str = "", patterns: tuple[str, ...] = ("*.py",)) -> None:
        super().__init__()
        self.group, self._package, self._patterns = group, package, patterns
        self._modules: dict[str, str] = {}
        self._is_loaded, self._lock = False, RLock()

    def add(self, name: str, value: Value, function: Function) -> None:
        """Register a value under a unique name.

        Args:
            function: A function of the registering module, which may register again when reloaded.

        Raises:
            ValueError: If another module registered that name.
        """
        owner = self._modules.setdefault(name, function.__module__)
        if owner != function.__module__:
            raise ValueError(
                f"{name!r} of {self.group} is registered by {owner} already: choose another name"
            )
        self.data[name] = value

    def load(self) -> None:
        """Import all registering modules, once."""
        with self._lock:
            if self._is_loaded:
                return
            self._is_loaded = True  # modules being imported may use the registry
            try:
                if self._package:
                    import_modules(self._package, self._patterns)
                load_entry_points(self.group)
            except BaseException:
                self._is_loaded = False
                raise

    def __missing__(self, name: str) -> Value:
        self.load()
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        if name not in self.data:
            self.load()
        return name in self.data

    def __iter__(self) -> Iterator[str]:
        self.load()
        return iter(self.data)

    def __len__(self) -> int:
        self.load()
        return len(self.data)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._modules.pop(name, None)


def import_modules(package: str, patterns: tuple[str, ...]) -> None:
    """Import the modules of a package whose file names match, sorted by name."""
    folder = Path(str(import_module(package).__file__)).parent
    for path in sorted({path for pattern in patterns for path in folder.rglob(pattern)}):
        if path.name != "__init__.py":
            import_module(".".join((package, *path.relative_to(folder).with_suffix("").parts)))


@cache
def load_entry_points(group: str) -> None:
    """Import the modules of an entry point group, with a warning for those that fail."""
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            entry.load()
        except Exception as error:  # plug-ins may raise any exception
            reason = f"{type(error).__name__}: {error}"
            logger.warning("plug-in %s (%s, %s) cannot be loaded: %s", entry.name, entry.value, group, reason)
