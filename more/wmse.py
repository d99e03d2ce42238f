"""W-MSE: Whitening for Self-Supervised Representation Learning (Ermolov, Siarohin, Sangineto, Sebe; ICML 2021,
arXiv 2007.06346).

The embeddings of two views of an image are pulled together, after whitening: a linear map, computed from the batch at
every step, that gives the embeddings the covariance I. Let v be the embeddings of one view of w images, (w, d):

    S = covariance of v = L Lᵀ          d×d, L lower triangular: Cholesky's decomposition
    z = L⁻¹ (v - mean)                  the covariance of z is I, whatever the network does
    loss = mean over images and pairs of views of |z/|z| - z'/|z'||²  =  2 - 2 cos(z, z')                  (section 3)

Nothing more is needed. A point, or a line, has no covariance I, so that the embeddings cannot collapse: dimensions that
the network lets shrink are stretched again before they are compared. VICReg and Barlow Twins ask for such a covariance
by penalties; here it is a constraint, and the gradient goes through the decomposition that enforces it.

The covariance of w embeddings has rank w - 1 at most, so w > d, and w = 2d is the paper's choice. It is a noisy
estimate, and that is wanted: the batch is cut into slices of w images, at random and anew at every step, the same for
all views, and each is whitened by itself. The batch may be as large as one likes, w stays. As there are no negatives,
more than two views pay: with `--views 4` (W-MSE 4) each image has six pairs instead of one, for twice the work.

What you should see: the loss, at most 4, starts just under 2 (cosine 0) and falls from the first epoch on, to 0.65.
`pivot`, the smallest squared diagonal entry of L, stays near 0.03: it is the variance that the most redundant dimension
has left, given those before it. With `python more/wmse.py` the online kNN goes from 53 % to 88 %. Signs of trouble: the
loss stays at 2; or `pivot` sinks towards 0: dimensions repeat each other. Where the decomposition fails, the loss is
nan and the run ends; a smaller `--projector-dim`, larger slices or `--epsilon 1e-4` help.

    python more/wmse.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

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
    normalize,
    parse_args,
    random_blur,
    refuse,
)


@dataclass
class Args(Flags):
    base_lr: float = 4e-3
    optimizer: Literal["adam", "lars", "sgd"] = "adam"  # momentum 0.9 in all of them
    views: int = 2  # of each image: W-MSE 2 or W-MSE 4
    slice_size: int = 0  # w, images that are whitened together; 0: twice the embeddings' width
    epsilon: float = 0.0  # share of the identity in the covariance, for one that is nearly singular
    projector_hidden: int = 512  # width of the projector's hidden layer: that of ResNet-10's features
    projector_dim: int = 32  # d, width of the embeddings
    jitter_strength: float = 0.5  # strength of the colour jitter; 1 for large images


RECIPES = {
    "quick": {},
    # The official code, which trains 1000 epochs, for W-MSE 2. W-MSE 4: --views 4 --batch-size 256 --base-lr 3e-3.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=200, log_every=50, eval_every=10, save_every=10,
        batch_size=512, warmup_epochs=5, base_lr=1.5e-3, projector_hidden=1024, projector_dim=64,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010),
    ),
    # The paper's settings for ImageNet-100, with ResNet-50. W-MSE 4: --views 4 --batch-size 256 --base-lr 2e-3.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=512, epochs=240, warmup_epochs=2, base_lr=1e-3, crop_min_scale=0.08,
        projector_hidden=1024, projector_dim=128, jitter_strength=1.0,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags, and slices that cannot be whitened or do not fit the batch."""
    check_widths(args, "projector_hidden", "projector_dim")
    check_least(args, 0, "jitter_strength")
    check_least(args, 2, "views", most=16)
    if not 0 <= args.epsilon <= 1:
        refuse(f"--epsilon is a share, from 0 to 1, not {args.epsilon}")
    size, d, batch = slice_size(args), args.projector_dim, args.batch_size
    if size <= d and not args.epsilon:
        reason = f"their covariance has rank {max(size - 1, 0)} at most, and so no inverse"
        refuse(f"--slice-size {size} is no larger than --projector-dim {d}: {reason}; take {2 * d}")
    if size < 2 or batch % size:
        fits = [w for w in range(max(2, d + 1), batch + 1) if batch % w == 0]
        rule = f"take {', '.join(map(str, fits))}" if fits else f"lower --projector-dim to {max(1, batch // 2)} or less"
        refuse(f"--slice-size {size} does not divide the batch of {batch} images; {rule}")


def slice_size(args: Args) -> int:
    """w: `--slice-size`, or twice the width of the embeddings."""
    return args.slice_size or 2 * args.projector_dim


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)] * args.views


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws. All views alike."""
    strength, hue = 0.8 * args.jitter_strength, 0.2 * args.jitter_strength
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=strength, contrast=strength, saturation=strength, hue=hue, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.1))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


# ---------------------------------------------------------------------------------------------------- network


class WMSE(nn.Module):
    """Backbone and projector. BatchNorm sees each view by itself in the backbone, all views in the projector."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=False)
        self.projector = nn.Sequential(
            nn.Linear(width, args.projector_hidden, bias=False),
            nn.BatchNorm1d(args.projector_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(args.projector_hidden, args.projector_dim, bias=False),  # whitening would take out a bias
        )

    def forward(self, xs: list[Tensor]) -> tuple[Tensor, ...]:
        h = torch.cat([self.backbone(x) for x in xs])  # n×3×s×s each -> Vn×width: what is kept
        return self.projector(h).chunk(len(xs))  # n×d each


# ------------------------------------------------------------------------------------------------------- loss


def cholesky(v: Tensor, eps: float = 0.0) -> Tensor:
    """L (d, d), lower triangular, with L Lᵀ the covariance of v (w, d); nan where v has no rank d.

    Several slices at once, (k, w, d) -> (k, d, d). The covariance is mixed with `eps` of the identity.
    """
    w, d = v.shape[-2:]
    v = v - v.mean(dim=-2, keepdim=True)
    covariance = v.mT @ v / (w - 1)  # d×d
    covariance = (1 - eps) * covariance + eps * torch.eye(d, dtype=v.dtype, device=v.device)
    factor, failed = torch.linalg.cholesky_ex(covariance)  # unlike cholesky, it does not wait for the device
    return factor.where((failed == 0)[..., None, None], torch.nan)


def whiten(v: Tensor, eps: float = 0.0) -> Tensor:
    """A slice of embeddings v (w, d) -> z (w, d), with mean 0 and covariance I where `eps` is 0; also (k, w, d).

    The gradient goes through mean, covariance and decomposition. In float32 (float64 stays), also under autocast:
    half types have too few digits to divide by a small pivot. Without `eps`, w <= d is a ValueError: the covariance of
    w embeddings has rank w - 1 at most.
    """
    if v.shape[-2] <= v.shape[-1] and not eps:
        raise ValueError(f"{v.shape[-2]} embeddings cannot be whitened in {v.shape[-1]} dimensions: it takes more")
    with torch.autocast(v.device.type, enabled=False):
        v = full_precision(v)
        centred = v - v.mean(dim=-2, keepdim=True)  # w×d
        return torch.linalg.solve_triangular(cholesky(v, eps), centred.mT, upper=False).mT  # L⁻¹ (v - mean), w×d


def wmse_loss(
    views: list[Tensor], order: Tensor, slice_size: int, eps: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of 2 - 2 cos(z, z') over all pairs of views and all N images, in [0, 4]; z are whitened in slices.

    `views` are this rank's embeddings of two or more views, (n, d) each; `order` is a permutation of the N images of
    all ranks, the same on every rank, whose consecutive pieces of `slice_size` images are the slices of every view; a
    size that does not divide N is a ValueError. Every rank computes the loss of the global batch. In float32 (float64
    stays). Terms: the mean cosine, and the smallest squared diagonal entry of any L (of the first view).
    """
    if len(order) % slice_size:
        raise ValueError(f"{len(order)} images do not split into slices of {slice_size}")
    with torch.autocast(views[0].device.type, enabled=False):
        slices = [all_gather(full_precision(v))[order].unflatten(0, (-1, slice_size)) for v in views]  # k×w×d each
        zs = [F.normalize(whiten(v, eps), dim=2) for v in slices]  # k×w×d
        cosine = torch.stack([(z1 * z2).sum(dim=2).mean() for z1, z2 in combinations(zs, 2)]).mean()
        with torch.no_grad():
            pivot = cholesky(slices[0], eps).diagonal(dim1=1, dim2=2).square().min()
    return 2 - 2 * cosine, {"cosine": cosine, "pivot": pivot}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("wmse", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args)

    model = run.place(WMSE(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Adam and SGD decay all of them. Under LARS `adapt=False` exempts biases and BatchNorm, from adaptation and decay.
    groups = [{"params": weights}, {"params": others, "adapt": False}]
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, lr=0.0, weight_decay=args.weight_decay)
    else:
        make = LARS if args.optimizer == "lars" else torch.optim.SGD
        optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=model, optimizer=optimizer)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256

    for step, batch in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        xs = [augment(*view, args) for view in batch]  # n×3×s×s each
        with run.autocast:
            zs = network(xs)  # n×d each
        # Drawn like an augmentation, for the global batch, so the same images meet in a slice on any number of ranks.
        order = torch.from_numpy(batch.views[0].draws.generator.permutation(args.batch_size))  # N
        loss, terms = wmse_loss(zs, order.to(run.device, non_blocking=True), slice_size(args), args.epsilon)

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        run.report(step + 1, loss, terms, lr, zs[0])
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                   paper      official code
#
# learning rate         a cosine at every step, scaled with    –          divided by 5, 50 and 25 epochs before the end;
#                       the batch size                                    not scaled
# warm-up               --warmup-epochs, from 0                –          500 steps
# permutations          one per step                           –          one; for W-MSE 2 on two datasets four
# whitening             of the images of all processes         –          the same; BatchNorm for each GPU by itself
# normalised z          always                                 yes        yes; --no_norm compares z as they are
# biases                none before BatchNorm, none last:      –          both
#                       whitening would remove it
# grey                  with p 0.1                             0.1, 0.2   0.1; ImageNet 0.2
# colours               after the crop                         –          before it
# precision             bf16 where fast, the loss in float32   –          float32
#
# Elsewhere: solo-learn's loss has no gradient for the second view, unless told otherwise: the same loss, but half of
# every pair is a constant.
