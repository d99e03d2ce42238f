"""SCAN's losses against independent oracles and the reference numbers; neighbours, stages, processes."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick
import torch
import torch.nn.functional as F
import vectors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods import metrics, narrow, small_folder, tiny
from strategies import matrices, pairs
from torch import Tensor, nn
from worlds import run_on

import common
import scan
from scan import SCAN, cutout, mine_neighbours, scan_loss, self_label_loss, turn

close = torch.testing.assert_close
WEIGHTS = st.sampled_from([0.0, 1.0, 2.0, 5.0])
THRESHOLDS = st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99])


def softmax(row: list[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(x - largest) for x in row]
    return [p / sum(powers) for p in powers]


def scan_in_plain_loops(anchors: list[list[float]], neighbours: list[list[float]], w: float) -> float:
    """Eq. 2, one image at a time."""
    ps, qs = ([softmax(row) for row in logits] for logits in (anchors, neighbours))
    total = 0.0
    for p, q in zip(ps, qs, strict=True):
        total -= math.log(sum(a * b for a, b in zip(p, q, strict=True)))
    for c in range(len(ps[0])):
        mean = sum(p[c] for p in ps) / len(ps)
        total += len(ps) * w * mean * math.log(mean)
    return total / len(ps)


def labels_in_plain_loops(weak: list[list[float]], strong: list[list[float]], threshold: float) -> float:
    """The mean over the labels that occur of the mean cross-entropy of their images."""
    losses: dict[int, list[float]] = {}
    for w, s in zip(weak, strong, strict=True):
        p = softmax(w)
        if max(p) > threshold:
            label = p.index(max(p))
            losses.setdefault(label, []).append(-math.log(softmax(s)[label]))
    means = [sum(part) / len(part) for part in losses.values()]
    return sum(means) / len(means) if means else 0.0


def decided(weak: Tensor, threshold: float) -> bool:
    """No probability so near another, or the threshold, that rounding decides."""
    p = weak.softmax(1).sort(dim=1).values
    gaps = [(p[:, -1] - threshold).abs()] + ([p[:, -1] - p[:, -2]] if p.shape[1] > 1 else [])
    return all(gap.min().item() > 1e-9 for gap in gaps)


# ----------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    "weight, want, gradients",
    [(2.0, -1.81484742, [0.13146937, 0.08032973]), (5.0, -6.60373766, [0.44861020, 0.08032973])],
)
def test_the_numbers_of_a_reference_implementation(weight, want, gradients):
    a, b = vectors.views()
    loss, terms = scan_loss(a, b, weight)
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=1e-7)  # it adds 1e-8 inside its logarithms
    assert [terms[name].item() for name in ("consistency", "entropy")] == pytest.approx([1.37774607, 1.59629674])
    assert [a.grad.norm().item(), b.grad.norm().item()] == pytest.approx(gradients, abs=1e-7)


def test_the_number_of_self_labelling_of_a_reference_implementation():
    a, b = vectors.views(requires_grad=False)
    strong = torch.cat([b, a]).requires_grad_()
    loss, terms = self_label_loss(torch.cat([3 * a, 3 * b]), strong, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(1.10174688, abs=5e-8)
    assert strong.grad.norm().item() == pytest.approx(0.41963341, abs=5e-8)
    assert terms["sure"].item() == 1 and terms["agreement"].item() == 0.75


@given(pairs(rows=st.integers(1, 6)), WEIGHTS)
def test_equals_the_equation_in_plain_loops(logits, weight):
    want = scan_in_plain_loops(*(z.tolist() for z in logits), weight)
    loss, terms = scan_loss(*logits, weight)
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    close(terms["consistency"] - weight * terms["entropy"], loss)


@given(pairs(rows=st.integers(1, 6)), THRESHOLDS)
def test_self_labelling_equals_its_definition_in_plain_loops(logits, threshold):
    assume(decided(logits[0], threshold))
    want = labels_in_plain_loops(*(z.tolist() for z in logits), threshold)
    assert self_label_loss(*logits, threshold)[0].item() == pytest.approx(want, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("clusters", [2, 10])
def test_the_loss_where_nothing_and_where_everything_is_known(clusters):
    """Uniform: (1 - w) log C. Sure, and as many images in each cluster: -w log C, the least there is."""
    flat, sharp = torch.zeros(20, clusters), 1e3 * F.one_hot(torch.arange(20) % clusters).float()
    assert scan_loss(flat, flat, 5.0)[0].item() == pytest.approx(-4 * math.log(clusters), rel=1e-5)
    assert scan_loss(sharp, sharp, 5.0)[0].item() == pytest.approx(-5 * math.log(clusters), rel=1e-5)
    one = sharp[:1].expand(20, -1)
    assert scan_loss(one, one, 5.0)[0].item() == pytest.approx(0, abs=1e-5), "all in one cluster"


@given(st.sampled_from([30.0, 1e3, 1e6]), st.integers(0, 9))
def test_logits_that_are_far_apart_have_a_finite_loss_and_gradient(scale, seed):
    """Probabilities of 0 in float32, of neighbours that are sure of different clusters."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (scale * torch.randn(8, 5, generator=generator) for _ in range(2))
    a, b = a.requires_grad_(), b.requires_grad_()
    for loss, _ in (scan_loss(a, b, 5.0), self_label_loss(a, b, 0.99)):
        loss.backward()
        assert loss.isfinite() and all(x.grad.isfinite().all() for x in (a, b))


@given(pairs(), WEIGHTS, THRESHOLDS, st.randoms())
def test_the_order_of_images_and_clusters_and_what_is_added_to_a_row_change_nothing(logits, weight, threshold, random):
    assume(decided(logits[0], threshold))
    n, c = logits[0].shape
    rows, columns = random.sample(range(n), n), random.sample(range(c), c)
    more = torch.tensor([[random.uniform(-3, 3)] for _ in range(n)], dtype=torch.float64)
    changed = [z[rows][:, columns] + more for z in logits]
    close(scan_loss(*changed, weight)[0], scan_loss(*logits, weight)[0], rtol=1e-9, atol=1e-9)
    close(self_label_loss(*changed, threshold)[0], self_label_loss(*logits, threshold)[0], rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(pairs(rows=st.integers(1, 5), columns=st.integers(1, 4)), THRESHOLDS)
def test_gradients_are_those_of_finite_differences(logits, threshold):
    a, b = (z.requires_grad_() for z in logits)
    assert torch.autograd.gradcheck(lambda a, b: scan_loss(a, b, 2.0)[0], (a, b))
    assert torch.autograd.gradcheck(lambda b: self_label_loss(a, b, threshold)[0], (b,))


@given(pairs(), THRESHOLDS)
def test_weak_views_are_constants_and_inputs_are_left_alone(logits, threshold):
    before = copy.deepcopy(logits)
    a, b = (z.requires_grad_() for z in logits)
    loss, terms = self_label_loss(a, b, threshold)
    loss.backward()
    assert a.grad is None and b.grad is not None
    other, more = scan_loss(a, b, 5.0)
    other.backward()
    assert not any(term.requires_grad or term.ndim for term in [*terms.values(), *more.values()])
    close((a.detach(), b.detach()), before, rtol=0, atol=0)


def test_where_no_image_is_sure_nothing_is_learnt():
    strong = torch.randn(6, 4).requires_grad_()
    loss, terms = self_label_loss(torch.zeros(6, 4), strong, 0.99)
    loss.backward()
    assert loss.item() == terms["sure"].item() == 0 and strong.grad.norm() == 0


def test_every_cluster_has_the_same_weight_however_few_its_images():
    """One image of cluster 0 and nine of cluster 1: the gradient of the one is nine times that of each other."""
    label = torch.tensor([0] + 9 * [1])
    strong = torch.zeros(10, 2, requires_grad=True)
    self_label_loss(50.0 * F.one_hot(label), strong, 0.99)[0].backward()
    size = strong.grad.norm(dim=1)
    close(size[0], 9 * size[1])
    close(strong.grad.sum(0), torch.zeros(2))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    a, b, h = ((4 * torch.randn(64, 10, generator=generator)).to(half) for _ in range(3))
    h = torch.cat([h.float(), h.float() + 1e-3 * torch.randn(64, 10, generator=generator)])  # hard to tell apart
    for loss in (lambda a, b: scan_loss(a, b, 5.0), lambda a, b: self_label_loss(a, b, 0.9)):
        want, _ = loss(a.double(), b.double())
        with torch.autocast("cpu", torch.bfloat16):
            got, terms = loss(a, b)
            also, _ = loss(a.float(), b.float())
        assert {got.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
        assert want.dtype == torch.float64
        close(got.double(), want, rtol=1e-5, atol=0)
        close(also, got)
    with torch.autocast("cpu", torch.bfloat16):
        found = mine_neighbours(h, 1)
    assert torch.equal(found, mine_neighbours(h.double(), 1))


# ------------------------------------------------------------------------------------------------- neighbours


@given(matrices(rows=st.integers(2, 7)), st.data())
def test_neighbours_are_the_other_rows_with_the_largest_cosines(h, data):
    assume(h.norm(dim=1).min() > 0.1)
    k = data.draw(st.integers(1, len(h) - 1))
    at_once = data.draw(st.integers(1, 60))
    before = h.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "AT_ONCE", at_once)  # any number of rows at a time
        found = mine_neighbours(h, k).tolist()
    close(h, before, rtol=0, atol=0)
    for i, row in enumerate(h):
        cosines = [F.cosine_similarity(row, other, dim=0).item() for other in h]
        others = sorted((c for j, c in enumerate(cosines) if j != i), reverse=True)
        assert i not in found[i] and len(set(found[i])) == k
        assert [cosines[j] for j in found[i]] == pytest.approx(others[:k], abs=1e-9), "nearest first"


def test_no_image_is_its_own_neighbour_even_among_copies_of_itself():
    found = mine_neighbours(torch.ones(9, 3), 8)
    assert all(sorted([i, *row]) == list(range(9)) for i, row in enumerate(found.tolist()))


@pytest.mark.parametrize("k", [0, 4, 5])
def test_as_many_neighbours_as_there_are_others_at_most(k):
    with pytest.raises(ValueError, match="3 others"):
        mine_neighbours(torch.eye(4), k)


# ------------------------------------------------------------------------------------------------------ views


def test_the_hole_is_a_square_of_its_own_in_every_image():
    """Where it ends at a border it is a rectangle; it may fall between pixels and be empty."""
    x = torch.rand(200, 3, 16, 16) + 1
    holed = cutout(x, common.Draws((0,), 200), 0.5)
    gone = holed == 0
    assert torch.equal(holed[~gone], x[~gone]) and torch.equal(gone.all(1), gone.any(1)), "all channels alike"
    gone = gone[:, 0]
    high, wide = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(gone.sum((1, 2)), high * wide) and high.max() <= 9 and wide.max() <= 9
    assert gone.any(0).float().mean() > 0.9, "it can be anywhere"
    inside = ~(gone[:, 0].any(1) | gone[:, -1].any(1) | gone[:, :, 0].any(1) | gone[:, :, -1].any(1))
    assert ((high - wide).abs()[inside] <= 1).all() and len(set(high[inside].tolist())) > 4
    half = cutout(x[100:], common.Draws((0,), 200, slice(100, 200)), 0.5)
    assert torch.equal(half, holed[100:]), "the draws belong to the images"
    assert torch.equal(cutout(x, common.Draws((0,), 200), 0.0), x)


def test_images_turn_and_shear_about_their_centre_by_angles_of_their_own():
    """A line of ink through the centre tells by how much: its slope is that of the map."""
    x = torch.zeros(300, 1, 33, 33)
    x[:, :, :, 16] = 1  # upright
    assert torch.equal(turn(x, common.Draws((0,), 300), 0.0, 0.0).round(decimals=4), x)
    y = torch.arange(33) - 16.0

    def slopes(images: Tensor) -> Tensor:  # of the ink's mean column in each row, near the centre
        rows = images[:, 0, 10:23] + 1e-9
        column = (rows * y).sum(2) / rows.sum(2)
        return (column * y[10:23]).sum(1) / y[10:23].square().sum()

    turned = turn(x, common.Draws((0,), 300), 30.0, 0.0)
    angle = slopes(turned).atan() * 180 / math.pi
    assert angle.abs().max() < 31 and angle.abs().mean() == pytest.approx(15, abs=1.5) and abs(angle.mean()) < 4
    sheared = slopes(turn(x, common.Draws((0,), 300), 0.0, 0.3))
    assert sheared.abs().max() < 0.31 and sheared.abs().mean() == pytest.approx(0.15, abs=0.02)
    close(turn(x[100:], common.Draws((0,), 300, slice(100, 300)), 30.0, 0.0), turned[100:], rtol=0, atol=1e-6)


def fake_run(first_step: int, last_step: int, images: int = 12, **flags) -> SimpleNamespace:
    """What `stages` uses of a run, of images that are painted in their numbers."""
    args = scan.Args(image_size=8, batch_size=4, **flags)
    pixels = torch.arange(images, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 8, 8)
    pixels[:, 2, :4, :4] += 120  # so that it shows where an image is cropped
    data = common.Data(pixels, None, torch.full((images,), -1), [])
    compute, _ = common.compute_in("fp32", torch.device("cpu"))
    run = SimpleNamespace(args=args, train=data, compute=compute, steps_per_epoch=images // 4)
    run.first_step, run.last_step = first_step, last_step
    run.batches = functools.partial(common.Run.batches, run)
    return run


@pytest.mark.parametrize("first, last", [(0, 15), (4, 15), (6, 15), (8, 15), (2, 5), (0, 6)])
def test_neighbours_come_first_and_then_each_image_as_it_is(first, last):
    """Two epochs of three steps with neighbours, then self-labelling, wherever a run is continued or ends."""

    def number(view: common.View) -> Tensor:
        return (255 * view.x[:, 0]).mean((1, 2)).round().long()

    table = torch.stack([(torch.arange(12) + step) % 12 for step in (1, 5)], 1)  # the first and the fifth after it
    made, steps, offsets = fake_run(first, last, scan_epochs=2), [], set()
    for step, view1, view2 in scan.stages(made, table):
        steps.append(step)
        ((_, own),) = common.batch_indices(12, 4, range(step, step + 1), seed=0)
        assert number(view1).tolist() == own.tolist()
        offsets |= {(step < 6, offset) for offset in ((number(view2) - number(view1)) % 12).tolist()}
        if step >= 6:
            assert torch.equal(view1.x, made.train.pixels[torch.from_numpy(own)] / 255)
    assert steps == list(range(first, last))
    either = {(True, 1), (True, 5)}
    assert offsets - either == ({(False, 0)} if last > 6 else set())
    assert either <= offsets or first > 0


# ----------------------------------------------------------------------------------------------- network, steps


def small_resnet(arch: str, stem: str, zero_init: bool) -> tuple[nn.Module, int]:
    """In place of `backbone`: two convolutions that have the names of a ResNet's, so that --init can read them."""
    net, width = narrow(arch, stem, zero_init)
    names = ("conv1", "bn1", "relu", "layer1", "layer2", "relu2", "avgpool", "flatten")
    return nn.Sequential(OrderedDict(zip(names, net, strict=True))), width


def encoder(folder: Path) -> str:
    """A file for --init."""
    torch.manual_seed(5)
    torch.save(small_resnet("", "", False)[0].state_dict(), folder / "weights.pt")
    return str(folder / "weights.pt")


def test_heads_are_linear_layers_and_the_one_with_the_lowest_loss_is_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "backbone", small_resnet)
    torch.manual_seed(0)
    model = SCAN(scan.Args(heads=3), 5)
    x = torch.rand(4, 3, 16, 16)
    logits, h = model(x), model.backbone(x)
    assert logits.shape == (4, 3, 5)
    for head in range(3):
        rows = slice(5 * head, 5 * head + 5)
        close(logits[:, head], F.linear(h, model.heads.weight[rows], model.heads.bias[rows]))
        model.losses.copy_(torch.ones(3).index_fill(0, torch.tensor([head]), -1))
        assert torch.equal(model.best(logits), logits[:, head])
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


@pytest.fixture
def init(tmp_path) -> str:
    return encoder(tmp_path)


@pytest.fixture
def train(init, tmp_path, monkeypatch):
    args = scan.Args(
        image_size=16, batch_size=8, clusters=4, neighbours=3, heads=2, epochs=3, scan_epochs=1, threshold=0.26,
        base_lr=0.1, log_every=3, init=init,
    )  # fmt: skip
    trainer = quick.trainer(scan, args, 40, tmp_path, monkeypatch)
    monkeypatch.setattr(scan, "backbone", small_resnet)
    return trainer


def test_a_step_takes_the_losses_of_all_heads_and_then_those_of_the_best(train, monkeypatch, tmp_path):
    seen = {"scan_loss": [], "self_label_loss": []}

    def spy(loss, calls):
        def called(*arguments):
            calls.append((arguments, loss(*arguments)))
            return calls[-1][1]

        return called

    for name, calls in seen.items():
        monkeypatch.setattr(scan, name, spy(getattr(scan, name), calls))
    saved = train(max_steps=8)
    pairs, labels = seen["scan_loss"], seen["self_label_loss"]
    assert len(pairs) == 10 and len(labels) == 3, "five steps with two heads, then three with one"
    want = torch.zeros(2)
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert first[0][2] == second[0][2] == 5.0 and first[0][0].requires_grad and first[0][1].requires_grad
        want.lerp_(torch.stack([first[1][0], second[1][0]]).detach(), 1 / 5)
    close(saved["model"]["losses"], want)
    for (weak, strong, threshold), _ in labels:
        assert weak.shape == strong.shape == (8, 4) and threshold == 0.26
        assert strong.requires_grad and not weak.requires_grad
    lines = metrics(tmp_path / "run")
    assert [set(line) & {"entropy", "sure"} for line in lines] == [{"entropy"}, {"sure"}, {"sure"}]
    assert lines[0]["loss"] == pytest.approx(sum(pairs[i][1][0].item() for i in (4, 5)) / 2)
    assert lines[1]["loss"] == pytest.approx(labels[0][1][0].item()), "terms may change between two lines of the log"


def test_weak_views_are_images_as_they_are_and_the_best_head_alone_learns_from_them(train, monkeypatch):
    """The second head is said to be the best; with SGD, the other one only rolls on."""
    weak = []

    def forward(self, x):
        weak.extend([] if torch.is_grad_enabled() or not self.training else [x])
        return usual(self, x)

    usual, flags = SCAN.forward, {"optimizer": "sgd", "weight_decay": 0.0}
    monkeypatch.setattr(SCAN, "forward", forward)
    monkeypatch.setattr(SCAN, "best", lambda self, logits: logits[:, 1])
    before, after = train(max_steps=5, **flags), train(max_steps=6, **flags)
    (x,) = weak
    pixels = common.load_data()[0].pixels / 255
    assert all((image == pixels).flatten(1).all(1).any() for image in x)
    moved = (after["model"]["heads.weight"] - before["model"]["heads.weight"]).unflatten(0, (2, 4))
    (speed,) = (
        state["momentum_buffer"].unflatten(0, (2, 4))
        for state in before["optimizer"]["state"].values()
        if state["momentum_buffer"].shape == (8, 16)
    )
    ahead = -0.9 * speed * common.cosine_schedule(5, 15, 0, peak=0.1 * 8 / 256, final=0.0)
    close(moved[0], ahead[0], rtol=1e-3, atol=1e-7)
    assert (moved[1] - ahead[1]).norm() > 1e-4


def test_neighbours_are_those_of_the_encoder_that_it_starts_from(train, init):
    (data, _), net = common.load_data(), small_resnet("", "", False)[0]
    saved = train(max_steps=7)
    net.load_state_dict(torch.load(init, weights_only=True))
    net.eval()
    with torch.no_grad():
        h = net(data.pixels / 255)  # mean 0, standard deviation 1
    cosine = F.cosine_similarity(h[:, None].double(), h[None].double(), dim=2).fill_diagonal_(-2)
    got = cosine.gather(1, saved["neighbours"]["rows"].long())
    close(got, cosine.sort(dim=1, descending=True).values[:, :3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stop", [3, 5, 9])
def test_a_resumed_run_is_the_same_in_either_stage(train, stop):
    train("parts", max_steps=stop)
    whole, parts = train("whole", max_steps=12), train("parts", max_steps=12)
    for name in ("model", "neighbours"):
        assert whole[name].keys() == parts[name].keys()
        for key, tensor in whole[name].items():
            close(parts[name][key], tensor, rtol=0, atol=0)
    assert whole["neighbours"]["rows"].shape == (40, 3)


def test_a_frozen_backbone_stays_as_it_is_and_the_heads_learn(train, init):
    first, last = (train(f"{steps}", max_steps=steps, freeze_backbone=True)["model"] for steps in (1, 8))
    for name, weight in torch.load(init, weights_only=True).items():
        close(last[f"backbone.{name}"], weight, rtol=0, atol=0)
    assert not torch.equal(first["heads.weight"], last["heads.weight"])


def test_it_sorts_three_kinds_of_images(train, monkeypatch):
    """Red, green and blue noise: from random heads to clusters that are the kinds."""
    labels = torch.arange(48) % 3
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, (48, 3, 16, 16), generator=generator)
    pixels[torch.arange(48), labels] += 150
    data = common.Data(pixels.to(torch.uint8), None, torch.full((48,), -1), [])
    monkeypatch.setattr(common, "load_data", lambda *_: (data, None))
    flags = {"color_jitter": False, "grayscale": False, "clusters": 3, "batch_size": 24, "epochs": 40}
    saved = train(**flags, scan_epochs=25, threshold=0.9, base_lr=0.05)["model"]
    torch.manual_seed(0)
    model = SCAN(scan.Args(heads=2), 3)
    model.load_state_dict(saved)
    model.eval()
    with torch.no_grad():
        cluster = model.best(model(data.pixels / 255)).argmax(1)
    assert len(set(zip(cluster.tolist(), labels.tolist(), strict=True))) == len(set(cluster.tolist())) == 3


# ------------------------------------------------------------------------------------------------------ flags

IMPOSSIBLE = [
    ({"init": ""}, "needs a trained encoder: run python simclr.py, then give its folder, --init runs/simclr"),
    ({"threshold": 1.5}, "--threshold "),
    ({"threshold": math.nan}, "--threshold "),
    ({"entropy_weight": -1.0}, "--entropy-weight "),
    ({"jitter_strength": -1.0}, "--jitter-strength "),
    ({"cutout": 1.5}, "--cutout "),
    ({"degrees": 200.0}, "--degrees "),
    ({"shear": -0.1}, "--shear "),
    ({"scan_epochs": 0}, "--scan-epochs "),
    ({"heads": 0}, "--heads must be 1 to 100"),
    ({"neighbours": 0}, "--neighbours must be 1 to 63"),
    ({"neighbours": 64}, "--neighbours must be 1 to 63"),
    ({"clusters": 1}, "--clusters must be 2 to "),
    ({"clusters": 10**9}, "--clusters must be 2 to "),
]


@pytest.mark.parametrize("flags, named", IMPOSSIBLE)
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        scan.main(tiny("scan", tmp_path / "run", **{"init": "weights.pt", **flags}))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "run").exists()


def test_images_without_classes_need_the_number_of_clusters(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        scan.main(tiny("scan", tmp_path / "run", data_dir=f"{small_folder()}/train/a", init="weights.pt"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "--clusters" in said


def test_the_normalisation_has_to_be_that_of_the_encoders_run(tmp_path, capsys):
    """simclr.py's is the default; another run's is named, so that it can be copied."""
    args = scan.Args(init=str(tmp_path))
    train = common.Data(torch.zeros(64, 3, 1, 1), None, torch.zeros(64), ["a", "b"])
    for method, fits in (("simclr", True), ("vicreg", False)):
        flags = dataclasses.asdict(tiny(method, tmp_path))
        (tmp_path / "args.json").write_text(json.dumps(flags))
        end = contextlib.nullcontext() if fits else pytest.raises(SystemExit)
        with end:
            scan.check(args, train)
    said = capsys.readouterr().err
    line = "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
    assert said.count("\n") == 1 and line in said
    given = common.parse_args(scan.Args, scan.RECIPES, [*line.split(), "--init", str(tmp_path)])
    scan.check(given, train)


def test_the_recipes_fit():
    for name, images, classes in (("quick", 5000, 10), ("cifar", 50_000, 10), ("imagenet", 1_281_167, 1000)):
        labels = torch.zeros(1).expand(images)
        data = common.Data(None, None, labels, [str(c) for c in range(classes)], targets=labels)
        args = scan.Args(**scan.RECIPES[name], recipe=name, init="weights.pt")
        scan.check(args, data)
        assert scan.cluster_count(args, data) == classes and args.scan_epochs <= args.epochs


# -------------------------------------------------------------------------------------------------- processes


def gradients() -> list[tuple[Tensor, list[Tensor]]]:
    """(loss, gradients) averaged over ranks as DDP does it, of both losses; rows that differ from rank to rank."""
    _, world = common.rank_and_world()
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1, 13, dtype=torch.float64)[:, None] / 3
    a, b = (torch.randn(12, 5, generator=generator, dtype=torch.float64) * size for _ in range(2))
    rows, found = common.my_rows(12), []
    for loss in (lambda a, b: scan_loss(a, b, 5.0), lambda a, b: self_label_loss(a, b, 0.6)):
        x, y = (z[rows].clone().requires_grad_() for z in (a, b))
        value, _ = loss(x, y)
        value.backward()
        grads = [common.all_gather(z.grad) / world for z in (x, y) if z.grad is not None]
        found.append((common.all_gather(value.detach()[None]).mean(), grads))
    return found


def run_train(folder: str, data_dir: str, init: str, steps: int) -> None:
    scan.backbone = small_resnet
    flags = {"epochs": 2, "scan_epochs": 1, "max_steps": steps, "eval_every": 1, "save_every": 1, "precision": "fp64"}
    flags |= {"warmup_epochs": 0, "base_lr": 0.02, "threshold": 0.3, "weight_decay": 0.1}
    with contextlib.redirect_stdout(io.StringIO()):
        scan.main(tiny("scan", Path(folder), data_dir=data_dir, init=init, **flags))


def test_several_processes_give_the_gradient_of_one_and_the_same_run(tmp_path):
    """Begun on two processes, a run goes on on one, too: the table is in the checkpoint and the same on both."""
    want = gradients()
    assert all(g.abs().max() > 1e-6 for _, grads in want for g in grads)
    assert [len(grads) for _, grads in want] == [2, 1]
    data, init = small_folder(), encoder(tmp_path)

    def job(name: str, steps: int):
        return run_train, (str(tmp_path / name), data, init, steps)

    run_on(1, [job("1", 8)])
    for world in (2, 4):
        jobs = [(gradients, ())] + [job("2", 8), job("2 then 1", 6)] * (world == 2)
        for got in run_on(world, jobs)[0]:
            for (loss, grads), (loss1, grads1) in zip(want, got, strict=True):
                close(loss1, loss, rtol=1e-10, atol=1e-12)
                close(grads1, grads, rtol=1e-10, atol=1e-10)
    run_on(1, [job("2 then 1", 8)])
    for other in ("2", "2 then 1"):
        lines = [[line for line in metrics(tmp_path / run) if "loss" in line] for run in ("1", other)]
        assert len(lines[0]) == len(lines[1]) == 8
        for a, b in zip(*lines, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"images_per_s"}:
                assert math.isclose(a[key], b[key], rel_tol=1e-9, abs_tol=1e-10), (other, a["step"], key)
        saved = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("1", other)]
        for part in ("model", "neighbours"):
            close(saved[1][part], saved[0][part], rtol=1e-7, atol=1e-9)
    assert {"entropy", "sure"} <= {name for line in metrics(tmp_path / "1") for name in line}
