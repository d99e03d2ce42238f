"""SwAV's codes, loss and queue against the published algorithm in plain loops, on one rank and on several."""

import math
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import quick
import torch
import torch.nn.functional as F
import vectors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from strategies import matrices, numbers
from torch import nn

import swav
from swav import Args, Queue, SwAV, crops, normalize_prototypes, sinkhorn, swav_loss

close = torch.testing.assert_close
PROTOTYPES, MANY, FEW = st.integers(2, 6), st.integers(2, 4), st.integers(1, 5)
HOW = (0.1, 0.05, 3)  # temperature, epsilon, iterations


@st.composite
def views(draw, count=MANY, rows=FEW, bound: float = 1.0) -> list[torch.Tensor]:
    """Scores of several views of one batch: (n, K) float64 each."""
    n, v = draw(rows), draw(count)
    return list(draw(matrices(st.just(v * n), PROTOTYPES, bound)).split(n))


@st.composite
def queued(draw, rows=FEW, older=FEW):
    """(scores of three views, scores of the queue's rows for two of them)."""
    n, m = draw(rows), draw(older)
    scores, queue = draw(matrices(st.just(3 * n + 2 * m), PROTOTYPES, 1.0)).split([3 * n, 2 * m])
    return list(scores.split(n)), list(queue.split(m))


def scores_of_vectors() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(the inputs of the test vectors, their scores against five prototypes)."""
    inputs = vectors.views()
    c = F.normalize(torch.sin(0.7 * torch.arange(30, dtype=torch.float64)).reshape(5, 6), dim=1)
    return inputs, [F.normalize(x, dim=1) @ c.T for x in inputs]


def test_official_numbers():
    inputs, scores = scores_of_vectors()
    loss, _ = swav_loss(scores, 2, 0.1, 0.05, 3)
    loss.backward()
    assert loss.item() == pytest.approx(7.77299564, abs=5e-9)
    assert [x.grad.norm().item() for x in inputs] == pytest.approx([0.82031408, 0.83642229], abs=5e-9)
    want = [5.86e-06, 0.34622316, 0.34193454, 6.65e-06, 0.31182979]
    assert sinkhorn(scores[0])[0].tolist() == pytest.approx(want, abs=5e-9)


# --------------------------------------------------------------------------------------- the oracle, plain loops


def codes_in_loops(scores: list[list[float]], epsilon: float, iterations: int) -> list[list[float]]:
    """The algorithm as published: K×B, all entries together 1, rows to 1/K, columns to 1/B, times B at the end."""
    b, k = len(scores), len(scores[0])
    q = [[math.exp(scores[i][j] / epsilon) for i in range(b)] for j in range(k)]
    total = sum(sum(row) for row in q)
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        for j in range(k):
            row = sum(q[j])
            q[j] = [x / row / k for x in q[j]]
        for i in range(b):
            column = sum(q[j][i] for j in range(k))
            for j in range(k):
                q[j][i] /= column * b
    return [[q[j][i] * b for j in range(k)] for i in range(b)]


def loss_in_loops(scores, num_assign, temperature, epsilon, iterations, queue=None) -> tuple[float, float]:
    """(loss, mean entropy of the codes)."""
    n, k, loss, entropy = len(scores[0]), len(scores[0][0]), 0.0, 0.0
    for i in range(num_assign):
        older = queue[i] if queue else []
        codes = codes_in_loops(older + scores[i], epsilon, iterations)[len(older) :]
        entropy -= sum(q * math.log(q) for code in codes for q in code if q > 0) / n / num_assign
        for v in range(len(scores)):
            for b in range(n):
                normaliser = math.log(sum(math.exp(s / temperature) for s in scores[v][b]))
                for j in range(k):
                    if v != i:
                        loss -= codes[b][j] * (scores[v][b][j] / temperature - normaliser) / n
    return loss / num_assign / (len(scores) - 1), entropy


@given(matrices(columns=PROTOTYPES, bound=1.0), st.floats(0.03, 1.0), st.integers(1, 5))
def test_sinkhorn_is_the_published_algorithm(scores, epsilon, iterations):
    want = torch.tensor(codes_in_loops(scores.tolist(), epsilon, iterations), dtype=torch.float64)
    close(sinkhorn(scores, epsilon, iterations), want, rtol=1e-9, atol=1e-12)


@given(views(), st.integers(1, 2), st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.integers(1, 4))
def test_loss_is_the_equations_in_plain_loops(scores, num_assign, temperature, epsilon, iterations):
    loss, terms = swav_loss(scores, num_assign, temperature, epsilon, iterations)
    want, entropy = loss_in_loops([s.tolist() for s in scores], num_assign, temperature, epsilon, iterations)
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert terms["entropy"].item() == pytest.approx(entropy, rel=1e-9, abs=1e-9)


@given(queued())
def test_the_queue_takes_part_in_sinkhorn_and_nowhere_else(drawn):
    scores, older = drawn
    loss, terms = swav_loss(scores, 2, *HOW, older)
    want, entropy = loss_in_loops([s.tolist() for s in scores], 2, *HOW, [s.tolist() for s in older])
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert terms["entropy"].item() == pytest.approx(entropy, rel=1e-9, abs=1e-9)


def test_accuracy_counts_predictions_whose_first_prototype_is_the_codes():
    a = torch.eye(4, dtype=torch.float64)
    b = a[[0, 1, 3, 2]]
    assert swav_loss([a, a], 2, *HOW)[1]["accuracy"].item() == 1
    assert swav_loss([a, b], 2, *HOW)[1]["accuracy"].item() == 0.5
    # Codes of the first view alone; it is not compared with itself.
    assert swav_loss([a, b, a], 1, *HOW)[1]["accuracy"].item() == 0.75


# ---------------------------------------------------------------------------------------------------- properties


@given(matrices(columns=PROTOTYPES), st.floats(0.03, 1.0), st.integers(1, 5))
def test_codes_are_distributions(scores, epsilon, iterations):
    q = sinkhorn(scores, epsilon, iterations)
    assert q.shape == scores.shape and (q >= 0).all()
    close(q.sum(1), torch.ones(len(q), dtype=torch.float64))


@given(views(), numbers(100))
def test_adding_a_constant_to_all_scores_changes_nothing(scores, constant):
    close(sinkhorn(scores[0] + constant), sinkhorn(scores[0]), rtol=1e-8, atol=1e-8)
    close(swav_loss([s + constant for s in scores], 2, *HOW)[0], swav_loss(scores, 2, *HOW)[0], rtol=1e-8, atol=1e-8)


@given(matrices(columns=PROTOTYPES, bound=1.0), st.data())
def test_adding_a_constant_to_one_prototypes_scores_changes_no_code(scores, data):
    """Whatever makes a prototype look near to everything is taken out by its total: nothing can be everyone's code."""
    constants = torch.tensor([data.draw(numbers()) for _ in range(scores.shape[1])], dtype=torch.float64)
    close(sinkhorn(scores + constants), sinkhorn(scores), rtol=1e-8, atol=1e-10)


@given(views(), st.randoms())
def test_permuting_the_batch_or_the_prototypes_permutes_the_codes_and_leaves_the_loss(scores, random):
    n, k = scores[0].shape
    rows, columns = random.sample(range(n), n), random.sample(range(k), k)
    close(sinkhorn(scores[0][rows][:, columns]), sinkhorn(scores[0])[rows][:, columns])
    for name, moved in {"rows": [s[rows] for s in scores], "columns": [s[:, columns] for s in scores]}.items():
        close(swav_loss(moved, 2, *HOW)[0], swav_loss(scores, 2, *HOW)[0], msg=name)


@given(views(st.integers(3, 4)))
def test_the_order_within_the_views_with_codes_and_within_the_others_does_not_matter(scores):
    moved = [scores[1], scores[0], *reversed(scores[2:])]
    close(swav_loss(moved, 2, *HOW)[0], swav_loss(scores, 2, *HOW)[0])


def unevenness(q: torch.Tensor) -> tuple[float, float]:
    """The use of the least and the most used prototype; (1, 1) is equal use."""
    use = q.sum(0) * q.shape[1] / q.shape[0]
    return use.min().item(), use.max().item()


@settings(max_examples=20)
@given(matrices(columns=PROTOTYPES, bound=0.0625))
def test_more_iterations_come_nearer_to_equal_use_and_many_reach_it(scores):
    least, most = unevenness(sinkhorn(scores, iterations=1))
    for iterations in range(2, 8):
        new_least, new_most = unevenness(sinkhorn(scores, iterations=iterations))
        assert new_least >= least - 1e-12 and new_most <= most + 1e-12
        least, most = new_least, new_most
    assert unevenness(sinkhorn(scores, iterations=100)) == pytest.approx((1, 1), abs=1e-6)


def test_three_iterations_do_not_reach_equal_use():
    scores = scores_of_vectors()[1][0]
    least, most = unevenness(sinkhorn(scores))
    assert least < 0.95 and most > 1.05
    assert unevenness(sinkhorn(scores, iterations=5000)) == pytest.approx((1, 1), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@settings(max_examples=15)
@given(scores=views())
def test_no_score_is_too_large(dtype, scores):
    """Cosines, and anything up to 1/epsilon: exp(±400), far beyond every type."""
    for scale in (1.0, 20.0):
        scaled = [(scale * s).to(dtype).requires_grad_() for s in scores]
        q = sinkhorn(scaled[0])
        assert q.isfinite().all()
        close(q.sum(1), torch.ones(len(q), dtype=q.dtype))
        loss, terms = swav_loss(scaled, 2, *HOW)
        loss.backward()
        assert torch.stack([loss, *terms.values()]).isfinite().all()
        assert all(s.grad.isfinite().all() for s in scaled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@settings(max_examples=15)
@given(data=st.data(), drop=st.floats(1, 1000))
def test_an_image_far_below_the_largest_score_still_has_a_code(dtype, data, drop):
    """And so has every other beside it."""
    scores = data.draw(matrices(columns=PROTOTYPES, bound=1.0))
    scores[data.draw(st.integers(0, len(scores) - 1))] -= drop
    q = sinkhorn(scores.to(dtype))
    assert q.isfinite().all() and (q >= 0).all()
    close(q.sum(1), torch.ones(len(q), dtype=q.dtype))


def test_an_image_and_a_prototype_that_lie_far_from_everything():
    scores = torch.tensor([[20.0, -20.0, 19.0], [20.0, -20.0, -20.0], [-20.0, -20.0, -20.0]])
    q = sinkhorn(scores)
    assert q.isfinite().all() and unevenness(q)[0] > 0.5
    close(sinkhorn(scores.double()).float(), q, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ gradients


@given(queued(), st.integers(1, 2))
def test_no_gradient_passes_through_codes_or_queue(drawn, num_assign):
    """With q a constant the gradient of -q log softmax(s/T) is (softmax(s/T) - q) / T."""
    scores, older = ([s.requires_grad_() for s in each] for each in drawn)
    swav_loss(scores, num_assign, *HOW, older)[0].backward()
    assert all(s.grad is None for s in older)
    codes = [sinkhorn(torch.cat([o, s]))[len(o) :] for o, s in zip(older, scores[:num_assign], strict=False)]
    assert not any(q.requires_grad for q in codes)
    for v, s in enumerate(scores):
        want = sum((F.softmax(s / 0.1, 1) - q) / 0.1 for i, q in enumerate(codes) if i != v)
        if num_assign == 1 and v == 0:
            assert s.grad is None, "the only view with codes predicts nothing"
        else:
            close(s.grad, want.detach() / len(s) / num_assign / 2, rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(views(st.just(3), st.integers(1, 3)))
def test_gradient_is_that_of_finite_differences(scores):
    """Of the views that only predict: for the others, finite differences would move the codes."""
    predicting = [s.requires_grad_() for s in scores[1:]]
    assert torch.autograd.gradcheck(lambda *s: swav_loss([scores[0], *s], 1, *HOW)[0], predicting, atol=1e-4)


@given(queued())
def test_inputs_are_left_alone(drawn):
    before = [[s.clone() for s in each] for each in drawn]
    scores, older = ([s.requires_grad_() for s in each] for each in drawn)
    swav_loss(scores, 2, *HOW, older)[0].backward()
    for each, was in zip((scores, older), before, strict=True):
        for a, b in zip(each, was, strict=True):
            close(a.detach(), b, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(64, 32, generator=generator).clamp(-1, 1).to(half) for _ in range(4)]
    older = [s.roll(1, 0) for s in scores[:2]]
    want, _ = swav_loss([s.double() for s in scores], 2, *HOW, [s.double() for s in older])
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = swav_loss(scores, 2, *HOW, older)
        also, _ = swav_loss([s.float() for s in scores], 2, *HOW, [s.float() for s in older])
        assert sinkhorn(scores[0]).dtype == torch.float32
    assert got.dtype == torch.float32
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


def test_float64_stays_float64():
    scores = scores_of_vectors()[1]
    assert sinkhorn(scores[0]).dtype == swav_loss(scores, 2, *HOW)[0].dtype == torch.float64


def test_one_view_and_no_iterations_are_refused():
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="at least two views"):
        swav_loss([scores], 1, *HOW)
    with pytest.raises(ValueError, match="at least two views"):
        swav_loss([scores, scores], 3, *HOW)
    with pytest.raises(ValueError, match="at least one iteration"):
        sinkhorn(scores, iterations=0)


# --------------------------------------------------------------------------------------------------------- ranks


def on_ranks(world: int, job) -> list:
    """job(rank) on `world` threads that gather from each other as processes do (forward only)."""
    local, slots, meet = threading.local(), [None] * world, threading.Barrier(world, timeout=20)

    def gather(x):
        slots[local.rank] = x
        meet.wait()
        rows = torch.cat(slots)
        meet.wait()
        return rows

    def work(rank):
        local.rank = rank
        try:
            return job(rank)
        except BaseException:
            meet.abort()
            raise

    mine = lambda total: slice(local.rank * total // world, (local.rank + 1) * total // world)  # noqa: E731
    with (
        mock.patch.object(swav, "all_gather", gather),
        mock.patch.object(swav, "my_rows", mine),
        ThreadPoolExecutor(world) as pool,
    ):
        return list(pool.map(work, range(world)))


@settings(max_examples=20)
@given(queued(rows=st.just(4), older=st.sampled_from([4, 8])), st.booleans(), st.sampled_from([2, 4]))
def test_any_number_of_ranks_gives_the_codes_loss_and_gradient_of_one(drawn, with_queue, world):
    scores, older = drawn

    def job(rank):
        def share(s):
            return s[rank * len(s) // world : (rank + 1) * len(s) // world].clone()

        mine = [share(s).requires_grad_() for s in scores]
        queue = [share(s) for s in older] if with_queue else None
        loss, terms = swav_loss(mine, 2, *HOW, queue)
        loss.backward()
        return sinkhorn(mine[0]), loss.detach(), terms["entropy"], [s.grad for s in mine]

    codes, losses, entropies, gradients = zip(*on_ranks(world, job), strict=True)
    whole = [s.clone().requires_grad_() for s in scores]
    loss, terms = swav_loss(whole, 2, *HOW, older if with_queue else None)
    loss.backward()
    close(torch.cat(codes), sinkhorn(scores[0]), rtol=1e-9, atol=1e-12)
    close(sum(losses) / world, loss.detach(), rtol=1e-9, atol=1e-12)
    close(sum(entropies) / world, terms["entropy"], rtol=1e-9, atol=1e-12)
    for view, s in enumerate(whole):  # DDP divides by the world
        close(torch.cat([g[view] for g in gradients]) / world, s.grad, rtol=1e-9, atol=1e-9)


@settings(max_examples=10)
@given(st.lists(matrices(st.just(8), st.just(3)), min_size=2, max_size=5), st.sampled_from([2, 4]))
def test_the_queue_holds_the_same_on_every_rank_and_each_brings_its_share(batches, world):
    """Batches of 4 images, first view above second, into a queue of 8."""
    prototypes = nn.Linear(3, 2, bias=False, dtype=torch.float64)

    def job(rank, world=world):
        queue = Queue(8, 3, torch.device("cpu"), torch.float64)
        for batch in batches:
            n = 4 // world
            queue.push(tuple(view[rank * n : (rank + 1) * n].clone().requires_grad_() for view in batch.split(4)))
        return queue.rows, queue.scores(prototypes)

    alone, alone_scores = job(0, 1)
    results = on_ranks(world, job)
    assert all(torch.equal(rows, alone) and not rows.requires_grad for rows, _ in results)
    for view in range(2):
        shares = [scores[view] for _, scores in results]
        assert all(len(share) == 8 // world and not share.requires_grad for share in shares)
        close(torch.cat(shares), alone_scores[view])


# --------------------------------------------------------------------------------------------------------- queue


class QueueMachine(RuleBasedStateMachine):
    """The queue beside two deques that forget their oldest entries."""

    @initialize(batch=st.integers(1, 3), multiple=st.integers(1, 3), d=st.integers(1, 3))
    def start(self, batch, multiple, d):
        self.batch, self.d, self.length = batch, d, batch * multiple
        self.queue = self.new()
        self.models = [deque(maxlen=self.length) for _ in range(2)]
        self.prototypes = nn.Linear(d, 4, bias=False, dtype=torch.float64)

    def new(self) -> Queue:
        return Queue(self.length, self.d, torch.device("cpu"), torch.float64)

    @rule(data=st.data())
    def push(self, data):
        z = tuple(data.draw(matrices(st.just(self.batch), st.just(self.d))).requires_grad_() for _ in range(2))
        self.queue.push(z)
        for model, view in zip(self.models, z, strict=True):
            model.extend(view.detach().clone())
            view.data.zero_()  # the queue keeps copies

    @rule()
    def save_and_load(self):
        saved = {name: tensor.clone() for name, tensor in self.queue.state_dict().items()}
        self.queue = self.new()
        self.queue.load_state_dict(saved)

    @rule(data=st.data())
    def move_the_prototypes(self, data):
        self.prototypes.weight.data.copy_(data.draw(matrices(st.just(4), st.just(self.d))))

    @invariant()
    def holds_the_newest_in_order(self):
        kept = len(self.models[0])
        oldest_first = self.queue.rows.roll(-int(self.queue.count), 1)[:, self.length - kept :]
        scores = self.queue.scores(self.prototypes)
        assert (scores is None) == (kept < self.length)
        for view, model in enumerate(self.models):
            if kept:
                assert torch.equal(oldest_first[view], torch.stack(list(model)))
            if scores:
                close(scores[view], self.queue.rows[view] @ self.prototypes.weight.detach().T)


QueueMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=12)
TestQueue = QueueMachine.TestCase


def test_a_queue_of_length_zero_never_has_scores():
    assert Queue(0, 3, torch.device("cpu"), torch.float32).scores(nn.Linear(3, 2, bias=False)) is None


# --------------------------------------------------------------------------------------- views, network, training

TINY = {"image_size": 16, "batch_size": 16, "epochs": 4, "warmup_epochs": 0, "log_every": 1, "save_every": 9}
TINY |= {"projector_hidden": 24, "projector_dim": 6, "prototypes": 12, "small_crops": 2, "small_size": 8}


def test_large_crops_come_first():
    two, five = crops(Args(image_size=32)), crops(Args(image_size=32, small_crops=3, small_size=12))
    assert [(c.size, c.scale, c.interpolation) for c in two] == [(32, (0.2, 1.0), "bilinear")] * 2
    assert [c.size for c in five] == [32, 32, 12, 12, 12]
    assert [(c.size, c.scale) for c in crops(Args(**swav.RECIPES["cifar"], image_size=32))] == [(32, (0.08, 1.0))] * 2
    imagenet = crops(Args(**swav.RECIPES["imagenet"]))
    assert [(c.size, c.scale) for c in imagenet] == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6


def images(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n, 3, size, size, generator=generator) for size in (16, 16, 8, 8)]


def test_crops_of_one_size_are_one_batch_and_all_are_one_for_the_head():
    model = SwAV(Args(**TINY))
    seen = []
    for module in (model.backbone, model.projector):
        module.register_forward_hook(lambda _, inputs, output: seen.append(tuple(inputs[0].shape)))
    z, scores = model(images(5))
    assert seen == [(10, 3, 16, 16), (10, 3, 8, 8), (20, 512)]
    assert [tuple(t.shape) for t in z] == [(5, 6)] * 4 and [tuple(t.shape) for t in scores] == [(5, 12)] * 4


def test_embeddings_are_of_length_one_in_the_order_of_the_views_and_scores_are_cosines():
    model = SwAV(Args(**TINY)).eval()
    normalize_prototypes(model.prototypes)
    z, scores = model(images(3))
    for view, x in enumerate(images(3)):
        close(z[view], F.normalize(model.projector(model.backbone(x)), dim=1), rtol=1e-4, atol=1e-5)
        close(z[view].norm(dim=1), torch.ones(3))
        close(scores[view], F.cosine_similarity(z[view][:, None], model.prototypes.weight[None], dim=2))


def test_scores_are_exact_inside_autocast():
    model = SwAV(Args(**TINY))
    with torch.autocast("cpu", torch.bfloat16):
        z, scores = model(images(5))
    assert z[0].dtype == scores[0].dtype == torch.float32
    close(scores[0], z[0] @ model.prototypes.weight.T)


@given(matrices(columns=st.integers(1, 4)))
def test_prototypes_are_put_on_the_unit_sphere_in_place_without_gradient(rows):
    assume(rows.norm(dim=1).min() > 1e-3)
    prototypes = nn.Linear(rows.shape[1], rows.shape[0], bias=False, dtype=torch.float64)
    weight = prototypes.weight
    weight.data.copy_(rows)
    normalize_prototypes(prototypes)
    assert prototypes.weight is weight and weight.requires_grad and weight.grad is None
    close(weight.detach(), rows / rows.norm(dim=1, keepdim=True))


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function: the checkpoint of a run on 64 images, and the shapes of the queue's scores in each step."""
    seen = []

    def spy(*inputs):
        seen.append(inputs[5] and [tuple(s.shape) for s in inputs[5]])
        return swav_loss(*inputs)

    monkeypatch.setattr(swav, "swav_loss", spy)

    run = quick.trainer(swav, Args(**TINY), 64, tmp_path, monkeypatch)
    return lambda name, **flags: (run(name, **flags), seen)


def test_lars_adapts_and_decays_every_tensor_as_larc_does(train):
    saved, _ = train("run", optimizer="lars", weight_decay=0.5, max_steps=1)
    groups = saved["optimizer"]["param_groups"]
    assert all(group["adapt"] and group["weight_decay"] == 0.5 for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(list(SwAV(Args(**TINY)).parameters()))


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_frozen_prototypes_neither_move_nor_gather_momentum(train, optimizer):
    torch.manual_seed(0)
    model = SwAV(Args(**TINY))
    normalize_prototypes(model.prototypes)
    start, tensors = model.prototypes.weight.detach(), len(list(model.parameters()))
    frozen, _ = train("run", optimizer=optimizer, weight_decay=0.1, max_steps=4)
    close(frozen["model"]["prototypes.weight"], start)
    assert not torch.equal(frozen["model"]["projector.0.weight"], model.projector[0].weight)
    assert len(frozen["optimizer"]["state"]) == tensors - 1
    thawed, _ = train("run", optimizer=optimizer, weight_decay=0.1, max_steps=6)
    assert (thawed["model"]["prototypes.weight"] - start).abs().max() > 1e-5
    assert len(thawed["optimizer"]["state"]) == tensors


def test_the_queue_starts_when_told_serves_once_full_and_survives_a_restart(train):
    flags = {"queue_length": 32, "queue_start_epoch": 1}
    straight, seen = train("straight", max_steps=9, **flags)
    assert seen == [None] * 6 + [[(32, 12)] * 2] * 3, "filled after steps 5 and 6 of batches of 16"
    close(straight["queue"]["rows"].norm(dim=2), torch.ones(2, 32))
    train("stopped", max_steps=7, **flags)
    resumed, _ = train("stopped", max_steps=9, **flags)
    for part in ("model", "queue"):
        assert all(torch.equal(resumed[part][name], tensor) for name, tensor in straight[part].items())
    without, _ = train("without", max_steps=9)
    assert not torch.equal(without["model"]["projector.0.weight"], straight["model"]["projector.0.weight"])
