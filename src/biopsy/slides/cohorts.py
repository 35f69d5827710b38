"""Mapping of many slides, resumable and distributed over processes.

Each slide has a folder, written under a temporary name and renamed when complete; in an existing folder only
files of an earlier map are replaced. ``summary.json``, written last, contains the request (slide, classifier,
settings); a slide with the same request is not mapped again. ``status.csv`` lists the status of every slide.

With ``shard``, several processes share one folder: each maps slides that are neither finished nor claimed by
another process, starting with its share of the list. With the engine ``ray``, the processes of a cluster map
one claimed slide each at a time, or a strip of a slide with many patches, and this process writes
``status.csv``.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Required

import pandas as pd
from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from biopsy.core.claims import Claims, first_of_shard, share_work
from biopsy.core.errors import DataError, SlideError, UserFileError
from biopsy.core.files import (
    LOCK,
    check_outputs,
    hold_outputs,
    read_json,
    refuse_inputs,
    remove_abandoned,
    update_directory,
    write_json,
)
from biopsy.core.ray_engine import Engine, TaskLost, check_engine, run_tasks
from biopsy.core.results import SKIPPED, Output, Table, name_skipped, number
from biopsy.core.storage import parse_url, uploaded
from biopsy.core.tables import write_csv
from biopsy.core.text import printable
from biopsy.data.packs import Pack
from biopsy.models.classifier import Classifier, Tta
from biopsy.models.hardware import Precision
from biopsy.models.out_of_distribution import OOD_ADVICE
from biopsy.slides.grids import BlockRange
from biopsy.slides.inference import OnProgress, StripLogits
from biopsy.slides.mapping import Mapped, Mapper
from biopsy.slides.maps import SlideMap
from biopsy.slides.outputs import (
    MAP,
    SUMMARY,
    UNRELIABLE,
    SlideSummary,
    list_files,
    prepare_to_draw,
    read_finished,
    warn_of_areas,
    write_outputs,
)
from biopsy.slides.sources import Source, list_sources, refuse_own_data
from biopsy.slides.tasks import MAX_PATCHES_PER_TASK, SlideTask, TaskQueue
from biopsy.training.runs import Run

STATUS = "status.csv"
_FAILED = ".failed.json"
_LOCK_S = 10.0
_OTHER_REQUEST = "slide or versions differ on a node of the cluster"

Status = Literal["waiting", "done", "failed"]


class Row(TypedDict, total=False):
    """A row of ``status.csv``."""

    slide: Required[str]
    source: Required[str]
    status: Required[Status]
    reason: Required[str]
    n_patches: int
    mpp: float | str | None
    mpp_source: float | str | None
    positive_mm2: float | None
    out_of_distribution: float | None
    out_of_distribution_quantile: float | None


Record = Callable[[Row], None]

COLUMNS = (
    *("slide", "source", "status", "reason", "n_patches", "mpp", "mpp_source", "positive_mm2"),
    *("out_of_distribution", "out_of_distribution_quantile"),
)


@dataclass(frozen=True)
class SlideCohort(Output):
    """Result of mapping several slides.

    Attributes:
        out: Output folder, with one folder per slide and ``status.csv``.
        status: One row per slide: ``slide, source, status`` (``done`` or ``failed``), ``reason``,
            ``n_patches``, ``mpp``, ``mpp_source``, ``positive_mm2``, ``out_of_distribution`` (fraction of the
            checked patches) and ``out_of_distribution_quantile`` (validation quantile of the limit).
        address: The ``s3://`` address to which the folder was uploaded; empty for none.
    """

    out: Path
    status: pd.DataFrame
    address: str = ""

    @property
    def _done(self) -> pd.DataFrame:
        return self.status[self.status["status"] == "done"]

    def _warnings(self) -> dict[str, str]:
        """Return why areas are not to be relied on, by slide."""
        warnings = {
            row.slide: warn_of_areas(row.out_of_distribution, row.out_of_distribution_quantile)
            for row in self._done.itertuples()
        }
        return {slide: warning for slide, warning in warnings.items() if warning is not None}

    def blocks(self) -> list[str | Table]:
        warnings = self._warnings()
        rows = [
            [
                row.slide,
                number(int(row.n_patches)),
                number(float(row.mpp)),
                row.mpp_source,
                number(row.positive_mm2) + (UNRELIABLE if row.slide in warnings else ""),
            ]
            for row in self._done.itertuples()
        ]
        columns = ["slide", "patches", "um/px", "from", "positive mm2"]
        return [Table(columns, rows), self.address or str(self.out)]

    def to_json(self) -> dict[str, object]:
        names = ["slide", "source", "n_patches", "mpp", "mpp_source", "positive_mm2", "out_of_distribution"]
        slides = self._done[names].to_dict("records")
        return {"out": self.address or self.out, "slides": slides, "skipped": self.failed}

    def problems(self) -> list[str]:
        lines = [f"{slide}: {warning}" for slide, warning in self._warnings().items()]
        if lines:
            place = f"`biopsy view {self.out}` hatches the patches (column ood of map.parquet)"
            if self.address:
                place = f"column ood of {self.address}/SLIDE/map.parquet marks the patches"
            lines.append(f"{place}: {OOD_ADVICE}")
        return [*lines, *name_skipped(self.failed, self.out / STATUS)]

    @property
    def exit_code(self) -> int:
        return SKIPPED if self.failed else 0

    @property
    def failed(self) -> list[dict[str, str]]:
        """Slides that could not be mapped: ``source`` and ``reason``."""
        failed = self.status[self.status["status"] == "failed"]
        return [{"source": row.source, "reason": row.reason} for row in failed.itertuples()]

    def __len__(self) -> int:
        return len(self.status)

    def __iter__(self) -> Iterator[SlideMap]:
        """Yield the maps, read one at a time."""
        for name in self.status.loc[self.status["status"] == "done", "slide"]:
            yield SlideMap.from_parquet(self.out / name / MAP)


def slide(
    model: Run | Classifier | Path | str,
    slides: Sequence[Path | str] | Path | str,
    *,
    out: Path | str | None = None,
    mpp: float | None = None,
    stride_um: float | None = None,
    detections: bool = False,
    precision: Precision = "auto",
    device: str = "auto",
    tta: Tta | None = None,
    trust_model: str | None = None,
    shard: str | None = None,
    engine: Engine = "local",
    address: str | None = None,
    on_progress: OnProgress | None = None,
) -> SlideMap | SlideCohort:
    """Map whole slides: probabilities over the tissue, and files that open in QuPath.

    Slides are read at the resolution of the classifier. Unreadable slides are reported and skipped; finished
    slides are not mapped again.

    Args:
        model: Finished run, classifier, bundle, folder of a WSInfer model, name of a shipped classifier, or
            ``hf:ORG/NAME[@REVISION]`` on the Hugging Face hub.
        slides: Slides, folders of slides, csv files with columns ``slide[,mpp]``, and packs with
            coordinates; also addresses (``s3://``, ``https://``) of slides, folders and packs.
        out: Output folder, or its ``s3://`` address: one subfolder per slide, plus ``status.csv``. Required
            for more than one slide.
        mpp: Pixel size at level 0 in µm. Required for slides that do not record it.
        stride_um: Stride of the grid in µm (default: the patch size); with overlap, cells have the mean.
        detections: Also write every cell as a QuPath detection with its probabilities.
        precision: Precision; ``auto`` is bf16 if the device supports it; ``int8`` needs a bundle written with
            ``export --int8``.
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        tta: Test-time augmentation: ``none``, or ``d4``, the mean over the eight symmetries of each patch at
            eight times the cost (default: that with which the classifier was calibrated).
        trust_model: SHA-256 of a WSInfer model's TorchScript, which is code and runs only if its hash is
            given.
        shard: ``I/N``: process I of N that share ``out``, on one or several machines. It starts with its
            share of the slides, continues with slides not finished or claimed by others, takes over those of
            processes that died, and ends when all slides are done.
        engine: ``ray`` maps the slides on a Ray cluster (extra ``ray``), one slide, or part of a large one,
            per core or GPU; all nodes must have slides and ``out`` under the same paths.
        address: Address of the Ray cluster, such as ``HOST:6379`` (default: ``RAY_ADDRESS``, else a local
            cluster, which is started if none is running).
        on_progress: Called with the numbers of patches done and in all of the current slide.

    Returns:
        The `SlideMap` of one slide, or the `SlideCohort` of several.

    Raises:
        RunError: If the model cannot be loaded or is not trusted, or there is no such cluster.
        MissingExtra: If the engine is ``ray`` and Ray is not installed.
        DataError: If a path does not exist or ``out`` is missing or in use.
        SlideError: If no slide could be mapped.
    """
    check_engine(engine, address, shard)
    mapper = Mapper(model, mpp, stride_um, detections, precision, device, tta, trust_model, on_progress)
    single = isinstance(slides, Path | str)
    sources = list_sources([Path(slides)] if isinstance(slides, Path | str) else [*map(Path, slides)], mpp)
    single = single and len(sources) == 1 and sources[0].pack is None
    first = None if shard is None else first_of_shard(shard, len(sources))
    if out is None:
        if not single or shard is not None or engine == "ray":
            raise DataError("several slides or processes need an output folder: pass out=DIR")
        result = next(mapper.map(sources)).result
        if isinstance(result, DataError):
            raise result
        return result.slide_map
    if parse_url(out) is not None and (shard is not None or engine == "ray"):
        raise DataError(f"{out} is no folder that several processes see: pass out=DIR, or use one process")
    lists = [
        path for path in ([slides] if isinstance(slides, Path | str) else slides) if Path(path).is_file()
    ]
    with uploaded(out) as folder:
        refuse_inputs(folder, model.path if isinstance(model, Run | Classifier) else model)
        refuse_inputs(folder / STATUS, *lists)
        refuse_own_data(folder, sources)
        check_outputs(folder, STATUS)
        folder.mkdir(parents=True, exist_ok=True)
        if engine == "ray":
            place = _locate(model.path if isinstance(model, Run) else model)
            kind = mapper.device.partition(":")[0]
            arguments = (mpp, stride_um, detections, mapper.precision, kind, tta, trust_model, None)
            map_unfinished = partial(_map_on_ray, folder, mapper, partial(Mapper, place, *arguments), address)
        else:
            map_unfinished = partial(_map_here, folder, mapper)
        cohort = _map_cohort(folder, sources, mapper, map_unfinished, first, may_share=engine == "ray")
    cohort = replace(cohort, address=parse_url(out) or "")
    failed = cohort.failed
    if failed and len(failed) == len(cohort):
        reason = failed[0]["reason"]
        raise SlideError(reason if len(cohort) == 1 else f"none of {len(cohort)} slides was mapped; {reason}")
    return SlideMap.from_parquet(folder / sources[0].name / MAP) if single else cohort


def _map_cohort(
    out: Path,
    sources: Sequence[Source],
    mapper: Mapper,
    map_unfinished: Callable[[Sequence[Source], Record], None],
    first: int | None,
    *,
    may_share: bool,
) -> SlideCohort:
    """Map slides into a folder: as its only command, or, from slide ``first`` on, as one of several."""
    try:
        if first is None:
            with FileLock(out / LOCK, timeout=0), Claims(out) as claims, hold_outputs(out, STATUS):
                if not may_share and claims.list_others():
                    raise DataError(f"{out} is in use by processes with --shard: pass --shard I/N as they do")
                return _map_into(out, sources, mapper, map_unfinished)
        with contextlib.suppress(NotImplementedError), FileLock(out / LOCK, timeout=_LOCK_S):
            pass  # no process without --shard is at work
        with Claims(out) as claims:
            return _map_shard(out, [*sources[first:], *sources[:first]], sources, mapper, claims)
    except Timeout:
        raise DataError(f"{out} is in use by another process") from None


def _map_into(
    out: Path,
    sources: Sequence[Source],
    mapper: Mapper,
    map_unfinished: Callable[[Sequence[Source], Record], None],
) -> SlideCohort:
    """Map unfinished slides; ``status.csv`` is written after every slide."""
    finished = {source.name: _find_row(out, source, mapper) for source in sources}
    rows = {source.name: finished[source.name] or _row(source, "waiting") for source in sources}

    def record(row: Row) -> None:
        rows[str(row["slide"])] = row
        _write_status(out, rows)

    map_unfinished([source for source in sources if finished[source.name] is None], record)
    return SlideCohort(out, _write_status(out, rows))


def _map_here(out: Path, mapper: Mapper, sources: Sequence[Source], record: Record) -> None:
    """Map slides in this process."""
    _map_all(mapper, sources, lambda mapped: record(_write(out, mapped, mapper)))


def _map_on_ray(
    out: Path,
    mapper: Mapper,
    open_mapper: Callable[[], Mapper],
    address: str | None,
    sources: Sequence[Source],
    record: Record,
) -> None:
    """Map slides on a Ray cluster, whose processes open the classifier once."""
    addresses = {source.name: source.address for source in sources}
    tasks = TaskQueue(
        SlideTask(
            replace(source, path=_locate(source.path), pack=None), mapper.request(source), source.version()
        )
        for source in sources
    )
    prepare = partial(_prepare_worker, _locate(out), open_mapper, MAX_PATCHES_PER_TASK)
    for task, result in run_tasks(prepare, tasks, address=address, device=mapper.device):
        if isinstance(result, TaskLost):
            result = _row(task.source, "failed", reason=str(result))
        row = tasks.add_result(task, result)
        if row is None:
            continue
        row["source"] = printable(addresses[task.source.name])
        record(row)
        if n_patches := row.get("n_patches"):
            mapper.report(n_patches, n_patches)


def _prepare_worker(
    out: Path, open_mapper: Callable[[], Mapper], max_patches: int, n_cores: int
) -> Callable[[SlideTask], Row | list[BlockRange] | StripLogits]:
    mapper = open_mapper()
    mapper.n_threads = n_cores

    def work(task: SlideTask) -> Row | list[BlockRange] | StripLogits:
        source = task.source
        if source.index is not None:
            source = replace(source, pack=Pack.open(source.path))
        if task.blocks is not None:
            return _predict_strip(task, task.blocks, mapper)
        with Claims(out) as claims, claims.wait_for(source.name):
            row = _find_row(out, source, mapper)
            if row is None and mapper.request(source) != task.request:
                return _row(source, "failed", reason=_OTHER_REQUEST)
            if row is not None:
                return row
            if task.strips:
                mapped: Mapped | list[BlockRange] = mapper.join(source, task.version, task.strips)
            else:
                mapped = mapper.map_or_divide(source, max_patches)
            return mapped if isinstance(mapped, list) else _write(out, mapped, mapper)

    return work


def _predict_strip(task: SlideTask, blocks: BlockRange, mapper: Mapper) -> StripLogits | Row:
    """Return the logits of a strip, or the failed slide; nothing is written, so nothing is claimed."""
    try:
        if mapper.request(task.source) != task.request:
            raise SlideError(_OTHER_REQUEST)
        return mapper.predict_strip(task.source, task.version, blocks)
    except (OSError, DataError) as error:
        return _row(task.source, "failed", reason=str(error))


def _locate(path: Any) -> Any:
    """Return the absolute path of an existing file or folder, other values unchanged."""
    is_path = isinstance(path, str | Path) and os.path.exists(path)
    return Path(os.path.abspath(path)) if is_path else path


def _find_row(out: Path, source: Source, mapper: Mapper) -> Row | None:
    """Return the row of a slide that is finished or cannot be mapped, else None."""
    try:
        request = mapper.request(source)
    except (OSError, DataError) as error:
        return _row(source, "failed", reason=str(error))
    remove_abandoned(out / source.name)
    finished = read_finished(out / source.name, request)
    if finished is not None:
        return _row(source, "done", finished)
    try:
        check_outputs(out / source.name, *list_files())
    except UserFileError as error:
        return _row(source, "failed", reason=str(error))
    return None


def _map_all(mapper: Mapper, sources: Iterable[Source], write: Callable[[Mapped], None]) -> None:
    """Map slides; outputs are written by a thread while the next slide is read."""
    with ThreadPoolExecutor(1) as writer:
        mapper.meanwhile = lambda: writer.submit(prepare_to_draw)
        writing: Future[None] | None = None
        for mapped in mapper.map(sources):
            if writing is not None:
                writing.result()
            writing = writer.submit(write, mapped)
        if writing is not None:
            writing.result()


def _map_shard(
    out: Path, ordered: Sequence[Source], sources: Sequence[Source], mapper: Mapper, claims: Claims
) -> SlideCohort:
    """Map slides not finished, claimed or recently failed by other processes, and wait for the others."""
    started, by_name = claims.now(), {source.name: source for source in ordered}

    def is_finished(name: str) -> bool:
        failure = claims.folder / f"{name}{_FAILED}"
        has_failed = failure.exists() and failure.stat().st_mtime >= started
        return has_failed or _find_row(out, by_name[name], mapper) is not None

    def write(mapped: Mapped) -> None:
        name = mapped.source.name
        row = _write(out, mapped, mapper)
        if row["status"] == "failed":
            write_json(claims.folder / f"{name}{_FAILED}", {"reason": row["reason"]})
        else:
            (claims.folder / f"{name}{_FAILED}").unlink(missing_ok=True)
        claims.release(name)

    def work(names: Iterator[str]) -> None:
        _map_all(mapper, (by_name[name] for name in names), write)

    share_work(claims, list(by_name), is_finished, work)
    with claims.wait_for(STATUS), hold_outputs(out, STATUS):  # one process at a time
        rows = {source.name: _collect_row(out, source, mapper, claims) for source in sources}
        return SlideCohort(out, _write_status(out, rows))


def _collect_row(out: Path, source: Source, mapper: Mapper, claims: Claims) -> Row:
    """Return the row of a slide mapped by any process, or failed."""
    if (row := _find_row(out, source, mapper)) is not None:
        return row
    return _row(source, "failed", reason=str(read_json(claims.folder / f"{source.name}{_FAILED}")["reason"]))


def _write(out: Path, mapped: Mapped, mapper: Mapper) -> Row:
    source = mapped.source
    try:
        if isinstance(mapped.result, DataError):
            raise mapped.result
        with update_directory(out / source.name, *list_files(), last=SUMMARY) as folder:
            document = write_outputs(
                folder,
                mapped.result,
                is_calibrated=mapper.is_calibrated,
                request=mapper.request(source),
            )
    except (OSError, DataError) as error:
        return _row(source, "failed", reason=str(error))
    return _row(source, "done", document)


def _row(source: Source, status: Status, document: SlideSummary | None = None, *, reason: str = "") -> Row:
    row: Row = {
        "slide": source.name,
        "source": printable(source.address),
        "status": status,
        "reason": printable(" ".join(reason.split())),
    }
    if document is None:
        return row
    mpp, positive, checked = document["mpp"], document["positive"], document.get("out_of_distribution")
    return row | {
        "n_patches": document["n_patches"],
        "mpp": mpp["slide"],
        "mpp_source": mpp["source"],
        "positive_mm2": positive and positive["area_mm2"],
        "out_of_distribution": checked and checked["share"],
        "out_of_distribution_quantile": checked and checked["quantile"],
    }


def _write_status(out: Path, rows: Mapping[str, Row]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows.values()), columns=COLUMNS).astype(
        {"n_patches": "Int64", "out_of_distribution": float, "out_of_distribution_quantile": float}
    )
    write_csv(out / STATUS, table)
    return table
