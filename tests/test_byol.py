"""BYOL's loss against an independent oracle and the official numbers, its target network, and the order of a step."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import vectors
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from strategies import matrices, numbers, pairs
from torch import nn

import byol
import vicreg
from byol import BYOL, Args, Target, byol_loss, tau_schedule, update_target

close = torch.testing.assert_close
SMALL = Args(image_size=16, batch_size=4, projector_hidden=8, projector_dim=6, predictor_hidden=8, warmup_epochs=0)


def in_plain_loops(p: list[list[float]], z: list[list[float]]) -> float:
    """Eq. 2 as a squared distance of unit vectors; a row of (almost) no length counts as 0."""
    total = 0.0
    for a, b in zip(p, z, strict=True):
        norm_a, norm_b = (max(math.sqrt(sum(x * x for x in row)), 1e-12) for row in (a, b))
        dot = sum(x / norm_a * y / norm_b for x, y in zip(a, b, strict=True))
        total += 2 - 2 * dot
    return total / len(p)


def long(views) -> bool:
    """No row near 0, where the direction and with it the loss jump."""
    return min(z.norm(dim=1).min().item() for z in views) > 0.1


def test_official_numbers():
    a, b = vectors.views()
    loss = byol_loss(a, b)[0] + byol_loss(b, a)[0]
    loss.backward()
    assert loss.item() == pytest.approx(0.03022912, abs=5e-9)
    assert [a.grad.norm().item(), b.grad.norm().item()] == pytest.approx([0.06932915, 0.05489605], abs=5e-9)


@given(pairs())
def test_equals_the_equation_in_plain_loops(views):
    p, z = views
    loss, terms = byol_loss(p, z)
    want = in_plain_loops(p.tolist(), z.tolist())
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert terms["cosine"].item() == pytest.approx(1 - want / 2, rel=1e-9, abs=1e-9)


@given(pairs(rows=st.integers(1, 7)))
def test_is_the_squared_distance_of_unit_vectors_between_0_and_4(views):
    assume(long(views))
    p, z = (t / t.norm(dim=1, keepdim=True) for t in views)
    loss = byol_loss(*views)[0].item()
    assert loss == pytest.approx(((p - z) ** 2).sum(1).mean().item(), abs=1e-9)  # so 0 for equal directions only
    assert -1e-9 <= loss <= 4 + 1e-9


STRETCHES = st.lists(st.floats(0.01, 100), min_size=7, max_size=7)  # one for each row


@given(matrices(rows=st.integers(1, 7)), STRETCHES)
def test_is_0_for_the_same_direction_and_4_for_the_opposite(z, stretches):
    assume(long([z]))
    stretch = torch.tensor(stretches, dtype=z.dtype)[: len(z), None]
    assert byol_loss(stretch * z, z)[0].item() == pytest.approx(0, abs=1e-9)
    assert byol_loss(-stretch * z, z)[0].item() == pytest.approx(4, abs=1e-9)


@given(pairs(), STRETCHES, STRETCHES)
def test_lengths_do_not_matter(views, first, second):
    assume(long(views))
    s1, s2 = (torch.tensor(s, dtype=torch.float64)[: len(views[0]), None] for s in (first, second))
    close(byol_loss(s1 * views[0], s2 * views[1])[0], byol_loss(*views)[0], rtol=1e-7, atol=1e-7)


@given(pairs(), st.randoms())
def test_permuting_the_batch_changes_nothing(views, random):
    order = random.sample(range(len(views[0])), len(views[0]))
    close(byol_loss(*views)[0], byol_loss(views[0][order], views[1][order])[0])


@given(pairs())
def test_no_gradient_reaches_the_target(views):
    p, z = (t.requires_grad_() for t in views)
    byol_loss(p, z)[0].backward()
    assert p.grad is not None and z.grad is None


@given(matrices())
def test_the_target_is_a_constant_even_where_it_is_the_prediction(z):
    """Without a stop-gradient the gradient would be twice that."""
    assume(long([z]))
    same, apart = z.clone().requires_grad_(), z.clone().requires_grad_()
    turned = z.roll(1, 0)
    byol_loss(same, same.roll(1, 0))[0].backward()
    byol_loss(apart, turned)[0].backward()
    close(same.grad, apart.grad)


@given(pairs(rows=st.integers(1, 3), columns=st.integers(1, 4)))
def test_gradient_is_that_of_finite_differences(views):
    assume(long(views))
    p, z = views
    assert torch.autograd.gradcheck(lambda t: byol_loss(t, z)[0], [p.requires_grad_()], atol=1e-4, rtol=1e-4)


@given(pairs())
def test_inputs_are_left_alone(views):
    before = copy.deepcopy(views)
    byol_loss(*(z.requires_grad_() for z in views))[0].backward()
    close(views[0].detach(), before[0], rtol=0, atol=0)
    close(views[1].detach(), before[1], rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    a, b = (100 * torch.randn(64, 32, generator=generator) for _ in range(2))
    a, b = a.to(half), b.to(half)
    want, _ = byol_loss(a.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = byol_loss(a, b)
        also, _ = byol_loss(a.float(), b.float())
    assert want.dtype == torch.float64
    assert got.dtype == torch.float32
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


@given(matrices(rows=st.integers(2, 9), columns=st.integers(2, 9)))
def test_the_penalties_are_those_of_vicreg(z):
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    for module, leaf in (byol, mine), (vicreg, theirs):
        (3 * module.variance_loss(leaf) + 5 * module.covariance_loss(leaf)).backward()
    close(byol.variance_loss(mine), vicreg.variance_loss(theirs))
    close(byol.covariance_loss(mine), vicreg.covariance_loss(theirs))
    close(mine.grad, theirs.grad)


# ------------------------------------------------------------------------------------------------------ target


def little(values: list[float]) -> nn.Module:
    """A layer with weights and BatchNorm buffers, filled with `values` over and over."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    for i, t in enumerate([*net.parameters(), *net.buffers()]):
        t.data.copy_(torch.tensor([values[(i + j) % len(values)] for j in range(t.numel())]).view(t.shape))
    return net


VALUES = st.lists(numbers(), min_size=3, max_size=5)


@given(VALUES, VALUES, st.floats(0, 1))
def test_the_target_becomes_a_convex_combination_entry_by_entry(xi, theta, tau):
    target, online = little(xi), little(theta)
    before, buffers = copy.deepcopy(target), [b.clone() for b in target.buffers()]
    update_target(target, online, tau)
    for new, old, other in zip(target.parameters(), before.parameters(), online.parameters(), strict=True):
        rows = zip(new.flatten().tolist(), old.flatten().tolist(), other.flatten().tolist(), strict=True)
        for got, mine, theirs in rows:
            assert got == pytest.approx(tau * mine + (1 - tau) * theirs, abs=1e-12)
            assert min(mine, theirs) - 1e-12 <= got <= max(mine, theirs) + 1e-12
    close(list(target.buffers()), buffers, rtol=0, atol=0)  # running statistics are not averaged
    close(list(online.parameters()), list(little(theta).parameters()), rtol=0, atol=0)


@given(VALUES, VALUES)
def test_tau_0_copies_and_tau_1_keeps(xi, theta):
    target, online = little(xi), little(theta)
    update_target(target, online, 1.0)
    close(list(target.parameters()), list(little(xi).parameters()), rtol=0, atol=0)
    update_target(target, online, 0.0)
    close(list(target.parameters()), list(online.parameters()), rtol=0, atol=0)


def test_the_target_follows_weights_of_the_same_name():
    model = BYOL(SMALL)
    target = Target(model)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.fill_(i)
    update_target(target, model, 0.0)
    names = [name for name, _ in target.named_parameters()]
    assert names == [n for n, _ in model.named_parameters() if n.startswith(("backbone.", "projector."))]
    close(list(target.parameters()), [model.get_parameter(name).data for name in names], check_stride=False)


@given(st.floats(0, 1), st.integers(1, 400))
def test_tau_rises_from_base_to_1(base, total):
    tau = [tau_schedule(step, total, base) for step in range(total + 1)]
    assert tau[0] == pytest.approx(base, abs=1e-12)
    assert tau[-1] == pytest.approx(1, abs=1e-12)
    assert all(a <= b for a, b in itertools.pairwise(tau))
    if total % 2 == 0:
        assert tau[total // 2] == pytest.approx((base + 1) / 2)


# ----------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("predictor", [True, False])
def test_every_online_weight_gets_a_gradient_and_no_weight_of_the_target(predictor):
    torch.manual_seed(0)
    model = BYOL(dataclasses.replace(SMALL, predictor=predictor))
    target = Target(model)
    x1, x2 = torch.rand(2, 4, 3, 16, 16)
    p1, p2, z1, z2 = model(x1, x2)
    target1, target2 = target(x1, x2)
    close((target1, target2), (z1, z2))  # a copy, on batch statistics, without a predictor
    assert (p1 is z1) == (not predictor)
    assert p1.shape == p2.shape == z1.shape == (4, 6)
    (byol_loss(p1, target2)[0] + byol_loss(p2, target1)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())


def test_each_view_is_a_batch_of_its_own():
    torch.manual_seed(0)
    model = BYOL(SMALL)
    x1, x2 = torch.rand(2, 4, 3, 16, 16)
    close(model(x1, x2)[0], model(x1, 5 * x2)[0])
    close(model(x1, x2)[1], model(5 * x1, x2)[1])


def tiny_backbone(arch: str, stem: str, zero_init: bool) -> tuple[nn.Module, int]:
    """In place of a ResNet where a test needs whole runs."""
    conv = nn.Conv2d(3, 8, 4, stride=4)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 8


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function: the checkpoint after a short run on a few images without labels."""
    monkeypatch.setattr(byol, "backbone", tiny_backbone)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        pixels = bytes(37 * (i + 1) * j % 251 for j in range(16 * 16 * 3))
        Image.frombytes("RGB", (16, 16), pixels).save(images / f"{i}.png")

    def run(name: str = "run", **flags) -> dict:
        where = {"run_dir": str(tmp_path / name), "dataset": "folder", "data_dir": str(images), "epochs": 5}
        byol.main(dataclasses.replace(SMALL, **where, **flags))
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)

    return run


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_the_target_moves_after_the_optimizer_and_by_tau(train, optimizer):
    flags = dict(optimizer=optimizer, base_tau=0.75)
    saved = train(max_steps=1, **flags)
    torch.manual_seed(0)
    start = dict(BYOL(SMALL).named_parameters())  # of both networks
    moved = 0
    for name in start.keys() & saved["target"].keys():
        old, online, got = start[name].detach(), saved["model"][name], saved["target"][name]
        close(got, 0.75 * old + 0.25 * online, rtol=1e-5, atol=1e-7)
        moved += not torch.equal(got, old)
    assert moved >= 6  # of 9: biases in front of BatchNorm may stay
    later = train("longer", max_steps=2, **flags)
    tau = 1 - 0.25 * (math.cos(math.pi / 10) + 1) / 2  # step 1 of 10
    for name in start.keys() & saved["target"].keys():
        want = tau * saved["target"][name] + (1 - tau) * later["model"][name]
        close(later["target"][name], want, rtol=1e-5, atol=1e-7)


def test_the_predictors_weights_learn_faster_by_the_factor(train):
    saved = train(base_lr=0.64, warmup_epochs=0, max_steps=1, predictor_lr_factor=7.0)
    rates = {number: group["lr"] for group in saved["optimizer"]["param_groups"] for number in group["params"]}
    shapes = {number: buffers["momentum_buffer"].ndim for number, buffers in saved["optimizer"]["state"].items()}
    peak = 0.64 * SMALL.batch_size / 256
    fast = [number for number, rate in rates.items() if rate == pytest.approx(7 * peak)]
    assert len(fast) == 2 and all(shapes[number] == 2 for number in fast)
    assert all(rate == pytest.approx(peak) for number, rate in rates.items() if number not in fast)


def test_running_statistics_of_the_target_come_from_its_own_passes(train):
    saved = train(max_steps=3)
    assert saved["target"]["backbone.1.num_batches_tracked"].item() == 6  # two views in each of three steps
    name = "projector.1.running_var"
    assert not torch.equal(saved["target"][name], saved["model"][name])
    assert not torch.equal(saved["target"][name], torch.ones_like(saved["target"][name]))


def test_a_continued_run_continues_the_target(train):
    flags = dict(std_coeff=1.0, cov_coeff=0.01)
    train("twice", max_steps=1, **flags)
    twice, once = train("twice", max_steps=3, **flags), train("once", max_steps=3, **flags)
    assert twice["target"].keys() == once["target"].keys()
    assert all(torch.equal(twice["target"][name], once["target"][name]) for name in once["target"])
    assert all(torch.equal(twice["model"][name], once["model"][name]) for name in once["model"])


@pytest.mark.parametrize(
    "flags",
    [
        {"base_tau": 1.5},
        {"base_tau": math.nan},
        {"projector_dim": 0},
        {"std_coeff": -1.0},
        {"predictor_lr_factor": 0.0},
        {"cov_coeff": math.nan},
    ],
)
def test_impossible_flags_end_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as end:
        byol.check(dataclasses.replace(SMALL, **flags))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--" + next(iter(flags)).replace("_", "-") in message
