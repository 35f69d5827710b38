"""Loggers beside a run's own log: TensorBoard, MLflow, Weights & Biases. Each is an extra and off by default.

They get the recipe's settings and each epoch's numbers, no ids and no pictures. Where MLflow and Weights &
Biases keep them follows their own environment variables (``MLFLOW_TRACKING_URI``, ``WANDB_MODE``, ...).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from biopsy.core.errors import MissingExtra
from biopsy.training.runs import Run


class EpochLogger(Protocol):
    """Interface of the loggers."""

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Log the values of an epoch."""

    def close(self, *, is_finished: bool) -> None:
        """Close the logger; an interrupted run can continue it."""


class _TensorBoard:
    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run.path / "tensorboard")

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self, *, is_finished: bool) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, run: Run) -> None:
        import mlflow

        self._mlflow = mlflow
        run_id = run.info.get("mlflow_run")
        started = mlflow.start_run(run_id=run_id, run_name=None if run_id else run.info["id"])
        if not run_id:
            run.update(mlflow_run=started.info.run_id)
            mlflow.log_params(_flatten(run))

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self._mlflow.log_metrics(dict(values), step=epoch)

    def close(self, *, is_finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if is_finished else "KILLED")


class _WandB:
    def __init__(self, run: Run) -> None:
        import wandb

        self._record = wandb.init(
            id=run.info["id"], name=run.path.name, dir=str(run.path), config=_flatten(run), resume="allow"
        )

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self._record.log(dict(values), step=epoch)

    def close(self, *, is_finished: bool) -> None:
        self._record.finish(exit_code=0 if is_finished else 1)


LOGGERS: dict[str, Callable[[Run], EpochLogger]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WandB,
}


def open_loggers(names: Iterable[str], run: Run) -> list[EpochLogger]:
    """Return the loggers of a run by name.

    Raises:
        MissingExtra: If one is not installed.
    """
    loggers = []
    for name in names:
        try:
            loggers.append(LOGGERS[name](run))
        except ImportError:
            raise MissingExtra(name, f"--{name}") from None
    return loggers


def _flatten(run: Run) -> dict[str, object]:
    """Return the settings that define a run, by dotted name."""
    tables = run.recipe.model_dump(include={"preprocessing", "model", "augmentation", "train", "decision"})
    settings = {f"{table}.{key}": str(value) for table, keys in tables.items() for key, value in keys.items()}
    return {"recipe": run.info["recipe"], "seed": run.info["seed"], **settings}
