"""One formula against an independent oracle, the official numbers and the losses it contains; its runs."""

import ast
import copy
import itertools
import math
from pathlib import Path

import pytest
import quick
import torch
import vectors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods import metrics, narrow, small_folder, tiny
from strategies import numbers, pairs
from test_distributed import assert_same_metrics, embeddings
from torch import Tensor, nn
from worlds import run_on

import common
import evaluate
import negatives
import simclr
from negatives import decoupled_loss

close = torch.testing.assert_close
INF = math.inf
NOTHING = {"epsilon": 0.0}  # with the defaults of the others: SimCLR's loss
VARIANTS = {  # as the top of the file lists them
    "DCL": {},
    "DCLW": {"positive_sigma": 0.5},
    "epsilon-InfoNCE": {"epsilon": 0.25},
    "debiased": {"epsilon": 0.0, "tau_plus": 0.1},
    "hard negatives": {"epsilon": 0.0, "tau_plus": 0.1, "beta": 1.0},
    "all at once": {"epsilon": 1.0, "tau_plus": 0.3, "beta": 0.5, "positive_sigma": 0.3},
}
TEMPERATURES = st.sampled_from([0.2, 0.5, 1.0, 3.0])
EPSILONS = st.sampled_from([0.0, INF]) | st.floats(0, 4)
SHARES = st.sampled_from([0.0, 0.1]) | st.floats(0, 0.9)
BETAS = st.sampled_from([0.0, 1.0]) | st.floats(0, 3)
SIGMAS = st.sampled_from([0.0, 0.5]) | st.floats(0.1, 2)
POINTS = st.fixed_dictionaries({"epsilon": EPSILONS, "tau_plus": SHARES, "beta": BETAS, "positive_sigma": SIGMAS})


def in_plain_loops(
    z1: list[list[float]], z2: list[list[float]], t: float, epsilon=INF, tau_plus=0.0, beta=0.0, positive_sigma=0.0
) -> tuple[float, float, float]:
    """(loss, share of anchors under the floor, share within rounding of it): the formula as it stands, one anchor at a
    time; a row of no length has cosine 0.
    """
    rows = []
    for row in [*z1, *z2]:
        norm = max(math.sqrt(sum(x * x for x in row)), 1e-12)
        rows.append([x / norm for x in row])
    n, loss, under, at = len(z1), 0.0, 0, 0
    cosines = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in rows] for one in rows]
    for i in range(2 * n):
        other_view = (i + n) % (2 * n)
        p = math.exp(cosines[i][other_view] / t)
        e = [math.exp(c / t) for k, c in enumerate(cosines[i]) if k not in (i, other_view)]
        total = len(e) * sum(x ** (1 + beta) for x in e) / sum(x**beta for x in e)
        rest, floor = (total - tau_plus * len(e) * p) / (1 - tau_plus), len(e) * math.exp(-1 / t)
        under += rest < floor * (1 - 1e-9)
        at += tau_plus > 0 and abs(rest - floor) <= floor * 1e-9
        weight = 1.0
        if positive_sigma:
            positives = [math.exp(cosines[k][k + n] / positive_sigma) for k in range(n)]
            weight = 2 - n * positives[i % n] / sum(positives)
        loss += math.log(math.exp(-epsilon) * p + max(rest, floor)) - weight * math.log(p)
    return loss / (2 * n), under / (2 * n), at / (2 * n)


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
    "temperature, point, want, norms",
    [
        (0.1, {}, 1.00420199, [0.65905154, 0.52196063]),
        (0.5, {}, 1.58299910, [0.19013780, 0.15057455]),
        (0.1, {"epsilon": 0.25}, 1.26313281, [0.50907121, 0.40318008]),
        (0.5, {"epsilon": 0.0, "tau_plus": 0.1}, 1.74837338, [0.17881294, 0.14160621]),
        (0.1, {"epsilon": 0.0, "tau_plus": 0.3}, 0.81323619, [0.84891109, 0.67235861]),  # two of eight clamped
        (0.5, {"epsilon": 0.0, "tau_plus": 0.1, "beta": 1.0}, 1.77690074, [0.14147292, 0.11204328]),
        (0.5, {"epsilon": 0.0, "beta": 1.0}, 1.79538226, [0.12489068, 0.09891058]),
        (0.1, {"epsilon": 0.0, "tau_plus": 0.2, "beta": 1.0}, 1.48164517, [0.64788441, 0.51302005]),
        (0.5, {"epsilon": 0.0}, 1.77036718, [0.15702130, 0.12434902]),
        (0.1, {"positive_sigma": 0.5}, 8.88683296, [3.37622088, 3.17787348]),  # with its weights as constants
    ],
)
def test_official_numbers(temperature, point, want, norms):
    a, b = vectors.views(requires_grad=False)
    if "positive_sigma" in point:
        b = torch.cos(1.7 * torch.arange(24, dtype=torch.float64)).reshape(4, 6)
    loss, grads = gradients(lambda a, b: decoupled_loss(a, b, temperature, **point), a, b)
    assert loss.item() == pytest.approx(want, abs=5e-9)
    assert [grad.norm().item() for grad in grads] == pytest.approx(norms, abs=5e-9)


@settings(max_examples=100)
@given(pairs(rows=st.integers(2, 6)), TEMPERATURES, POINTS)
def test_equals_the_formula_in_plain_loops(views, temperature, point):
    loss, terms = decoupled_loss(*views, temperature, **point)
    want, under, at = in_plain_loops(*(z.tolist() for z in views), temperature, **point)
    assert loss.item() == pytest.approx(want, rel=1e-8, abs=1e-8)
    assert under - 1e-9 <= terms.pop("clamped").item() <= under + at + 1e-9
    close(terms, simclr.nt_xent_loss(*views, temperature)[1])


# ------------------------------------------------------------------------------------ what the formula contains


@given(pairs(rows=st.integers(1, 7)), st.sampled_from([0.05, 0.2, 1.0, 3.0]))
def test_with_nothing_switched_on_it_is_the_loss_of_simclr(views, temperature):
    assume(long(views))
    got, got_grads = gradients(lambda a, b: decoupled_loss(a, b, temperature, **NOTHING), *views)
    want, grads = gradients(lambda a, b: simclr.nt_xent_loss(a, b, temperature), *views)
    close(got, want, rtol=1e-10, atol=1e-12)
    close(got_grads, grads, rtol=1e-8, atol=1e-10)


@given(pairs(), TEMPERATURES, SHARES, BETAS, st.lists(st.floats(0, 6), min_size=2, max_size=5))
def test_falls_from_simclr_to_decoupled_as_epsilon_rises(views, temperature, tau_plus, beta, epsilons):
    epsilons = [0.0, *sorted(epsilons), 1000.0, INF]
    losses = [decoupled_loss(*views, temperature, epsilon, tau_plus, beta)[0].item() for epsilon in epsilons]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(losses))
    assert losses[0] > losses[-1] and losses[-2] == pytest.approx(losses[-1], abs=1e-12)


@given(pairs(rows=st.integers(2, 7)), st.sampled_from([0.5, 1.0, 3.0]), st.just(1.0) | st.floats(0.01, 0.99), BETAS)
def test_debiasing_takes_the_positive_out_of_the_denominator(views, temperature, part, beta):
    """Above the floor p + G is a multiple of omega p + S, with omega = 1 - (J + 1) tau+; it is DCL for 1 / (J + 1)."""
    assume(long(views))
    tau_plus = part / (2 * len(views[0]) - 1)
    epsilon = INF if part == 1 else -math.log(1 - part)
    assume(decoupled_loss(*views, temperature, 0.0, tau_plus, beta)[1]["clamped"] == 0)
    debiased = gradients(lambda a, b: decoupled_loss(a, b, temperature, 0.0, tau_plus, beta), *views)
    decoupled = gradients(lambda a, b: decoupled_loss(a, b, temperature, epsilon, 0.0, beta), *views)
    close(debiased[0], decoupled[0] - math.log(1 - tau_plus), rtol=1e-9, atol=1e-9)
    close(debiased[1], decoupled[1], rtol=1e-7, atol=1e-8)


@given(pairs(), TEMPERATURES, EPSILONS, SHARES, st.lists(st.floats(0, 6), min_size=2, max_size=5))
def test_rises_with_beta_to_the_loss_of_the_hardest_negative(views, temperature, epsilon, tau_plus, betas):
    losses = [decoupled_loss(*views, temperature, epsilon, tau_plus, beta)[0] for beta in [0.0, *sorted(betas), 1e5]]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(losses))
    rows, n = nn.functional.normalize(torch.cat(views), dim=1), len(views[0])
    s = rows @ rows.T / temperature
    itself = torch.eye(2 * n, dtype=torch.bool)
    positive = s[itself.roll(n, 1)]
    hardest = s.masked_fill(itself | itself.roll(n, 1), -torch.inf).amax(1)
    want = math.log(2 * n - 2) + (hardest - positive).mean()
    close(decoupled_loss(*views, temperature, beta=1e5)[0], want, rtol=1e-6, atol=1e-3)


@given(st.integers(2, 12), st.integers(1, 5), numbers().filter(bool), TEMPERATURES, POINTS)
def test_identical_embeddings_give_the_log_of_what_the_denominator_counts(n, d, value, temperature, point):
    """p and every e_k are the same: debiasing takes away what it divides by, and weights make no difference."""
    z = torch.full((n, d), value, dtype=torch.float64)
    want = math.log(math.exp(-point["epsilon"]) + 2 * n - 2)
    assert decoupled_loss(z, z, temperature, **point)[0].item() == pytest.approx(want, abs=1e-9)


@given(pairs(), TEMPERATURES, BETAS)
def test_is_never_below_its_bound(views, temperature, beta):
    bound = math.log(2 * len(views[0]) - 2) - 2 / temperature
    assert decoupled_loss(*views, temperature, beta=beta)[0].item() >= bound - 1e-12


def test_reaches_that_bound_with_two_opposite_images():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert decoupled_loss(z, z, 0.5)[0].item() == pytest.approx(math.log(2) - 4, abs=1e-12)


def test_far_positives_weigh_more():
    """sim / sigma is 0 and log 3, the softmax 1/4 and 3/4, and w 3/2 and 1/2: on average 1."""
    z1 = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    z2 = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    weighted, alike = (decoupled_loss(z1, z2, 0.5, positive_sigma=s)[0].item() for s in (1 / math.log(3), 0.0))
    assert weighted - alike == pytest.approx((1 - 1 / 2) * (1 / 0.5) / 2, abs=1e-12)


# ---------------------------------------------------------------------------------------------- what changes nothing


@given(pairs(), POINTS, st.data())
def test_a_rotation_and_the_length_of_rows_change_nothing(views, point, data):
    assume(long(views))
    d = views[0].shape[1]
    square = [[data.draw(numbers()) for _ in range(d)] for _ in range(d)]
    rotation, triangle = torch.linalg.qr(torch.tensor(square, dtype=torch.float64))
    assume(triangle.diagonal().abs().min() > 1e-3)
    scales = [data.draw(st.floats(0.1, 50)) for _ in range(2 * len(views[0]))]
    scale = torch.tensor(scales, dtype=torch.float64).view(2, -1, 1)
    turned = [z @ rotation * s for z, s in zip(views, scale, strict=True)]
    close(decoupled_loss(*turned, 0.5, **point)[0], decoupled_loss(*views, 0.5, **point)[0], rtol=1e-7, atol=1e-7)


@given(pairs(), POINTS, st.randoms())
def test_permuting_the_batch_and_swapping_the_views_change_nothing(views, point, random):
    order = random.sample(range(len(views[0])), len(views[0]))
    want = decoupled_loss(*views, 0.5, **point)[0]
    close(decoupled_loss(*(z[order] for z in views), 0.5, **point)[0], want)
    close(decoupled_loss(*reversed(views), 0.5, **point)[0], want)


@given(pairs(), POINTS)
def test_inputs_are_left_alone(views, point):
    before = copy.deepcopy(views)
    decoupled_loss(*(z.requires_grad_() for z in views), 0.2, **point)[0].backward()
    close([z.detach() for z in views], list(before), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- gradients, precision


@settings(max_examples=20)
@given(pairs(rows=st.integers(2, 4), columns=st.integers(1, 4)), EPSILONS, SHARES, BETAS)
def test_gradient_is_that_of_finite_differences(views, epsilon, tau_plus, beta):
    assume(long(views))
    shares = [decoupled_loss(*views, t, epsilon, tau_plus, beta)[1]["clamped"] for t in (0.49, 0.5, 0.51)]
    assume(shares[0] == shares[1] == shares[2])  # no anchor near the floor, where the loss has a kink
    views = [z.requires_grad_() for z in views]
    assert torch.autograd.gradcheck(lambda a, b: decoupled_loss(a, b, 0.5, epsilon, tau_plus, beta)[0], views)


def test_the_weights_of_positives_get_no_gradient():
    """The gradient is that of the mean of w times the pull, with w held still."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    cosine = nn.functional.cosine_similarity(z1, z2, dim=1)
    extra = 1 - 6 * (cosine / 0.5).softmax(0)  # w - 1

    def by_hand(a: Tensor, b: Tensor) -> tuple[Tensor]:
        return (decoupled_loss(a, b, 0.2)[0] - (extra * nn.functional.cosine_similarity(a, b, dim=1)).mean() / 0.2,)

    close(gradients(lambda a, b: decoupled_loss(a, b, 0.2, positive_sigma=0.5), z1, z2), gradients(by_hand, z1, z2))


def test_a_clamped_anchor_does_not_push_its_negatives():
    """Three images on different axes: with tau+ 0.9 every G is the floor, and only the positives are left."""
    z1 = torch.eye(3, dtype=torch.float64)
    z2 = (z1 + 0.1).detach()

    def by_hand(a: Tensor, b: Tensor) -> tuple[Tensor]:
        p = (nn.functional.cosine_similarity(a, b, dim=1) / 0.5).exp()
        return ((math.exp(-0.25) + 4 * math.exp(-2) / p).log().mean(),)

    assert decoupled_loss(z1, z2, 0.5, 0.25, 0.9)[1]["clamped"] == 1
    close(gradients(lambda a, b: decoupled_loss(a, b, 0.5, 0.25, 0.9), z1, z2), gradients(by_hand, z1, z2))
    assert decoupled_loss(z1, z2, 0.5, 0.25, 0.0)[1]["clamped"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_low_temperature_stays_finite(dtype, variant):
    """exp(1000) overflows all dtypes."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(16, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    loss, terms = decoupled_loss(z1, z2, 1e-3, **VARIANTS[variant])
    loss.backward()
    assert all(value.isfinite() for value in [loss, *terms.values()])
    assert z1.grad.isfinite().all() and z2.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_computes_in_float32_whatever_the_network_computed_in(variant):
    generator = torch.Generator().manual_seed(0)
    a, b = ((100 * torch.randn(64, 32, generator=generator)).bfloat16() for _ in range(2))
    want, _ = decoupled_loss(a.double(), b.double(), 0.2, **VARIANTS[variant])
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = decoupled_loss(a, b, 0.2, **VARIANTS[variant])
        also, _ = decoupled_loss(a.float(), b.float(), 0.2, **VARIANTS[variant])
    assert got.dtype == torch.float32 and want.dtype == torch.float64
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


# ---------------------------------------------------------------------------------------------- several processes


def on_this_rank() -> dict[str, tuple[Tensor, list[Tensor]]]:
    """For each variant (loss, gradients) averaged over ranks, as DistributedDataParallel does it."""
    world, results = common.rank_and_world()[1], {}
    for name, point in VARIANTS.items():
        views = [z[common.my_rows(12)] for z in embeddings()]
        loss, grads = gradients(lambda a, b, point=point: decoupled_loss(a, b, 0.5, **point), *views)
        if world > 1:
            loss, grads = common.all_gather(loss[None]).mean(), [common.all_gather(grad) / world for grad in grads]
        results[name] = loss, grads
    return results


def train(folder: str, flags: dict) -> None:
    negatives.backbone = narrow
    negatives.main(tiny("negatives", Path(folder), precision="fp64", epochs=2, eval_every=2, save_every=2, **flags))


def test_any_number_of_processes_gives_the_same(tmp_path):
    """The loss and its gradient on 2 and 4 ranks, and a run on 2, with everything that looks at the whole batch."""
    data, usual = small_folder(), negatives.backbone
    flags = {"decoupled": False, "epsilon": 0.5, "tau_plus": 0.05, "beta": 0.5, "positive_sigma": 0.5, "data_dir": data}
    want = on_this_rank()
    try:
        train(str(tmp_path / "1"), flags)
    finally:
        negatives.backbone = usual
    for world in (2, 4):
        jobs = [(on_this_rank, ())] + [(train, (str(tmp_path / "2"), flags))] * (world == 2)
        for got in run_on(world, jobs)[0]:
            for name, (loss, grads) in want.items():
                close(got[name][0], loss, rtol=1e-10, atol=1e-12)
                close(got[name][1], grads, rtol=1e-10, atol=1e-10)
    assert_same_metrics(tmp_path / "1", tmp_path / "2", 1e-9, set())
    for file in ("encoder.pt", "heads.pt"):
        a, b = (torch.load(tmp_path / world / file, weights_only=True) for world in "12")
        close(b, a, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------------------------------- runs


def test_all_but_the_loss_is_simclrs_to_the_letter():
    """And of main all but three statements: the name, epsilon, the loss."""

    def parts(file: Path) -> dict[str, str]:
        return {node.name: ast.unparse(node) for node in ast.parse(file.read_text()).body if hasattr(node, "name")}

    ours, theirs = parts(Path(negatives.__file__)), parts(Path(simclr.__file__))
    same = {name for name in theirs if ours.get(name) == theirs[name]}
    assert theirs.keys() - same == {"Args", "check", "nt_xent_loss", "main"}
    assert ours.keys() - theirs.keys() == {"log_negatives", "decoupled_loss"}
    sides = [set(parts["main"].splitlines()) for parts in (ours, theirs)]
    own = [line.split("=")[0].strip() for line in sides[0] - sides[1]]
    assert sorted(own) == ["epsilon", "loss, terms", "run"] and len(sides[1] - sides[0]) == 2


def trainer(tmp_path, monkeypatch):
    args = {"image_size": 16, "batch_size": 8, "base_lr": 2.0, "warmup_epochs": 0, "epochs": 2, "log_every": 1}
    args |= {"precision": "fp64"}
    return [quick.trainer(file, file.Args(**args), 24, tmp_path, monkeypatch) for file in (negatives, simclr)]


def test_without_decoupling_a_run_is_simclrs(tmp_path, monkeypatch):
    ours, theirs = trainer(tmp_path, monkeypatch)
    a, b = ours("ours", decoupled=False)["model"], theirs("theirs")["model"]
    close(a, b, rtol=1e-7, atol=1e-9)
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("ours", "theirs")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize(
    "line, want",
    [
        ("", (INF, 0.0, 0.0, 0.0)),
        ("--positive-sigma 0.5", (INF, 0.0, 0.0, 0.5)),
        ("--no-decoupled --epsilon 0.25", (0.25, 0.0, 0.0, 0.0)),
        ("--no-decoupled --tau-plus 0.1 --beta 1", (0.0, 0.1, 1.0, 0.0)),
    ],
)
def test_flags_reach_the_loss(line, want, tmp_path, monkeypatch):
    (train, _), asked = trainer(tmp_path, monkeypatch), []
    monkeypatch.setattr(
        negatives, "decoupled_loss", lambda z1, z2, *point: asked.append(point) or decoupled_loss(z1, z2, *point)
    )
    args = common.parse_args(negatives.Args, negatives.RECIPES, line.split())
    names = ("decoupled", "epsilon", "tau_plus", "beta", "positive_sigma", "temperature")
    train(max_steps=1, **{name: getattr(args, name) for name in names})
    assert asked == [(0.2, *want)]


def test_a_run_that_was_stopped_continues_to_the_same_checkpoint_and_can_be_evaluated(tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = {"decoupled": False, "tau_plus": 0.05, "beta": 1.0, "temperature": 0.5}
    last = negatives.main(tiny("negatives", whole, **flags))
    negatives.main(tiny("negatives", stopped, max_steps=5, **flags))
    negatives.main(tiny("negatives", stopped, **flags))
    assert "continuing after step 5 of 12" in capsys.readouterr().out
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, stopped))
    close(a["model"], b["model"], rtol=0, atol=0)
    close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    lines = [[{**line, "images_per_s": 0} for line in metrics(run) if "loss" in line] for run in (whole, stopped)]
    assert lines[0] == lines[1] and len(lines[0]) == 12
    assert evaluate.main(evaluate.Args(str(whole)))["top1"] == pytest.approx(last["knn_top1"])


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"epsilon": 0.25}, "--no-decoupled"),
        ({"decoupled": False, "epsilon": -0.25}, "--epsilon "),
        ({"decoupled": False, "epsilon": math.nan}, "--epsilon "),
        ({"tau_plus": 1.0}, "--tau-plus "),
        ({"tau_plus": -0.1}, "--tau-plus "),
        ({"tau_plus": math.nan}, "--tau-plus "),
        ({"beta": -1.0}, "--beta "),
        ({"positive_sigma": -0.5}, "--positive-sigma "),
        ({"temperature": 0.0}, "--temperature "),
        ({"projector_hidden": 0}, "--projector-hidden "),
        ({"projector_dim": 0}, "--projector-dim "),
        ({"jitter_strength": -1.0}, "--jitter-strength "),
    ],
)
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        negatives.main(tiny("negatives", tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["quick", "cifar", "imagenet"])
def test_recipes_name_flags_that_exist(recipe):
    negatives.check(common.parse_args(negatives.Args, negatives.RECIPES, ["--recipe", recipe]))
