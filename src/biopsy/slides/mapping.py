"""One classifier and its settings, asked about slides of any origin: files and packs alike."""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biopsy.core.errors import DataError
from biopsy.core.text import printable
from biopsy.learning.classifiers import Classifier
from biopsy.learning.hardware import Precision, pick_device, pick_precision
from biopsy.learning.opening import open_classifier
from biopsy.learning.runs import Run
from biopsy.learning.runtimes import list_runtimes
from biopsy.slides.answers import describe_model, is_calibrated, make_map, repeat_command
from biopsy.slides.inference import Answer, OnProgress, SlideTask, predict_slides
from biopsy.slides.maps import SlideMap
from biopsy.slides.sources import Source
from biopsy.slides.stitching import predict_stitched, stitch_slide


class Mapped(NamedTuple):
    """A slide's map, or the reason why there is none.

    ``tissue`` is the mask on the map's picture where tissue was sought, ``target`` the annotated class of
    each patch where it is known.
    """

    source: Source
    slide_map: SlideMap | None = None
    tissue: np.ndarray | None = None
    target: np.ndarray | None = None
    error: DataError | None = None


class Mapper:
    """A classifier ready to be asked; the parameters are those of `biopsy.slide`.

    ``meanwhile`` is called once, when the first patches of a file have been asked about.
    """

    def __init__(
        self,
        model: Run | Classifier | Path | str,
        mpp: float | None,
        stride_um: float | None,
        detections: bool,
        precision: Precision,
        device: str,
        trust_model: str | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.classifier = open_classifier(model, trust_model=trust_model)
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self.stride_um = stride_um
        self.detections = detections
        self.is_calibrated = is_calibrated(self.classifier)
        self.meanwhile: Callable[[], object] | None = None
        self._model, self._mpp, self._on_progress = model, mpp, on_progress
        self._kind = self.device.partition(":")[0]
        self._about = describe_model(self.classifier, self.precision, self._kind)

    def question(self, source: Source) -> dict[str, Any]:
        """Give everything that defines a slide's outputs."""
        return {
            "slide": source.fingerprint(),
            "mpp": source.mpp,
            "stride_um": self.stride_um,
            "detections": self.detections,
            "classifier": self._about["classifier"]["sha256"],
            "precision": self.precision,
            "device": self._kind,
            "runtimes": list_runtimes(),
            "biopsy": self._about["versions"]["biopsy"],
        }

    def map(self, sources: Sequence[Source]) -> Iterator[Mapped]:
        """Map slides in their order; those that are files are read ahead."""
        for are_stitched, group in groupby(sources, lambda source: source.pack is not None):
            alike = list(group)
            yield from (map(self._map_stitched, alike) if are_stitched else self._map_files(alike))

    def _map_files(self, sources: list[Source]) -> Iterator[Mapped]:
        answers = predict_slides(
            (SlideTask(source.path, source.mpp) for source in sources),
            self.classifier,
            device=self.device,
            precision=self.precision,
            stride_um=self.stride_um,
            on_progress=self._report,
        )
        for source, answer in zip(sources, answers, strict=True):
            if answer.error is not None or answer.view is None:
                yield Mapped(source, error=answer.error)
                continue
            try:
                yield Mapped(source, self._make_map(source, answer), answer.view.tissue)
            except DataError as error:
                yield Mapped(source, error=error)

    def _report(self, done: int, total: int) -> None:
        if self.meanwhile is not None:
            self.meanwhile()
            self.meanwhile = None
        if self._on_progress is not None:
            self._on_progress(done, total)

    def _make_map(self, source: Source, answer: Answer) -> SlideMap:
        assert answer.view is not None and answer.logits is not None
        view = answer.view
        place = {
            "slide": view.slide.mpp,
            "source": view.slide.mpp_source,
            "classifier": self.classifier.info.mpp,
            "level": view.level,
            "downsample": view.downsample,
            "objective": view.slide.objective,
        }
        return make_map(
            source.name,
            view.grid,
            answer.logits,
            self.classifier,
            about=self._describe(source, place, answer.software) | _describe_novelty(answer.unlike),
            picture=view.thumbnail,
        )

    def _map_stitched(self, source: Source) -> Mapped:
        from biopsy.learning.engine import Engine

        assert source.pack is not None and source.index is not None
        if self.stride_um is not None:
            raise DataError(f"{source.path} holds patches as they were cut: --stride-um is for whole slides")
        try:
            self.classifier.check_pack(source.pack)
            stitched = stitch_slide(source.pack, source.name, source.index, mpp=source.mpp)
            engine = Engine(self.device, self.precision)
            logits = predict_stitched(source.pack, source.index, self.classifier, engine=engine)
            place = {
                "slide": stitched.grid.slide_mpp,
                "source": "pack" if source.pack.info.mpp else "stated",
                "classifier": self.classifier.info.mpp,
            }
            slide_map = make_map(
                source.name,
                stitched.grid,
                logits,
                self.classifier,
                about=self._describe(source, place, ("torch", version("torch"))),
                picture=stitched.picture,
            )
        except DataError as error:
            return Mapped(source, error=error)
        same = source.pack.class_names == self.classifier.info.class_names
        return Mapped(source, slide_map, target=stitched.target if same else None)

    def _describe(self, source: Source, place: dict[str, Any], software: tuple[str, str]) -> dict[str, Any]:
        settings = {
            "mpp": source.mpp,
            "stride-um": self.stride_um,
            "detections": self.detections,
            "precision": self.precision,
        }
        return {
            "source": printable(source.path.name),
            "mpp": place,
            **self._about,
            "versions": dict([*self._about["versions"].items(), software]),
            "command": repeat_command(source.path, self._model, settings),
        }


def _describe_novelty(unlike: np.ndarray) -> dict[str, Any]:
    """Say how much of a slide is unlike training; nothing where the classifier cannot tell."""
    if not len(unlike):
        return {"unlike_training": None}
    return {"unlike_training": {"n_checked": len(unlike), "share": float(unlike.mean())}}
