"""SimSiam's loss against an independent oracle and the official numbers, its stop-gradient and its learning rates."""

import copy
import dataclasses
import math

import pytest
import torch
import vectors
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from strategies import matrices, pairs
from torch import nn

import simsiam
import vicreg
from simsiam import Args, SimSiam, simsiam_loss

close = torch.testing.assert_close
SMALL = Args(image_size=16, batch_size=4, projector_dim=8)
STRETCHES = st.lists(st.floats(0.01, 100), min_size=7, max_size=7)  # one for each row


def in_plain_loops(p: list[list[float]], z: list[list[float]]) -> float:
    """Eq. 1; a row of (almost) no length counts as 0."""
    total = 0.0
    for a, b in zip(p, z, strict=True):
        norm_a, norm_b = (max(math.sqrt(sum(x * x for x in row)), 1e-12) for row in (a, b))
        total -= sum(x / norm_a * y / norm_b for x, y in zip(a, b, strict=True))
    return total / len(p)


def long(views) -> bool:
    """No row near 0, where the direction and with it the loss jump."""
    return min(z.norm(dim=1).min().item() for z in views) > 0.1


def test_official_numbers():
    a, b = vectors.views()
    loss = (simsiam_loss(a, b)[0] + simsiam_loss(b, a)[0]) / 2
    loss.backward()
    assert loss.item() == pytest.approx(-0.99244272, abs=5e-9)
    assert [a.grad.norm().item(), b.grad.norm().item()] == pytest.approx([0.01733229, 0.01372401], abs=5e-9)


@given(pairs())
def test_equals_the_equation_in_plain_loops(views):
    loss, terms = simsiam_loss(*views)
    want = in_plain_loops(views[0].tolist(), views[1].tolist())
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert terms["cosine"].item() == pytest.approx(-want, rel=1e-9, abs=1e-9)


@given(pairs(rows=st.integers(1, 7)))
def test_is_between_minus_1_and_1_and_minus_1_for_equal_directions_only(views):
    assume(long(views))
    p, z = (t / t.norm(dim=1, keepdim=True) for t in views)
    loss = simsiam_loss(*views)[0].item()
    assert loss == pytest.approx(((p - z) ** 2).sum(1).mean().item() / 2 - 1, abs=1e-9)
    assert -1 - 1e-9 <= loss <= 1 + 1e-9


@given(matrices(rows=st.integers(1, 7)), STRETCHES)
def test_is_minus_1_for_the_same_direction_and_1_for_the_opposite(z, stretches):
    assume(long([z]))
    stretch = torch.tensor(stretches, dtype=z.dtype)[: len(z), None]
    assert simsiam_loss(stretch * z, z)[0].item() == pytest.approx(-1, abs=1e-9)
    assert simsiam_loss(-stretch * z, z)[0].item() == pytest.approx(1, abs=1e-9)


@given(pairs(), st.randoms())
def test_permuting_the_batch_changes_nothing(views, random):
    order = random.sample(range(len(views[0])), len(views[0]))
    close(simsiam_loss(*views)[0], simsiam_loss(views[0][order], views[1][order])[0])


@given(pairs())
def test_no_gradient_reaches_z_unless_asked_for(views):
    assume(long(views))
    p, z = (t.requires_grad_() for t in views)
    simsiam_loss(p, z)[0].backward()
    assert p.grad is not None and z.grad is None
    p_grad, p.grad = p.grad, None
    simsiam_loss(p, z, stop_gradient=False)[0].backward()
    close(p.grad, p_grad)
    other = z.detach().clone().requires_grad_()
    simsiam_loss(other, p.detach())[0].backward()  # the cosine is symmetric
    close(z.grad, other.grad)


@given(matrices())
def test_without_a_predictor_the_stop_gradient_only_halves_the_gradient(z):
    """Section 4.2: why the predictor is needed."""
    assume(long([z]))
    grads = []
    for stop_gradient in (True, False):
        a = z.clone().requires_grad_()
        b = a.flip(1) + 0.5  # any other view
        assume(long([b]))
        first, second = simsiam_loss(a, b, stop_gradient)[0], simsiam_loss(b, a, stop_gradient)[0]
        ((first + second) / 2).backward()
        grads.append(a.grad)
    close(2 * grads[0], grads[1])


@pytest.mark.parametrize("stop_gradient", [True, False])
@given(pairs(rows=st.integers(1, 3), columns=st.integers(1, 4)))
def test_gradient_is_that_of_finite_differences(stop_gradient, views):
    assume(long(views))
    p, z = (t.clone() for t in views)
    leaves = [p.requires_grad_()] if stop_gradient else [p.requires_grad_(), z.requires_grad_()]
    assert torch.autograd.gradcheck(lambda p, z=z: simsiam_loss(p, z, stop_gradient)[0], leaves, atol=1e-4, rtol=1e-4)


@given(pairs())
def test_inputs_are_left_alone(views):
    before = copy.deepcopy(views)
    simsiam_loss(*(z.requires_grad_() for z in views))[0].backward()
    close(views[0].detach(), before[0], rtol=0, atol=0)
    close(views[1].detach(), before[1], rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    a = 100 * torch.randn(64, 32, generator=generator)
    b = a + 100 * torch.randn(64, 32, generator=generator)  # a loss well away from 0
    a, b = a.to(half), b.to(half)
    want, _ = simsiam_loss(a.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = simsiam_loss(a, b)
        also, _ = simsiam_loss(a.float(), b.float())
    assert want.dtype == torch.float64
    assert got.dtype == torch.float32
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


@given(matrices(rows=st.integers(2, 9), columns=st.integers(2, 9)))
def test_the_penalties_are_those_of_vicreg(z):
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    for module, leaf in (simsiam, mine), (vicreg, theirs):
        (3 * module.variance_loss(leaf) + 5 * module.covariance_loss(leaf)).backward()
    close(simsiam.variance_loss(mine), vicreg.variance_loss(theirs))
    close(simsiam.covariance_loss(mine), vicreg.covariance_loss(theirs))
    close(mine.grad, theirs.grad)


# ----------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("predictor", [True, False])
def test_every_weight_gets_a_gradient(predictor, stop_gradient):
    torch.manual_seed(0)
    model = SimSiam(dataclasses.replace(SMALL, predictor=predictor))
    x1, x2 = torch.rand(2, 4, 3, 16, 16)
    p1, p2, z1, z2 = model(x1, x2)
    assert (p1 is z1) == (not predictor)
    assert p1.shape == p2.shape == z1.shape == z2.shape == (4, 8)
    (simsiam_loss(p1, z2, stop_gradient)[0] + simsiam_loss(p2, z1, stop_gradient)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("layers", [2, 3])
def test_the_projections_of_each_view_are_standardised(layers):
    torch.manual_seed(0)
    model = SimSiam(dataclasses.replace(SMALL, projector_layers=layers))
    assert sum(isinstance(m, nn.Linear) for m in model.projector) == layers
    assert not model.projector[-1].affine
    assert [m.out_features for m in model.predictor if isinstance(m, nn.Linear)] == [2, 8]
    x1, x2 = torch.rand(2, 16, 3, 16, 16)
    _, _, z1, z2 = model(x1, 5 * x2)
    for z in z1, z2:
        close(z.mean(0), torch.zeros(8), rtol=0, atol=1e-4)
        close(z.std(0, correction=0), torch.ones(8), rtol=0.05, atol=0)  # eps takes a little off
    close(model(x1, x2)[0], model(x1, 5 * x2)[0])


def tiny_backbone(arch: str, stem: str, zero_init: bool) -> tuple[nn.Module, int]:
    """In place of a ResNet where a test needs whole runs."""
    conv = nn.Conv2d(3, 8, 4, stride=4)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 8


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function: the checkpoint after a short run on a few images without labels."""
    monkeypatch.setattr(simsiam, "backbone", tiny_backbone)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        pixels = bytes(37 * (i + 1) * j % 251 for j in range(16 * 16 * 3))
        Image.frombytes("RGB", (16, 16), pixels).save(images / f"{i}.png")

    def run(name: str = "run", **flags) -> dict:
        where = {"run_dir": str(tmp_path / name), "dataset": "folder", "data_dir": str(images), "epochs": 5}
        simsiam.main(dataclasses.replace(SMALL, **where, **flags))
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)

    return run


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("fixed", [True, False])
def test_the_learning_rate_of_the_predictor_stays_at_its_peak(train, optimizer, fixed):
    flags = dict(fix_predictor_lr=fixed, predictor_lr_factor=3.0)
    saved = train(optimizer=optimizer, base_lr=0.64, warmup_epochs=1, **flags)
    peak = 0.64 * 4 / 256
    final = peak * (1 + math.cos(math.pi * 7 / 8)) / 2  # the last of 8 steps after 2 of warm-up
    rates = [group["lr"] for group in saved["optimizer"]["param_groups"]]  # backbone, projector, predictor: two each
    assert rates == pytest.approx([final] * 4 + [3 * (peak if fixed else final)] * 2)


@pytest.mark.parametrize("fixed", [True, False])
def test_the_first_step_of_the_warm_up_moves_the_fixed_predictor_alone(train, fixed):
    saved = train(fix_predictor_lr=fixed, warmup_epochs=1, max_steps=1)
    torch.manual_seed(0)
    model = SimSiam(SMALL)
    names = [name for name, _ in model.named_parameters()]
    moved = {n.split(".")[0] for n in names if not torch.equal(model.get_parameter(n), saved["model"][n])}
    assert moved == ({"predictor"} if fixed else set())


def test_weight_decay_reaches_every_parameter_under_sgd(train):
    saved = train(max_steps=1, weight_decay=0.5)
    assert {group["weight_decay"] for group in saved["optimizer"]["param_groups"]} == {0.5}
    torch.manual_seed(0)
    model = SimSiam(SMALL)
    numbers = [number for group in saved["optimizer"]["param_groups"] for number in group["params"]]
    assert len(numbers) == len(list(model.parameters()))


def test_lars_adapts_weights_alone(train):
    saved = train(max_steps=1, optimizer="lars", weight_decay=0.5)
    buffers = saved["optimizer"]["state"]
    for group in saved["optimizer"]["param_groups"]:
        assert all((buffers[number]["momentum_buffer"].ndim > 1) == group["adapt"] for number in group["params"])


@pytest.mark.parametrize("flags", [{}, {"predictor": False}, {"std_coeff": 1.0, "cov_coeff": 0.01}])
def test_a_continued_run_ends_as_an_uninterrupted_one(train, flags):
    train("twice", max_steps=1, **flags)
    twice, once = train("twice", max_steps=3, **flags), train("once", max_steps=3, **flags)
    assert all(torch.equal(twice["model"][name], once["model"][name]) for name in once["model"])


@pytest.mark.parametrize(
    "flags", [{"projector_layers": 4}, {"projector_dim": 3}, {"std_coeff": -1.0}, {"cov_coeff": math.nan}]
)
def test_impossible_flags_end_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as end:
        simsiam.check(dataclasses.replace(SMALL, **flags))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--" + next(iter(flags)).replace("_", "-") in message
