"""The table of docs/pieces.md is true: a row's functions, pasted below its import lines, do what they do here."""

import ast
import builtins
import contextlib
import dis
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from methods import ROOT
from torch import Tensor, nn
from vectors import views

# ------------------------------------------------------------------------------------------- the table

PAGE = (ROOT / "docs" / "pieces.md").read_text()
DRAWS = re.search(r"`draws = (.*?)`", PAGE)[1]
STAND_INS = re.findall(r"`((?:all_gather|my_rows) = .*?)`", PAGE)


class Name(NamedTuple):
    """A function, class or constant at the top level of a file; it prints as vicreg.vicreg_loss."""

    file: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def module(self) -> str:
        return Path(self.file).stem


class Row(NamedTuple):
    pieces: list[Name]
    needs: list[Name]
    imports: list[str]


def names_in(words: list[str], file: str = "") -> list[Name]:
    """`words` are names and, before those of another file, its name."""
    names = []
    for word in words:
        if word.endswith(".py"):
            file = word
        else:
            names.append(Name(file, word))
    return names


def read_table() -> list[Row]:
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    rows = []
    for line in lines[2:]:  # below the heading and its rule
        pieces, needs, imports = (re.findall("`(.*?)`", cell) for cell in line.strip("|").split("|"))
        rows.append(Row(names_in(pieces), names_in(needs, file=pieces[0]), imports))
    return rows


TABLE = read_table()
PIECES = [(row, piece) for row in TABLE for piece in row.pieces]

# ------------------------------------------------------------------------------------------- the sources


@functools.cache
def definitions(file: str) -> dict[str, str]:
    """The source of every function, class and constant of a file, in its order."""
    text, found = (ROOT / file).read_text(), {}
    for statement in ast.parse(text).body:
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        source = "\n".join(text.splitlines()[first - 1 : statement.end_lineno])
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found[statement.name] = source
        elif isinstance(statement, ast.Assign):
            found |= {target.id: source for target in statement.targets if isinstance(target, ast.Name)}
    return found


def globals_in(code: CodeType) -> set[str]:
    """The names that the code looks up outside itself; those of annotations, decorators and defaults, too."""
    lookups = ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS")
    names = {step.argval for step in dis.get_instructions(code) if step.opname in lookups}
    names = names.union(*(globals_in(part) for part in code.co_consts if isinstance(part, CodeType)))
    return {name for name in names if not hasattr(builtins, name) and not name.startswith("__")}


def used_by(pieces: list[Name]) -> tuple[set[Name], set[str]]:
    """The definitions of this project that the pieces use, directly or not, and the names of other packages."""
    found, foreign, waiting = set(), set(), list(pieces)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for used in globals_in(compile(definitions(name.file)[name.name], str(name), "exec")):
            owner = next((file for file in (name.file, "common.py") if used in definitions(file)), None)
            if owner:
                waiting.append(Name(owner, used))
            else:
                foreign.add(used)
    return found - set(pieces), foreign


def bound_by(line: str) -> list[str]:
    """The names that an import line binds."""
    (statement,) = ast.parse(line).body
    return [alias.asname or alias.name.split(".")[0] for alias in statement.names]


def paste(row: Row) -> SimpleNamespace:
    """What a new file holds that has the row's import lines, and below them the functions that the row names."""
    namespace: dict[str, Any] = {}
    for line in row.imports:
        exec(line, namespace)
    own = row.pieces[0].file
    for file in sorted({name.file for name in row.pieces + row.needs}, key=lambda file: file == own):
        for name, source in definitions(file).items():
            if Name(file, name) in row.pieces + row.needs:
                exec(compile(source, str(Name(file, name)), "exec"), namespace)
    return SimpleNamespace(**namespace)


# ------------------------------------------------------------------------------------------- what pieces are given
#
# Each function takes a module, or what was pasted in its place, and returns all that the piece makes of a small input.


def with_gradient(function: Callable[..., Any], *inputs: Tensor) -> list[Any]:
    """What a function returns, and the gradients of a weighted sum of its first result."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*inputs)
    first = result[0] if isinstance(result, tuple) else result
    (first * torch.arange(1.0, 1 + first.numel()).view_as(first)).sum().backward()
    return [result, [x.grad for x in inputs]]


def images() -> Tensor:
    return torch.rand(4, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def labelled() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of 40 training and 12 test images."""
    y = torch.arange(52) % 3
    x = torch.rand(52, 6, generator=torch.Generator().manual_seed(0)) + nn.functional.one_hot(y, 6) / 2
    return x[:40], y[:40], x[40:], y[40:]


def draws_for(m, x: Tensor):
    """As the page makes them."""
    return eval(DRAWS, {"Draws": m.Draws, "seed": 1, "step": 2, "x": x})


def swav_loss(m) -> list[Any]:
    a, b = views()
    queue = [(a + b).detach()[:3], (a - b).detach()[:3]]
    return with_gradient(lambda *scores: m.swav_loss(list(scores), 2, 0.1, 0.3, 3, queue), a, b, a * b)


def swav_queue(m) -> list[Any]:
    queue, prototypes = m.Queue(8, 6, torch.device("cpu"), torch.float64), nn.Linear(6, 5, bias=False).double()
    scores = []
    for _ in range(3):
        queue.push(views())
        scores.append(queue.scores(prototypes))
    return [scores, queue.state_dict()]


def moco_queue(m) -> dict[str, Tensor]:
    queue = m.Queue(6, 6)
    for keys in views():
        queue.enqueue(keys)
    return queue.state_dict()


def decoupled_loss(m) -> list[Any]:
    flags = dict(epsilon=0.25, tau_plus=0.1, beta=1.0, positive_sigma=0.5)
    return with_gradient(lambda a, b: m.decoupled_loss(a, b, 0.5, **flags), *views())


def nnclr_support(m) -> dict[str, Tensor]:
    support = m.Support(6, 6)
    for z in views():
        support.push(z, torch.arange(len(z)))
    return support.state_dict()


def wmse_loss(m) -> list[Any]:
    order, views_of_12 = torch.arange(12) * 5 % 12, [z.reshape(12, 2) for z in views()]
    return with_gradient(lambda *zs: m.wmse_loss(list(zs), order, 6), *views_of_12)


def cpc_loss(m) -> list[Any]:
    return with_gradient(lambda a, b: m.cpc_loss([a, b], [b, a * b], 0.5), *views())


def few_pixels(m) -> list[Any]:
    conv, x = m.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double(), torch.linspace(-1, 1, 36).double()
    torch.nn.init.constant_(conv.weight[:, :, 1:], 0.5)
    torch.nn.init.constant_(conv.weight[:, :, :1], -0.2)
    return with_gradient(lambda x: conv(x.view(2, 2, 3, 3)).sin().sum(), x)


def dino_loss(m) -> list[Any]:
    a, b = views()
    center = torch.linspace(-1, 1, 6, dtype=torch.float64)
    return with_gradient(lambda *student: m.dino_loss(list(student), [b, a], center, 0.1, 0.04), a, b, a * b)


def deepcluster_loss(m) -> list[Any]:
    assignments, centroids = torch.tensor([[0, 2, -100, 1], [1, 1, 0, 0]]), torch.stack(views())[:, :3].detach()
    return with_gradient(lambda a, b: m.deepcluster_loss(torch.cat([a, b]), assignments, centroids, 0.2), *views())


def deepcluster_bank(m) -> dict[str, Tensor]:
    bank = m.Bank(6, 3, 2, 6)
    bank.update(torch.tensor([0, 5, 2, 1]), views())
    bank.cluster(2, 0, 1)
    return bank.state_dict()


def bank_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Own rows (4, 6) and negatives (5, 6), and which of these are the own ones."""
    rows = torch.linspace(-1, 2, 30, dtype=torch.float64).cos().reshape(5, 6)
    return rows[:4], rows, torch.arange(4)[:, None] == torch.arange(5)


def pirl_loss(m) -> list[Any]:
    own, rows, same = bank_rows()
    forms, log_z = ("softmax", "nce", "pirl"), torch.tensor(2.0, dtype=torch.float64)
    losses = [lambda f, g, form=form: m.pirl_loss(f, g, own, rows, 0.3, 0.1, form, log_z, same) for form in forms]
    return [with_gradient(loss, *views()) for loss in losses]


def bank_nce_loss(m) -> list[Any]:
    own, rows, same = bank_rows()
    return with_gradient(lambda query: m.bank_nce_loss(query, own, rows, 0.1, "pirl", None, same), views()[0])


def pirl_bank(m) -> dict[str, Tensor]:
    bank = m.Bank(6, 6, 0.5)
    for z in views():
        bank.update(torch.tensor([4, 0, 1, 5]), z)
    return {"rows": bank.rows, "names": sorted(bank.state_dict())}


def moved(update: Callable[[nn.Module, nn.Module], None]) -> dict[str, Tensor]:
    slow, fast = nn.Linear(3, 2), nn.Linear(3, 2)
    update(slow, fast)
    return slow.state_dict()


def batchnorm(layer: nn.Module) -> list[Any]:
    """Forward and backward in training mode, what the layer remembers of it, and forward in evaluation mode."""
    trained = with_gradient(layer, images())
    return [trained, layer.state_dict(), layer.eval()(images())]


def group_batchnorm2d(m) -> list[Any]:
    layer = m.GroupBatchNorm2d(3)
    layer.groups = 2
    return batchnorm(layer)


def converted(convert: Callable[[nn.Module], nn.Module]) -> list[Any]:
    net = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    return [type(net[1]).__name__, batchnorm(net)]


def lars(m) -> list[Tensor]:
    matrix, bias = views()[0].detach().requires_grad_(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = m.LARS([{"params": [matrix]}, {"params": [bias], "adapt": False}], lr=0.3, weight_decay=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (matrix.sum(1) + bias).square().sum()
        loss.backward()
        return loss

    return [optimizer.step(closure) for _ in range(3)] + [matrix, bias]


def backbone(m) -> list[Any]:
    with pytest.raises(SystemExit) as refused:
        m.backbone("resnet9", "small", zero_init=True)
    net, width = m.backbone("resnet10", "small", zero_init=False)
    return [refused.value.code, width, net.eval()(images())]


def draws(m) -> list[Tensor]:
    made = draws_for(m, images())
    return [made.uniform(0, 2, 3), made.chance(0.5), made.order(4)]


def random_boxes(m) -> list[Tensor]:
    made = draws_for(m, images())
    return [m.random_boxes(made, 12, 10, (0.2, 1.0)), m.random_boxes(made, 12, 10, (0.9, 1.0))]


def random_resized_crop(m) -> list[Tensor]:
    made = draws_for(m, images())
    return [m.random_resized_crop(images(), made, m.Crop(8, (0.2, 1.0), kind)) for kind in ("bilinear", "bicubic")]


def resized_crop(m) -> Tensor:
    boxes = torch.tensor([[0, 0, 12, 10], [1, 2, 9, 4], [5, 5, 3, 3], [2, 0, 7, 9]])
    return m.resized_crop(images(), boxes, 6, "bicubic", torch.tensor([True, False, True, False]))


def adjust_color(m) -> Tensor:
    factor, order = torch.tensor([1.0, 0.6, 1.3, 1.2]), torch.arange(16).reshape(4, 4) * 3 % 7 % 4
    return m.adjust_color(images(), factor, factor.flip(0), 2 - factor, factor - 1, order.argsort(1))


def signs_of_collapse(m) -> dict[str, str]:
    z = torch.ones(8, 16)
    return m.signs_of_collapse(z, **m.embedding_health(z))


def linear_probe(m) -> list[Any]:
    with pytest.raises(SystemExit) as diverged:
        m.linear_probe(*labelled(), epochs=2, learning_rates=(float("inf"),), weight_decays=(0.0,))
    return [diverged.value.code, m.linear_probe(*labelled(), epochs=3, batch_size=16)]


def cluster_scores(m) -> dict[str, float]:
    pytest.importorskip("sklearn")
    return m.cluster_scores(torch.tensor([2, 2, 0, 1, 0]), torch.tensor([0, 0, 1, 1, 1]))


SOME = torch.tensor([True, False, True, False])
INPUTS: dict[str, Callable[[Any], Any]] = {
    "simclr.nt_xent_loss": lambda m: with_gradient(lambda a, b: m.nt_xent_loss(a, b, 0.2), *views()),
    "moco.info_nce_loss": lambda m: with_gradient(lambda a, b: m.info_nce_loss(a, b, a * b, 0.2), *views()),
    "barlow.barlow_twins_loss": lambda m: with_gradient(m.barlow_twins_loss, *views()),
    "barlow.standardize": lambda m: with_gradient(m.standardize, views()[0]),
    "vicreg.vicreg_loss": lambda m: with_gradient(m.vicreg_loss, *views()),
    "vicreg.invariance_loss": lambda m: with_gradient(m.invariance_loss, *views()),
    "vicreg.variance_loss": lambda m: with_gradient(m.variance_loss, views()[0]),
    "vicreg.covariance_loss": lambda m: with_gradient(m.covariance_loss, views()[0]),
    "byol.byol_loss": lambda m: with_gradient(m.byol_loss, *views()),
    "simsiam.simsiam_loss": lambda m: with_gradient(m.simsiam_loss, *views()),
    "swav.swav_loss": swav_loss,
    "swav.sinkhorn": lambda m: m.sinkhorn(views()[0], 0.3),
    "swav.Queue": swav_queue,
    "moco.Queue": moco_queue,
    "moco.momentum_update": lambda m: moved(lambda slow, fast: m.momentum_update(slow, fast, 0.9)),
    "moco.GroupBatchNorm2d": group_batchnorm2d,
    "moco.group_batchnorm": lambda m: converted(lambda net: m.group_batchnorm(net, 2)),
    "byol.update_target": lambda m: moved(lambda slow, fast: m.update_target(slow, fast, 0.9)),
    "byol.tau_schedule": lambda m: [m.tau_schedule(step, 10, 0.9) for step in range(11)],
    "negatives.decoupled_loss": decoupled_loss,
    "nnclr.nnclr_loss": lambda m: with_gradient(lambda a, b: m.nnclr_loss(a, b, 0.2), *views()),
    "nnclr.nearest": lambda m: m.nearest(*views()),
    "nnclr.Support": nnclr_support,
    "wmse.wmse_loss": wmse_loss,
    "wmse.whiten": lambda m: with_gradient(m.whiten, views()[0].reshape(12, 2)),
    "cmc.cmc_loss": lambda m: with_gradient(lambda *z: m.cmc_loss(list(z), 0.2, core=1), *views(), views()[0] + 1),
    "cmc.split": lambda m: [m.split(images(), space) for space in ("lab", "ycbcr", "rgb")],
    "cpc.cpc_loss": cpc_loss,
    "cpc.patches": lambda m: m.patches(images(), 4, 3),
    "cpc.Context": lambda m: m.Context(3, 4, 2)(images().permute(0, 2, 3, 1)),
    "dino.dino_loss": dino_loss,
    "dino.update_center": lambda m: m.update_center(views()[0][0], list(views()), 0.9),
    "rotnet.rotation_loss": lambda m: with_gradient(lambda a: m.rotation_loss(a, torch.arange(4)), views()[0]),
    "rotnet.rotations": lambda m: m.rotations(images()[..., :10, :]),
    "deepcluster.deepcluster_loss": deepcluster_loss,
    "deepcluster.spherical_kmeans": lambda m: m.spherical_kmeans(torch.cat(views()), 3, 2, torch.arange(3)),
    "deepcluster.Bank": deepcluster_bank,
    "deepcluster.purity": lambda m: m.purity(SOME.long()[None], torch.tensor([0, 1, 1, 0]), 2, 2),
    "pirl.bank_nce_loss": bank_nce_loss,
    "pirl.pirl_loss": pirl_loss,
    "pirl.estimate_log_z": lambda m: m.estimate_log_z(views()[0], *bank_rows()[:2], 0.1, bank_rows()[2]),
    "pirl.Bank": pirl_bank,
    "pirl.tiles": lambda m: m.tiles(images()[..., :10], draws_for(m, images()), 2, 3),
    "scan.scan_loss": lambda m: with_gradient(lambda a, b: m.scan_loss(a, b, 5.0), *views()),
    "scan.self_label_loss": lambda m: with_gradient(lambda b: m.self_label_loss(3 * b, b.flip(0), 0.5), views()[1]),
    "scan.mine_neighbours": lambda m: m.mine_neighbours(views()[0], 2),
    "scan.turn": lambda m: m.turn(images()[:, :, :10], draws_for(m, images()), 30.0, 0.3),
    "scan.cutout": lambda m: m.cutout(images()[:, :, :10], draws_for(m, images()), 0.5),
    "common.LARS": lars,
    "common.cosine_schedule": lambda m: [m.cosine_schedule(step, 10, 3, 2.0, 0.1) for step in range(12)],
    "common.all_gather": lambda m: with_gradient(m.all_gather, views()[0]),
    "common.my_rows": lambda m: views()[0][m.my_rows(4)],
    "common.full_precision": lambda m: [m.full_precision(x) for x in (views()[0], images().half())],
    "common.SyncBatchNorm": lambda m: batchnorm(m.SyncBatchNorm(3)),
    "common.sync_batchnorm": lambda m: converted(lambda net: m.sync_batchnorm(net, torch.device("cpu"))),
    "common.backbone": backbone,
    "common.Conv2d": few_pixels,
    "common.Draws": draws,
    "common.random_boxes": random_boxes,
    "common.random_resized_crop": random_resized_crop,
    "common.Crop": lambda m: m.Crop(8, (0.2, 1.0)),
    "common.color_jitter": lambda m: m.color_jitter(images(), draws_for(m, images()), 0.4, 0.4, 0.2, 0.1, 0.8),
    "common.random_blur": lambda m: m.random_blur(images(), draws_for(m, images()), 0.5),
    "common.resized_crop": resized_crop,
    "common.adjust_color": adjust_color,
    "common.adjust_hue": lambda m: m.adjust_hue(images(), torch.tensor([0.0, 0.1, -0.2, 0.4])),
    "common.gaussian_blur": lambda m: m.gaussian_blur(images(), torch.tensor([0.0, 0.5, 1.0, 2.0]), 5),
    "common.grayscale": lambda m: m.grayscale(images(), SOME),
    "common.solarize": lambda m: m.solarize(images(), SOME),
    "common.normalize": lambda m: m.normalize(images(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)),
    "common.knn_scores": lambda m: m.knn_scores(*labelled(), k=5),
    "common.knn_accuracy": lambda m: m.knn_accuracy(*labelled(), k=5),
    "common.embedding_health": lambda m: m.embedding_health(views()[0]),
    "common.signs_of_collapse": signs_of_collapse,
    "evaluate.cluster_scores": cluster_scores,
    "evaluate.linear_probe": linear_probe,
}

# ------------------------------------------------------------------------------------------- the tests


def plain(value: Any) -> Any:
    """Tensors as nested lists beside their type, so that equal means equal to the bit."""
    if isinstance(value, Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def outcome(piece: Name, module: Any) -> Any:
    torch.manual_seed(0)
    return plain(INPUTS[str(piece)](module))


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def in_words(names: set) -> str:
    return ", ".join(sorted(map(str, names)))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: str(row.pieces[0]))
def test_a_row_names_all_that_its_pieces_use_and_nothing_else(row):
    needs, foreign = used_by(row.pieces)
    imported = [name for line in row.imports for name in bound_by(line)]
    faults = {
        "needs lack": needs - set(row.needs),
        "needs name, and nothing uses": set(row.needs) - needs,
        "imports lack": foreign - set(imported),
        "imports name, and nothing uses": set(imported) - foreign,
        "twice": {name for name in row.needs + imported if (row.needs + imported).count(name) > 1},
    }
    assert {fault: in_words(names) for fault, names in faults.items() if names} == {}


def test_every_piece_has_an_input_and_every_input_a_piece():
    pieces = [str(piece) for _, piece in PIECES]
    assert sorted(pieces) == sorted(set(pieces)), "a piece stands in two rows"
    assert set(pieces) - set(INPUTS) == set(), "pieces of the page without an input here"
    assert set(INPUTS) - set(pieces) == set(), "inputs here whose piece the page does not name"


@pytest.mark.parametrize(("row", "piece"), PIECES, ids=[str(piece) for _, piece in PIECES])
def test_a_pasted_piece_gives_what_the_original_gives(row, piece):
    assert str(piece) in INPUTS, f"no input for {piece}"
    original = importlib.import_module(piece.module)
    for group in (contextlib.nullcontext(), group_of_one()):
        with group:
            assert outcome(piece, paste(row)) == outcome(piece, original)


GATHERING = [(row, piece) for row, piece in PIECES if Name("common.py", "_AllGather") in row.needs]
GATHERING = [(row, piece) for row, piece in GATHERING if piece.file != "common.py"]


@pytest.mark.parametrize(("row", "piece"), GATHERING, ids=[str(piece) for _, piece in GATHERING])
def test_the_stand_ins_of_one_process_do_for_the_functions_that_gather(row, piece):
    replaced = {"all_gather", "my_rows", "_AllGather", "rank_and_world"}
    needs = [need for need in row.needs if need.name not in replaced]
    imports = [line for line in row.imports if "torch.distributed" not in line]
    original = importlib.import_module(piece.module)
    assert len(STAND_INS) == 2
    assert outcome(piece, paste(Row(row.pieces, needs, imports + STAND_INS))) == outcome(piece, original)
