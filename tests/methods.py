"""The methods, and how to run each of them in a second: few images, small heads."""

import atexit
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

ROOT = Path(__file__).parent.parent

# Small values of each method's own flags; the first method is the one that the others are compared with.
SMALL = {
    "simclr": {"projector_hidden": 24, "projector_dim": 16},
    "vicreg": {"expander_hidden": 24, "expander_dim": 40},
    "barlow": {"projector_hidden": 24, "projector_dim": 40},
    "byol": {"projector_hidden": 24, "projector_dim": 16, "predictor_hidden": 24},
    "simsiam": {"projector_dim": 24},
    "swav": {"projector_hidden": 24, "projector_dim": 16, "prototypes": 10, "small_crops": 2, "small_size": 8}
    | {"queue_length": 32, "queue_start_epoch": 0, "freeze_prototypes_epochs": 0.5},
    "moco": {"head_dim": 16, "queue_size": 32, "bn_groups": 4},
}
METHODS = list(SMALL)
# The same for the methods in more/, each of which has tests of its own.
MORE = {
    "supcon": {"projector_hidden": 24, "projector_dim": 16},
    "negatives": {"projector_hidden": 24, "projector_dim": 16},
    "nnclr": {"projector_hidden": 24, "projector_dim": 16, "predictor_hidden": 24, "support_size": 32},
    "wmse": {"projector_hidden": 24, "projector_dim": 4, "base_lr": 0.02},
    "cmc": {"projector_dim": 16},
    "pirl": {"head_dim": 16},
    "cpc": {"target_dim": 6, "context_hidden": 8, "context_blocks": 1},
    "dino": {"head_hidden": 24, "head_dim": 16, "outputs": 10, "small_crops": 2, "small_size": 8},
    "rotnet": {},
    "deepcluster": {"projector_hidden": 24, "projector_dim": 16, "prototypes": 6, "small_crops": 1, "small_size": 8},
    "scan": {"heads": 2, "neighbours": 5, "scan_epochs": 1},  # and an encoder to start from
}

TINY = {"dataset": "folder", "image_size": 16, "batch_size": 16, "epochs": 3, "warmup_epochs": 1, "log_every": 1}
TINY |= {"eval_every": 2, "save_every": 1, "seed": 3, "precision": "fp32"}  # whatever the CPU has instructions for


@functools.cache
def small_folder() -> str:
    """64 training and 40 test images of 16 pixels, of four classes, in a folder that lasts as long as the process."""
    root = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 40)):
        for i in range(count):
            folder = Path(root, split, "abcd"[i % 4])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (16, 16, 3)) // 2 + 32 * (i % 4)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def module(method: str):
    return importlib.import_module(method)


def tiny(method: str, run_dir: Path, **flags):
    """The method's Args for a run of 12 steps on 64 images."""
    small = (SMALL | MORE)[method]
    return module(method).Args(**{**TINY, "data_dir": small_folder(), **small, "run_dir": str(run_dir), **flags})


def narrow(arch: str, stem: str, zero_init: bool, norm: str = "batch") -> tuple[nn.Module, int]:
    """In place of `backbone`: two convolutions, whose gradients take less time from process to process."""
    layer = {"batch": nn.BatchNorm2d, "group": functools.partial(nn.GroupNorm, 2)}[norm]
    first = [nn.Conv2d(3, 8, 3, stride=2, bias=False), layer(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, stride=2, bias=False), layer(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 16


def command(method: str, run_dir: Path, processes: int = 1, **flags) -> list[str]:
    """The same run as a command line."""
    flags = {**TINY, "data_dir": small_folder(), **(SMALL | MORE)[method], "run_dir": str(run_dir), **flags}
    line = [str(ROOT / ("more" if method in MORE else "") / f"{method}.py")]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            line.append(flag if value else "--no-" + flag[2:])
        else:
            line += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), *line]


def run(line: list[str], timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=timeout)


def at_step(line: str) -> int | None:
    """The step of a line of the console's columns, which epoch and step begin; None of another line."""
    found = re.match(r" *\d+\.\d +(\d+) ", line)
    return int(found[1]) if found else None


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
