"""Whole runs of each method beside those of its official code: the same weights and views give the same losses.

official.json holds the numbers, how weights and views are made, and where they come from. A run meets network, loss,
gradient, optimizer, schedules, queue, moving average and the order of operations at once.
"""

import json
import traceback
from pathlib import Path

import methods
import numpy as np
import pytest
import torch
from numpy.random import RandomState
from worlds import run_on

import common
from common import Batch, Data, Draws, View

CASES = json.loads(Path(__file__).with_name("official.json").read_text())["cases"]
IMAGES = 8  # in a batch


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """One tensor for each parameter of the model."""
    random, filled = RandomState(500), []
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if not parameter.requires_grad:
            array = np.zeros(shape)
        elif len(shape) > 1:
            array = random.standard_normal(shape) / np.sqrt(np.prod(shape) / shape[0])
        elif name.endswith("weight"):
            array = 0.5 + random.random_sample(shape)
        else:
            array = 0.1 * random.standard_normal(shape)
        filled.append(torch.from_numpy(array))
    return filled


def queued_keys(shape: tuple[int, int]) -> torch.Tensor:
    keys = RandomState(2000).standard_normal(shape)
    return torch.from_numpy(keys / np.linalg.norm(keys, axis=1, keepdims=True))


def views(step: int, sizes: list[int]) -> list[torch.Tensor]:
    """Blurs that all views of an image share, and noise of their own."""
    random = RandomState(1000 + step)
    base = random.standard_normal((IMAGES, 3, 4, 4))
    shared = [base.repeat(size // 4, 2).repeat(size // 4, 3) for size in sizes]
    return [torch.from_numpy(1.2 * blur + 0.4 * random.standard_normal(blur.shape)) for blur in shared]


class Trajectory:
    """A run of a case, on the weights and views of official.json, and what was seen in it."""

    def __init__(self, case: dict, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
        self.case, self.lr, self.monkeypatch = case, [], monkeypatch
        self.method = methods.module(case["method"])
        self.args = self.method.Args(**case["flags"], run_dir=str(run_dir), log_every=1)
        blank = torch.zeros(case["images"], 3, 32, 32, dtype=torch.uint8)
        monkeypatch.setattr(
            common, "load_data", lambda *_: (Data(blank, None, torch.full((len(blank),), -1), []), None)
        )
        monkeypatch.setattr(common, "batches", self.batches)
        monkeypatch.setattr(common.RunFolder, "save", lambda *_: None)
        monkeypatch.setattr(self.method, "augment", lambda x, *_, **__: x)
        self.patch_run("start", self.prepare)
        self.patch_run("report", lambda *_, **__: self.lr.append(self.rates()))

    def patch_run(self, name: str, first) -> None:
        """Call `first` before the method of that name of `Run`."""
        original = getattr(common.Run, name)

        def both(run, *inputs, **state):
            first(*inputs, **state)
            original(run, *inputs, **state)

        self.monkeypatch.setattr(common.Run, name, both)

    @torch.no_grad()
    def prepare(self, **state) -> None:
        self.state = state
        for parameter, value in zip(state["model"].parameters(), weights(state["model"]), strict=True):
            parameter.copy_(value)
        for name in {"key_network", "target"} & state.keys():
            for key, parameter in state[name].named_parameters():
                parameter.copy_(state["model"].get_parameter(key))
        if "key_network" in state:
            state["queue"].keys.copy_(queued_keys(state["queue"].keys.shape))
        self.before = {name: tensor.clone() for name, tensor in self.parameters().items()}

    def batches(self, data: Data, crops: list[common.Crop], steps: range, batch_size: int, *_) -> list[Batch]:
        assert batch_size == IMAGES and [crop.size for crop in crops] == self.case["view_sizes"]
        for step in steps:
            draws = Draws((0,), IMAGES)
            draws.generator = RandomState(3000 + step)  # MoCo permutes with it
            yield Batch([View(x, draws) for x in views(step, self.case["view_sizes"])], *torch.zeros(3, IMAGES))

    def rates(self) -> list[float]:
        """The learning rates of the groups of parameters."""
        return [group["lr"] for group in self.state["optimizer"].param_groups]

    def parameters(self) -> dict[str, torch.Tensor]:
        """All that have a gradient, and the networks that follow."""
        parts = {name: self.state[name] for name in ("model", "key_network", "target") if name in self.state}
        named = {f"{part}.{name}": p for part, net in parts.items() for name, p in net.named_parameters()}
        return {name: p.detach() for name, p in named.items() if p.requires_grad or not name.startswith("model.")}


def norm(tensors: list[torch.Tensor]) -> float:
    return torch.stack(torch._foreach_norm(tensors)).norm().item()


def near(value, rel: float = 1e-8):
    return pytest.approx(value, rel=rel, abs=0)


def of_model(parameters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for key, tensor in parameters.items() if key.startswith("model.")]


def trajectory(name: str, run_dir: str) -> dict | str:
    """What is compared of a run, or the traceback of one that failed."""
    case = CASES[name]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Trajectory(case, Path(run_dir), monkeypatch)
        try:
            run.method.main(run.args)
        except BaseException:
            return traceback.format_exc()
    first, after = views(0, case["view_sizes"]), run.parameters()
    moved = {key: after[key] - run.before[key] for key in after}
    return {
        "initial": {
            "norm": norm(of_model(run.before)),
            "conv1_first": run.before["model.backbone.conv1.weight"].flatten()[:3].tolist(),
            "view0_first": first[0].flatten()[:3].tolist(),
            "view_norms_step0": [x.norm().item() for x in first],
        },
        "lr": [list(dict.fromkeys(rates)) for rates in run.lr],
        "losses": [record["loss"] for record in methods.metrics(Path(run_dir))],
        "final": {"norm": norm(of_model(after)), "distance": norm(of_model(moved))},
        "tensors": {
            key: {"norm": after[key].norm().item(), "distance": moved[key].norm().item()}
            for key in case["final"]["tensors"]
        },
    }


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory) -> dict[str, dict | str]:
    root = tmp_path_factory.mktemp("official")
    ran = run_on(1, [(trajectory, (name, str(root / name))) for name in CASES])
    return {name: result for name, (result,) in zip(CASES, ran, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_that_of_the_official_code(name, trajectories):
    case, got = CASES[name], trajectories[name]
    assert not isinstance(got, str), got
    # The start tells whether a difference comes from weights and views or from training.
    for key, value in got["initial"].items():
        assert value == near(case["initial"][key]), key
    assert got["lr"] == [near(list(dict.fromkeys(rates)), 1e-10) for rates in case["lr"]]
    assert got["losses"] == near(case["losses"])
    assert got["final"] == near({key: case["final"][key] for key in got["final"]})
    for key, want in case["final"]["tensors"].items():
        assert got["tensors"][key] == near(want), key
