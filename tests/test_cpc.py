"""CPC's loss against an independent oracle and the reference numbers; what contexts and encoder may see; the run."""

import copy
import math
from pathlib import Path

import pytest
import quick
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import metrics, narrow, small_folder, tiny
from PIL import Image
from strategies import matrices
from torch import Tensor, nn
from worlds import run_on

import common
import cpc
import evaluate
import moco
from cpc import CPC, Context, cpc_loss, patches

close = torch.testing.assert_close
TEMPERATURES = st.sampled_from([0.2, 0.5, 1.0, 3.0])


@st.composite
def lists(draw, most: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions and targets for one to three k, (n, rows, columns, d) float64 each; a larger k has fewer rows."""
    n, columns, d, count = (draw(st.integers(1, most)) for _ in range(4))
    sides = []
    for _ in range(2):
        flat = [draw(matrices(st.just(n * (k + 1) * columns), st.just(d), 3.0)) for k in reversed(range(count))]
        sides.append([t.reshape(n, -1, columns, d) for t in flat])
    return sides[0], sides[1]


def in_plain_loops(predictions: list[Tensor], targets: list[Tensor], temperature: float) -> dict[str, float]:
    """Eq. 4, one prediction and one candidate at a time."""
    losses, bounds = [], []
    for p, z in zip(predictions, targets, strict=True):
        p, z = (t.reshape(-1, t.shape[-1]).tolist() for t in (p, z))
        total = 0.0
        for i, row in enumerate(p):
            score = [sum(a * b for a, b in zip(row, other, strict=True)) / temperature for other in z]
            total += math.log(sum(math.exp(s - max(score)) for s in score)) + max(score) - score[i]
        losses.append(total / len(p))
        bounds.append(math.log(len(z)) - total / len(p))
    return {"loss": sum(losses) / len(losses), "information": sum(bounds) / len(bounds)}


# ------------------------------------------------------------------------------------------------------- loss


def test_the_reference_numbers():
    u = torch.arange(36, dtype=torch.float64)
    z, c = (t.reshape(2, 3, 3, 2).requires_grad_() for t in (torch.sin(u + 1), torch.cos(0.7 * u)))
    w = torch.tensor([[[1, 0.5], [-0.5, 1]], [[0.3, -1], [1, 0.2]]], dtype=torch.float64)
    predictions = [c[:, :-k] @ w[k - 1].T for k in (1, 2)]
    loss, _ = cpc_loss(predictions, [z[:, k:] for k in (1, 2)], 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1.82647348, abs=5e-9)
    assert [z.grad.norm().item(), c.grad.norm().item()] == pytest.approx([0.22941450, 0.20267298], abs=5e-9)


@given(lists(), TEMPERATURES)
def test_equals_the_equation_in_plain_loops(drawn, temperature):
    loss, terms = cpc_loss(*drawn, temperature)
    want = in_plain_loops(*drawn, temperature)
    assert loss.item() == pytest.approx(want["loss"], rel=1e-9, abs=1e-9)
    assert terms["information"].item() == pytest.approx(want["information"], rel=1e-9, abs=1e-9)


@given(lists(), TEMPERATURES)
def test_predictions_or_targets_that_are_all_the_same_cost_log_of_the_number_of_targets(drawn, temperature):
    predictions, targets = drawn
    want = sum(math.log(t.shape[:-1].numel()) for t in targets) / len(targets)
    for p, z in ((predictions, [t[:1, :1, :1].expand_as(t) for t in targets]), ([0 * p for p in predictions], targets)):
        loss, terms = cpc_loss(p, z, temperature)
        assert loss.item() == pytest.approx(want, abs=1e-9)
        assert terms["information"].item() == pytest.approx(0, abs=1e-9)


@given(lists(), st.randoms(use_true_random=False))
def test_what_changes_nothing(drawn, random):
    """The order of the patches, a vector that all targets share, and a factor that the temperature has, too."""
    predictions, targets = drawn
    want = cpc_loss(predictions, targets, 0.5)[0]
    changed = []
    for p, z in zip(predictions, targets, strict=True):
        p, z = p.flatten(0, 2), z.flatten(0, 2)
        order = random.sample(range(len(p)), len(p))
        changed.append((3 * p[order], z[order] + random.uniform(-1, 1)))
    close(cpc_loss(*(list(side) for side in zip(*changed, strict=True)), 1.5)[0], want, rtol=1e-9, atol=1e-9)


def test_accuracy_counts_the_targets_that_come_first():
    z = torch.eye(4).reshape(2, 2, 1, 4)
    assert cpc_loss([z], [z], 1.0)[1]["accuracy"].item() == 1
    assert cpc_loss([z], [z.flip(0)], 1.0)[1]["accuracy"].item() == 0
    assert cpc_loss([z, z], [z, z.flip(1)], 1.0)[1]["accuracy"].item() == 0.5


@settings(max_examples=10)
@given(lists(most=2))
def test_gradient_is_that_of_finite_differences_for_predictions_and_targets(drawn):
    predictions, targets = drawn
    flat = [t.requires_grad_() for t in predictions + targets]

    def loss(*flat: Tensor) -> Tensor:
        return cpc_loss(flat[: len(predictions)], flat[len(predictions) :], 0.7)[0]

    assert torch.autograd.gradcheck(loss, flat)


@given(lists(), TEMPERATURES)
def test_terms_have_no_gradient_and_inputs_are_left_alone(drawn, temperature):
    before = copy.deepcopy(drawn)
    for t in (*drawn[0], *drawn[1]):
        t.requires_grad_()
    loss, terms = cpc_loss(*drawn, temperature)
    assert loss.requires_grad and not any(term.requires_grad or term.ndim for term in terms.values())
    loss.backward()
    close([[t.detach() for t in side] for side in drawn], list(before), rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    p, z = ((3 * torch.randn(4, 4, 2, 32, generator=generator)).to(half) for _ in range(2))
    want, _ = cpc_loss([p.double()], [z.double()], 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got, terms = cpc_loss([p], [z], 1.0)
        also, _ = cpc_loss([p.float()], [z.float()], 1.0)
    assert {got.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    assert want.dtype == torch.float64
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


# ---------------------------------------------------------------------------------------------- views, network


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5))
def test_patches_are_those_that_slicing_finds(height, width, size, stride):
    size = min(size, height, width)
    x = torch.arange(2 * 3 * height * width).reshape(2, 3, height, width)
    got = patches(x, size, stride)
    rows, columns = (len(range(0, side - size + 1, stride)) for side in (height, width))
    assert got.shape == (2, rows, columns, 3, size, size)
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            assert torch.equal(got[:, i, j], x[:, :, top : top + size, left : left + size])


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_a_context_sees_the_rows_down_to_its_own_and_nothing_below(blocks):
    """The gradient of c_ij with respect to every z is exactly zero in the rows below i; above, it reaches its depth."""
    torch.manual_seed(0)
    context, rows = Context(3, 8, blocks).double(), 5
    z = torch.randn(1, rows, rows, 3, dtype=torch.float64, requires_grad=True)
    c = context(z)
    assert c.shape == z.shape
    for i in range(rows):
        (slope,) = torch.autograd.grad(c[0, i].sum(), z, retain_graph=True)
        seen = slope[0].abs().sum((1, 2)) > 0  # by row
        assert seen.tolist() == [i - blocks <= row <= i for row in range(rows)]
        (slope,) = torch.autograd.grad(c[0, i, 2].sum(), z, retain_graph=True)
        seen = slope[0].abs().sum((0, 2)) > 0  # by column
        assert seen.tolist() == [abs(column - 2) <= blocks for column in range(rows)]
    for block in context.blocks:
        nn.init.zeros_(block.last.weight)
        nn.init.zeros_(block.last.bias)
    close(context(z), z, rtol=0, atol=0)  # what the blocks find is added


def network(tmp_path: Path, **flags) -> tuple[CPC, cpc.Args]:
    torch.manual_seed(0)
    args = tiny("cpc", tmp_path, **flags)
    return CPC(args), args


SIDES = {0: "above", 1: "the right", 2: "below", 3: "the left"}


@pytest.mark.parametrize("stride", [3, 4, 5])
def test_a_prediction_depends_on_no_pixel_of_its_target(stride, tmp_path, monkeypatch):
    monkeypatch.setattr(cpc, "backbone", narrow)
    model, args = network(tmp_path, image_size=20, patch_size=8, patch_stride=stride)
    size, _, rows, distances = cpc.grid(args)
    x = torch.randn(1, 3, 20, 20, requires_grad=True)
    predictions, targets, _ = model.double()(patches(x.double(), size, stride))
    assert len(predictions) == len(targets) == 4 * len(distances)
    pairs = iter(zip(predictions, targets, strict=True))
    for _ in SIDES:
        for k in distances:
            prediction, target = next(pairs)
            assert prediction.shape == target.shape == (1, rows - k, rows, args.target_dim)
            for i in range(rows - k):
                for j in range(rows):
                    for_it, of_it = (
                        torch.autograd.grad(t[0, i, j].sum(), x, retain_graph=True)[0].abs().sum((0, 1)) > 0
                        for t in (prediction, target)
                    )
                    assert for_it.any() and of_it.any() and not (for_it & of_it).any()


def test_the_nearest_row_is_the_first_that_shares_no_pixels(tmp_path):
    args = tiny("cpc", tmp_path, image_size=20, patch_size=8, patch_stride=4)
    assert cpc.grid(args) == (8, 4, 4, range(2, 4))
    with_shared = tiny("cpc", tmp_path, image_size=20, patch_size=8, patch_stride=4, nearest_row=1, farthest_row=2)
    assert cpc.grid(with_shared).distances == range(1, 3)
    v1 = cpc.grid(cpc.Args(**cpc.RECIPES["imagenet"]))
    assert v1 == (64, 32, 7, range(2, 6))


class FirstNumber(nn.Module):
    def forward(self, cells: Tensor) -> Tensor:
        return cells[:, 0, 0, :1]


def test_each_direction_finds_its_targets_on_the_far_side(tmp_path):
    """With features that are the numbers of the patches and contexts that are handed through."""
    model, args = network(tmp_path)
    rows = cpc.grid(args).rows
    assert rows == 3
    model.encoder.backbone = FirstNumber()
    model.projector = nn.Identity()
    model.contexts = nn.ModuleList(nn.Identity() for _ in SIDES)
    model.predictors = nn.ModuleList(nn.ModuleList([nn.Identity()]) for _ in SIDES)
    number = torch.arange(9.0).reshape(1, 3, 3, 1, 1, 1).expand(1, 3, 3, 3, 8, 8)
    predictions, targets, _ = model(number)
    found = []
    for p, z in zip(predictions, targets, strict=True):
        found.append(set(zip(p.flatten().tolist(), z.flatten().tolist(), strict=True)))
    top, bottom, left, right = [0, 1, 2], [6, 7, 8], [0, 3, 6], [2, 5, 8]
    want = [(top, bottom), (right, left), (bottom, top), (left, right)]
    assert found == [set(zip(a, b, strict=True)) for a, b in want]


def test_one_direction_is_that_from_above(tmp_path):
    model, _ = network(tmp_path, all_directions=False)
    assert len(model.contexts) == len(model.predictors) == 1
    cells = torch.randn(2, 3, 3, 3, 8, 8)
    both = network(tmp_path)[0]
    both.load_state_dict(model.state_dict(), strict=False)
    for one, four in zip(model(cells)[:2], both(cells)[:2], strict=True):
        close(one[0], four[0])


def test_no_image_sees_another(tmp_path):
    """Features, predictions and targets of an image are the same in any batch, also in training."""
    model, _ = network(tmp_path)
    assert not any(name.endswith("running_mean") for name in model.state_dict())
    cells = torch.randn(3, 3, 3, 3, 8, 8)
    cells[1] *= 50
    whole, alone = model.train()(cells), model(cells[:1])
    for many, one in zip([*whole[0], *whole[1]], [*alone[0], *alone[1]], strict=True):
        close(many[:1], one, rtol=1e-4, atol=1e-5)


def test_every_weight_gets_a_gradient_and_the_loss_starts_at_log_of_the_targets(tmp_path):
    model, _ = network(tmp_path, image_size=20, patch_size=8)
    for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.ones_(norm.weight)  # or a branch that starts at zero hides its convolutions
    predictions, targets, _ = model(torch.randn(4, 4, 4, 3, 8, 8))
    loss, terms = cpc_loss(predictions, targets, 1.0)
    loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())
    assert terms["information"].abs().item() < 0.1


def test_group_norm_has_sixteen_channels_a_group_and_batch_norm_is_the_default():
    group, width = common.backbone("resnet18", "small", zero_init=True, norm="group")
    assert width == 512 and not any(isinstance(m, nn.BatchNorm2d) for m in group.modules())
    assert {m.num_channels // m.num_groups for m in group.modules() if isinstance(m, nn.GroupNorm)} == {16}
    assert all(block.bn2.weight.abs().max() == 0 for block in group.layer2)
    states = []
    for norm in ({}, {"norm": "batch"}):
        torch.manual_seed(0)
        states.append(common.backbone("resnet10", "imagenet", zero_init=False, **norm)[0].state_dict())
    close(*states, rtol=0, atol=0)
    assert "bn1.running_mean" in states[0]


# ------------------------------------------------------------------------------------------------ runs, files


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of a true ResNet on textures of 16 pixels, which are told apart now and then, in patches of 8."""
    root = tmp_path_factory.mktemp("cpc")
    for split, count in (("train", 80), ("test", 60)):
        textures = common.patterns(split, count)
        for i, pixels in enumerate(textures.pixels[:, :, :16, :16].permute(0, 2, 3, 1).numpy()):
            file = root / "images" / split / str(i % 10) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    cpc.main(tiny("cpc", root / "run", data_dir=str(root / "images"), epochs=1, warmup_epochs=0))
    return root / "run"


def test_evaluate_finds_what_the_run_found(finished, tmp_path, capsys):
    """It cuts the patches itself, by what encoder.pt says of them."""
    saved = torch.load(finished / "encoder.pt", weights_only=True)
    assert saved["patches"].tolist() == [8, 4] and "backbone.layer4.0.conv1.weight" in saved
    assert {name.split(".")[0] for name in saved} == {"patches", "backbone"}
    heads = torch.load(finished / "heads.pt", weights_only=True)
    assert {name.split(".")[0] for name in heads} == {"projector", "contexts", "predictors"}
    found = evaluate.main(evaluate.Args(str(finished), output=str(tmp_path)))
    assert found["top1"] == metrics(finished)[-1]["knn_top1"] and found["arch"] == "resnet10"
    assert "left out" not in capsys.readouterr().err
    scratch = evaluate.main(evaluate.Args(str(finished), scratch=True, output=str(tmp_path)))
    assert 0.1 < found["top1"] < 1 and scratch["top1"] != found["top1"]


def test_the_features_are_the_mean_over_the_patches(finished):
    state = common.read_weights(finished / "encoder.pt")
    grid = state.pop("patches")
    net, _ = common.backbone("resnet10", "imagenet", zero_init=False, norm="group")
    net.load_state_dict(state)
    x = torch.rand(2, 3, 17, 17)
    want = torch.stack([net(x[:, :, i : i + 8, j : j + 8]) for i in (0, 4, 8) for j in (0, 4, 8)]).mean(0)
    for encoder in (cpc.Encoder(net, 8, 4), evaluate.PatchMean(net, grid)):
        close(encoder(x), want, rtol=1e-4, atol=1e-5)


def test_a_finetuned_encoder_is_judged_again(finished, tmp_path):
    evaluate.main(evaluate.Args(str(finished), protocol="finetune", epochs=1, output=str(tmp_path)))
    state = torch.load(tmp_path / "finetuned.pt", weights_only=True)
    assert state["patches"].tolist() == [8, 4] and {"fc.weight", "fc.bias"} < state.keys()
    where = {"dataset": "folder", "data_dir": small_folder(), "output": str(tmp_path)}
    again = evaluate.main(evaluate.Args(str(tmp_path / "finetuned.pt"), image_size=16, k=5, **where))
    assert again["arch"] == "resnet10"


def test_a_run_starts_from_a_run_of_its_kind(finished, tmp_path):
    cpc.main(tiny("cpc", tmp_path / "run", init=str(finished), max_steps=1))  # at a learning rate of 0
    saved = [torch.load(run / "encoder.pt", weights_only=True) for run in (finished, tmp_path / "run")]
    close(*saved, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["moco", "cpc"])
def test_a_norm_that_does_not_fit_is_named_in_one_line(method, finished, tmp_path, capsys):
    """A run of CPC starts from none of another method, and none of another method from CPC's."""
    file = finished / "encoder.pt"
    if method == "cpc":
        file = tmp_path / "encoder.pt"
        torch.save(common.backbone("resnet10", "imagenet", zero_init=False)[0].state_dict(), file)
    with pytest.raises(SystemExit) as end:
        {"cpc": cpc, "moco": moco}[method].main(tiny(method, tmp_path / "run", init=str(file)))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert f"--init {file} does not fit" in said and "BatchNorm" in said and "GroupNorm" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "patches, size, named",
    [
        (torch.tensor([8, 4]), 7, "give --image-size 8 or more"),
        (torch.tensor([8, 0]), 16, "two whole numbers above 0"),
        (torch.tensor([8.0, 4.0]), 16, "two whole numbers above 0"),
        (torch.tensor([8, 4, 2]), 16, "two whole numbers above 0"),
        (torch.empty(2, dtype=torch.long, device="meta"), 16, "two whole numbers above 0"),
        ("8 4", 16, "two whole numbers above 0"),
    ],
)
def test_patches_that_do_not_fit_are_refused_in_one_line(patches, size, named, finished, tmp_path, capsys):
    state = torch.load(finished / "encoder.pt", weights_only=True)
    torch.save({**state, "patches": patches}, tmp_path / "weights.pt")
    where = {"dataset": "folder", "data_dir": small_folder(), "image_size": size, "output": str(tmp_path)}
    with pytest.raises(SystemExit) as end:
        evaluate.main(evaluate.Args(str(tmp_path / "weights.pt"), k=5, **where))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said


@pytest.fixture
def train(tmp_path, monkeypatch):
    args = cpc.Args(image_size=16, batch_size=8, target_dim=6, context_hidden=8, epochs=2, warmup_epochs=0)
    return quick.trainer(cpc, args, 40, tmp_path, monkeypatch)


@pytest.mark.parametrize("optimizer", ["adam", "lars", "sgd"])
def test_a_resumed_run_goes_on_to_the_same_weights(optimizer, train):
    flags = {"optimizer": optimizer, "base_lr": 0.05 if optimizer == "sgd" else 4e-3}
    train("parts", max_steps=4, **flags)
    whole, parts = train("whole", max_steps=7, **flags), train("parts", max_steps=7, **flags)
    assert whole["model"].keys() == parts["model"].keys()
    for key, tensor in whole["model"].items():
        close(parts["model"][key], tensor, rtol=0, atol=0)


def test_every_patch_has_draws_of_its_own(train, monkeypatch):
    """Two patches with the same pixels are cropped, coloured and flipped differently, and anew at each step."""
    seen = []

    def spy(x, draws, args):
        seen.append(augment(pixels.expand_as(x), draws, args))
        return augment(x, draws, args)

    augment, pixels = cpc.augment, torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(cpc, "augment", spy)
    train(max_steps=2, color_jitter=True, patch_flip=True)
    assert seen[0].shape == (8 * 9, 3, 8, 8)
    assert (
        len({tuple(patch.flatten().tolist()) for step in seen for patch in step}) > 110
    )  # of 144, some left as they are


IMPOSSIBLE = [
    ({"temperature": 0.0}, "--temperature "),
    ({"temperature": math.nan}, "--temperature "),
    ({"target_dim": 0}, "--target-dim "),
    ({"context_hidden": 0}, "--context-hidden "),
    ({"context_blocks": 0}, "--context-blocks "),
    ({"jitter_strength": -1.0}, "--jitter-strength "),
    ({"patch_min_scale": 1.1}, "--patch-min-scale "),
    ({"gray_share": -0.1}, "--gray-share "),
    ({"patch_size": 17}, "--patch-size must be 0 to 16, not 17"),
    ({"patch_size": -1}, "--patch-size "),
    ({"patch_stride": -1}, "--patch-stride "),
    ({"nearest_row": -1}, "--nearest-row "),
    ({"patch_size": 16}, "make 1 row"),
    ({"patch_size": 10}, "make 2 rows"),
    ({"nearest_row": 3}, "make 3 rows"),
    ({"farthest_row": 1}, "--farthest-row 1"),
    ({"farthest_row": 3}, "take 2 or less"),
]


@pytest.mark.parametrize("flags, named", IMPOSSIBLE)
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cpc.main(tiny("cpc", tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", cpc.RECIPES)
def test_the_recipes_fit(recipe, monkeypatch):
    args = cpc.Args(**{"image_size": 32, **cpc.RECIPES[recipe]}, recipe=recipe)
    cpc.check(args)
    with torch.device("meta"):
        CPC(args)


# -------------------------------------------------------------------------------------------------- processes


def gradient() -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) averaged over ranks as DDP does it; rows that grow from rank to rank."""
    _, world = common.rank_and_world()
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1, 9, dtype=torch.float64)[:, None, None, None] / 4
    rows, sides = common.my_rows(8), []
    for count in (2, 1, 2, 1):
        whole = torch.randn(8, count, 3, 5, generator=generator, dtype=torch.float64) * size
        sides.append(whole[rows].clone().requires_grad_())
    loss, terms = cpc_loss(sides[:2], sides[2:], 0.8)
    loss.backward()
    with torch.no_grad():
        numbers = common.all_gather(torch.stack([loss, *terms.values()])[None]).mean(0)
        return numbers, [common.all_gather(t.grad) / world for t in sides]


def run_train(folder: str, data_dir: str, steps: int) -> None:
    cpc.backbone = narrow
    flags = {"epochs": 2, "max_steps": steps, "eval_every": 2, "save_every": 2, "precision": "fp64"}
    cpc.main(tiny("cpc", Path(folder), data_dir=data_dir, **flags))


def test_several_processes_give_the_gradient_of_one_and_the_same_run(tmp_path):
    """Begun on two processes, a run goes on on one, too."""
    want, gradients = gradient()
    assert all(g.abs().max() > 1e-6 for g in gradients)
    data = small_folder()

    def job(name: str, steps: int):
        return run_train, (str(tmp_path / name), data, steps)

    run_on(1, [job("1", 6)])
    for world in (2, 4):
        jobs = [(gradient, ())] + [job("2", 6), job("2 then 1", 3)] * (world == 2)
        for numbers, got in run_on(world, jobs)[0]:
            close(numbers, want, rtol=1e-10, atol=1e-12)
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
