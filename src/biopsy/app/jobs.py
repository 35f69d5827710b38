"""Background jobs that map slides: one folder per job, resumed when the server restarts."""

import logging
import os
import queue
import re
import secrets
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from biopsy.app.annotations import now
from biopsy.app.batching import Busy
from biopsy.core.errors import BiopsyError, DataError
from biopsy.core.files import LOCK, read_json, write_json
from biopsy.core.loaders import validate
from biopsy.models.classifier import Classifier
from biopsy.slide_io.backends import SLIDE_SUFFIXES
from biopsy.slides.cohorts import slide
from biopsy.slides.outputs import MAP, SUMMARY

logger = logging.getLogger(__name__)

FORMAT: Final = "biopsy-job/1"
DOCUMENT = "job.json"
RESULTS = {
    SUMMARY: "application/json",
    "regions.geojson": "application/geo+json",
    MAP: "application/vnd.apache.parquet",
    "heatmap.tiff": "image/tiff",
}
"""Files of a finished job that clients may download; never the label and macro images of a slide."""
_RETRY_S = 60
_ID = re.compile("[0-9a-f]{16}")


Status = Literal["uploading", "queued", "running", "done", "failed"]


class JobInfo(TypedDict):
    """State of a job of one slide, as clients receive it."""

    id: str
    model: str
    classifier: str
    name: str
    mpp: float | None
    status: Status
    error: str | None
    created: str
    finished: str | None


class Job(JobInfo):
    """Content of ``job.json``."""

    format: str
    path: str | None


class JobStatus(JobInfo):
    """A job with its progress, 0-1, and the names of its results."""

    progress: float
    results: list[str]


class Jobs:
    """The queue of slides.

    Args:
        folder: One folder per job; jobs that were not finished when the server ended are queued again.
        root: Folder below which slides may be named by path; None for nowhere.
        max_waiting: Jobs that may wait; more are refused.
    """

    def __init__(
        self,
        folder: Path,
        classifiers: Mapping[str, Classifier],
        *,
        root: Path | None,
        device: str,
        max_waiting: int,
    ) -> None:
        self.folder, self.root = folder, None if root is None else root.resolve()
        self._classifiers, self._device, self._max_waiting = classifiers, device, max_waiting
        self._jobs: dict[str, Job] = {}
        self._progress: dict[str, tuple[int, int]] = {}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._hold = FileLock(folder / LOCK)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._hold.acquire(timeout=0)
        except Timeout:
            raise DataError(f"{folder} is in use by another server: name another --out") from None
        except OSError as error:
            raise DataError(
                f"{folder} cannot hold the slide jobs ({error.strerror}): name another --out"
            ) from None
        self._resume()
        self._thread = threading.Thread(target=self._work, daemon=True, name="slides")
        self._thread.start()

    def _resume(self) -> None:
        """Queue unfinished jobs again, and remove incomplete uploads."""
        for path in self.folder.iterdir():
            if _ID.fullmatch(path.name) and [item.name for item in path.iterdir()] == ["upload"]:
                shutil.rmtree(path, ignore_errors=True)
        result = []
        for path in self.folder.glob(f"*/{DOCUMENT}"):
            try:
                job = validate(path, Job, read_json(path, format=FORMAT))
                if job["id"] != path.parent.name:
                    raise DataError(f"{path} is of another job, {job['id']!r}")
                result.append(job)
            except DataError as error:
                logger.warning("job left out: %s", error)
        for job in sorted(result, key=lambda job: job["created"]):
            self._jobs[job["id"]] = job
            if job["status"] in ("queued", "running"):
                self._set(job["id"], "queued")
                self._queue.put(job["id"])

    def find(self, path: str) -> Path:
        """Return a slide below the root.

        Raises:
            PermissionError: If there is no root, or the path leads out of it.
            DataError: If there is no such slide.
        """
        resolved = self.resolve(path)
        if not resolved.is_file() or resolved.suffix.lower() not in SLIDE_SUFFIXES:
            raise DataError(f"{path!r} is no slide below the root")
        return resolved

    def resolve(self, path: str) -> Path:
        """Return a path below the root.

        Raises:
            PermissionError: If there is no root, or the path leads out of it.
            DataError: If the path is none.
        """
        if self.root is None:
            raise PermissionError("files cannot be named by path: the server was started without --root")
        try:
            resolved = (self.root / path).resolve()
        except (OSError, ValueError):
            raise DataError("the path is no path") from None
        if not resolved.is_relative_to(self.root):
            raise PermissionError("the path leads out of the folder that may be read")
        return resolved

    def create(self, model: str, name: str, mpp: float | None) -> tuple[str, Path]:
        """Create a job that waits for its upload; return its id and the path of the upload."""
        if Path(name).suffix.lower() not in SLIDE_SUFFIXES:
            raise DataError(f"{name!r} does not end like a slide: {' '.join(SLIDE_SUFFIXES)}")
        with self._lock:
            waiting = [job for job in self._jobs.values() if job["status"] in ("queued", "uploading")]
            if len(waiting) >= self._max_waiting:
                raise Busy(_RETRY_S)
            identity = secrets.token_hex(8)
            self._jobs[identity] = {
                "format": FORMAT,
                "id": identity,
                "model": model,
                "classifier": self._classifiers[model].sha256,
                "name": name,
                "mpp": mpp,
                "path": None,
                "status": "uploading",
                "error": None,
                "created": now(),
                "finished": None,
            }
        upload_folder = self.folder / identity / "upload"
        upload_folder.mkdir(parents=True)
        return identity, upload_folder / f"slide{Path(name).suffix.lower()}"

    def add(self, model: str, path: Path, mpp: float | None) -> JobStatus:
        """Queue a slide that `find` returned; return the job."""
        identity, _ = self.create(model, path.name, mpp)
        self.start(identity, path)
        return self.get(identity)

    def start(self, identity: str, path: Path) -> None:
        """Queue a job whose slide is in its place."""
        self._set(identity, "queued", path=str(path))
        self._queue.put(identity)

    def drop(self, identity: str) -> None:
        """Remove a job and its files.

        Raises:
            DataError: If it is being worked on.
        """
        with self._lock:
            if self._jobs[identity]["status"] == "running":
                raise DataError("the slide is being mapped: remove the job when it is finished")
            del self._jobs[identity]
        shutil.rmtree(self.folder / identity, ignore_errors=True)

    def get(self, identity: str) -> JobStatus:
        """Return the status, progress and results of a job.

        Raises:
            KeyError: If there is none.
        """
        job = self._jobs[identity]
        done, total = self._progress.get(identity, (0, 0))
        return {
            **validate(DOCUMENT, JobInfo, job),
            "progress": 1.0 if job["status"] == "done" else done / total if total else 0.0,
            "results": sorted(self._files(identity)) if job["status"] == "done" else [],
        }

    def list(self) -> "list[JobStatus]":
        """Return all jobs, oldest first."""
        return [self.get(identity) for identity in list(self._jobs)]

    def count(self) -> dict[str, int]:
        counts = dict.fromkeys(("queued", "running", "done", "failed"), 0)
        for job in list(self._jobs.values()):
            counts[job["status"]] = counts.get(job["status"], 0) + 1
        return counts

    def result(self, identity: str, name: str) -> Path:
        """Return a file of a finished job.

        Raises:
            KeyError: If there is none.
        """
        if self._jobs[identity]["status"] != "done" or name not in RESULTS:
            raise KeyError(name)
        return self._files(identity)[name]

    def slide_file(self, identity: str) -> tuple[Path, float | None]:
        """Return the slide of a job and its stated mpp.

        Raises:
            KeyError: If there is no such job, or its slide was uploaded and is not kept.
        """
        job = self._jobs[identity]
        if job["path"] is None or not Path(job["path"]).is_file():
            raise KeyError(identity)
        return Path(job["path"]), job["mpp"]

    def _files(self, identity: str) -> dict[str, Path]:
        maps = self.folder / identity / "maps"
        return {path.name: path for name in RESULTS for path in maps.glob(f"*/{name}")}

    def _set(
        self,
        identity: str,
        status: Status,
        *,
        path: str | None = None,
        error: str | None = None,
        finished: str | None = None,
    ) -> None:
        with self._lock:
            job = self._jobs[identity]
            path = path or job["path"]
            job = {**job, "path": path, "status": status, "error": error, "finished": finished}
            self._jobs[identity] = job
            write_json(self.folder / identity / DOCUMENT, job)

    def close(self) -> None:
        """Stop; unfinished jobs are queued again when the server restarts."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(timeout=5)
        self._hold.release()

    def _work(self) -> None:
        while (identity := self._queue.get()) is not None and not self._closing.is_set():
            if identity in self._jobs:
                try:
                    self._map(identity)
                except OSError:
                    logger.exception("job %s: %s cannot be written", identity, DOCUMENT)

    def _map(self, identity: str) -> None:
        job, job_folder = self._jobs[identity], self.folder / identity
        path = job["path"]

        def on_progress(done: int, total: int, name: str | None = None) -> None:
            self._progress[identity] = done, total

        try:
            if path is None:
                raise DataError(f"{DOCUMENT} names no slide: send the slide again")
            self._set(identity, "running")
            if job["model"] not in self._classifiers:
                raise DataError(f"the server has no model {job['model']!r} any more")
            slide(
                self._classifiers[job["model"]],
                [path],
                out=job_folder / "maps",
                mpp=job["mpp"],
                device=self._device,
                on_progress=on_progress,
            )
        except (BiopsyError, OSError) as error:
            reason = str(error).replace(path or DOCUMENT, job["name"] if path else DOCUMENT)
            reason = reason.replace(os.fspath(job_folder), "")
            self._finish(identity, "failed", reason)
        except Exception as error:
            logger.exception("job %s failed", identity)
            self._finish(identity, "failed", f"internal error ({type(error).__name__})")
        else:
            self._finish(identity, "done")

    def _finish(self, identity: str, status: Status, error: str | None = None) -> None:
        shutil.rmtree(self.folder / identity / "upload", ignore_errors=True)
        self._set(identity, status, error=error, finished=now())
