"""The real data sets, fetched from where they are published.

``transfer`` moves one file over HTTP (resumed, checked, renamed when whole); ``kaggle`` hands Kaggle's data
over to kagglehub; ``collection`` fetches everything that belongs to one data set, whose record in
`biopsy.data.datasets` says what is where and under which terms. Beside it, only weights and
classifiers of the Hugging Face hub (`biopsy.models`) use the network.
"""

from biopsy.data.datasets.sources import KaggleData, RemoteFile, Source
from biopsy.data.download.collection import FetchResult, describe, fetch, fetch_source, find_source
from biopsy.data.download.transfer import Patience, Progress

__all__ = [
    "FetchResult",
    "KaggleData",
    "Patience",
    "Progress",
    "RemoteFile",
    "Source",
    "describe",
    "fetch",
    "fetch_source",
    "find_source",
]
