"""Seconds from the command to 85 % kNN on `patterns`, start and evaluation included. Run by hand, on an idle machine:

    python tests/speedrun.py                      every record, three seeds each, some ten minutes on two CPU cores
    python tests/speedrun.py simclr moco          some of them
    python tests/speedrun.py --default vicreg     the file's own defaults to their end, whatever they reach
    python tests/speedrun.py --default vicreg --beside ../old      and those of another checkout, in turns

The ceiling is what the same machine needs for the forward and backward passes alone: of as many images, two views each,
through the backbone, on a fixed batch.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common

ROOT = Path(__file__).parent.parent
GOAL = 85.0  # % of the test images
# One evaluation, at the end: the epochs are as few as reach the goal with each of the three seeds.
RECORDS = {
    "simclr": "simclr.py --epochs 6 --warmup-epochs 1 --base-lr 6 --temperature 0.1 --eval-every 6",
    "negatives": "more/negatives.py --epochs 6 --warmup-epochs 1 --base-lr 5 --temperature 0.1 --eval-every 6",
}


def seconds_to(goal: float, folder: Path, line: str, seed: int) -> tuple[float, float, float]:
    """Seconds from the command to the evaluation that reaches `goal`, or to the end; its accuracy in %; the seconds to
    the first evaluation, that of the untrained network.
    """
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, *line.split(), "--seed", str(seed), "--run-dir", run]
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            found = []
            for text in process.stdout:
                if match := re.search(r"online kNN ([\d.]+) %$", text):
                    found.append((time.perf_counter() - began, float(match[1])))
                    if found[-1][1] >= goal:
                        process.kill()
        if not found:
            raise SystemExit(f"{' '.join(command)} in {folder} was never judged")
    (seconds, knn), ended = found[-1], time.perf_counter() - began
    return seconds if knn >= goal else ended, knn, found[0][0]


def ceiling(line: str) -> float:
    """Seconds of forward and backward passes of the run's backbone, for as many images as the run sees."""
    flags = dict(re.findall(r"--(batch-size|epochs) (\d+)", line))
    method = re.split(r"[/.]", line.split()[0])[-2]
    sys.path.insert(0, str((ROOT / line.split()[0]).parent))
    defaults = __import__(method).Args()
    batch_size = int(flags.get("batch-size", defaults.batch_size))
    steps = int(flags.get("epochs", defaults.epochs)) * (5000 // batch_size)
    device = common.start_processes()
    (_, _, autocast), _ = common.compute_in("auto", device)
    net = common.backbone("resnet10", "imagenet", zero_init=False)[0].to(device, memory_format=torch.channels_last)
    x = torch.randn(2 * batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    taken = []
    for _ in range(12):
        began = time.perf_counter()
        with autocast:
            h = net(x)
        h.float().square().mean().backward()
        net.zero_grad()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:]) * steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"all records, or some of: {', '.join(RECORDS)}")
    parser.add_argument("--default", action="store_true", help="the file's own defaults, to their end")
    parser.add_argument("--beside", type=Path, help="another checkout, to run in turns with this one")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if unknown := [m for m in options.methods if not options.default and m not in RECORDS]:
        parser.error(f"no record of: {', '.join(unknown)}")
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    print(f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| | seconds | of each seed | kNN of each seed | start | ceiling |\n|---|---|---|---|---|---|")
    for method in options.methods or RECORDS:
        line = f"{method}.py" if options.default else RECORDS[method]
        places = [("", ROOT)] + ([(f" in {options.beside}", options.beside)] if options.beside else [])
        runs = {place: [] for place, _ in places}
        for seed in range(options.seeds):
            for place, folder in places:
                runs[place].append(seconds_to(101.0 if options.default else GOAL, folder, line, seed))
        for place, found in runs.items():
            seconds, knn, start = zip(*found, strict=True)
            missed = ", not all there" * (not options.default and min(knn) < GOAL)
            each = ", ".join(f"{s:.1f}" for s in seconds)
            cells = [f"`python {line}`{place}", f"{statistics.mean(seconds):.1f}{missed}", each]
            cells += [", ".join(f"{a:.1f}" for a in knn), f"{statistics.mean(start):.1f}", f"{ceiling(line):.1f}"]
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
