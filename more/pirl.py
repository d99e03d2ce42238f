"""PIRL: Self-Supervised Learning of Pretext-Invariant Representations (Misra, van der Maaten; CVPR 2020,
arXiv 1912.01991), and, with `--transform none`, NPID: Unsupervised Feature Learning via Non-Parametric Instance
Discrimination (Wu, Xiong, Yu, Lin; CVPR 2018, arXiv 1805.01978).

NPID takes each of the N images for a class of its own. A memory bank has a row m for every image, a running mean of its
embeddings f. All have length 1. An embedding has to find the row of its image:

    P(i | f) = exp(f·m_i / T)  /  sum over j of exp(f·m_j / T),    L(f) = -log P(i | f)           (NPID, eq. 2, 3)
    m_i     <- m m_i + (1 - m) f,  to length 1                                     after the step

PIRL transforms a second view of the image: it turns it, or cuts it into nine tiles and mixes them up. Other methods
predict what was done (RotNet, jigsaw puzzles), and their features depend on it. PIRL's are to ignore it: g, the
embedding of what was transformed, has to find the same row, to which f alone contributes.

    loss = lambda L(g) + (1 - lambda) L(f)                                                            (PIRL, eq. 5)

The other rows prevent collapse: were all the same, L would be log N. MoCo's keys are fresh and few; a row is as old as
an epoch, but there is one for every image. `--negatives K` compares with K rows, drawn at each step, and the own one.
`--loss nce` asks of these 1 + K, one at a time, if it is the own row; Z is estimated once, from the first batch:

    h(j) = P(j) / (P(j) + K/N),  P(j) = exp(f·m_j / T) / Z;    L = -log h(i) - sum over K of log(1 - h(j))  (eq. 6, 7)

`--loss pirl` is this L with P in place of h (PIRL, eq. 4). Before training, a pass over the images fills the bank:
without it, there is nothing to be found for an epoch.

What you should see: the loss starts a little above log N (8.5 for 5000 images), rises to 9.6 in the second epoch, as
the network changes faster than the bank, and falls to 6.8. `positive`, the mean cosine of f and its row, rises to 0.9.
`transformed`, that of g, falls below 0 and rises late: what all rows have in common tells none from the others, and g
may oppose it. `accuracy`, how often the own row comes first, stays near 0 here. With `python more/pirl.py` the online
kNN goes from 53 % to 82 %, with `--transform none` to 77 %, with `jigsaw` to 79 %. Signs of trouble: the loss stays
above log N; or the effective rank, 20, falls under 10.

    python more/pirl.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the papers.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    LARC,
    LARS,
    Crop,
    Draws,
    Flags,
    Run,
    View,
    all_gather,
    backbone,
    check_least,
    check_widths,
    color_jitter,
    distribute,
    full_precision,
    grayscale,
    my_rows,
    normalize,
    parse_args,
    random_blur,
)

NEGATIVES, TILES = 4, 5  # first words of the keys of this file's own random numbers, beside those in common.py
GRID = 3  # a puzzle has 3x3 tiles


@dataclass
class Args(Flags):
    epochs: int = 10
    base_lr: float = 0.1
    optimizer: Literal["lars", "larc", "sgd"] = "sgd"
    weight_decay: float = 1e-4
    transform: Literal["none", "rotation", "jigsaw"] = "rotation"  # what the features ignore; none: NPID
    lam: float = 0.5  # lambda, weight of the transformed image; the rest is the image's own
    loss: Literal["softmax", "nce", "pirl"] = "softmax"  # softmax, NPID's estimate of it, or PIRL's
    negatives: int = 0  # K, rows of the bank drawn at each step; 0: all of them
    temperature: float = 0.1  # T
    bank_momentum: float = 0.5  # m, share of a row that an update keeps
    tile_size: int = 0  # pixels, of a tile of the puzzle; 0: three eighths of the image's
    head_dim: int = 128  # d, width of the embeddings


RECIPES = {
    "quick": {},
    # The official code of NPID, which trains 200 epochs with --transform none. PIRL has no published values for CIFAR.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=200, log_every=50, eval_every=10, save_every=10,
        warmup_epochs=0, base_lr=0.06, weight_decay=5e-4, flip=False,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010),
    ),
    # VISSL, the authors' code, for the jigsaw puzzle. NPID: --transform none --batch-size 256 --epochs 200.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=1024, epochs=800, warmup_epochs=0, base_lr=0.03, crop_min_scale=0.08, transform="jigsaw",
        loss="nce", negatives=32000, temperature=0.07, tile_size=64,
    ),
}  # fmt: skip


def check(args: Args, images: int) -> None:
    """Refuse impossible values of this method's flags, and more negatives than there are images."""
    check_widths(args, "head_dim")
    check_least(args, 1e-4, "temperature")
    check_least(args, 0, "bank_momentum", "lam", most=1)
    check_least(args, 0, "tile_size", most=1024)  # pixels
    check_least(args, 0, "negatives", most=images)


def tile_size(args: Args) -> int:
    """Pixels: `--tile-size`, or three eighths of the image."""
    return args.tile_size or max(1, 3 * args.image_size // 8)


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own.

    The second is what will be transformed; the puzzle is cut from a larger picture of more of the image.
    """
    image = Crop(args.image_size, (args.crop_min_scale, 1.0), "bilinear", flip=0.5 * args.flip)
    cell = tile_size(args) * 4 // 3  # pixels; it leaves a tile a third of its side to move in
    puzzle = Crop(GRID * cell, (max(0.6, args.crop_min_scale), 1.0), "bilinear", flip=0.5 * args.flip)
    return {"none": [image], "rotation": [image, image], "jigsaw": [image, puzzle]}[args.transform]


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws."""
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, p=1.0)
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


def tiles(x: Tensor, draws: Draws, grid: int, size: int) -> Tensor:
    """(n, 3, s, s) -> (n, grid², 3, size, size): a tile from each cell of a grid, row by row, at a place of its own.

    The cells have s // grid pixels a side, and a tile lies anywhere within its cell, drawn for each: so there are gaps
    between tiles, and no edge continues from one to the next. A tile larger than its cell is a ValueError.
    """
    cell = x.shape[-1] // grid
    if not 0 < size <= cell:
        raise ValueError(f"a tile of {size} pixels does not fit into a cell of {cell}")
    offset = (draws.uniform(0, 1, grid**2, 2) * (cell - size + 1)).long()  # n×grid²×2
    corner = cell * torch.cartesian_prod(torch.arange(grid), torch.arange(grid))  # grid²×2
    pixel = ((corner + offset)[..., None] + torch.arange(size)).to(x.device, non_blocking=True)  # n×grid²×2×size
    rows, columns = pixel[:, :, 0, :, None], pixel[:, :, 1, None]  # n×grid²×size×1 and n×grid²×1×size
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    return x.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 1, 4, 2, 3)  # n×grid²×3×size×size


def transform(view: View, args: Args, step: int) -> Tensor:
    """The second view, transformed: (n, 3, s, s) turned by 0 to 3 quarters of a circle; or its tiles, (n, 9, 3, t, t),
    in random order, each with colours of its own.
    """
    x, draws = view
    image = torch.arange(len(x), device=x.device)  # n
    if args.transform == "rotation":
        x = augment(x, draws, args)
        turned = torch.stack([x.rot90(k, (2, 3)) for k in range(4)])  # 4×n×3×s×s
        return turned[draws.uniform(0, 4).long().to(x.device), image]
    order = draws.order(GRID**2).to(x.device)  # n×9
    mixed = tiles(x, draws, GRID, tile_size(args))[image[:, None], order].flatten(0, 1)  # 9n×3×t×t
    total = GRID**2 * args.batch_size  # tiles of all ranks
    return augment(mixed, Draws((TILES, args.seed, step), total, my_rows(total)), args).unflatten(0, order.shape)


# ---------------------------------------------------------------------------------------------------- network


class PIRL(nn.Module):
    """Backbone and heads: f for the image, g for what is transformed. No head has BatchNorm.

    In the backbone, BatchNorm sees the images, and what was transformed, as batches of their own. That of a puzzle has
    9n tiles, each a single pixel in the last stages. The running statistics, by which features are judged, follow both.
    """

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=False)
        d = args.head_dim
        self.f = nn.Linear(width, d)
        if args.transform == "rotation":
            self.g = nn.Linear(width, d)
        elif args.transform == "jigsaw":
            self.tile = nn.Linear(width, d)  # of every tile
            self.g = nn.Linear(GRID**2 * d, d)  # of the nine together

    def forward(self, x: Tensor, transformed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        f = self.f(self.backbone(x))  # n×3×s×s -> n×width -> n×d
        if transformed is None:
            return f, None
        if transformed.ndim == 4:
            return f, self.g(self.backbone(transformed))
        h = self.backbone(transformed.flatten(0, 1))  # n×9×3×t×t -> 9n×width, all tiles in one pass
        return f, self.g(self.tile(h).view(len(x), -1))  # 9n×d -> n×9d -> n×d


class Bank(nn.Module):
    """A row for every image, (N, d): a running mean of its embeddings, normalised, the same on every rank.

    Rows start at 0, so that the first update of a row puts the embedding itself there; until then its cosines are 0.
    """

    def __init__(self, images: int, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("rows", torch.zeros(images, dim))  # N×d
        self.register_buffer("log_z", torch.tensor(math.nan))  # ln(Z/N), for the NCE

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor) -> None:
        """Row i <- m row i + (1 - m) z/|z|, normalised, for the images of `index` (n,), with embeddings z (n, d)."""
        z = F.normalize(z.to(self.rows.dtype), dim=1)
        self.rows[index] = F.normalize(torch.lerp(z, self.rows[index], self.momentum), dim=1)


@torch.no_grad()
def fill(bank: Bank, model: PIRL, run: Run) -> None:
    """Embed an epoch of images, views that no epoch of the training has, with the network untrained."""
    steps = range(run.total_steps, run.total_steps + run.steps_per_epoch)
    for _, batch in run.batches(crops(run.args)[:1], steps):
        x = augment(*batch.views[0], run.args)  # n×3×s×s
        with run.autocast:
            f, _ = model(x)  # n×d
        bank.update(batch.index.to(run.device), all_gather(f))


def rows_to_compare(images: int, args: Args, step: int) -> Tensor:
    """(K,) numbers of the bank's rows, the same on every rank: drawn, with replacement, or all of them."""
    if args.negatives == 0:
        return torch.arange(images)
    return torch.from_numpy(np.random.default_rng((NEGATIVES, args.seed, step)).integers(images, size=args.negatives))


# ------------------------------------------------------------------------------------------------------- loss


def similarities(
    query: Tensor, own: Tensor, negatives: Tensor, temperature: float, same: Tensor | None = None
) -> Tensor:
    """(n, 1 + K) cosines over T of each query with its own row and with the negatives, -inf where it is the `same`."""
    # Normalising makes new tensors: the bank may change before the backward pass.
    query, own, negatives = (F.normalize(full_precision(z), dim=-1) for z in (query, own.detach(), negatives.detach()))
    positive = (query * own).sum(dim=1, keepdim=True)  # n×1
    negative = query @ negatives.T if negatives.ndim == 2 else (negatives @ query[:, :, None])[:, :, 0]  # n×K
    if same is not None:
        negative = negative.masked_fill(same, -torch.inf)
    return torch.cat([positive, negative], dim=1) / temperature


@torch.no_grad()
def estimate_log_z(
    query: Tensor, own: Tensor, negatives: Tensor, temperature: float, same: Tensor | None = None
) -> Tensor:
    """ln(Z/N), with Z/N the mean of exp(cosine / T) over queries of all ranks, own rows and negatives."""
    with torch.autocast(query.device.type, enabled=False):
        scores = similarities(query, own, negatives, temperature, same)
        total, count = scores.flatten().logsumexp(0), scores.isfinite().sum().to(scores.dtype).log()
        return all_gather(total[None]).logsumexp(0) - all_gather(count[None]).logsumexp(0)


def bank_nce_loss(
    query: Tensor,
    own: Tensor,
    negatives: Tensor,
    temperature: float,
    form: Literal["softmax", "nce", "pirl"] = "softmax",
    log_z: Tensor | None = None,
    same: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L of this rank's queries (n, d), f or g, with own rows of the bank (n, d) and negatives, (K, d) or (n, K, d).

    `form`: softmax (NPID, eq. 3), nce (NPID, eq. 7; log_z is ln(Z/N)) or pirl (PIRL, eq. 4). `same` (n, K) marks the
    negatives to leave out, for they are the own row. The mean over the n queries; the mean of that over ranks is the
    loss of the global batch. Everything is normalised here; rows are constants. In float32 (float64 stays). Terms: the
    mean cosine of query and own row, and how often that row comes first (a tie is lost).
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = similarities(query, own, negatives, temperature, same)  # n×(1+K)
        positive, negative = scores[:, 0], scores[:, 1:]  # n and n×K
        if form == "nce":
            noise = log_z + math.log(negative.shape[1])  # ln(K Z / N): h is a sigmoid
            log_h, log_rest = F.logsigmoid(scores - noise), F.logsigmoid(noise - scores)  # n×(1+K), log(1 - h)
        else:
            log_h = scores.log_softmax(dim=1)  # n×(1+K), log P
            log_rest = (-log_h.expm1()).clamp(min=torch.finfo(log_h.dtype).eps).log()  # log(1 - P), not -inf at P = 1
        loss = -log_h[:, 0]  # n
        if form != "softmax":
            loss = loss - log_rest[:, 1:].sum(dim=1)
        with torch.no_grad():
            accuracy = (positive > negative.amax(dim=1)).to(scores.dtype).mean()
    return loss.mean(), {"positive": temperature * positive.detach().mean(), "accuracy": accuracy}


def pirl_loss(
    f: Tensor,
    g: Tensor,
    own: Tensor,
    negatives: Tensor,
    lam: float,
    temperature: float,
    form: Literal["softmax", "nce", "pirl"] = "softmax",
    log_z: Tensor | None = None,
    same: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PIRL's eq. 5 for this rank's embeddings f of the images and g of the transformed images, (n, d) each, with weight
    `lam` of g's loss. The rest is as in `bank_nce_loss`. Terms: those of f, and the mean cosine of g and own row.
    """
    transformed, terms_g = bank_nce_loss(g, own, negatives, temperature, form, log_z, same)
    image, terms = bank_nce_loss(f, own, negatives, temperature, form, log_z, same)
    return lam * transformed + (1 - lam) * image, {**terms, "transformed": terms_g["positive"]}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("pirl", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args, len(run.train))

    model = run.place(PIRL(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Neither adapted nor decayed: LARS obeys `adapt`; SGD does not know it, and takes the decay of 0.
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    bank = Bank(len(run.train), args.head_dim, args.bank_momentum).to(run.device, run.dtype)
    run.start(model=model, optimizer=optimizer, bank=bank)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256
    if run.first_step == 0:
        fill(bank, model, run)

    for step, batch in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        view, *second = batch
        x = augment(*view, args)  # n×3×s×s
        transformed = transform(*second, args, step) if second else None  # n×3×s×s or n×9×3×t×t
        with run.autocast:
            f, g = network(x, transformed)  # n×d each; without a transform, g is None
        index = batch.index.to(run.device, non_blocking=True)  # N
        rows = rows_to_compare(len(bank.rows), args, step).to(run.device, non_blocking=True)  # K
        mine = index[my_rows(args.batch_size)]  # n
        own, negatives, same = bank.rows[mine], bank.rows[rows], mine[:, None] == rows  # n×d, K×d and n×K
        if step == 0 and args.loss == "nce":
            bank.log_z.copy_(estimate_log_z(f if g is None else g, own, negatives, args.temperature, same))
        if g is None:
            loss, terms = bank_nce_loss(f, own, negatives, args.temperature, args.loss, bank.log_z, same)
        else:
            loss, terms = pirl_loss(f, g, own, negatives, args.lam, args.temperature, args.loss, bank.log_z, same)

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        bank.update(index, all_gather(f.detach()))  # never of g
        run.report(step + 1, loss, terms, lr, f)
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the papers and the official code differ
#
# (–: it does not say)  here                                   papers                 official code (NPID's; PIRL's)
#
# loss                  softmax over all rows; --loss          NPID: the same, NCE    NCE or softmax; the same
#                                                              PIRL: its eq. 4
# negatives             one draw for the batch (1)             K for each image       K for each image
# the own row           never a negative                       –                      may be one
# the bank at first     filled by an untrained network         –                      noise
# update of the bank    after the optimizer's step             NPID: and a term that  before it
#                                                              keeps f near its row
# views                 NPID's                                 –                      PIRL: also posterised, sharpened
# heads                 linear                                 linear                 PIRL: also of two layers
# BatchNorm             over all processes                     –                      for each GPU by itself
# learning rate         a cosine at every step                 NPID: steps            NPID: steps; PIRL: a cosine
# precision             bf16 where fast, the loss in float32   –                      float32
#
# (1) All scores are then one matrix product.
