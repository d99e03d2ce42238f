"""Barlow Twins' loss against an independent oracle, the official numbers, and the properties its paper builds on."""

import copy
import math

import pytest
import quick
import torch
import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import metrics
from strategies import matrices, numbers, pairs, spread

import barlow
import vicreg
from barlow import barlow_twins_loss, standardize
from common import Draws

close = torch.testing.assert_close


def oracle(z1: list[list[float]], z2: list[list[float]], eps: float = 1e-5) -> dict[str, float]:
    """Eq. 1 and 2 (arXiv 2103.03230) in plain loops, with BatchNorm's eps beside the variance."""
    n, d = len(z1), len(z1[0])
    mean1, mean2 = ([sum(z[b][i] for b in range(n)) / n for i in range(d)] for z in (z1, z2))
    std1 = [math.sqrt(sum((z1[b][i] - mean1[i]) ** 2 for b in range(n)) / n + eps) for i in range(d)]
    std2 = [math.sqrt(sum((z2[b][i] - mean2[i]) ** 2 for b in range(n)) / n + eps) for i in range(d)]
    terms = {"on_diagonal": 0.0, "off_diagonal": 0.0}
    for i in range(d):
        for j in range(d):
            covariance = sum((z1[b][i] - mean1[i]) * (z2[b][j] - mean2[j]) for b in range(n)) / n
            c = covariance / std1[i] / std2[j]
            if i == j:
                terms["on_diagonal"] += (1 - c) ** 2
            else:
                terms["off_diagonal"] += c**2
    return terms


def in_two(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The even and the odd columns, as two views."""
    return z[:, ::2], z[:, 1::2]


EVEN = st.integers(1, 4).map(lambda d: 2 * d)


def hadamard(power: int) -> torch.Tensor:
    """(n, n - 1): columns of mean 0 and variance 1 that are orthogonal, n = 2 ** power."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h[:, 1:]


# ---------------------------------------------------------------------------------------------------- the value


def test_official_numbers():
    a, b = vectors.views()
    loss, terms = barlow_twins_loss(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(0.24602168, abs=5e-9)
    assert (terms["on_diagonal"] + 0.0051 * terms["off_diagonal"]).item() == loss.item()
    assert [a.grad.norm().item(), b.grad.norm().item()] == pytest.approx([6.13938319, 4.78240822], abs=5e-9)


@given(pairs(columns=st.integers(1, 9)), st.floats(0, 2))
def test_equals_the_equations_in_plain_loops(views, lambd):
    want = oracle(*(z.tolist() for z in views))
    loss, terms = barlow_twins_loss(*views, lambd)
    assert {name: t.item() for name, t in terms.items()} == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert loss.item() == pytest.approx(want["on_diagonal"] + lambd * want["off_diagonal"], rel=1e-9, abs=1e-8)


@given(matrices())
def test_standardising_is_batchnorm_without_scale_and_shift(z):
    close(standardize(z), (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt(), rtol=1e-8, atol=1e-8)


@given(matrices(rows=st.integers(2, 9), columns=st.integers(2, 18).map(lambda d: d - d % 2)))
def test_both_gram_sides_have_the_same_value_and_gradient(z):
    """The d×d form of the paper, whichever form the shape makes barlow_twins_loss take."""
    z, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    z1, z2 = ((half - half.mean(0)) / (half.var(0, correction=0) + 1e-5).sqrt() for half in in_two(z))
    c = z1.T @ z2 / len(z)
    rest = c * (1 - torch.eye(len(c), dtype=c.dtype))
    want = ((torch.diagonal(c) - 1) ** 2).sum() + 0.1 * (rest**2).sum()
    got, _ = barlow_twins_loss(*in_two(y), 0.1)
    want.backward()
    got.backward()
    close(got, want, rtol=1e-8, atol=1e-8)
    close(y.grad, z.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n, d", [(4, 64), (64, 4)])
def test_the_larger_gram_matrix_is_never_formed(n, d):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(n, d, generator=generator).requires_grad_() for _ in range(2)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        barlow_twins_loss(*views)
    assert max(saved) == n * d


def test_every_rank_computes_the_loss_of_the_whole_batch_and_its_rows_gradient(monkeypatch):
    """`all_gather` sums the gradients of W equal losses and DDP divides by W: what is left is one loss's gradient."""
    whole = vectors.views()
    want, _ = barlow_twins_loss(*whole)
    want.backward()
    for rows in (slice(0, 1), slice(1, 4)):

        def gather(mine: torch.Tensor, rows: slice = rows) -> torch.Tensor:
            everyone = next(z.detach() for z in whole if torch.equal(z[rows], mine))
            return torch.cat([everyone[: rows.start], mine, everyone[rows.stop :]])

        monkeypatch.setattr(barlow, "all_gather", gather)
        mine = [z.detach()[rows].requires_grad_() for z in whole]
        loss, _ = barlow_twins_loss(*mine)
        loss.backward()
        close(loss, want)
        for part, z in zip(mine, whole, strict=True):
            close(part.grad, z.grad[rows])


@settings(max_examples=15)
@given(pairs(rows=st.integers(2, 5), columns=st.integers(1, 7)))
def test_gradient_is_that_of_finite_differences(views):
    views = [z.requires_grad_() for z in views]
    # Near a constant column the root bends within 3e-3: small steps and a loose tolerance.
    assert torch.autograd.gradcheck(lambda a, b: barlow_twins_loss(a, b, 0.1)[0], views, eps=1e-7, atol=1e-3, rtol=1e-3)


# --------------------------------------------------------------------------------------------------- invariances


@given(pairs())
def test_swapping_the_views_changes_nothing(views):
    close(barlow_twins_loss(*views)[0], barlow_twins_loss(*reversed(views))[0])


@given(pairs(), st.randoms())
def test_permuting_the_batch_changes_nothing(views, random):
    order = random.sample(range(len(views[0])), len(views[0]))
    close(barlow_twins_loss(*views)[0], barlow_twins_loss(views[0][order], views[1][order])[0], rtol=1e-9, atol=1e-9)


@given(pairs(), st.randoms())
def test_permuting_the_dimensions_of_both_changes_nothing(views, random):
    order = random.sample(range(views[0].shape[1]), views[0].shape[1])
    permuted = [z[:, order] for z in views]
    close(barlow_twins_loss(*views)[0], barlow_twins_loss(*permuted)[0], rtol=1e-9, atol=1e-9)


@given(spread(columns=EVEN), st.data())
def test_a_positive_scale_and_a_shift_of_each_dimension_of_each_view_change_nothing(z, data):
    """Up to eps, that is where the variance (here at least 0.4) is far above it."""
    scale = torch.tensor([data.draw(st.floats(0.9, 1000)) for _ in range(z.shape[1])], dtype=torch.float64)
    shift = torch.tensor([data.draw(numbers(1000)) for _ in range(z.shape[1])], dtype=torch.float64)
    close(barlow_twins_loss(*in_two(z * scale + shift))[0], barlow_twins_loss(*in_two(z))[0], rtol=3e-4, atol=3e-4)


@given(pairs(), st.data())
def test_flipping_the_sign_of_a_dimension_matters_unless_it_is_done_in_both_views(views, data):
    z1, z2 = views
    j = data.draw(st.integers(0, z1.shape[1] - 1))
    sign = torch.ones(z1.shape[1], dtype=torch.float64)
    sign[j] = -1
    loss = barlow_twins_loss(z1, z2)[0]
    close(barlow_twins_loss(z1 * sign, z2 * sign)[0], loss, rtol=1e-9, atol=1e-9)
    c_jj = (standardize(z1) * standardize(z2)).mean(0)[j]
    close(barlow_twins_loss(z1 * sign, z2)[0] - loss, 4 * c_jj, rtol=1e-9, atol=1e-9)  # (1 + c)² - (1 - c)²


@given(matrices(columns=st.just(1)), st.floats(0.001, 0.1))
def test_eps_breaks_the_invariance_where_the_variance_is_not_far_above_it(z, scale):
    v = scale**2 * z.var(correction=0).item()
    assert barlow_twins_loss(scale * z, scale * z)[0].item() == pytest.approx((1 - v / (v + 1e-5)) ** 2, abs=1e-9)


# ------------------------------------------------------------------------------------------------- special values


@given(st.integers(1, 4), st.data())
def test_loss_is_zero_where_the_cross_correlation_is_the_identity(power, data):
    h = hadamard(power)
    scale, shift = data.draw(st.floats(0.5, 8)), data.draw(numbers())
    assert barlow_twins_loss(h, scale * h + shift, 1.0)[0].item() == pytest.approx(0, abs=1e-8)


@given(st.integers(2, 4), st.floats(0, 2))
def test_a_repeated_dimension_costs_lambda_twice(power, lambd):
    h = hadamard(power)
    h[:, 1] = h[:, 0]
    loss, terms = barlow_twins_loss(h, h, lambd)
    assert [t.item() for t in terms.values()] == pytest.approx([0, 2], abs=1e-4)
    assert loss.item() == pytest.approx(2 * lambd, abs=1e-4)


@given(st.integers(2, 40), st.integers(1, 8), numbers() | st.sampled_from([123.0, 1234.5, 1.2345e5]))
def test_a_constant_embedding_costs_d_and_has_a_finite_gradient(n, d, value):
    z = torch.full((n, d), value, dtype=torch.float32, requires_grad=True)
    loss, _ = barlow_twins_loss(z, z)
    loss.backward()
    assert loss.item() == pytest.approx(d, rel=1e-3)
    assert z.grad.isfinite().all()


@given(pairs(rows=st.integers(2, 4), columns=st.integers(4, 9)), st.floats(0, 1))
def test_with_fewer_images_than_dimensions_the_loss_has_the_floor_that_the_file_names(views, lambd):
    n, d = views[0].shape
    k = d / (n - 1) - 1
    floor = d * lambd * k / (1 + lambd * k)
    assert barlow_twins_loss(*views, lambd)[0].item() >= floor - 1e-9
    assert barlow_twins_loss(views[0], views[0], lambd)[0].item() >= floor - 1e-9


def test_the_floor_is_reached():
    """Two images, every dimension ±1: all correlations of z1 with z2 are ±c, and c minimises (1 - c)² + lambda k c²."""
    d, lambd = 5, 0.3
    c = 1 / (1 + lambd * (d - 1))
    z = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, d)
    shrunk = z * (1e-5 * c / (1 - c)) ** 0.5  # variance v with v / (v + eps) = c
    loss = barlow_twins_loss(shrunk, shrunk, lambd)[0].item()
    assert loss == pytest.approx(d * lambd * (d - 1) / (1 + lambd * (d - 1)), rel=1e-9)


# ------------------------------------------------------------------------------------------ conduct of the loss


@given(pairs())
def test_inputs_are_left_alone(views):
    before = copy.deepcopy(views)
    barlow_twins_loss(*(z.requires_grad_() for z in views))[0].backward()
    close(views[0].detach(), before[0], rtol=0, atol=0)
    close(views[1].detach(), before[1], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64)])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half, shape):
    generator = torch.Generator().manual_seed(0)
    a, b = ((100 * torch.randn(shape, generator=generator) + 50).to(half) for _ in range(2))
    want, _ = barlow_twins_loss(a.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, terms = barlow_twins_loss(a, b)
        also, _ = barlow_twins_loss(a.float(), b.float())
    assert {got.dtype, *(t.dtype for t in terms.values())} == {torch.float32}
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


def test_float64_stays_float64():
    assert barlow_twins_loss(*vectors.views())[0].dtype == torch.float64


def test_one_image_is_refused():
    with pytest.raises(ValueError, match="at least two images"):
        barlow_twins_loss(torch.zeros(1, 3), torch.zeros(1, 3))


# -------------------------------------------------------------------------------------- views, network, training

SMALL = {"image_size": 16, "batch_size": 16, "projector_hidden": 24, "projector_dim": 40}


@pytest.mark.parametrize("off", [{}, {"blur": False}, {"solarize": False}, {"color_jitter": False, "grayscale": False}])
def test_views_are_those_of_vicreg(off):
    x = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for blur, solarization in ((1.0, 0.0), (0.1, 0.2)):
        ours = barlow.augment(x, Draws((1, 2), 16), barlow.Args(**off), blur, solarization)
        theirs = vicreg.augment(x, Draws((1, 2), 16), vicreg.Args(**off), blur, solarization)
        close(ours, theirs, rtol=0, atol=0)
    assert barlow.crops(barlow.Args(**off)) == vicreg.crops(vicreg.Args(**off))


def test_network_has_no_linear_bias_normalises_each_view_alone_and_trains_every_weight():
    model = barlow.BarlowTwins(barlow.Args(**SMALL))
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in linears] == [(24, 512), (24, 24), (40, 24)]
    assert all(m.bias is None for m in linears)
    x1, x2 = torch.rand(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z1, z2 = model(x1, x2)
    close(model(x1, 3 * x2)[0], z1)
    barlow_twins_loss(z1, z2)[0].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_both_rates_warm_up_and_decay_alike_and_the_views_differ_in_blur_and_solarisation(tmp_path, monkeypatch):
    steps, views = [], []

    class Recorder(barlow.LARS):
        def step(self):
            of = [
                (g["lr"], g["adapt"], g["weight_decay"], {p.ndim > 1 for p in g["params"]}) for g in self.param_groups
            ]
            steps.append(of)
            return super().step()

    def augment(x, draws, args, blur, solarization, augment=barlow.augment):
        views.append((blur, solarization))
        return augment(x, draws, args, blur, solarization)

    monkeypatch.setattr(barlow, "LARS", Recorder)
    monkeypatch.setattr(barlow, "augment", augment)
    args = barlow.Args(**SMALL, epochs=2, warmup_epochs=1)
    quick.trainer(barlow, args, 32, tmp_path, monkeypatch)()
    shape = [0, 1 / 2, 1, 1 / 2 + 1 / 2000]  # of the peak: warm-up of two steps, then half a cosine to a thousandth
    for (weights, others), share in zip(steps, shape, strict=True):
        assert weights == (pytest.approx(share * args.base_lr / 16), True, 1e-6, {True})
        assert others == (pytest.approx(share * args.base_lr_biases / 16), False, 0, {False})
    assert metrics(tmp_path / "run")[-1]["lr"] == steps[-1][0][0]
    assert views == 4 * [(1.0, 0.0), (0.1, 0.2)]
