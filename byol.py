"""BYOL: Bootstrap Your Own Latent (Grill et al.; NeurIPS 2020, arXiv 2006.07733).

Two networks. The online one, with weights theta, is trained to predict what the target one, with weights xi, makes of
the other view of the image. The target is not trained: it follows the online network as a moving average.

    online   x  -> backbone f -> projector g -> z -> predictor q -> p
    target   x' -> backbone f -> projector g -> z'                          (no predictor, no gradient)

    loss of one direction   |p/|p| - z'/|z'||²  =  2 - 2 cos(p, z'),  a mean over images                   (eq. 2)
    loss                    the sum of both directions: each view is once the online network's, once the target's
    target                  xi <- tau xi + (1 - tau) theta after every optimizer step; tau rises towards 1    (eq. 1)

Nothing in the loss prevents collapse: constant outputs would have loss 0. But the target does not move along the
gradient of that loss, and in practice the constant is not found as long as there is a predictor that keeps up with
the projector and a target that moves slowly. Take the predictor away (`--no-predictor`) and it collapses.

`--std-coeff 1 --cov-coeff 0.01` adds VICReg's variance and covariance penalties on the online projections, as the
VICReg paper does it (arXiv 2105.04906, table 4, appendix C.4: in its own runs of 100 epochs on ImageNet, 69.3 %
without, 70.2 % with variance, 69.5 % with both), each normalised as in `vicreg.py`.

What you should see: the loss, at most 8, starts near 4 (cosine 0 in both directions) and falls quickly; it may rise
again once the target tells images apart, so a low loss alone is no sign of good features. `spread`, the standard
deviation of the normalised projections over its isotropic value 1/sqrt(d), stays of the order of 1. Signs of trouble:
the loss near 0 with `spread` near 0 or the effective rank near 1.

    python byol.py    a minute or two on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

import copy
import math
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
    refuse,
    solarize,
)


@dataclass
class Args(Flags):
    epochs: int = 10
    base_lr: float = 4.0
    base_tau: float = 0.9  # tau at the first step; the target keeps this share of itself (section 3.3)
    projector_hidden: int = 1024  # width of the projector's hidden layer
    projector_dim: int = 256  # d, width of projections and predictions
    predictor_hidden: int = 1024  # width of the predictor's hidden layer
    predictor: bool = True  # without it, training collapses (table 5b)
    predictor_lr_factor: float = 10.0  # learning rate of the predictor's weights over that of the rest; the paper: 1
    zero_init: bool = False  # start residual branches at zero: slower at first, and `quick` is short
    std_coeff: float = 0.0  # weight of VICReg's variance penalty on the projections
    cov_coeff: float = 0.0  # weight of VICReg's covariance penalty on the projections
    solarize: bool = False  # invert bright values; part of the paper's views


RECIPES = {
    "quick": {},
    # solo-learn's, which reached 92.58 % with it (published; a linear classifier trained along).
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=1000, log_every=50, eval_every=10, save_every=10,
        batch_size=256, warmup_epochs=10, base_lr=1.0, optimizer="larc", weight_decay=1e-5, crop_min_scale=0.08,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), solarize=True, zero_init=True,
        base_tau=0.99, projector_hidden=4096, predictor_hidden=4096, predictor_lr_factor=1.0,
    ),
    # Section 3.3 and the official code. 300 epochs: --epochs 300 --base-lr 0.3 --weight-decay 1e-6 --base-tau 0.99;
    # 100 epochs: --epochs 100 --base-lr 0.45 --weight-decay 1e-6 --base-tau 0.99.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=4096, epochs=1000, warmup_epochs=10, base_lr=0.2, crop_min_scale=0.08, blur=True, solarize=True,
        zero_init=True, weight_decay=1.5e-6, base_tau=0.996, projector_hidden=4096, predictor_hidden=4096,
        predictor_lr_factor=1.0,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    check_widths(args, "projector_hidden", "projector_dim", "predictor_hidden")
    check_least(args, 0, "std_coeff", "cov_coeff")
    check_positive(args, "predictor_lr_factor")
    if not 0 <= args.base_tau <= 1:
        refuse(f"--base-tau {args.base_tau} is not between 0 and 1")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args, blur: float, solarization: float) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws (appendix B, table 6).

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


class BYOL(nn.Module):
    """The online network: backbone, projector and predictor. Each view is a batch of its own for BatchNorm."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=args.zero_init)
        hidden, d = args.projector_hidden, args.projector_dim
        self.projector = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, d, bias=False),  # no BatchNorm behind it
        )
        hidden = args.predictor_hidden
        self.predictor = nn.Sequential(
            nn.Linear(d, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, d, bias=False),  # no BatchNorm behind it
        )
        if not args.predictor:
            self.predictor = nn.Identity()

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z1 = self.projector(self.backbone(x1))  # n×3×s×s -> n×width -> n×d
        z2 = self.projector(self.backbone(x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)  # n×d each
        return p1, p2, z1, z2


class Target(nn.Module):
    """The target network: backbone and projector, at first a copy of the online ones, never given a gradient.

    It runs in train mode: BatchNorm normalises with the statistics of the batch, as in the online network.
    """

    def __init__(self, online: BYOL):
        super().__init__()
        self.backbone = copy.deepcopy(online.backbone)
        self.projector = copy.deepcopy(online.projector)
        self.requires_grad_(False)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        z1 = self.projector(self.backbone(x1))  # n×3×s×s -> n×width -> n×d
        z2 = self.projector(self.backbone(x2))
        return z1, z2


def tau_schedule(step: int, total_steps: int, base: float) -> float:
    """tau at `step` (from 0): half a cosine from `base` to 1 at `total_steps` (section 3.3)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, tau: float) -> None:
    """xi <- tau xi + (1 - tau) theta (eq. 1) for every parameter of the target, matched by name, in one call.

    Buffers are left alone: the target's running statistics come from its own passes.
    """
    theta = dict(online.named_parameters())
    xi = dict(target.named_parameters())
    torch._foreach_lerp_(list(xi.values()), [theta[name] for name in xi], 1 - tau)


# ------------------------------------------------------------------------------------------------------- loss


def byol_loss(p: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 2, one direction: the mean over this rank's images of 2 - 2 cos(p, z), in [0, 4].

    p (n, d) are predictions of one view, z (n, d) the target's projections of the other; z is a constant. The mean
    over ranks is the loss of the global batch: nothing is gathered. In float32 (float64 stays).
    """
    with torch.autocast(p.device.type, enabled=False):
        p, z = (F.normalize(full_precision(t), dim=1) for t in (p, z.detach()))  # n×d
        cosine = (p * z).sum(dim=1).mean()
        loss = 2 - 2 * cosine
    return loss, {"cosine": cosine}


def variance_loss(z: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> Tensor:
    """VICReg: mean over dimensions of how far the standard deviation of z (n, d) falls short of gamma."""
    std = torch.sqrt(z.var(dim=0) + eps)  # d; unbiased, over n - 1
    return F.relu(gamma - std).mean()


def covariance_loss(z: Tensor) -> Tensor:
    """VICReg: sum of the squared off-diagonal covariances of z (n, d), divided by d; see vicreg.py for the n×n form."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    gram = z @ z.T if n < d else z.T @ z  # n×n or d×d
    diagonal = z.square().sum(dim=0)  # d, the diagonal of zᵀz
    return (gram.square().sum() - diagonal.square().sum()) / (d * (n - 1) ** 2)


def vicreg_penalties(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """VICReg's variance and covariance terms of this rank's projections of two views, over the rows of all ranks."""
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (all_gather(full_precision(z)) for z in (z1, z2))  # N×d
        return (variance_loss(z1) + variance_loss(z2)) / 2, covariance_loss(z1) + covariance_loss(z2)


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("byol", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args)

    model = run.place(BYOL(args))  # on the device; --init; BatchNorm over the images of all processes
    target = Target(model)
    weights = [p for part in (model.backbone, model.projector) for p in part.parameters() if p.ndim > 1]
    predictor = [p for p in model.predictor.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Neither adapted nor decayed: LARS obeys `adapt`; SGD does not know it, and takes the decay of 0.
    groups = [
        {"params": weights, "factor": 1.0},
        {"params": predictor, "factor": args.predictor_lr_factor},
        {"params": others, "factor": 1.0, "weight_decay": 0.0, "adapt": False},
    ]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=model, optimizer=optimizer, target=target)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256

    for step, (view1, view2) in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * lr
        x1 = augment(*view1, args, blur=1.0, solarization=0.0)  # n×3×s×s
        x2 = augment(*view2, args, blur=0.1, solarization=0.2)
        with run.autocast:
            p1, p2, z1, z2 = network(x1, x2)  # n×d each
            with torch.no_grad():
                target1, target2 = target(x1, x2)  # n×d each
        loss1, terms1 = byol_loss(p1, target2)
        loss2, terms2 = byol_loss(p2, target1)
        loss = loss1 + loss2  # not halved: biases and BatchNorm see its scale, LARS hides it from the weights
        terms = {"cosine": (terms1["cosine"] + terms2["cosine"]) / 2}
        if args.std_coeff or args.cov_coeff:
            terms["variance"], terms["covariance"] = vicreg_penalties(z1, z2)
            loss = loss + args.std_coeff * terms["variance"] + args.cov_coeff * terms["covariance"]

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        # After the optimizer, so that the average takes in the new weights.
        update_target(target, model, tau_schedule(step, run.total_steps, args.base_tau))
        run.report(step + 1, loss, terms, lr, z1)
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                   paper      official code
#
# initial target        a copy of the online network (1)       –          other random weights
# residual branches     start at zero, not in `quick`          not at 0   start at zero
# predictor's rate      ten times the rest's in `quick` (2)    no factor  no factor
# linear classifier     trained afterwards, by evaluate.py     –          trained along, without gradient to BYOL
# brightness            multiplied                             –          added
# contrast, saturation  about the mean grey; towards grey      –          about the mean of each channel; in HSV
# resizing, blur        antialiased; mirrored at the border    –          not antialiased; zeros beyond the border
# large JPEGs           decoded smaller, or --full-decode      –          decoded at full size
# precision             bf16 where fast                        –          float32, as --precision fp32
# initial weights       those of torchvision and PyTorch       –          truncated normal, biases 0
#
# (1) The start is forgotten after a few times 1/(1 - tau) steps, but a short run would spend them predicting a random
#     network; and a copy starts from --init as well.
# (2) The target of `quick` moves fast. A predictor that lags behind lets the embeddings fall into few dimensions. The
#     paper takes ten times the rate where it leaves out the moving average (appendix I).
