"""W-MSE's whitening and loss against an independent oracle and the official numbers; slices, views, and processes."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import quick
import torch
import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from methods import metrics, narrow, small_folder, tiny
from strategies import numbers
from torch import Tensor
from worlds import run_on

import common
import wmse
from wmse import WMSE, cholesky, whiten, wmse_loss

close = torch.testing.assert_close
IDENTITY = torch.arange(12)
TWO, FEW = st.just(2), st.integers(1, 3)


def tall(t: Tensor) -> Tensor:
    """The 24 numbers of a test vector as 12 rows of 2."""
    return t.detach().reshape(12, 2).requires_grad_()


def more_views() -> list[Tensor]:
    t = torch.arange(24, dtype=torch.float64)
    return [tall(torch.cos(t)), tall(torch.sin(2 * t))]


@st.composite
def batches(draw, views=TWO, slices=FEW) -> tuple[list[Tensor], Tensor, int]:
    """(views, an order, w) with slices that have full rank: near identities on top of each other, mixed."""
    d, k, count = draw(st.integers(1, 4)), draw(slices), draw(views)
    w = d + draw(st.integers(1, 4))
    made = []
    for _ in range(count):
        noise = draw(hnp.arrays(np.float64, (k * w, d), elements=numbers(0.25)))
        made.append(torch.from_numpy(noise))
    order = torch.tensor(draw(st.permutations(range(k * w))))
    base = torch.cat([3 * torch.eye(d, dtype=torch.float64), -torch.ones(w - d, d, dtype=torch.float64)])
    for v in made:
        v[order] += base.repeat(k, 1)  # so that every slice in that order is well spread
    return made, order, w


def factor_in_plain_loops(v: list[list[float]], eps: float = 0.0) -> tuple[list[list[float]], list[list[float]]]:
    """(centred rows, L): Cholesky and Banachiewicz's rule, entry by entry."""
    w, d = len(v), len(v[0])
    mean = [sum(row[j] for row in v) / w for j in range(d)]
    v = [[row[j] - mean[j] for j in range(d)] for row in v]
    lower = [[0.0] * d for _ in range(d)]
    for i in range(d):
        for j in range(i + 1):
            c = (1 - eps) * sum(row[i] * row[j] for row in v) / (w - 1) + eps * (i == j)
            rest = c - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = math.sqrt(rest) if i == j else rest / lower[j][j]
    return v, lower


def whitened_in_plain_loops(v: list[list[float]], eps: float = 0.0) -> list[list[float]]:
    """Forward substitution, row by row."""
    v, lower = factor_in_plain_loops(v, eps)
    out = []
    for row in v:
        z = []
        for i, x in enumerate(row):
            z.append((x - sum(lower[i][k] * z[k] for k in range(i))) / lower[i][i])
        out.append(z)
    return out


def loss_in_plain_loops(views: list[list[list[float]]], order: list[int], w: int, eps: float = 0.0) -> float:
    total, count = 0.0, 0
    for start in range(0, len(order), w):
        index = order[start : start + w]
        zs = [whitened_in_plain_loops([view[i] for i in index], eps) for view in views]
        for a, b in itertools.combinations(zs, 2):
            for x, y in zip(a, b, strict=True):
                length = [max(math.sqrt(sum(t * t for t in row)), 1e-12) for row in (x, y)]
                total += sum((s / length[0] - t / length[1]) ** 2 for s, t in zip(x, y, strict=True))
                count += 1
    return total / count


# -------------------------------------------------------------------------------------------------- whitening


@given(batches(slices=st.just(1)), st.sampled_from([0.0, 0.1, 0.9]))
def test_whitening_is_that_of_plain_loops(batch, eps):
    v = batch[0][0]
    close(whiten(v, eps), torch.tensor(whitened_in_plain_loops(v.tolist(), eps), dtype=torch.float64))
    close(cholesky(v, eps), torch.tensor(factor_in_plain_loops(v.tolist(), eps)[1], dtype=torch.float64))


@given(batches(slices=st.just(1)))
def test_whitened_embeddings_have_mean_0_and_covariance_1(batch):
    v = batch[0][0]
    z, (w, d) = whiten(v), v.shape
    close(z.mean(0), torch.zeros(d, dtype=torch.float64), rtol=0, atol=1e-9)
    close(z.T @ z / (w - 1), torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-8)
    assert z.square().sum(1).mean().item() == pytest.approx(d * (w - 1) / w)


@given(
    batches(slices=st.just(1)), st.lists(st.floats(0.1, 10), min_size=4, max_size=4), st.lists(numbers(), min_size=16)
)
def test_whitening_undoes_shifts_scales_and_triangular_maps(batch, scales, entries):
    """L⁻¹ of M v with a lower triangular M of positive diagonal is that of v: so no dimension can shrink away."""
    v = batch[0][0]
    d = v.shape[1]
    lower = torch.tensor(entries[: d * d], dtype=torch.float64).reshape(d, d).tril(-1) + torch.tensor(scales[:d]).diag()
    close(whiten(v @ lower.T + torch.tensor(entries[:d])), whiten(v), rtol=1e-6, atol=1e-6)


@given(batches())
def test_several_slices_at_once_are_whitened_each_by_itself(batch):
    (v, _), order, w = batch
    slices = v[order].unflatten(0, (-1, w))
    close(whiten(slices), torch.stack([whiten(piece) for piece in slices]))


@settings(max_examples=10)
@given(batches(slices=st.just(1)))
def test_the_gradient_of_whitening_is_that_of_finite_differences(batch):
    assert torch.autograd.gradcheck(whiten, batch[0][0].requires_grad_())


@pytest.mark.parametrize("w", [1, 2, 3])
def test_too_few_embeddings_for_their_width_are_refused(w):
    v = torch.randn(w, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"{w} embeddings cannot be whitened in 3 dimensions"):
        whiten(v)
    assert w == 1 or whiten(v, 0.1).isfinite().all()


def test_a_covariance_without_full_rank_gives_nan_and_epsilon_helps():
    v = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v[:, 1] = 0
    good = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = whiten(torch.stack([v, good]))
    assert z[0].isnan().any() and z[1].isfinite().all(), "a slice's failure is its own"
    assert whiten(v, 1e-4).isfinite().all()
    loss, terms = wmse_loss([v, good], torch.arange(8), 8)
    assert loss.isnan() and terms["pivot"].isnan()


# ------------------------------------------------------------------------------------------------------- loss


def official(name: str) -> tuple[list[Tensor], Tensor, int, float]:
    a, b = vectors.views()
    even_odd = torch.tensor([0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])
    return {
        "epsilon": ([a, b], torch.arange(4), 4, 0.1),
        "whole batch": ([tall(a), tall(b)], IDENTITY, 12, 0.0),
        "two slices": ([tall(a), tall(b)], even_odd, 6, 0.0),
        "four views": ([tall(a), tall(b), *more_views()], IDENTITY, 12, 0.0),
    }[name]


@pytest.mark.parametrize(
    "name, want, gradients",
    [
        ("epsilon", 0.01912085, [0.61237973, 0.52297050]),
        ("whole batch", 0.01500754, [0.09832927, 0.07717184]),
        ("two slices", 0.01555815, [0.10416160, 0.08123883]),
        ("four views", 1.02017925, [0.10168555, 0.05021732]),
    ],
)
def test_official_numbers(name, want, gradients):
    """Both gradients: a library's version has none for the second view."""
    views, order, size, eps = official(name)
    loss, _ = wmse_loss(views, order, size, eps)
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=5e-9)
    assert [v.grad.norm().item() for v in views[:2]] == pytest.approx(gradients, abs=5e-9)
    assert all(v.grad.norm() > 0.01 for v in views)


@given(batches(views=st.integers(2, 4)))
def test_equals_the_equation_in_plain_loops(batch):
    views, order, w = batch
    loss, terms = wmse_loss(*batch)
    assert loss.item() == pytest.approx(loss_in_plain_loops([v.tolist() for v in views], order.tolist(), w), abs=1e-8)
    assert terms["cosine"].item() == pytest.approx(1 - loss.item() / 2)
    slices = views[0][order].split(w)
    pivots = [row[i] ** 2 for v in slices for i, row in enumerate(factor_in_plain_loops(v.tolist())[1])]
    assert terms["pivot"].item() == pytest.approx(min(pivots))


@given(batches(views=st.integers(2, 4)), st.randoms())
def test_the_order_of_views_slices_and_images_within_a_slice_changes_nothing(batch, random):
    views, order, w = batch
    want = wmse_loss(*batch)[0]
    slices = [piece[random.sample(range(w), w)] for piece in order.split(w)]
    random.shuffle(slices)
    close(wmse_loss(random.sample(views, len(views)), torch.cat(slices), w)[0], want)
    moved = random.sample(range(len(order)), len(order))  # rows of the batch change places, and the order with them
    close(wmse_loss([v[moved] for v in views], torch.tensor(moved).argsort()[order], w)[0], want)


@given(batches())
def test_stays_between_equal_and_opposite_views(batch):
    (v1, v2), order, w = batch
    assert 0 <= wmse_loss([v1, v2], order, w)[0].item() <= 4
    assert wmse_loss([v1, 3 * v1 + 1], order, w)[0].item() == pytest.approx(0, abs=1e-9)
    # Whitening keeps the sign of L⁻¹ v: z of -v is -z.
    assert wmse_loss([v1, -v1], order, w)[0].item() == pytest.approx(4, abs=1e-9)


def test_slices_matter():
    a, b = vectors.views()
    views = [tall(a), tall(b)]
    losses = {
        round(wmse_loss(views, torch.tensor(order), 4)[0].item(), 9)
        for order in (list(range(12)), list(range(0, 12, 3)) + list(range(1, 12, 3)) + list(range(2, 12, 3)))
    }
    assert len(losses) == 2
    with pytest.raises(ValueError, match="12 images do not split into slices of 5"):
        wmse_loss(views, IDENTITY, 5)


@given(batches(views=st.integers(2, 3)))
def test_every_view_gets_a_gradient_and_inputs_are_left_alone(batch):
    views, order, w = batch
    before = copy.deepcopy((views, order))
    loss, terms = wmse_loss([v.requires_grad_() for v in views], order, w)
    loss.backward()
    assert all(v.grad is not None for v in views)
    assert not terms["pivot"].requires_grad and terms["cosine"].ndim == terms["pivot"].ndim == 0
    close(([v.detach() for v in views], order), before, rtol=0, atol=0)


@settings(max_examples=6)
@given(batches(slices=st.integers(1, 2)))
def test_gradient_is_that_of_finite_differences(batch):
    views, order, w = batch
    assert torch.autograd.gradcheck(lambda *v: wmse_loss(list(v), order, w)[0], [v.requires_grad_() for v in views])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    a, b = ((10 * torch.randn(64, 16, generator=generator)).to(half) for _ in range(2))
    order = torch.randperm(64, generator=generator)
    want, want_terms = wmse_loss([a.double(), b.double()], order, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got, terms = wmse_loss([a, b], order, 32)
        also, _ = wmse_loss([a.float(), b.float()], order, 32)
        white = whiten(a)
    assert {got.dtype, white.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    assert want.dtype == torch.float64
    close(got.double(), want, rtol=1e-5, atol=0)
    close(terms["pivot"].double(), want_terms["pivot"], rtol=1e-4, atol=0)
    close(also, got)
    close(white.double(), whiten(a.double()), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------- network, runs


def test_the_backbone_sees_each_view_by_itself_and_the_projector_all_of_them(tmp_path):
    torch.manual_seed(0)
    model = WMSE(tiny("wmse", tmp_path))
    xs = [i + torch.rand(4, 3, 16, 16) for i in range(3)]
    alone = copy.deepcopy(model)
    zs = model(xs)
    close(torch.cat(zs), alone.projector(torch.cat([alone.backbone(x) for x in xs])))
    assert model.backbone.bn1.num_batches_tracked == 3 and model.projector[1].num_batches_tracked == 1


@pytest.fixture
def train(tmp_path, monkeypatch):
    args = wmse.Args(image_size=16, batch_size=8, projector_hidden=12, projector_dim=3, slice_size=4, base_lr=0.03)
    return quick.trainer(wmse, args, 24, tmp_path, monkeypatch)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("optimizer", ["adam", "lars", "sgd"])
def test_every_optimizer_trains_on_as_many_views_as_wanted_and_a_resumed_run_is_the_same(
    views, optimizer, train, monkeypatch
):
    seen, plain = [], wmse.wmse_loss

    def spy(zs, order, size, eps):
        seen.append((len(zs), tuple(order.tolist()), size, eps))
        return plain(zs, order, size, eps)

    monkeypatch.setattr(wmse, "wmse_loss", spy)
    flags = {"views": views, "optimizer": optimizer, "epochs": 2, "warmup_epochs": 1, "epsilon": 0.01}
    whole = train("whole", **flags)
    assert len(seen) == 6 and all(step[0] == views and step[2:] == (4, 0.01) for step in seen)
    assert all(sorted(step[1]) == list(range(8)) for step in seen) and len({step[1] for step in seen}) == 6
    if (views, optimizer) in ((2, "adam"), (4, "lars")):
        train("parts", max_steps=4, **flags)
        parts = train("parts", **flags)
        assert seen[6:] == seen[:6], "the slices belong to the step"
        assert all(torch.equal(parts["model"][name], tensor) for name, tensor in whole["model"].items())
        close(parts["optimizer"], whole["optimizer"], rtol=0, atol=0)


def test_embeddings_that_have_collapsed_end_the_run_in_one_line(train, monkeypatch, capsys):
    black = common.Data(torch.zeros(24, 3, 16, 16, dtype=torch.uint8), None, torch.full((24,), -1), [])
    monkeypatch.setattr(common, "load_data", lambda *_: (black, None))
    with pytest.raises(SystemExit) as end:
        train(mean=(0.0, 0.0, 0.0), max_steps=2, log_every=1)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1 and "pivot is nan" in said


IMPOSSIBLE = [
    ({"views": 1}, "--views must be 2 to 16"),
    ({"projector_hidden": 0}, "--projector-hidden "),
    ({"projector_dim": 0}, "--projector-dim "),
    ({"jitter_strength": -1.0}, "--jitter-strength "),
    ({"epsilon": -0.1}, "--epsilon "),
    ({"epsilon": math.nan}, "--epsilon "),
    ({"slice_size": 4}, "--slice-size 4 is no larger than --projector-dim 4: their covariance has rank 3 at most"),
    ({"slice_size": -8}, "--slice-size -8 is no larger than --projector-dim 4"),
    ({"slice_size": 1, "epsilon": 0.1}, "--slice-size 1 does not divide the batch of 16 images; take 8, 16"),
    ({"slice_size": 12}, "--slice-size 12 does not divide the batch of 16 images; take 8, 16"),
    ({"projector_dim": 16}, "--slice-size 32 does not divide the batch of 16 images; lower --projector-dim to 8"),
]


@pytest.mark.parametrize("flags, named", IMPOSSIBLE)
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        wmse.main(tiny("wmse", tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "run").exists()


def test_the_recipes_fit():
    for name, recipe in wmse.RECIPES.items():
        for flags in ({}, {"views": 4, "batch_size": 256}):
            wmse.check(wmse.Args(**{**recipe, **flags, "recipe": name}))


# -------------------------------------------------------------------------------------------------- processes


def gradient() -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) averaged over ranks as DDP does it; rows that grow from rank to rank."""
    _, world = common.rank_and_world()
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1, 25, dtype=torch.float64)[:, None]
    everyone = [torch.randn(24, 5, generator=generator, dtype=torch.float64) * size + size for _ in range(3)]
    order = torch.randperm(24, generator=generator)
    views = [v[common.my_rows(24)].clone().requires_grad_() for v in everyone]
    loss, _ = wmse_loss(views, order, 8)
    loss.backward()
    with torch.no_grad():
        return common.all_gather(loss.detach()[None]), [common.all_gather(v.grad) / world for v in views]


def run_of(folder: str, data_dir: str, steps: int) -> dict[str, float]:
    wmse.backbone = narrow
    flags = {"epochs": 2, "max_steps": steps, "eval_every": 2, "save_every": 2, "precision": "fp64", "views": 3}
    return wmse.main(tiny("wmse", Path(folder), data_dir=data_dir, **flags))


def test_several_processes_give_the_gradient_of_one_and_the_same_run(tmp_path):
    """Begun on two processes, a run goes on on one, too."""
    want, gradients = gradient()
    assert all(g.abs().max() > 1e-6 for g in gradients)
    data = small_folder()

    def job(name: str, steps: int):
        return run_of, (str(tmp_path / name), data, steps)

    run_on(1, [job("1", 6)])
    for world in (2, 4):
        jobs = [(gradient, ())] + [job("2", 6), job("2 then 1", 3)] * (world == 2)
        for losses, got in run_on(world, jobs)[0]:
            close(losses, want.expand(world), rtol=1e-10, atol=1e-12)
            close(got, gradients, rtol=1e-10, atol=1e-10)
    run_on(1, [job("2 then 1", 6)])
    for other in ("2", "2 then 1"):
        lines = [[line for line in metrics(tmp_path / run) if "loss" in line] for run in ("1", other)]
        assert len(lines[0]) == len(lines[1]) == 6
        for a, b in zip(*lines, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"images_per_s"}:
                assert math.isclose(a[key], b[key], rel_tol=1e-9, abs_tol=1e-10), (other, a["step"], key)
        saved = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["model"] for run in ("1", other)]
        close(saved[1], saved[0], rtol=1e-7, atol=1e-9)
