"""What a run's folder promises: one run at a time, the same images, nothing deleted that is not the run's."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from methods import at_step, command, metrics, module, small_folder, tiny
from PIL import Image
from worlds import run_on

import common


def refused(*arguments, **flags) -> str:
    """The one line with which a run of VICReg is refused."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        module("vicreg").main(tiny("vicreg", *arguments, **flags))
    assert end.value.code == 2 and said.getvalue().count("\n") == 1, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("begun")
    module("vicreg").main(tiny("vicreg", folder, max_steps=2))
    return folder


@pytest.fixture
def copy(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------ one at a time


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """24 images of many sizes, which loader workers decode."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(24):
        Image.effect_noise((20 + i, 24), 60).convert("RGB").save(root / f"{i}.jpg")
    return root


def test_a_folder_in_use_is_refused_to_a_second_run_also_to_one_that_would_overwrite_it(mixed, tmp_path):
    """The first is stopped in the middle of a run. Killed, it leaves no lock behind, although its workers live on."""
    flags = {"data_dir": str(mixed), "batch_size": 8, "epochs": 500, "eval_every": 500, "save_every": 500, "workers": 1}
    first = subprocess.Popen(command("vicreg", tmp_path / "run", **flags), stdout=subprocess.PIPE, text=True)
    try:
        assert any(at_step(line) == 3 for line in first.stdout)
        first.send_signal(signal.SIGSTOP)
        kept, before = (tmp_path / "run" / "args.json").read_text(), metrics(tmp_path / "run")
        for changed in ({}, {"overwrite": True, "base_lr": 1.0}):
            assert "in use" in refused(tmp_path / "run", **flags, max_steps=1, **changed)
        assert (tmp_path / "run" / "args.json").read_text() == kept and metrics(tmp_path / "run") == before
    finally:
        first.kill()
        first.wait()  # not for the workers
        first.stdout.close()
    module("vicreg").main(tiny("vicreg", tmp_path / "run", **flags, max_steps=1))


def two_writers(file: str) -> list[int]:
    """This rank writes the same file as the other one, and reads what is there: how long it is each time."""
    sizes = []
    for _ in range(50):
        common.atomic_save(Path(file), {"x": torch.zeros(1000)})
        sizes.append(len(torch.load(file, weights_only=True)["x"]))
    return sizes


def test_a_file_that_two_processes_write_can_always_be_read(tmp_path):
    assert run_on(2, [(two_writers, (str(tmp_path / "file.pt"),))])[0] == [[1000] * 50] * 2
    assert [file.name for file in tmp_path.iterdir()] == ["file.pt"]


def test_what_a_killed_run_left_half_written_is_cleared_away(copy):
    left = [copy / "checkpoint.pt.0123abcd.tmp", copy / "encoder.pt.tmp"]
    foreign = copy / "notes.tmp"
    for file in (*left, foreign):
        file.write_text("half")
    module("vicreg").main(tiny("vicreg", copy, max_steps=3))
    assert foreign.exists() and not any(file.exists() for file in left)


# ------------------------------------------------------------------------------------------------- signals


def test_sigterm_saves_although_it_reaches_the_loader_workers_too(mixed, tmp_path):
    """`timeout` and torchrun send it to every process of the run, and so do batch systems."""
    flags = {"data_dir": mixed, "batch_size": 8, "epochs": 5000, "save_every": 5000, "eval_every": 5000, "workers": 2}
    alone, inside, both = (
        command("vicreg", tmp_path / name, processes, **flags)
        for name, processes in (("group", 1), ("timeout", 1), ("torchrun", 2))
    )
    lines = {"group": alone, "timeout": ["timeout", "1000", *inside], "torchrun": both}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    processes = {name: subprocess.Popen(line, **pipes) for name, line in lines.items()}
    try:
        for name, process in processes.items():
            assert any(at_step(text) == 3 for text in process.stdout)
            (os.killpg if name == "group" else os.kill)(process.pid, signal.SIGTERM)
            out, err = process.communicate(timeout=60)
            step = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["step"]
            assert step >= 3 and f"saved after step {step}" in out and "killed by signal" not in err
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


# --------------------------------------------------------------------------------------- another run, other images


def test_other_images_are_told_from_the_same_ones(copy, tmp_path):
    """As many images: with other names of classes, with other names of files. The same elsewhere are the same."""
    images = Path(shutil.copytree(small_folder(), tmp_path / "images"))
    module("vicreg").main(tiny("vicreg", copy, max_steps=3, data_dir=str(images)))
    (images / "train" / "b").rename(images / "train" / "e")
    shutil.rmtree(images / "test")
    assert "other classes" in refused(copy, data_dir=str(images))
    (images / "train" / "e").rename(images / "train" / "b")
    file = next((images / "train" / "b").iterdir())
    file.rename(file.with_name("renamed.png"))
    assert "other file names" in refused(copy, data_dir=str(images))


def test_fewer_images_are_named_where_the_default_batch_has_shrunk_with_them(tmp_path):
    images = Path(shutil.copytree(small_folder(), tmp_path / "images"))
    flags = {"data_dir": str(images), "batch_size": module("vicreg").Args().batch_size}
    module("vicreg").main(tiny("vicreg", tmp_path / "run", max_steps=1, **flags))
    shutil.rmtree(images / "train" / "a")
    shutil.rmtree(images / "test")
    said = refused(tmp_path / "run", **flags)
    assert "64 images" in said and "48" in said and "--batch-size" not in said


def test_another_methods_folder_is_called_that(copy):
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        module("simclr").main(tiny("simclr", copy))
    assert "holds a run of vicreg, not of simclr" in said.getvalue() and "was" not in said.getvalue()


@pytest.mark.parametrize(
    "content, told",
    [(b"", "Expecting value"), (b'{"epochs": 3', "delimiter"), (b"[1]", "indices"), (b'{"lr": 3}', "image_size")],
    ids=["empty", "cut", "a list", "somebody else's"],
)
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}], ids=["continued", "overwritten"])
def test_flags_that_are_not_a_runs_are_refused(content, told, flags, copy):
    (copy / "args.json").write_bytes(content)
    said = refused(copy, **flags)
    assert "args.json" in said and told in said and (copy / "checkpoint.pt").exists()


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"[]\n", b"7\n", b'{"step": \n'])
def test_a_damaged_line_of_metrics_is_named(line, copy):
    file = copy / "metrics.jsonl"
    good = file.read_bytes()
    file.write_bytes(line + good[len(line) :] if len(line) < good.index(b"\n") else line)
    first, rest = good.split(b"\n", 1)
    file.write_bytes(line + rest)
    assert "metrics.jsonl: line 1" in refused(copy)


def spoiled(folder: Path, change) -> None:
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(change(saved) or saved, folder / "checkpoint.pt")


VERSIONS = {
    "not a dictionary": (lambda saved: [1, 2], True),
    "without its step": (lambda saved: saved.pop("step") and None, True),
    "without an optimizer": (lambda saved: saved.pop("optimizer") and None, False),
    "a renamed layer": (lambda saved: saved["model"].update(new=saved["model"].pop("expander.0.weight")), False),
    "another shape": (lambda saved: saved["model"].update({"expander.0.weight": torch.zeros(2, 2)}), False),
    "other groups": (lambda saved: saved["optimizer"]["param_groups"].pop() and None, False),
}


@pytest.mark.parametrize("change, helped", VERSIONS.values(), ids=VERSIONS)
def test_a_checkpoint_of_another_version_is_named_and_the_one_before_it_is_tried(change, helped, copy, capsys):
    shutil.copy(copy / "checkpoint.pt", copy / "checkpoint.previous.pt")
    spoiled(copy, change)
    if helped:
        module("vicreg").main(tiny("vicreg", copy, max_steps=3))
        told = capsys.readouterr()
        assert "checkpoint.pt cannot be read" in told.err and "continuing after step 2" in told.out
    else:
        assert "checkpoint in" in (said := refused(copy)) and "version" in said


def test_overwrite_deletes_nothing_in_a_folder_that_holds_no_run(tmp_path):
    for name in ("encoder.pt", "diagnose.txt", "labels-mine.json"):
        (tmp_path / name).write_text("mine")
    assert "holds no run" in refused(tmp_path, overwrite=True)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(
        ("encoder.pt", "diagnose.txt", "labels-mine.json"), "mine"
    )


def test_a_name_in_results_does_not_lead_out_of_the_folder(copy, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    (copy / "results.jsonl").write_text(json.dumps({"files": ["../mine.txt"]}) + '\n{"files": ["cut')
    module("vicreg").main(tiny("vicreg", copy, max_steps=1, overwrite=True))
    assert (tmp_path / "mine.txt").exists() and not (copy / "results.jsonl").exists()


def test_folders_have_names_of_their_own_and_a_slash_at_the_end_changes_none(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def name(data_dir: str) -> str:
        vicreg = module("vicreg")
        args = vicreg.Args(dataset="folder", data_dir=data_dir)
        return common.default_run_dir("vicreg", args, vicreg.RECIPES)

    assert len({name(folder) for folder in ("p/q", "p_q", "p%2Fq", "/p/q", "p q")}) == 5
    assert name("p/q/") == name("p/q") == name("./p//q") and "/" not in name("p/q")[len("runs/") :]


def test_a_world_size_without_torchrun_is_explained(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        common.start_processes()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "torchrun" in said
