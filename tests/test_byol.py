"""BYOL's target network, and the order of a step. What it shares with SimSiam is in test_predictors.py."""

import copy
import dataclasses
import itertools
import math

import pytest
import quick
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import numbers
from torch import nn

import byol
from byol import BYOL, Args, Target, byol_loss, tau_schedule, update_target

close = torch.testing.assert_close
SMALL = Args(image_size=16, batch_size=4, epochs=5, projector_hidden=8, projector_dim=6, predictor_hidden=8)
SMALL = dataclasses.replace(SMALL, warmup_epochs=0)

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


@pytest.fixture
def train(tmp_path, monkeypatch):
    return quick.trainer(byol, SMALL, 8, tmp_path, monkeypatch)


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
    assert moved >= 10  # of 11: the bias in front of BatchNorm may stay
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
