"""Whether this process runs alone or is one of several of a training, started by torchrun or SLURM."""

import os
from typing import NamedTuple


class Launch(NamedTuple):
    """Ranks of this process among those of one training (default: a single process)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes on the same machine, which selects the GPU."""


def read_launch() -> Launch:
    """Return the ranks given by the environment variables of torchrun, or else of a SLURM step.

    Both are ignored unless ``MASTER_ADDR`` is set, as torchrun does: the processes of a SLURM job may be
    unrelated.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    slurm = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    for names in (torchrun, slurm):
        if "MASTER_ADDR" in os.environ and all(name in os.environ for name in names):
            return Launch(*(int(os.environ[name]) for name in names))
    return Launch()
