"""SimSiam: Exploring Simple Siamese Representation Learning (Chen, He; CVPR 2021, arXiv 2011.10566).

BYOL without the second network: two views pass through one network, and a predictor h maps the projection of one view
to that of the other, which is treated as a constant.

    x -> backbone -> projector -> z -> predictor h -> p

    D(p, z) = -cos(p, stopgrad(z)),  a mean over images                                              (eq. 1, 3)
    loss    = D(p1, z2) / 2 + D(p2, z1) / 2                                                             (eq. 4)

Constant outputs have the lowest loss, -1, and the stop-gradient is what keeps training from going there
(`--no-stop-gradient`: it collapses). The predictor is needed as well (`--no-predictor`): without it, each half pulls
one view towards the other, and together they have half the gradient of -cos(z1, z2) without stop-gradient, in the same
direction, so that collapses as well (section 4.2). It should keep up with the projections: its learning rate does not
decay (table 1c), nor does it warm up.

`--std-coeff 1 --cov-coeff 0.01` adds VICReg's variance and covariance penalties on the projections, as the VICReg paper
does it (arXiv 2105.04906, table 4, appendix C.4: in its own runs of 100 epochs on ImageNet, 67.9 % without, 68.1 % with
variance, 67.6 % with both), each normalised as in `vicreg.py`. The last BatchNorm holds every variance of the
projections at 1, so the variance penalty is 0 until that BatchNorm's inputs have all but collapsed (standard deviation
under 0.05 at n = 256).

What you should see: the loss starts near 0 and falls towards -0.8; `spread`, the standard deviation of the normalised
projections over 1/sqrt(d), stays near 1 (section 4.1). Signs of trouble: the loss runs to -1 while `spread` goes down
or the effective rank to a few. The last BatchNorm centres the projections and holds their variances, so they cannot all
be one point: without the stop-gradient the effective rank falls under 5 within three epochs, and the kNN under the
untrained network's.

    python simsiam.py    a minute or two on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

from dataclasses import dataclass
from typing import Literal

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
)


@dataclass
class Args(Flags):
    batch_size: int = 64
    epochs: int = 9
    base_lr: float = 0.4
    optimizer: Literal["lars", "larc", "sgd"] = "sgd"
    weight_decay: float = 1e-4
    projector_layers: int = 2  # of the projector: 3, or 2 on CIFAR-10 (appendix D)
    projector_dim: int = 1024  # d, width of every layer of the projector; the predictor's bottleneck is d/4
    predictor: bool = True  # without it, training collapses (section 4.2)
    stop_gradient: bool = True  # without it, training collapses (section 4.1)
    fix_predictor_lr: bool = True  # leave the predictor's learning rate at its peak from the first step (table 1c)
    predictor_lr_factor: float = 10.0  # learning rate of the predictor over that of the rest; the paper: 1
    zero_init: bool = False  # start residual branches at zero: slower at first, and `quick` is short
    std_coeff: float = 0.0  # weight of VICReg's variance penalty on the projections
    cov_coeff: float = 0.0  # weight of VICReg's covariance penalty on the projections


RECIPES = {
    "quick": {},
    # Appendix D, which reports 91.8 % (published; linear classifier).
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=800, log_every=50, eval_every=10, save_every=10,
        batch_size=512, warmup_epochs=0, base_lr=0.03, weight_decay=5e-4, projector_layers=2, projector_dim=2048,
        predictor_lr_factor=1.0, zero_init=True,
    ),
    # Section 3 and the official code.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=512, epochs=100, warmup_epochs=0, base_lr=0.05, blur=True, projector_layers=3, projector_dim=2048,
        predictor_lr_factor=1.0, zero_init=True,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    check_widths(args, "projector_dim")
    check_least(args, 4, "projector_dim")  # the bottleneck is a quarter of it
    check_least(args, 0, "std_coeff", "cov_coeff")
    check_positive(args, "predictor_lr_factor")
    if args.projector_layers not in (2, 3):
        refuse(f"--projector-layers {args.projector_layers} is not 2 or 3")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bilinear", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws (appendix A)."""
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


# ---------------------------------------------------------------------------------------------------- network


class SimSiam(nn.Module):
    """Backbone, projector and predictor. Each view is a batch of its own for BatchNorm."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=args.zero_init)
        d = args.projector_dim
        middle = [nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(
            nn.Linear(width, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            *(middle if args.projector_layers == 3 else []),
            nn.Linear(d, d, bias=False),
            nn.BatchNorm1d(d, affine=False),  # no ReLU behind it
        )
        self.predictor = nn.Sequential(
            nn.Linear(d, d // 4, bias=False),  # a bottleneck
            nn.BatchNorm1d(d // 4),
            nn.ReLU(inplace=True),
            nn.Linear(d // 4, d),  # no BatchNorm behind it: training would be unstable (section 4.4)
        )
        if not args.predictor:
            self.predictor = nn.Identity()

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z1 = self.projector(self.backbone(x1))  # n×3×s×s -> n×width -> n×d
        z2 = self.projector(self.backbone(x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)  # n×d each
        return p1, p2, z1, z2


# ------------------------------------------------------------------------------------------------------- loss


def simsiam_loss(p: Tensor, z: Tensor, stop_gradient: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """D(p, stopgrad(z)), one direction (eq. 1, 3): the mean over this rank's images of -cos(p, z), in [-1, 1].

    p (n, d) are predictions of one view, z (n, d) the projections of the other. The mean over ranks is the loss of
    the global batch: nothing is gathered. In float32 (float64 stays).
    """
    if stop_gradient:
        z = z.detach()
    with torch.autocast(p.device.type, enabled=False):
        p, z = (F.normalize(full_precision(t), dim=1) for t in (p, z))  # n×d
        cosine = (p * z).sum(dim=1).mean()
        loss = -cosine
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
    run = Run("simsiam", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args)

    model = run.place(SimSiam(args))  # on the device; --init; BatchNorm over the images of all processes
    parts = [
        (model.backbone, False, 1.0),
        (model.projector, False, 1.0),
        (model.predictor, args.fix_predictor_lr, args.predictor_lr_factor),
    ]
    groups = []  # SGD decays every parameter; `adapt=False`, which only LARS reads, exempts biases and BatchNorm
    for module, fixed, factor in parts:
        rates = {"fixed": fixed, "factor": factor}
        groups.append({"params": [p for p in module.parameters() if p.ndim > 1], **rates})
        groups.append({"params": [p for p in module.parameters() if p.ndim == 1], **rates, "adapt": False})
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=model, optimizer=optimizer)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256

    for step, (view1, view2) in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:  # the fixed rate skips decay and warm-up
            group["lr"] = group["factor"] * (peak_lr if group["fixed"] else lr)
        x1 = augment(*view1, args)  # n×3×s×s
        x2 = augment(*view2, args)
        with run.autocast:
            p1, p2, z1, z2 = network(x1, x2)  # n×d each
        loss1, terms1 = simsiam_loss(p1, z2, args.stop_gradient)
        loss2, terms2 = simsiam_loss(p2, z1, args.stop_gradient)
        loss = (loss1 + loss2) / 2
        terms = {"cosine": (terms1["cosine"] + terms2["cosine"]) / 2}
        if args.std_coeff or args.cov_coeff:
            terms["variance"], terms["covariance"] = vicreg_penalties(z1, z2)
            loss = loss + args.std_coeff * terms["variance"] + args.cov_coeff * terms["covariance"]

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
# learning rate         a cosine at every step                 –          constant within an epoch (1)
# predictor's rate      ten times the rest's in `quick` (2)    no factor  no factor
# warm-up               two epochs in `quick`, else none       10 (3)     none
# last BatchNorm        of the projector: no scale, no shift   both (4)   neither
# last linear layer     of the projector: no bias              –          a frozen one, which BatchNorm removes
# residual branches     start at zero, not in `quick`          –          start at zero
# weight decay          on all; with LARS not on 1-d tensors   on all     on all
# flip                  before the colours (5)                 –          last
# blur                  Gaussian; the border is mirrored       –          Pillow's boxes; the border is repeated
# large JPEGs           decoded smaller, or --full-decode      –          decoded at full size
# precision             bf16 where fast                        –          float32, as --precision fp32
#
# (1) Half an epoch behind on average, and never 0.
# (2) `quick` is short, and a predictor that lags behind lets the projections fall into few dimensions.
# (3) Epochs, from batch 1024 on: `--warmup-epochs 10`.
# (4) Section 4.4 finds no difference.
# (5) This makes no difference: every step in between commutes with a flip.
