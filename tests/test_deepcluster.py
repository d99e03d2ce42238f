"""DeepCluster-v2's k-means and loss against independent oracles and reference numbers; its bank, and processes."""

import copy
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import quick
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from methods import metrics, narrow, small_folder, tiny
from strategies import numbers
from torch import Tensor
from worlds import run_on

import common
import deepcluster
from deepcluster import UNSEEN, Bank, DeepCluster, deepcluster_loss, purity, spherical_kmeans

close = torch.testing.assert_close
TEMPERATURES = st.sampled_from([0.05, 0.1, 0.5, 1.0, 3.0])


def of_the_vectors() -> tuple[Tensor, Tensor]:
    u = torch.arange(36, dtype=torch.float64)
    return torch.sin(1.7 * u + 1).reshape(12, 3), torch.cos(1.1 * u).reshape(12, 3)


def unit(row: list[float]) -> list[float]:
    norm = max(math.sqrt(sum(x * x for x in row)), 1e-12)
    return [x / norm for x in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@st.composite
def rows(draw, most: int = 9, bound: float = 4.0) -> Tensor:
    """(n, d) float64 of which no row is near 0, where directions jump."""
    shape = draw(st.integers(2, most)), draw(st.integers(2, 4))
    x = torch.from_numpy(draw(hnp.arrays(np.float64, shape, elements=numbers(bound), unique=True)))
    assume(x.norm(dim=1).min() > 0.1)
    return x


@st.composite
def clustered(draw) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """z (Vn, d), the clusters of the n images in one to three clusterings, some unseen, and their centroids."""
    views, n, d = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    z = torch.from_numpy(draw(hnp.arrays(np.float64, (views * n, d), elements=numbers())))
    assume(z.norm(dim=1).min() > 0.1)
    assignments, centroids = [], []
    for _ in range(draw(st.integers(1, 3))):
        k = draw(st.integers(1, 4))
        known = st.integers(0, k - 1)
        assignments.append(torch.tensor(draw(st.lists(known | st.just(UNSEEN), min_size=n, max_size=n))))
        c = torch.from_numpy(draw(hnp.arrays(np.float64, (k, d), elements=numbers())))
        assume(c.norm(dim=1).min() > 0.1)
        centroids.append(c)
    return z, assignments, centroids


# ---------------------------------------------------------------------------------------------------- k-means


def kmeans_in_plain_loops(x: list[list[float]], k: int, iterations: int, start: list[int]):
    """(assignments, centroids, the smallest margin by which a row was nearer to one centroid than to the next)."""
    x = [unit(row) for row in x]
    centroids, margin = [x[i] for i in start], math.inf

    def assign() -> list[int]:
        nonlocal margin
        found = []
        for row in x:
            cosines = [dot(row, c) for c in centroids]
            best, *rest = sorted(cosines, reverse=True)
            margin = min([margin, *(best - other for other in rest[:1])])
            found.append(cosines.index(best))
        return found

    for _ in range(iterations):
        assigned = assign()
        for j in range(k):
            members = [row for row, a in zip(x, assigned, strict=True) if a == j]
            if members:
                total = [sum(column) for column in zip(*members, strict=True)]
                margin = min(margin, math.sqrt(dot(total, total)))  # a mean of no length has no direction
                centroids[j] = unit(total)
    return assign(), centroids, margin


@given(rows(), st.data())
def test_kmeans_is_that_of_plain_loops(x, data):
    k, iterations = data.draw(st.integers(1, len(x))), data.draw(st.integers(0, 4))
    start = data.draw(st.permutations(range(len(x))))[:k]
    want, centroids, margin = kmeans_in_plain_loops(x.tolist(), k, iterations, start)
    assume(margin > 1e-9)
    before = x.clone()
    got = spherical_kmeans(x, k, iterations, torch.tensor(start))
    assert got[0].tolist() == want
    close(got[1], torch.tensor(centroids, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    close(x, before, rtol=0, atol=0)


def test_kmeans_gives_the_numbers_of_a_reference_implementation():
    x, other = of_the_vectors()
    assignments, centroids = spherical_kmeans(x, 3, 10, torch.arange(3))
    assert assignments.tolist() == [0, 1, 2, 2, 0, 0, 1, 2, 2, 0, 0, 1]
    assert centroids[0].tolist() == pytest.approx([0.695896, -0.408523, -0.590624], abs=5e-7)
    assert spherical_kmeans(other, 4, 10, torch.arange(4))[0].tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]


@given(rows(), st.data())
def test_lengths_do_not_count_and_no_iteration_makes_clusters_worse(x, data):
    k = data.draw(st.integers(1, len(x)))
    start = torch.tensor(data.draw(st.permutations(range(len(x))))[:k])
    powers = torch.tensor(data.draw(st.lists(st.integers(-2, 4), min_size=len(x), max_size=len(x))))[:, None]
    cosines = []
    for iterations in range(4):
        assignments, centroids = spherical_kmeans(x, k, iterations, start)
        cosines.append((F.normalize(x, dim=1) * centroids[assignments]).sum().item())
        # A power of two rounds nothing, and so breaks no tie.
        close(spherical_kmeans(x * 2.0**powers, k, iterations, start), (assignments, centroids), rtol=0, atol=0)
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(cosines))


def test_an_empty_cluster_keeps_its_centroid():
    x = torch.tensor([[3.0, 0.0], [2.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
    assignments, centroids = spherical_kmeans(x, 3, 5, torch.tensor([0, 0, 2]))  # of two equal ones the first takes all
    assert assignments.tolist() == [1, 0, 2]  # the empty one is where it began, until it is nearer than the first
    x = torch.tensor([[3.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]], dtype=torch.float64)
    assignments, centroids = spherical_kmeans(x, 3, 5, torch.tensor([0, 0, 1]))
    assert assignments.tolist() == [0, 2, 2]
    close(centroids, torch.tensor([[1.0, 0], [1, 0], [-1, 0]], dtype=torch.float64))


def test_pieces_give_the_clusters_of_the_whole(monkeypatch):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = spherical_kmeans(x, 7, 5, torch.arange(7))
    for at_once in (1, 7 * 9, 7 * 25):
        monkeypatch.setattr(deepcluster, "AT_ONCE", at_once)
        close(spherical_kmeans(x, 7, 5, torch.arange(7)), want)


def test_another_number_of_rows_to_start_from_is_refused():
    with pytest.raises(ValueError, match="3 clusters begin at 3 rows, not at 2"):
        spherical_kmeans(torch.eye(4), 3, 1, torch.arange(2))


# ----------------------------------------------------------------------------------------------------- purity


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.data())
def test_purity_is_counted_cluster_by_cluster(heads, k, classes, data):
    images = data.draw(st.integers(1, 9))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=images, max_size=images))
    known = st.lists(st.integers(0, k - 1) | st.just(UNSEEN), min_size=images, max_size=images)
    assignments = data.draw(st.lists(known, min_size=heads, max_size=heads))
    assume(all(max(head) >= 0 for head in assignments))
    shares = []
    for head in assignments:
        of_cluster = {j: Counter(y for y, a in zip(labels, head, strict=True) if a == j) for j in set(head) - {UNSEEN}}
        shares.append(sum(max(c.values()) for c in of_cluster.values()) / sum(c.total() for c in of_cluster.values()))
    got = purity(torch.tensor(assignments), torch.tensor(labels), k, classes)
    assert got.item() == pytest.approx(sum(shares) / heads)


# ------------------------------------------------------------------------------------------------------- loss


def loss_in_plain_loops(z, assignments, centroids, temperature: float) -> tuple[float, float]:
    """(loss, accuracy), one image at a time."""
    total = hits = 0.0
    for head, cs in zip(assignments, centroids, strict=True):
        losses, right = [], 0
        for i, row in enumerate(z):
            a = head[i % len(head)]
            if a == UNSEEN:
                continue
            scores = [dot(unit(row), unit(c)) / temperature for c in cs]
            largest = max(scores)
            losses.append(math.log(sum(math.exp(s - largest) for s in scores)) + largest - scores[a])
            right += max(range(len(cs)), key=scores.__getitem__) == a
        total += sum(losses) / max(1, len(losses))
        hits += right / max(1, len(losses))
    return total / len(assignments), hits / len(assignments)


def lists(tensors) -> list:
    return [t.tolist() for t in tensors]


def test_the_numbers_of_a_reference_computation():
    x, other = of_the_vectors()
    (a, c), (a2, c2) = (spherical_kmeans(v, k, 10, torch.arange(k)) for v, k in ((x, 3), (other, 4)))
    z = F.normalize(torch.cat([x[:4], other[:4]]), dim=1).requires_grad_()
    loss, _ = deepcluster_loss(z, [a[:4], a2[:4]], [c, c2], 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(3.71733180, abs=5e-9)
    assert z.grad.norm().item() == pytest.approx(0.92269313, abs=5e-9)


@given(clustered(), TEMPERATURES)
def test_equals_the_equations_in_plain_loops(batch, temperature):
    z, assignments, centroids = batch
    loss, terms = deepcluster_loss(*batch, temperature)
    want, accuracy = loss_in_plain_loops(z.tolist(), lists(assignments), lists(centroids), temperature)
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    cosines = [F.normalize(z, dim=1) @ F.normalize(c, dim=1).T for c in centroids]
    margins = [c.topk(min(2, c.shape[1]), dim=1).values for c in cosines]
    if all(m.shape[1] < 2 or (m[:, 0] - m[:, 1]).min() > 1e-9 for m in margins):
        assert terms["accuracy"].item() == pytest.approx(accuracy)


@given(clustered(), TEMPERATURES)
def test_centroids_that_are_all_the_same_cost_log_k(batch, temperature):
    z, assignments, centroids = batch
    assume(all((a >= 0).any() for a in assignments))
    same = [c[:1].expand_as(c) for c in centroids]
    want = sum(math.log(len(c)) for c in centroids) / len(centroids)
    assert deepcluster_loss(z, assignments, same, temperature)[0].item() == pytest.approx(want, abs=1e-9)
    assert deepcluster_loss(z, assignments, centroids, 1e7)[0].item() == pytest.approx(want, abs=1e-5)


@given(clustered(), TEMPERATURES, st.randoms())
def test_only_directions_count_and_the_order_of_images_views_and_clusterings_does_not(batch, temperature, random):
    z, assignments, centroids = batch
    n = len(assignments[0])
    order = random.sample(range(n), n)
    views = random.sample(list(z.split(n)), len(z) // n)
    heads = random.sample(range(len(centroids)), len(centroids))
    changed = torch.cat([random.uniform(0.1, 10) * v[order] for v in views])
    args = [assignments[h][order] for h in heads], [3 * centroids[h] for h in heads]
    close(deepcluster_loss(changed, *args, temperature)[0], deepcluster_loss(*batch, temperature)[0])


@given(clustered())
def test_images_without_a_cluster_do_not_count(batch):
    z, assignments, centroids = batch
    loss, _ = deepcluster_loss(z.requires_grad_(), assignments, centroids, 0.5)
    loss.backward()
    unseen = torch.stack(assignments).eq(UNSEEN).all(0).repeat(len(z) // len(assignments[0]))
    assert loss.isfinite() and z.grad[unseen].eq(0).all()
    assert (~unseen).any() or loss.item() == 0


@settings(max_examples=15)
@given(clustered())
def test_gradient_is_that_of_finite_differences(batch):
    z, assignments, centroids = batch
    assert torch.autograd.gradcheck(lambda z: deepcluster_loss(z, assignments, centroids, 0.5)[0], z.requires_grad_())


@given(clustered(), TEMPERATURES)
def test_centroids_are_constants_and_inputs_are_left_alone(batch, temperature):
    before = copy.deepcopy(batch)
    z, assignments, centroids = batch
    for c in centroids:
        c.requires_grad_()
    loss, terms = deepcluster_loss(z.requires_grad_(), assignments, centroids, temperature)
    loss.backward()
    assert z.grad is not None and all(c.grad is None for c in centroids)
    assert not any(term.requires_grad or term.ndim for term in terms.values())
    close((z.detach(), assignments, [c.detach() for c in centroids]), before, rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    z = (100 * torch.randn(64, 32, generator=generator)).to(half)
    x = torch.randn(256, 32, generator=generator)
    x = torch.cat([x, x + 1e-3 * torch.randn(256, 32, generator=generator)])  # hard to tell apart
    start = torch.arange(0, 512, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assignments, centroids = spherical_kmeans(x, 64, 3, start)
        got, terms = deepcluster_loss(z, assignments[None, :32], centroids[None], 0.05)
    exact = spherical_kmeans(x.double(), 64, 3, start)
    want, _ = deepcluster_loss(z.double(), assignments[None, :32], centroids[None], 0.05)
    assert {got.dtype, centroids.dtype, terms["accuracy"].dtype} == {torch.float32}
    assert want.dtype == exact[1].dtype == torch.float64
    close(got.double(), want, rtol=1e-5, atol=0)
    assert torch.equal(assignments, exact[0])
    close(centroids.double(), exact[1], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- bank


def filled(images: int = 20, heads: int = 4, k: int = 3, d: int = 5) -> Bank:
    """Of which every image but the last two was seen."""
    bank = Bank(images, heads, k, d).double()
    z = torch.randn(2, images - 2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bank.update(torch.arange(images - 2), z.unbind())
    return bank


def test_the_bank_keeps_the_last_embeddings_of_each_view_normalised():
    bank, generator = Bank(7, 2, 2, 3).double(), torch.Generator().manual_seed(0)
    want: dict[int, Tensor] = {}
    for images in ([4, 2, 6], [2, 0, 4]):
        z = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        bank.update(torch.tensor(images), z.unbind())
        want |= dict(zip(images, F.normalize(z.detach(), dim=2).unbind(1), strict=True))
        assert not bank.rows.requires_grad
    for i in range(7):
        close(bank.rows[:, i], want.get(i, torch.zeros(2, 3, dtype=torch.float64)))
        assert bank.seen[i].item() == (i in want)


def test_clusterings_take_turns_at_the_views_and_start_anew_at_every_epoch(monkeypatch):
    calls = []

    def spy(x, k, iterations, start):
        calls.append((x, k, iterations, start.tolist()))
        return spherical_kmeans(x, k, iterations, start)

    monkeypatch.setattr(deepcluster, "spherical_kmeans", spy)
    bank = filled()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        bank.cluster(6, seed, epoch)
    starts = [tuple(call[3]) for call in calls]
    assert starts[12:] == starts[:4] and len(set(starts[:12])) > 9
    assert all(len(set(start)) == 3 for start in starts)
    for head, (x, k, iterations, start) in enumerate(calls[12:]):
        close(x, bank.rows[head % 2, :18], rtol=0, atol=0)
        assert (k, iterations) == (3, 6)
        assignments, centroids = spherical_kmeans(x, 3, 6, torch.tensor(start))
        close(bank.centroids[head], centroids, rtol=0, atol=0)
        assert bank.assignments[head].tolist() == [*assignments.tolist(), UNSEEN, UNSEEN]


def test_fewer_images_than_clusters_leave_some_empty():
    bank = Bank(9, 2, 6, 3)
    bank.update(torch.tensor([1, 2, 5]), torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).unbind())
    bank.cluster(3, 0, 0)
    assert bank.centroids.isfinite().all() and bank.assignments.ge(0).sum(dim=1).tolist() == [3, 3]


# ----------------------------------------------------------------------------------------------- network, runs


def test_crops_of_one_size_share_a_batch_and_every_weight_gets_a_gradient(tmp_path):
    torch.manual_seed(0)
    model = DeepCluster(tiny("deepcluster", tmp_path))
    xs = [torch.rand(4, 3, size, size, requires_grad=True) for size in (16, 16, 8)]
    alone = copy.deepcopy(model)
    z = model(xs)
    h = torch.cat([alone.backbone(torch.cat(xs[:2])), alone.backbone(xs[2])])
    close(z, alone.projector(h))
    assert model.backbone.bn1.num_batches_tracked == 2 and model.projector[1].num_batches_tracked == 1
    deepcluster_loss(z, torch.arange(8).reshape(2, 4) % 3, torch.randn(2, 3, 16), 0.1)[0].backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in (*model.parameters(), *xs))


@pytest.fixture
def train(tmp_path, monkeypatch):
    args = deepcluster.Args(image_size=16, batch_size=8, prototypes=5, heads=2, projector_hidden=8, projector_dim=6)
    return quick.trainer(deepcluster, args, 28, tmp_path, monkeypatch)  # three steps and four images in an epoch


def test_a_run_fills_the_bank_clusters_each_epoch_and_predicts_the_clusters_of_its_images(train, monkeypatch):
    events, model, banks = [], [], []
    update, cluster, forward = Bank.update, Bank.cluster, DeepCluster.forward
    images = [set(index.tolist()) for _, index in common.batch_indices(28, 8, range(9), 0)]

    def spy_forward(self, views):
        events.append("pass" if torch.is_grad_enabled() else "look")
        assert self.training and len(views) == 3
        model[:] = [self, forward(self, views)]
        return model[1]

    def spy_update(self, index, views):
        before = copy.deepcopy(self.rows)
        update(self, index, views)
        close(views, model[1].detach().chunk(3)[:2], rtol=0, atol=0)  # the large crops, in order
        changed = {i for i in range(28) if not torch.equal(self.rows[:, i], before[:, i])}
        done = sum(event == "update" for event in events)
        assert set(index.tolist()) == images[done if done < 3 else done - 3] and changed <= set(index.tolist())
        events.append("update")
        banks[:] = [self, torch.cat([p.detach().flatten() for p in model[0].parameters()])]

    def spy_cluster(self, iterations, seed, epoch):
        cluster(self, iterations, seed, epoch)
        events.append(f"cluster {epoch}")
        unseen = set(range(28)) - set().union(*images[: max(1, epoch) * 3])
        assert set(self.assignments[0].eq(UNSEEN).nonzero()[:, 0].tolist()) == unseen

    def spy_loss(z, assignments, centroids, temperature):
        events.append("loss")
        step = sum(event == "loss" for event in events) - 1
        index = next(i for s, (_, i) in enumerate(common.batch_indices(28, 8, range(9), 0)) if s == step)
        assert torch.equal(assignments, banks[0].assignments[:, index]) and temperature == 0.1
        weights = torch.cat([p.detach().flatten() for p in model[0].parameters()])
        assert step == 0 or torch.equal(weights, banks[1]), "the bank is written after the optimizer's step"
        return deepcluster_loss(z, assignments, centroids, temperature)

    for what, spy in (("update", spy_update), ("cluster", spy_cluster)):
        monkeypatch.setattr(Bank, what, spy)
    monkeypatch.setattr(DeepCluster, "forward", spy_forward)
    monkeypatch.setattr(deepcluster, "deepcluster_loss", spy_loss)
    train(epochs=3, small_crops=1, small_size=8, warmup_epochs=0.0)
    step = ["pass", "loss", "update"]
    later = [[f"cluster {epoch}", *step, *step, *step] for epoch in range(3)]
    assert events == ["look", "update"] * 3 + later[0] + later[1] + later[2]


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_goes_on_with_the_same_bank_and_clusters(stop, train):
    """Within an epoch and at its end."""
    train("parts", max_steps=stop, epochs=3)
    whole, parts = train("whole", max_steps=7, epochs=3), train("parts", max_steps=7, epochs=3)
    for name in ("model", "bank"):
        close(parts[name], whole[name], rtol=0, atol=0)
    assert whole["bank"].keys() == {"rows", "seen", "assignments", "centroids"}


@pytest.mark.parametrize("labels, want", [([0] * 28, True), ([-1] * 28, False), ([0] * 27 + [-1], False)])
def test_purity_is_told_where_all_images_have_a_label(labels, want, tmp_path, monkeypatch, train):
    pixels = common.load_data()[0].pixels
    monkeypatch.setattr(common, "load_data", lambda *_: (common.Data(pixels, None, torch.tensor(labels), []), None))
    train(max_steps=4, log_every=1)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4 and [line.get("purity") for line in lines] == [1.0 if want else None] * 4


IMPOSSIBLE = [
    ({"temperature": 0.0}, "--temperature "),
    ({"temperature": math.nan}, "--temperature "),
    ({"prototypes": 1}, "--prototypes 1 must be 2 to the 64 images of an epoch"),
    ({"prototypes": 65}, "--prototypes 65 must be 2 to the 64 images of an epoch; take 8"),
    ({"prototypes": 49, "batch_size": 48}, "--prototypes 49 must be 2 to the 48 images of an epoch"),
    ({"heads": 0}, "--heads must be 1 to "),
    ({"kmeans_iterations": 0}, "--kmeans-iterations must be 1 to "),
    ({"projector_hidden": 0}, "--projector-hidden "),
    ({"projector_dim": 0}, "--projector-dim "),
    ({"jitter_strength": -1.0}, "--jitter-strength "),
    ({"small_crops": 17}, "--small-crops 17 must be 0 to 16"),
    ({"small_size": 17}, "--small-size 17 must be 1 to --image-size 16"),
    ({"small_scale": (0.5, 0.4)}, "--small-scale 0.5 0.4 "),
]


@pytest.mark.parametrize("flags, named", IMPOSSIBLE)
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        deepcluster.main(tiny("deepcluster", tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "run").exists()


def test_the_recipes_fit():
    for name, images in (("quick", 5000), ("cifar", 50_000), ("imagenet", 1_281_167)):
        deepcluster.check(deepcluster.Args(**{**deepcluster.RECIPES[name], "recipe": name}), images)


# -------------------------------------------------------------------------------------------------- processes


def gradient() -> tuple[Tensor, Tensor]:
    """(loss, gradient) averaged over ranks as DDP does it; more images without a cluster on the first ranks."""
    _, world = common.rank_and_world()
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(3, 12, 5, generator=generator, dtype=torch.float64) * torch.arange(1, 13)[:, None]
    assignments = torch.randint(4, (2, 12), generator=generator)
    assignments[0, [0, 1, 2, 4, 8]] = assignments[1, [1, 2, 3]] = UNSEEN
    centroids = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    rows = common.my_rows(12)
    z = everyone[:, rows].flatten(0, 1).clone().requires_grad_()
    loss, terms = deepcluster_loss(z, assignments[:, rows], centroids, 0.2)
    loss.backward()
    with torch.no_grad():
        values = common.all_gather(torch.stack([loss, terms["accuracy"]])[None]).mean(0)
        return values, common.all_gather(z.grad.unflatten(0, (3, -1)).transpose(0, 1).contiguous()) / world


def run_of(folder: str, data_dir: str, steps: int) -> dict[str, float]:
    deepcluster.backbone = narrow
    flags = {"epochs": 2, "max_steps": steps, "eval_every": 2, "save_every": 2, "precision": "fp64"}
    return deepcluster.main(tiny("deepcluster", Path(folder), data_dir=data_dir, **flags))


def test_several_processes_give_the_gradient_of_one_and_the_same_run(tmp_path):
    """Begun on two processes, a run goes on on one, too: the bank is in the checkpoint and the same on both."""
    want, gradients = gradient()
    assert gradients.abs().max() > 1e-6
    data = small_folder()

    def job(name: str, steps: int):
        return run_of, (str(tmp_path / name), data, steps)

    run_on(1, [job("1", 6)])
    for world in (2, 4):
        jobs = [(gradient, ())] + [job("2", 6), job("2 then 1", 3)] * (world == 2)
        for values, got in run_on(world, jobs)[0]:
            close(values, want, rtol=1e-10, atol=1e-12)
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
        for part in ("model", "bank"):
            close(saved[1][part], saved[0][part], rtol=1e-7, atol=1e-9)
