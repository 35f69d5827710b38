"""How what is to be downloaded is stated: addresses, sizes, checksums, terms."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal


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
    """Everything that is downloaded together, and what is said before."""

    name: str
    title: str
    licence: str
    credentials: str
    files: tuple[RemoteFile, ...] = ()
    kaggle: KaggleData | None = None
