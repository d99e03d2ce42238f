"""Runs jobs on several gloo processes of this machine; every rank calls the job's function with the same arguments."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

Job = tuple[Callable, tuple]


def work(rank: int, world: int, jobs: list[Job], folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    for number, (job, arguments) in enumerate(jobs):
        if world > 1:  # one process has no group
            # A store of its own for each job: a method's main closes the process group that it found.
            store = f"file://{folder}/store{number}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            dist.barrier()  # or a rank that is soon done is gone before another has called at its address
        torch.save(job(*arguments), f"{folder}/result{number}.{rank}")
        if dist.is_initialized():
            dist.destroy_process_group()


def run_on(world: int, jobs: list[Job]) -> list[list[Any]]:
    """For each job, what it returned on each rank. A warning that is an error here is one there, too."""
    # A forked process need not import torch again, but cannot use a GPU that this one has used.
    how = "spawn" if torch.cuda.is_available() else "fork"
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (world, jobs, folder), nprocs=world, start_method=how)
        return [[torch.load(f"{folder}/result{n}.{r}") for r in range(world)] for n in range(len(jobs))]
