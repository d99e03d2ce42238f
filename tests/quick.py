"""Runs of a fraction of a second in this process: noise in memory, and a backbone of two convolutions."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from methods import narrow

import common


def trainer(
    method: ModuleType, args: common.Flags, images: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict]:
    """`train(name, **flags)`: the checkpoint of a run in `folder / name`, on so many images without labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 16, 16), generator=generator, dtype=torch.uint8)
    data = common.Data(pixels, None, torch.full((images,), -1), [])
    monkeypatch.setattr(common, "load_data", lambda *_: (data, None))
    monkeypatch.setattr(method, "backbone", narrow)

    if args.precision == "auto":  # whatever the CPU has instructions for
        args = dataclasses.replace(args, precision="fp32")

    def train(name: str = "run", **flags) -> dict:
        method.main(dataclasses.replace(args, run_dir=str(folder / name), **flags))
        return torch.load(folder / name / "checkpoint.pt", weights_only=True)

    return train
