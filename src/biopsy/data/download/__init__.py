"""The real data sets, fetched from where they are published.

``sources`` says what is where, how large it is and under which terms; ``transfer`` moves one file over HTTP
(resumed, checked, renamed when whole); ``kaggle`` hands Kaggle's data over to kagglehub; ``collection``
fetches everything that belongs to one source. To add a source, add an entry to ``SOURCES``. Nothing else in
the package touches the network.
"""

from biopsy.data.download.collection import FetchResult, describe, fetch, fetch_source
from biopsy.data.download.sources import SOURCES, KaggleData, RemoteFile, Source
from biopsy.data.download.transfer import Patience, Progress

__all__ = [
    "SOURCES",
    "FetchResult",
    "KaggleData",
    "Patience",
    "Progress",
    "RemoteFile",
    "Source",
    "describe",
    "fetch",
    "fetch_source",
]
