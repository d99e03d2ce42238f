"""The recipes, and the flags that bring published settings into them."""

import math

import numpy as np
import pytest
import quick
import torch
from methods import METHODS, SMALL, module
from PIL import Image

import barlow
import common
import evaluate
import moco
import swav
import vicreg

close = torch.testing.assert_close
LITTLE = {"image_size": 16, "batch_size": 8, "epochs": 2, "warmup_epochs": 1}


@pytest.mark.parametrize("recipe", ["quick", "cifar", "imagenet"])
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_is_possible(method, recipe):
    file = module(method)
    args = common.parse_args(file.Args, file.RECIPES, ["--recipe", recipe, "--data-dir", "x"])
    common.check_flags(args)
    images = {"quick": 5000, "cifar": 50_000, "imagenet": 1_281_167}[recipe]
    file.check(*[args, images][: file.check.__code__.co_argcount])


@pytest.mark.parametrize("method", METHODS)
def test_larc_is_clipped_lars_in_every_method(method, tmp_path, monkeypatch):
    file = module(method)
    args = file.Args(**{**SMALL[method], **LITTLE}, optimizer="larc", weight_decay=1e-4)
    groups = quick.trainer(file, args, 64, tmp_path, monkeypatch)(max_steps=2)["optimizer"]["param_groups"]
    assert all((group["clip"], group["eta"]) == (True, 0.02) for group in groups)
    assert groups[0]["adapt"] and groups[0]["weight_decay"] == 1e-4


@pytest.mark.parametrize("symmetric, want", [(False, [(1.0, 0.0), (0.1, 0.2)]), (True, [(0.5, 0.1), (0.5, 0.1)])])
def test_views_of_vicreg_are_those_of_its_code_or_of_its_paper(symmetric, want, tmp_path, monkeypatch):
    views = []

    def augment(x, draws, args, blur, solarization, augment=vicreg.augment):
        views.append((blur, solarization))
        return augment(x, draws, args, blur, solarization)

    monkeypatch.setattr(vicreg, "augment", augment)
    args = vicreg.Args(**SMALL["vicreg"], **LITTLE, symmetric_views=symmetric)
    quick.trainer(vicreg, args, 16, tmp_path, monkeypatch)(max_steps=1)
    assert views == want


def test_half_of_barlows_loss_at_twice_the_rate_is_the_same_without_lars(tmp_path, monkeypatch):
    args = barlow.Args(**SMALL["barlow"], **LITTLE, precision="fp64", optimizer="sgd", base_lr=1e-3, weight_decay=0.0)
    train = quick.trainer(barlow, args, 32, tmp_path, monkeypatch)
    once, half = train("once"), train("half", base_lr=2e-3, base_lr_biases=0.02, loss_scale=0.5)
    for name, weight in once["model"].items():
        close(half["model"][name], weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("end", [0.0, 0.5])
def test_the_momentum_of_mocos_keys_goes_along_half_a_cosine_to_its_end(end, tmp_path, monkeypatch):
    momenta = []

    def spy(key, query, m, update=moco.momentum_update):
        momenta.append(m)
        update(key, query, m)

    monkeypatch.setattr(moco, "momentum_update", spy)
    args = moco.Args(**{**SMALL["moco"], **LITTLE}, key_momentum=0.9, key_momentum_end=end)
    quick.trainer(moco, args, 32, tmp_path, monkeypatch)()
    last = end or 0.9
    assert momenta == pytest.approx([last + (0.9 - last) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])


def test_the_head_of_moco_is_as_wide_as_the_features_or_as_the_flag_says():
    for hidden, want in ((0, 512), (24, 24)):
        head = moco.MoCo(moco.Args(head_hidden=hidden, head_dim=16)).head
        assert [tuple(layer.weight.shape) for layer in (head[0], head[2])] == [(want, 512), (16, want)]


def test_without_adapt_all_biases_and_batchnorm_of_swav_are_neither_adapted_nor_decayed(tmp_path, monkeypatch):
    args = swav.Args(**{**SMALL["swav"], **LITTLE}, adapt_all=False)
    train = quick.trainer(swav, args, 64, tmp_path, monkeypatch)
    # The learning rate of the first step is 0, so the second has the same gradients with and without decay.
    saved = [train(str(decay), max_steps=2, weight_decay=decay) for decay in (0.0, 0.5)]
    assert [group["adapt"] for group in saved[1]["optimizer"]["param_groups"]] == [True, False]
    for name, weight in saved[0]["model"].items():
        frozen = name == "prototypes.weight"
        assert torch.equal(weight, saved[1]["model"][name]) == (weight.ndim < 2 or frozen), name


def test_full_decode_reaches_every_image_of_a_run_and_of_its_evaluation(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for split, name in ((split, f"{kind}/{i}.jpg") for split in ("train", "val") for kind in "ab" for i in range(4)):
        file = tmp_path / split / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (300, 280, 3), dtype=np.uint8)).save(file)
    flags = {"data_dir": str(tmp_path), "dataset": "folder", "workers": 0, "image_size": 32, "batch_size": 4}
    asked = []

    def decode_crops(image, boxes, crops, full_decode, decode=common.decode_crops):
        asked.append(full_decode)
        return decode(image, boxes, crops, full_decode)

    monkeypatch.setattr(common, "decode_crops", decode_crops)
    for full in (False, True):
        run = str(tmp_path / f"run{full}")
        vicreg.main(vicreg.Args(**SMALL["vicreg"], **flags, epochs=1, run_dir=run, full_decode=full))
        evaluate.main(evaluate.Args(run, k=3, workers=0))
        assert len(asked) == 8 + 16 + 16 + 16 and set(asked) == {full}, "training, online kNN twice, evaluation"
        asked.clear()
