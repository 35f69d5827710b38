"""Mapping of slides and packs by a classifier."""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from typing_extensions import TypedDict

from biopsy.core.errors import DataError, SlideError
from biopsy.core.text import printable
from biopsy.core.version import __version__
from biopsy.models.classifier import Classifier, Tta
from biopsy.models.hardware import Precision, pick_device, pick_precision
from biopsy.models.hub import is_on_hub
from biopsy.models.runtimes import list_runtimes
from biopsy.slides.grids import Block, BlockRange, PatchGrid, cut_blocks, cut_strips
from biopsy.slides.inference import (
    Cut,
    OnProgress,
    SlideLogits,
    StripLogits,
    View,
    join_strips,
    open_view,
    predict_slides,
)
from biopsy.slides.maps import SlideMap, check_probs
from biopsy.slides.outputs import MappedSlide, OutOfDistributionShare, list_files
from biopsy.slides.sources import Source, stitch_slide
from biopsy.training.open_model import open_classifier
from biopsy.training.runs import Run


def make_map(
    name: str,
    grid: PatchGrid,
    logits: np.ndarray,
    classifier: Classifier,
    *,
    about: Mapping[str, object],
    picture: np.ndarray | None = None,
    ood: np.ndarray | None = None,
) -> SlideMap:
    """Return the map of a slide's logits."""
    coordinates = pd.DataFrame({"x": grid.x_px, "y": grid.y_px, "slide_id": name, "patient_id": name})
    info, probs = classifier.info, classifier.probs(classifier.add_context(logits, coordinates))
    checked, abstained = check_probs(probs, name), classifier.abstains(probs)
    return SlideMap(
        name,
        grid,
        checked,
        np.zeros(len(probs), bool) if abstained is None else abstained,
        info.class_names,
        info.positive_class,
        None if info.positive_class is None else (classifier.threshold or 0.5),
        dict(about),
        picture,
        ood,
    )


class _MapMetadata(TypedDict):
    classifier: dict[str, object]
    precision: str
    device: str
    versions: dict[str, str]


def _describe_model(classifier: Classifier, precision: str, device: str) -> _MapMetadata:
    """Return classifier, device, precision and versions of a map."""
    info = classifier.info
    return {
        "classifier": {
            "sha256": classifier.sha256,
            "source": classifier.source,
            "weights_sha256": info.weights_sha256,
            "network": info.network,
            "recipe": info.recipe,
            "mpp": info.mpp,
            "patch_px": info.patch_px,
            "tta": info.tta,
            "calibrator": info.calibrator.get("method", "none"),
            "threshold": info.thresholds[0] if info.thresholds else None,
            "licence": info.licence,
        },
        "precision": precision,
        "device": device,
        "versions": {
            "biopsy": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def repeat_command(source: Path, model: object, settings: Mapping[str, object]) -> str:
    """Return the command that maps a slide again, without folders."""
    if isinstance(model, Classifier):
        model_name = "CLASSIFIER"
    else:
        model_name = str(model) if is_on_hub(model) else Path(str(getattr(model, "path", model))).name
    words = ["biopsy", "slide", model_name, printable(source.name), "--out", "DIR"]
    for flag, value in settings.items():
        if value is True:
            words.append(f"--{flag}")
        elif value not in (None, False):
            words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    return " ".join(words)


class Mapped(NamedTuple):
    """A slide with its map, or the error."""

    source: Source
    result: MappedSlide | DataError


class Mapper:
    """A classifier with settings; the parameters are those of `biopsy.slide`.

    ``meanwhile`` is called once, after the first predicted patches; ``n_threads`` is the number of reading
    and predicting threads (default: number of cores).
    """

    def __init__(
        self,
        model: Run | Classifier | Path | str,
        mpp: float | None,
        stride_um: float | None,
        detections: bool,
        precision: Precision,
        device: str,
        tta: Tta | None,
        trust_model: str | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.classifier = open_classifier(model, trust_model=trust_model, tta=tta)
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self.stride_um = stride_um
        self.tta = tta
        self.detections = detections
        self.is_calibrated = self.classifier.info.calibrator.get("method", "none") != "none"
        self.meanwhile: Callable[[], object] | None = None
        self.n_threads: int | None = None
        self._model = self.classifier.source or model
        self._mpp, self._on_progress = mpp, on_progress
        self._requests: dict[str, dict[str, object]] = {}
        self._versions: dict[str, tuple[int, int] | None] = {}
        self._kind = self.device.partition(":")[0]
        self._metadata = _describe_model(self.classifier, self.precision, self._kind)

    def request(self, source: Source) -> dict[str, object]:
        """Return the request that defines the outputs of a slide, cached since the slide is hashed."""
        self._versions.setdefault(source.name, source.version())
        if source.name not in self._requests:
            self._requests[source.name] = self._describe_request(source)
        return self._requests[source.name]

    def _describe_request(self, source: Source) -> dict[str, object]:
        return {
            "slide": source.fingerprint(),
            "mpp": source.mpp,
            "stride_um": self.stride_um,
            "detections": self.detections,
            "outputs": list_files(),
            "classifier": self._metadata["classifier"]["sha256"],
            "precision": self.precision,
            "device": self._kind,
            "runtimes": list_runtimes(),
            "biopsy": self._metadata["versions"]["biopsy"],
        }

    def map(self, sources: Iterable[Source]) -> Iterator[Mapped]:
        """Yield the map of each slide, in order; slide files are read ahead."""
        for are_stitched, group in groupby(sources, lambda source: source.pack is not None):
            if are_stitched:
                yield from map(self._map_stitched, group)
            else:
                yield from self._map_files(group)

    def map_or_divide(self, source: Source, max_patches: int) -> Mapped | list[BlockRange]:
        """Return the map of a slide, or the strips of a slide file with more than ``max_patches`` patches."""
        if source.pack is not None or source.url is not None:
            return next(self.map([source]))

        def cut(grid: PatchGrid, downsample: float) -> Iterable[Block]:
            return cut_blocks(grid, downsample) if len(grid) <= max_patches else ()

        slide = next(self._predict(iter([source]), cut))
        if slide.view is None or len(slide.view.grid) <= max_patches:
            return self._map_logits(slide)
        return cut_strips(slide.view.grid, slide.view.downsample, max_patches)

    def predict_strip(
        self, source: Source, version: tuple[int, int] | None, blocks: BlockRange
    ) -> StripLogits:
        """Return the logits of a strip of a slide.

        Raises:
            DataError: If the strip cannot be read, or the slide is not of this version.
        """
        self._versions[source.name] = version

        def cut(grid: PatchGrid, downsample: float) -> Iterable[Block]:
            return islice(cut_blocks(grid, downsample), *blocks)

        slide = next(self._predict(iter([source]), cut))
        view, _ = self._require_logits(slide)
        return slide.to_strip(cut(view.grid, view.downsample))

    def join(self, source: Source, version: tuple[int, int] | None, strips: Sequence[StripLogits]) -> Mapped:
        """Return the map of a slide from the logits of its strips."""
        self._versions[source.name] = version
        try:
            slide = join_strips(source, open_view(source, self.classifier, self.stride_um), strips)
        except DataError as error:
            return Mapped(source, error)
        return self._map_logits(slide)

    def _map_files(self, sources: Iterator[Source]) -> Iterator[Mapped]:
        return map(self._map_logits, self._predict(sources, cut_blocks))

    def _predict(self, sources: Iterator[Source], cut: Cut) -> Iterator[SlideLogits]:
        return predict_slides(
            self._note_versions(sources),
            self.classifier,
            device=self.device,
            precision=self.precision,
            stride_um=self.stride_um,
            n_threads=self.n_threads,
            on_progress=self.report,
            cut=cut,
        )

    def _map_logits(self, slide: SlideLogits) -> Mapped:
        try:
            view, logits = self._require_logits(slide)
            slide_map = self._make_map(slide, view, logits)
        except DataError as error:
            return Mapped(slide.source, error)
        return Mapped(slide.source, MappedSlide(slide_map, view.tissue, detections=self.detections))

    def _require_logits(self, slide: SlideLogits) -> tuple[View, np.ndarray]:
        if slide.error is not None or slide.view is None or slide.logits is None:
            raise slide.error or SlideError(f"{slide.source.path} was not mapped")
        self._require_unchanged(slide.source)
        return slide.view, slide.logits

    def _note_versions(self, sources: Iterator[Source]) -> Iterator[Source]:
        for source in sources:
            self._versions.setdefault(source.name, source.version())
            yield source

    def _require_unchanged(self, source: Source) -> None:
        version = source.version()
        if version is not None and version != self._versions[source.name]:
            raise SlideError(f"{source.path} was changed while it was mapped: map it again", "altered")

    def report(self, done: int, total: int) -> None:
        """Report the number of patches of a slide that are done."""
        if self.meanwhile is not None:
            self.meanwhile()
            self.meanwhile = None
        if self._on_progress is not None:
            self._on_progress(done, total)

    def _make_map(self, slide: SlideLogits, view: View, logits: np.ndarray) -> SlideMap:
        resolution = {
            "slide": view.slide.mpp,
            "source": view.slide.mpp_source,
            "classifier": self.classifier.info.mpp,
            "level": view.level,
            "downsample": view.downsample,
            "objective": view.slide.objective,
        }
        about = self._describe(slide.source, resolution, slide.software)
        reference, ood = self.classifier.info.out_of_distribution, None
        about["out_of_distribution"] = None
        if reference is not None and len(slide.is_ood):
            share, quantile = float(slide.is_ood.mean()), reference["quantile"]
            about["out_of_distribution"] = OutOfDistributionShare(
                n_checked=len(slide.is_ood), share=share, quantile=quantile
            )
            ood = np.full(len(view.checked), np.nan, np.float32)
            ood[view.checked] = slide.is_ood
        name, picture = slide.source.name, view.thumbnail
        return make_map(name, view.grid, logits, self.classifier, about=about, picture=picture, ood=ood)

    def _map_stitched(self, source: Source) -> Mapped:
        from biopsy.models.engine import Engine
        from biopsy.models.inference import predict_classifier

        pack, index, info = source.pack, source.index, self.classifier.info
        assert pack is not None and index is not None
        if self.stride_um is not None:
            raise DataError(f"{source.path} is a pack of patches: --stride-um is for whole slides")
        try:
            self.classifier.check_pack(pack)
            grid, picture = stitch_slide(pack, source.name, index, mpp=source.mpp)
            engine = Engine(self.device, self.precision)
            logits = predict_classifier(self.classifier, pack.patches, pack.sizes, index, engine=engine)
            pack.require_unchanged()
            resolution = {
                "slide": grid.slide_mpp,
                "source": "pack" if pack.info.mpp else "stated",
                "classifier": info.mpp,
            }
            about = self._describe(source, resolution, ("torch", version("torch")))
            slide_map = make_map(source.name, grid, logits, self.classifier, about=about, picture=picture)
        except DataError as error:
            return Mapped(source, error)
        target = pack.target[index] if pack.class_names == info.class_names else None
        return Mapped(source, MappedSlide(slide_map, target=target, detections=self.detections))

    def _describe(
        self, source: Source, resolution: Mapping[str, object], software: tuple[str, str]
    ) -> dict[str, object]:
        settings = {
            "mpp": source.mpp,
            "stride-um": self.stride_um,
            "detections": self.detections,
            "precision": self.precision,
            "tta": self.tta,
        }
        return {
            "source": printable(source.path.name),
            "mpp": resolution,
            **self._metadata,
            "versions": dict([*self._metadata["versions"].items(), software]),
            "command": repeat_command(source.path, self._model, settings),
        }
