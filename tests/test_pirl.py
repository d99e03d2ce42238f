"""PIRL's and NPID's losses against an independent oracle and the reference numbers; views, bank, and processes."""

import collections
import copy
import itertools
import math
from pathlib import Path

import pytest
import quick
import torch
import torch.nn.functional as F
import vectors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods import metrics, narrow, small_folder, tiny
from strategies import matrices
from torch import Tensor
from worlds import run_on

import common
import pirl
from pirl import PIRL, Bank, bank_nce_loss, estimate_log_z, pirl_loss, tiles

close = torch.testing.assert_close
TEMPERATURES = st.sampled_from([0.07, 0.2, 0.5, 1.0, 3.0])
LOSSES = ["softmax", "nce", "pirl"]


def unit(row: list[float]) -> list[float]:
    norm = max(math.sqrt(sum(x * x for x in row)), 1e-12)
    return [x / norm for x in row]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(unit(a), unit(b), strict=True))


def in_plain_loops(query, own, negatives, temperature, loss, z_over_n, same) -> float:
    """NPID's and PIRL's equations as the papers write them, one query at a time; negatives[i][j] is a row."""
    total = 0.0
    for i, q in enumerate(query):
        others = [row for row, itself in zip(negatives[i], same[i], strict=True) if not itself]
        exps = [math.exp(cosine(q, row) / temperature) for row in [own[i], *others]]
        if loss == "nce":
            noise = len(negatives[i])  # K times the noise's share 1/N, where p = exp / (N z_over_n)
            h = [e / z_over_n / (e / z_over_n + noise) for e in exps]
        else:
            h = [e / sum(exps) for e in exps]
        total -= math.log(h[0])
        if loss != "softmax":
            total -= sum(math.log(1 - p) for p in h[1:])
    return total / len(query)


class Case(collections.namedtuple("Case", "f g own negatives same shared")):
    """Inputs of a loss: `shared` negatives are (K, d), others (n, K, d)."""

    def lists(self) -> tuple[list, list, list]:
        negatives = [self.negatives.tolist()] * len(self.f) if self.shared else self.negatives.tolist()
        return self.own.tolist(), negatives, self.same.tolist()


@st.composite
def cases(draw) -> Case:
    n, k, d = draw(st.integers(1, 4)), draw(st.integers(1, 5)), st.just(draw(st.integers(2, 5)))
    f, g, own = (draw(matrices(st.just(n), d)) for _ in range(3))
    shared = draw(st.booleans())
    negatives = draw(matrices(st.just(k if shared else n * k), d))
    marks = draw(
        st.lists(st.lists(st.sampled_from([False, False, True]), min_size=k, max_size=k), min_size=n, max_size=n)
    )
    assume(min(t.norm(dim=1).min().item() for t in (f, g)) > 0.1)  # near 0 the direction jumps
    return Case(f, g, own, negatives if shared else negatives.view(n, k, -1), torch.tensor(marks), shared)


# ------------------------------------------------------------------------------------------------------- loss


def bank_of_the_vectors() -> Tensor:
    return F.normalize(torch.sin(0.3 * torch.arange(30, dtype=torch.float64) + 0.2).reshape(5, 6), dim=1)


INDEX = torch.tensor([[2, 0, 3, 1], [0, 4, 1, 2], [4, 3, 3, 0], [1, 2, 0, 4]])  # own row, then three negatives


def rows_of_the_vectors() -> tuple[Tensor, Tensor]:
    bank = bank_of_the_vectors()
    return bank[INDEX[:, 0]], bank[INDEX[:, 1:]]


def log_z_with(eps: float, z: float) -> tuple[Tensor, float]:
    """(ln(Z/N), a constant to add) with which the NCE is that of code which adds eps to the denominators; N 5, K 3."""
    noise = 3 / 5
    return torch.tensor(math.log(z / 5) + math.log1p(eps / noise), dtype=torch.float64), 3 * math.log1p(eps / noise)


@pytest.mark.parametrize("temperature, want, gradient", [(0.1, 5.10657016, 2.62323414), (0.07, 7.28365205, 3.76716558)])
def test_npid_over_the_whole_bank_has_the_numbers_of_a_reference_implementation(temperature, want, gradient):
    (a, _), (own, _) = vectors.views(), rows_of_the_vectors()
    same = INDEX[:, :1] == torch.arange(5)
    loss, _ = bank_nce_loss(a, own, bank_of_the_vectors(), temperature, same=same)
    loss.backward()
    assert [loss.item(), a.grad.norm().item()] == pytest.approx([want, gradient], abs=5e-9)


def test_npid_with_drawn_negatives_has_the_numbers_of_a_reference_implementation():
    (a, _), rows = vectors.views(), rows_of_the_vectors()
    loss, _ = bank_nce_loss(a, *rows, 0.1)
    loss.backward()
    assert [loss.item(), a.grad.norm().item()] == pytest.approx([3.77454255, 2.52262940], abs=5e-9)
    assert 5 * estimate_log_z(a, *rows, 0.1).exp().item() == pytest.approx(753.22747, rel=2e-8)
    log_z, constant = log_z_with(1e-7, 753.22747)
    a.grad = None
    loss, _ = bank_nce_loss(a, *rows, 0.1, "nce", log_z)
    loss.backward()
    assert loss.item() + constant == pytest.approx(5.22174645, abs=2e-8)
    assert a.grad.norm().item() == pytest.approx(2.53217577, abs=2e-8)


@pytest.mark.parametrize(
    "loss, want, gradients",
    [
        ("nce", 7.27711248, [1.36739823, 1.80142641]),
        ("softmax", 5.24880580, [1.45737608, 1.81273414]),
        ("pirl", 8.72195105, [2.84018504, 3.50475200]),
    ],
)
def test_pirl_has_the_numbers_of_a_reference_implementation(loss, want, gradients):
    (a, b), rows = vectors.views(), rows_of_the_vectors()
    log_z, constant = log_z_with(1.1920929e-7, 12175.29396)
    assert estimate_log_z(b, *rows, 0.07).item() == pytest.approx(math.log(12175.29396 / 5), abs=2e-8)
    value, _ = pirl_loss(a, b, *rows, 0.5, 0.07, loss, log_z)
    value.backward()
    assert value.item() + constant * (loss == "nce") == pytest.approx(want, abs=2e-8)
    assert [b.grad.norm().item(), a.grad.norm().item()] == pytest.approx(gradients, abs=2e-8)


@pytest.mark.parametrize("loss", LOSSES)
@given(cases(), TEMPERATURES, st.floats(0, 1), st.floats(-3, 5))
def test_equals_the_equations_in_plain_loops(loss, case, temperature, lam, log_z):
    own, negatives, same = case.lists()
    f, g = (
        in_plain_loops(query.tolist(), own, negatives, temperature, loss, math.exp(log_z), same)
        for query in (case.f, case.g)
    )
    constants = (case.own, case.negatives), (loss, torch.tensor(log_z, dtype=torch.float64), case.same)
    got, terms = pirl_loss(case.f, case.g, *constants[0], lam, temperature, *constants[1])
    assert got.item() == pytest.approx(lam * g + (1 - lam) * f, rel=1e-6, abs=1e-6)
    alone, alone_terms = bank_nce_loss(case.f, *constants[0], temperature, *constants[1])
    assert alone.item() == pytest.approx(f, rel=1e-6, abs=1e-6)
    close(pirl_loss(case.f, case.g, *constants[0], 0.0, temperature, *constants[1])[0], alone)
    f, g = (F.cosine_similarity(query, case.own, dim=1, eps=1e-12).mean().item() for query in (case.f, case.g))
    assert terms["positive"].item() == alone_terms["positive"].item() == pytest.approx(f, abs=1e-9)
    assert terms["transformed"].item() == pytest.approx(g, abs=1e-9)


@given(cases(), TEMPERATURES)
def test_z_over_n_is_the_mean_of_the_exponentials_that_count(case, temperature):
    own, negatives, same = case.lists()
    exps = []
    for i, q in enumerate(case.f.tolist()):
        others = [row for row, itself in zip(negatives[i], same[i], strict=True) if not itself]
        exps += [math.exp(cosine(q, row) / temperature) for row in [own[i], *others]]
    got = estimate_log_z(case.f, case.own, case.negatives, temperature, case.same)
    assert got.item() == pytest.approx(math.log(sum(exps) / len(exps)), abs=1e-9)


def test_a_bank_of_one_row_repeated_costs_the_logarithm_of_its_size():
    z = torch.randn(4, 6, dtype=torch.float64)
    bank = z[:1].expand(10, -1)
    same = torch.arange(4)[:, None] == torch.arange(10)
    assert bank_nce_loss(z, bank[:4], bank, 0.1, same=same)[0].item() == pytest.approx(math.log(10))


@pytest.mark.parametrize("loss", LOSSES)
def test_accuracy_counts_the_queries_whose_own_row_comes_first(loss):
    z, log_z = torch.eye(2), torch.zeros(())
    same = torch.eye(2, dtype=torch.bool)
    assert bank_nce_loss(z, z, z, 0.5, loss, log_z, same)[1]["accuracy"].item() == 1
    assert bank_nce_loss(z.flip(0), z, z, 0.5, loss, log_z, same)[1]["accuracy"].item() == 0
    assert bank_nce_loss(z, z, z, 0.5, loss, log_z)[1]["accuracy"].item() == 0, "a tie is lost"


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=10)
@given(cases())
def test_gradient_is_that_of_finite_differences_and_the_bank_is_constant(loss, case):
    log_z, before = torch.tensor(0.5, dtype=torch.float64), copy.deepcopy(case)
    f, g, own, negatives = (t.requires_grad_() for t in case[:4])
    value, terms = pirl_loss(f, g, own, negatives, 0.3, 0.5, loss, log_z, case.same)
    value.backward()
    assert own.grad is None and negatives.grad is None and f.grad is not None and g.grad is not None
    assert not any(term.requires_grad or term.ndim for term in terms.values())
    close([t.detach() for t in case[:4]], list(before[:4]), rtol=0, atol=0)

    def of_queries(f, g):
        return pirl_loss(f, g, own.detach(), negatives.detach(), 0.3, 0.5, loss, log_z, case.same)[0]

    assert torch.autograd.gradcheck(of_queries, (f, g))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_bank_may_change_before_the_backward_pass(loss):
    (a, b), bank = vectors.views(), bank_of_the_vectors()
    want = []
    for change in (False, True):
        a.grad = b.grad = None
        bank = bank_of_the_vectors()
        value, _ = pirl_loss(
            a, b, bank[:4], bank, 0.5, 0.1, loss, torch.ones(()), torch.arange(4)[:, None] == torch.arange(5)
        )
        if change:
            bank.zero_()
        value.backward()
        want.append([a.grad.clone(), b.grad.clone()])
    close(*want, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(loss, half):
    generator = torch.Generator().manual_seed(0)
    f, g = ((100 * torch.randn(32, 16, generator=generator)).to(half) for _ in range(2))
    bank, log_z = torch.randn(64, 16, generator=generator), torch.tensor(2.0)
    same = torch.arange(32)[:, None] == torch.arange(64)
    rows = bank[:32], bank
    want, _ = pirl_loss(f.double(), g.double(), *(t.double() for t in rows), 0.5, 0.07, loss, log_z.double(), same)
    with torch.autocast("cpu", torch.bfloat16):
        got, terms = pirl_loss(f, g, *rows, 0.5, 0.07, loss, log_z, same)
        estimate = estimate_log_z(f, *rows, 0.07, same)
    assert {got.dtype, estimate.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    close(got.double(), want, rtol=1e-5, atol=0)
    close(estimate, estimate_log_z(f.double(), *(t.double() for t in rows), 0.07, same).float(), rtol=1e-5, atol=0)


def test_extreme_similarities_leave_loss_and_gradient_finite():
    z = F.normalize(torch.tensor([[1.0, 0.0], [-1.0, 1e-4]]), dim=1)
    for loss, temperature in itertools.product(LOSSES, (1e-4, 0.07)):
        f = z.clone().requires_grad_()
        value, _ = bank_nce_loss(f, z.flip(0), z, temperature, loss, torch.zeros(()))  # own row far, a negative at hand
        value.backward()
        assert value.isfinite() and f.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------- bank


def test_the_bank_after_an_update_has_the_numbers_of_a_reference_implementation():
    (a, _), bank = vectors.views(), Bank(5, 6, 0.5).double()
    bank.rows.copy_(bank_of_the_vectors())
    bank.update(INDEX[:, 0], a)
    want = [0.12569882, 0.08704307, -0.24257351, -0.59447120, -0.65757302, -0.36329481]
    assert bank.rows[2].tolist() == pytest.approx(want, abs=6e-9)
    close(bank.rows[3], bank_of_the_vectors()[3], rtol=0, atol=0)
    assert not bank.rows.requires_grad


@given(st.integers(2, 6), st.integers(1, 4), st.floats(0, 1), st.data())
def test_a_row_is_the_normalised_running_mean_of_normalised_embeddings(images, dim, momentum, data):
    bank, want = Bank(images, dim, momentum).double(), [[0.0] * dim for _ in range(images)]
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=images, unique=True))
        z = data.draw(matrices(st.just(len(index)), st.just(dim)))
        before = z.clone()
        bank.update(torch.tensor(index), z)
        close(z, before, rtol=0, atol=0)
        for i, row in zip(index, before.tolist(), strict=True):
            mixed = [momentum * old + (1 - momentum) * new for old, new in zip(want[i], unit(row), strict=True)]
            want[i] = unit(mixed)
            assume(math.hypot(*mixed) > 1e-3 or not any(mixed))  # opposite directions: no mean
        close(bank.rows, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ views


def coordinates(n: int, side: int) -> Tensor:
    """(n, 3, side, side) images whose three channels are the number of the image, the row and the column."""
    at = torch.arange(side)
    rows = torch.stack([torch.zeros(side, side).long(), at[:, None].expand(-1, side), at.expand(side, -1)])
    return torch.stack([rows + torch.tensor([i, 0, 0])[:, None, None] for i in range(n)])


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2), st.integers(0, 99)
)
def test_a_tile_is_cut_out_of_its_own_cell(n, grid, size, room, rest, seed):
    cell = size + room
    x = coordinates(n, grid * cell + min(rest, grid - 1))
    cut = tiles(x, common.Draws((seed,), n), grid, size)
    assert cut.shape == (n, grid**2, 3, size, size)
    for i, j in itertools.product(range(n), range(grid**2)):
        image, rows, columns = cut[i, j]
        top, left = rows[0, 0].item(), columns[0, 0].item()
        assert (image == i).all()
        assert torch.equal(rows, top + torch.arange(size)[:, None].expand(-1, size))
        assert torch.equal(columns, left + torch.arange(size).expand(size, -1))
        assert 0 <= top - j // grid * cell <= room and 0 <= left - j % grid * cell <= room


def test_tiles_lie_everywhere_in_their_cells_independently_of_each_other():
    cut = tiles(coordinates(400, 12), common.Draws((0,), 400), 3, 2)  # cells of 4 pixels: offsets 0, 1, 2
    offset = cut[:, :, 1:, 0, 0] % 4  # 400×9×2
    share = torch.stack([(offset == k).double().mean(0) for k in range(3)])
    assert (offset <= 2).all() and (share - 1 / 3).abs().max() < 0.12
    correlation = torch.corrcoef(offset.flatten(1).T.double())
    assert (correlation - torch.eye(18)).abs().max() < 0.25


@pytest.mark.parametrize("size", [0, 5])
def test_a_tile_that_does_not_fit_is_an_error(size):
    with pytest.raises(ValueError, match=f"tile of {size} pixels does not fit into a cell of 4"):
        tiles(torch.zeros(1, 3, 12, 12), common.Draws((0,), 1), 3, size)


def transformed(tmp_path, kind: str, n: int, rows: slice = slice(None), **flags) -> Tensor:
    """Iᵗ of images with coordinates for colours, without colour jitter."""
    plain = {"color_jitter": False, "grayscale": False, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    args = tiny("pirl", tmp_path, transform=kind, batch_size=n, **{**plain, **flags})
    side = {"rotation": 16, "jigsaw": 24}[kind]
    view = common.View(coordinates(n, side)[rows] / 255.0, common.Draws((9,), n, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pirl, "my_rows", lambda total: slice(*(total // n * i for i in rows.indices(n)[:2])))
        return pirl.transform(view, args, step=5)


def test_rotation_turns_every_image_by_a_quarter_of_its_own(tmp_path):
    x, got = coordinates(200, 16) / 255.0, transformed(tmp_path, "rotation", 200)
    turns = [[k for k in range(4) if torch.equal(x[i].rot90(k, (1, 2)), got[i])] for i in range(200)]
    assert all(len(k) == 1 for k in turns)
    assert min(collections.Counter(k for (k,) in turns)[quarters] for quarters in range(4)) > 30


def test_a_puzzle_has_nine_tiles_of_the_image_in_any_order(tmp_path):
    got = (255 * transformed(tmp_path, "jigsaw", 300)).round().long()  # 300×9×3×6×6
    assert got.shape == (300, 9, 3, 6, 6)
    assert torch.equal(got[:, :, 0], torch.arange(300)[:, None, None, None].expand(-1, 9, 6, 6))
    cells = got[:, :, 1, 0, 0] // 8 * 3 + got[:, :, 2, 0, 0] // 8  # 300×9
    assert torch.equal(cells.sort(1).values, torch.arange(9).expand(300, -1))
    share = F.one_hot(cells, 9).double().mean(0)  # how often each cell stands in each place
    assert (share - 1 / 9).abs().max() < 0.08


def test_tiles_of_one_image_have_colours_of_their_own(tmp_path):
    got = transformed(tmp_path, "jigsaw", 60, color_jitter=False, grayscale=True)  # 60×9×3×6×6
    grey = (got[:, :, 0] == got[:, :, 1]).flatten(2).all(2) & (got[:, :, 0] == got[:, :, 2]).flatten(2).all(2)
    assert 0.1 < grey.double().mean() < 0.3
    some = grey.sum(1)
    assert ((some > 0) & (some < 9)).double().mean() > 0.5


@pytest.mark.parametrize("kind", ["rotation", "jigsaw"])
def test_what_a_process_draws_for_its_images_does_not_depend_on_the_others(kind, tmp_path):
    flags = {"color_jitter": True, "grayscale": True}
    parts = [transformed(tmp_path, kind, 8, rows, **flags) for rows in (slice(0, 4), slice(4, 8))]
    close(torch.cat(parts), transformed(tmp_path, kind, 8, **flags))


# --------------------------------------------------------------------------------------------- network, steps


def inputs(kind: str) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shape = {"none": (), "rotation": (4, 3, 16, 16), "jigsaw": (4, 9, 3, 6, 6)}[kind]
    return torch.rand(4, 3, 16, 16, generator=generator), torch.rand(shape, generator=generator) if shape else None


def test_heads_of_their_own_for_the_image_and_for_what_is_transformed(tmp_path):
    torch.manual_seed(0)
    for kind in ("none", "rotation", "jigsaw"):
        model, (x, transformed) = PIRL(tiny("pirl", tmp_path, transform=kind)).eval(), inputs(kind)
        f, g = model(x, transformed)
        close(f, model.f(model.backbone(x)))
        if kind == "none":
            assert g is None
        elif kind == "rotation":
            close(g, model.g(model.backbone(transformed)))
        else:
            parts = [model.tile(model.backbone(transformed[:, j])) for j in range(9)]
            close(g, model.g(torch.cat(parts, dim=1)))
            assert not torch.allclose(g, model(x, transformed.flip(1))[1]), "the order of the tiles matters"


@pytest.mark.parametrize("kind", ["none", "rotation", "jigsaw"])
def test_every_weight_gets_a_gradient(kind, tmp_path):
    torch.manual_seed(0)
    model, bank = PIRL(tiny("pirl", tmp_path, transform=kind)), torch.randn(6, 16)
    f, g = model(*inputs(kind))
    loss, _ = bank_nce_loss(f, bank[:4], bank, 0.2) if g is None else pirl_loss(f, g, bank[:4], bank, 0.5, 0.2)
    loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


@pytest.fixture
def train(tmp_path, monkeypatch):
    args = pirl.Args(image_size=16, batch_size=8, head_dim=6, tile_size=8, epochs=2)
    return quick.trainer(pirl, args, 40, tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", ["none", "rotation", "jigsaw"])
@pytest.mark.parametrize("negatives", [0, 7])
def test_the_bank_is_filled_first_and_each_step_reads_it_before_it_writes(kind, negatives, train, monkeypatch):
    seen, banks, held = [], [], []

    def spy_loss(query, own, rows, temperature, loss, log_z, same):
        if not held:
            held.append(banks[0].rows.clone())
            assert len(seen) == 5 and ((held[0].norm(dim=1) - 1).abs() < 1e-5).all(), "every image has a row"
        before = held[-1]
        assert torch.equal(banks[0].rows, before), "what the steps before left"
        close(rows, before if negatives == 0 else rows, rtol=0, atol=0)
        assert len(rows) == (negatives or 40) and all(any(torch.equal(row, r) for r in before) for row in rows)
        for i, row in enumerate(own):
            (at,) = [j for j in range(40) if torch.equal(before[j], row)]
            assert same[i].tolist() == [torch.equal(before[at], r) for r in rows]
            owners.append(at)
        queries.append(query.detach())
        return bank_nce_loss(query, own, rows, temperature, loss, log_z, same)

    def spy_update(self, index, z):
        update(self, index, z)
        banks[:] = [self]
        seen.append(index.tolist())
        if held:  # once per step, with the embeddings of the untransformed images, which are f's
            assert owners[-8:] == index.tolist() and not z.requires_grad
            assert any(torch.equal(z, q) for q in queries)
            held.append(self.rows.clone())
            steps.append((len(queries), [torch.equal(z, q) for q in queries]))
            queries.clear()

    owners, queries, steps, update = [], [], [], Bank.update
    monkeypatch.setattr(pirl, "bank_nce_loss", spy_loss)
    monkeypatch.setattr(Bank, "update", spy_update)
    saved = train(max_steps=4, transform=kind, negatives=negatives)["bank"]
    calls = [False, True] if kind != "none" else [True]  # g's first, then f's
    assert steps == 4 * [(len(calls), calls)]
    close(saved["rows"], held[-1], rtol=0, atol=0)


def test_the_bank_is_updated_after_the_optimizer_has_used_the_loss(train, monkeypatch):
    order = []
    for owner, name in ((torch.optim.SGD, "step"), (Bank, "update")):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, m=method, n=name, **k: order.append(n) or m(*a, **k))
    train(max_steps=3)
    assert order == 5 * ["update"] + 3 * ["step", "update"]


def test_the_bank_is_filled_with_views_that_no_epoch_trains_on(train, monkeypatch):
    seen = []
    forward = PIRL.forward
    monkeypatch.setattr(
        PIRL, "forward", lambda self, x, *rest: seen.append((x.clone(), self.training)) or forward(self, x, *rest)
    )
    train()
    filled, trained = seen[:5], seen[5:]
    assert len(trained) == 10 and all(training for _, training in seen)
    assert not any(torch.equal(a, b) for a, _ in filled for image in trained for b in [image[0]])
    rows = {tuple(image.flatten()[:8].tolist()) for x, _ in filled for image in x}
    assert not rows & {tuple(image.flatten()[:8].tolist()) for x, _ in trained for image in x}


def test_negatives_are_drawn_anew_at_every_step_and_by_the_seed():
    drawn = [pirl.rows_to_compare(1000, pirl.Args(negatives=50, seed=seed), step) for seed in (0, 1) for step in (0, 1)]
    assert all(len(rows) == 50 and 0 <= rows.min() <= rows.max() < 1000 for rows in drawn)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert torch.equal(pirl.rows_to_compare(1000, pirl.Args(), 3), torch.arange(1000))
    many = torch.cat([pirl.rows_to_compare(10, pirl.Args(negatives=10), step) for step in range(300)])
    assert (many.bincount(minlength=10) / 300 - 1).abs().max() < 0.25


def test_z_is_estimated_once_of_the_transformed_images(train, monkeypatch, tmp_path):
    estimates, used = [], []

    def spy(query, *rest):
        estimates.append((query.detach(), estimate_log_z(query, *rest)))
        return estimates[-1][1]

    def spy_loss(query, own, negatives, temperature, loss, log_z, same):
        used.append((query.detach(), log_z.clone()))
        return bank_nce_loss(query, own, negatives, temperature, loss, log_z, same)

    monkeypatch.setattr(pirl, "estimate_log_z", spy)
    monkeypatch.setattr(pirl, "bank_nce_loss", spy_loss)
    flags = {"loss": "nce", "transform": "rotation"}
    train(max_steps=2, **flags)
    saved = train(max_steps=4, **flags)["bank"]
    assert len(estimates) == 1 and len(used) == 8 and saved.keys() == {"rows", "log_z"}
    assert torch.equal(estimates[0][0], used[0][0]), "of g"
    for value in [*(log_z for _, log_z in used), saved["log_z"]]:
        close(value, estimates[0][1], rtol=0, atol=0)


@pytest.mark.parametrize("flags", [{"transform": "none"}, {"transform": "jigsaw", "loss": "nce", "negatives": 9}])
def test_a_resumed_run_goes_on_with_the_same_bank(flags, train):
    train("parts", max_steps=4, **flags)
    whole, parts = train("whole", max_steps=7, **flags), train("parts", max_steps=7, **flags)
    for name in ("model", "bank"):
        assert whole[name].keys() == parts[name].keys()
        for key, tensor in whole[name].items():
            close(parts[name][key], tensor, rtol=0, atol=0, equal_nan=True)


IMPOSSIBLE = [
    ({"temperature": 0.0}, "--temperature "),
    ({"temperature": math.nan}, "--temperature "),
    ({"head_dim": 0}, "--head-dim "),
    ({"negatives": -1}, "--negatives "),
    ({"negatives": 65}, "--negatives must be 0 to 64, not 65"),
    ({"lam": 1.5}, "--lam "),
    ({"lam": -0.1}, "--lam "),
    ({"bank_momentum": 1.01}, "--bank-momentum "),
    ({"tile_size": -1}, "--tile-size "),
    ({"tile_size": 2000}, "--tile-size "),
]


@pytest.mark.parametrize("flags, named", IMPOSSIBLE)
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        pirl.main(tiny("pirl", tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "run").exists()


def test_the_recipes_fit():
    for name, images, puzzle in (("quick", 5000, 48), ("cifar", 50_000, 48), ("imagenet", 1_281_167, 255)):
        args = pirl.Args(**{"image_size": 32, **pirl.RECIPES[name]}, recipe=name)
        pirl.check(args, images)
        with torch.device("meta"):
            PIRL(args)
        args.transform = "jigsaw"
        assert pirl.crops(args)[1].size == puzzle


@given(st.integers(1, 300), st.sampled_from([0, 1, 2, 5, 12, 64]))
def test_a_tile_fits_into_its_cell_whatever_the_size_of_the_image(image_size, size):
    args = pirl.Args(image_size=image_size, tile_size=size, transform="jigsaw")
    side = pirl.crops(args)[1].size
    x, got = torch.zeros(1, 3, side, side), pirl.tile_size(args)
    assert tiles(x, common.Draws((0,), 1), 3, got).shape == (1, 9, 3, got, got)


# -------------------------------------------------------------------------------------------------- processes


def gradient(loss: str) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) averaged over ranks as DDP does it; rows that grow from rank to rank."""
    _, world = common.rank_and_world()
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1, 13, dtype=torch.float64)[:, None]
    f, g = (torch.randn(12, 5, generator=generator, dtype=torch.float64) * size + size for _ in range(2))
    bank, rows = Bank(20, 5, 0.5).double(), common.my_rows(12)
    bank.rows.copy_(torch.randn(20, 5, generator=generator, dtype=torch.float64))
    index = torch.arange(12) * 7 % 20
    same, own = index[rows, None] == torch.arange(20), bank.rows[index[rows]]
    f, g = (t[rows].clone().requires_grad_() for t in (f, g))
    log_z = estimate_log_z(g, own, bank.rows, 0.2, same)
    value, _ = pirl_loss(f, g, own, bank.rows, 0.4, 0.2, loss, log_z, same)
    value.backward()
    bank.update(index, common.all_gather(f.detach()))
    with torch.no_grad():
        gathered = [common.all_gather(t.grad) / world for t in (f, g)]
        return common.all_gather(value[None]).mean(), [*gathered, log_z, bank.rows]


def run_of(folder: str, data_dir: str, **flags) -> dict[str, float]:
    pirl.backbone = narrow
    flags = {"epochs": 2, "max_steps": 6, "eval_every": 2, "save_every": 2, "precision": "fp64", **flags}
    return pirl.main(tiny("pirl", Path(folder), data_dir=data_dir, **flags))


KINDS = {
    "none": {"transform": "none"},
    "rotation": {"transform": "rotation", "loss": "pirl"},
    "jigsaw": {"transform": "jigsaw", "loss": "nce", "negatives": 20, "tile_size": 8},
}


def run_train(folder: str, data_dir: str, kind: str, steps: int) -> None:
    run_of(folder, data_dir, max_steps=steps, **KINDS[kind])


def test_several_processes_give_the_gradient_of_one_and_the_same_run(tmp_path):
    """Begun on two processes, a run goes on on one, too: the bank is in the checkpoint and the same on both."""
    want, data = {loss: gradient(loss) for loss in LOSSES}, small_folder()
    assert all(g.abs().max() > 1e-6 for _, gradients in want.values() for g in gradients)

    def job(kind: str, name: str, steps: int):
        return run_train, (str(tmp_path / f"{kind} {name}"), data, kind, steps)

    run_on(1, [job(kind, "1", 6) for kind in KINDS])
    for world in (2, 4):
        jobs = [(gradient, (loss,)) for loss in LOSSES]
        if world == 2:
            jobs += [job(kind, "2", 6) for kind in KINDS] + [job("jigsaw", "2 then 1", 3)]
        for loss, results in zip(LOSSES, run_on(world, jobs), strict=False):
            for value, got in results:
                close(value, want[loss][0], rtol=1e-10, atol=1e-12)
                close(got, want[loss][1], rtol=1e-10, atol=1e-10)
    run_on(1, [job("jigsaw", "2 then 1", 6)])
    for kind, other in [*((kind, "2") for kind in KINDS), ("jigsaw", "2 then 1")]:
        runs = [tmp_path / f"{kind} {name}" for name in ("1", other)]
        lines = [[line for line in metrics(run) if "loss" in line] for run in runs]
        assert len(lines[0]) == len(lines[1]) == 6
        for a, b in zip(*lines, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"images_per_s"}:
                assert math.isclose(a[key], b[key], rel_tol=1e-9, abs_tol=1e-10), (kind, other, a["step"], key)
        saved = [torch.load(run / "checkpoint.pt", weights_only=True) for run in runs]
        for part in ("model", "bank"):
            close(saved[1][part], saved[0][part], rtol=1e-7, atol=1e-9, equal_nan=True)
