"""CMC's colours and loss against independent oracles and reference numbers; its encoder in files, and processes."""

import copy
import itertools
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import quick
import torch
import torch.nn.functional as F
import torchvision
import vectors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods import metrics, narrow, small_folder, tiny
from PIL import Image
from strategies import matrices
from torch import Tensor, nn
from worlds import run_on

import cmc
import common
import evaluate
import simclr
from cmc import CMC, SPACES, Backbones, cmc_loss, split

close = torch.testing.assert_close
TEMPERATURES = st.sampled_from([0.05, 0.1, 0.5, 1.0, 3.0])
ROWS = st.integers(1, 6)


@st.composite
def several(draw, least: int = 2, rows=ROWS) -> list[Tensor]:
    """Embeddings of M views, (n, d) each."""
    n, d = st.just(draw(rows)), st.just(draw(st.integers(1, 5)))
    return [draw(matrices(n, d)) for _ in range(draw(st.integers(least, 4)))]


def long(views: list[Tensor]) -> bool:
    """No row near 0, where the direction and with it the loss jump."""
    return min(z.norm(dim=1).min().item() for z in views) > 0.1


def named_narrow(arch: str, stem: str, zero_init: bool) -> tuple[nn.Module, int]:
    """`narrow`, with a first convolution of a ResNet's name."""
    net, width = narrow(arch, stem, zero_init)
    return nn.Sequential(OrderedDict(zip(["conv1", *"abcdefg"], net.children(), strict=True))), width


# ---------------------------------------------------------------------------------------------------- colours


def lab_from_chromaticities(color: tuple[float, float, float]) -> list[float]:
    """CIE L*a*b* of an sRGB colour, from the chromaticities of its primaries (ITU-R BT.709) and white (D65) alone."""

    def xyz(x: float, y: float) -> list[float]:
        return [x / y, 1, (1 - x - y) / y]

    primaries = np.array([xyz(0.64, 0.33), xyz(0.3, 0.6), xyz(0.15, 0.06)]).T
    white = np.array(xyz(0.3127, 0.3290))
    matrix = primaries * np.linalg.solve(primaries, white)  # so that (1, 1, 1) is white
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    epsilon, kappa = 216 / 24389, 24389 / 27  # CIE 15
    f = [t ** (1 / 3) if t > epsilon else (kappa * t + 16) / 116 for t in matrix @ linear / white]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


def ycbcr_of_jfif(color: tuple[float, float, float]) -> list[float]:
    """The matrix as JFIF 1.02 prints it, to four digits."""
    matrix = [[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]]
    return [sum(m * c for m, c in zip(row, color, strict=True)) for row in matrix]


LEVELS = st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.sampled_from([0.0, 0.04045, 0.0405, 1.0]))


@given(st.lists(st.tuples(LEVELS, LEVELS, LEVELS), min_size=8, max_size=8))
def test_colours_are_those_of_the_standards(colors):
    x = torch.tensor(colors, dtype=torch.float64).T.reshape(3, 2, 2, 2).transpose(0, 1)  # pixels of two images
    order = [color for image in x.flatten(2).transpose(1, 2).tolist() for color in image]

    def flat(views: list[Tensor]) -> Tensor:
        return torch.cat(views, dim=1).flatten(2).transpose(1, 2).reshape(8, 3)

    lab = torch.tensor([lab_from_chromaticities(c) for c in order], dtype=torch.float64)
    close(100 * flat(split(x, "lab")), lab, rtol=0, atol=2e-3)
    close(flat(split(x, "ycbcr")), torch.tensor([ycbcr_of_jfif(c) for c in order]).double(), rtol=0, atol=1e-4)
    close(torch.cat(split(x, "rgb"), 1), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    "color, want",
    [
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_published_values_of_lab(color, want):
    light, colour = split(torch.tensor(color, dtype=torch.float64).reshape(1, 3, 1, 1), "lab")
    assert (100 * torch.cat([light, colour], 1)).flatten().tolist() == pytest.approx(want, abs=0.02)


def test_ycbcr_is_that_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    want = torch.from_numpy(np.array(Image.fromarray(pixels).convert("YCbCr"))).permute(2, 0, 1)[None].double()
    y, color = split(torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255, "ycbcr")
    close(255 * torch.cat([y, color], 1) + torch.tensor([0.0, 128, 128])[:, None, None], want, rtol=0, atol=1.01)


@given(LEVELS)
def test_grey_has_no_colour_and_lightness_keeps_its_order(level):
    x = torch.tensor([level, level / 2], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 3, 2, 2)
    for space in ("lab", "ycbcr"):
        lightness, color = split(x, space)
        close(color, torch.zeros(2, 2, 2, 2, dtype=torch.float64), rtol=0, atol=1e-12)
        assert (lightness[0] >= lightness[1]).all()


def test_ranges_are_as_documented_and_reached():
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    x = torch.cat([corners, torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))])[..., None, None]
    for space, low, high in (("lab", [0, -0.87, -1.08], [1, 0.99, 0.95]), ("ycbcr", [0, -0.5, -0.5], [1, 0.5, 0.5])):
        found = torch.cat(split(x, space), 1)
        assert found.isfinite().all()
        for got, want in ((found.amin((0, 2, 3)), low), (found.amax((0, 2, 3)), high)):
            close(got, torch.tensor(want).float(), rtol=0, atol=0.01)


@pytest.mark.parametrize("space", SPACES)
def test_splitting_leaves_images_alone_and_is_exact_under_autocast(space):
    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before, want = x.clone(), split(x, space)
    assert [view.shape[1] for view in want] == list(SPACES[space].values())
    with torch.autocast("cpu", torch.bfloat16):
        close(split(x, space), want, rtol=0, atol=0)
    close(x, before, rtol=0, atol=0)


def test_evaluate_splits_in_the_same_way():
    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert {space: dict(views) for space, views in evaluate.COLOR_VIEWS.items()} == SPACES
    for space in SPACES:
        close(evaluate.split_colors(x, space), split(x, space), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- loss


def dot(a: list[float], b: list[float]) -> float:
    norms = [max(math.sqrt(sum(x * x for x in row)), 1e-12) for row in (a, b)]
    return sum(x / norms[0] * y / norms[1] for x, y in zip(a, b, strict=True))


def one_direction(a: list[list[float]], b: list[list[float]], temperature: float) -> float:
    """Each row of a has to find its own row of b."""
    total = 0.0
    for i, row in enumerate(a):
        similarity = [dot(row, other) / temperature for other in b]
        largest = max(similarity)
        total += math.log(sum(math.exp(s - largest) for s in similarity)) + largest - similarity[i]
    return total / len(a)


def in_plain_loops(z: list[list[list[float]]], temperature: float, core: int | None) -> float:
    total = 0.0
    for i in range(len(z)):
        for j in range(i):
            if core is None or i == core or j == core:
                total += one_direction(z[i], z[j], temperature) + one_direction(z[j], z[i], temperature)
    return total


def three_views() -> list[Tensor]:
    c = torch.cos(torch.arange(24, dtype=torch.float64) + 1).reshape(4, 6)
    return [*vectors.views(), c.requires_grad_()]


@pytest.mark.parametrize(
    "count, core, want, gradients",
    [
        (2, None, 1.73405199, [0.70754340, 0.56038152]),
        (2, 0, 1.73405199, [0.70754340, 0.56038152]),
        (3, 0, 9.71465261, [3.15503421, 0.56038152, 3.72908862]),
        (3, None, 17.33261853, [3.15503421, 2.15486281, 7.15930948]),
    ],
)
def test_reference_numbers(count, core, want, gradients):
    views = three_views()[:count]
    loss, _ = cmc_loss(views, 0.1, core)
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=5e-9)
    assert [z.grad.norm().item() for z in views] == pytest.approx(gradients, abs=5e-9)


@given(several(), TEMPERATURES, st.data())
def test_equals_the_equations_in_plain_loops(views, temperature, data):
    core = data.draw(st.one_of(st.none(), st.integers(0, len(views) - 1)))
    loss, terms = cmc_loss(views, temperature, core)
    assert loss.item() == pytest.approx(in_plain_loops([z.tolist() for z in views], temperature, core), abs=1e-8)
    pairs = [(a, b) for i, a in enumerate(views) for j, b in enumerate(views) if i < j and core in (None, i, j)]
    cosine = sum(F.cosine_similarity(a, b, dim=1, eps=1e-12).mean().item() for a, b in pairs) / len(pairs)
    assert terms["positive"].item() == pytest.approx(cosine, abs=1e-9)


@given(several(), TEMPERATURES)
def test_embeddings_that_are_all_the_same_cost_twice_the_log_of_the_batch_for_each_pair(views, temperature):
    same = [z[:1].expand(len(z), -1) for z in views]
    count = len(views) * (len(views) - 1) / 2
    assert cmc_loss(same, temperature)[0].item() == pytest.approx(2 * count * math.log(len(views[0])), abs=1e-9)
    assert cmc_loss(views, 1e7, 0)[0].item() == pytest.approx(2 * (len(views) - 1) * math.log(len(views[0])), abs=1e-4)


@given(several(), TEMPERATURES, st.randoms())
def test_only_directions_count_and_the_order_of_images_and_views_does_not(views, temperature, random):
    assume(long(views))
    order = random.sample(range(len(views[0])), len(views[0]))
    moved = random.sample(range(len(views)), len(views))
    changed = [random.uniform(0.1, 10) * z[order] for z in views]
    for core in (None, 1):
        want = cmc_loss(views, temperature, core)[0]
        core = None if core is None else moved.index(core)
        close(cmc_loss([changed[i] for i in moved], temperature, core)[0], want, rtol=1e-9, atol=1e-9)


@given(several(least=3), TEMPERATURES)
def test_every_pair_of_the_full_graph_is_in_two_of_the_core_graphs(views, temperature):
    cores = sum(cmc_loss(views, temperature, core)[0] for core in range(len(views)))
    close(2 * cmc_loss(views, temperature)[0], cores, rtol=1e-9, atol=1e-9)


def test_accuracy_counts_the_images_that_are_found():
    z = torch.eye(2)
    assert cmc_loss([z, z], 0.5)[1]["accuracy"].item() == 1
    assert cmc_loss([z, z.flip(0)], 0.5)[1]["accuracy"].item() == 0
    assert cmc_loss([z, z, z.flip(0)], 0.5)[1]["accuracy"].item() == pytest.approx(1 / 3)
    assert cmc_loss([z, z, z.flip(0)], 0.5, core=0)[1]["accuracy"].item() == 0.5


@settings(max_examples=10)
@given(several(rows=st.integers(2, 4)), st.sampled_from([None, 0, 1]))
def test_gradient_is_that_of_finite_differences(views, core):
    assume(long(views))
    assert torch.autograd.gradcheck(lambda *z: cmc_loss(list(z), 0.5, core)[0], [z.requires_grad_() for z in views])


@given(several(), TEMPERATURES)
def test_inputs_are_left_alone_and_terms_carry_no_gradient(views, temperature):
    before, given = copy.deepcopy(views), [z.requires_grad_() for z in views]
    loss, terms = cmc_loss(given, temperature)
    loss.backward()
    assert all(z.grad is not None for z in views) and len(given) == len(before)
    assert not any(term.requires_grad or term.ndim for term in terms.values())
    close([z.detach() for z in views], before, rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    views = [(100 * torch.randn(64, 32, generator=generator)).to(half) for _ in range(3)]
    want, _ = cmc_loss([z.double() for z in views], 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        got, terms = cmc_loss(views, 0.05)
        also, _ = cmc_loss([z.float() for z in views], 0.05)
    assert {got.dtype, *(term.dtype for term in terms.values())} == {torch.float32} and want.dtype == torch.float64
    close(got.double(), want, rtol=1e-5, atol=0)
    close(also, got)


# ---------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("space, stem", [("lab", "imagenet"), ("ycbcr", "small"), ("rgb", "imagenet")])
def test_each_view_has_a_torchvision_resnet_that_sees_nothing_else(space, stem, tmp_path):
    torch.manual_seed(0)
    backbones = Backbones(tiny("cmc", tmp_path, space=space, stem=stem)).eval()
    x, state, parts = torch.rand(2, 3, 16, 16), backbones.state_dict(), []
    resnet = torchvision.models.resnet
    for (view, channels), pixels in zip(SPACES[space].items(), split(x, space), strict=True):
        half = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
        half.conv1 = nn.Conv2d(channels, 64, *((7, 2, 3) if stem == "imagenet" else (3, 1, 1)), bias=False)
        half.maxpool = half.maxpool if stem == "imagenet" else nn.Identity()
        half.fc = nn.Identity()
        half.load_state_dict({k.removeprefix(f"{view}."): w for k, w in state.items() if k.startswith(f"{view}.")})
        parts.append(half.eval()(pixels))
    close(backbones(x), torch.cat(parts, 1))
    assert evaluate.describe_weights(state, "file") == ("resnet10", stem) and evaluate.color_space(state) == space
    assert {name.split(".")[0] for name in state} == set(SPACES[space])
    fan_out = 64 * (49 if stem == "imagenet" else 9)
    for view in SPACES[space]:  # as torchvision starts it
        assert state[f"{view}.conv1.weight"].std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)


def test_every_weight_gets_a_gradient(tmp_path):
    torch.manual_seed(0)
    model = CMC(tiny("cmc", tmp_path, space="rgb"))
    cmc_loss(model(torch.rand(4, 3, 16, 16)), 0.1, core=0)[0].backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


@pytest.fixture
def train(tmp_path, monkeypatch):
    args = cmc.Args(image_size=16, batch_size=8, projector_dim=6, base_lr=0.5, epochs=2)
    run = quick.trainer(cmc, args, 24, tmp_path, monkeypatch)
    monkeypatch.setattr(cmc, "backbone", named_narrow)
    return run


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("graph", ["core", "full"])
def test_all_views_are_of_one_crop_and_a_resumed_run_is_the_same(space, graph, train, monkeypatch):
    cropped, seen, pairs, plain, cut = [], [], [], cmc.cmc_loss, common.random_resized_crop

    def spy_crop(*given):
        cropped.append(cut(*given))
        return cropped[-1]

    def spy_split(x, space):
        seen.append(x)
        return split(x, space)

    def spy_loss(zs, temperature, core=None):
        pairs.append((len(zs), core))
        return plain(zs, temperature, core)

    monkeypatch.setattr(common, "random_resized_crop", spy_crop)
    monkeypatch.setattr(cmc, "split", spy_split)
    monkeypatch.setattr(cmc, "cmc_loss", spy_loss)
    whole = train("whole", space=space, graph=graph)
    assert pairs == 6 * [(len(SPACES[space]), 0 if graph == "core" else None)]
    close(seen, cropped, rtol=0, atol=0)
    if graph == "core":
        train("parts", space=space, graph=graph, max_steps=4)
        parts = train("parts", space=space, graph=graph)
        assert all(torch.equal(parts["model"][name], tensor) for name, tensor in whole["model"].items())
        close(parts["optimizer"], whole["optimizer"], rtol=0, atol=0)


IMPOSSIBLE = [
    ({"temperature": 0.0}, "--temperature "),
    ({"temperature": math.nan}, "--temperature "),
    ({"projector_dim": 0}, "--projector-dim "),
    ({"jitter_strength": -1.0}, "--jitter-strength "),
    ({"mean": (0.5, 0.5, 0.5)}, "--mean and --std must stay 0 0 0 and 1 1 1"),
    ({"std": (0.5, 1.0, 1.0)}, "--mean and --std must stay 0 0 0 and 1 1 1"),
]


@pytest.mark.parametrize("flags, named", IMPOSSIBLE)
def test_impossible_flags_are_answered_in_one_line_before_anything_is_written(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cmc.main(tiny("cmc", tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", cmc.RECIPES)
def test_the_recipes_fit(recipe):
    args = cmc.Args(**cmc.RECIPES[recipe], recipe=recipe)
    cmc.check(args)
    with torch.device("meta"):
        CMC(args)


# ------------------------------------------------------------------------------------------- the encoder's file


def two_steps(folder: Path, space: str) -> float:
    """The online kNN of a run."""
    return cmc.main(tiny("cmc", folder, space=space, max_steps=2, eval_every=9, base_lr=1.0))["knn_top1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, float]:
    """Folder and online kNN of a run on l and ab."""
    folder = tmp_path_factory.mktemp("cmc") / "run"
    return folder, two_steps(folder, "lab")


def judged(path: Path, **flags) -> dict:
    return evaluate.main(evaluate.Args(str(path), **flags))


@pytest.mark.parametrize("space", ["lab", "rgb"])
def test_evaluate_judges_a_run_and_a_bare_file_as_the_run_did(space, finished, tmp_path, capsys):
    folder, knn = finished if space == "lab" else (tmp_path / "run", two_steps(tmp_path / "run", space))
    assert judged(folder, output=str(tmp_path))["top1"] == knn
    state = common.read_weights(folder / "encoder.pt")
    net, width = evaluate.resnet("resnet10", "imagenet", state)
    start = net.get_submodule(list(SPACES[space])[-1]).conv1.weight.std().item()
    assert start == pytest.approx(math.sqrt(2 / 64 / 49), rel=0.1), "--scratch starts as torchvision does"
    net.load_state_dict(state)
    ours = Backbones(tiny("cmc", tmp_path, space=space))
    ours.load_state_dict(state)
    x = torch.rand(2, 3, 16, 16)
    assert width == 512 * len(SPACES[space])
    close(net.eval()(x), ours.eval()(x), rtol=0, atol=0)
    bare = tmp_path / "checkpoint.pt"  # alone, without the run's flags
    bare.write_bytes((folder / bare.name).read_bytes())
    where = {"data_dir": small_folder(), "dataset": "folder", "image_size": 16, "precision": "fp32"}
    assert judged(bare, **where)["top1"] == knn
    assert "left out projectors" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        judged(folder, output=str(tmp_path), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "leave out --mean and --std" in said


def test_a_fine_tuned_encoder_has_a_classifier_and_is_read_again(finished, tmp_path):
    folder, _ = finished
    judged(folder, output=str(tmp_path), protocol="finetune", epochs=1)
    assert torch.load(tmp_path / "finetuned.pt")["fc.weight"].shape == (4, 1024)
    assert common.read_weights(tmp_path / "finetuned.pt").keys() == common.read_weights(folder / "encoder.pt").keys()


def test_a_file_of_half_the_views_is_refused_in_one_line(finished, tmp_path, capsys, monkeypatch):
    state = torch.load(finished[0] / "encoder.pt")
    torch.save({name: w for name, w in state.items() if not name.startswith("ab.")}, tmp_path / "half.pt")
    monkeypatch.setattr(evaluate, "ARCHITECTURES", ["resnet10", "resnet18"])
    with pytest.raises(SystemExit) as end:
        judged(tmp_path / "half.pt", data_dir=small_folder(), dataset="folder")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "ab.conv1.weight is missing" in said


def test_a_run_starts_from_another_one_of_the_same_space_and_no_other(finished, tmp_path, capsys):
    folder, knn = finished
    flags = {"max_steps": 1, "init": str(folder)}
    cmc.main(tiny("cmc", tmp_path / "run", **flags))
    assert metrics(tmp_path / "run")[0]["knn_top1"] == knn
    capsys.readouterr()
    for method, args in (
        (cmc, tiny("cmc", tmp_path / "no", space="ycbcr", **flags)),
        (cmc, tiny("cmc", tmp_path / "no", stem="small", **flags)),
        (simclr, tiny("simclr", tmp_path / "no", **flags)),
    ):
        with pytest.raises(SystemExit) as end:
            method.main(args)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and "does not fit --arch and --stem" in said
        assert not (tmp_path / "no").exists()


# -------------------------------------------------------------------------------------------------- processes


def gradient() -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) averaged over ranks as DDP does it; rows that grow from rank to rank."""
    _, world = common.rank_and_world()
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1, 13, dtype=torch.float64)[:, None]
    everyone = [torch.randn(12, 5, generator=generator, dtype=torch.float64) * size + size for _ in range(3)]
    views = [z[common.my_rows(12)].clone().requires_grad_() for z in everyone]
    loss, _ = cmc_loss(views, 0.2)
    loss.backward()
    with torch.no_grad():
        return common.all_gather(loss[None]).mean(), [common.all_gather(z.grad) / world for z in views]


def run_of(folder: str, data_dir: str, steps: int) -> None:
    cmc.backbone = named_narrow
    flags = {"epochs": 2, "max_steps": steps, "eval_every": 2, "save_every": 2, "precision": "fp64", "space": "rgb"}
    cmc.main(tiny("cmc", Path(folder), data_dir=data_dir, **flags))


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
        saved = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["model"] for run in ("1", other)]
        close(saved[1], saved[0], rtol=1e-7, atol=1e-9)
