"""How this process was started: alone, or as one of the processes of a training by torchrun or SLURM."""

import os
from typing import NamedTuple


class Launch(NamedTuple):
    """Place of this process among those that were started together; alone by default."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its number on its machine, by which it takes a GPU."""


def read_launch() -> Launch:
    """Return what torchrun's variables say, or those of a step of SLURM.

    Either counts only where ``MASTER_ADDR`` is set, as torchrun does: a SLURM job may run processes that have
    nothing to do with each other.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    slurm = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    for names in (torchrun, slurm):
        if "MASTER_ADDR" in os.environ and all(name in os.environ for name in names):
            return Launch(*(int(os.environ[name]) for name in names))
    return Launch()
