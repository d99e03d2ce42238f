"""MoCo's loss against an independent oracle and the official numbers; its queue, key network, shuffle and BatchNorm."""

import collections
import contextlib
import copy
import io
import math
import re

import numpy as np
import pytest
import quick
import torch
import torch.nn.functional as F
import torchvision
import vectors
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from strategies import matrices, numbers, pairs

import moco
from common import Draws
from moco import Args, GroupBatchNorm2d, MoCo, Queue, encode_keys, group_batchnorm, info_nce_loss, momentum_update

close = torch.testing.assert_close
temperatures = st.floats(0.05, 2.0)
SIZES = st.integers(1, 4)


@st.composite
def lookups(draw, long: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k (n, d) and a queue (K, d), none normalised; with `long` no row is near zero."""
    q, k = draw(pairs())
    queue = draw(matrices(columns=st.just(q.shape[1])))
    for z in (q, k, queue):
        z[z.norm(dim=1) < 0.1 * long] += 1
    return q, k, queue


# ------------------------------------------------------------------------------------------------------- loss


def test_the_numbers_of_the_formula():
    a, b = vectors.views()
    queue = torch.sin(0.3 * torch.arange(18, dtype=torch.float64)).reshape(6, 3)
    loss, _ = info_nce_loss(a, b, queue.T, 0.2)
    normalized = torch.nn.functional.normalize(a.detach(), dim=1).requires_grad_()
    also, _ = info_nce_loss(normalized, b, queue.T, 0.2)
    loss.backward()
    assert [loss.item(), also.item()] == pytest.approx([0.94917387] * 2, abs=5e-9)
    assert a.grad.norm().item() == pytest.approx(0.38556845, abs=5e-9)


def oracle(q: list, k: list, queue: list, temperature: float) -> dict[str, float]:
    """Eq. 1 in plain loops, and how often the key is strictly nearer than the whole queue."""

    def unit(row: list[float]) -> list[float]:
        length = max(math.sqrt(sum(v * v for v in row)), 1e-12)
        return [v / length for v in row]

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(v * w for v, w in zip(unit(x), unit(y), strict=True))

    total = {"loss": 0.0, "positive": 0.0, "accuracy": 0.0}
    for i in range(len(q)):
        right, wrong = cosine(q[i], k[i]), [cosine(q[i], other) for other in queue]
        partition = sum(math.exp(s / temperature) for s in [right, *wrong])
        total["loss"] -= math.log(math.exp(right / temperature) / partition) / len(q)
        total["positive"] += right / len(q)
        total["accuracy"] += (right > max(wrong)) / len(q)
    return total


@given(lookups(), temperatures)
def test_equals_the_equation_in_plain_loops(lookup, temperature):
    want = oracle(*(z.tolist() for z in lookup), temperature)
    loss, terms = info_nce_loss(*lookup, temperature)
    assert loss.item() == pytest.approx(want["loss"], rel=1e-9, abs=1e-9)
    assert terms["positive"].item() == pytest.approx(want["positive"], rel=1e-9, abs=1e-9)
    cosines = torch.nn.functional.normalize(lookup[0]) @ torch.nn.functional.normalize(lookup[2]).T
    best = torch.nn.functional.cosine_similarity(*lookup[:2])[:, None] - cosines
    assume(best.abs().min() > 1e-9)  # rounding may decide a tie
    assert terms["accuracy"].item() == pytest.approx(want["accuracy"])


@given(lookups(), temperatures)
def test_keys_that_tell_nothing_cost_log_of_one_more_than_their_number(lookup, temperature):
    q, k, queue = lookup
    k[:], queue[:] = k[0], k[0]
    loss, terms = info_nce_loss(q, k, queue, temperature)
    assert loss.item() == pytest.approx(math.log(len(queue) + 1))
    loss, terms = info_nce_loss(torch.zeros_like(q), k, queue, temperature)
    assert loss.item() == pytest.approx(math.log(len(queue) + 1))
    assert terms["accuracy"].item() == 0, "a collapsed network has found nothing"


@given(lookups(long=True), temperatures, st.lists(st.floats(0.1, 10), min_size=7, max_size=7))
def test_only_directions_count(lookup, temperature, scales):
    scaled = [z * torch.tensor(scales[: len(z)], dtype=torch.float64)[:, None] for z in lookup]
    close(info_nce_loss(*scaled, temperature)[0], info_nce_loss(*lookup, temperature)[0], rtol=1e-9, atol=1e-9)


@given(lookups(), st.randoms())
def test_permuting_the_batch_or_the_queue_changes_nothing(lookup, random):
    q, k, queue = lookup
    batch, keys = (random.sample(range(len(z)), len(z)) for z in (q, queue))
    close(info_nce_loss(q[batch], k[batch], queue[keys], 0.2)[0], info_nce_loss(q, k, queue, 0.2)[0])


@given(lookups(), temperatures)
def test_both_directions_at_once_are_their_mean(lookup, temperature):
    """v2+ stacks the two directions."""
    z1, z2, queue = lookup
    want = [info_nce_loss(z1, z2, queue, temperature), info_nce_loss(z2, z1, queue, temperature)]
    loss, terms = info_nce_loss(torch.cat([z1, z2]), torch.cat([z2, z1]), queue, temperature)
    close(loss, (want[0][0] + want[1][0]) / 2)
    a, b, c = (F.normalize(z, dim=1) for z in (z1, z2, queue))
    lead = (a * b).sum(1, keepdim=True) - torch.cat([a, b]).mm(c.T).unflatten(0, (2, -1))  # 2×n×K
    for name in terms if lead.abs().min() > 1e-9 else ["positive"]:  # rounding decides a tie, and with it the accuracy
        close(terms[name], (want[0][1][name] + want[1][1][name]) / 2)


@settings(max_examples=15)
@given(lookups(long=True), st.floats(0.2, 2.0))
def test_gradient_is_that_of_finite_differences(lookup, temperature):
    q, k, queue = lookup
    assert torch.autograd.gradcheck(lambda q: info_nce_loss(q, k, queue, temperature)[0], q.requires_grad_())


@given(lookups())
def test_keys_and_queue_are_constants(lookup):
    q, k, queue = (z.requires_grad_() for z in lookup)
    loss, terms = info_nce_loss(q, k, queue, 0.2)
    loss.backward()
    assert q.grad is not None and k.grad is None and queue.grad is None
    assert not any(term.requires_grad or term.ndim for term in terms.values())


@given(lookups(long=True))
def test_the_queue_and_the_keys_may_change_before_the_backward_pass(lookup):
    q, k, queue = lookup
    k, queue = (torch.nn.functional.normalize(z, dim=1) for z in (k, queue))  # nothing left to normalise
    grads = []
    for change in (False, True):
        leaf = q.clone().requires_grad_()
        loss, _ = info_nce_loss(leaf, k, queue, 0.2)
        if change:
            k.zero_(), queue.zero_()
        loss.backward()
        grads.append(leaf.grad)
    close(*grads, rtol=0, atol=0)


@given(lookups())
def test_inputs_are_left_alone(lookup):
    before = copy.deepcopy(lookup)
    info_nce_loss(lookup[0].requires_grad_(), *lookup[1:], 0.2)[0].backward()
    for now, then in zip(lookup, before, strict=True):
        close(now.detach(), then, rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    q, k, queue = (torch.randn(n, 32, generator=generator).to(half) for n in (16, 16, 64))
    want, _ = info_nce_loss(q.double(), k.double(), queue.double(), 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        got, terms = info_nce_loss(q, k, queue.float(), 0.07)
        also, _ = info_nce_loss(q.float(), k.float(), queue.float(), 0.07)
    assert {got.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


def test_float64_stays_float64():
    a, b = vectors.views()
    assert info_nce_loss(a, b, b, 0.2)[0].dtype == torch.float64


# ------------------------------------------------------------------------------------------------------ queue


class QueueAgainstDeque(RuleBasedStateMachine):
    """Batches of any size up to K, saved and loaded at any moment."""

    @initialize(size=st.integers(1, 9), dim=st.integers(1, 3), seed=st.integers(0, 9))
    def start(self, size, dim, seed):
        torch.manual_seed(seed)
        self.queue = Queue(size, dim).double()
        close(self.queue.keys.norm(dim=1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.manual_seed(seed)
        close(Queue(size, dim).double().keys, self.queue.keys, rtol=0, atol=0)
        self.want = collections.deque(self.queue.keys.tolist(), maxlen=size)

    @rule(data=st.data())
    def enqueue(self, data):
        size, dim = self.queue.keys.shape
        keys = data.draw(matrices(st.integers(1, size), st.just(dim))).requires_grad_()
        before = keys.detach().clone()
        self.queue.enqueue(keys)
        for row in before.tolist():
            length = max(math.sqrt(sum(v * v for v in row)), 1e-12)
            self.want.append([v / length for v in row])
        close(keys.detach(), before, rtol=0, atol=0)

    @precondition(lambda self: len(self.want) > 1)
    @rule()
    def save_and_load(self):
        saved = copy.deepcopy(self.queue.state_dict())
        self.queue = Queue(*self.queue.keys.shape).double()
        self.queue.load_state_dict(saved)

    @invariant()
    def holds_the_same_keys_oldest_first(self):
        oldest = self.queue.oldest.item()
        in_order = self.queue.keys.roll(-oldest, 0)
        assert not self.queue.keys.requires_grad
        assert 0 <= oldest < len(self.want)
        close(in_order, torch.tensor(list(self.want), dtype=torch.float64), rtol=1e-12, atol=1e-12)


TestQueue = QueueAgainstDeque.TestCase
TestQueue.settings = settings(max_examples=25, stateful_step_count=15)


# ------------------------------------------------------------------------------------------------ key network


def small_network(fill: list[float]) -> torch.nn.Module:
    net = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1)).double()
    with torch.no_grad():
        for tensor, value in zip([*net.parameters(), net[1].running_mean, net[1].running_var], fill, strict=True):
            tensor.fill_(value)
    return net


@given(st.lists(numbers(), min_size=12, max_size=12), st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)))
def test_momentum_update_moves_parameters_and_nothing_else(values, m):
    key, query = small_network(values[:6]), small_network(values[6:])
    before = copy.deepcopy(key.state_dict())
    momentum_update(key.requires_grad_(False), query, m)
    for name, tensor in key.state_dict().items():
        if "running" in name or "tracked" in name:
            close(tensor, before[name], rtol=0, atol=0)
        else:
            want = m * before[name] + (1 - m) * query.state_dict()[name]
            close(tensor, want, rtol=0 if m in (0, 1) else 1e-9, atol=0 if m in (0, 1) else 1e-9)
    assert not any(p.requires_grad for p in key.parameters())


@given(st.lists(numbers(), min_size=6, max_size=6), st.floats(0, 1))
def test_a_copy_of_the_query_network_stays_one(values, m):
    """So the update before the first step does nothing."""
    query = small_network(values)
    key = copy.deepcopy(query)
    momentum_update(key, query, m)
    for now, then in zip(key.parameters(), query.parameters(), strict=True):
        close(now, then, rtol=0, atol=0)


@given(st.integers(1, 9), st.integers(0, 99))
def test_shuffling_and_shuffling_back_is_the_identity(n, seed):
    x = torch.arange(12.0 * n).reshape(n, 3, 2, 2).requires_grad_()
    seen = []

    def network(images):
        seen.append(images)
        return images.flatten(1) ** 2

    keys = encode_keys(network, x, Draws((seed,), n))
    again = encode_keys(network, x, Draws((seed,), n))
    close(keys, x.detach().flatten(1) ** 2, rtol=0, atol=0)
    close(again, keys, rtol=0, atol=0)
    close(seen[0], seen[1], rtol=0, atol=0)  # the generator alone decides
    close(seen[0].sort(0).values, x.detach(), rtol=0, atol=0)
    assert not keys.requires_grad


def test_the_key_images_do_change_places_and_differently_each_time():
    x = torch.arange(192.0).reshape(64, 3, 1, 1)
    orders = []
    for seed in range(8):
        encode_keys(
            lambda images: orders.append(images[:, 0, 0, 0].tolist()) or images.flatten(1), x, Draws((seed,), 64)
        )
    assert len({tuple(order) for order in [*orders, x[:, 0, 0, 0].tolist()]}) == 9


# -------------------------------------------------------------------------------------------------- BatchNorm


@st.composite
def grouped(draw) -> tuple[torch.Tensor, int, list[float]]:
    """A batch (groups·m, C, h, w), the number of groups, and weight and bias of each channel."""
    groups, m, c, h, w = draw(SIZES), draw(st.integers(2, 3)), draw(SIZES), draw(st.integers(1, 2)), draw(SIZES)
    x = draw(hnp.arrays(np.float64, (groups * m, c, h, w), elements=numbers()))
    affine = draw(st.lists(numbers(), min_size=2 * c, max_size=2 * c))
    return torch.from_numpy(x), groups, affine


def batchnorms(x: torch.Tensor, groups: int, affine: list[float]) -> tuple[GroupBatchNorm2d, torch.nn.BatchNorm2d]:
    """BatchNorm in groups, and the ordinary one with the same weights and running statistics."""
    plain = torch.nn.BatchNorm2d(x.shape[1]).double()
    with torch.no_grad():
        plain.weight.copy_(torch.tensor(affine[: x.shape[1]]))
        plain.bias.copy_(torch.tensor(affine[x.shape[1] :]))
        plain.running_mean.copy_(plain.bias / 2)
        plain.running_var.copy_(plain.weight.abs() + 0.5)
    return group_batchnorm(copy.deepcopy(plain), groups), plain


@given(grouped())
def test_groups_are_batches_of_their_own(batch):
    x, groups, _ = batch
    ours, plain = batchnorms(*batch)
    alone = [copy.deepcopy(plain) for _ in range(groups)]
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = ours(x1)
    want = torch.cat([bn(part) for bn, part in zip(alone, x2.chunk(groups), strict=True)])
    close(got, want, rtol=1e-9, atol=1e-9)
    pull = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape).sin()
    (got * pull).sum().backward()
    (want * pull).sum().backward()
    close(x1.grad, x2.grad, rtol=1e-6, atol=1e-6)
    for name in ("weight", "bias"):
        close(getattr(ours, name).grad, sum(getattr(bn, name).grad for bn in alone), rtol=1e-6, atol=1e-6)
    for name in ("running_mean", "running_var"):
        close(getattr(ours, name), torch.stack([getattr(bn, name) for bn in alone]).mean(0), rtol=1e-9, atol=1e-9)
    assert ours.num_batches_tracked == 1
    close(x1.detach(), x, rtol=0, atol=0)


@given(grouped())
def test_each_group_and_channel_has_mean_0_and_the_variance_eps_allows(batch):
    """The same in plain loops."""
    x, groups, _ = batch
    bn, _ = batchnorms(x, groups, [1.0] * x.shape[1] + [0.0] * x.shape[1])
    got = bn(x)
    m = len(x) // groups
    for g in range(groups):
        for c in range(x.shape[1]):
            before, after = (t[g * m : (g + 1) * m, c].flatten().tolist() for t in (x, got))
            mean = sum(before) / len(before)
            variance = sum((v - mean) ** 2 for v in before) / len(before)
            assert after == pytest.approx([(v - mean) / math.sqrt(variance + 1e-5) for v in before], abs=1e-8)


@given(grouped())
def test_in_eval_mode_it_is_ordinary_batchnorm(batch):
    ours, plain = batchnorms(*batch)
    before = copy.deepcopy(ours.state_dict())
    close(ours.eval()(batch[0]), plain.eval()(batch[0]), rtol=0, atol=0)
    for name, tensor in ours.state_dict().items():
        close(tensor, before[name], rtol=0, atol=0)


@given(grouped())
def test_half_the_groups_on_each_of_two_processes_are_the_same(batch):
    x, groups, affine = torch.cat([batch[0], 1 - batch[0]]), 2 * batch[1], batch[2]
    one, _ = batchnorms(x, groups, affine)
    ranks = [copy.deepcopy(one) for _ in range(2)]
    want = one(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "rank_and_world", lambda: (0, 2))
        close(torch.cat([bn(half) for bn, half in zip(ranks, x.chunk(2), strict=True)]), want, rtol=1e-9, atol=1e-9)
        everyone = torch.stack([torch.cat([bn.running_mean, bn.running_var]) for bn in ranks])
        patch.setattr(moco, "all_gather", lambda rows: everyone)
        moco.average_statistics(*ranks[:1])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        close(getattr(ranks[0], name), getattr(one, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("convert", ["from BatchNorm", "from SyncBatchNorm"])
def test_a_converted_backbone_is_still_torchvisions(convert):
    """On several processes the shared code has made SyncBatchNorm of it before."""
    args = Args(bn_groups=2)
    torch.manual_seed(0)
    model = MoCo(args)
    if convert == "from SyncBatchNorm":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    group_batchnorm(model, args.bn_groups)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 12 and {type(m) for m in norms} == {GroupBatchNorm2d}
    block = torchvision.models.resnet.BasicBlock
    plain = torchvision.models.ResNet(block, [1, 1, 1, 1])
    x = torch.linspace(-1, 1, 8 * 3 * 32 * 32).sin().reshape(8, 3, 32, 32)
    halves = copy.deepcopy(model)
    trained = model.backbone(x)
    close(trained, torch.cat([group_batchnorm(copy.deepcopy(halves), 1).backbone(half) for half in x.chunk(2)]))
    loaded = plain.load_state_dict(model.backbone.state_dict(), strict=False)
    assert loaded.missing_keys == ["fc.weight", "fc.bias"] and not loaded.unexpected_keys
    plain.fc = torch.nn.Identity()
    close(model.eval().backbone(x), plain.eval()(x))


@given(grouped())
def test_made_alone_it_is_ordinary_batchnorm(batch):
    """`GroupBatchNorm2d(C)` has one group until it is given more."""
    x, _, _ = batch
    ours, plain = GroupBatchNorm2d(x.shape[1]).double(), torch.nn.BatchNorm2d(x.shape[1]).double()
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = ours(x1), plain(x2)
    close(got, want, rtol=1e-9, atol=1e-9)
    close(dict(ours.state_dict()), dict(plain.state_dict()), rtol=1e-9, atol=1e-9)
    (got**3).sum().backward()
    (want**3).sum().backward()
    close(x1.grad, x2.grad, rtol=1e-6, atol=1e-6)
    close(ours.weight.grad, plain.weight.grad, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 24), st.integers(1, 12), st.sampled_from([1, 2]))
@example(rows=12, groups=8, world=1)
def test_a_batch_that_does_not_split_into_equal_groups_is_refused(rows, groups, world):
    """On several processes, each has a share of the groups."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    x = torch.arange(3.0 * rows * 6).sin().reshape(rows, 3, 3, 2)
    group_batchnorm(net, groups * world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "rank_and_world", lambda: (0, world))
        if rows % groups == 0:
            assert net(x).shape == (rows, 2, 3, 2)
        else:
            with pytest.raises(ValueError, match=f"{rows} images .* {groups * world} groups"):
                net(x)
            assert net[1].num_batches_tracked == 0
        assert net.eval()(x).shape == (rows, 2, 3, 2), "in eval mode there are no groups"


def test_batchnorm_of_vectors_cannot_work_in_groups():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    with pytest.raises(TypeError, match="BatchNorm1d"):
        group_batchnorm(net, 2)


@given(st.lists(numbers(), min_size=6, max_size=6))
def test_one_process_has_nothing_to_average(values):
    net = small_network(values)
    before = copy.deepcopy(net.state_dict())
    moco.average_statistics(net)
    for name, tensor in net.state_dict().items():
        close(tensor, before[name], rtol=0, atol=0)


# ------------------------------------------------------------------------------------- versions, flags, the loop


def test_the_heads_of_the_versions():
    def layers(version):
        head = MoCo(Args(version=version, head_dim=16)).head
        return [(type(m).__name__, m.in_features, m.out_features) for m in head.modules() if hasattr(m, "in_features")]

    assert layers("v1") == [("Linear", 512, 16)]
    assert layers("v2") == layers("v2+") == [("Linear", 512, 512), ("Linear", 512, 16)]


@pytest.mark.parametrize(
    "version, want", [("v1", ["grey", "jitter 0.4 1.0"]), ("v2", ["jitter 0.1 0.8", "grey", "blur"])]
)
def test_the_views_of_the_versions(version, want, monkeypatch):
    steps = []
    monkeypatch.setattr(moco, "grayscale", lambda x, chosen: steps.append("grey") or x)
    monkeypatch.setattr(moco, "color_jitter", lambda x, draws, hue, p, **_: steps.append(f"jitter {hue} {p}") or x)
    monkeypatch.setattr(moco, "random_blur", lambda x, draws, p: steps.append("blur") or x)
    x = torch.zeros(2, 3, 8, 8)
    moco.augment(x, Draws((0,), 2), Args(version=version, blur=True))
    assert steps == want
    moco.augment(x, Draws((0,), 2), Args(version=version, grayscale=False, color_jitter=False, blur=False))
    assert steps == want, "all of them can be switched off"


def checked(args: Args, images: int) -> int | str:
    """The queue's size, or the line that refuses the flags."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            moco.check(args, images)
            return moco.queue_size(args, images)
        except SystemExit as end:
            assert end.code == 2 and said.getvalue().count("\n") == 1
            return said.getvalue()


@given(
    st.sampled_from([2, 6, 8, 30, 32]),
    st.integers(0, 200),
    st.integers(-1, 9),
    st.integers(-1, 200),
    st.sampled_from([1, 2]),
)
def test_flags_that_do_not_fit_are_refused_with_what_does(batch, more, groups, queue, world):
    batch, images = batch * world, batch * world + more
    flags = {"batch_size": batch, "bn_groups": groups, "queue_size": queue}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moco, "rank_and_world", lambda: (0, world))
        for _ in range(3):
            answer = checked(Args(**flags), images)
            if isinstance(answer, int):
                break
            name, fix = re.search(r"--(\S+) .*; take (?:one of .*?)?(\d+)\n", answer).groups()
            flags[name.replace("-", "_")] = int(fix)
    size, parts = answer, moco.bn_groups(Args(**flags))
    assert 0 < size <= images and size % batch == 0
    assert batch % parts == 0 and batch // parts >= 2 and (parts == 1 or parts % world == 0)
    assert queue == size or queue < 1 or queue % batch or queue > images, "what fits is left alone"
    assert groups == parts or groups < 1 or batch % groups or batch < 2 * groups or groups % world


@given(st.integers(2, 300))
def test_the_default_of_bn_groups_fits_any_batch(batch):
    fits = [parts for parts in range(1, 9) if batch % parts == 0 and batch // parts > 1]
    assert moco.bn_groups(Args(batch_size=batch)) == max(fits)
    assert moco.bn_groups(Args(batch_size=batch, bn_groups=7)) == 7, "a number given by hand is refused instead"


def test_two_images_are_enough(tmp_path, monkeypatch):
    args = Args(image_size=16, epochs=1, warmup_epochs=0, save_every=1)
    assert quick.trainer(moco, args, 2, tmp_path, monkeypatch)()["step"] == 1


@pytest.fixture
def train(tmp_path, monkeypatch):
    args = Args(image_size=16, batch_size=8, bn_groups=2, queue_size=24, head_dim=8, epochs=2, warmup_epochs=0)
    return quick.trainer(moco, args, 40, tmp_path, monkeypatch)


@pytest.mark.parametrize("version", ["v1", "v2", "v2+"])
def test_each_step_updates_the_key_network_then_compares_then_enqueues(version, train, monkeypatch):
    order, keys, drift = [], collections.deque(), []
    update, encode, loss, enqueue = momentum_update, encode_keys, info_nce_loss, Queue.enqueue

    def spy_update(key, query, m):
        pairs = list(zip(key.parameters(), query.parameters(), strict=True))
        want = [m * k.detach() + (1 - m) * q.detach() for k, q in pairs]
        drift.append(max((k - q).abs().max().item() for k, q in pairs))
        update(key, query, m)
        close(list(key.parameters()), want)
        assert key.training and not any(p.requires_grad for p in key.parameters())
        order.append("update")

    def spy_encode(*inputs):
        order.append("encode")
        return encode(*inputs)

    def spy_loss(q, k, queue, temperature):
        order.append("loss")
        assert temperature == (0.07 if version == "v1" else 0.2)
        assert len(q) == len(k) == (16 if version == "v2+" else 8)
        if not keys:
            keys.extend(queue.clone().split(8))
        close(queue.split(8)[(len(order) - 1) // steps % 3 :][0], keys[0], rtol=0, atol=0)
        held = sorted(map(tuple, queue.tolist()))
        assert held == sorted(map(tuple, torch.cat(list(keys)).tolist())), "the keys of the steps before, no others"
        keys.append(torch.nn.functional.normalize(k[:8], dim=1))
        return loss(q, k, queue, temperature)

    def spy_enqueue(self, new):
        order.append("enqueue")
        close(torch.nn.functional.normalize(new, dim=1), keys[-1], rtol=0, atol=0)
        enqueue(self, new)
        keys.popleft()

    one_step = ["update", "encode", *["encode"] * (version == "v2+"), "loss", "enqueue"]
    steps = len(one_step)
    for name, spy in [("momentum_update", spy_update), ("encode_keys", spy_encode), ("info_nce_loss", spy_loss)]:
        monkeypatch.setattr(moco, name, spy)
    monkeypatch.setattr(Queue, "enqueue", spy_enqueue)
    saved = train(version=version, max_steps=7)["queue"]
    assert order == 7 * one_step
    assert drift[0] == 0 and min(drift[1:]) > 0, "the key network starts as a copy and follows"
    close(torch.cat(list(keys)), saved["keys"].roll(-saved["oldest"].item(), 0), rtol=0, atol=0)


def test_a_resumed_run_goes_on_with_the_same_keys(train):
    train("parts", max_steps=4)
    whole, parts = train("whole", max_steps=7), train("parts", max_steps=7)
    for name in ("model", "key_network", "queue"):
        assert whole[name].keys() == parts[name].keys()
        for key, tensor in whole[name].items():
            close(parts[name][key], tensor, rtol=0, atol=0)
