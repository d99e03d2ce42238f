"""What BYOL and SimSiam share: the loss of a prediction, VICReg's penalties, a network with a predictor."""

import copy
import dataclasses
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import quick
import torch
import vectors
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import matrices, pairs
from torch import nn

import byol
import common
import simsiam
import vicreg

close = torch.testing.assert_close


@dataclasses.dataclass
class Predicting:
    """A method whose loss is the mean over images of a function of the cosine of prediction and target."""

    module: ModuleType
    small: common.Flags
    network: type[nn.Module]
    loss: Callable
    of_cosine: Callable[[float], float]
    both_directions: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


SIZES = {"image_size": 16, "batch_size": 4, "epochs": 5}
BYOL = Predicting(
    byol,
    byol.Args(projector_hidden=8, projector_dim=6, predictor_hidden=8, warmup_epochs=0, **SIZES),
    byol.BYOL,
    byol.byol_loss,
    lambda cosine: 2 - 2 * cosine,
    lambda a, b: byol.byol_loss(a, b)[0] + byol.byol_loss(b, a)[0],
)
SIMSIAM = Predicting(
    simsiam,
    simsiam.Args(projector_dim=8, **SIZES),
    simsiam.SimSiam,
    simsiam.simsiam_loss,
    lambda cosine: -cosine,
    lambda a, b: (simsiam.simsiam_loss(a, b)[0] + simsiam.simsiam_loss(b, a)[0]) / 2,
)
both = pytest.mark.parametrize("method", [pytest.param(BYOL, id="byol"), pytest.param(SIMSIAM, id="simsiam")])
STRETCHES = st.lists(st.floats(0.01, 100), min_size=7, max_size=7)  # one for each row


def cosine_in_plain_loops(p: list[list[float]], z: list[list[float]]) -> float:
    """The mean over images; a row of (almost) no length counts as 0."""
    total = 0.0
    for a, b in zip(p, z, strict=True):
        norm_a, norm_b = (max(math.sqrt(sum(x * x for x in row)), 1e-12) for row in (a, b))
        total += sum(x / norm_a * y / norm_b for x, y in zip(a, b, strict=True))
    return total / len(p)


def long(*views: torch.Tensor) -> bool:
    """No row near 0, where the direction and with it the loss jump."""
    return min(z.norm(dim=1).min().item() for z in views) > 0.1


def columns(stretches: list[float], z: torch.Tensor) -> torch.Tensor:
    return torch.tensor(stretches, dtype=z.dtype)[: len(z), None]


# ------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    "method, want, gradients",
    [(BYOL, 0.03022912, [0.06932915, 0.05489605]), (SIMSIAM, -0.99244272, [0.01733229, 0.01372401])],
    ids=["byol", "simsiam"],
)
def test_official_numbers(method, want, gradients):
    a, b = vectors.views()
    loss = method.both_directions(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=5e-9)
    assert [a.grad.norm().item(), b.grad.norm().item()] == pytest.approx(gradients, abs=5e-9)


@both
@given(views=pairs(rows=st.integers(1, 7)))
def test_equals_the_equation_in_plain_loops(method, views):
    p, z = views
    loss, terms = method.loss(p, z)
    want = cosine_in_plain_loops(p.tolist(), z.tolist())
    assert loss.item() == pytest.approx(method.of_cosine(want), rel=1e-9, abs=1e-9)
    assert terms["cosine"].item() == pytest.approx(want, rel=1e-9, abs=1e-9)


@both
@given(views=pairs(rows=st.integers(1, 7)))
def test_grows_with_the_squared_distance_of_unit_vectors(method, views):
    """So it is lowest for equal directions only, and bounded by those and by opposite ones."""
    assume(long(*views))
    p, z = (t / t.norm(dim=1, keepdim=True) for t in views)
    loss, distance = method.loss(*views)[0].item(), ((p - z) ** 2).sum(1).mean().item()
    assert loss == pytest.approx(method.of_cosine(1 - distance / 2), abs=1e-9)
    assert method.of_cosine(1) - 1e-9 <= loss <= method.of_cosine(-1) + 1e-9


@both
@given(z=matrices(rows=st.integers(1, 7)), stretches=STRETCHES)
def test_is_lowest_for_the_same_direction_and_highest_for_the_opposite(method, z, stretches):
    assume(long(z))
    stretched = columns(stretches, z) * z
    assert method.loss(stretched, z)[0].item() == pytest.approx(method.of_cosine(1), abs=1e-9)
    assert method.loss(-stretched, z)[0].item() == pytest.approx(method.of_cosine(-1), abs=1e-9)


@both
@given(views=pairs(), first=STRETCHES, second=STRETCHES, random=st.randoms())
def test_lengths_and_the_order_of_the_batch_do_not_matter(method, views, first, second, random):
    assume(long(*views))
    order = random.sample(range(len(views[0])), len(views[0]))
    p, z = (columns(stretches, t) * t[order] for stretches, t in zip((first, second), views, strict=True))
    close(method.loss(p, z)[0], method.loss(*views)[0], rtol=1e-7, atol=1e-7)


@both
@given(views=pairs())
def test_no_gradient_reaches_the_target_and_inputs_are_left_alone(method, views):
    before = copy.deepcopy(views)
    p, z = (t.requires_grad_() for t in views)
    method.loss(p, z)[0].backward()
    assert p.grad is not None and z.grad is None
    close((p.detach(), z.detach()), before, rtol=0, atol=0)


@both
@given(z=matrices())
def test_the_target_is_a_constant_even_where_it_is_the_prediction(method, z):
    """Without a stop-gradient the gradient would be twice that."""
    assume(long(z))
    same, apart = z.clone().requires_grad_(), z.clone().requires_grad_()
    turned = z.roll(1, 0)
    method.loss(same, same.roll(1, 0))[0].backward()
    method.loss(apart, turned)[0].backward()
    close(same.grad, apart.grad)


@both
@given(views=pairs(rows=st.integers(1, 3), columns=st.integers(1, 4)))
def test_gradient_is_that_of_finite_differences(method, views):
    assume(long(*views))
    p, z = views
    assert torch.autograd.gradcheck(lambda t: method.loss(t, z)[0], [p.requires_grad_()], atol=1e-4, rtol=1e-4)


@both
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(method, half):
    generator = torch.Generator().manual_seed(0)
    a = 100 * torch.randn(64, 32, generator=generator)
    b = a + 100 * torch.randn(64, 32, generator=generator)  # a loss well away from 0
    a, b = a.to(half), b.to(half)
    want, _ = method.loss(a.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = method.loss(a, b)
        also, _ = method.loss(a.float(), b.float())
    assert want.dtype == torch.float64
    assert got.dtype == torch.float32
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


@both
@given(z=matrices(rows=st.integers(2, 9), columns=st.integers(2, 9)))
def test_the_penalties_are_those_of_vicreg(method, z):
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    for module, leaf in (method.module, mine), (vicreg, theirs):
        (3 * module.variance_loss(leaf) + 5 * module.covariance_loss(leaf)).backward()
    close(method.module.variance_loss(mine), vicreg.variance_loss(theirs))
    close(method.module.covariance_loss(mine), vicreg.covariance_loss(theirs))
    close(mine.grad, theirs.grad)


@both
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_the_penalties_of_both_views_are_those_of_vicregs_loss_in_float32(method, half):
    generator = torch.Generator().manual_seed(0)
    z1, z2 = ((0.5 * torch.randn(16, 8, generator=generator)).to(half) for _ in range(2))
    _, want = vicreg.vicreg_loss(z1.double(), z2.double())
    with torch.autocast("cpu", torch.bfloat16):
        variance, covariance = method.module.vicreg_penalties(z1, z2)
    assert {variance.dtype, covariance.dtype} == {torch.float32}
    close(variance.double(), want["variance"], rtol=1e-5, atol=0)
    close(covariance.double(), want["covariance"], rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------- network, runs


@pytest.fixture
def train(method, tmp_path, monkeypatch):
    return quick.trainer(method.module, method.small, 8, tmp_path, monkeypatch)


@both
def test_each_view_is_a_batch_of_its_own(method):
    torch.manual_seed(0)
    model = method.network(method.small)
    x1, x2 = torch.rand(2, 4, 3, 16, 16)
    close(model(x1, x2)[0], model(x1, 5 * x2)[0])
    close(model(x1, x2)[1], model(5 * x1, x2)[1])


@both
def test_lars_adapts_weights_alone(train):
    saved = train(max_steps=1, optimizer="lars", weight_decay=0.5)
    buffers = saved["optimizer"]["state"]
    for group in saved["optimizer"]["param_groups"]:
        assert all((buffers[number]["momentum_buffer"].ndim > 1) == group["adapt"] for number in group["params"])


@both
@pytest.mark.parametrize("flags", [{}, {"predictor": False}, {"std_coeff": 1.0, "cov_coeff": 0.01}])
def test_a_continued_run_ends_as_an_uninterrupted_one(train, flags):
    train("twice", max_steps=1, **flags)
    twice, once = train("twice", max_steps=3, **flags), train("once", max_steps=3, **flags)
    for part in {"model", "target"} & once.keys():
        assert twice[part].keys() == once[part].keys()
        assert all(torch.equal(twice[part][name], once[part][name]) for name in once[part])
