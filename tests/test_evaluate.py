"""evaluate.py: accuracies that are known beforehand, independent classifiers, and every protocol as a user runs it."""

import argparse
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from methods import ROOT, run, small_folder, tiny
from worlds import run_on

import common
import evaluate
from evaluate import Args, knn_accuracy, label_subset, linear_probe

PLOTS = all(importlib.util.find_spec(name) for name in ("matplotlib", "sklearn"))


def clusters(count: int, spread: float, classes: int = 5, d: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one far centre per class."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(classes, d, generator=generator)
    y = torch.arange(count) % classes
    return centres[y] + spread * torch.randn(count, d, generator=generator), y


def features_of(image_size: int):
    """(network, images) -> features, with ImageNet's normalisation, in float32."""
    compute, _ = common.compute_in("fp32", torch.device("cpu"))
    return common.Judge(image_size, common.IMAGENET_MEAN, common.IMAGENET_STD, compute, workers=0).features


# ------------------------------------------------------------------------------------------------- classifiers


def test_separable_clusters_are_told_apart():
    x, y = clusters(300, 0.3)
    assert knn_accuracy(x[:200], y[:200], x[200:], y[200:], k=10) == 1
    result = linear_probe(x[:200], y[:200], x[200:], y[200:], epochs=10, batch_size=32)
    assert result["top1"] == 1 and result["top5"] == 1


def test_labels_without_meaning_are_guessed_at_chance():
    x, y = clusters(2000, 0.3)
    y = y[torch.from_numpy(np.random.default_rng(0).permutation(len(y)))]
    # Chance is 0.2; of 500 guesses 99.9 % of the time between 0.14 and 0.26.
    assert 0.14 < knn_accuracy(x[:1500], y[:1500], x[1500:], y[1500:], k=20) < 0.26
    assert 0.14 < linear_probe(x[:1500], y[:1500], x[1500:], y[1500:], epochs=5)["top1"] < 0.26


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_held_out_tenth_finds_a_learning_rate_for_any_scale_of_features(scale):
    x, y = clusters(600, 1.5)
    result = linear_probe(scale * x[:400], y[:400], scale * x[400:], y[400:], epochs=30, batch_size=64)
    assert result["top1"] > 0.95


def test_test_labels_decide_nothing():
    x, y = clusters(400, 3.0)
    honest = linear_probe(x[:300], y[:300], x[300:], y[300:], epochs=5)
    wrong = linear_probe(x[:300], y[:300], x[300:], (y[300:] + 1) % 5, epochs=5)
    choice = ("lr", "weight_decay", "held_out_top1")
    assert [honest[name] for name in choice] == [wrong[name] for name in choice]
    assert wrong["top1"] < 0.5 < honest["top1"]


def test_a_head_is_trained_as_torch_trains_it():
    """Against nn.Linear, cross-entropy, autograd and torch's own SGD, for each head of a grid."""
    x, y = clusters(96, 2.0)
    x = x.double()
    grid = [(0.1, 0.0), (0.5, 1e-2)]
    rows = [torch.arange(start, start + 24) for start in range(0, 96, 24)] * 2
    weight, bias = evaluate.train_heads(((x[r], y[r]) for r in rows), len(rows), 5, grid)
    for head, (lr, decay) in enumerate(grid):
        linear = torch.nn.Linear(12, 5).double()
        torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
        groups = [{"params": [linear.weight], "weight_decay": decay}, {"params": [linear.bias]}]
        sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda s: 0.5 * (1 + np.cos(np.pi * s / len(rows))))
        for r in rows:
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(linear(x[r]), y[r]).backward()
            sgd.step()
            schedule.step()
        torch.testing.assert_close(weight[:, head].T, linear.weight.detach())
        torch.testing.assert_close(bias[head], linear.bias.detach())


@pytest.mark.skipif(not PLOTS, reason="needs scikit-learn")
def test_the_linear_probe_chooses_as_well_as_scikit_learn_within_a_point():
    """On clouds that overlap, as many classes as `patterns` has, so that a wrong optimum would show."""
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 64, generator=generator)
    y, ty = torch.arange(2000) % 10, torch.arange(1000) % 10
    x, tx = (0.1 * (centres[k] + 4 * torch.randn(len(k), 64, generator=generator)).relu() for k in (y, ty))
    ours = linear_probe(x, y, tx, ty)
    best = 0.0
    for c in (0.1, 1.0, 10.0):  # chosen on the same held-out tenth's size
        model = LogisticRegression(C=c, max_iter=1000).fit(x[:1800], y[:1800])
        held_out = model.score(x[1800:], y[1800:])
        if held_out > best:
            best, theirs = held_out, LogisticRegression(C=c, max_iter=1000).fit(x, y).score(tx, ty)
    assert abs(ours["top1"] - theirs) <= 0.01, (ours, theirs)


@pytest.mark.skipif(not PLOTS, reason="needs scikit-learn")
def test_the_linear_probe_finds_the_optimum_of_scikit_learn_within_a_point():
    """The same objective on features of an untrained network, whose means are larger than their spread."""
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    net, _ = common.backbone("resnet10", "imagenet", zero_init=False)
    features = features_of(32)
    (x, y), (tx, ty) = (
        (features(net, data), data.labels) for data in (common.patterns("train", 1000), common.patterns("test", 1000))
    )
    mean, scale = x.mean(0), x.var(0).mean().sqrt()
    for decay in (1e-3, 1e-2):
        ours = linear_probe(x, y, tx, ty, learning_rates=(0.3,), weight_decays=(decay,))["top1"]
        model = LogisticRegression(C=1 / (len(x) * decay), max_iter=3000)
        theirs = model.fit((x - mean) / scale, y).score((tx - mean) / scale, ty)
        assert abs(ours - theirs) <= 0.01, (decay, ours, theirs)


def test_label_subsets_are_balanced_and_belong_to_the_seed():
    labels = torch.arange(1000) % 10
    labels[:50] = -1  # nobody labelled these
    chosen = label_subset(labels, 0.1, seed=0)
    counts = labels[chosen].bincount(minlength=10)
    assert counts.min() >= 9 and counts.max() <= 10 and (labels[chosen] >= 0).all()
    assert torch.equal(chosen, label_subset(labels, 0.1, seed=0))
    assert not torch.equal(chosen, label_subset(labels, 0.1, seed=1))
    assert len(label_subset(labels, 1e-6, seed=0)) == 10, "at least one image of every class"
    assert torch.equal(label_subset(labels, 1.0, seed=0), torch.arange(50, 1000))


# ---------------------------------------------------------------------------------------------- diagnosis


def test_diagnosis_knows_simple_clouds():
    generator = torch.Generator().manual_seed(0)
    round_cloud = torch.randn(4000, 6, generator=generator)
    flat = round_cloud[:, :1] * torch.ones(1, 6)  # every dimension says the same
    numbers, spectra = evaluate.diagnose(round_cloud, flat, (round_cloud, round_cloud))
    assert numbers["train_correlation"] < 0.05 < 0.99 < numbers["test_correlation"] <= 1
    assert numbers["train_covariance"] < 0.05 and numbers["test_covariance"] == pytest.approx(5, rel=0.1)
    assert numbers["test_effective_rank"] == pytest.approx(1, abs=1e-3) and numbers["train_effective_rank"] > 5.9
    assert len(spectra["train"]) == 6 and spectra["train"] == pytest.approx([1] * 6, rel=0.1)
    assert spectra["test"][0] == pytest.approx(6**0.5, rel=0.1) and max(spectra["test"][1:]) < 1e-5
    assert numbers["alignment"] == 0


def test_uniformity_is_lowest_on_the_whole_sphere():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(500, 3, generator=generator)
    narrow = wide + torch.tensor([5.0, 0.0, 0.0])

    def uniformity(x):
        return evaluate.diagnose(x, x, (x, x.roll(1, 0)))[0]["uniformity"]

    assert uniformity(wide) < uniformity(narrow) < 0
    # On the unit sphere in three dimensions the mean over pairs of exp(-2|x - y|²) is (1 - exp(-8)) / 8.
    assert uniformity(wide) == pytest.approx(np.log((1 - np.exp(-8)) / 8), abs=0.02)


# --------------------------------------------------------------------------------------------- weight files


def published(trunk: dict[str, torch.Tensor]) -> dict[str, dict]:
    """The trunk inside files laid out as their authors publish them."""

    def named(prefix: str, weights: dict[str, torch.Tensor] = trunk) -> dict[str, torch.Tensor]:
        return {prefix + name: weight for name, weight in weights.items()}

    other, head = {name: torch.zeros_like(weight) for name, weight in trunk.items()}, torch.zeros(2, 2)
    moco = {**named("module.encoder_k.", other), **named("module.encoder_q."), "module.encoder_q.fc.0.weight": head}
    return {
        "ours, VICReg, Barlow Twins and DINO, backbone only": trunk,
        "torchvision": {**trunk, "fc.weight": head, "fc.bias": head[0]},
        "VICReg": {"epoch": 1, "model": {**named("module.backbone."), "module.projector.0.weight": head}},
        "Barlow Twins": {"model": {**named("module.backbone."), "module.bn.running_mean": head[0]}},
        "SwAV": {**named("module."), "module.projection_head.0.weight": head, "module.prototypes.weight": head},
        "MoCo": {"arch": "resnet18", "state_dict": {**moco, "module.queue": head}},
        "SimSiam": {"state_dict": {**named("module.encoder."), "module.encoder.fc.0.weight": head}},
        "DINO": {"student": named("module.backbone.", other), "teacher": {**named("backbone."), "head.last": head}}
        | {"args": argparse.Namespace(arch="resnet50"), "epoch": 800},
        "compiled": named("_orig_mod."),
    }


@pytest.fixture(scope="module")
def trunk() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    return {name: weight for name, weight in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("source", published({}))
def test_published_files_give_the_right_encoder_and_name_what_is_left_out(source, trunk, tmp_path, capsys):
    torch.save(published(trunk)[source], tmp_path / "weights.pt")
    state = common.read_weights(tmp_path / "weights.pt")
    assert state.keys() == trunk.keys() and all(torch.equal(state[name], trunk[name]) for name in trunk)
    assert evaluate.describe_weights(state, "file") == ("resnet18", "imagenet")
    told = capsys.readouterr().err
    left_out = {"VICReg": "projector", "Barlow Twins": "bn", "SwAV": "projection_head, prototypes"}
    left_out |= {"MoCo": "encoder_k, encoder_q.fc, queue", "SimSiam": "encoder.fc", "DINO": "head"}
    assert told.endswith(f"left out {left_out[source]}\n") if source in left_out else told == ""


def test_old_files_that_do_not_count_batches_are_known(trunk, tmp_path):
    torch.save({name: w for name, w in trunk.items() if "num_batches" not in name}, tmp_path / "weights.pt")
    where = {"dataset": "folder", "data_dir": small_folder(), "image_size": 16, "output": str(tmp_path)}
    assert evaluate.main(Args(str(tmp_path / "weights.pt"), k=5, **where))["arch"] == "resnet18"


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), "w")


@pytest.mark.parametrize("content", ["code", "text", "nothing", "list", "no ResNet", "half"])
def test_files_that_do_not_fit_are_refused_in_one_line(content, trunk, tmp_path, capsys):
    file = tmp_path / "weights.pt"
    if content == "code":
        torch.save({**trunk, "conv1.weight": Code(tmp_path / "proof")}, file)
    elif content in ("text", "nothing"):
        file.write_text("text" * (content == "text"))
    else:
        half = {name: weight for name, weight in trunk.items() if not name.startswith("layer3")}
        torch.save({"list": [1], "no ResNet": {"weight": torch.ones(1)}, "half": half}[content], file)
    with pytest.raises(SystemExit) as end:
        evaluate.main(Args(str(file), dataset="patterns"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and str(file) in said and said.count("\n") == 1
    assert not (tmp_path / "proof").exists()


# ----------------------------------------------------------------------------------------------- whole program


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A tiny run of VICReg, two epochs on 64 images."""
    folder = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    importlib.import_module("vicreg").main(tiny("vicreg", folder, epochs=2))
    return folder


FLAGS = {
    "knn": {"k": 5},
    "linear": {"epochs": 10},
    "linear augmented": {"epochs": 2, "augment": True, "batch_size": 16},
    "finetune": {"epochs": 2, "batch_size": 16},
    "diagnose": {},
    "tsne": {"classes": 3},
} | ({"cluster": {}} if PLOTS else {})
DRAWN = {"tsne", "diagnose"}


def judge(weights: Path, protocol: str, output: str, **flags) -> dict:
    args = Args(str(weights), protocol=protocol.split()[0], output=output, **{**FLAGS[protocol], **flags})
    return evaluate.main(args)


def judge_fp64(weights: Path, protocol: str, output: str) -> dict:
    return judge(weights, protocol, output, precision="fp64")


@pytest.mark.parametrize("protocol", FLAGS)
def test_every_protocol_prints_its_result_and_keeps_it(protocol, trained, tmp_path, capsys):
    if protocol in DRAWN and not PLOTS:
        pytest.skip("needs matplotlib and scikit-learn")
    record = judge(trained, protocol, str(tmp_path), train_fraction=0.5)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [record]
    assert record["train_images"] == 32 and record["test_images"] == 40 and record["classes"] == 4
    subset = tmp_path / f"labels-{Path(small_folder()).name}-0.5-seed0.json"
    assert len(json.loads(subset.read_text())) == 32
    if protocol in DRAWN:
        assert (tmp_path / f"{protocol}.png").stat().st_size > 5000
    if protocol != "tsne":
        numbers = [value for value in record.values() if isinstance(value, float)]
        assert numbers and np.isfinite(numbers).all()
    again = judge(trained, protocol, str(tmp_path), train_fraction=0.5)
    assert again == record, "the same seed gives the same result"
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


NUMBERS = [name for name in FLAGS if name != "tsne"]


@pytest.fixture(scope="module")
def on_two(trained, tmp_path_factory) -> dict[str, list[dict]]:
    """What each protocol gives on both of two processes."""
    folder = str(tmp_path_factory.mktemp("two"))
    return dict(zip(NUMBERS, run_on(2, [(judge_fp64, (trained, name, folder)) for name in NUMBERS]), strict=True))


@pytest.mark.parametrize("protocol", NUMBERS)
def test_two_processes_find_what_one_finds(protocol, trained, on_two, tmp_path):
    alone = judge_fp64(trained, protocol, str(tmp_path))
    for record in on_two[protocol]:
        numbers = {name for name, value in alone.items() if isinstance(value, float)}
        assert numbers and all(record[name] == pytest.approx(alone[name], rel=1e-3) for name in numbers)


def test_the_batch_does_not_depend_on_the_number_of_processes(monkeypatch, capsys):
    for world in (1, 2, 4):
        monkeypatch.setattr(evaluate, "rank_and_world", lambda world=world: (0, world))
        sizes = [evaluate.probe_batch_size(Args("", batch_size=256), images, 2) for images in (50, 255, 256, 1000)]
        assert sizes == [32, 128, 256, 256]
        sizes = [evaluate.probe_batch_size(Args(""), images, 2) for images in (12, 50, 500, 1000, 50_000)]
        assert sizes == [8, 16, 32, 64, 256]
    monkeypatch.setattr(evaluate, "rank_and_world", lambda: (0, 3))
    with pytest.raises(SystemExit):
        evaluate.probe_batch_size(Args(""), 50, least=1)
    assert "--batch-size" in capsys.readouterr().err
    assert evaluate.probe_batch_size(Args(""), 50, least=0) == 16, "a batch that is not shared"


def test_finetuning_moves_the_backbone_and_learns_what_the_frozen_features_do_not_show(trained, tmp_path):
    """Brightness, which tells the classes apart, is what an encoder trained with colour jitter need not show."""
    none = judge(trained, "finetune", str(tmp_path), lr_backbone=0.0, lr_head=0.0, epochs=1)
    tuned = judge(trained, "finetune", str(tmp_path), epochs=10, lr_backbone=0.2)
    assert none["top1"] < 0.5 < 0.9 < tuned["top1"]


FAST = {"lr": 1e18, "weight_decay": 1.0}


@pytest.mark.parametrize(
    "protocol, flags",
    [("linear", FAST), ("linear augmented", FAST), ("finetune", {"lr_head": 1e18, "lr_backbone": 1e18})],
)
def test_training_that_diverges_has_no_accuracy(protocol, flags, trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        judge(trained, protocol, str(tmp_path), **flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1 and "diverged" in said and "--lr" in said
    assert not (tmp_path / "results.jsonl").exists() and not (tmp_path / "finetuned.pt").exists()


def test_random_weights_are_judged_to_compare_with(trained, tmp_path):
    ours, scratch = judge(trained, "knn", str(tmp_path)), judge(trained, "knn", str(tmp_path), scratch=True)
    torch.manual_seed(0)
    net, _ = common.backbone("resnet10", "imagenet", zero_init=False)
    (tmp_path / "random").mkdir()
    torch.save(net.state_dict(), tmp_path / "random" / "encoder.pt")
    (tmp_path / "random" / "args.json").write_text((Path(trained) / "args.json").read_text())
    random = judge(str(tmp_path / "random"), "knn", str(tmp_path))
    assert scratch.pop("flags")["scratch"] and not random.pop("flags")["scratch"]
    assert scratch == random | {"weights": str(trained)} != ours


def test_a_finetuned_network_loads_into_torchvision(trained, tmp_path):
    record = judge(trained, "finetune", str(tmp_path))
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    net.load_state_dict(torch.load(tmp_path / "finetuned.pt"))
    _, test = common.load_data("folder", small_folder(), 0, torch.device("cpu"))
    top1 = (features_of(16)(net, test).argmax(1) == test.labels).double().mean().item()
    assert top1 == record["top1"]


def test_a_mean_of_zero_can_be_given(trained, tmp_path):
    flags = judge(trained, "knn", str(tmp_path), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))["flags"]
    assert flags["mean"] == (0.0, 0.0, 0.0) and flags["std"] == (1.0, 1.0, 1.0)
    assert judge(trained, "knn", str(tmp_path))["flags"]["std"] == list(common.IMAGENET_STD)


def test_images_without_labels_can_be_diagnosed(trained, tmp_path):
    where = {"dataset": "folder", "data_dir": str(Path(small_folder()) / "train" / "a")}
    record = judge(trained, "diagnose", str(tmp_path), **where)
    assert record["train_images"] == record["test_images"] == 16 and record["classes"] == 0
    assert record["train_covariance"] == record["test_covariance"] > 0


def test_a_bare_file_is_judged_on_another_dataset_and_size(trunk, tmp_path):
    torch.save(trunk, tmp_path / "weights.pt")
    where = {"dataset": "folder", "data_dir": small_folder(), "image_size": 40, "output": str(tmp_path / "out")}
    record = evaluate.main(Args(str(tmp_path / "weights.pt"), k=5, **where))
    assert record["arch"] == "resnet18" and record["dataset"] == "folder" and 0 <= record["top1"] <= 1


@pytest.mark.parametrize(
    "line, named",
    [
        ("", "weights"),
        ("/nowhere", "/nowhere"),
        ("{run} --protocol svm", "--protocol"),
        ("{run} --train-fraction 0", "--train-fraction"),
        ("{run} --train-fraction 2", "--train-fraction"),
        ("{run} --k 65", "--k 65"),
        ("{run} --k 0", "--k"),
        ("{run} --weight-decay 0.1", "--lr"),
        ("{run} --protocol finetune --lr 0.1", "--lr-head"),
        ("{run} --augment", "--augment"),
        ("{run} --dataset folder --data-dir=", "--data-dir"),
        ("{run} --mean 0 0 0.5", "--std"),
        ("{run} --std 1 1 -1", "--std"),
        ("{run} --data-dir /nowhere", "/nowhere"),
        ("{run} --output /dev/null/x", "--output"),
        ("{run} --protocol linear --epochs -1", "--epochs"),
        ("{run}/encoder.pt.txt", "encoder.pt.txt"),
        ("{bare}", "--data-dir"),
    ],
)
def test_wrong_use_is_answered_in_one_line_with_exit_code_2(line, named, trained, trunk, tmp_path, capsys):
    torch.save(trunk, tmp_path / "bare.pt")
    with pytest.raises(SystemExit) as end:
        evaluate.main(common.parse_args(Args, argv=line.format(run=trained, bare=tmp_path / "bare.pt").split()))
    said = capsys.readouterr().err
    assert end.value.code == 2 and named in said and said.count("\n") == 1


def test_the_command_line_as_in_the_readme(trained):
    done = run([str(Path(os.sys.executable)), str(ROOT / "evaluate.py"), str(trained), "--k", "5"])
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1])["protocol"] == "knn"
