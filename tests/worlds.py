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
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    for number, (job, arguments) in enumerate(jobs):
        # A store of its own for each job: a method's main closes the process group that it found.
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{number}", rank=rank, world_size=world)
        torch.save(job(*arguments), f"{folder}/result{number}.{rank}")
        if dist.is_initialized():
            dist.destroy_process_group()


def run_on(world: int, jobs: list[Job]) -> list[list[Any]]:
    """For each job, what it returned on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, jobs, folder), nprocs=world)
        return [[torch.load(f"{folder}/result{n}.{r}") for r in range(world)] for n in range(len(jobs))]
