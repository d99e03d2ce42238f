"""The number of processes is a matter of speed, never of result."""

import math
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from methods import METHODS, metrics, module, narrow, run, small_folder, tiny
from PIL import Image
from torch import Tensor, nn
from worlds import run_on

import common

close = torch.testing.assert_close
WORLDS = [1, 2, 4]

# What is trained: all on one and on two processes; on four, which two cores run slowly, the second. A ResNet for two
# methods, one of them with BatchNorm in groups; two narrow convolutions for all.
RUNS = {
    "float64 lars resnet10": {"precision": "fp64", "optimizer": "lars", "max_steps": 3},
    "float64 lars narrow": {"precision": "fp64", "optimizer": "lars"},
    "float64 sgd narrow": {"precision": "fp64", "optimizer": "sgd", "base_lr": 0.2},
    "float32 lars narrow": {"precision": "fp32", "optimizer": "lars", "base_lr": 0.02},  # large steps magnify rounding
}
WITH_RESNET = ("simclr", "moco")
TRAINED = [(method, name) for name in RUNS for method in METHODS if "narrow" in name or method in WITH_RESNET]
ON = {1: TRAINED, 2: TRAINED, 4: [(method, "float64 lars narrow") for method in METHODS]}
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def train(method: str, folder: str, flags: dict) -> dict[str, float]:
    flags = {"epochs": 2, "max_steps": 5, "eval_every": 2, "save_every": 2, **flags}
    file = module(method)
    usual = file.backbone
    try:
        file.backbone = narrow if "narrow" in folder else usual
        return file.main(tiny(method, Path(folder), **flags))
    finally:
        file.backbone = usual


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder <world>/<method> <run> for every combination, all trained; and "4 then 1" for every method."""
    root, data = tmp_path_factory.mktemp("worlds"), small_folder()

    def job(world: str, method: str, name: str, **flags):
        return train, (method, str(root / world / f"{method} {name}"), {**RUNS[name], "data_dir": data, **flags})

    for world in WORLDS:
        jobs = [job(str(world), method, name) for method, name in ON[world]]
        if world == 4:
            jobs += [job("4 then 1", method, "float64 lars narrow", max_steps=3) for method in METHODS]
        run_on(world, jobs)
    run_on(1, [job("4 then 1", method, "float64 lars narrow") for method in METHODS])
    return root


def assert_same_metrics(one: Path, other: Path, tolerance: float, but: set[str]) -> None:
    want, got = ([line for line in metrics(run) if not but & line.keys() or "loss" in line] for run in (one, other))
    assert len(want) == len(got) >= 5
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - but - {"images_per_s"}:
            same = math.isclose(a[key], b[key], rel_tol=tolerance, abs_tol=tolerance / 10)
            assert same, (a["step"], key, a[key], b[key])


@pytest.mark.parametrize("method, name, world", [(*run, world) for world in WORLDS[1:] for run in ON[world]])
def test_losses_and_weights_are_those_of_one_process(runs, method, name, world):
    alone, together = runs / "1" / f"{method} {name}", runs / str(world) / f"{method} {name}"
    exact = name.startswith("float64")
    # In float32 a neighbour may change its rank, and the smallest singular values are rounding.
    assert_same_metrics(alone, together, TOLERANCE[name.split()[0]], set() if exact else {"knn_top1", "effective_rank"})
    for file in ("encoder.pt", "heads.pt") if exact else ():
        a, b = torch.load(alone / file, weights_only=True), torch.load(together / file, weights_only=True)
        assert a.keys() == b.keys()
        for key in a:
            close(b[key], a[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_begun_on_four_processes_and_continued_on_one_is_the_run_on_two(runs, method):
    folders = [runs / world / f"{method} float64 lars narrow" for world in ("2", "4 then 1")]
    assert_same_metrics(*folders, 1e-9, {"knn_top1", "effective_rank"})


def call_deprecated() -> None:
    for category in (DeprecationWarning, FutureWarning):
        with pytest.raises(category, match="will be gone"):
            warnings.warn("it will be gone", category, stacklevel=1)


def test_a_process_that_calls_what_is_deprecated_fails():
    """Both kinds that tests start: a rank, and a program of its own."""
    run_on(1, [(call_deprecated, ())])
    program = "import torch, warnings; warnings.warn('it will be gone', FutureWarning)"
    ended = run([sys.executable, "-c", program])
    assert ended.returncode == 1 and "FutureWarning: it will be gone" in ended.stderr


# --------------------------------------------------------------------------------------------------- images


def taken(data: common.Data) -> list[tuple]:
    """(index, labels, images that this rank's views show) of each step."""
    compute, _ = common.compute_in("fp64", torch.device("cpu"))
    steps, crops = range(1, 6), [common.Crop(8, (0.2, 1.0))] * 2  # from the second step on, into the second epoch
    made = common.batches(data, crops, steps, 4, 7, compute)
    return [(b.index, b.labels, [(view.x.mean((1, 2, 3)) * 255 / 20).round() for view in b]) for b in made]


@pytest.mark.parametrize("kept", ["in memory", "as files"])
def test_a_batch_knows_the_images_of_all_ranks(tmp_path, monkeypatch, kept):
    """Image i is all of one grey, 20 i, and in class i % 3, so that every view tells of which image it is."""
    for i in range(12):
        folder = tmp_path / "abc"[i % 3]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i,) * 3).save(folder / f"{i}.png")
    monkeypatch.setattr(common, "RESIDENT_BYTES", 2**20 if kept == "in memory" else 0)
    data, _ = common.load_folder(tmp_path)
    assert (data.pixels is None) == (kept == "as files")
    for world in WORLDS:
        seen = run_on(world, [(taken, (data,))])[0]
        for step in range(5):
            index, labels, _ = seen[0][step]
            assert index.dtype == labels.dtype == torch.int64 and index.shape == labels.shape == (4,)
            shown = [torch.cat([rank[step][2][view] for rank in seen]).long() for view in range(2)]
            assert all(torch.equal(rank[step][0], index) and torch.equal(rank[step][1], labels) for rank in seen)
            assert torch.equal(shown[0], shown[1]) and torch.equal(labels, shown[0] % 3)
            if data.files is None:
                assert torch.equal(data.pixels[index, 0, 0, 0].long(), 20 * shown[0])
            else:
                assert [int(Path(os.fsdecode(file)).stem) for file in data.files[index.numpy()]] == shown[0].tolist()


# ------------------------------------------------------------------------------------------------ gradients


def queue() -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LOSSES = {  # name: loss of this rank's rows of two views, (n, 5) each
    "simclr": lambda z1, z2: module("simclr").nt_xent_loss(z1, z2, 0.5)[0],
    "vicreg": lambda z1, z2: module("vicreg").vicreg_loss(z1, z2)[0],
    "barlow": lambda z1, z2: module("barlow").barlow_twins_loss(z1, z2, 0.1)[0],
    "byol": lambda z1, z2: module("byol").byol_loss(z1, z2)[0],
    "simsiam": lambda z1, z2: module("simsiam").simsiam_loss(z1, z2)[0],
    "swav": lambda z1, z2: module("swav").swav_loss([z1.tanh(), z2.tanh(), (z1 - z2).tanh()], 2, 0.1, 0.05, 3)[0],
    "moco": lambda z1, z2: module("moco").info_nce_loss(z1, z2, queue(), 0.2)[0],
}


def embeddings() -> list[Tensor]:
    """Two views, 12 rows that grow from rank to rank, so that no symmetry between ranks can hide an error."""
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1, 13, dtype=torch.float64)[:, None]
    return [torch.randn(12, 5, generator=generator, dtype=torch.float64) * size + size for _ in range(2)]


def gradient(name: str) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) averaged over ranks as DDP does it: every rank's share of the sum, divided by the world."""
    rank, world = common.rank_and_world()
    views = [z[common.my_rows(12)].clone().requires_grad_() for z in embeddings()]
    loss = LOSSES[name](*views)
    loss.backward()
    grads = [torch.zeros_like(z) if z.grad is None else z.grad for z in views]  # none for targets and keys
    if world == 1:
        return loss.detach(), grads
    with torch.no_grad():
        return common.all_gather(loss[None]).mean(), [common.all_gather(grad) / world for grad in grads]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_loss_is_that_of_one_process(pieces, name, world):
    want, want_gradients = gradient(name)
    assert any(grad.abs().max() > 1e-6 for grad in want_gradients)
    for loss, got in pieces[world][name]:
        close(loss, want, rtol=1e-10, atol=1e-12)
        for a, b in zip(got, want_gradients, strict=True):
            close(a, b, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------- the pieces themselves


SHAPES = [(3,), (3, 2, 5)]  # of what BatchNorm normalises, without the batch


def gathered_product() -> tuple[Tensor, Tensor]:
    """A loss in which every rank weighs the gathered rows differently: the true gradient is the sum of the weights."""
    rank, world = common.rank_and_world()
    x = (torch.arange(3.0, dtype=torch.float64) + 10 * rank).requires_grad_()
    rows = common.all_gather(x)
    (rows * (rank + 1) * torch.arange(1, len(rows) + 1)).sum().backward()
    return rows.detach(), x.grad


def normalised(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SyncBatchNorm's output, gradient and running statistics, gathered; BatchNorm's on one process."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, *shape, generator=generator, dtype=torch.float64) * torch.arange(1, 9).view(8, *[1] * len(shape))
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    norm = (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(shape[0]).double()
    norm = common.sync_batchnorm(norm, torch.device("cpu"))
    rows = common.my_rows(8)
    mine = x[rows].clone().requires_grad_()
    y = norm(mine)
    (y * weight[rows]).sum().backward()
    with torch.no_grad():
        return common.all_gather(y), common.all_gather(mine.grad), norm.running_mean, norm.running_var


def halved() -> tuple[Tensor, Tensor, Tensor]:
    """SyncBatchNorm's output of bf16 rows far from 0, gathered, and running statistics; BatchNorm's on one process."""
    generator = torch.Generator().manual_seed(1)
    x = (30 + torch.randn(64, 3, generator=generator)).bfloat16()
    norm = common.sync_batchnorm(nn.BatchNorm1d(3), torch.device("cpu"))
    with torch.no_grad():
        return common.all_gather(norm(x[common.my_rows(64)])), norm.running_mean, norm.running_var


@pytest.fixture(scope="module")
def pieces() -> dict[int, dict]:
    """For each world size, what every loss and piece gave on each rank."""
    jobs = {name: (gradient, (name,)) for name in LOSSES} | {"gather": (gathered_product, ())}
    jobs |= {shape: (normalised, (shape,)) for shape in SHAPES} | {"half": (halved, ())}
    return {world: dict(zip(jobs, run_on(world, list(jobs.values())), strict=True)) for world in (2, 4)}


def test_all_gather_keeps_the_order_of_ranks_and_sums_the_gradients_of_all(pieces):
    for rank, (rows, grad) in enumerate(pieces[4]["gather"]):
        close(rows, torch.tensor([0.0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32], dtype=torch.float64))
        close(grad, (1 + 2 + 3 + 4) * torch.arange(1.0, 13, dtype=torch.float64)[3 * rank : 3 * rank + 3])


def test_all_gather_of_one_process_is_the_identity():
    x = torch.ones(3, requires_grad=True)
    assert common.all_gather(x) is x


@pytest.mark.parametrize("shape", SHAPES)
def test_synchronised_batchnorm_is_batchnorm_of_the_global_batch(pieces, shape):
    want = normalised(shape)
    for got in pieces[4][shape]:
        for a, b in zip(got, want, strict=True):
            close(a, b, rtol=1e-9, atol=1e-9)


def test_synchronised_batchnorm_computes_its_statistics_in_float32(pieces):
    want, mean, var = halved()
    for got, got_mean, got_var in pieces[4]["half"]:
        assert got.dtype == want.dtype == torch.bfloat16
        close(got, want, rtol=1e-2, atol=1e-2)
        close(got_mean, mean, rtol=1e-6, atol=0)
        close(got_var, var, rtol=1e-5, atol=0)
