"""Command line, LARS, the schedule, nearest neighbours, signs of collapse, backbones and saved files."""

import copy
import dataclasses
import itertools
import math
from typing import Literal

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import matrices, pairs

import common
import evaluate
import vicreg
from common import LARC, LARS, cosine_schedule

close = torch.testing.assert_close

# ---------------------------------------------------------------------------------------------- command line


@dataclasses.dataclass
class Flags:
    recipe: Literal["quick", "big"] = "quick"  # a row of the table
    dataset: Literal["patterns", "folder"] = "patterns"  # images
    data_dir: str = ""  # where they are
    batch_size: int = 8  # 100 % of them
    rate: float = 0.5  # a float
    flip: bool = True  # a switch
    mean: tuple[float, float, float] = (0.1, 0.2, 0.3)  # three numbers


TABLE = {"quick": {}, "big": {"batch_size": 512, "rate": 2.0}}


def parse(line: str) -> Flags:
    return common.parse_args(Flags, TABLE, line.split())


def test_flags_recipes_and_defaults():
    assert parse("") == Flags()
    assert parse("--recipe big") == Flags(recipe="big", batch_size=512, rate=2.0)
    assert parse("--rate 3 --recipe big") == Flags(recipe="big", batch_size=512, rate=3.0), "a flag by hand beats it"
    assert parse("--recipe big --batch-size 8").batch_size == 8, "even one that equals the default"
    assert parse("--no-flip --mean 1 2 3") == Flags(flip=False, mean=(1.0, 2.0, 3.0))
    assert parse("--data-dir x") == Flags(dataset="folder", data_dir="x"), "--data-dir alone means folder"
    assert parse("--data-dir x --dataset patterns").dataset == "patterns"


@pytest.mark.parametrize(
    "line, named",
    [
        ("--batchsize 8", "--batchsize"),
        ("--batch-size many", "--batch-size"),
        ("--recipe huge", "--recipe"),
        ("--dataset mnist", "--dataset"),
        ("--mean 1 2", "--mean"),
        ("--flip maybe", "maybe"),
        ("--batch 8", "--batch"),
    ],
)
def test_a_wrong_flag_is_answered_in_one_line(line, named, capsys):
    with pytest.raises(SystemExit) as end:
        parse(line)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert named in said and said.count("\n") == 1


@pytest.mark.parametrize("rank, world, answers", [("0", "2", 1), ("1", "2", 0), ("1", "1", 1), ("1", None, 1)])
def test_one_process_of_a_machine_answers_and_one_that_is_alone(rank, world, answers, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world) if world else monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        parse("--nonsense")
    assert capsys.readouterr().err.count("\n") == answers


@pytest.mark.parametrize(
    "word, flag",
    [
        ("--batchsize", "batch-size"),
        ("--batch_size", "batch-size"),
        ("--batch=4", "batch-size"),
        ("--size", "batch-size"),
        ("--no-flipp", "no-flip"),
        ("--dir", "data-dir"),
        ("--zzz", ""),
        ("--", ""),
        ("-", ""),
    ],
)
def test_an_unknown_flag_suggests_the_one_that_was_meant(word, flag, capsys):
    with pytest.raises(SystemExit):
        parse(f"{word} 3")
    said = capsys.readouterr().err
    assert (f"; did you mean --{flag}?" in said) if flag else ("did you mean" not in said)


def test_a_word_that_ends_a_flag_is_taken_for_it_before_one_that_looks_alike(capsys):
    with pytest.raises(SystemExit):
        common.parse_args(vicreg.Args, vicreg.RECIPES, ["--lr", "3"])
    assert "unrecognized arguments: --lr 3; did you mean --base-lr?" in capsys.readouterr().err, "and not --blur"


def test_a_word_on_two_lines_is_answered_on_one(capsys):
    with pytest.raises(SystemExit):
        common.parse_args(Flags, TABLE, ["--two\nlines\u2028"])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_holds_the_dataset_of_the_recipe_is_no_folder_of_images(tmp_path):
    def dataset(line: str, of_recipe: str = "cifar10") -> str:
        table = {"quick": {}, "big": {"dataset": of_recipe}}
        return common.parse_args(Flags, table, f"{line} --data-dir {tmp_path}".split()).dataset

    assert dataset("--recipe big") == "folder"
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert dataset("--recipe big") == "cifar10" and dataset("--recipe big", "stl10") == dataset("") == "folder"
    assert dataset("--recipe big --dataset patterns") == "patterns", "a flag given by hand beats it"


def test_help_shows_the_defaults_of_the_recipe(capsys):
    for line in ("--recipe big --help", "--help --recipe=big", "--recipe quick --recipe big --help"):
        with pytest.raises(SystemExit):
            common.parse_args(Flags, TABLE, line.split())
        said = capsys.readouterr().out
        assert "100 % of them [512]" in said and "a float [2.0]" in said and "three numbers [0.1 0.2 0.3]" in said


def test_help_is_the_comment_behind_the_field(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert "--batch-size" in said and "100 % of them [8]" in said and "--flip, --no-flip" in said


@dataclasses.dataclass
class MoreFlags(Flags):
    batch_size: int = 16
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # grey in the middle
    momentum: float = 0.9  # its own


def test_flags_that_extend_others_keep_their_comments_and_change_their_defaults(capsys):
    def parse(line: str) -> MoreFlags:
        return common.parse_args(MoreFlags, {"quick": {}, "big": {"rate": 2.0, "momentum": 0.5}}, line.split())

    assert parse("") == MoreFlags(batch_size=16, rate=0.5, momentum=0.9)
    assert parse("--recipe big --momentum 0.7") == MoreFlags(recipe="big", rate=2.0, momentum=0.7)
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    for text in ("100 % of them [16]", "grey in the middle [0.0 0.0 0.0]", "its own [0.9]", "a float [0.5]"):
        assert text in said
    assert "three numbers" not in said, "the class that changes a flag may say something else of it"
    own, shared = said.split("flags of every method:")
    assert "--momentum" in own and "--batch-size" not in own and "--batch-size" in shared and "--momentum" not in shared
    assert "where they are [none]" in shared


@dataclasses.dataclass
class Number:
    some_rate: float


@pytest.mark.parametrize("check, ok", [("least 0", 0.0), ("least 2", 2.0), ("positive", 1e-9)])
@pytest.mark.parametrize("value", [float("nan"), -1e-9, -math.inf])
def test_a_number_that_is_too_small_or_none_is_refused(check, ok, value, capsys):
    def refuse_small(args: Number) -> None:
        if check == "positive":
            common.check_positive(args, "some_rate")
        else:
            common.check_least(args, float(check.split()[1]), "some_rate")

    refuse_small(Number(ok))
    with pytest.raises(SystemExit) as end:
        refuse_small(Number(value))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "--some-rate" in said and str(value) in said


def test_zero_is_not_positive(capsys):
    with pytest.raises(SystemExit):
        common.check_positive(Number(0.0), "some_rate")
    assert "--some-rate must be positive, not 0.0" in capsys.readouterr().err


def test_the_default_batch_size_shrinks_with_the_dataset_and_a_chosen_one_is_refused(capsys):
    def fitted(images: int, **flags) -> int:
        return common.fit_batch_size(Flags(**flags), images)

    assert [fitted(images) for images in (3, 7, 8, 9, 5000)] == [2, 4, 8, 8, 8]
    assert fitted(8, batch_size=7) == 7
    for images, flags, named in [
        (6, {"batch_size": 7}, "6 training images; use 4"),
        (1, {}, "holds 1 training images; at least 2"),
    ]:
        with pytest.raises(SystemExit):
            fitted(images, **flags)
        assert named in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- LARS


def lars_after(steps: list[float], p: torch.Tensor, gradient: torch.Tensor, **options) -> list[torch.Tensor]:
    p = torch.nn.Parameter(p.clone())
    optimizer = LARS([{"params": [p], **options}], lr=1.0, momentum=0.9, weight_decay=0.1)
    seen = []
    for lr in steps:
        optimizer.param_groups[0]["lr"] = lr
        p.grad = gradient.clone()
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


def test_lars_gives_the_official_numbers():
    p, g = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    first, second = lars_after([1.0, 0.5], p, g)
    close(first, torch.tensor([[2.995221105, 3.998529571]], dtype=torch.float64), rtol=0, atol=1e-9)
    close(second, torch.tensor([[2.990683087, 3.997133257]], dtype=torch.float64), rtol=0, atol=1e-9)


def test_clipped_lars_gives_the_numbers_of_solo_learn():
    p, g = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    first, second = lars_after([1.0, 0.5], p, g, eta=0.02, clip=True)
    close(first, torch.tensor([[2.913333334, 3.973333334]], dtype=torch.float64), rtol=0, atol=2e-9)
    close(second, torch.tensor([[2.789086993, 3.935103690]], dtype=torch.float64), rtol=0, atol=2e-9)


@given(pairs(), st.floats(1e-6, 1e6), st.floats(0, 1))
def test_clipped_lars_takes_the_plain_step_where_lr_is_the_smaller_and_forgets_lr_where_it_is_the_larger(
    tensors, lr, decay
):
    p, g = tensors
    assume(g.norm() > 1e-3 and p.norm() > 1e-3 and (g + decay * p).norm() > 1e-3)
    parameter = torch.nn.Parameter(p.clone())
    optimizer = LARC([parameter], lr=lr, weight_decay=decay)
    parameter.grad = g.clone()
    optimizer.step()
    rate = 0.02 * p.norm() / (g.norm() + decay * p.norm())  # that of LARS, whatever lr is
    close(parameter.detach(), p - min(rate, lr) * (g + decay * p), rtol=1e-6, atol=1e-9)


def test_clipped_lars_stands_still_at_a_learning_rate_of_0_and_leaves_others_alone():
    p, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    (still,) = lars_after([0.0], p, g, eta=0.02, clip=True)
    assert torch.equal(still, p)
    (plain,) = lars_after([1.0], p, g, eta=0.02, clip=True, adapt=False)
    assert torch.equal(plain, p - g)


@given(pairs(), st.floats(0.001, 10))
def test_a_lars_step_has_norm_eta_times_the_weights_whatever_the_gradients_scale(tensors, lr):
    p, g = tensors
    assume(g.norm() > 1e-3 and p.norm() > 1e-3)
    parameter = torch.nn.Parameter(p.clone())
    optimizer = LARS([parameter], lr=lr)
    parameter.grad = 1000 * g
    optimizer.step()
    assert (parameter.detach() - p).norm().item() == pytest.approx(lr * 0.001 * p.norm().item(), rel=1e-6)


@given(matrices(), st.floats(0.001, 10))
def test_a_group_that_is_not_adapted_takes_the_raw_gradient_without_decay(p, lr):
    got = lars_after([lr, lr], p, p.roll(1, 0), adapt=False)[-1]
    close(got, p - lr * 2.9 * p.roll(1, 0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", ["weight", "gradient"])
def test_lars_takes_the_plain_step_where_a_norm_is_zero(which):
    one, zero = torch.ones(2, 2), torch.zeros(2, 2)
    p, g = (zero, one) if which == "weight" else (one, zero)
    parameter = torch.nn.Parameter(p.clone())
    optimizer = LARS([parameter], lr=0.5)
    parameter.grad = g
    optimizer.step()
    close(parameter.detach(), p - 0.5 * g)


def test_lars_skips_what_has_no_gradient_and_leaves_gradients_alone():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = LARS([a, b], lr=1.0, weight_decay=0.1)
    a.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    close(a.grad, torch.tensor([1.0, 2.0]), rtol=0, atol=0)
    close(b.detach(), torch.ones(2), rtol=0, atol=0)


def test_many_tensors_at_once_are_the_same_as_one_at_a_time():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(3, 4), (5,), (2, 2, 3)]]
    together = [torch.nn.Parameter(p.clone()) for p in start]
    alone = [torch.nn.Parameter(p.clone()) for p in start]
    optimizers = [LARS(together, lr=0.3, weight_decay=0.01), *(LARS([p], lr=0.3, weight_decay=0.01) for p in alone)]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        close(p, q)


def test_lars_continues_from_its_state():
    p, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.5]])
    want = lars_after([1.0, 1.0, 1.0], p, g)[-1]
    first, second = torch.nn.Parameter(p.clone()), torch.nn.Parameter(p.clone())
    a, b = (LARS([q], lr=1.0, momentum=0.9, weight_decay=0.1) for q in (first, second))
    first.grad, second.grad = g.clone(), g.clone()
    a.step()
    second.data.copy_(first.data)
    b.load_state_dict(a.state_dict())
    b.step()
    b.step()
    close(second.detach(), want, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------- schedule


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0.01, 10), st.floats(0, 0.01))
def test_schedule_rises_from_0_to_the_peak_then_falls_to_the_end(warmup, rest, peak, final):
    total = warmup + rest
    values = [cosine_schedule(step, total, warmup, peak, final) for step in range(total + 1)]
    assert values[warmup] == pytest.approx(peak) and values[-1] == pytest.approx(final)
    assert all(a < b for a, b in itertools.pairwise(values[: warmup + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values[warmup:]))
    if warmup:
        assert values[0] == 0 and values[1] == pytest.approx(peak / warmup)


def test_schedule_at_the_middle_is_the_mean():
    assert cosine_schedule(60, 110, 10, 4.0, 2.0) == pytest.approx(3.0)


# --------------------------------------------------------------------------------- neighbours, signs, backbones


def loop_knn(train_x, train_y, test_x, test_y, k, temperature):
    hits = 0
    for x, y in zip(test_x, test_y, strict=True):
        cosine = [float(x @ t / (x.norm() * t.norm())) for t in train_x]
        votes = {}
        for i in sorted(range(len(cosine)), key=lambda i: -cosine[i])[:k]:
            votes[int(train_y[i])] = votes.get(int(train_y[i]), 0) + math.exp(cosine[i] / temperature)
        hits += max(votes, key=votes.get) == int(y)
    return hits / len(test_y)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.1), (20, 0.5)])
def test_knn_equals_plain_loops(k, temperature):
    random = np.random.default_rng(k)
    train_x, test_x = (torch.from_numpy(random.standard_normal((n, 8))) for n in (60, 40))
    train_y, test_y = (torch.from_numpy(random.integers(0, 6, n)) for n in (60, 40))
    got = common.knn_accuracy(train_x, train_y, test_x, test_y, k, temperature)
    assert got == pytest.approx(loop_knn(train_x, train_y, test_x, test_y, k, temperature))


def test_knn_on_separable_and_on_shuffled_labels():
    random = np.random.default_rng(0)
    y = torch.arange(400) % 4
    x = torch.eye(4)[y] + 0.05 * torch.from_numpy(random.standard_normal((400, 4))).float()
    scores = common.knn_scores(x[:300], y[:300], x[300:], y[300:], 20, 1e-3)
    assert scores == {"top1": 1.0, "top5": 1.0}
    shuffled = torch.from_numpy(random.permutation(y.numpy()))
    assert 0.1 < common.knn_accuracy(x[:300], shuffled[:300], x[300:], shuffled[300:]) < 0.4


def test_knn_in_half_precision_and_with_few_neighbours_to_have():
    random = np.random.default_rng(0)
    y = torch.arange(60) % 3
    x = 1e4 * (torch.eye(3)[y].repeat(1, 40) + 0.05 * torch.from_numpy(random.standard_normal((60, 120))).float())
    for features in (x, x.half(), x.bfloat16(), x.clone().requires_grad_()):
        with torch.autocast("cpu", torch.bfloat16):
            assert common.knn_accuracy(features[:10], y[:10], features[10:], y[10:], k=20, temperature=0.01) == 1


def test_a_class_without_a_vote_is_no_guess():
    random = np.random.default_rng(0)
    x, y = torch.from_numpy(random.standard_normal((200, 8))), torch.from_numpy(random.integers(0, 6, 200))
    scores = common.knn_scores(x[:100], y[:100], x[100:], y[100:], k=1)
    assert 0 < scores["top5"] == scores["top1"] < 1, "one neighbour names one class"


def test_signs_of_collapse():
    random = np.random.default_rng(0)
    healthy = torch.from_numpy(random.standard_normal((500, 64)))
    seen = common.embedding_health(healthy)
    assert seen["embedding_std"] == pytest.approx(1 / 8, rel=0.02) and 55 < seen["effective_rank"] <= 64
    constant = torch.ones(500, 64) + 1e-4 * healthy
    seen = common.embedding_health(constant)
    assert seen["embedding_std"] < 1e-4 and seen["effective_rank"] < 1.1
    assert common.embedding_health(torch.zeros(500, 64)) == {"embedding_std": 0.0, "effective_rank": 1.0}
    plane = healthy[:, :2] @ torch.from_numpy(random.standard_normal((2, 64)))
    seen = common.embedding_health(plane)
    assert seen["embedding_std"] > 0.05 and 1.5 < seen["effective_rank"] < 2.01


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_types_become_float32_and_float64_stays(half):
    z = torch.tensor([[1.5, -2.0]], requires_grad=True)
    for dtype, want in ((half, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        got = common.full_precision(z.to(dtype))
        assert got.dtype == want and got.tolist() == z.tolist()
    (slope,) = torch.autograd.grad(common.full_precision(z.to(half)).sum(), z)
    assert slope.tolist() == [[1, 1]], "the gradient passes"


@pytest.mark.parametrize("arch, width", [("resnet10", 512), ("resnet18", 512), ("resnet50", 2048)])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_backbone_is_a_torchvision_resnet_without_its_classifier(arch, width, stem):
    net, got = common.backbone(arch, stem, zero_init=False)
    assert got == width
    assert evaluate.describe_weights(net.state_dict(), "x") == (arch, stem)
    if arch != "resnet10":
        state = net.state_dict()
        conv1 = state.pop("conv1.weight") if stem == "small" else None
        with torch.device("meta"):  # without initial weights, which take longest
            torchvisions = torchvision.models.get_model(arch)
        result = torchvisions.load_state_dict(state, strict=False, assign=True)
        assert set(result.missing_keys) == {"fc.weight", "fc.bias"} | ({"conv1.weight"} if conv1 is not None else set())
        assert not result.unexpected_keys
    x = torch.zeros(2, 3, 32, 32)
    assert net.eval()(x).shape == (2, width)


def test_zero_init_starts_residual_branches_at_zero():
    net, _ = common.backbone("resnet10", "small", zero_init=True)
    assert all(block.bn2.weight.abs().max() == 0 for stage in (net.layer1, net.layer4) for block in stage)


def test_unknown_arch_is_named(capsys):
    with pytest.raises(SystemExit):
        common.backbone("resnet19", "small", zero_init=True)
    assert "--arch resnet19" in capsys.readouterr().err


@given(st.data())
def test_a_convolution_to_few_pixels_is_torchs(data):
    kernel, stride = data.draw(st.sampled_from([(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)]))
    height, width, groups = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2))
    usual = torch.nn.Conv2d(4, 6, kernel, stride, kernel // 2, bias=data.draw(st.booleans()), groups=groups)
    ours = copy.deepcopy(usual.double())
    ours.__class__ = common.Conv2d
    x = data.draw(matrices(columns=st.just(4 * height * width))).view(-1, 4, height, width)
    found = []
    for conv, pixels in ((usual, x.clone()), (ours, x.clone().to(memory_format=torch.channels_last))):
        y = conv(pixels.requires_grad_())
        y.sin().sum().backward()
        found.append((y, pixels.grad, conv.weight.grad))
    for theirs, mine in zip(*found, strict=True):
        close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_in_bf16_are_those_of_float32_for_views_of_all_sizes():
    """torch's own convolution leaves a part of some unwritten: what was in that memory, here NaN."""
    torch.manual_seed(0)
    net = common.backbone("resnet10", "imagenet", zero_init=False)[0].to(memory_format=torch.channels_last)
    for size in (3, 4, 7, 16, 24):
        x, weights, gradients = torch.randn(32, 3, size, size), torch.randn(32, 512), []
        for half in (False, True, True):
            _ = torch.full((2**23,), math.nan)
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = net(x)
            (y.float() * weights).sum().backward()
            gradients.append([p.grad for p in net.parameters() if p.ndim == 4])
        for single, *halves in zip(*gradients, strict=True):
            assert all((half - single).norm() < 0.5 * single.norm() for half in halves)


# ---------------------------------------------------------------------------------------------------- patterns


def test_patterns_are_deterministic_balanced_and_differ_between_splits():
    a, b, test = common.patterns("train", 100), common.patterns("train", 200), common.patterns("test", 100)
    assert a.pixels.shape == (100, 3, 32, 32) and a.pixels.dtype == torch.uint8
    assert (a.pixels == b.pixels[:100]).all(), "image i does not depend on how many there are"
    assert not (a.pixels == test.pixels).all(dim=(1, 2, 3)).any()
    assert (a.labels.bincount() == 10).all() and len(a.classes) == 10


def test_pixels_tell_little_about_the_class():
    train, test = common.patterns("train", 5000), common.patterns("test", 1000)
    train_x, test_x = (d.pixels.flatten(1) / 255 for d in (train, test))
    assert common.knn_accuracy(train_x, train.labels, test_x, test.labels) < 0.35


# ------------------------------------------------------------------------------------------------- saved files


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "checkpoint.pt"
    common.atomic_save(file, {"step": 1})
    with pytest.raises(Exception):  # noqa: B017 - a lambda cannot be pickled, whatever the error's type
        common.atomic_save(file, {"step": lambda: 2}, keep_as=tmp_path / "previous.pt")
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]
    common.atomic_save(file, {"step": 3}, keep_as=tmp_path / "previous.pt")
    assert torch.load(file, weights_only=True) == {"step": 3}
    assert torch.load(tmp_path / "previous.pt", weights_only=True) == {"step": 1}
    common.atomic_save(tmp_path / "args.json", b"{}")
    assert (tmp_path / "args.json").read_bytes() == b"{}"
