"""Every method as a user runs it: what a run leaves behind, what it prints, how it continues, how it fails."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import typing
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from methods import METHODS, at_step, command, metrics, module, narrow, run, small_folder, tiny
from PIL import Image
from torch import nn
from worlds import run_on

import common
import evaluate

SETTINGS = {"epoch", "loss", "lr", "images_per_s", "embedding_std", "effective_rank"}


def train(method: str, folder: str, flags: dict) -> dict[str, float]:
    return module(method).main(module(method).Args(**flags, run_dir=folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, tuple[Path, dict[str, float]]]:
    """(folder, what main returned) of a whole tiny run of each method, and of "learning", 120 steps on small views."""
    root = tmp_path_factory.mktemp("trained")
    learning = dict(image_size=16, train_limit=640, batch_size=32, base_lr=8.0, warmup_epochs=1, epochs=6, eval_every=6)
    jobs = {"learning": ("vicreg", {**learning, "expander_hidden": 256, "expander_dim": 256})}
    for method in METHODS:
        flags = vars(tiny(method, root / method))
        jobs[method] = (method, {name: value for name, value in flags.items() if name != "run_dir"})
    ran = run_on(1, [(train, (method, str(root / name), flags)) for name, (method, flags) in jobs.items()])
    return {name: (root / name, last) for name, (last,) in zip(jobs, ran, strict=True)}


@pytest.fixture(params=METHODS)
def finished(request, trained) -> tuple[str, Path, dict[str, float]]:
    """(method, folder, what main returned) of one whole tiny run."""
    return request.param, *trained[request.param]


def test_a_run_leaves_its_flags_metrics_checkpoint_and_weights(finished):
    method, folder, last = finished
    assert {f.name for f in folder.iterdir()} == {*common.RUN_FILES, "lock"}
    lines = metrics(folder)
    steps = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "knn_top1" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in scores] == [0, 8, 12], "the untrained network, every second epoch, the end"
    assert all(SETTINGS < line.keys() and line["epoch"] == line["step"] / 4 for line in steps)
    assert all(0 <= line["knn_top1"] <= 1 for line in scores)
    assert last["step"] == 12 and last["loss"] == steps[-1]["loss"] and last["knn_top1"] == scores[-1]["knn_top1"]
    assert json.loads((folder / "args.json").read_text())["batch_size"] == 16
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 12
    assert torch.load(folder / "checkpoint.previous.pt", weights_only=True)["step"] == 8


def test_the_encoder_is_a_torchvision_state_dict_and_the_heads_are_beside_it(finished):
    method, folder, _ = finished
    encoder = torch.load(folder / "encoder.pt", weights_only=True)
    net, _ = common.backbone("resnet10", "imagenet", zero_init=False)
    net.load_state_dict(encoder)
    heads = torch.load(folder / "heads.pt", weights_only=True)
    assert heads and not any(name.startswith("backbone.") for name in heads)


def test_evaluate_finds_what_the_run_found(finished, capsys):
    method, folder, last = finished
    record = evaluate.main(evaluate.Args(str(folder)))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    assert record["top1"] == pytest.approx(last["knn_top1"])


def test_the_first_learning_rate_and_the_schedule_are_logged(finished):
    method, folder, _ = finished
    rates = [line["lr"] for line in metrics(folder) if "lr" in line]
    peak = max(rates)
    assert 0 < peak and rates[-1] < 0.1 * peak


@pytest.mark.parametrize("method", METHODS)
def test_help_explains_every_flag(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    args = module(method).Args
    with pytest.raises(SystemExit) as end:
        common.parse_args(args, module(method).RECIPES, ["--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(args):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "none" if default == "" else default
        explained = rf"^  {common.flag_of(field.name)}\b[^\[\n]*\s\s+[^\s\[].* {re.escape(f'[{default}]')}$"
        assert re.search(explained, told, re.M), field.name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", ["quick", "cifar", "imagenet"])
def test_recipes_name_flags_that_exist(method, recipe):
    common.parse_args(module(method).Args, module(method).RECIPES, ["--recipe", recipe])


def test_the_run_folder_is_named_after_what_changes_the_result(tmp_path, monkeypatch):
    def name(line: str) -> str:
        args = common.parse_args(module("vicreg").Args, module("vicreg").RECIPES, line.split())
        return args.run_dir or common.default_run_dir("vicreg", args, module("vicreg").RECIPES)

    assert name("") == "runs/vicreg"
    assert name("--batch-size 1024") == "runs/vicreg-batch_size=1024"
    assert name("--log-every 1 --workers 0 --eval-every 9") == "runs/vicreg"
    assert name("--recipe cifar --epochs 3") == "runs/vicreg-recipe=cifar-epochs=3"
    assert name("--data-dir /a/b") == "runs/vicreg-data_dir=%2Fa%2Fb"
    assert name("--run-dir x --seed 4") == "x"


# ---------------------------------------------------------------------------------------------------- learning


def test_training_on_patterns_lowers_the_loss_and_raises_the_neighbours_accuracy(trained):
    """With a learning rate of 0 the loss stays within 0.4, and BatchNorm's running statistics alone gain 0.07."""
    lines = metrics(trained["learning"][0])
    losses = [line["loss"] for line in lines if "loss" in line]
    untrained, final = [line["knn_top1"] for line in lines if "knn_top1" in line]
    assert losses[-1] < losses[0] - 0.8
    assert final > untrained + 0.1


# ------------------------------------------------------------------------------------------- ways to compute


def train_compiled(folder: Path) -> int:
    """The same three steps as they are, and compiled; how many graphs the compiler made."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # the compiler's own, in torch 2.11
    module("simclr").backbone = narrow
    for name in ("plain", "compiled"):
        module("simclr").main(tiny("simclr", folder / name, max_steps=3, compile=name == "compiled"))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.skipif(not (shutil.which("g++") and has_headers), reason="inductor needs g++ and Python's headers")
def test_a_compiled_network_learns_the_same(tmp_path):
    small_folder()
    # A process of its own: the compiler leaves threads behind.
    assert run_on(1, [(train_compiled, (tmp_path,))])[0][0] > 0
    losses = [[x["loss"] for x in metrics(tmp_path / name) if "loss" in x] for name in ("plain", "compiled")]
    assert len(losses[1]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    for file in ("encoder.pt", "heads.pt"):
        a, b = (torch.load(tmp_path / name / file, weights_only=True) for name in ("plain", "compiled"))
        assert a.keys() == b.keys()


@pytest.mark.parametrize("method", METHODS)
def test_bf16_computes_in_half_precision_and_keeps_weights_in_full(method, tmp_path, monkeypatch):
    first, computed_in = {}, set()

    def watched(*how, **named) -> tuple[nn.Module, int]:
        net, width = narrow(*how, **named)
        net[0].register_forward_hook(lambda conv, x, y: computed_in.add(y.dtype))
        return net, width

    monkeypatch.setattr(module(method), "backbone", watched)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        module(method).main(tiny(method, tmp_path / precision, max_steps=3, precision=precision))
        assert computed_in == {dtype}
        computed_in.clear()
        lines = [line for line in metrics(tmp_path / precision) if "loss" in line]
        assert len(lines) == 3 and all(math.isfinite(value) for line in lines for value in line.values())
        first[precision] = lines[0]["loss"]
        saved = torch.load(tmp_path / precision / "checkpoint.pt", weights_only=True)
        weights = [weight for weight in saved["model"].values() if weight.is_floating_point()]
        assert weights and all(weight.dtype == torch.float32 for weight in weights)
    assert first["bf16"] == pytest.approx(first["fp32"], rel=0.05, abs=0.05)


# ----------------------------------------------------------------------------------------------- what is kept


def test_the_encoder_that_a_run_names_is_judged_and_saved(tmp_path):
    """The test images are told apart by their brightness; the backbone is blind, the encoder sees nothing else."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
            self.encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
            nn.init.zeros_(self.backbone[2].weight)
            self.encoder[2].weight.data = torch.tensor([[1.0, 1, 1], [0, 0, 0]])
            self.encoder[2].bias.data = torch.tensor([0.0, 1])

    def knn_top1(name: str) -> float:
        run = common.Run("test", tiny("vicreg", tmp_path / name, max_steps=1), {"quick": {}})
        model = run.place(Network())
        run.start(encoder=None if name == "backbone" else model.encoder, model=model)
        run.report(1, torch.tensor(1.0), {}, 0.1, torch.randn(16, 8))
        encoder, heads = (torch.load(tmp_path / name / file, weights_only=True) for file in ("encoder.pt", "heads.pt"))
        judged = model.get_submodule(name)
        assert same(encoder, judged.state_dict())
        rest = {key: weight for key, weight in model.state_dict().items() if not key.startswith(name + ".")}
        assert len(rest) == 2 and same(heads, rest)
        return run.close()["knn_top1"]

    assert knn_top1("encoder") > 0.9
    assert knn_top1("backbone") < 0.5


class Board:
    """In place of TensorBoard's SummaryWriter: it keeps what it is told."""

    made: ClassVar[list["Board"]] = []

    def __init__(self, folder: str, purge_step: int):
        self.folder, self.purge_step, self.told, self.closed = folder, purge_step, set(), False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.add((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_is_told_every_metric_and_forgets_the_steps_that_are_taken_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    monkeypatch.setattr(module("vicreg"), "backbone", narrow)
    monkeypatch.setattr(Board, "made", [])
    for steps in (4, 6):
        module("vicreg").main(tiny("vicreg", tmp_path, max_steps=steps, tensorboard=True))
    lines = metrics(tmp_path)
    want = {(name, value, line["step"]) for line in lines for name, value in line.items()}
    want = {told for told in want if told[0] not in ("step", "epoch")}
    first, second = Board.made
    assert first.told | second.told == want and {step for _, _, step in second.told} == {5, 6}
    assert [board.purge_step for board in Board.made] == [1, 5]
    assert all(board.folder == str(tmp_path) and board.closed for board in Board.made)


# ------------------------------------------------------------------------------------------------------ resume


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "encoder.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_continues_to_the_same_weights_and_metrics(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module(method), "backbone", narrow)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    module(method).main(tiny(method, whole))
    module(method).main(tiny(method, stopped, max_steps=5))
    capsys.readouterr()
    module(method).main(tiny(method, stopped))
    assert "continuing after step 5 of 12" in capsys.readouterr().out
    assert same(weights(stopped), weights(whole))
    lines = [[{**line, "images_per_s": 0} for line in metrics(run) if "loss" in line] for run in (whole, stopped)]
    assert lines[0] == lines[1] and len(lines[0]) == 12


@pytest.mark.parametrize("beyond", ['{"step": 5, "loss": 1.0}\n', '{"step": 5, "loss": 1.0}\n{"step": 6, "lo'])
def test_what_was_logged_after_the_last_checkpoint_is_gone_when_the_run_continues(beyond, tmp_path, monkeypatch):
    monkeypatch.setattr(module("vicreg"), "backbone", narrow)
    module("vicreg").main(tiny("vicreg", tmp_path, max_steps=4))
    log = tmp_path / "metrics.jsonl"
    before = log.read_text()
    log.write_text(before + beyond)
    last = module("vicreg").main(tiny("vicreg", tmp_path, max_steps=4))
    assert log.read_text() == before and last == module("vicreg").main(tiny("vicreg", tmp_path, max_steps=4))
    log.write_text(before + beyond)
    module("vicreg").main(tiny("vicreg", tmp_path, max_steps=6))
    assert log.read_text().startswith(before)
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == list(range(1, 7))
    assert all(line["loss"] != 1.0 for line in metrics(tmp_path) if "loss" in line)


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    method, folder, last = finished
    before = (folder / "encoder.pt").read_bytes()
    assert module(method).main(tiny(method, folder)) == last
    assert "this run is finished" in capsys.readouterr().out
    assert (folder / "encoder.pt").read_bytes() == before


def test_other_flags_are_refused_and_overwrite_starts_anew(tmp_path, capsys):
    vicreg = module("vicreg")
    vicreg.main(tiny("vicreg", tmp_path, max_steps=2))
    for flags, named in [
        ({"base_lr": 9.0}, f"--base-lr was {vicreg.Args().base_lr} and is now 9.0"),
        ({"epochs": 2}, "--epochs 3"),
    ]:
        with pytest.raises(SystemExit) as end:
            vicreg.main(tiny("vicreg", tmp_path, **flags))
        said = capsys.readouterr().err
        assert end.value.code == 2 and named in said and said.count("\n") == 1
    of_the_old_run, foreign = ("finetuned.pt", "labels-a-0.1-seed0.json"), ("labels-mine.json", "diagnose.txt")
    for name in (*of_the_old_run, *foreign):
        (tmp_path / name).write_text("")
    (tmp_path / "results.jsonl").write_text("".join(json.dumps({"files": [name]}) + "\n" for name in of_the_old_run))
    vicreg.main(tiny("vicreg", tmp_path, max_steps=2, base_lr=9.0, overwrite=True))
    assert "continuing" not in capsys.readouterr().out
    assert all((tmp_path / name).exists() for name in foreign)
    assert not any((tmp_path / name).exists() for name in (*of_the_old_run, "results.jsonl"))
    vicreg.main(tiny("vicreg", tmp_path, epochs=4, base_lr=9.0, max_steps=3))
    assert "continuing after step 2 of 3" in capsys.readouterr().out


def test_a_moved_folder_of_images_continues_the_run_and_a_grown_one_is_refused(tmp_path, capsys):
    vicreg, images = module("vicreg"), tmp_path / "images"
    shutil.copytree(small_folder(), images)
    vicreg.main(tiny("vicreg", tmp_path / "run", max_steps=2))
    vicreg.main(tiny("vicreg", tmp_path / "run", max_steps=3, data_dir=str(images)))
    assert "continuing after step 2 of 3" in capsys.readouterr().out
    file = next((images / "train" / "a").iterdir())
    shutil.copy(file, file.with_name("one_more.png"))
    with pytest.raises(SystemExit) as end:
        vicreg.main(tiny("vicreg", tmp_path / "run", max_steps=4, data_dir=str(images)))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "64 images" in said and "65" in said and said.count("\n") == 1
    few = {"train_limit": 32, "data_dir": str(images)}  # chosen among all, so among others than before
    vicreg.main(tiny("vicreg", tmp_path / "few", max_steps=1, **few))
    shutil.copy(file, file.with_name("another.png"))
    with pytest.raises(SystemExit):
        vicreg.main(tiny("vicreg", tmp_path / "few", max_steps=2, **few))
    assert "65 images" in capsys.readouterr().err


def test_a_restart_by_torchrun_does_not_overwrite_again(tmp_path, capsys, monkeypatch):
    module("vicreg").main(tiny("vicreg", tmp_path, max_steps=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    module("vicreg").main(tiny("vicreg", tmp_path, max_steps=3, overwrite=True))
    assert "continuing after step 2 of 3" in capsys.readouterr().out


def test_a_run_without_loss_scaling_continues_with_it(tmp_path):
    """Begun on a processor that needs none, continued on one that computes in fp16."""
    args = tiny("vicreg", tmp_path, max_steps=2)
    module("vicreg").main(args)
    dataset = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["dataset"]
    saved = common.RunFolder("vicreg", args, dataset).restore({"scaler": torch.amp.GradScaler("cpu")})
    assert saved["step"] == 2


def test_a_collapse_and_a_schedule_that_only_rises_are_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module("vicreg"), "backbone", narrow)
    module("vicreg").main(tiny("vicreg", tmp_path / "healthy"))
    assert "warning" not in capsys.readouterr().err
    flags = {"std_coeff": 0.0, "base_lr": 200.0, "epochs": 10, "warmup_epochs": 10, "eval_every": 10, "save_every": 10}
    module("vicreg").main(tiny("vicreg", tmp_path / "sick", **flags))
    said = capsys.readouterr().err
    assert "warning: collapse at step" in said and "only rises" in said


def test_images_per_second_and_time_left_do_not_count_evaluation(tmp_path, monkeypatch, capsys):
    now = [100.0]  # seconds
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    log = common.Log(tiny("vicreg", tmp_path, log_every=2), steps_per_epoch=4, last_step=12)
    log.open(0, 0)
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    for step in range(1, 5):
        now[0] += 5  # seconds per step, of 16 images
        log.step(step, torch.tensor(1.0), {}, 0.1, z)
        with log.pause():
            now[0] += 1000
    log.close()
    assert [line["images_per_s"] for line in metrics(tmp_path)] == [pytest.approx(16 / 5)] * 2
    first, second = (line for line in capsys.readouterr().out.splitlines() if at_step(line))
    assert at_step(first) == 2 and first.split()[-2:] == ["3", "0:00:50"]
    assert at_step(second) == 4 and second.split()[-2:] == ["3", "0:00:40"]


@pytest.mark.parametrize("sign", ["std", "rank", "scale", None, "few"])
def test_each_sign_of_collapse_is_warned_of_once(sign, tmp_path, capsys):
    log = common.Log(tiny("vicreg", tmp_path), steps_per_epoch=4, last_step=12)
    log.open(0, 0)
    healthy = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    z = {
        "std": 100 + healthy,  # one direction with little around it
        "rank": healthy[:, :2] @ healthy[:2],  # a plane
        "scale": 1e-4 * healthy,  # near the origin
        None: healthy,
        "few": healthy[:4],  # whose rank cannot be more than four
    }[sign]
    sign = None if sign == "few" else sign
    for step in (1, 2):
        log.step(step, torch.tensor(1.0), {}, 0.1, z)
    log.close()
    named = {"std": "spread of the embeddings", "rank": "effective rank", "scale": "shrink to one point"}
    said = capsys.readouterr().err
    assert {name for name, text in named.items() if text in said} == (
        {sign, "rank"} if sign == "std" else {sign} - {None}
    )
    assert said.count("warning") == (2 if sign == "std" else 1 if sign else 0)
    assert all(len(line) < 96 for line in said.splitlines()), "they stand beside the columns, at later steps, too"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    vicreg = module("vicreg")
    vicreg.main(tiny("vicreg", tmp_path))
    want = weights(tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    vicreg.main(tiny("vicreg", tmp_path))
    told = capsys.readouterr()
    assert "checkpoint.pt cannot be read" in told.err and "continuing after step 8 of 12" in told.out
    assert same(weights(tmp_path), want)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit):
        vicreg.main(tiny("vicreg", tmp_path))
    assert "--overwrite" in capsys.readouterr().err


def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path):
    folder = common.RunFolder("vicreg", tiny("vicreg", tmp_path), {})
    folder.open()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # where Python looks for signals
    folder.close()


def forked(folder: Path, flags: dict) -> tuple[int, typing.TextIO]:
    """A run in a process of its own, without importing torch again: its number, and what it prints."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(write, "w") as sys.stdout:
                module("vicreg").main(tiny("vicreg", folder, **flags))
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(1)
    os.close(write)
    return child, open(read)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_ends_with_128_plus_its_number(number, tmp_path):
    flags, err, but = {"epochs": 500, "save_every": 500, "eval_every": 500}, "", ""
    if number == signal.SIGTERM:  # once from the command line
        process = subprocess.Popen(
            command("vicreg", tmp_path, **flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        child, lines = process.pid, process.stdout
    else:
        child, lines = forked(tmp_path, {**flags, "overwrite": True})
        but = " without --overwrite"  # which would begin anew
    assert any(at_step(line) == 3 for line in lines)
    os.kill(child, number)
    if number == signal.SIGTERM:
        out, err = process.communicate(timeout=120)
        code = process.returncode
    else:
        out, code = lines.read(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert (code, err) == (128 + number, "") and f"the same command{but} continues" in out
    assert "next " not in out, "it is not finished"
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert 3 <= step < 2000 and metrics(tmp_path)[-1]["step"] == step


# ------------------------------------------------------------------------------------------------------ faults


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path, capsys):
    vicreg = module("vicreg")
    vicreg.main(tiny("vicreg", tmp_path, max_steps=4))
    with pytest.raises(SystemExit) as end:
        vicreg.main(poisoned(tmp_path))
    said = capsys.readouterr().err
    assert end.value.code == 1 and "step 5" in said and "invariance is nan" in said and "learning rate" in said
    assert torch.load(tmp_path / "checkpoint.previous.pt", weights_only=True)["step"] == 4


def poisoned(folder: Path):
    """The flags of a run whose last checkpoint carries a weight that is not a number."""
    file = folder / "checkpoint.pt"
    saved = torch.load(file, weights_only=True)
    (folder / "checkpoint.previous.pt").write_bytes(file.read_bytes())
    saved["model"]["backbone.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(saved, file)
    return tiny("vicreg", folder)


@pytest.mark.parametrize("saved, told", [(0, "there is none before it"), (4, "the one of step 4 is intact")])
def test_a_full_disk_ends_the_run_in_one_line_that_says_what_is_there(tmp_path, capsys, saved, told):
    """No file may grow beyond a megabyte: the system answers as a full disk does."""
    if saved:
        module("vicreg").main(tiny("vicreg", tmp_path, max_steps=saved))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    try:
        with pytest.raises(SystemExit) as end:
            module("vicreg").main(tiny("vicreg", tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1 and "inline_container" not in said
    assert "File too large" in said and told in said
    assert not list(tmp_path.glob("*.tmp")), "nothing is left half written"


# ---------------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    "line, named",
    [
        ("--batch-size 5001", "--batch-size 5001 is larger than the 5000 training images"),
        ("--batch-size 1", "--batch-size"),
        ("--batch-size -4", "--batch-size"),
        ("--data-dir /nowhere", "--data-dir /nowhere"),
        ("--dataset folder", "--data-dir"),
        ("--dataset patterns --data-dir x", "--data-dir"),
        ("--recipe huge", "--recipe"),
        ("--lr 3", "--lr"),
        ("--epochs 0", "--epochs"),
        ("--precision fp16", "--precision fp16"),
        ("--arch vgg", "--arch vgg"),
        ("--init /nowhere.pt", "/nowhere.pt"),
        ("--init {bad}", "not a file of weights"),
        ("--init {other}", "--init"),
        ("--mean 0 0", "--mean"),
        ("--std 0 1 1", "--std"),
        ("--crop-min-scale 1.5", "--crop-min-scale"),
        ("--tensorboard", "--tensorboard"),
    ],
)
def test_wrong_use_is_answered_in_one_line_with_exit_code_2(line, named, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.pt").write_text("text")
    torch.save({"conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pt")  # with the small stem
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    line = line.format(bad=tmp_path / "bad.pt", other=tmp_path / "other.pt")
    vicreg = module("vicreg")
    with pytest.raises(SystemExit) as end:
        flags = f"--max-steps 1 --run-dir {tmp_path / 'run'} {line}".split()
        vicreg.main(common.parse_args(vicreg.Args, vicreg.RECIPES, flags))
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert named in said and said.count("\n") == 1 and "Traceback" not in said


def refused(line: str) -> tuple[int | None, str]:
    """What a rank answers to a command line: (exit code, all that it says)."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        common.start_processes()
        module("vicreg").main(common.parse_args(module("vicreg").Args, module("vicreg").RECIPES, line.split()))
    return end.value.code, said.getvalue()


def test_wrong_use_on_several_processes_is_answered_by_the_first(tmp_path):
    usual = f"--data-dir {small_folder()} --run-dir {tmp_path}"
    cases = {"--batch-size 9": "not divisible by the 2 processes", "--batch-size 2": "two images per process"}
    cases |= {
        "--seeed 1": "--seeed",
        "--init /nowhere.pt": "/nowhere.pt",
        "--overwrite --run-dir /dev/null": "--run-dir",
    }
    for answers, named in zip(
        run_on(2, [(refused, (f"{usual} {line}",)) for line in cases]), cases.values(), strict=True
    ):
        assert [code for code, _ in answers] == [2, 2]
        assert named in answers[0][1] and answers[0][1].count("\n") == 1 and answers[1][1] == ""


def test_under_torchrun_too(tmp_path):
    done = run([*command("vicreg", tmp_path, processes=2), "--batch-size", "9"])
    own = [text for text in done.stderr.splitlines() if "vicreg.py: error" in text]
    assert done.returncode != 0 and len(own) == 1 and "not divisible by the 2 processes" in own[0]
    assert 'vicreg.py", line' not in done.stderr, "no traceback of ours"


# ------------------------------------------------------------------------------------- photographs, odd folders


def test_photographs_without_classes_of_all_sizes(tmp_path, capsys):
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(9):
        pixels = random.integers(0, 256, (30 + 5 * i, 50 - 3 * i, 3)).astype(np.uint8)
        Image.fromarray(pixels).convert("L" if i % 3 else "RGB").save(tmp_path / "photos" / f"{i}.jpg")
    vicreg = module("vicreg")
    line = f"--data-dir {tmp_path / 'photos'} --epochs 2 --workers 1 --run-dir {tmp_path / 'run'}"
    vicreg.main(common.parse_args(vicreg.Args, vicreg.RECIPES, line.split()))
    out = capsys.readouterr().out
    assert (
        "9 decoded by workers (1 per process)" in out
        and re.search(r"batch +8 ", out)
        and "no labelled test split" in out
    )
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2]
