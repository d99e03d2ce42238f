"""NNCLR's loss against an independent oracle and the reference numbers; its support set, and what crosses processes."""

import collections
import copy
import math
from pathlib import Path

import pytest
import quick
import torch
import torch.nn.functional as F
import vectors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from methods import metrics, narrow, small_folder, tiny
from strategies import matrices, pairs
from torch import Tensor
from worlds import run_on

import common
import nnclr
from nnclr import NNCLR, Support, nearest, nnclr_loss

close = torch.testing.assert_close
TEMPERATURES = st.sampled_from([0.05, 0.2, 0.5, 1.0, 3.0])


def support_of_the_vectors() -> Tensor:
    return F.normalize(torch.sin(0.7 * torch.arange(30, dtype=torch.float64)).reshape(5, 6), dim=1)


def unit(row: list[float]) -> list[float]:
    """A row of (almost) no length has cosine 0 with all others."""
    norm = max(math.sqrt(sum(x * x for x in row)), 1e-12)
    return [x / norm for x in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def in_plain_loops(neighbours: list[list[float]], p: list[list[float]], temperature: float) -> float:
    """Eq. 3, one pair at a time."""
    neighbours, p, total = [unit(row) for row in neighbours], [unit(row) for row in p], 0.0
    for i, row in enumerate(neighbours):
        similarity = [dot(row, other) / temperature for other in p]
        largest = max(similarity)
        total += math.log(sum(math.exp(s - largest) for s in similarity)) + largest - similarity[i]
    return total / len(p)


def long(*views: Tensor) -> bool:
    """No row near 0, where the direction and with it the loss jump."""
    return min(z.norm(dim=1).min().item() for z in views) > 0.1


# ------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    "temperature, want, gradients",
    [(0.1, 1.59546885, [0.85286571, 0.36162914]), (0.2, 1.33350210, [0.28954132, 0.20683302])],
)
def test_the_numbers_of_a_reference_implementation(temperature, want, gradients):
    """Embedding and prediction are the same here, so a gradient of the neighbours would be seen in these norms."""
    (a, b), q = vectors.views(), support_of_the_vectors()
    first, second = nearest(a, q), nearest(b, q)
    assert first.tolist() == [2, 2, 2, 3] and second.tolist() == [2, 2, 2, 2]
    loss = (nnclr_loss(q[first], b, temperature)[0] + nnclr_loss(q[second], a, temperature)[0]) / 2
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=5e-9)
    assert [a.grad.norm().item(), b.grad.norm().item()] == pytest.approx(gradients, abs=5e-9)


@given(pairs(rows=st.integers(1, 6)), TEMPERATURES)
def test_equals_the_equation_in_plain_loops(views, temperature):
    loss, terms = nnclr_loss(*views, temperature)
    assert loss.item() == pytest.approx(in_plain_loops(*(z.tolist() for z in views), temperature), rel=1e-9, abs=1e-9)
    cosine = F.cosine_similarity(*views, dim=1, eps=1e-12).mean()
    assert terms["positive"].item() == pytest.approx(cosine.item(), abs=1e-9)


@given(pairs(), TEMPERATURES)
def test_predictions_that_are_all_the_same_cost_log_of_the_number_of_images(views, temperature):
    neighbours, p = views
    assert nnclr_loss(neighbours, p[:1].expand(len(p), -1), temperature)[0].item() == pytest.approx(math.log(len(p)))
    assert nnclr_loss(neighbours, p, 1e7)[0].item() == pytest.approx(math.log(len(p)), abs=1e-5)


@given(pairs(), TEMPERATURES, st.randoms())
def test_only_directions_count_and_the_order_of_the_batch_does_not(views, temperature, random):
    assume(long(*views))
    order = random.sample(range(len(views[0])), len(views[0]))
    want = nnclr_loss(*views, temperature)[0]
    changed = (random.uniform(0.1, 10) * z[order] for z in views)
    close(nnclr_loss(*changed, temperature)[0], want, rtol=1e-9, atol=1e-9)


def test_accuracy_counts_the_predictions_that_come_first():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert nnclr_loss(z, z, 0.5)[1]["accuracy"].item() == 1
    assert nnclr_loss(z, z.flip(0), 0.5)[1]["accuracy"].item() == 0


@settings(max_examples=15)
@given(pairs(rows=st.integers(2, 5), columns=st.integers(1, 5)))
def test_gradient_is_that_of_finite_differences(views):
    assume(long(*views))
    neighbours, p = views
    assert torch.autograd.gradcheck(lambda p: nnclr_loss(neighbours, p, 0.5)[0], p.requires_grad_())


@given(pairs(), TEMPERATURES)
def test_neighbours_are_constants_and_inputs_are_left_alone(views, temperature):
    before = copy.deepcopy(views)
    neighbours, p = (z.requires_grad_() for z in views)
    loss, terms = nnclr_loss(neighbours, p, temperature)
    loss.backward()
    assert neighbours.grad is None and p.grad is not None
    assert not any(term.requires_grad or term.ndim for term in terms.values())
    close((neighbours.detach(), p.detach()), before, rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    a, b = ((100 * torch.randn(64, 32, generator=generator)).to(half) for _ in range(2))
    support = torch.randn(256, 32, generator=generator)
    support = torch.cat([support, support + 1e-3 * torch.randn(256, 32, generator=generator)])  # hard to tell apart
    want, _ = nnclr_loss(a.double(), b.double(), 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        got, terms = nnclr_loss(a, b, 0.05)
        also, _ = nnclr_loss(a.float(), b.float(), 0.05)
        found = nearest(a, support)
    assert {got.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    assert nnclr_loss(*vectors.views(), 0.1)[0].dtype == torch.float64
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)
    assert torch.equal(found, nearest(a.double(), support.double()))


# ------------------------------------------------------------------------------------------------- neighbours


@given(matrices(), st.data())
def test_the_nearest_is_at_the_smallest_distance_of_unit_vectors(z, data):
    support = data.draw(matrices(rows=st.integers(1, 9), columns=st.just(z.shape[1])))
    assume(long(z, support))
    want = []
    for row in z.tolist():
        distances = [math.dist(unit(row), unit(other)) for other in support.tolist()]
        want.append([i for i, d in enumerate(distances) if d < min(distances) + 1e-9])
    got = nearest(z, support).tolist()
    assert all(index in near for index, near in zip(got, want, strict=True))


def test_of_rows_that_are_as_near_the_first_is_taken():
    one_of_each = torch.eye(7, dtype=torch.float64)
    assert nearest(3 * one_of_each, torch.cat([one_of_each] * 5)).tolist() == list(range(7))


class SupportAgainstDeque(RuleBasedStateMachine):
    """Batches of any size up to Q, saved and loaded at any moment."""

    @initialize(size=st.integers(1, 9), dim=st.integers(1, 3), seed=st.integers(0, 9))
    def start(self, size, dim, seed):
        torch.manual_seed(seed)
        self.support = Support(size, dim).double()
        close(self.support.rows.norm(dim=1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-6)
        rows = [(row, -1) for row in self.support.rows.tolist()]
        self.want = collections.deque(rows, maxlen=size)

    @rule(data=st.data())
    def push(self, data):
        size, dim = self.support.rows.shape
        z = data.draw(matrices(st.integers(1, size), st.just(dim))).requires_grad_()
        labels = data.draw(st.lists(st.integers(-1, 3), min_size=len(z), max_size=len(z)))
        before = z.detach().clone()
        self.support.push(z, torch.tensor(labels))
        self.want.extend(zip(map(unit, before.tolist()), labels, strict=True))
        close(z.detach(), before, rtol=0, atol=0)

    @precondition(lambda self: len(self.want) > 1)
    @rule()
    def save_and_load(self):
        saved = copy.deepcopy(self.support.state_dict())
        self.support = Support(*self.support.rows.shape).double()
        self.support.load_state_dict(saved)

    @invariant()
    def holds_the_same_rows_oldest_first(self):
        oldest = self.support.oldest.item()
        rows, labels = zip(*self.want, strict=True)
        assert not self.support.rows.requires_grad and 0 <= oldest < len(self.want)
        close(self.support.rows.roll(-oldest, 0), torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert self.support.labels.roll(-oldest, 0).tolist() == list(labels)


TestSupport = SupportAgainstDeque.TestCase
TestSupport.settings = settings(max_examples=20, stateful_step_count=12)


# ----------------------------------------------------------------------------------------------- network, steps


def test_both_views_share_one_batch_for_batchnorm(tmp_path):
    torch.manual_seed(0)
    model = NNCLR(tiny("nnclr", tmp_path))
    x1, x2 = torch.rand(4, 3, 16, 16), 3 + torch.rand(4, 3, 16, 16)
    alone = copy.deepcopy(model)
    p1, p2, z1, z2 = model(x1, x2)
    z = alone.projector(alone.backbone(torch.cat([x1, x2])))
    close(torch.cat([z1, z2]), z)
    close(torch.cat([p1, p2]), alone.predictor(z))


def test_every_weight_gets_a_gradient(tmp_path):
    torch.manual_seed(0)
    model = NNCLR(tiny("nnclr", tmp_path))
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.weight.fill_(1)  # or a branch that starts at zero hides its convolutions
    p1, p2, z1, z2 = model(*torch.rand(2, 4, 3, 16, 16))
    support = Support(8, 16)
    for z, p in ((z1, p2), (z2, p1)):
        nnclr_loss(support.rows[nearest(z, support.rows)], p, 0.2)[0].backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


@pytest.fixture
def train(tmp_path, monkeypatch):
    args = nnclr.Args(image_size=16, batch_size=8, support_size=24, projector_hidden=8, projector_dim=6, epochs=2)
    return quick.trainer(nnclr, args, 40, tmp_path, monkeypatch)


def test_each_step_searches_what_the_steps_before_left_and_then_pushes_view_1(train, monkeypatch, tmp_path):
    order, held, views, losses = [], collections.deque(maxlen=3), [], []

    def spy_nearest(z, support):
        order.append("nearest")
        if not held:
            held.extend(support.clone().split(8))
        views.append(z.detach())
        rows = sorted(map(tuple, support.tolist()))
        assert rows == sorted(map(tuple, torch.cat(list(held)).tolist())), "the rows of the steps before, no others"
        found = nearest(z, support)
        views.append(support[found])
        return found

    def spy_loss(neighbours, p, temperature):
        order.append("loss")
        view = (len(order) - 3) % 5
        close(neighbours, views[1 + 2 * view], rtol=0, atol=0)  # view 1's neighbour and p2, then view 2's and p1
        assert not torch.equal(p, views[0]) and not torch.equal(p, views[2]), "predictions, not embeddings"
        losses.append(nnclr_loss(neighbours, p, temperature))
        return losses[-1]

    def spy_push(self, z, labels):
        order.append("push")
        close(z, views[0], rtol=0, atol=0)
        assert not z.requires_grad
        push(self, z, labels)
        held.append(F.normalize(z, dim=1))
        views.clear()

    push = Support.push
    monkeypatch.setattr(nnclr, "nearest", spy_nearest)
    monkeypatch.setattr(nnclr, "nnclr_loss", spy_loss)
    monkeypatch.setattr(Support, "push", spy_push)
    saved = train(max_steps=7)["support"]
    assert order == 7 * ["nearest", "nearest", "loss", "loss", "push"]
    close(torch.cat(list(held)), saved["rows"].roll(-saved["oldest"].item(), 0), rtol=0, atol=0)
    (last,) = metrics(tmp_path / "run")
    (loss1, terms1), (loss2, terms2) = losses[-2:]
    assert last["loss"] == pytest.approx((loss1 + loss2).item() / 2)
    assert all(last[name] == pytest.approx((terms1[name] + terms2[name]).item() / 2) for name in terms1)


def test_the_predictions_of_the_other_view_are_compared(monkeypatch, train):
    """With a network that gives marks in place of outputs: p1 is all 1, p2 all 2, z1 all 3, z2 all 4."""
    seen = []

    class Marks(torch.nn.Module):
        def __init__(self, args):
            super().__init__()
            self.backbone, _ = narrow("", "", False)
            self.scale = torch.nn.Parameter(torch.ones(1, 6))

        def forward(self, x1, x2):
            ones = self.scale.expand(len(x1), -1) + 0 * self.backbone(x1)[:, :6]
            return 1 * ones, 2 * ones, 3 * ones, 4 * ones

    def spy_nearest(z, support):
        seen.append(round(z[0, 0].item()))
        return torch.full((len(z),), seen[-1])

    def spy_loss(neighbours, p, temperature):
        seen.append(round(p[0, 0].item()))
        row = next(i for i, row in enumerate(rows) if torch.equal(row, neighbours[0]))
        seen.append(row)
        return nnclr_loss(neighbours, p, temperature)

    torch.manual_seed(0)
    monkeypatch.setattr(nnclr, "NNCLR", Marks)
    monkeypatch.setattr(nnclr, "nearest", spy_nearest)
    monkeypatch.setattr(nnclr, "nnclr_loss", spy_loss)
    made, rows = Support.__init__, []

    def keep(self, size, dim):
        made(self, size, dim)
        rows.extend(self.rows.clone())

    monkeypatch.setattr(Support, "__init__", keep)
    train(max_steps=1)
    assert seen == [3, 4, 2, 3, 1, 4], "z1 and z2 are searched; row 3, of z1, meets p2; row 4, of z2, meets p1"


def test_a_resumed_run_goes_on_with_the_same_support_set(train):
    train("parts", max_steps=4)
    whole, parts = train("whole", max_steps=7), train("parts", max_steps=7)
    for name in ("model", "support"):
        assert whole[name].keys() == parts[name].keys()
        for key, tensor in whole[name].items():
            close(parts[name][key], tensor, rtol=0, atol=0)
    assert whole["support"].keys() == {"rows", "labels", "oldest"}


@pytest.mark.parametrize("labels, want", [([0] * 40, True), ([-1] * 40, False), ([0] * 39 + [-1], False)])
def test_neighbours_of_one_class_are_counted_where_all_images_have_a_label(labels, want, tmp_path, monkeypatch):
    args = nnclr.Args(image_size=16, batch_size=8, support_size=16, projector_hidden=8, projector_dim=6, log_every=1)
    train = quick.trainer(nnclr, args, 40, tmp_path, monkeypatch)
    pixels = common.load_data()[0].pixels
    monkeypatch.setattr(common, "load_data", lambda *_: (common.Data(pixels, None, torch.tensor(labels), []), None))
    train(max_steps=4)
    lines = metrics(tmp_path / "run")
    assert all(("same_class" in line) == want for line in lines)
    if want:  # noise has no class; after two batches all rows are of class 0
        assert lines[0]["same_class"] == 0 and [line["same_class"] for line in lines[2:]] == [1, 1]


IMPOSSIBLE = [
    ({"temperature": 0.0}, "--temperature "),
    ({"temperature": math.nan}, "--temperature "),
    ({"projector_hidden": 0}, "--projector-hidden "),
    ({"projector_dim": 0}, "--projector-dim "),
    ({"predictor_hidden": -1}, "--predictor-hidden "),
    ({"jitter_strength": -1.0}, "--jitter-strength "),
    ({"support_size": 40}, "--support-size 40 must be a multiple of the batch size 16 and smaller than the 64"),
    ({"support_size": 64}, "take 48"),
    ({"support_size": 98304}, "take 48"),
    ({"support_size": -16}, "take 16"),
    ({"support_size": 8}, "take 16"),
    ({"batch_size": 64}, "--batch-size 64 leaves no other of the 64 images for the support set; take 32"),
]


@pytest.mark.parametrize("flags, named", IMPOSSIBLE)
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        nnclr.main(tiny("nnclr", tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "run").exists()


def test_the_recipes_fit():
    for name, images in (("quick", 5000), ("cifar", 50_000), ("imagenet", 1_281_167)):
        nnclr.check(nnclr.Args(**nnclr.RECIPES[name], recipe=name), images)


@given(st.integers(2, 64), st.integers(0, 400), st.integers(-70, 500))
def test_the_default_support_set_fits_and_so_does_the_proposed_one(batch, more, size):
    images = batch + 1 + more
    usual = nnclr.support_size(nnclr.Args(batch_size=batch), images)
    assert 0 < usual < images and usual % batch == 0 and usual <= 8 * batch
    fits = 0 <= size < images and size % batch == 0
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(nnclr, "refuse", lambda line: said.append(line))
        nnclr.check(nnclr.Args(batch_size=batch, support_size=size), images)
        assert fits == (not said)
        for line in list(said):
            nnclr.check(nnclr.Args(batch_size=batch, support_size=int(line.split()[-1])), images)
        assert len(said) < 2


# -------------------------------------------------------------------------------------------------- processes


def gradient() -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) averaged over ranks as DDP does it; rows that grow from rank to rank."""
    _, world = common.rank_and_world()
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1, 13, dtype=torch.float64)[:, None]
    z1, z2, p1, p2 = (torch.randn(12, 5, generator=generator, dtype=torch.float64) * size + size for _ in range(4))
    rows = common.my_rows(12)
    views = [t[rows].clone().requires_grad_() for t in (z1, z2, p1, p2)]
    q = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    z1, z2, p1, p2 = views
    loss = (nnclr_loss(q[nearest(z1, q)], p2, 0.2)[0] + nnclr_loss(q[nearest(z2, q)], p1, 0.2)[0]) / 2
    loss.backward()
    assert z1.grad is None and z2.grad is None
    with torch.no_grad():
        return common.all_gather(loss[None]).mean(), [common.all_gather(p.grad) / world for p in (p1, p2)]


def run_of(folder: str, data_dir: str, **flags) -> dict[str, float]:
    nnclr.backbone = narrow
    flags = {"epochs": 2, "max_steps": 6, "eval_every": 2, "save_every": 2, "precision": "fp64", **flags}
    return nnclr.main(tiny("nnclr", Path(folder), data_dir=data_dir, **flags))


def test_several_processes_give_the_gradient_of_one_and_the_same_run(tmp_path):
    """Begun on two processes, a run goes on on one, too: the support set is in the checkpoint and the same on both."""
    want, gradients = gradient()
    assert all(g.abs().max() > 1e-6 for g in gradients)
    data = small_folder()

    def job(name: str, steps: int):
        return run_train, (str(tmp_path / name), data, steps)

    run_on(1, [job("1", 6)])
    for world in (2, 4):
        jobs = [(gradient, ())] + [job("2", 6), job("2 then 1", 3)] * (world == 2)
        for loss, got in run_on(world, jobs)[0]:
            close(loss, want, rtol=1e-10, atol=1e-12)
            close(got, gradients, rtol=1e-10, atol=1e-10)
    run_on(1, [job("2 then 1", 6)])
    for other in ("2", "2 then 1"):
        lines = [[line for line in metrics(tmp_path / run) if "loss" in line] for run in ("1", other)]
        assert len(lines[0]) == len(lines[1]) == 6
        for a, b in zip(*lines, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"images_per_s"}:
                assert math.isclose(a[key], b[key], rel_tol=1e-9, abs_tol=1e-10), (other, a["step"], key)
        saved = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("1", other)]
        for part in ("model", "support"):
            close(saved[1][part], saved[0][part], rtol=1e-7, atol=1e-9)


def run_train(folder: str, data_dir: str, steps: int) -> None:
    run_of(folder, data_dir, max_steps=steps)
