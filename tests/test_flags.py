"""Impossible values of the methods' own flags: one line that names the flag, exit code 2, and nothing written."""

import math

import methods
import pytest

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
    ("moco", {"temperature": -1.0}, ""),
    ("moco", {"head_dim": 0}, ""),
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
