"""CPC: Contrastive Predictive Coding, for images (v1: van den Oord, Li, Vinyals, arXiv 1807.03748; v2: Hénaff et al.,
ICML 2020, arXiv 1905.09272).

An image is cut into overlapping patches, in rows and columns, and each is encoded by itself: z_ij. From the rows that
have been read, from the top down to row i, a context c_ij is made. It has to recognise the patch in the same column, k
rows further down, among the patches of all images:

    z_ij = f(patch in row i, column j)                        encoder: backbone and a linear layer
    c_ij = g(z of the rows <= i)                              context: convolutions that see no row below i
    l_k(i, j) = -log  exp(z_i+k,j · W_k c_ij / T)  /  sum over z' of exp(z' · W_k c_ij / T)                  (eq. 4)
    loss = mean over k of the mean of l_k over images, rows and columns;  T = 1 in the paper          (section 3.3)

z' are all N patches that are to be recognised at this k, in the batch. What two distant patches have in common, and
patches of other images have not, is what the image shows: so z has to keep that. ln N - l_k is a lower bound of the
mutual information of c_ij and z_i+k,j, in nats (section 2.3); its mean is the term `information`.

The other patches in the denominator prevent collapse: were all z the same, or all c, l_k would be ln N. Three ways to
cheat are closed. Patches that overlap share pixels, so the first k is one whose rows share none. BatchNorm would let
every patch see the others through the statistics of the batch: the backbone has GroupNorm. And a colour is the same
across an image, and lines go on: so the patches are grey, and each has a crop of its own.

What one keeps is the mean of the backbone's features over the patches; encoder.pt says how to cut them.

What you should see: the loss starts at ln N (5.26 at N = 192: 64 images, three patches each), falls within the first
epoch, and ends at 2.9; `information` rises from 0 to 2.4. With `python more/cpc.py` the online kNN goes from 60 % to
88 %. (Without `zero_init` it would start at 82 %: the mean of random features over patches tells textures apart.) Signs
of trouble: the loss stays at ln N while the spread of the contexts sinks; a lower `--base-lr` or milder crops help.

    python more/cpc.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the papers.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    LARS,
    Crop,
    Draws,
    Flags,
    Run,
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
    random_resized_crop,
    refuse,
)


@dataclass
class Args(Flags):
    batch_size: int = 64
    epochs: int = 8
    base_lr: float = 2e-3
    optimizer: Literal["adam", "lars", "sgd"] = "adam"  # momentum 0.9 in all of them
    warmup_epochs: float = 1
    crop_min_scale: float = 0.6
    color_jitter: bool = False
    patch_size: int = 0  # side of the patches in pixels; 0: half the view
    patch_stride: int = 0  # from one patch to the next; 0: half a patch
    patch_min_scale: float = 0.5  # smallest share of its area that a patch's own crop keeps
    patch_flip: bool = False  # flip each patch by itself, as in v2
    nearest_row: int = 0  # the smallest k; 0: the first whose patches share no pixels with the context's
    farthest_row: int = 0  # the largest k; 0: what the grid has
    all_directions: bool = True  # contexts from above, from below and from both sides, as in v2; v1: from above only
    target_dim: int = 64  # d, width of z and c
    context_hidden: int = 128  # width inside the context's blocks
    context_blocks: int = 2  # each sees a row more, and a column more on both sides
    temperature: float = 1.0  # T
    jitter_strength: float = 0.5  # strength of each patch's colour jitter
    gray_share: float = 1.0  # share of the patches that lose their colour; v1: all


RECIPES = {
    "quick": {},
    # There are no published values for CIFAR-10; these are untried.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=200, log_every=50, eval_every=10, save_every=10,
        batch_size=256, warmup_epochs=10, base_lr=5e-4, color_jitter=True, gray_share=0.2,
    ),
    # Section 3.3 of v1: 7 x 7 patches of 64 pixels, up to five rows below, Adam at 2e-4 with 512 images.
    "imagenet": dict(
        dataset="folder", image_size=256, arch="resnet101", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=512, epochs=200, warmup_epochs=0, base_lr=1e-4, weight_decay=0.0, crop_min_scale=0.7,
        patch_size=64, patch_min_scale=0.88, farthest_row=5, all_directions=False, target_dim=1024,
        context_hidden=256, context_blocks=5,
    ),
}  # fmt: skip

PATCHES = 8  # first word of the key of the patches' draws: see Draws


class Grid(NamedTuple):
    """The patches of a view, rows x rows of `size` pixels, and every k: how far below a context its targets are."""

    size: int
    stride: int
    rows: int
    distances: range


def grid(args: Args) -> Grid:
    """By `--patch-size` and the flags below it."""
    size = args.patch_size or max(1, args.image_size // 2)
    stride = args.patch_stride or max(1, size // 2)
    rows = (args.image_size - size) // stride + 1
    nearest = args.nearest_row or (size + stride - 1) // stride  # row k begins k strides below, where row 0 has ended
    return Grid(size, stride, rows, range(nearest, (args.farthest_row or rows - 1) + 1))


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags, and a grid in which nothing can be predicted."""
    check_widths(args, "target_dim", "context_hidden")
    check_least(args, 1, "context_blocks", most=64)
    check_least(args, 0, "jitter_strength", "patch_stride", "nearest_row", "farthest_row")
    check_least(args, 0, "patch_size", most=args.image_size)
    check_least(args, 0, "patch_min_scale", "gray_share", most=1)
    check_least(args, 1e-4, "temperature")
    size, stride, rows, distances = grid(args)
    cut = f"patches of {size} pixels every {stride} of {args.image_size} make {rows} rows"
    if not distances:
        wanted = f"row {distances.start} below the first" if rows <= distances.start else "a row in between"
        refuse(f"--nearest-row {distances.start}, --farthest-row {distances.stop - 1}: {cut}, without {wanted}")
    if distances.stop > rows:
        refuse(f"--farthest-row {args.farthest_row}: {cut}; take {rows - 1} or less")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """One view, made where the image is decoded: a random resized crop and flip."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)]


def patches(x: Tensor, size: int, stride: int) -> Tensor:
    """Images (n, 3, H, W) -> their square patches (n, R, C, 3, size, size), R = (H - size) // stride + 1, C likewise.

    Patch (i, j) begins at pixel (i stride, j stride). What fills no patch, at the bottom and the right, is left out.
    """
    cells = x.unfold(2, size, stride).unfold(3, size, stride)  # n×3×R×C×p×p
    return cells.permute(0, 2, 3, 1, 4, 5)  # n×R×C×3×p×p


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of the view, patches (n, 3, p, p) in [0, 1] -> normalised; every patch has its own draws."""
    strength, hue = 0.8 * args.jitter_strength, 0.2 * args.jitter_strength
    x = random_resized_crop(x, draws, Crop(x.shape[3], (args.patch_min_scale, 1.0), "bicubic", 0.5 * args.patch_flip))
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=strength, contrast=strength, saturation=strength, hue=hue, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(args.gray_share))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


# ---------------------------------------------------------------------------------------------------- network


class Encoder(nn.Module):
    """What is kept: the mean of the backbone's features over the patches of an image, (n, 3, s, s) -> (n, width)."""

    def __init__(self, net: nn.Module, size: int, stride: int):
        super().__init__()
        self.backbone = net
        self.register_buffer("patches", torch.tensor([size, stride]))  # so that the file says how to cut an image

    def forward(self, x: Tensor) -> Tensor:
        cells = patches(x, *self.patches.tolist()).flatten(1, 2)  # n×RC×3×p×p
        h = self.backbone(cells.flatten(0, 1))  # nRC×width
        return h.unflatten(0, cells.shape[:2]).mean(1)  # n×width


class MaskedBlock(nn.Module):
    """(n, d, R, C) -> the same: what is added to (i, j) comes from rows i and i - 1, columns j - 1 to j + 1."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.first = nn.Conv2d(dim, hidden, 1)
        self.across = nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1))
        self.above = nn.Conv2d(hidden, hidden, (2, 1))
        self.last = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.across(F.relu(self.first(x)))  # n×hidden×R×C
        y = F.pad(y, (0, 0, 1, 0))  # n×hidden×(R+1)×C: a row of zeros on top, so that row i meets row i - 1 only
        return x + self.last(F.relu(self.above(y)))  # n×d×R×C


class Context(nn.Module):
    """z (n, R, C, d) -> c (n, R, C, d), where c_ij depends on the rows <= i only. Without statistics of the batch.

    Every block sees one row more above row i. As in PixelCNN (arXiv 1606.05328), padding keeps out what is below.
    """

    def __init__(self, dim: int, hidden: int, blocks: int):
        super().__init__()
        self.blocks = nn.Sequential(*(MaskedBlock(dim, hidden) for _ in range(blocks)))

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # to n×d×R×C and back


class CPC(nn.Module):
    """Encoder, and for every direction a context and a linear prediction W_k for every distance k."""

    def __init__(self, args: Args):
        super().__init__()
        size, stride, _, self.distances = grid(args)
        net, width = backbone(args.arch, args.stem, zero_init=True, norm="group")
        d = args.target_dim
        self.encoder = Encoder(net, size, stride)
        self.projector = nn.Linear(width, d)
        self.contexts = nn.ModuleList()
        self.predictors = nn.ModuleList()  # one list of W_k per direction
        for _ in range(4 if args.all_directions else 1):
            self.contexts.append(Context(d, args.context_hidden, args.context_blocks))
            self.predictors.append(nn.ModuleList(nn.Linear(d, d, bias=False) for _ in self.distances))
        for linear in (w for some in self.predictors for w in some):
            nn.init.normal_(linear.weight, std=0.1 / d**0.5)  # small, so that the loss starts at ln N

    @property
    def backbone(self) -> nn.Module:
        """What `--init` loads."""
        return self.encoder.backbone

    def forward(self, cells: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Patches (n, R, C, 3, p, p) -> predictions and targets, (n, R - k, C, d) for each direction and k; contexts.

        A direction is a turn of the grid: what was on the right, below or on the left is then on top. (C is R.)
        """
        h = self.backbone(cells.flatten(0, 2))  # nRC×width: what is kept
        z = self.projector(h).unflatten(0, cells.shape[:3])  # n×R×C×d
        predictions, targets, contexts = [], [], []
        for turns, (context, predictors) in enumerate(zip(self.contexts, self.predictors, strict=True)):
            turned = torch.rot90(z, turns, (1, 2))  # n×R×C×d
            c = context(turned)  # n×R×C×d
            contexts.append(c[:, : -self.distances[0]])  # those that predict
            for k, predict in zip(self.distances, predictors, strict=True):
                predictions.append(predict(c[:, :-k]))  # n×(R-k)×C×d
                targets.append(turned[:, k:])  # n×(R-k)×C×d
        return predictions, targets, torch.cat([c.flatten(0, 2) for c in contexts])


# ------------------------------------------------------------------------------------------------------- loss


def cpc_loss(predictions: list[Tensor], targets: list[Tensor], temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4: the mean over k of the InfoNCE of this rank's predictions W_k c and targets z, (n, ..., d) for each k.

    A prediction is compared with the targets of its k in all images of all ranks, by plain dot products over T, and its
    own one stands in the same place. Both get a gradient. The mean over ranks is the loss of the global batch. In
    float32 (float64 stays). Terms: how often the own target comes first; and ln N - loss of the N targets, both means
    over k: a lower bound of the mutual information, in nats.
    """
    with torch.autocast(predictions[0].device.type, enabled=False):
        losses, hits, bounds = [], [], []
        for prediction, target in zip(predictions, targets, strict=True):
            p, z = (full_precision(t).flatten(0, -2) for t in (prediction, target))  # m×d
            everyone = all_gather(z)  # N×d
            total = len(everyone)  # N
            own = torch.arange(total, device=p.device)[my_rows(total)]  # m: where this rank's targets stand
            logits = p @ everyone.T / temperature  # m×N
            losses.append(F.cross_entropy(logits, own))  # with the own column as the class, this is eq. 4
            with torch.no_grad():
                hits.append((logits.argmax(1) == own).to(logits.dtype).mean())
                bounds.append(torch.full_like(losses[-1], total).log() - losses[-1])
    loss, accuracy, information = (torch.stack(values).mean() for values in (losses, hits, bounds))
    return loss, {"accuracy": accuracy, "information": information}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("cpc", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args)

    model = run.place(CPC(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and GroupNorm
    # Adam and SGD decay all of them. Under LARS `adapt=False` exempts biases and GroupNorm, from adaptation and decay.
    groups = [{"params": weights}, {"params": others, "adapt": False}]
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, lr=0.0, weight_decay=args.weight_decay)
    else:
        make = LARS if args.optimizer == "lars" else torch.optim.SGD
        optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=model, encoder=model.encoder, optimizer=optimizer)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256
    size, stride, rows, _ = grid(args)
    total = args.batch_size * rows**2  # patches of all ranks

    for step, ((x, _),) in run.batches(crops(args)):  # n×3×s×s
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        draws = Draws((PATCHES, args.seed, step), total, my_rows(total))  # for each patch its own
        cells = patches(x, size, stride)  # n×R×C×3×p×p
        cells = augment(cells.flatten(0, 2), draws, args).unflatten(0, cells.shape[:3])
        with run.autocast:
            predictions, targets, c = network(cells)  # n×(R-k)×C×d each
        loss, terms = cpc_loss(predictions, targets, args.temperature)

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        run.report(step + 1, loss, terms, lr, c)
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file and the papers differ
#
# (–: it does not say)  here                              v1                                v2
#
# patches               3 x 3, of half the view           7 x 7, of a quarter               of a third
# backbone              ResNet, all stages, GroupNorm     ResNet-v2, three stages, no norm  ResNet, LayerNorm
# residual branches     start at zero                     –                                 –
# z                     linear in the features, 64-d      the features, 1024-d              –
# a patch's crop        of half its area or more          60 of 64 pixels, padded           flipped, too
# colour                grey                              grey                              of two channels dropped
# first k               the first without shared pixels   –                                 –
# learning rate         a cosine, scaled with the batch   2e-4                              –
# precision             bf16 where fast                   –                                 –
