"""Barlow Twins: self-supervised learning via redundancy reduction (Zbontar et al.; ICML 2021, arXiv 2103.03230).

Two views of an image pass through the same network. Every dimension of the embeddings z and z' (n×d) is brought to mean
0 and variance 1 over the batch, and C is the d×d matrix of correlations between a dimension of z and one of z':

    C_ij = mean over the batch of  z_i z'_j                                                            (eq. 2)
    loss = sum of (1 - C_ii)²  +  lambda · sum over i != j of C_ij²                                    (eq. 1)
           invariance             redundancy

The target is the identity: a dimension should agree between the views (diagonal) and be uncorrelated with every other
dimension (off the diagonal). A constant embedding correlates with nothing, so its diagonal is 0 and the loss is d: that
prevents complete collapse, without negatives, momentum encoder, stop-gradient or predictor. The redundancy term keeps
the dimensions from repeating each other (try `--lambd 0`).

What you should see: the loss starts near d, since the two views are hardly correlated, and `on_diagonal` falls from
there. The loss need not come near 0: with n images, C has rank n - 1 at most, so where d is larger it stays above
d·lambda·k / (1 + lambda·k) with k = d / (n - 1) - 1. This bound is 36 at n = 128, d = 1024 and 124 in recipe imagenet.
Signs of trouble: `on_diagonal` stays at d (the embedding is constant, or nothing is learned); `off_diagonal` comes near
d², or the effective rank sticks at a few (the dimensions repeat each other).

    python barlow.py    a minute or two on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

from dataclasses import dataclass

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
    all_gather,
    backbone,
    check_least,
    check_positive,
    check_widths,
    color_jitter,
    distribute,
    full_precision,
    grayscale,
    normalize,
    parse_args,
    random_blur,
    solarize,
)


@dataclass
class Args(Flags):
    epochs: int = 11
    base_lr: float = 4.0
    warmup_epochs: float = 5
    base_lr_biases: float = 0.01  # as --base-lr, for biases and BatchNorm, which LARS does not adapt
    lambd: float = 0.0051  # lambda, weight of the redundancy term (paper: 0.005)
    loss_scale: float = 1.0  # multiplies the loss; LARS hides it from the weights, the biases see it
    projector_hidden: int = 1024  # width of the projector's two hidden layers
    projector_dim: int = 1024  # d, width of the embeddings
    solarize: bool = True  # invert bright values


RECIPES = {
    "quick": {},
    # solo-learn's, which reached 92.10 % with it (published; a linear classifier trained along).
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=1000, log_every=50, eval_every=10, save_every=10,
        batch_size=256, warmup_epochs=10, base_lr=0.3, optimizer="larc", weight_decay=1e-4, crop_min_scale=0.08,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), base_lr_biases=0.3, loss_scale=0.1,
        projector_hidden=2048, projector_dim=2048,
    ),
    # Section 2.2 and the official code. The authors' best --base-lr at other batch sizes (300 epochs, issue 7 of their
    # repository): 0.7 at 128, 0.4 at 256, 0.3 at 512, 0.25 at 1024, 0.2 at 4096.
    # Biases and BatchNorm take the raw gradient. In the official code that is 1/W of the true one on W processes: the
    # sum of C over processes is not differentiated, and then DDP averages. Its rate of 0.0048 on W = 16 (its README)
    # is 0.0048 / 16 = 0.0003 here. The runs of issue 7 had one rate for all and a loss multiplied by 0.024: to repeat
    # one, set --base-lr-biases to 0.024 / 16 = 0.0015 of --base-lr.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=2048, epochs=1000, warmup_epochs=10, base_lr=0.2, crop_min_scale=0.08, blur=True,
        base_lr_biases=0.0003, projector_hidden=8192, projector_dim=8192,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    check_widths(args, "projector_hidden", "projector_dim")
    check_least(args, 0, "lambd", "base_lr_biases", "loss_scale")
    check_positive(args, "base_lr")  # of which base_lr_biases is a multiple


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args, blur: float, solarization: float) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws (section 2.2).

    The views differ in the probabilities `blur` and `solarization` only.
    """
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=blur)
    if args.solarize:
        x = solarize(x, draws.chance(solarization))
    return normalize(x, args.mean, args.std)


# ---------------------------------------------------------------------------------------------------- network


class BarlowTwins(nn.Module):
    """Backbone and projector. Each view is a batch of its own for BatchNorm."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=True)
        hidden, d = args.projector_hidden, args.projector_dim
        self.projector = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, d, bias=False),  # the BatchNorm that follows is part of the loss: `standardize`
        )

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        z1 = self.projector(self.backbone(x1))  # n×3×s×s -> n×width -> n×d
        z2 = self.projector(self.backbone(x2))
        return z1, z2


# ------------------------------------------------------------------------------------------------------- loss


def standardize(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Every dimension of z (n, d) with mean 0 and variance 1 over the batch: a BatchNorm without scale and shift.

    The variance is the biased one, over n. eps keeps a constant dimension at 0, with a finite gradient.
    """
    z = z - z[:1].detach()  # a shift changes nothing, and this one spares large means their rounding
    return F.batch_norm(z, None, None, training=True, eps=eps)


def barlow_twins_loss(z1: Tensor, z2: Tensor, lambd: float = 0.0051) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 1 for this rank's embeddings of two views, (n, d) each; a sum over dimensions, not divided by d.

    Computed on the rows of all ranks, in float32 (float64 stays). Terms: the sums over the diagonal (the paper's
    invariance term) and over the rest (its redundancy reduction term), both unweighted. Needs N >= 2 over all.

    The sum of all C_ij² is tr(CᵀC) = tr(z1z1ᵀ z2z2ᵀ)/n², and the diagonal of C is known without forming C. So at
    n = 256, d = 8192 two 256×256 matrices are formed and not one of 8192×8192, with the same value and gradient.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (all_gather(full_precision(z)) for z in (z1, z2))  # N×d
        n, d = z1.shape  # from here on, n is N
        if n < 2:
            raise ValueError("Barlow Twins needs at least two images: correlations are over the batch")
        z1, z2 = standardize(z1), standardize(z2)
        diagonal = (z1 * z2).mean(dim=0)  # d, C_ii
        if n < d:
            squares = ((z1 @ z1.T) * (z2 @ z2.T)).sum() / n**2  # of all C_ij, from two n×n matrices
        else:
            squares = (z1.T @ z2 / n).square().sum()  # the same from C itself, d×d
        on_diagonal = (1 - diagonal).square().sum()
        off_diagonal = squares - diagonal.square().sum()
        loss = on_diagonal + lambd * off_diagonal
    return loss, {"on_diagonal": on_diagonal, "off_diagonal": off_diagonal}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("barlow", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args)

    model = run.place(BarlowTwins(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Neither adapted nor decayed: LARS obeys `adapt`; SGD does not know it, and takes the decay of 0.
    factor = args.base_lr_biases / args.base_lr
    groups = [
        {"params": weights, "factor": 1.0},
        {"params": others, "factor": factor, "weight_decay": 0.0, "adapt": False},
    ]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=model, optimizer=optimizer)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256

    for step, (view1, view2) in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=peak_lr / 1000)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * lr
        x1 = augment(*view1, args, blur=1.0, solarization=0.0)  # n×3×s×s
        x2 = augment(*view2, args, blur=0.1, solarization=0.2)
        with run.autocast:
            z1, z2 = network(x1, x2)  # n×d each
        loss, terms = barlow_twins_loss(z1, z2, args.lambd)
        loss = args.loss_scale * loss

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        run.report(step + 1, loss, terms, lr, z1)
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                   paper      official code
#
# gradient              the true one                           –          1/W of it on W processes: see RECIPES
# rate of biases        0.0003 in `imagenet`: 0.0048 / 16      0.0048     0.0048, on a gradient 16 times smaller
# weight decay          1e-6                                   1.5e-6     1e-6, on such a gradient: equals 1.6e-5
# lambda                0.0051                                 0.005      0.0051
# large JPEGs           decoded smaller, or --full-decode      –          decoded at full size
# precision             bf16 where fast, the loss in float32   –          fp16, the loss's products, too
# BatchNorm of z        written out in the loss                –          a module; nothing reads its running statistics
# blur                  Gaussian; the border is mirrored       –          Pillow's boxes; the border is repeated
# short last batch      left out                               –          kept, but divided by the full size
