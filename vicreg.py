"""VICReg: Variance-Invariance-Covariance Regularization (Bardes, Ponce, LeCun; ICLR 2022, arXiv 2105.04906).

Two views of an image pass through the same network, and three terms act on the embeddings z and z' (n×d):

    invariance   i(z, z')  mean squared distance between the two views of an image                     (eq. 5)
    variance     v(z)      hinge that keeps the standard deviation of every dimension above gamma = 1  (eq. 1)
    covariance   c(z)      squared covariances between different dimensions                        (eq. 3, 4)

    loss = 25 i(z, z') + 25 [v(z) + v(z')] / 2 + 1 [c(z) + c(z')]                                      (eq. 6)
    (normalised as in the official code; the table at the end says how eq. 5 and 6 differ)

Nothing else prevents collapse: no negatives, no momentum encoder, no stop-gradient, no predictor. The variance term
alone keeps the embeddings from becoming one point (try `--std-coeff 0`), the covariance term keeps the dimensions from
repeating each other. The two branches need not share weights (`--no-shared-weights`).

What you should see: the loss starts near 23 (variance term 0.66, invariance 0.23) and is slow to fall: at first the two
views come together, the variance term rises to 0.77 and the covariance term sinks to a tenth of what it was; then the
embeddings spread, variance falls and covariance rises to 1.7. With `python vicreg.py` the loss ends near 18.5, and the
online kNN goes from 44 % to 88 %. Signs of trouble: `variance` near 0.99 and `invariance` near 0 (all of it has
collapsed: the loss stays near 24.8, or goes to 0 with `--std-coeff 0`), or the effective rank at a few.

    python vicreg.py    a minute or two on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    batch_size: int = 256
    epochs: int = 12
    base_lr: float = 2.5
    warmup_epochs: float = 5
    sim_coeff: float = 25.0  # lambda, weight of the invariance term (section 4.2)
    std_coeff: float = 25.0  # mu, weight of the variance term
    cov_coeff: float = 1.0  # nu, weight of the covariance term
    expander_hidden: int = 1024  # width of the expander's two hidden layers
    expander_dim: int = 1024  # d, width of the embeddings
    shared_weights: bool = True  # one network for both views, or one for each; --init fills the first
    arch2: str = ""  # backbone of the second view, if not the same; implies --no-shared-weights
    solarize: bool = True  # invert bright values
    symmetric_views: bool = False  # the same blur and solarisation in both views, as the paper has it (appendix C.1)


RECIPES = {
    "quick": {},
    # solo-learn's, which reached 92.07 % with it (published; a linear classifier trained along). Its variance term is
    # not halved, so mu is 50 here.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=1000, log_every=50, eval_every=10, save_every=10,
        batch_size=256, warmup_epochs=10, base_lr=0.3, optimizer="larc", weight_decay=1e-4, symmetric_views=True,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), std_coeff=50.0,
        expander_hidden=2048, expander_dim=2048,
    ),
    # Section 4.2 and the official code. 100 epochs: --epochs 100 --base-lr 0.3.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=2048, epochs=1000, warmup_epochs=10, base_lr=0.2, crop_min_scale=0.08, blur=True,
        expander_hidden=8192, expander_dim=8192,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    check_widths(args, "expander_hidden", "expander_dim")
    check_least(args, 0, "sim_coeff", "std_coeff", "cov_coeff")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args, blur: float, solarization: float) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws (appendix C.1).

    The views differ in the probabilities `blur` and `solarization` only, which are those of the official code.
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


class VICReg(nn.Module):
    """Backbone and expander; two of each with `--no-shared-weights`. Each view is a batch of its own for BatchNorm."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, self.expander = self.branch(args, args.arch)
        self.shared_weights = args.shared_weights and not args.arch2
        if not self.shared_weights:
            self.backbone2, self.expander2 = self.branch(args, args.arch2 or args.arch)

    @staticmethod
    def branch(args: Args, arch: str) -> tuple[nn.Module, nn.Module]:
        """A backbone and its expander."""
        net, width = backbone(arch, args.stem, zero_init=True)
        hidden, d = args.expander_hidden, args.expander_dim
        expander = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, d, bias=False),  # no BatchNorm: the variance term sets the scale
        )
        return net, expander

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        z1 = self.expander(self.backbone(x1))  # n×3×s×s -> n×width -> n×d
        if self.shared_weights:
            z2 = self.expander(self.backbone(x2))
        else:
            z2 = self.expander2(self.backbone2(x2))
        return z1, z2


# ------------------------------------------------------------------------------------------------------- loss


def invariance_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean over images and dimensions of the squared distance between two views, (n, d) each (eq. 5, over d)."""
    return F.mse_loss(z1, z2)


def variance_loss(z: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Mean over dimensions of how far the standard deviation of z (n, d) falls short of gamma (eq. 1, 2).

    Not of the variance: its gradient, 2 (z - mean) / (n - 1), shrinks with the spread, so a collapse would go on. That
    of the root keeps its size (section 4.1, below eq. 2) until the spread falls to sqrt(eps) = 0.01. eps also keeps
    the gradient of a constant column from being 0 / 0.
    """
    std = torch.sqrt(z.var(dim=0) + eps)  # d; unbiased, over n - 1
    return F.relu(gamma - std).mean()


def covariance_loss(z: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances of z (n, d), divided by d. On paper, with the columns of z centred:

        C = zᵀz / (n - 1)                                                  d×d (eq. 3)
        c = (sum of all C_ij² - sum of all C_ii²) / d                          (eq. 4)

    The sum of all squared entries of the d×d matrix zᵀz is that of the n×n matrix zzᵀ: both are tr(zᵀzzᵀz). And the
    diagonal of zᵀz is known without forming it. So the smaller of the two matrices is formed: 256×256 instead of
    8192×8192 at n = 256, d = 8192, with the same value and gradient. Differentiable once.
    """
    n, d = z.shape
    z = z - z.mean(dim=0)
    squares = _SquaredGram.apply(z)  # (z @ z.T).square().sum(), and the same as (z.T @ z).square().sum()
    diagonal = z.square().sum(dim=0)  # d, the diagonal of zᵀz
    return (squares - diagonal.square().sum()) / (d * (n - 1) ** 2)


class _SquaredGram(torch.autograd.Function):
    """|zzᵀ|² of z (n, d), with its gradient 4 zzᵀz as one product: autograd would take two, one per factor.

    It makes this term no faster at d = 1024, and 1.2 to 1.7 times as fast at d = 8192 (n = 256, two kinds of CPU).
    """

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        gram = z @ z.T if z.shape[0] < z.shape[1] else z.T @ z  # n×n or d×d
        ctx.save_for_backward(z, gram)
        return gram.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        z, gram = ctx.saved_tensors
        return 4 * grad * (gram @ z if z.shape[0] < z.shape[1] else z @ gram)  # n×d


def vicreg_loss(
    z1: Tensor, z2: Tensor, sim_coeff: float = 25.0, std_coeff: float = 25.0, cov_coeff: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 6 for this rank's embeddings of two views, (n, d) each; the terms are returned unweighted.

    Computed on the rows of all ranks, in float32 (float64 stays), with official normalisation: variance halved over
    the branches, covariance summed. Needs N >= 2 images over all ranks.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (all_gather(full_precision(z)) for z in (z1, z2))  # N×d
        if len(z1) < 2:
            raise ValueError("VICReg needs at least two images: variance and covariance are over the batch")
        invariance = invariance_loss(z1, z2)
        variance = (variance_loss(z1) + variance_loss(z2)) / 2
        covariance = covariance_loss(z1) + covariance_loss(z2)
        loss = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance
    return loss, {"invariance": invariance, "variance": variance, "covariance": covariance}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("vicreg", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args)

    model = run.place(VICReg(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Neither adapted nor decayed: LARS obeys `adapt`; SGD does not know it, and takes the decay of 0.
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=model, optimizer=optimizer)  # from a checkpoint, if there is one
    blur, solarization = ((0.5, 0.5), (0.1, 0.1)) if args.symmetric_views else ((1.0, 0.1), (0.0, 0.2))
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256

    for step, (view1, view2) in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=peak_lr / 1000)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x1 = augment(*view1, args, blur=blur[0], solarization=solarization[0])  # n×3×s×s
        x2 = augment(*view2, args, blur=blur[1], solarization=solarization[1])
        with run.autocast:
            z1, z2 = network(x1, x2)  # n×d each
        loss, terms = vicreg_loss(z1, z2, args.sim_coeff, args.std_coeff, args.cov_coeff)

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
# invariance            mean over n and d                      (1)        mean over n and d
# variance              half the sum over the branches         the sum    half the sum
# blur                  with p 1.0 in view 1, 0.1 in view 2    0.5, 0.5   1.0, 0.1
# solarisation          with p 0 in view 1, 0.2 in view 2      0.1, 0.1   0, 0.2
# blur                  Gaussian; the border is mirrored       –          Pillow's boxes; the border is repeated
# large JPEGs           decoded smaller, or --full-decode      –          decoded at full size
# precision             bf16 where fast, the loss in float32   –          fp16, the loss's products, too
# final learning rate   a thousandth of the peak               0.002      a thousandth: 0.0016 at batch 2048
# short last batch      left out                               –          kept, but divided by the full size
#
# (1) Eq. 5: a mean over n and a sum over d. Its pseudo-code: a mean over both.
