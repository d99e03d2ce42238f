"""VICReg's loss against an independent oracle, the official numbers, and the properties its paper builds on."""

import copy
import shlex
from pathlib import Path

import oracles
import pytest
import studies
import torch
import vectors
from hypothesis import assume, given
from hypothesis import strategies as st
from methods import command, small_folder, tiny
from strategies import matrices, numbers, pairs, spread

import common
import vicreg
from vicreg import covariance_loss, invariance_loss, variance_loss, vicreg_loss

close = torch.testing.assert_close


def test_official_numbers():
    a, b = vectors.views()
    loss, terms = vicreg_loss(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(20.03633594, abs=5e-9)
    assert [t.item() for t in terms.values()] == pytest.approx([0.04607518, 0.75310977, 0.05671232], abs=5e-9)
    assert [a.grad.norm().item(), b.grad.norm().item()] == pytest.approx([3.95431916, 3.11676172], abs=5e-9)


@given(pairs())
def test_equals_the_equations_in_plain_loops(views):
    z1, z2 = views
    want = oracles.vicreg(z1.tolist(), z2.tolist())
    loss, terms = vicreg_loss(z1, z2, 3.0, 5.0, 7.0)
    assert {name: t.item() for name, t in terms.items()} == pytest.approx(want, rel=1e-9, abs=1e-9)
    total = 3 * want["invariance"] + 5 * want["variance"] + 7 * want["covariance"]
    assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-8)


@given(pairs())
def test_swapping_the_views_changes_nothing(views):
    close(vicreg_loss(*views)[0], vicreg_loss(*reversed(views))[0])


@given(pairs(), st.randoms())
def test_permuting_the_batch_changes_nothing(views, random):
    order = random.sample(range(len(views[0])), len(views[0]))
    close(vicreg_loss(*views)[0], vicreg_loss(views[0][order], views[1][order])[0])


@given(pairs(), st.data())
def test_translating_both_views_changes_nothing(views, data):
    shift = torch.tensor([data.draw(numbers()) for _ in range(views[0].shape[1])], dtype=torch.float64)
    close(vicreg_loss(*views)[0], vicreg_loss(views[0] + shift, views[1] + shift)[0], rtol=1e-8, atol=1e-8)


@given(matrices())
def test_invariance_is_zero_only_for_equal_views(z):
    assert invariance_loss(z, z).item() == 0
    assert invariance_loss(z, z + 0.5).item() == pytest.approx(0.25)


@given(spread(), st.floats(0.1, 2.0))
def test_variance_is_exactly_zero_once_every_std_reaches_gamma_and_positive_before(z, gamma):
    z = z / z.std(dim=0) * gamma
    assert variance_loss(z * 1.001, gamma).item() == 0
    z[:, 0] *= 0.9
    assume(gamma > 0.3)  # below, eps is no longer small beside the variance
    assert variance_loss(z, gamma).item() > 0


@given(st.integers(2, 6), st.integers(1, 5), numbers())
def test_variance_has_a_finite_gradient_on_constant_columns(n, d, value):
    z = torch.full((n, d), value, dtype=torch.float32, requires_grad=True)
    loss = variance_loss(z)
    loss.backward()
    assert loss.item() == pytest.approx(1 - 1e-4**0.5)
    assert z.grad.isfinite().all()


@given(st.integers(1, 3), st.floats(0.1, 3.0))
def test_covariance_is_zero_for_decorrelated_columns(power, scale):
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power + 1):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    assert covariance_loss(scale * hadamard[:, 1:]).item() == pytest.approx(0, abs=1e-12)
    assert covariance_loss(scale * hadamard[:, [1, 1, 2]]).item() > 0


@given(spread(columns=st.integers(2, 6)), st.floats(0.25, 4.0))
def test_covariance_grows_with_the_fourth_power(z, scale):
    close(covariance_loss(scale * z), scale**4 * covariance_loss(z), rtol=1e-9, atol=1e-9)


@given(matrices(rows=st.integers(2, 9), columns=st.integers(2, 9)))
def test_both_gram_sides_have_the_same_value_and_gradient(z):
    """The d×d form of the papers, whichever form the shape makes covariance_loss take."""
    z1, z2 = z.clone().requires_grad_(), z.clone().requires_grad_()
    n, d = z.shape
    c = (z1 - z1.mean(0)).T @ (z1 - z1.mean(0)) / (n - 1)
    want = (c**2).sum() / d - (torch.diagonal(c) ** 2).sum() / d
    got = covariance_loss(z2)
    want.backward()
    got.backward()
    close(got, want, rtol=1e-9, atol=1e-9)
    close(z2.grad, z1.grad, rtol=1e-9, atol=1e-9)


@given(pairs(rows=st.integers(2, 5), columns=st.integers(1, 5)))
def test_gradient_is_that_of_finite_differences(views):
    for z in views:  # the hinge has no derivative where a standard deviation is exactly gamma
        assume(((z.var(0) + 1e-4).sqrt() - 1).abs().min() > 1e-3)
    views = [z.requires_grad_() for z in views]
    # Near a constant column the root bends within 1e-3: small steps and a loose tolerance.
    assert torch.autograd.gradcheck(lambda a, b: vicreg_loss(a, b)[0], views, eps=1e-7, atol=1e-3, rtol=1e-3)


@given(pairs())
def test_inputs_are_left_alone(views):
    before = copy.deepcopy(views)
    vicreg_loss(*(z.requires_grad_() for z in views))[0].backward()
    close(views[0].detach(), before[0], rtol=0, atol=0)
    close(views[1].detach(), before[1], rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    a, b = (100 * torch.randn(64, 32, generator=generator) for _ in range(2))
    a, b = a.to(half), b.to(half)
    want, _ = vicreg_loss(a.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = vicreg_loss(a, b)
        also, _ = vicreg_loss(a.float(), b.float())
    assert got.dtype == torch.float32
    close(got.double(), want, rtol=1e-4, atol=0)
    close(also, got)


def test_float64_stays_float64():
    assert vicreg_loss(*vectors.views())[0].dtype == torch.float64


def test_one_image_is_refused():
    with pytest.raises(ValueError, match="at least two images"):
        vicreg_loss(torch.zeros(1, 3), torch.zeros(1, 3))


# --------------------------------------------------------------------------------------------------- whole runs


def test_the_study_of_held_out_images_takes_the_run_in_stages_and_the_terms_of_its_frozen_network(
    tmp_path, monkeypatch
):
    """The terms against plain loops over the embeddings of the kept weights."""
    started = []

    def start(line: str, folder: Path) -> None:
        started.append(line)
        vicreg.main(common.parse_args(vicreg.Args, vicreg.RECIPES, shlex.split(line)[1:]))

    monkeypatch.setattr(studies, "folder_of", lambda line: tmp_path / "run")
    monkeypatch.setattr(studies, "start", start)
    line = shlex.join(command("vicreg", tmp_path / "run", epochs=3, eval_every=2)[1:])
    folder = studies.run_in_stages(line)
    assert [line.split()[-1] for line in started] == ["8", "12"]
    records = studies.lines(folder / "terms.jsonl")
    assert [record["step"] for record in records] == [8, 12]
    assert studies.run_in_stages(line) == folder and len(started) == 2, "what is there is not taken again"

    encoder, heads = (torch.load(folder / name) for name in ("encoder.pt", "heads.pt"))
    args = tiny("vicreg", folder)
    trunk, _ = common.backbone("resnet10", "imagenet", zero_init=False)
    trunk.load_state_dict(encoder)
    linear, batchnorm = torch.nn.Linear, torch.nn.BatchNorm1d
    hidden = [layer for width in (512, 24) for layer in (linear(width, 24), batchnorm(24), torch.nn.ReLU())]
    expander = torch.nn.Sequential(*hidden, linear(24, 40, bias=False))
    expander.load_state_dict({name.removeprefix("expander."): weight for name, weight in heads.items()})
    embed = torch.nn.Sequential(trunk, expander).eval()
    compute, _ = common.compute_in("fp32", torch.device("cpu"))
    train, test = common.load_data("folder", small_folder(), 0, compute.device)  # 64 and 40 images
    for split, data in (("train", train), ("val", test)):
        terms = []
        for view1, view2 in common.batches(data, vicreg.crops(args), range(2), 16, args.seed, compute):
            x1, x2 = vicreg.augment(*view1, args, 1.0, 0.0), vicreg.augment(*view2, args, 0.1, 0.2)
            terms.append(oracles.vicreg(embed(x1).tolist(), embed(x2).tolist()))
        for name in ("invariance", "variance", "covariance"):
            mean = (terms[0][name] + terms[1][name]) / 2
            assert records[-1][f"{split}_{name}"] == pytest.approx(mean, rel=1e-4), (split, name)
