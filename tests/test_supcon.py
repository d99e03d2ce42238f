"""Two losses against the formula in plain loops, the official numbers and SimCLR; targets; runs."""

import ast
import copy
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import quick
import torch
import vectors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods import ROOT, metrics, narrow, small_folder, tiny
from PIL import Image
from strategies import numbers, pairs
from test_distributed import assert_same_metrics, embeddings
from torch import Tensor, nn
from worlds import run_on

import common
import evaluate
import simclr
import supcon
from supcon import supcon_loss, yaware_loss

close = torch.testing.assert_close
CPU = torch.device("cpu")
OF_LABELS = {"supcon": (0.0, True), "eps_supcon": (0.25, True), "eps_supinfonce": (0.25, False)}
OF_TARGETS = {"yaware": "all", "thr": "thr", "exp": "exp"}
LOSSES = [*OF_LABELS, *OF_TARGETS]
TEMPERATURES = st.sampled_from([0.2, 0.5, 1.0, 3.0])
LABELS = st.integers(-1, 2)
TARGETS = st.sampled_from([math.nan, 0.0, 1.0]) | numbers()
SIGMAS = st.sampled_from([0.5, 1.0, 3.0])


def loss_of(name: str, z1: Tensor, z2: Tensor, y: list, t: float, sigma: float = 1.0, epsilon: float | None = None):
    """(loss, terms) of the row `name` of the table in supcon.py, for labels or targets `y`."""
    if name in OF_TARGETS:
        return yaware_loss(z1, z2, torch.tensor(y, dtype=torch.float64), t, sigma, OF_TARGETS[name])
    usual, keep = OF_LABELS[name]
    return supcon_loss(z1, z2, torch.tensor(y), t, usual if epsilon is None else epsilon, keep)


def in_plain_loops(name: str, z1: list, z2: list, y: list, t: float, sigma: float = 1.0, epsilon: float = 0.25):
    """(loss, mean cosine weighted by w): the formula at the top of supcon.py, one anchor and one k at a time."""
    rows = []
    for row in [*z1, *z2]:
        norm = max(math.sqrt(sum(x * x for x in row)), 1e-12)
        rows.append([x / norm for x in row])
    n, loss, same = len(z1), 0.0, 0.0

    def likeness(i: int, k: int) -> float:
        a, b = y[i % n], y[k % n]
        if i % n == k % n:
            return 1.0
        if name in OF_TARGETS:
            return 0.0 if math.isnan(a + b) else math.exp(-((a - b) ** 2) / (2 * sigma**2))
        return float(a == b >= 0)

    for i in range(2 * n):
        others = [k for k in range(2 * n) if k != i]
        s = {k: sum(a * b for a, b in zip(rows[i], rows[k], strict=True)) / t for k in others}
        w = {k: likeness(i, k) for k in others}
        for k in others:
            terms = {
                "supcon": [math.exp(s[j]) for j in others],
                "eps_supcon": [math.exp(s[j] - epsilon * w[j]) for j in others],
                "eps_supinfonce": [math.exp(s[j]) for j in others if w[j] == 0] + [math.exp(s[k] - epsilon)],
                "yaware": [math.exp(s[j]) for j in others],
                "thr": [math.exp(s[j]) for j in others if w[j] < w[k]],
                "exp": [math.exp(s[j] * (1 - w[j])) for j in others if j != k],
            }[name]
            share = w[k] / sum(w.values())
            if terms:
                loss += share * (math.log(sum(terms)) - s[k])
            same += share * s[k] * t
    return loss / (2 * n), same / (2 * n)


@st.composite
def cases(draw, name: str, most: int = 5):
    """(views, labels or targets)"""
    views = draw(pairs(rows=st.integers(2 if name == "exp" else 1, most)))
    n = len(views[0])
    return views, draw(st.lists(TARGETS if name in OF_TARGETS else LABELS, min_size=n, max_size=n))


def long(views) -> bool:
    """No row near 0, where the direction and with it the loss jump."""
    return min(z.norm(dim=1).min().item() for z in views) > 0.1


def gradients(loss, *views: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(loss, its gradient to each view)."""
    views = [z.clone().requires_grad_() for z in views]
    value = loss(*views)[0]
    return value.detach(), list(torch.autograd.grad(value, views))


# ------------------------------------------------------------------------------------------- against the sources


@pytest.mark.parametrize(
    "name, y, want, norms",
    [
        ("supcon", [0, 1, 0, 2], 1.78281777, [0.56541663, 0.46121212]),
        ("eps_supinfonce", [0, 1, 0, 2], 1.56083660, [0.62679190, 0.51920828]),
        ("eps_supcon", [0, 1, 0, 2], 1.70299515, [0.58784544, 0.48428502]),
        ("eps_supcon", [-1] * 4, 1.26313281, [0.50907121, 0.40318008]),  # epsilon-InfoNCE
        ("eps_supinfonce", [-1] * 4, 1.26313281, [0.50907121, 0.40318008]),
        ("yaware", [0, 1, 2.5, 6], 1.69556012, [0.29428422, 0.22620655]),
        ("thr", [0, 1, 2.5, 6], 0.51588856, [0.76810838, 0.70574157]),
        ("exp", [0, 1, 2.5, 6], -1.00067567, [1.16134731, 1.21122216]),
    ],
)
def test_official_numbers(name, y, want, norms):
    a, b = vectors.views(requires_grad=False)
    loss, grads = gradients(lambda a, b: loss_of(name, a, b, y, 0.1, sigma=2.0), a, b)
    assert loss.item() == pytest.approx(want, abs=5e-9)
    assert [grad.norm().item() for grad in grads] == pytest.approx(norms, abs=5e-9)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20)
@given(st.data(), TEMPERATURES, SIGMAS, st.sampled_from([0.0, 0.25, 2.0]))
def test_equals_the_formula_in_plain_loops(name, data, t, sigma, epsilon):
    views, y = data.draw(cases(name))
    loss, terms = loss_of(name, *views, y, t, sigma, epsilon if name != "supcon" else None)
    want, same = in_plain_loops(name, *(z.tolist() for z in views), y, t, sigma, epsilon)
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert terms["same"].item() == pytest.approx(same, abs=1e-9)


# ------------------------------------------------------------------------------------ what the formula contains


@pytest.mark.parametrize("name", ["supcon", "eps_supcon", "eps_supinfonce", "yaware"])
@settings(max_examples=10)
@given(pairs(), TEMPERATURES, st.data())
def test_of_images_that_are_all_unlike_it_is_the_loss_of_simclr(name, views, t, data):
    """Without labels or targets, with different ones each, or with a kernel of no width."""
    assume(long(views))
    n = len(views[0])
    unknown, own = [math.nan if name == "yaware" else -1] * n, list(range(n))
    y = [data.draw(st.sampled_from(pair)) for pair in zip(unknown, own, strict=True)]
    got, got_grads = gradients(lambda a, b: loss_of(name, a, b, y, t, sigma=1e-3, epsilon=0.0), *views)
    want, want_grads = gradients(lambda a, b: simclr.nt_xent_loss(a, b, t), *views)
    close(got, want, rtol=1e-10, atol=1e-12)
    close(got_grads, want_grads, rtol=1e-8, atol=1e-10)
    terms, theirs = loss_of(name, *views, y, t, 1e-3)[1], simclr.nt_xent_loss(*views, t)[1]
    close([terms["positive"], terms["same"]], [theirs["positive"]] * 2)


@given(cases("supcon"), TEMPERATURES)
def test_targets_that_are_classes_make_y_aware_the_loss_of_classes(case, t):
    views, labels = case
    targets = [math.nan if label < 0 else 100.0 * label for label in labels]
    close(loss_of("yaware", *views, targets, t), loss_of("supcon", *views, labels, t))


@pytest.mark.parametrize("name", ["eps_supcon", "eps_supinfonce"])
@settings(max_examples=10)
@given(st.data(), TEMPERATURES, st.lists(st.floats(0, 6), min_size=2, max_size=5))
def test_falls_as_epsilon_rises(name, data, t, epsilons):
    views, y = data.draw(cases(name))
    losses = [loss_of(name, *views, y, t, epsilon=e)[0].item() for e in [0.0, *sorted(epsilons), 1000.0]]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(losses)) and losses[0] > losses[-1]


@given(cases("supcon"), TEMPERATURES)
def test_a_class_without_the_others_of_it_in_the_denominator_has_the_smaller_loss(case, t):
    views, labels = case
    losses = [loss_of(name, *views, labels, t, epsilon=0.0)[0].item() for name in OF_LABELS]
    assert losses[0] == losses[1] and losses[2] <= losses[0] + 1e-12


@given(st.lists(LABELS, min_size=1, max_size=9), st.integers(1, 5), numbers().filter(bool), TEMPERATURES)
def test_identical_embeddings_give_the_log_of_what_the_denominator_counts(labels, d, value, t):
    n = len(labels)
    z = torch.full((n, d), value, dtype=torch.float64)
    of_class = [2 * labels.count(label) - 1 if label >= 0 else 1 for label in labels]  # beside the anchor
    want = {
        "supcon": math.log(2 * n - 1),
        "eps_supcon": sum(math.log(2 * n - 1 - c + math.exp(-0.25) * c) for c in of_class) / n,
        "eps_supinfonce": sum(math.log(2 * n - 1 - c + math.exp(-0.25)) for c in of_class) / n,
    }
    for name in OF_LABELS:
        assert loss_of(name, z, z, labels, t)[0].item() == pytest.approx(want[name], abs=1e-9)


@given(cases("supcon"), st.sampled_from([0.1, 1.0]))
def test_is_never_below_the_log_of_the_class(case, t):
    """And reaches it with opposite points, up to what is left of exp(-2 / T)."""
    views, labels = case
    bound = sum(math.log(max(1, 2 * labels.count(y) - 1 if y >= 0 else 1)) for y in labels) / len(labels)
    assert loss_of("supcon", *views, labels, t)[0].item() >= bound - 1e-12
    z = torch.tensor([[1.0], [-1.0], [1.0], [1.0]], dtype=torch.float64)
    assert loss_of("supcon", z, z, [0, 1, 0, 0], 0.05)[0].item() == pytest.approx((3 * math.log(5)) / 4, abs=1e-12)


def test_what_is_nearer_is_drawn_more_and_what_is_farther_is_pushed_more():
    """The gradient at three images on their own axes, by targets 0, 1 and 3, as seen from the first."""
    z = torch.eye(3, dtype=torch.float64)
    anchor = z[:1].clone().requires_grad_()
    for name in OF_TARGETS:
        loss = loss_of(name, torch.cat([anchor, z[1:]]), z, [0.0, 1.0, 3.0], 0.5, sigma=2.0)[0]
        pull = -torch.autograd.grad(loss, anchor)[0][0]
        assert pull[1] > pull[2], name


# ---------------------------------------------------------------------------------------------- what changes nothing


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=8)
@given(st.data(), TEMPERATURES)
def test_rotation_length_order_and_names_of_classes_change_nothing(name, data, t):
    views, y = data.draw(cases(name))
    assume(long(views))
    n, d = views[0].shape
    square = [[data.draw(numbers()) for _ in range(d)] for _ in range(d)]
    rotation, triangle = torch.linalg.qr(torch.tensor(square, dtype=torch.float64))
    assume(triangle.diagonal().abs().min() > 1e-3)
    scales = [data.draw(st.floats(0.1, 50)) for _ in range(2 * n)]
    scale = torch.tensor(scales, dtype=torch.float64).view(2, -1, 1)
    order = data.draw(st.permutations(range(n)))
    turned = [(z @ rotation * s)[order] for z, s in zip(reversed(views), scale, strict=True)]
    other = [y[i] if name in OF_TARGETS else y[i] if y[i] < 0 else 5 - y[i] for i in order]
    mirrored = [10 - value for value in other] if name in OF_TARGETS else other
    close(loss_of(name, *turned, mirrored, t)[0], loss_of(name, *views, y, t)[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_the_unit_of_targets_is_that_of_sigma_and_inputs_are_left_alone(name):
    views, y = vectors.views(), torch.tensor([0.0, 1.0, 2.0, 2.0])
    before = copy.deepcopy([z.detach() for z in views])
    a = loss_of(name, *views, y.tolist() if name in OF_TARGETS else y.long().tolist(), 0.2, sigma=1.5)[0]
    a.backward()
    close([z.detach() for z in views], before, rtol=0, atol=0)
    if name in OF_TARGETS:
        close(loss_of(name, *views, (1000 * y).tolist(), 0.2, sigma=1500.0)[0], a)


# ---------------------------------------------------------------------------------------------- gradients, precision


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=5)
@given(st.data())
def test_gradient_is_that_of_finite_differences(name, data):
    views, y = data.draw(cases(name, most=3))
    assume(long(views))
    assert torch.autograd.gradcheck(lambda a, b: loss_of(name, a, b, y, 0.5)[0], [z.requires_grad_() for z in views])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_a_low_temperature_stays_finite(name, dtype):
    """exp(1000) overflows all dtypes. Also of one class, where nothing is left to be pushed away, and of one image."""
    generator = torch.Generator().manual_seed(0)
    for y in ([0, 1, 2, 0, -1 if name in OF_LABELS else math.nan, 1], [0] * 6, [0] * (1 + (name == "exp"))):
        z1, z2 = (torch.randn(len(y), 8, generator=generator).to(dtype).requires_grad_() for _ in range(2))
        loss, terms = loss_of(name, z1, z2, y, 1e-3)
        loss.backward()
        assert all(value.isfinite() for value in [loss, *terms.values()])
        assert z1.grad.isfinite().all() and z2.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_computes_in_float32_whatever_the_network_computed_in(name):
    generator = torch.Generator().manual_seed(0)
    a, b = ((100 * torch.randn(64, 32, generator=generator)).bfloat16() for _ in range(2))
    y = (torch.arange(64) % 7).tolist()
    want, _ = loss_of(name, a.double(), b.double(), y, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = loss_of(name, a, b, y, 0.2)
        also, _ = loss_of(name, a.float(), b.float(), y, 0.2)
    assert got.dtype == torch.float32 and want.dtype == torch.float64
    close(got.double(), want, rtol=1e-5, atol=1e-5)
    close(also, got)


def test_terms_say_what_is_near():
    """Of four images on two axes, with two classes: views agree but for the last; one image lies in the other class."""
    z1 = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    z2 = z1.clone()
    z2[3] = torch.tensor([1.0, 0.0])
    terms = loss_of("supcon", z1, z2, [0, 0, 1, 1], 0.5)[1]
    assert terms["positive"].item() == pytest.approx(3 / 4) and terms["accuracy"].item() == pytest.approx(7 / 8)
    assert terms["same"].item() == pytest.approx((4 + 3 * 2 / 3 + 0) / 8)


# ---------------------------------------------------------------------------------------------- several processes


def on_this_rank() -> dict[str, tuple[Tensor, list[Tensor]]]:
    """For each loss (loss, gradients) averaged over ranks, as DistributedDataParallel does it."""
    world, results = common.rank_and_world()[1], {}
    for name in LOSSES:
        y = [0, 1, 2, 0, 3, 1, 1, 2, 5, 3, 5, 0]
        y[4] = -1 if name in OF_LABELS else math.nan
        views = [z[common.my_rows(12)] for z in embeddings()]
        loss, grads = gradients(lambda a, b, name=name, y=y: loss_of(name, a, b, y, 0.5, sigma=2.0), *views)
        if world > 1:
            loss, grads = common.all_gather(loss[None]).mean(), [common.all_gather(grad) / world for grad in grads]
        results[name] = loss, grads
    return results


def train(folder: str, flags: dict) -> None:
    supcon.backbone = narrow
    supcon.main(tiny("supcon", Path(folder), precision="fp64", epochs=2, eval_every=2, save_every=2, **flags))


def test_any_number_of_processes_gives_the_same(tmp_path):
    """The losses and their gradients on 2 and 4 ranks, and runs on 2."""
    usual, want, folder = supcon.backbone, on_this_rank(), with_targets(tmp_path / "images")
    runs = [{"loss": name, "data_dir": folder} for name in ("eps_supinfonce", "exp")]
    try:
        for flags in runs:
            train(str(tmp_path / "1" / flags["loss"]), flags)
    finally:
        supcon.backbone = usual
    for world in (2, 4):
        jobs = [(on_this_rank, ())]
        jobs += [(train, (str(tmp_path / "2" / flags["loss"]), flags)) for flags in runs] * (world == 2)
        for got in run_on(world, jobs)[0]:
            for name, (loss, grads) in want.items():
                close(got[name][0], loss, rtol=1e-10, atol=1e-12)
                close(got[name][1], grads, rtol=1e-10, atol=1e-10)
    for name in (flags["loss"] for flags in runs):
        assert_same_metrics(tmp_path / "1" / name, tmp_path / "2" / name, 1e-9, set())
        for file in ("encoder.pt", "heads.pt"):
            a, b = (torch.load(tmp_path / world / name / file, weights_only=True) for world in "12")
            close(b, a, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------------------------------- runs


def test_all_but_the_loss_is_simclrs_to_the_letter():
    """And of main all but the name, the check, the batch that has labels, and the choice of the loss."""

    def parts(file: Path) -> dict[str, str]:
        return {node.name: ast.unparse(node) for node in ast.parse(file.read_text()).body if hasattr(node, "name")}

    ours, theirs = parts(Path(supcon.__file__)), parts(Path(simclr.__file__))
    same = {name for name in theirs if ours.get(name) == theirs[name]}
    assert theirs.keys() - same == {"Args", "check", "nt_xent_loss", "main"}
    sides = [set(parts["main"].splitlines()) for parts in (ours, theirs)]
    assert len(sides[1] - sides[0]) == 4 and len(sides[0] - sides[1]) == 11


def trainer(tmp_path, monkeypatch):
    args = {"image_size": 16, "batch_size": 8, "base_lr": 2.0, "warmup_epochs": 0, "epochs": 2, "log_every": 1}
    args |= {"precision": "fp64"}
    return [quick.trainer(file, file.Args(**args), 24, tmp_path, monkeypatch) for file in (supcon, simclr)]


def test_with_classes_of_one_image_a_run_is_simclrs(tmp_path, monkeypatch):
    ours, theirs = trainer(tmp_path, monkeypatch)
    data, _ = common.load_data()
    data.labels[0] = 0
    a, b = ours("ours")["model"], theirs("theirs")["model"]
    close(a, b, rtol=1e-7, atol=1e-9)
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("ours", "theirs")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize(
    "flags, want",
    [
        ({}, ("labels", 0.2, 0.0, True)),
        ({"loss": "eps_supcon", "epsilon": 0.5}, ("labels", 0.2, 0.5, True)),
        ({"loss": "eps_supinfonce"}, ("labels", 0.2, 0.25, False)),
        ({"loss": "yaware", "sigma": 2.0}, ("targets", 0.2, 2.0, "all")),
        ({"loss": "thr"}, ("targets", 0.2, supcon.Args.sigma, "thr")),
        ({"loss": "exp", "temperature": 0.5}, ("targets", 0.5, supcon.Args.sigma, "exp")),
    ],
)
def test_flags_labels_and_targets_reach_the_loss(flags, want, tmp_path, monkeypatch):
    """Of the images of each batch: label and target of image i are 1000 + i, and its pixels are i."""
    (train, _), asked, seen = trainer(tmp_path, monkeypatch), [], []
    data, _ = common.load_data()
    data.labels, data.targets = torch.arange(1000, 1024), torch.arange(1000.0, 1024.0, dtype=torch.float64)
    data.pixels[:] = torch.arange(24)[:, None, None, None]

    def spy(kind, function):
        def loss(z1, z2, y, *rest):
            asked.append((kind, y.tolist(), *rest))
            return function(z1, z2, y, *rest)

        return loss

    def augment(x, *_):
        seen.append((255 * x.mean((1, 2, 3))).round().int().tolist())
        return x

    monkeypatch.setattr(supcon, "augment", augment)
    monkeypatch.setattr(supcon, "supcon_loss", spy("labels", supcon_loss))
    monkeypatch.setattr(supcon, "yaware_loss", spy("targets", yaware_loss))
    train(max_steps=1, **flags)
    ((kind, y, *rest),) = asked
    assert (kind, *rest) == want
    assert [round(value - 1000) for value in y] == seen[0] == seen[1]


def test_a_run_that_was_stopped_continues_to_the_same_checkpoint_and_can_be_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "__file__", str(ROOT / "more" / "common.py"))  # as the program has it
    whole, stopped, data = tmp_path / "whole", tmp_path / "stopped", with_targets(tmp_path / "images")
    last = supcon.main(tiny("supcon", whole, loss="thr", data_dir=data, epochs=2))
    supcon.main(tiny("supcon", stopped, max_steps=3, loss="thr", data_dir=data, epochs=2))
    supcon.main(tiny("supcon", stopped, loss="thr", data_dir=data, epochs=2))
    said = capsys.readouterr().out
    assert "continuing after step 3 of 8" in said
    assert Path(re.findall("^next +python ([^ ]+)", said, re.M)[-1]).resolve() == ROOT / "evaluate.py"
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, stopped))
    close(a["model"], b["model"], rtol=0, atol=0)
    close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    lines = [[{**line, "images_per_s": 0} for line in metrics(run) if "loss" in line] for run in (whole, stopped)]
    assert lines[0] == lines[1] and len(lines[0]) == 8
    assert evaluate.main(evaluate.Args(str(whole)))["top1"] == pytest.approx(last["knn_top1"])
    record = evaluate.main(evaluate.Args(str(whole), protocol="regress"))
    assert record["test_images"] == 39 and math.isfinite(record["r2"]) and record["mae"] > 0


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"loss": "yaware"}, "--loss yaware needs targets"),
        ({"epsilon": 0.5}, "--epsilon "),
        ({"loss": "eps_supcon", "epsilon": -0.25}, "--epsilon "),
        ({"loss": "eps_supcon", "epsilon": math.nan}, "--epsilon "),
        ({"loss": "eps_supcon", "sigma": 2.0}, "--sigma "),
        ({"loss": "exp", "sigma": 0.0}, "--sigma "),
        ({"loss": "exp", "epsilon": 0.5}, "--epsilon "),
        ({"temperature": 0.0}, "--temperature "),
        ({"projector_hidden": 0}, "--projector-hidden "),
        ({"projector_dim": 0}, "--projector-dim "),
        ({"jitter_strength": -1.0}, "--jitter-strength "),
    ],
)
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        supcon.main(tiny("supcon", tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "run").exists()


def test_images_without_any_label_are_refused(tmp_path, monkeypatch, capsys):
    (train, _) = trainer(tmp_path, monkeypatch)
    with pytest.raises(SystemExit) as end:
        train()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "--loss supcon needs labels" in said


@pytest.mark.parametrize("recipe", ["quick", "cifar", "imagenet"])
def test_recipes_name_flags_that_exist(recipe):
    supcon.check(common.parse_args(supcon.Args, supcon.RECIPES, ["--recipe", recipe]))


# ---------------------------------------------------------------------------------------------- targets


def with_targets(root: Path, images: str = "") -> str:
    """The small folder once more, with targets.csv: the number in each file's name, but for the last of each split."""
    root.mkdir()
    lines = ["file,number"]
    for split in ("train", "test"):
        (root / split).symlink_to(Path(small_folder(), split))
        files = sorted(Path(small_folder(), split).rglob("*.png"), key=lambda file: int(file.stem))
        lines += [f"{file.relative_to(small_folder())},{file.stem}.5" for file in files[:-1]]
    (root / "targets.csv").write_text("\n".join(lines))
    return str(root)


def picture(file: Path, size: tuple[int, int] = (20, 24), value: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(file)


def table(root: Path, *lines: str) -> None:
    (root / "targets.csv").write_text("\n".join(lines) + "\n")


def test_the_target_of_patterns_is_their_period(monkeypatch):
    """By the coordinates that the families are painted from: along a row, they advance by one in so many pixels."""
    found, paint = torch.zeros(1200, dtype=torch.float64), common._texture
    starts = dict.fromkeys(common.PATTERN_CLASSES, 0)

    def texture(family, s, t, u):
        period = 1 / torch.from_numpy(s[:, 0, 1] - s[:, 0, 0]).hypot(torch.from_numpy(t[:, 0, 1] - t[:, 0, 0]))
        rows = common.PATTERN_CLASSES.index(family) + 10 * torch.arange(len(s)) + 10 * starts[family]
        found[rows], starts[family] = period.double(), starts[family] + len(s)
        return paint(family, s, t, u)

    monkeypatch.setattr(common, "_texture", texture)
    data = common.patterns("train", 1200)
    assert data.targets.dtype == torch.float64
    close(data.targets, found, rtol=1e-4, atol=0)
    assert 4.5 <= data.targets.min() < 4.6 and 10.9 < data.targets.max() < 4.5 * 2**1.3


@pytest.mark.parametrize("size", [20, 300], ids=["in memory", "decoded by workers"])
def test_a_folder_gives_each_image_the_number_of_its_line(size, tmp_path, capsys):
    for i in range(6):
        picture(tmp_path / "train" / "ab"[i % 2] / f"{i}, {i}.png", (size, size), i)
        picture(tmp_path / "val" / "ab"[i % 2] / f"{i}.png", (size, size), i)
    lines = [f'"train/{"ab"[i % 2]}/{i}, {i}.png",{i}.25' for i in range(5)]
    lines += [f" ./val/x/../{'ab'[i % 2]}/{i}.png, -{i}e1 ".strip() for i in range(1, 6)]
    table(tmp_path, *lines, "", "train/a/gone.png,7", "gone.png,8")
    train, test = common.load_data("folder", str(tmp_path), 0, CPU)
    said = capsys.readouterr().err
    assert "2 lines name no image, the first is line 12, train/a/gone.png" in said and said.count("\n") == 2
    assert "2 of 12 images have no target" in said and ".csv files" not in said

    def number(data):  # of each image in its pixels
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        judge = common.Judge(size, (0.0,) * 3, (1.0,) * 3, common.compute_in("fp64", CPU)[0], workers=0)
        return (255 * judge.features(net, data)[:, 0]).round().int().tolist()

    assert number(train) == [0, 2, 4, 1, 3, 5] == number(test)
    close(train.targets.nan_to_num(-1), torch.tensor([0.25, 2.25, 4.25, 1.25, 3.25, -1], dtype=torch.float64))
    close(test.targets.nan_to_num(-1), torch.tensor([-1, -20, -40, -10, -30, -50], dtype=torch.float64))
    close(train.subset(torch.tensor([4, 0])).targets, torch.tensor([3.25, 0.25], dtype=torch.float64))
    known, _ = common.load_data("folder", str(tmp_path), 3, CPU, "targets")
    assert len(known) == len(known.targets) == 3
    compute = common.compute_in("fp32", CPU)[0]
    batch = next(common.batches(train, [common.Crop(16, (1, 1))], range(1), 6, 0, compute))
    close(batch.targets, train.targets[batch.index], equal_nan=True)


def seen(data: common.Data, size: int) -> Tensor:
    """The targets on this rank, once each rank has decoded its share of the images."""
    judge = common.Judge(size, (0.0,) * 3, (1.0,) * 3, common.compute_in("fp32", CPU)[0], workers=0)
    judge.features(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), data)
    return data.targets


@pytest.mark.parametrize("size", [20, 300], ids=["in memory", "decoded by workers"])
def test_an_image_that_replaces_a_bad_one_brings_its_target(size, tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", (size, size), i)
    table(tmp_path, *(f"{i}.png,{i}" for i in range(4)))
    file = tmp_path / "1.png"
    file.write_bytes(file.read_bytes()[:-40])  # its size is still there to read
    train, _ = common.load_data("folder", str(tmp_path), 0, CPU)
    compute = common.compute_in("fp32", CPU)[0]
    batch = next(common.batches(train, [common.Crop(16, (1, 1))], range(1), 4, 0, compute))
    shown = (255 * batch.views[0].x.mean((1, 2, 3))).round()
    assert batch.targets.tolist() == shown.tolist() and sorted(shown.tolist()) == [0, 2, 2, 3]
    ranks = run_on(2, [(seen, (train, size))])[0]
    assert all(targets.tolist() == [0, 2, 2, 3] for targets in [*ranks, seen(train, size)])


@pytest.mark.parametrize(
    "line, named",
    [
        ("1.png,two", "line 3"),
        ("1.png,nan", "line 3"),
        ("1.png,1e19", "line 3"),
        ("1.png", "line 3"),
        ("1.png;1", "line 3"),
        ("1.png,1,2", "line 3"),
        ("0.png,5", "line 3 names 0.png again, after line 2"),
        ("1.png," + 200_000 * "9", "cannot be read"),
    ],
)
def test_a_table_with_a_fault_is_refused_in_one_line(line, named, tmp_path, capsys):
    for i in range(2):
        picture(tmp_path / f"{i}.png")
    table(tmp_path, "name,number", "0.png,1", line)
    with pytest.raises(SystemExit) as end:
        common.load_data("folder", str(tmp_path), 0, CPU)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "targets.csv" in said and named in said


def test_a_first_line_that_names_an_image_is_no_heading(tmp_path, capsys):
    picture(tmp_path / "0.png")
    table(tmp_path, "0.png,one")
    with pytest.raises(SystemExit):
        common.load_data("folder", str(tmp_path), 0, CPU)
    assert "targets.csv: line 1 " in capsys.readouterr().err


def test_a_run_is_not_continued_with_other_targets(tmp_path, capsys):
    data = with_targets(tmp_path / "images")
    supcon.main(tiny("supcon", tmp_path / "run", loss="yaware", data_dir=data, max_steps=4))
    file = Path(data, "targets.csv")
    file.write_text(file.read_text().replace(",3.5", ",4.5"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        supcon.main(tiny("supcon", tmp_path / "run", loss="yaware", data_dir=data))
    assert "images with other targets" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- evaluate.py


def linear_data(n: int, noise: float = 0.1, d: int = 6) -> tuple[Tensor, Tensor]:
    """Features of which one dimension is constant and one a copy, and targets that are linear in them but for noise."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 0.0]) + 5
    x[:, 4] = x[:, 3]
    return x, 100 + x[:, 0] - 2 * x[:, 1] + noise * torch.randn(n, generator=generator).double()


def test_ridge_regression_is_that_of_the_normal_equations():
    x, y = linear_data(200)
    for ridge in (1e-6, 0.1, 10.0):
        weight, bias = evaluate.ridge_heads(x, y, (1.0, ridge))
        centred, aim = (x - x.mean(0)).double(), y - y.mean()
        want = torch.linalg.solve(centred.T @ centred / 200 + ridge * torch.eye(6), centred.T @ aim / 200)
        close(weight[:, 1], want, rtol=1e-4, atol=1e-5)
        close((x.double() @ weight[:, 1] + bias[1]).mean(), y.mean())


def test_the_numbers_of_ridge_regression():
    """R2 and error of a known noise; nothing to find; and scale and offset of features and targets change nothing."""
    (x, y), (test_x, test_y) = linear_data(2000), linear_data(500)
    found = evaluate.ridge_regression(x, y, test_x, test_y)
    assert found["r2"] == pytest.approx(1 - 0.01 / 17, abs=2e-4)
    assert found["mae"] == pytest.approx(0.1 * math.sqrt(2 / math.pi), rel=0.1)
    noise = evaluate.ridge_regression(x, y[torch.randperm(2000, generator=torch.Generator())], test_x, test_y)
    assert abs(noise["r2"]) < 0.05 and noise["mae"] > 2
    moved = evaluate.ridge_regression(30 * x - 7, 4 * y + 1, 30 * test_x - 7, 4 * test_y + 1)
    assert moved["r2"] == pytest.approx(found["r2"], abs=1e-5) and moved["mae"] == pytest.approx(4 * found["mae"], 1e-3)


def test_the_strength_is_chosen_without_the_test_images_and_where_few_images_need_it():
    generator = torch.Generator().manual_seed(0)
    x, test_x = (torch.randn(n, 40, generator=generator) for n in (50, 400))
    weight = torch.randn(40, generator=generator).double()
    y, test_y = (z.double() @ weight + 3 * torch.randn(len(z), generator=generator) for z in (x, test_x))
    chosen = evaluate.ridge_regression(x, y, test_x, test_y)
    weakest = evaluate.ridge_regression(x, y, test_x, test_y, ridges=(1e-6,))
    assert chosen["ridge"] > 1e-3 and chosen["r2"] > weakest["r2"] + 0.1
    assert evaluate.ridge_regression(x, y, test_x, -test_y)["ridge"] == chosen["ridge"]


def test_regression_from_a_folder_without_classes_whole_and_by_half(tmp_path, capsys):
    """Grey images whose target is their grey, which even random weights see; folders in test/ may have any names."""
    lines = []
    for split, count in (("train", 40), ("test", 20)):
        for i in range(count):
            name = f"{split}/{'any/' * (split == 'test' and i % 2)}{i}.png"
            picture(tmp_path / "images" / name, (16, 16), 40 + 5 * i)
            lines += [f"{name},{i}"] * (i < count * 0.95)
    table(tmp_path / "images", *lines)
    data = str(tmp_path / "images")
    supcon.main(tiny("supcon", tmp_path / "run", loss="yaware", data_dir=data, max_steps=1, batch_size=8))
    assert "no labelled test split" in capsys.readouterr().out
    record = evaluate.main(evaluate.Args(str(tmp_path / "run"), protocol="regress"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    assert record["train_images"] == 38 and record["test_images"] == 19
    assert record["r2"] > 0.9 and record["mae"] < 2
    assert evaluate.main(evaluate.Args(str(tmp_path / "run"), protocol="regress", train_fraction=0.5))["r2"] > 0.8
    for protocol in ("knn", "linear"):
        with pytest.raises(SystemExit) as end:
            evaluate.main(evaluate.Args(str(tmp_path / "run"), protocol=protocol))
        assert end.value.code == 2 and "class folders" in capsys.readouterr().err


@pytest.mark.parametrize("lines", ["", "train/a/0.png,1", "test/a/0.png,1", "train/a/0.png,1\ntest/a/0.png,1"])
def test_regression_without_targets_on_both_sides_is_refused_in_one_line(lines, tmp_path, capsys):
    root = Path(with_targets(tmp_path / "images"))
    supcon.main(tiny("supcon", tmp_path / "run", data_dir=str(root), max_steps=1))
    table(root, lines)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        evaluate.main(evaluate.Args(str(tmp_path / "run"), protocol="regress"))
    last = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert end.value.code == 2 and len(last) == 1 and ("targets" in last[0] or "two images" in last[0])
