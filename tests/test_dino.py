"""DINO: its loss and centre against the equations in plain loops, on one process and on several; the order of a step;
both collapses; and the vision transformer, which torchvision and evaluate.py have to read."""

import dataclasses
import math
from pathlib import Path

import methods
import pytest
import quick
import torch
import torch.nn.functional as F
import torchvision
import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import matrices, numbers
from torch import Tensor, nn
from worlds import run_on

import common
import dino
import evaluate
from dino import (
    DINO,
    Args,
    Teacher,
    VisionTransformer,
    clip_gradients,
    dino_loss,
    resize_positions,
    teacher_temperature,
    update_center,
)

close = torch.testing.assert_close
OUTPUTS, FEW = st.integers(2, 6), st.integers(1, 5)
TEMPERATURE = st.floats(0.05, 2.0)


@st.composite
def logits(draw, views=None, rows=FEW, bound: float = 1.0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(the student's of 2 to 4 views, the teacher's of the first 1 or 2, the centre) in float64."""
    n, v, k, t = draw(rows), draw(views or st.integers(2, 4)), st.just(draw(OUTPUTS)), draw(st.integers(1, 2))
    student = draw(matrices(st.just(v * n), k, bound)).split(n)
    teacher = draw(matrices(st.just(t * n), k, bound)).split(n)
    return list(student), list(teacher), draw(matrices(st.just(1), k, bound))[0]


# --------------------------------------------------------------------------------------------------------- values

AFTER_ONE_STEP = [0.06470382, 0.10701904, 0.05094145, -0.05197148, -0.10710207, -0.06376351]


@pytest.mark.parametrize(
    "temperature, center, views, want, norms",
    [
        (0.04, [0.0] * 6, 2, 0.36524937, [1.07253291, 0.91912427]),
        (0.04, AFTER_ONE_STEP, 2, 0.43564606, [1.20731212, 0.78735417]),
        (0.07, [0.0] * 6, 2, 0.40221976, [0.86909565, 0.76770278]),
        (0.04, [0.0] * 6, 3, 0.84764414, [0.53626646, 0.45956214]),
    ],
)
def test_official_numbers(temperature, center, views, want, norms):
    a, b = vectors.views()
    third = torch.cos(torch.arange(24, dtype=torch.float64)).reshape(4, 6)
    center = torch.tensor(center, dtype=torch.float64)
    loss, _ = dino_loss([a, b, third][:views], [a.detach(), b.detach()], center, 0.1, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=2e-8)
    assert [x.grad.norm().item() for x in (a, b)] == pytest.approx(norms, abs=2e-7)


def test_official_centre():
    got = update_center(torch.zeros(6, dtype=torch.float64), list(vectors.views(False)), 0.9)
    assert got.tolist() == pytest.approx(AFTER_ONE_STEP, abs=5e-9)


def in_loops(student, teacher, center, student_temperature, teacher_temperature) -> list[float]:
    """[loss, mean entropy of q, entropy of the mean of q, accuracy], straight from the equations."""

    def softmax(row: list[float], temperature: float) -> list[float]:
        powers = [math.exp(x / temperature) for x in row]
        return [x / sum(powers) for x in powers]

    def entropy(row: list[float]) -> float:
        return -sum(x * math.log(x) for x in row if x > 0)

    n, k = len(student[0]), len(center)
    q = [[softmax([x - c for x, c in zip(r, center, strict=True)], teacher_temperature) for r in t] for t in teacher]
    p = [[softmax(row, student_temperature) for row in s] for s in student]
    loss = hits = pairs = 0
    for i in range(len(q)):
        for v in range(len(p)):
            pairs += n * (i != v)
            for b in range(n):
                if i != v:
                    loss -= sum(q[i][b][j] * math.log(p[v][b][j]) for j in range(k))
                    hits += q[i][b].index(max(q[i][b])) == p[v][b].index(max(p[v][b]))
    rows = [row for view in q for row in view]
    mean = [sum(row[j] for row in rows) / len(rows) for j in range(k)]
    return [loss / pairs, sum(map(entropy, rows)) / len(rows), entropy(mean), hits / pairs]


@given(logits(), TEMPERATURE, TEMPERATURE)
def test_loss_and_terms_are_the_equations_in_plain_loops(drawn, student_temperature, teacher_temperature):
    student, teacher, center = drawn
    loss, terms = dino_loss(student, teacher, center, student_temperature, teacher_temperature)
    want = in_loops([s.tolist() for s in student], [t.tolist() for t in teacher], center.tolist(),
                    student_temperature, teacher_temperature)  # fmt: skip
    assert list(terms) == ["entropy", "entropy_of_mean", "accuracy"]
    got = [loss.item(), *(value.item() for value in terms.values())]
    assert got[:3] == pytest.approx(want[:3], rel=1e-9, abs=1e-9)
    tied = any(len({*row.tolist()}) < len(row) for rows in (*student, *teacher) for row in rows)
    tied |= center.abs().max().item() > 0  # logits minus the centre may tie, too
    assert tied or got[3] == pytest.approx(want[3])


@given(logits(), st.floats(0, 1))
def test_the_centre_is_the_moving_average_of_the_raw_logits(drawn, momentum):
    _, teacher, center = drawn
    before = center.clone()
    rows = [row for view in teacher for row in view.tolist()]
    got = update_center(center, teacher, momentum)
    for j, value in enumerate(got.tolist()):
        mean = sum(row[j] for row in rows) / len(rows)
        assert value == pytest.approx(momentum * before[j].item() + (1 - momentum) * mean, abs=1e-12)
    assert torch.equal(center, before), "a new tensor"


# ----------------------------------------------------------------------------------------------------- properties


@given(logits(), TEMPERATURE)
def test_entropies_are_in_their_order(drawn, temperature):
    """0 <= mean entropy <= entropy of the mean <= log K, and no cross-entropy is less than the entropy of q."""
    student, teacher, center = drawn
    loss, terms = dino_loss(student, teacher, center, 0.1, temperature)
    entropy, entropy_of_mean = terms["entropy"].item(), terms["entropy_of_mean"].item()
    assert -1e-12 <= entropy <= entropy_of_mean + 1e-12 <= math.log(len(center)) + 1e-11
    assert loss.item() >= entropy - 1e-12


@given(logits(), numbers(50), st.randoms())
def test_what_changes_nothing(drawn, constant, random):
    student, teacher, center = drawn
    n, k = student[0].shape
    want = dino_loss(student, teacher, center, 0.1, 0.05)
    rows, columns = random.sample(range(n), n), random.sample(range(k), k)
    same = {
        "a constant on all logits of the student": ([s + constant for s in student], teacher, center),
        "a constant on all logits of the teacher": (student, [t + constant for t in teacher], center),
        "a shift of teacher and centre": (student, [t + center for t in teacher], 2 * center),
        "images": ([s[rows] for s in student], [t[rows] for t in teacher], center),
        "outputs": ([s[:, columns] for s in student], [t[:, columns] for t in teacher], center[columns]),
        "small crops": ([*student[: len(teacher)], *student[len(teacher) :][::-1]], teacher, center),
    }
    for name, moved in same.items():
        loss, terms = dino_loss(*moved, 0.1, 0.05)
        close(loss, want[0], rtol=1e-8, atol=1e-8, msg=name)
        close(terms["entropy_of_mean"], want[1]["entropy_of_mean"], rtol=1e-8, atol=1e-8, msg=name)


@given(logits(), TEMPERATURE, TEMPERATURE)
def test_no_gradient_passes_through_teacher_and_centre(drawn, student_temperature, teacher_temperature):
    """With q a constant the gradient of -q log softmax(s/T) is (softmax(s/T) - q) / T. Nothing is changed in place."""
    student, teacher, center = drawn
    tensors = [*student, *teacher, center]
    before = [t.clone() for t in tensors]
    for t in tensors:
        t.requires_grad_()
    dino_loss(student, teacher, center, student_temperature, teacher_temperature)[0].backward()
    close([t.detach() for t in tensors], before, rtol=0, atol=0)
    assert all(t.grad is None for t in (*teacher, center))
    q = [F.softmax((t - center) / teacher_temperature, 1).detach() for t in teacher]
    pairs = len(teacher) * (len(student) - 1)
    for v, s in enumerate(student):
        p = F.softmax(s.detach() / student_temperature, 1)
        want = sum([p - each for i, each in enumerate(q) if i != v], torch.zeros_like(p)) / student_temperature
        got = torch.zeros_like(p) if s.grad is None else s.grad  # the only view with a teacher predicts nothing
        close(got, want / len(s) / pairs, rtol=1e-9, atol=1e-10)


@settings(max_examples=10)
@given(logits(rows=st.integers(1, 2)))
def test_gradient_is_that_of_finite_differences(drawn):
    student, teacher, center = drawn
    student = [s.requires_grad_() for s in student]
    assert torch.autograd.gradcheck(lambda *s: dino_loss(list(s), teacher, center, 0.5, 0.1)[0], student, atol=1e-4)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(64, 32, generator=generator).to(half) for _ in range(4)]
    center = torch.randn(32, generator=generator)
    want, _ = dino_loss([v.double() for v in views], [v.double() for v in views[:2]], center.double(), 0.1, 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        got, terms = dino_loss(views, views[:2], center, 0.1, 0.04)
        assert update_center(center, views[:2], 0.5).dtype == torch.float32
    assert got.dtype == terms["entropy"].dtype == torch.float32
    close(got.double(), want, rtol=1e-5, atol=0)
    doubled = [v.double() for v in views]
    assert dino_loss(doubled, doubled[:2], center.double(), 0.1, 0.04)[0].dtype == torch.float64


@given(logits(bound=1.0), st.sampled_from([1e-3, 1e3]))
def test_no_logit_is_too_large(drawn, temperature):
    student, teacher = ([t.float().requires_grad_() for t in each] for each in drawn[:2])
    center = drawn[2].float()
    loss, terms = dino_loss(student, teacher, center, temperature, temperature)
    loss.backward()
    assert torch.stack([loss, *terms.values()]).isfinite().all()
    assert all(s.grad is None or s.grad.isfinite().all() for s in student)


def test_one_view_is_refused():
    scores = torch.zeros(2, 3)
    for student, teacher in (([scores], [scores]), ([scores] * 2, []), ([scores] * 2, [scores] * 3)):
        with pytest.raises(ValueError, match="at least two views"):
            dino_loss(student, teacher, scores[0], 0.1, 0.04)


# ---------------------------------------------------------------------------------------------------- processes


def everything(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, terms, next centre, gradients of three views) averaged over processes as DDP does it."""
    rank, world = common.rank_and_world()
    generator = torch.Generator().manual_seed(seed)
    size = torch.arange(1, 13, dtype=torch.float64)[:, None] / 6  # no symmetry between ranks can hide an error
    views = [torch.randn(12, 5, generator=generator, dtype=torch.float64) * size for _ in range(5)]
    views = [v[common.my_rows(12)].clone().requires_grad_() for v in views]
    center = torch.linspace(-1, 1, 5, dtype=torch.float64)
    loss, terms = dino_loss(views[:3], views[3:], center, 0.5, 0.2)
    loss.backward()
    with torch.no_grad():
        values = common.all_gather(torch.stack([loss, *terms.values()])[None])
        gradients = torch.stack([common.all_gather(v.grad) / world for v in views[:3]])
    return values, update_center(center, views[3:], 0.6), gradients


@pytest.mark.parametrize("world", [2, 4])
def test_loss_gradient_and_centre_are_those_of_one_process(world):
    (want_values,), want_center, want_gradients = everything()
    for values, center, gradients in run_on(world, [(everything, ())])[0]:
        close(values.mean(0), want_values, rtol=1e-10, atol=1e-12)
        close(values[:, 2], want_values[2].expand(world), rtol=1e-10, atol=1e-12)  # the mean of q is of all images
        close(center, want_center, rtol=1e-12, atol=1e-12)
        close(gradients, want_gradients, rtol=1e-10, atol=1e-12)


def train(folder: str, flags: dict) -> dict[str, float]:
    usual, dino.backbone = dino.backbone, methods.narrow
    try:
        return dino.main(methods.tiny("dino", Path(folder), **flags))
    finally:
        dino.backbone = usual


RUNS = {  # 5 steps of 16 images in float64
    "lars": {"freeze_last_layer_epochs": 0.5, "clip_grad": 0.1},
    "adamw vit": {"arch": "vit_tiny", "optimizer": "adamw", "base_lr": 0.01, "weight_decay": 0.1, "max_steps": 3}
    | {"norm_last_layer": False, "freeze_last_layer_epochs": 0.0, "clip_grad": 0.1, "teacher_warmup_epochs": 1.0},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder <number of processes>/<run> for each."""
    root, data = tmp_path_factory.mktemp("worlds"), methods.small_folder()
    shared = {"precision": "fp64", "epochs": 2, "max_steps": 5, "eval_every": 9, "data_dir": data}
    for world in (1, 2):
        run_on(world, [(train, (str(root / str(world) / name), shared | flags)) for name, flags in RUNS.items()])
    return root


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(runs, name):
    one, two = runs / "1" / name, runs / "2" / name
    want, got = (methods.metrics(run) for run in (one, two))
    assert len(want) == len(got) >= 5
    for a, b in zip(want, got, strict=True):
        for key in a.keys() - {"images_per_s"}:
            assert b[key] == pytest.approx(a[key], rel=1e-9, abs=1e-10), (key, a["step"])
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, two))
    for part in ("model", "student"):
        for key, value in one[part].items():
            close(two[part][key], value, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_evaluate_and_torchvision_read_the_vision_transformer(runs, capsys):
    run = runs / "1" / "adamw vit"
    last = [line for line in methods.metrics(run) if "knn_top1" in line][-1]
    record = evaluate.main(evaluate.Args(str(run), precision="fp64"))
    assert record["top1"] == pytest.approx(last["knn_top1"]) and record["arch"] == "vit"
    net = torchvision.models.VisionTransformer(16, 4, num_layers=4, num_heads=2, hidden_dim=128, mlp_dim=512)
    net.heads = nn.Identity()
    net.load_state_dict(torch.load(run / "encoder.pt", weights_only=True))
    with pytest.raises(SystemExit) as end:
        evaluate.main(evaluate.Args(str(run), image_size=32))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "give --image-size 16" in said and said.count("\n") == 1
    torch.save(net.state_dict() | {"heads.head.weight": torch.zeros(3, 128)}, run / "full.pt")
    assert common.read_weights(run / "full.pt").keys() == net.state_dict().keys()
    evaluate.main(evaluate.Args(str(run), protocol="finetune", epochs=1))
    net.heads = nn.Sequential()
    net.heads.head = nn.Linear(128, 4)
    net.load_state_dict(torch.load(run / "finetuned.pt", weights_only=True))


# ------------------------------------------------------------------------------------------------------- network

SMALL = Args(image_size=16, batch_size=4, epochs=5, warmup_epochs=0, log_every=1, save_every=9)
SMALL = dataclasses.replace(SMALL, head_hidden=8, head_dim=6, outputs=12, small_crops=2, small_size=8)


def images(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n, 3, size, size, generator=generator) for size in (16, 16, 8, 8)]


def test_large_crops_come_first():
    sizes = [(crop.size, crop.scale) for crop in dino.crops(Args(**dino.RECIPES["imagenet"]))]
    assert sizes == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 8
    assert [crop.size for crop in dino.crops(Args(image_size=32))] == [32, 32]


def test_the_student_sees_all_views_and_the_teacher_the_large_ones(monkeypatch):
    monkeypatch.setattr(dino, "backbone", methods.narrow)
    model = DINO(SMALL)
    teacher = Teacher(model)
    seen = []
    for module in (model.backbone, model.head, teacher.backbone):
        module.register_forward_hook(lambda _, inputs, output: seen.append(tuple(inputs[0].shape)))
    z, logits = model(images(5))
    targets = teacher(images(5)[:2])
    assert seen == [(10, 3, 16, 16), (10, 3, 8, 8), (20, 16), (10, 3, 16, 16)]
    assert [tuple(t.shape) for t in z] == [(5, 6)] * 4 and [tuple(t.shape) for t in logits] == [(5, 12)] * 4
    w = model.head.last.weight
    for one, scores in zip(z, logits, strict=True):
        close(scores, F.cosine_similarity(one[:, None], w[None], dim=2))  # norm_last_layer
    close(model.head.last.parametrizations.weight.original0, torch.ones(12, 1))
    assert [tuple(t.shape) for t in targets] == [(5, 12)] * 2 and not any(t.requires_grad for t in targets)
    dino_loss(list(logits), list(targets), teacher.center, 0.1, 0.04)[0].backward()
    bare = [name for name, p in model.named_parameters() if p.grad is None]
    assert bare == ["head.last.parametrizations.weight.original0"]
    with torch.autocast("cpu", torch.bfloat16):
        z, logits = model(images(5))
    assert logits[0].dtype == torch.float32
    close(logits[0], z[0] @ model.head.last.weight.T)
    model.eval()
    for one, x in zip(model(images(5))[0], images(5), strict=True):  # in the order of the views
        close(one, model.head(model.backbone(x))[0], rtol=1e-4, atol=1e-5)


def test_the_last_layers_norm_is_trained_on_request(monkeypatch):
    monkeypatch.setattr(dino, "backbone", methods.narrow)
    norm = DINO(dataclasses.replace(SMALL, norm_last_layer=False)).head.last.parametrizations.weight.original0
    assert norm.requires_grad and norm.shape == (12, 1)


def test_a_vision_transformer_is_torchvisions_at_its_size_and_takes_smaller_images():
    torch.manual_seed(0)
    net = VisionTransformer("vit_tiny", 16)
    x = torch.rand(2, 3, 16, 16)
    close(net(x), torchvision.models.VisionTransformer.forward(net, x))
    assert net(torch.rand(2, 3, 8, 8)).shape == (2, 128)
    net(torch.rand(2, 3, 8, 8))[:, 0].sum().backward()  # the sum of all is LayerNorm's constant
    assert (net.encoder.pos_embedding.grad[0, 1:].abs().sum(1) > 0).all()


@given(st.integers(1, 6), st.integers(1, 6), numbers(), numbers())
def test_positions_are_resized_about_the_class_token(side, new, slope, level):
    """A constant grid stays one; so does the class token; a slope keeps its direction, and its middle."""
    ramp = torch.linspace(-1, 1, side, dtype=torch.float64) * (side > 1)
    grid = torch.stack([level + 0 * ramp.expand(side, side), slope * ramp[:, None].expand(side, side)])  # 2×side×side
    token = torch.tensor([[[7.0, 8.0]]], dtype=torch.float64)
    embedding = torch.cat([token, grid.flatten(1).T[None]], 1)  # 1×(1+side²)×2
    got = resize_positions(embedding, new * new)
    assert got.shape == (1, 1 + new * new, 2)
    close(got[:, :1], token)
    flat, tilted = got[0, 1:].T.unflatten(1, (new, new))
    close(flat, torch.full_like(flat, level))
    close(tilted, tilted[:, :1].expand(new, new))
    close(tilted.flip(0), -tilted, rtol=1e-6, atol=1e-6)
    if side == new:
        assert got is embedding


# ---------------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def run(tmp_path, monkeypatch):
    return quick.trainer(dino, SMALL, 8, tmp_path, monkeypatch)


def test_the_centre_is_used_before_it_is_updated_and_kept(run, monkeypatch):
    seen = []

    def spy(student, teacher, center, *temperatures):
        seen.append((center.clone(), torch.cat(teacher), temperatures))
        return dino_loss(student, teacher, center, *temperatures)

    monkeypatch.setattr(dino, "dino_loss", spy)
    flags = {"center_momentum": 0.75, "teacher_temperature": 0.04}
    flags |= {"teacher_temperature_start": 0.02, "teacher_warmup_epochs": 2.0}
    saved = run(max_steps=3, **flags)
    want = torch.zeros(12)
    for center, teacher, _ in seen:
        close(center, want)
        want = 0.75 * want + 0.25 * teacher.mean(0)
    close(saved["model"]["center"], want)
    assert [t for *_, (_, t) in seen] == pytest.approx([0.02, 0.025, 0.03])
    assert not run("uncentred", max_steps=3, centering=False, **flags)["model"]["center"].any()


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_the_teacher_moves_after_the_optimizer_and_by_m_and_is_what_is_kept(run, optimizer, tmp_path):
    flags = dict(optimizer=optimizer, teacher_momentum=0.75, weight_decay=0.1, base_lr=0.1)
    first, second = run(max_steps=1, **flags), run("longer", max_steps=2, **flags)
    m = 1 - 0.25 * (math.cos(math.pi / 10) + 1) / 2  # step 1 of 10
    names = [name for name in first["model"] if name.endswith(("weight", "bias", "original1"))]
    assert len(names) > 10
    for name in names:
        want = m * first["model"][name] + (1 - m) * second["student"][name]
        close(second["model"][name], want, rtol=1e-5, atol=1e-7)
    encoder, heads = (torch.load(tmp_path / "longer" / file, weights_only=True) for file in ("encoder.pt", "heads.pt"))
    assert {f"backbone.{name}": w for name, w in encoder.items()}.keys() | heads.keys() == second["model"].keys()
    assert torch.equal(encoder["0.weight"], second["model"]["backbone.0.weight"])
    assert not torch.equal(encoder["0.weight"], second["student"]["backbone.0.weight"])


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_the_frozen_last_layer_neither_moves_nor_gathers_momentum(run, optimizer):
    flags = dict(optimizer=optimizer, weight_decay=0.1, norm_last_layer=False, freeze_last_layer_epochs=1.5)
    names = [f"head.last.parametrizations.weight.original{i}" for i in (0, 1)]
    start = dict(run("start", max_steps=1, **flags)["student"])
    frozen, thawed = run("frozen", max_steps=3, **flags), run("thawed", max_steps=5, **flags)  # 2 steps are an epoch
    for name in names:
        assert torch.equal(frozen["student"][name], start[name])
        assert not torch.equal(thawed["student"][name], start[name])
    assert not torch.equal(frozen["student"]["head.mlp.0.weight"], start["head.mlp.0.weight"])
    assert len(thawed["optimizer"]["state"]) - len(frozen["optimizer"]["state"]) == 2


@given(st.lists(matrices(), min_size=1, max_size=4), st.floats(0.01, 10.0))
def test_each_gradient_is_clipped_on_its_own(gradients, norm):
    model = nn.ParameterList([nn.Parameter(torch.zeros_like(g)) for g in gradients])
    model.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    for p, gradient in zip(model, gradients, strict=False):
        p.grad = gradient.clone()
    clip_gradients(model, norm)
    for p, gradient in zip(model, gradients, strict=False):
        close(p.grad, gradient * min(1.0, norm / (gradient.norm().item() + 1e-6)))
    assert model[len(gradients)].grad is None


def test_a_step_clips_the_gradients(run):
    """The momentum buffers of the first step are the gradients that the optimizer was given."""
    free, clipped = (
        [s["momentum_buffer"].norm().item() for s in run(name, max_steps=1, optimizer="sgd", weight_decay=0.0,
                                                         clip_grad=clip)["optimizer"]["state"].values()]
        for name, clip in (("free", 0.0), ("clipped", 0.01))
    )  # fmt: skip
    assert max(free) > 0.02 and min(free) < 0.01
    assert clipped == pytest.approx([min(norm, 0.01) for norm in free], rel=1e-3)


def test_weight_decay_follows_its_cosine_and_spares_biases(run):
    groups = run(max_steps=6, optimizer="adamw", weight_decay=0.04, weight_decay_end=0.4)["optimizer"]["param_groups"]
    assert groups[0]["weight_decay"] == pytest.approx(0.22)  # step 5 of 10
    assert groups[1]["weight_decay"] == 0
    assert run("constant", max_steps=6, weight_decay=0.04)["optimizer"]["param_groups"][0]["weight_decay"] == 0.04


def test_the_teachers_temperature_rises_over_its_warm_up():
    args = Args(teacher_temperature=0.07, teacher_temperature_start=0.04, teacher_warmup_epochs=30)
    assert [teacher_temperature(args, e) for e in (0, 10, 30, 99)] == pytest.approx([0.04, 0.05, 0.07, 0.07])
    assert teacher_temperature(Args(teacher_temperature=0.1), 0) == 0.1


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_a_run_that_was_stopped_continues_to_the_same_checkpoint(run, optimizer):
    flags = dict(optimizer=optimizer, base_lr=0.1, freeze_last_layer_epochs=1.0, weight_decay_end=0.1)
    whole = run("whole", **flags)
    run("stopped", max_steps=5, **flags)
    resumed = run("stopped", **flags)
    flat = [torch.utils._pytree.tree_flatten(saved)[0] for saved in (whole, resumed)]
    assert len(flat[0]) == len(flat[1]) > 60
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b or isinstance(a, int)  # bytes of the log differ


# ------------------------------------------------------------------------------------------------------- collapse

LONG = dict(image_size=16, batch_size=16, head_hidden=32, head_dim=16, outputs=16, optimizer="adamw", base_lr=0.1)
LONG |= dict(epochs=30, log_every=10, save_every=99, warmup_epochs=0, weight_decay=0.0, freeze_last_layer_epochs=0.0)


@pytest.mark.parametrize(
    "flags, told",
    [
        ({}, ""),
        ({"teacher_temperature": 0.3}, "the teacher gives all outputs alike"),
        ({"centering": False}, "one output wins for all images"),
    ],
)
def test_without_sharpening_or_centring_it_collapses_and_says_so_once(flags, told, tmp_path, monkeypatch, capsys):
    quick.trainer(dino, Args(**LONG, **flags), 32, tmp_path, monkeypatch)()
    lines = [line for line in capsys.readouterr().err.splitlines() if "output" in line]
    assert len(lines) == bool(told)
    assert not told or (lines[0].startswith("warning: collapse at step") and told in lines[0])


def test_sharp_and_even_outputs_are_no_collapse(capsys):
    for entropy, entropy_of_mean in ((0.01, 2.7), (2.6, 2.77), (0.5, 0.6)):
        terms = {"entropy": torch.tensor(entropy), "entropy_of_mean": torch.tensor(entropy_of_mean)}
        assert dino.warn_of_collapse(1, terms, 16, "") == ""  # log 16 = 2.77
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------- flags

WRONG = {
    "--outputs 1": "nothing to predict",
    "--teacher-temperature 0": "--teacher-temperature must be at least 0.0001",
    "--student-temperature -1": "--student-temperature must be at least 0.0001",
    "--teacher-temperature-start 0": "--teacher-temperature-start must be at least 0.0001",
    "--head-hidden 0": "--head-hidden must be 1 to 32768",
    "--head-dim 0": "--head-dim must be 1 to 32768",
    "--weight-decay-end -1": "--weight-decay-end must be at least 0",
    "--teacher-warmup-epochs nan": "--teacher-warmup-epochs must be at least 0",
    "--freeze-last-layer-epochs -1": "--freeze-last-layer-epochs must be at least 0",
    "--clip-grad -1": "--clip-grad must be at least 0",
    "--center-momentum 1.5": "--center-momentum 1.5 is not between 0 and 1",
    "--teacher-momentum nan": "--teacher-momentum nan is not between 0 and 1",
    "--small-crops 17": "--small-crops 17 must be 0 to 16",
    "--small-crops 2 --small-size 33": "--small-size 33 must be 1 to --image-size 32",
    "--small-crops 2 --small-scale 0.4 0.2": "the smaller one first",
    "--arch vit_huge": "take vit_tiny or vit_small, or a ResNet",
    "--arch vit_tiny --image-size 30": "--image-size 30 is no multiple of 4",
    "--arch vit_tiny --small-crops 1 --small-size 10": "--small-size 10 is no multiple of 4",
    "--optimizer adam": "--optimizer",
}


@pytest.mark.parametrize("line", WRONG)
def test_impossible_flags_are_answered_in_one_line(line, capsys):
    with pytest.raises(SystemExit) as end:
        dino.check(common.parse_args(Args, dino.RECIPES, f"--image-size 32 {line}".split()))
    told = capsys.readouterr().err
    assert end.value.code == 2 and WRONG[line] in told and told.count("\n") == 1


@pytest.mark.parametrize("recipe", dino.RECIPES)
def test_recipes_are_possible(recipe):
    dino.check(common.parse_args(Args, dino.RECIPES, ["--recipe", recipe, "--data-dir", "x"]))
