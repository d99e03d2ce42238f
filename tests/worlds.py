"""Runs jobs on several gloo processes of this machine; every rank calls the job's function with the same arguments.

Jobs for one process are shared out among the processors.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

Job = tuple[Callable, tuple]


def numbers(count: int, taken) -> Iterator[int]:
    """0 to count - 1, but for those that another process has taken."""
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= count:
            return
        yield number


def work(process: int, world: int, jobs: list[Job], taken, folder: str) -> None:
    rank = process if world > 1 else 0
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    for number in range(len(jobs)) if world > 1 else numbers(len(jobs), taken):
        if world > 1:  # one process has no group
            # A store of its own for each job: a method's main closes the process group that it found.
            store = f"file://{folder}/store{number}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            dist.barrier()  # or a rank that is soon done is gone before another has called at its address
        job, arguments = jobs[number]
        torch.save(job(*arguments), f"{folder}/result{number}.{rank}")
        if dist.is_initialized():
            dist.destroy_process_group()


def run_on(world: int, jobs: list[Job]) -> list[list[Any]]:
    """For each job, what it returned on each rank. A warning that is an error here is one there, too."""
    # A forked process need not import torch again, but cannot use a GPU that this one has used.
    how = "spawn" if torch.cuda.is_available() else "fork"
    processes, taken = world if world > 1 else min(len(jobs), os.cpu_count()), mp.get_context(how).Value("i", 0)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (world, jobs, taken, folder), nprocs=processes, start_method=how)
        return [[torch.load(f"{folder}/result{n}.{r}") for r in range(world)] for n in range(len(jobs))]
