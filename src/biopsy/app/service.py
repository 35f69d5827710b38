"""The REST interface (`serve`): patches and slides in, predictions and maps out."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from fastapi import FastAPI, File, Query, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypedDict

from biopsy.app.batching import Batcher, Busy
from biopsy.app.jobs import RESULTS, Jobs, JobStatus
from biopsy.app.pictures import TILE_PX, SlidePicture, count_levels, encode_jpeg, open_picture, read_tile
from biopsy.app.web import Guard, answer, name_errors
from biopsy.core.errors import DataError
from biopsy.core.loaders import parse_json
from biopsy.core.text import class_title, printable
from biopsy.core.version import __version__
from biopsy.evaluation.predict import decode_patch
from biopsy.models.classifier import Classifier, Tta
from biopsy.models.engine import Engine
from biopsy.training.open_model import open_classifier
from biopsy.training.runs import Run

OPEN = frozenset({"/health"})
_OPEN_SLIDES = 8  # most recently used


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        image_bytes: Of one image.
        predict_bytes: Of a request with images.
        upload_bytes: Of a slide.
        waiting_patches: Patches that wait for a model, over all clients; fewer where they would wait longer
            than half of ``request_s``.
        waiting_jobs: Slides that wait.
        request_s: Seconds in which a request must have arrived, and in which patches must be predicted.
        upload_s: Seconds in which a slide must have arrived.
    """

    images: int = 512
    image_bytes: int = 2**24
    predict_bytes: int = 2**26
    upload_bytes: int = 2**36
    waiting_patches: int = 8192
    waiting_jobs: int = 100
    request_s: float = 60.0
    upload_s: float = 6 * 3600.0


class OutOfDistribution(BaseModel):
    """How far a patch is from training; multiples of the limits, above 1 is out-of-distribution."""

    score: float
    colour_distance: float
    feature_distance: float | None = Field(description="Null with another --tta than the classifier's own")
    out_of_distribution: bool


class PatchPrediction(BaseModel):
    """Prediction of a model for one image."""

    name: str
    pred: str
    prob: float | None = Field(
        description="Probability of the positive class; null for more than two classes"
    )
    probs: dict[str, float]
    prediction_set: list[str] | None = Field(description="Conformal set; null where the model has none")
    abstained: bool | None
    ood: OutOfDistribution | None


class Predictions(BaseModel):
    """The answer of ``POST /predict``."""

    model: str
    version: str
    classifier_sha256: str
    predictions: list[PatchPrediction]
    skipped: list[dict[str, str]]


class SlideByPath(BaseModel):
    """A slide that the server can read itself."""

    path: str = Field(min_length=1, max_length=4096, description="Relative to the server's --root")
    model: str | None = Field(None, max_length=200)
    mpp: float | None = Field(
        None, gt=0, le=100, description="Micrometres per pixel, for slides that do not say"
    )


class ModelDescription(TypedDict):
    """A model; ``threshold`` is that of single patches, the other one of slides."""

    name: str
    classifier_sha256: str
    network: str
    class_names: list[str]
    class_titles: list[str]
    positive_class: str | None
    threshold: float | None
    threshold_with_neighbours: float | None
    patch_px: int
    mpp: float | None
    licence: str


class Health(TypedDict):
    """The answer of ``GET /health``: version of biopsy, and slide jobs by status."""

    status: str
    version: str
    jobs: dict[str, int]


class Tiles(TypedDict):
    """Size of a slide and of its tiles, and the number of levels."""

    width: int
    height: int
    mpp: float | None
    tile_px: int
    levels: int


def make_service(
    models: Run | Classifier | Path | str | Sequence[Run | Classifier | Path | str],
    *,
    out: Path | str,
    root: Path | str | None = None,
    token: str | None = None,
    device: str = "auto",
    tta: Tta | None = None,
    hosts: frozenset[str] | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """Return the service as an ASGI application.

    Args:
        models: Runs, classifiers or bundles; each is named as its folder.
        hosts: Names under which the server is reached; None for any.
    """
    classifiers = name_models(models, tta)
    limits = limits or Limits()
    service = _Service(classifiers, Path(out), root, device, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="biopsy",
        version=__version__,
        description="Predictions of breast-histopathology patches and slides. Research use only.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    name_errors(app)
    app.add_exception_handler(Busy, _refuse_busy)
    app.add_exception_handler(PermissionError, _refuse_path)
    service.add_routes(app)

    def limit(path: str) -> tuple[int, float]:
        if path == "/predict":
            return limits.predict_bytes, limits.request_s
        return (limits.upload_bytes, limits.upload_s) if path == "/slides" else (2**16, limits.request_s)

    app.add_middleware(_Measured, metrics=service.metrics)
    app.add_middleware(Guard, token=token, hosts=hosts, open_paths=OPEN, limit=limit)
    app.state.service = service
    return app


def name_models(
    models: Sequence[Run | Classifier | Path | str] | Run | Classifier | Path | str, tta: Tta | None
) -> dict[str, Classifier]:
    """Open every model; those of one name get a number."""
    several = [models] if isinstance(models, Run | Classifier | Path | str) else list(models)
    if not several:
        raise DataError("no model was named: give a run, classifier or bundle")
    classifiers: dict[str, Classifier] = {}
    for model in several:
        classifier = open_classifier(model, tta=tta)
        path = model.path if isinstance(model, Run | Classifier) else Path(model)
        name = "model" if path is None else path.resolve().name
        taken = sum(other == name or other.startswith(f"{name}-") for other in classifiers)
        classifiers[f"{name}-{taken + 1}" if taken else name] = classifier
    return classifiers


def pick_model(classifiers: Mapping[str, Classifier], name: str | None) -> str:
    """Return the name of a model; without a name, the only one.

    Raises:
        DataError: If there is no such model, or there are several and none is named.
    """
    if name is None and len(classifiers) == 1:
        return next(iter(classifiers))
    if name is None or name not in classifiers:
        names = ", ".join(classifiers)
        raise DataError(f"name a model; there are: {names}" if name is None else f"known: {names}")
    return name


def describe_models(classifiers: Mapping[str, Classifier]) -> list[ModelDescription]:
    return [
        {
            "name": name,
            "classifier_sha256": classifier.sha256,
            "network": classifier.info.network,
            "class_names": classifier.info.class_names,
            "class_titles": [class_title(name) for name in classifier.info.class_names],
            "positive_class": classifier.info.positive_class,
            "threshold": classifier.single_patch().threshold,
            "threshold_with_neighbours": classifier.threshold if classifier.info.context else None,
            "patch_px": classifier.info.patch_px,
            "mpp": classifier.info.mpp,
            "licence": classifier.info.licence,
        }
        for name, classifier in classifiers.items()
    ]


async def _refuse_busy(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Busy)
    return answer(429, str(error), **{"retry-after": str(error.retry_after_s)})


async def _refuse_path(request: Request, error: Exception) -> JSONResponse:
    return answer(403, str(error) if not getattr(error, "filename", None) else "the file may not be read")


class _Metrics:
    """What ``/metrics`` counts."""

    def __init__(self, service: "_Service") -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("biopsy_requests", "Requests", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "biopsy_request_seconds", "Seconds a request took", ["path"], registry=registry
        )
        self.patches = Counter("biopsy_patches", "Patches predicted", ["model"], registry=registry)
        self.batches = Histogram(
            "biopsy_batch_patches", "Patches in a batch", registry=registry, buckets=[2**n for n in range(10)]
        )
        waiting = Gauge("biopsy_waiting_patches", "Patches that wait", registry=registry)
        waiting.set_function(lambda: sum(batcher.waiting for batcher in service.batchers.values()))
        jobs = Gauge("biopsy_jobs", "Slide jobs", ["status"], registry=registry)
        for status in ("queued", "running", "done", "failed"):
            jobs.labels(status).set_function(partial(service.count_jobs, status))


class _Measured:
    """Counts requests and their seconds."""

    def __init__(self, app: ASGIApp, metrics: _Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and count it by its route and status."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def send_on(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        finally:
            path = getattr(scope.get("route"), "path", "unknown")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)


class _Service:
    """The addresses, and what they need."""

    def __init__(
        self,
        classifiers: dict[str, Classifier],
        out: Path,
        root: Path | str | None,
        device: str,
        limits: Limits,
    ) -> None:
        self.classifiers, self.limits = classifiers, limits
        self._out, self._root, self._device = out, None if root is None else Path(root), device
        if self._root is not None and not self._root.is_dir():
            raise DataError(f"--root {root} is no folder")
        self.batchers: dict[str, Batcher] = {}
        self._open_picture = lru_cache(maxsize=_OPEN_SLIDES)(open_picture)
        self.metrics = _Metrics(self)

    def start(self) -> None:
        """Start the threads."""
        self.jobs = Jobs(
            self._out,
            self.classifiers,
            root=self._root,
            device=self._device,
            max_waiting=self.limits.waiting_jobs,
        )
        engine = Engine(self._device)
        for name, classifier in self.classifiers.items():
            self.batchers[name] = Batcher(
                classifier,
                engine=engine,
                max_waiting=self.limits.waiting_patches,
                max_wait_s=self.limits.request_s / 2,
                on_batch=partial(self._count_batch, name),
            )

    def close(self) -> None:
        """End the threads."""
        for batcher in self.batchers.values():
            batcher.close()
        self.jobs.close()
        self._open_picture.cache_clear()

    def count_jobs(self, status: str) -> int:
        """Return the number of slide jobs by status."""
        return self.jobs.count()[status]

    def _count_batch(self, model: str, n: int) -> None:
        self.metrics.patches.labels(model).inc(n)
        self.metrics.batches.observe(n)

    def add_routes(self, app: FastAPI) -> None:
        app.get("/health", summary="Whether the server answers")(self.health)
        app.get("/metrics", summary="Counters in Prometheus' text format")(self.give_metrics)
        app.get("/models", summary="The models that predict")(self.models)
        app.post("/predict", summary="Predict images", response_model=Predictions)(self.predict)
        app.post(
            "/slides",
            summary="Map a slide, named by path (JSON) or uploaded (the file as body, ?name=case.svs)",
            status_code=202,
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {"schema": SlideByPath.model_json_schema()},
                        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                    },
                }
            },
        )(self.add_slide)
        app.get("/slides", summary="All slide jobs")(self.list_slides)
        app.get("/slides/{identity}", summary="Status and progress of a slide job")(self.slide)
        app.delete("/slides/{identity}", summary="Remove a slide job and its files")(self.remove_slide)
        app.get("/slides/{identity}/tiles", summary="Size and levels of a slide's tiles")(self.tiles)
        tile = "/slides/{identity}/tiles/{level}/{column}_{row}.jpg"
        app.get(tile, summary="A tile of a slide, JPEG; level 0 is full resolution")(self.tile)
        app.get("/slides/{identity}/{file}", summary=f"A result: {', '.join(RESULTS)}")(self.result)

    # --- what there is
    async def health(self) -> Health:
        """Say that the server answers."""
        return {"status": "ok", "version": __version__, "jobs": self.jobs.count()}

    def give_metrics(self) -> Response:
        """Return the counters."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def models(self) -> list[ModelDescription]:
        """Describe the models; ``threshold`` is that of ``/predict``, the other one of slides."""
        return describe_models(self.classifiers)

    def _pick(self, model: str | None) -> str:
        try:
            return pick_model(self.classifiers, model)
        except DataError as error:
            raise HTTPException(404, str(error)) from None

    # --- patches
    async def predict(
        self,
        images: Annotated[list[UploadFile], File(description="PNG, JPEG, TIFF, BMP or WebP; one or many")],
        model: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Predictions:
        """Predict images, as ``biopsy predict`` does: those that cannot be read are named in ``skipped``."""
        name = self._pick(model)
        if len(images) > self.limits.images:
            raise HTTPException(413, f"{len(images):,} images; at most {self.limits.images:,} in a request")
        batcher = self.batchers[name]
        batcher.reserve(len(images))
        reserved = len(images)
        try:
            contents = [(printable(file.filename or "image"), await file.read()) for file in images]
            names, decoded, skipped = await run_in_threadpool(self._decode, contents, batcher.classifier)
            batcher.release(reserved - len(decoded))
            reserved = len(decoded)
            if not decoded:
                raise HTTPException(
                    422, f"no image could be read; {skipped[0]['source']}: {skipped[0]['reason']}"
                )
            future = batcher.submit(names, decoded)
            reserved = 0
        finally:
            batcher.release(reserved)
        try:
            frame = await asyncio.wait_for(asyncio.wrap_future(future), self.limits.request_s)
        except TimeoutError:
            raise HTTPException(503, f"not predicted within {self.limits.request_s:g} s") from None
        return self._compose(name, batcher.classifier, frame, skipped)

    def _decode(
        self, contents: list[tuple[str, bytes]], classifier: Classifier
    ) -> tuple[list[str], list[np.ndarray], list[dict[str, str]]]:
        names, decoded, skipped = [], [], []
        for name, data in contents:
            try:
                if len(data) > self.limits.image_bytes:
                    raise DataError(f"has {len(data):,} bytes; at most {self.limits.image_bytes:,} are read")
                decoded.append(decode_patch(data, classifier.info.patch_px))
                names.append(name)
            except DataError as error:
                skipped.append({"source": name, "reason": str(error)})
        return names, decoded, skipped

    def _compose(
        self, name: str, classifier: Classifier, frame: pd.DataFrame, skipped: list[dict[str, str]]
    ) -> Predictions:
        single = classifier.single_patch()
        info = single.info
        probs = frame[[f"prob_{label}" for label in info.class_names]].to_numpy(float)
        sets = single.prediction_sets(probs)
        predictions = []
        for index, row in enumerate(frame.to_dict("records")):
            predictions.append(
                PatchPrediction(
                    name=row["patch_id"],
                    pred=info.class_names[int(row["pred"])],
                    prob=_number(row.get("prob")),
                    probs=dict(zip(info.class_names, map(float, probs[index]), strict=True)),
                    prediction_set=None if sets is None else sets[index],
                    abstained=None if pd.isna(row.get("abstained")) else bool(row["abstained"]),
                    ood=_describe_ood(row),
                )
            )
        return Predictions(
            model=name,
            version=__version__,
            classifier_sha256=classifier.sha256,
            predictions=predictions,
            skipped=skipped,
        )

    # --- slides
    async def add_slide(
        self,
        request: Request,
        model: Annotated[str | None, Query(max_length=200)] = None,
        name: Annotated[str | None, Query(max_length=200)] = None,
        mpp: Annotated[float | None, Query(gt=0, le=100)] = None,
    ) -> JobStatus:
        """Queue a slide."""
        if request.headers.get("content-type", "").partition(";")[0] == "application/json":
            return await self._add_by_path(request)
        if name is None:
            raise HTTPException(422, "name the upload with ?name=case.svs, or send JSON with a path")
        identity, place = self.jobs.create(self._pick(model), printable(name), mpp)
        try:
            await _receive(request, place)
        except BaseException:
            self.jobs.drop(identity)
            raise
        self.jobs.start(identity, place)
        return self.jobs.get(identity)

    async def _add_by_path(self, request: Request) -> JobStatus:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > 2**16:
                raise HTTPException(413, "the JSON is larger than 65,536 bytes")
        try:
            requested = SlideByPath.model_validate(parse_json(body, "request"))
        except ValidationError as error:
            first = error.errors()[0]
            raise HTTPException(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        path = self.jobs.find(requested.path)
        return self.jobs.add(self._pick(requested.model), path, requested.mpp)

    def list_slides(self) -> list[JobStatus]:
        """List all slide jobs, oldest first."""
        return self.jobs.list()

    def slide(self, identity: str) -> JobStatus:
        """Return status and progress of a slide."""
        try:
            return self.jobs.get(identity)
        except KeyError:
            raise HTTPException(404, "there is no such job") from None

    def remove_slide(self, identity: str) -> dict[str, str]:
        """Remove a job."""
        self.slide(identity)
        self.jobs.drop(identity)
        return {"removed": identity}

    def _picture(self, identity: str) -> SlidePicture:
        try:
            return self._open_picture(*self.jobs.slide_file(identity))
        except KeyError:
            raise HTTPException(404, "there is no such job, or its upload is no longer kept") from None

    def tiles(self, identity: str) -> Tiles:
        """Describe a slide's tiles; each level has half the pixels a side of the one before."""
        picture = self._picture(identity)
        return {
            "width": picture.width,
            "height": picture.height,
            "mpp": picture.mpp,
            "tile_px": TILE_PX,
            "levels": count_levels(picture),
        }

    def tile(self, identity: str, level: int, column: int, row: int) -> Response:
        """Return a tile."""
        pixels = read_tile(self._picture(identity), level, column, row)
        return Response(encode_jpeg(pixels), media_type="image/jpeg")

    def result(self, identity: str, file: str) -> FileResponse:
        """Return a file of a finished job."""
        try:
            return FileResponse(self.jobs.result(identity, file), media_type=RESULTS[file], filename=file)
        except KeyError:
            raise HTTPException(
                404, f"there is no such result; a finished job has {', '.join(RESULTS)}"
            ) from None


async def _receive(request: Request, path: Path) -> None:
    """Write an upload as it comes."""
    size = 0
    try:
        with open(path, "wb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                await run_in_threadpool(file.write, chunk)
    except ClientDisconnect:
        raise HTTPException(400, "the upload was cut off") from None
    expected_size = request.headers.get("content-length", "")
    if not size or (expected_size.isdecimal() and int(expected_size) != size):
        raise HTTPException(400, f"the upload was cut off after {size:,} bytes")


def _describe_ood(row: Mapping[str, float]) -> OutOfDistribution | None:
    colour, feature = _number(row.get("colour_distance")), _number(row.get("feature_distance"))
    if colour is None:
        return None
    return OutOfDistribution(
        score=colour if feature is None else max(colour, feature),
        colour_distance=colour,
        feature_distance=feature,
        out_of_distribution=bool(row["out_of_distribution"]),
    )


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
