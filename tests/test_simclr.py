"""SimCLR's loss against an independent oracle and the official numbers, its limits, and how the network sees views."""

import copy
import math

import pytest
import quick
import torch
import vectors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods import tiny
from strategies import numbers, pairs
from torch import nn

import common
import simclr
from simclr import SimCLR, nt_xent_loss

close = torch.testing.assert_close
TEMPERATURES = st.sampled_from([0.05, 0.2, 0.5, 1.0, 3.0])


def in_plain_loops(z1: list[list[float]], z2: list[list[float]], temperature: float) -> float:
    """Eq. 1 and algorithm 1, one pair at a time; a row of (almost) no length has cosine 0 with all others."""
    rows = []
    for row in [*z1, *z2]:
        norm = max(math.sqrt(sum(x * x for x in row)), 1e-12)
        rows.append([x / norm for x in row])
    n, total = len(z1), 0.0
    for i in range(2 * n):
        similarity = [sum(a * b for a, b in zip(rows[i], row, strict=True)) / temperature for row in rows]
        largest = max(similarity)
        others = sum(math.exp(s - largest) for k, s in enumerate(similarity) if k != i)
        total += math.log(others) + largest - similarity[(i + n) % (2 * n)]
    return total / (2 * n)


def long(views) -> bool:
    """No row near 0, where the direction and with it the loss jump."""
    return min(z.norm(dim=1).min().item() for z in views) > 0.1


@pytest.mark.parametrize(
    "temperature, want, gradients",
    [(0.5, 1.77036718, [0.15702130, 0.12434902]), (0.1, 1.32528679, [0.47875872, 0.37917300])],
)
def test_official_numbers(temperature, want, gradients):
    a, b = vectors.views()
    loss, _ = nt_xent_loss(a, b, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=5e-9)
    assert [a.grad.norm().item(), b.grad.norm().item()] == pytest.approx(gradients, abs=5e-9)


@given(pairs(rows=st.integers(1, 6)), TEMPERATURES)
def test_equals_the_equation_in_plain_loops(views, temperature):
    loss, terms = nt_xent_loss(*views, temperature)
    assert loss.item() == pytest.approx(in_plain_loops(*(z.tolist() for z in views), temperature), rel=1e-9, abs=1e-9)
    cosine = nn.functional.cosine_similarity(*views, dim=1, eps=1e-12).mean()
    assert terms["positive"].item() == pytest.approx(cosine.item(), abs=1e-9)


@given(st.integers(1, 20), st.integers(1, 5), numbers(), TEMPERATURES)
def test_identical_embeddings_give_log_of_the_number_of_candidates(n, d, value, temperature):
    z = torch.full((n, d), value, dtype=torch.float64)
    assert nt_xent_loss(z, z, temperature)[0].item() == pytest.approx(math.log(2 * n - 1), abs=1e-9)


@given(pairs(rows=st.integers(1, 7)), TEMPERATURES)
def test_is_never_below_what_perfect_positives_could_reach(views, temperature):
    """With cosine s of the positive and -1 of all others, l = log(1 + (2N - 2) exp((-1 - s) / T)); s is 1 at best."""
    others = 2 * len(views[0]) - 2
    bound = math.log1p(others * math.exp(-2 / temperature))
    assert nt_xent_loss(*views, temperature)[0].item() >= bound - 1e-12


def test_reaches_that_bound_with_two_opposite_images():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert nt_xent_loss(z, z, 0.5)[0].item() == pytest.approx(math.log1p(2 * math.exp(-4)), abs=1e-12)


@given(pairs(), st.data())
def test_a_rotation_of_all_embeddings_changes_nothing(views, data):
    assume(long(views))
    d = views[0].shape[1]
    square = [[data.draw(numbers()) for _ in range(d)] for _ in range(d)]
    rotation, triangle = torch.linalg.qr(torch.tensor(square, dtype=torch.float64))
    assume(triangle.diagonal().abs().min() > 1e-3)
    close(nt_xent_loss(*(z @ rotation for z in views), 0.2)[0], nt_xent_loss(*views, 0.2)[0], rtol=1e-8, atol=1e-8)


@given(pairs(), st.data())
def test_the_length_of_a_row_does_not_count(views, data):
    assume(long(views))
    scales = [data.draw(st.floats(0.1, 50)) for _ in range(2 * len(views[0]))]
    scale = torch.tensor(scales, dtype=torch.float64).view(2, -1, 1)
    scaled = [z * s for z, s in zip(views, scale, strict=True)]
    close(nt_xent_loss(*scaled, 0.2)[0], nt_xent_loss(*views, 0.2)[0], rtol=1e-8, atol=1e-8)


@given(pairs(), st.randoms())
def test_permuting_the_batch_and_swapping_the_views_change_nothing(views, random):
    order = random.sample(range(len(views[0])), len(views[0]))
    want = nt_xent_loss(*views, 0.2)[0]
    close(nt_xent_loss(*(z[order] for z in views), 0.2)[0], want)
    close(nt_xent_loss(*reversed(views), 0.2)[0], want)


@given(pairs())
def test_a_high_temperature_tells_no_candidates_apart(views):
    assert nt_xent_loss(*views, 1e6)[0].item() == pytest.approx(math.log(2 * len(views[0]) - 1), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_low_temperature_takes_the_largest_and_stays_finite(dtype):
    """The limit of T·loss is the mean of (largest other cosine - positive's cosine); exp(1000) overflows all dtypes."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(16, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    loss, terms = nt_xent_loss(z1, z2, 1e-3)
    loss.backward()
    rows = nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1)
    cosine = (rows @ rows.T).fill_diagonal_(-torch.inf)
    positive = cosine[torch.arange(32), (torch.arange(32) + 16) % 32]
    want = (cosine.amax(1) - positive).mean().item()
    assert 1e-3 * loss.item() == pytest.approx(want, abs=1e-3 * math.log(31) + 1e-3)
    assert z1.grad.isfinite().all() and z2.grad.isfinite().all()
    assert terms["accuracy"].item() == pytest.approx((positive == cosine.amax(1)).double().mean().item())


def test_accuracy_counts_the_positives_that_come_first():
    z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert nt_xent_loss(z1, z1, 0.5)[1]["accuracy"].item() == 1
    assert nt_xent_loss(z1, z1.flip(0), 0.5)[1]["accuracy"].item() == 0


@settings(max_examples=15)
@given(pairs(rows=st.integers(2, 5), columns=st.integers(1, 5)))
def test_gradient_is_that_of_finite_differences(views):
    assume(long(views))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent_loss(a, b, 0.5)[0], [z.requires_grad_() for z in views])


def test_negatives_are_pushed_away_too():
    """A gradient reaches an embedding through the denominators of the other images' anchors."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    first = z1[:1].clone().requires_grad_()
    everyone = nt_xent_loss(torch.cat([first, z1[1:]]), z2, 0.5)[0]
    (grad,) = torch.autograd.grad(everyone, first)
    rows = nn.functional.normalize(torch.cat([first, z1[1:], z2]), dim=1)
    logits = (rows @ rows.T / 0.5).fill_diagonal_(-torch.inf)
    alone = nn.functional.cross_entropy(logits[[0, 4]], torch.tensor([4, 0])) * 2 / 8  # its own two anchors only
    assert (grad - torch.autograd.grad(alone, first)[0]).norm() > 0.1 * grad.norm()


@given(pairs())
def test_inputs_are_left_alone(views):
    before = copy.deepcopy(views)
    nt_xent_loss(*(z.requires_grad_() for z in views), 0.2)[0].backward()
    close(views[0].detach(), before[0], rtol=0, atol=0)
    close(views[1].detach(), before[1], rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    a, b = ((100 * torch.randn(64, 32, generator=generator)).to(half) for _ in range(2))
    want, _ = nt_xent_loss(a.double(), b.double(), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = nt_xent_loss(a, b, 0.1)
        also, _ = nt_xent_loss(a.float(), b.float(), 0.1)
    assert got.dtype == torch.float32 and nt_xent_loss(*vectors.views(), 0.1)[0].dtype == torch.float64
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


# ----------------------------------------------------------------------------------------------- network, rates


def test_both_views_share_one_batch_for_batchnorm(tmp_path):
    """As algorithm 1 and the official code: the statistics are those of all 2N views together."""
    torch.manual_seed(0)
    model = SimCLR(tiny("simclr", tmp_path))
    x1, x2 = torch.rand(4, 3, 16, 16), 3 + torch.rand(4, 3, 16, 16)
    alone = copy.deepcopy(model)
    z1, z2 = model(x1, x2)
    both = alone.projector(alone.backbone(torch.cat([x1, x2])))
    close(torch.cat([z1, z2]), both)
    apart = alone.projector(alone.backbone(x1))
    assert (apart - z1).abs().max() > 0.01


def trainer(batch_size, tmp_path, monkeypatch):
    """Trains one step on as many images as the batch has."""
    args = simclr.Args(image_size=8, batch_size=batch_size, warmup_epochs=0, max_steps=1, color_jitter=False)
    return quick.trainer(simclr, args, batch_size, tmp_path, monkeypatch)


@pytest.mark.parametrize("scaling, want", [("linear", 0.3 * 64 / 256), ("sqrt", 0.075 * 64**0.5)])
def test_the_learning_rate_follows_the_batch_by_the_chosen_rule(scaling, want, tmp_path, monkeypatch):
    """Appendix B.1: 0.3 N / 256, or 0.075 sqrt(N)."""
    saved = trainer(64, tmp_path, monkeypatch)(base_lr=0.3, lr_scaling=scaling)
    assert [group["lr"] for group in saved["optimizer"]["param_groups"]] == pytest.approx([want] * 2)


def test_the_two_rules_agree_at_4096(tmp_path, monkeypatch):
    train = trainer(4096, tmp_path, monkeypatch)
    monkeypatch.setattr(simclr, "nt_xent_loss", lambda z1, z2, _: ((z1 - z2).square().mean(), {}))  # no 8192×8192
    rates = [train(rule, base_lr=0.3, lr_scaling=rule)["optimizer"]["param_groups"] for rule in ("linear", "sqrt")]
    assert [group["lr"] for groups in rates for group in groups] == [0.3 * 16] * 4


def test_biases_and_batchnorm_are_neither_decayed_nor_adapted(tmp_path, monkeypatch):
    saved = trainer(4, tmp_path, monkeypatch)(weight_decay=0.5)["optimizer"]
    buffers, groups = saved["state"], saved["param_groups"]
    assert [(group["weight_decay"], group["adapt"]) for group in groups] == [(0.5, True), (0.0, False)]
    for group in groups:
        assert {buffers[number]["momentum_buffer"].ndim > 1 for number in group["params"]} == {group["adapt"]}


def test_grey_images_stay_grey_under_the_jitter(tmp_path):
    """Brightness and contrast act on all channels alike, saturation and hue not at all on grey."""
    args = tiny("simclr", tmp_path)
    x = torch.rand(8, 1, 16, 16).expand(-1, 3, -1, -1)
    y = simclr.augment(x, common.Draws((0, 0, 0), 8, slice(0, 8)), args)
    close(y[:, 0], y[:, 1], atol=1e-5, rtol=0)
    close(y[:, 0], y[:, 2], atol=1e-5, rtol=0)
