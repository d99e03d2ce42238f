"""SimSiam's stop-gradient, projections and learning rates. What it shares with BYOL is in test_predictors.py."""

import dataclasses
import math

import pytest
import quick
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import matrices, pairs
from torch import nn

import simsiam
from simsiam import Args, SimSiam, simsiam_loss

close = torch.testing.assert_close
SMALL = Args(image_size=16, batch_size=4, epochs=5, projector_dim=8)


def long(views) -> bool:
    """No row near 0, where the direction and with it the loss jump."""
    return min(z.norm(dim=1).min().item() for z in views) > 0.1


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


@given(pairs(rows=st.integers(1, 3), columns=st.integers(1, 4)))
def test_without_the_stop_gradient_both_gradients_are_those_of_finite_differences(views):
    assume(long(views))
    leaves = [t.clone().requires_grad_() for t in views]
    assert torch.autograd.gradcheck(lambda p, z: simsiam_loss(p, z, False)[0], leaves, atol=1e-4, rtol=1e-4)


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


@pytest.fixture
def train(tmp_path, monkeypatch):
    return quick.trainer(simsiam, SMALL, 8, tmp_path, monkeypatch)


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
