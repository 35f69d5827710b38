"""The engine ``ray``: a command's tasks in the processes of a Ray cluster, repeated where a process dies.

Ray (https://docs.ray.io) starts the processes, keeps them between tasks, and repeats a task whose process or
node has died. That the result of a task appears whole and once is up to the task: see `biopsy.core.files` and
`biopsy.core.claims`.
"""

import contextlib
import functools
import itertools
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

from biopsy.core.errors import BiopsyError, MissingExtra, RunError, first_line

logger = logging.getLogger(__name__)

Engine = Literal["local", "ray"]

MAX_RETRIES = 5
"""How often a task is repeated whose process dies: a task that kills its process is given up."""

_REPLY_S = 10.0  # Ray itself tries an address for minutes

Task = TypeVar("Task")
Result = TypeVar("Result")
Prepare = Callable[[int], Callable[[Task], Result]]
"""Called once in each process with the number of its cores; returns the function that does a task."""


class TaskLost(RunError):
    """A task whose process died at every attempt."""


def check_engine(engine: Engine, address: str | None, shard: str | None = None) -> None:
    """Refuse an engine that is not installed or does not exist, and options that are not for it.

    Raises:
        RunError: If there is no such engine, ``address`` is given without Ray, or ``shard`` with it.
        MissingExtra: If Ray is not installed.
    """
    if engine not in ("local", "ray"):
        raise RunError(f"engine={engine!r} does not exist: choose local or ray")
    if engine == "local" and address is not None:
        raise RunError(f"address={address!r} is that of a Ray cluster: add --engine ray, or leave it out")
    if engine == "ray" and shard is not None:
        raise RunError(f"shard={shard!r} is not for Ray, which divides the work itself: leave out one")
    if engine == "ray" and find_spec("ray") is None:
        raise MissingExtra("ray", "--engine ray")


def run_tasks(
    prepare: Prepare[Task, Result], tasks: Iterable[Task], *, address: str | None, device: str
) -> Iterator[tuple[Task, Result | TaskLost]]:
    """Do tasks on a Ray cluster; yield each with its result, or with what became of it, as they end.

    A task has one core, on a GPU one GPU and its share of the node's cores. Twice as many tasks as the
    cluster can do at a time are handed out, so that no process waits and little is held in memory.

    Args:
        prepare: Can be pickled; what it opens is kept for the tasks that follow in the same process.
        tasks: Can be pickled.
        address: The cluster's, such as ``HOST:6379``; None for that of RAY_ADDRESS, of this machine, or one
            that is started for this call.

    Raises:
        RunError: If there is no such cluster.
        BiopsyError: As raised by a task.
    """
    import ray

    with _connect(address):
        n_gpus = int(device.startswith("cuda"))
        n_cores = _cores_per_gpu() if n_gpus else 1
        remote = ray.remote(num_cpus=n_cores, num_gpus=n_gpus, max_retries=MAX_RETRIES)(_do_task)
        shared = (ray.put(prepare), n_cores)
        waiting, running = iter(tasks), dict[Any, Task]()
        while True:
            n_free = 2 * _count_slots(n_cores, n_gpus) - len(running)
            for task in itertools.islice(waiting, max(0, n_free)):
                running[remote.remote(shared, task)] = task
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                yield running.pop(reference), _get_result(reference)


@contextlib.contextmanager
def _connect(address: str | None) -> Iterator[None]:
    """Connect to a cluster for a block, unless the program is connected to one already."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's default from its next version on
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if place := re.fullmatch(r"(?:ray://)?(.+):([0-9]{1,5})", address or ""):
            socket.create_connection((place[1], int(place[2])), timeout=_REPLY_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise RunError(f"no Ray cluster can be used at {address or 'this machine'}: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _cores_per_gpu() -> int:
    """Return how many cores each task on a GPU can have on every node with GPUs."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return max(1, min((int(node.get("CPU", 1) // node["GPU"]) for node in nodes), default=1))


def _count_slots(n_cores: int, n_gpus: int) -> int:
    """Return how many tasks the nodes that are there now can do at a time, at least one."""
    import ray

    resources = ray.cluster_resources()
    n_slots = int(resources.get("CPU", 0) // n_cores)
    n_slots = min(n_slots, int(resources.get("GPU", 0))) if n_gpus else n_slots
    if n_slots < 1:
        logger.warning(
            "the Ray cluster has no node with %d cores and %d GPUs: waiting for one", n_cores, n_gpus
        )
    return max(1, n_slots)


def _get_result(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, BiopsyError | OSError):
            raise error.cause from None
        raise
    except RayError as error:
        reason = " ".join(str(error).split())[:200]
        return TaskLost(f"its process died in each of {MAX_RETRIES + 1} attempts ({reason})")


def _do_task(shared: tuple[Any, int], task: Any) -> Any:
    return _open_once(*shared)(task)


@functools.lru_cache(maxsize=1)
def _open_once(reference: Any, n_cores: int) -> Callable[[Any], Any]:
    import ray

    return ray.get(reference)(n_cores)
