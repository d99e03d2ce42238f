"""evaluate.py where something is wrong: no result is lost, none is made up, and every fault is told in one line."""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from methods import ROOT, small_folder, tiny
from PIL import Image
from worlds import run_on

import common
import evaluate
from evaluate import Args

PLOTS = all(importlib.util.find_spec(name) for name in ("matplotlib", "sklearn"))

PROTOCOLS = {
    "knn": {"k": 5},
    "linear": {"epochs": 2},
    "linear augmented": {"epochs": 1, "augment": True},
    "finetune": {"epochs": 1},
    "diagnose": {},
    "cluster": {},
    "tsne": {"classes": 3},
}


def encoder(change: Callable[[torch.Tensor], Any] = lambda weight: None) -> dict[str, torch.Tensor]:
    """An untrained resnet10, once `change` has been at its last convolution."""
    torch.manual_seed(0)
    state = common.backbone("resnet10", "imagenet", zero_init=False)[0].state_dict()
    change(state["layer4.0.conv2.weight"])
    return state


def run_folder(folder: Path, weights: Any = None) -> Path:
    """A folder as a run leaves it."""
    folder.mkdir(exist_ok=True)
    torch.save(encoder() if weights is None else weights, folder / "encoder.pt")
    (folder / "args.json").write_text(json.dumps(dataclasses.asdict(tiny("vicreg", folder))))
    return folder


def judge(weights: Path, protocol: str, **flags) -> dict[str, Any]:
    if protocol in ("tsne", "diagnose", "cluster") and not PLOTS:
        pytest.skip("needs matplotlib and scikit-learn")
    return evaluate.main(Args(str(weights), protocol=protocol.split()[0], **{**PROTOCOLS[protocol], **flags}))


def refused(capsys, code: int, *named: str) -> Callable:
    """Expect the program's end with that exit code, after one line, which has the words `named`."""

    @contextlib.contextmanager
    def expect():
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            yield
        out, err = capsys.readouterr()
        told = ("step ", "warning: --data-dir")  # of progress and of the images
        lines = [line for line in err.splitlines() if not line.startswith(told)]
        assert end.value.code == code and "{" not in out, (end.value.code, out, err)
        assert len(lines) == 1 and all(word in lines[0] for word in named), err

    return expect()


def results(folder: Path) -> list[dict[str, Any]]:
    def not_json(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=not_json) for line in (folder / "results.jsonl").read_text().splitlines()]


def in_a_child(action: Callable[[], Any], log: Path) -> int:
    """Fork; the child writes what it prints to `log`.out and .err, and exits as a program would. Its process id."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(f"{log}.out", "w") as sys.stdout, open(f"{log}.err", "w") as sys.stderr:
                try:
                    action()
                    code = 0
                except SystemExit as end:
                    code = end.code
                except BaseException as error:
                    print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ------------------------------------------------------------------------------------ results that are not lost


def fill_the_disk(monkeypatch, size: int) -> None:
    """From the moment at which a result is kept, no file can grow beyond so many bytes."""
    keep, (soft, hard) = evaluate.keep, resource.getrlimit(resource.RLIMIT_FSIZE)

    def keep_little(*arguments) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            keep(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(evaluate, "keep", keep_little)


@pytest.mark.parametrize(
    "protocol, too_large", [("finetune", "finetuned.pt"), ("tsne", "tsne.png"), ("diagnose", "diagnose.png")]
)
def test_what_a_full_disk_has_no_room_for_is_told_and_not_named_in_the_results(
    protocol, too_large, tmp_path, monkeypatch, capsys
):
    folder = run_folder(tmp_path / "run")
    before = {file.name for file in folder.iterdir()}
    fill_the_disk(monkeypatch, 4000)
    with pytest.raises(SystemExit) as end:
        judge(folder, protocol, train_fraction=0.5)
    out, err = capsys.readouterr()
    printed, (kept,) = json.loads(out.splitlines()[-1]), results(folder)
    assert end.value.code == 1 and err.splitlines()[-1].startswith("error: ")
    assert sum("error: " in line and str(folder / too_large) in line for line in err.splitlines()) == 1, err
    assert too_large in printed["files"] and "labels-" in printed["files"][0]
    assert kept["files"] == [name for name in printed["files"] if name not in (too_large, "diagnose.json")]
    assert {file.name for file in folder.iterdir()} - before == {"results.jsonl", *kept["files"]}
    assert {**printed, "files": []} == {**kept, "files": []}


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_with_no_room_at_all_the_result_is_printed_and_the_next_one_is_kept(protocol, tmp_path, monkeypatch, capsys):
    folder = run_folder(tmp_path / "run")
    with monkeypatch.context() as patch:
        fill_the_disk(patch, 100)
        with pytest.raises(SystemExit) as end:
            judge(folder, protocol, train_fraction=0.5)
    out, err = capsys.readouterr()
    assert end.value.code == 1 and 0 <= json.loads(out.splitlines()[-1])["top1"] <= 1
    assert err.count("\n") == err.count("error: ") == 1 and "labels-" in err and "results.jsonl" in err
    record = judge(folder, protocol)
    assert results(folder) == [json.loads(json.dumps(record))]


@pytest.mark.parametrize("obstacle", ["finetuned.pt", "results.jsonl"])
def test_a_file_that_cannot_be_written_costs_only_itself(obstacle, tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    (folder / obstacle).mkdir()
    with pytest.raises(SystemExit) as end:
        judge(folder, "finetune")
    out, err = capsys.readouterr()
    assert end.value.code == 1 and 0 <= json.loads(out.splitlines()[-1])["top1"] <= 1
    assert err.count("error: ") == 1 and str(folder / obstacle) in err.splitlines()[-1]
    if obstacle == "results.jsonl":
        assert (folder / "finetuned.pt").is_file()
    else:
        assert results(folder)[0]["files"] == []


def test_a_result_that_cannot_be_printed_is_kept(tmp_path):
    folder = run_folder(tmp_path / "run")
    line = [sys.executable, str(ROOT / "evaluate.py"), str(folder), "--k", "5"]
    reader, pipe = os.pipe()
    os.close(reader)
    done = subprocess.run(line, stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=300)
    os.close(pipe)
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "printed" in done.stderr, done.stderr
    assert 0 <= results(folder)[0]["top1"] <= 1


def test_evaluations_beside_each_other_all_have_a_result(tmp_path, monkeypatch):
    """Three write their network at the same time: each waits, before it is in its place, until all have written it."""
    folder, barrier, fsync = run_folder(tmp_path / "run"), multiprocessing.get_context("fork").Barrier(3), os.fsync

    def wait_and_fsync(handle: int) -> None:
        barrier.wait(timeout=60)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", wait_and_fsync)
    logs = [tmp_path / f"child{i}" for i in range(3)]
    children = [in_a_child(lambda: judge(folder, "finetune"), log) for log in logs]
    assert [ended(child) for child in children] == [0, 0, 0], [Path(f"{log}.err").read_text() for log in logs]
    printed = [json.loads(Path(f"{log}.out").read_text().splitlines()[-1]) for log in logs]
    assert results(folder) == printed and printed[0] == printed[1] == printed[2]
    assert {file.name for file in folder.iterdir()} == {"args.json", "encoder.pt", "finetuned.pt", "results.jsonl"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_result_names_the_files_that_came_with_it(protocol, tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    before = {file.name for file in folder.iterdir()}
    record = judge(folder, protocol, train_fraction=0.5)
    assert set(record["files"]) == {file.name for file in folder.iterdir()} - before - {"results.jsonl"}
    assert len(record["files"]) == {"finetune": 2, "tsne": 2, "diagnose": 3}.get(protocol, 1)
    assert results(folder)[0]["files"] == record["files"]


# ------------------------------------------------------------------------------------ numbers that are none


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_features_that_are_not_finite_have_no_accuracy(protocol, value, tmp_path, capsys):
    folder = run_folder(tmp_path / "run", encoder(lambda weight: weight.fill_(value)))
    with refused(capsys, 1, str(folder), "not finite"):
        judge(folder, protocol)
    assert {file.name for file in folder.iterdir()} == {"args.json", "encoder.pt"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_features_that_are_all_the_same_have_a_finite_worth(protocol, tmp_path, capsys):
    state = {name: torch.zeros_like(weight) for name, weight in encoder().items()}
    folder = run_folder(tmp_path / "run", state)
    if protocol == "tsne":  # of which scikit-learn dies
        with refused(capsys, 1, str(folder), "the same"):
            judge(folder, protocol)
        return
    judge(folder, protocol)
    assert all(np.isfinite(value) for value in results(folder)[0].values() if isinstance(value, float))


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 0.0, -1.0, float("nan")])
def test_a_temperature_that_is_too_small_is_refused(temperature, tmp_path, capsys):
    with refused(capsys, 2, "--temperature"):
        judge(run_folder(tmp_path / "run"), "knn", temperature=temperature)


def test_a_number_that_is_none_never_becomes_a_result(tmp_path, monkeypatch, capsys):
    """The last guard, where all others have failed."""
    monkeypatch.setattr(evaluate, "knn_scores", lambda *_: {"top1": float("nan")})
    folder = run_folder(tmp_path / "run")
    with refused(capsys, 1, "not finite"):
        judge(folder, "knn")
    assert not (folder / "results.jsonl").exists()


# ------------------------------------------------------------------------------------ args.json

FOREIGN = {
    "cut": '{"dataset": "folder", "image_si',
    "empty": "",
    "list": "[1, 2]",
    "number": "3",
    "deep": "[" * 100_000,
    "not text": b"\xff\xfe\x00",
    "another program's": '{"dataset": "imagenet", "lr": 0.1}',
    "another program's, like ours": '{"dataset": "imagenet", "data_dir": "x", "image_size": 224, "epochs": 1'
    ', "mean": [0, 0, 0], "std": [1, 1, 1]}',
    "sides": {"image_size": [224, 224]},
    "no side": {"image_size": 0},
    "nan": {"mean": [0.0, 0.0, float("nan")]},
    "zero": {"std": [1.0, 0.0, 1.0]},
    "short": {"std": [1.0]},
    "words": {"std": ["a", "b", "c"]},
    "null": {"mean": None},
}


def spoil(file: Path, content: str | bytes | dict) -> None:
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("content", FOREIGN)
def test_a_run_with_damaged_flags_is_refused_and_a_bare_file_beside_them_is_judged(content, tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    alone = tmp_path / "alone" / "encoder.pt"
    alone.parent.mkdir()
    torch.save(encoder(), alone)
    spoil(folder / "args.json", FOREIGN[content])
    with refused(capsys, 2, str(folder / "args.json")):
        judge(folder, "knn")
    where = {"dataset": "folder", "data_dir": small_folder(), "image_size": 16}
    beside = judge(folder / "encoder.pt", "knn", **where)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: ") and str(folder / "args.json") in err
    assert beside == judge(alone, "knn", **where) | {"weights": str(folder / "encoder.pt")}


def test_flags_that_cannot_be_read_are_refused(tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    (folder / "args.json").unlink()
    (folder / "args.json").mkdir()
    with refused(capsys, 2, str(folder / "args.json")):
        judge(folder, "knn")


def test_flags_of_a_later_version_are_read(tmp_path):
    folder = run_folder(tmp_path / "run")
    spoil(folder / "args.json", {"method": "vicreg", "new": [1]})
    assert common.read_flags(folder / "args.json")["method"] == "vicreg"
    assert judge(folder, "knn")["test_images"] == 40


# ------------------------------------------------------------------------------------ files of weights


class Code:
    def __reduce__(self):
        return os.system, ("true",)


class Unknown:
    pass


def without(name: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: weight for key, weight in encoder().items() if key != name} | more


def with_first(weight: Any) -> dict[str, Any]:
    return {**encoder(), "conv1.weight": weight}


CONTENTS = {
    "code": (lambda: with_first(Code()), ["carries code", ".system"]),
    "an unknown class": (lambda: {**encoder(), "args": Unknown()}, ["carries code", "Unknown"]),
    "a module": (lambda: torch.nn.Linear(1, 1), ["carries code", "Linear"]),
    "a number": (lambda: with_first(3), ["conv1.weight", "int"]),
    "a list": (lambda: with_first([1.0]), ["conv1.weight", "list"]),
    "whole numbers": (lambda: with_first(torch.zeros(64, 3, 7, 7, dtype=torch.int8)), ["conv1.weight", "int8"]),
    "complex numbers": (lambda: with_first(torch.zeros(64, 3, 7, 7, dtype=torch.complex64)), ["conv1.weight"]),
    "sparse": (lambda: with_first(torch.zeros(64, 3, 7, 7).to_sparse()), ["conv1.weight"]),
    "no data": (lambda: with_first(torch.zeros(64, 3, 7, 7, device="meta")), ["conv1.weight"]),
    "no shape": (lambda: with_first(torch.tensor(1.0)), ["resnet10", "conv1.weight"]),
    "an entry less": (lambda: without("layer3.0.bn1.bias"), ["resnet10", "layer3.0.bn1.bias"]),
    "an entry more": (lambda: without("", **{"layer3.0.bn9.bias": torch.ones(1)}), ["resnet10", "layer3.0.bn9.bias"]),
    "a count more": (lambda: without("", **{"layer3.9.num_batches_tracked": torch.ones(1)}), ["layer3.9.num_batches"]),
    "another shape": (lambda: without("", **{"layer3.0.bn1.bias": torch.ones(7)}), ["layer3.0.bn1.bias", "[7]"]),
    "a tensor": (lambda: torch.ones(3), ["conv1.weight"]),
    "numbered": (lambda: {1: torch.ones(3)}, ["conv1.weight"]),
    "a container of nothing": (lambda: {"state_dict": {}}, ["conv1.weight"]),
    "flags": (lambda: argparse.Namespace(arch="resnet18"), ["conv1.weight"]),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_weights_that_do_not_fit_are_refused_in_a_sentence_of_ours(content, tmp_path, capsys):
    make, named = CONTENTS[content]
    file = tmp_path / "weights.pt"
    torch.save(make(), file)
    with refused(capsys, 2, str(file), *named):
        evaluate.main(Args(str(file), dataset="patterns", scratch=True))
    net, _ = common.backbone("resnet10", "imagenet", zero_init=False)
    with refused(capsys, 2, str(file), *(word for word in named if word != "resnet10")):
        common.load_encoder(net, str(file))


@pytest.mark.parametrize(
    "content", ["text", "cut", "pickle", "torchscript", "folder", "no run", "long", "below a file"]
)
def test_what_is_no_file_of_weights_is_refused_in_a_sentence_of_ours(content, tmp_path, capsys, recwarn):
    file = path = tmp_path / "weights.pt"
    if content == "cut":
        torch.save(encoder(), file)
        file.write_bytes(file.read_bytes()[:100_000])
    elif content == "torchscript":
        file.write_bytes(b"")
        with contextlib.suppress(DeprecationWarning, FutureWarning):
            torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)).save(str(file))
    elif content == "folder":
        (file / "encoder.pt").mkdir(parents=True)
    elif content == "no run":
        file.mkdir()
    elif content == "long":
        path = tmp_path / ("x" * 300)
    elif content == "below a file":
        file.write_text("")
        path = file / "x"
    else:
        file.write_bytes({"text": b"texttext", "pickle": b"\x80\x04}\x94."}[content])
    recwarn.clear()
    with refused(capsys, 2, str(path)):
        evaluate.main(Args(str(path), dataset="patterns"))
    with refused(capsys, 2, str(path)):
        common.load_encoder(torch.nn.Identity(), str(path))
    assert not recwarn.list


def test_weights_to_start_from_are_finite(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", encoder(lambda weight: weight.fill_(float("nan"))))
    net, _ = common.backbone("resnet10", "imagenet", zero_init=False)
    with refused(capsys, 2, "--init", str(folder), "layer4.0.conv2.weight"):
        common.load_encoder(net, str(folder))


# ------------------------------------------------------------------------------------ few images, odd names


def images(root: Path, names: list[str], train: int, test: int) -> str:
    """So many training and test images of 16 pixels of each class."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return str(root)


def judge_images(root: str, protocol: str, **flags) -> dict[str, Any]:
    return judge(run_folder(Path(root, ".run")), protocol, **{"dataset": "folder", "data_dir": root, **flags})


@pytest.mark.parametrize(
    "names", [["a$b", "$c^$", "_d"], ["\udcff\udcfe", "\U00010400猫", "x" * 255], ["\n", " ", "\\frac{"]]
)
@pytest.mark.parametrize("protocol", ["tsne", "knn"])
def test_classes_may_have_any_name(protocol, names, tmp_path, capsys, recwarn):
    record = judge_images(images(tmp_path / "im$ages", names, 3, 4), protocol)
    assert record["classes"] == 3 and (protocol == "knn" or sorted(record["shown"]) == sorted(names))
    assert capsys.readouterr().err == "" and not recwarn.list


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("count", [2, 3])
def test_a_handful_of_images_is_judged_or_refused(protocol, count, tmp_path, capsys, recwarn):
    """`count` training images and as many for the test, of two classes."""
    root = images(tmp_path, ["a", "b"], 2, 2)
    for split in ("train", "test"):
        for name in "ab"[: 4 - count]:
            (tmp_path / split / name / "1.png").unlink()
    if protocol == "tsne":
        with refused(capsys, 2, "--protocol tsne"):
            judge_images(root, protocol)
    else:
        judge_images(root, protocol, k=count)
        assert all(np.isfinite(value) for value in results(tmp_path / ".run")[0].values() if isinstance(value, float))
    assert not recwarn.list


@pytest.mark.parametrize("protocol", ["linear", "linear augmented", "finetune", "diagnose"])
def test_one_image_is_too_few_to_learn_from(protocol, tmp_path, capsys):
    with refused(capsys, 2, f"--protocol {protocol.split()[0]}"):
        judge(run_folder(tmp_path / "run"), protocol, train_limit=1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_class_has_no_accuracy(protocol, tmp_path, capsys):
    root = images(tmp_path, ["a"], 4, 4)
    if protocol == "diagnose":
        assert judge_images(root, protocol)["classes"] == 0
        return
    with refused(capsys, 2, root):
        judge_images(root, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_images_may_be_smaller_than_their_views_and_labels_few(protocol, tmp_path):
    flags = {"k": 4} if protocol == "knn" else {}
    record = judge(run_folder(tmp_path / "run"), protocol, image_size=40, train_fraction=1e-9, seed=2**33, **flags)
    assert record["train_images"] == 4 and json.loads((tmp_path / "run" / record["files"][0]).read_text())


# ------------------------------------------------------------------------------------ batches and processes


@pytest.mark.parametrize("protocol", ["linear", "linear augmented", "finetune"])
def test_a_batch_that_is_too_large_is_refused(protocol, tmp_path, capsys):
    with refused(capsys, 2, "--batch-size 65", "64"):
        judge(run_folder(tmp_path / "run"), protocol, batch_size=65)
    assert judge(tmp_path / "run", protocol, batch_size=64)["top1"] >= 0


def told(weights: Path, protocol: str, flags: dict[str, Any]) -> tuple[Any, str]:
    """What one of several processes gives: its top-1 or exit code, and all that it says but for progress."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            result = judge(weights, protocol, precision="fp64", **flags)["top1"]
        except SystemExit as end:
            result = end.code
    return result, "".join(line for line in err.getvalue().splitlines(True) if not line.startswith("step "))


def test_three_processes_train_the_linear_classifier_that_one_trains(tmp_path):
    folder = run_folder(tmp_path / "run")
    alone = judge(folder, "linear", precision="fp64")["top1"]
    (first, second, third), shared = run_on(3, [(told, (folder, name, {})) for name in ("linear", "finetune")])
    assert first == second == third == (alone, "")
    assert [code for code, _ in shared] == [2, 2, 2] and [said.count("\n") for _, said in shared] == [1, 0, 0]
    assert "--batch-size" in shared[0][1]


def test_an_error_on_two_processes_is_told_once(tmp_path):
    nan = run_folder(tmp_path / "nan", encoder(lambda weight: weight.fill_(float("nan"))))
    good, blocked = run_folder(tmp_path / "good"), tmp_path / "blocked"
    (blocked / "results.jsonl").mkdir(parents=True)
    wrong = [(nan, "knn", {}, 1), (nan, "finetune", {}, 1), (good, "knn", {"k": 65}, 2)]
    wrong += [(good, "linear", {"output": str(blocked)}, 1), (good, "knn", {"data_dir": "/nowhere"}, 2)]
    wrong += [(tmp_path / "none", "knn", {}, 2), (good, "finetune", {"lr_head": 1e18, "epochs": 2}, 1)]
    for (*_, code), ranks in zip(wrong, run_on(2, [(told, job[:3]) for job in wrong]), strict=True):
        assert [result for result, _ in ranks] == [code, code]
        assert ranks[0][1].count("\n") == 1 and ranks[1][1] == "", ranks
