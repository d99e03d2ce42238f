"""Impossible flags: one line that names the flag, exit code 2, and nothing written. Output that cannot be written."""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import methods
import pytest
import torch
from methods import METHODS, ROOT, command, module, tiny

import common
import evaluate

# (method, flags, what the line has to name; the first flag, if nothing is said)
IMPOSSIBLE = [
    ("simclr", {"temperature": 0.0}, ""),
    ("simclr", {"projector_hidden": 0}, ""),
    ("simclr", {"projector_dim": 0}, ""),
    ("simclr", {"jitter_strength": -1.0}, ""),
    ("vicreg", {"std_coeff": -1.0}, ""),
    ("vicreg", {"cov_coeff": math.nan}, ""),
    ("vicreg", {"expander_dim": 0}, ""),
    ("barlow", {"lambd": -1.0}, ""),
    ("barlow", {"base_lr_biases": -1.0}, ""),
    ("barlow", {"base_lr": 0.0}, ""),
    ("barlow", {"projector_hidden": -1}, ""),
    ("barlow", {"projector_dim": -1}, ""),
    ("byol", {"base_tau": 1.5}, ""),
    ("byol", {"base_tau": math.nan}, ""),
    ("byol", {"projector_dim": 0}, ""),
    ("byol", {"std_coeff": -1.0}, ""),
    ("byol", {"predictor_lr_factor": 0.0}, ""),
    ("byol", {"cov_coeff": math.nan}, ""),
    ("simsiam", {"projector_layers": 4}, ""),
    ("simsiam", {"projector_dim": 3}, ""),
    ("simsiam", {"std_coeff": -1.0}, ""),
    ("simsiam", {"cov_coeff": math.nan}, ""),
    ("simsiam", {"predictor_lr_factor": 0.0}, ""),
    ("swav", {"prototypes": 1}, "--prototypes 1"),
    ("swav", {"prototypes": 0}, "--prototypes 0"),
    ("swav", {"small_crops": 17}, "--small-crops 17"),
    ("swav", {"small_crops": -1}, "--small-crops -1"),
    ("swav", {"small_size": 17}, "--small-size 17"),
    ("swav", {"small_size": 0}, "--small-size 0"),
    ("swav", {"small_scale": (0.4, 0.1)}, ""),
    ("swav", {"small_scale": (0.0, 0.1)}, ""),
    ("swav", {"temperature": 0.0}, ""),
    ("swav", {"epsilon": -0.1}, ""),
    ("swav", {"sinkhorn_iterations": 0}, ""),
    ("swav", {"queue_length": 24}, "--queue-length 24 is no multiple of --batch-size 16; take 16"),
    ("swav", {"queue_length": 80}, "--queue-length 80"),
    ("swav", {"queue_length": -16}, "--queue-length -16"),
    ("swav", {"freeze_prototypes_epochs": -1.0}, ""),
    ("swav", {"queue_start_epoch": -5}, ""),
    ("swav", {"queue_start_epoch": 3}, "would never fill"),
    ("moco", {"key_momentum": 1.5}, ""),
    ("moco", {"key_momentum": -0.1}, ""),
    ("moco", {"key_momentum": math.nan}, ""),
    ("moco", {"key_momentum_end": 1.5}, ""),
    ("moco", {"head_hidden": -1}, ""),
    ("moco", {"temperature": -1.0}, ""),
    ("moco", {"head_dim": 0}, ""),
    ("simclr", {"temperature": 1e-45}, "--temperature must be at least 0.0001, not 1e-45"),
    ("moco", {"temperature": 1e-45}, "--temperature must be at least 0.0001, not 1e-45"),
    ("swav", {"temperature": 1e-45}, "--temperature must be at least 0.0001, not 1e-45"),
    ("swav", {"epsilon": 1e-45}, "--epsilon must be at least 0.0001, not 1e-45"),
    ("swav", {"sinkhorn_iterations": 10**18}, ""),
    ("swav", {"freeze_prototypes_epochs": math.inf}, "--freeze-prototypes-epochs must be finite, not inf"),
    ("byol", {"warmup_epochs": math.inf}, "--warmup-epochs must be finite, not inf"),
    ("barlow", {"weight_decay": math.inf}, "--weight-decay must be finite, not inf"),
    ("simsiam", {"mean": (0.5, math.nan, 0.5)}, "--mean must be finite, not nan"),
    ("vicreg", {"std": (0.5, 0.5, 1e-300)}, "--std must be at least 1e-6, not 1e-300"),
    ("vicreg", {"base_lr": 1e300}, "--base-lr must be between"),
    ("vicreg", {"seed": 2**64}, "--seed must be between"),
    ("vicreg", {"seed": -1}, ""),
    ("vicreg", {"image_size": 10**9}, ""),
    ("vicreg", {"workers": 10**6}, ""),
    ("vicreg", {"batch_size": 10**18}, ""),
    *[
        (method, {field.name: 10**12}, "")
        for method in METHODS
        for field in dataclasses.fields(module(method).Args)
        if field.name.endswith(("_dim", "_hidden")) or field.name == "prototypes"
    ],
]


@pytest.mark.parametrize("method, flags, named", IMPOSSIBLE, ids=[f"{case[0]} {case[1]}" for case in IMPOSSIBLE])
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(method, flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        methods.module(method).main(methods.tiny(method, tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert (named or "--" + next(iter(flags)).replace("_", "-") + " ") in said
    assert not (tmp_path / "run").exists()


def test_every_method_is_among_them():
    assert {method for method, _, _ in IMPOSSIBLE} == set(methods.METHODS)


def test_small_crop_flags_do_not_matter_without_small_crops():
    swav = methods.module("swav")
    swav.check(swav.Args(batch_size=16, image_size=8, small_crops=0), 64)


@pytest.mark.parametrize("flag, value", [("mean", (math.nan, 0, 0)), ("std", (1, 1, math.inf)), ("lr", math.nan)])
def test_evaluate_refuses_what_is_no_number(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(evaluate.Args("nowhere", **{flag: value}))
    assert end.value.code == 2 and f"--{flag} must be finite" in capsys.readouterr().err


def test_numbers_of_steps_and_epochs_may_be_as_large_as_one_likes(tmp_path):
    large = dict.fromkeys(["epochs", "log_every", "eval_every", "save_every", "train_limit", "seed"], 10**18)
    module("vicreg").main(tiny("vicreg", tmp_path, **large | {"max_steps": 1, "warmup_epochs": 1e18}))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 1


# -------------------------------------------------------------------------------- output that cannot be written


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What became of commands that all start at once: exit code, stdout, stderr and the run folder of each."""
    folder = tmp_path_factory.mktemp("runs")
    strange = os.fsdecode(os.fsencode(folder / "name") + b"\xff")  # not UTF-8
    reader, broken = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        cases = {  # (where its output goes, its run folder, more flags)
            "full": (full, str(folder / "full"), []),
            "broken": (broken, str(folder / "broken"), []),
            "closed": (None, str(folder / "closed"), []),
            "named": (subprocess.PIPE, strange, []),
            "help": (subprocess.PIPE, str(folder / "help"), ["--help"]),
            "large": (subprocess.PIPE, str(folder / "large"), ["--image-size", "4096", "--batch-size", "64"]),
        }
        started = {}
        for name, (stdout, run_dir, more) in cases.items():
            line = [*command("vicreg", run_dir, max_steps=1), *more]
            environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "CUDA_VISIBLE_DEVICES": ""}
            if name == "closed":
                line = ["sh", "-c", 'exec "$@" >&-', "sh", *line]
            options = {"preexec_fn": limit_memory} if name == "large" else {}
            started[name] = subprocess.Popen(
                line, stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT, env=environment, **options
            )
    os.close(broken)
    yield {name: (*process.communicate(timeout=300), process.returncode, Path(cases[name][1]))
           for name, process in started.items()}  # fmt: skip


@pytest.mark.parametrize("name, why", [("full", "No space left"), ("broken", "Broken pipe"), ("closed", "")])
def test_training_goes_on_where_its_output_cannot_be_written(name, why, done):
    _, said, code, folder = done[name]
    assert code == 0, said
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
    assert not said if not why else said.startswith(b"warning: ") and said.count(b"\n") == 1 and why in said.decode()


def test_names_and_help_are_printed_in_any_encoding(done):
    out, said, code, folder = done["named"]
    assert (code, said) == (0, b"") and rb"name\udcff" in out and (folder / "encoder.pt").exists()
    out, said, code, _ = done["help"]
    assert (code, said) == (0, b"") and b"--expander-dim" in out


def test_too_little_memory_is_said_in_one_line(done):
    _, said, code, _ = done["large"]
    assert code == 1 and said.count(b"\n") == 1 and said.startswith(b"error: out of memory (")
    assert b"--batch-size" in said and b"--image-size" in said


@pytest.mark.parametrize(
    "error, size",
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000, 1000000)"), "7.28 TiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.00 GiB"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."), "64 bytes"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), ""),
        (RuntimeError("std::bad_alloc"), ""),
    ],
)
def test_every_way_to_say_that_memory_ran_out_is_known(error, size, capsys):
    common.excepthook(type(error), error, None)
    said = capsys.readouterr().err
    assert said.startswith(f"error: out of memory{f' ({size} more' if size else ';'}") and said.count("\n") == 1


def test_other_errors_keep_their_traceback(capsys):
    try:
        raise RuntimeError("shapes do not fit")
    except RuntimeError:
        common.excepthook(*sys.exc_info())
    said = capsys.readouterr().err
    assert "Traceback" in said and "in test_other_errors" in said and "shapes do not fit" in said


def test_a_stream_that_was_closed_is_left_alone(monkeypatch, capsys):
    with open(os.devnull, "w") as closed:
        pass
    monkeypatch.setattr(sys, "stdout", closed)
    common.say("one")
    common.say("two")
    monkeypatch.setattr(sys, "stderr", closed)
    common.warn("three")
    common.warn("four")
