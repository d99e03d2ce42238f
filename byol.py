"""BYOL: Bootstrap Your Own Latent (Grill et al.; NeurIPS 2020, arXiv 2006.07733).

Two networks. The online one, with weights theta, is trained to predict what the target one, with weights xi, makes of
the other view of the image. The target is not trained: it follows the online network as a moving average.

    online   x  -> backbone f -> projector g -> z -> predictor q -> p
    target   x' -> backbone f -> projector g -> z'                          (no predictor, no gradient)

    loss of one direction   |p/|p| - z'/|z'||²  =  2 - 2 cos(p, z'),  a mean over images                   (eq. 2)
    loss                    the sum of both directions: each view is once the online network's, once the target's
    target                  xi <- tau xi + (1 - tau) theta after every optimizer step; tau rises to 1         (eq. 1)

Nothing in the loss prevents collapse: constant outputs would have loss 0. But the target does not move along the
gradient of that loss, and in practice the constant is not found as long as there is a predictor that keeps up with
the projector and a target that moves slowly. Take the predictor away (`--no-predictor`) and it collapses.

`--std-coeff 1 --cov-coeff 0.01` adds VICReg's variance and covariance penalties on the online projections, as the
VICReg paper does it (arXiv 2105.04906, table 4, appendix C.4: in its own 100 epochs on ImageNet, 69.3 % without,
70.2 % with variance, 69.5 % with both), each normalised as in `vicreg.py`.

    python byol.py                                            some minutes on two CPU cores
    torchrun --nproc_per_node 4 byol.py                       four processes share each batch
    torchrun --nproc_per_node 8 byol.py --recipe imagenet --data-dir /data/imagenet

What you should see: the loss, at most 8, starts near 4 (cosine 0 in both directions) and falls quickly; it may rise
again once the target tells images apart, so a low loss alone is no sign of good features. `std` stays of the order of
1/sqrt(d), which is printed beside it. Sick: the loss near 0 with `std` near 0 or `rank` near 1.

Where this file, the paper and the official code differ
    initial target    a copy of the online network (official code: other random weights). The start is forgotten after
                      a few times 1/(1 - tau) steps, but a short run would spend them predicting a random network;
                      and a copy starts from --init as well
    residual branches start at zero in `cifar` and `imagenet`, as the official code, not in `quick` (paper: not)
    brightness        multiplicative, as torchvision (official code: additive)
    contrast          about the image's mean grey, saturation towards grey, as torchvision (official code: about the
                      mean of each channel; saturation in HSV)
    resizing          antialiased, as torchvision (official code: not); blur mirrored at the border (zeros)
    precision         bf16 on a GPU (official code: float32, as `--precision fp32`)
    predictor         its matrices at ten times the learning rate in `quick`, whose target moves fast: a predictor that
                      lags behind lets the embeddings fall into few dimensions (paper: as the rest; ten times it
                      where the moving average is left out, in appendix I)
    initial weights   torchvision's and PyTorch's (official code: truncated normal, biases 0)
    linear classifier trained afterwards by evaluate.py (official code: along with BYOL, without gradient to it)
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARS,
    Crop,
    Draws,
    Run,
    all_gather,
    backbone,
    batches,
    color_jitter,
    cosine_schedule,
    distribute,
    fail,
    fit_batch_size,
    grayscale,
    load_data,
    load_encoder,
    normalize,
    parse_args,
    precision_of,
    prepare,
    random_blur,
    solarize,
    start_processes,
    sync_batchnorm,
)


@dataclass
class Args:
    # --- shared: args ---
    recipe: Literal["quick", "cifar", "imagenet"] = "quick"  # a row of RECIPES; flags given by hand beat it
    dataset: Literal["patterns", "cifar10", "cifar100", "stl10", "folder"] = "patterns"  # --data-dir alone means folder
    data_dir: str = ""  # folder of images, or where torchvision keeps its datasets
    image_size: int = 32  # side of the views in pixels
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of the channels, for normalisation
    std: tuple[float, float, float] = IMAGENET_STD  # of the channels, for normalisation
    arch: str = "resnet10"  # resnet10 (one block per stage) or any torchvision ResNet
    stem: Literal["imagenet", "small"] = "imagenet"  # small: 3x3 stride 1, no max-pooling, for 32-pixel images
    batch_size: int = 64  # images per step over all processes; the default shrinks to fit a smaller dataset
    epochs: int = 10  # passes over the training images
    max_steps: int = 0  # stop after so many steps of the schedule that --epochs sets; 0: do not
    train_limit: int = 0  # train on so many images, chosen at random; 0: all
    base_lr: float = 4.0  # learning rate at batch size 256, scaled linearly with it
    optimizer: Literal["lars", "sgd"] = "lars"  # momentum 0.9 in both
    weight_decay: float = 1e-6  # on which parameters: see `groups` in main
    warmup_epochs: float = 2  # linear warm-up of the learning rate from 0
    seed: int = 0  # of the initial weights, the order and every augmentation
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 on a GPU, fp32 on a CPU
    compile: bool = False  # torch.compile the network
    workers: int = 2  # per process, for images that do not fit in memory
    log_every: int = 10  # steps
    eval_every: int = 5  # epochs between online kNN evaluations
    save_every: int = 5  # epochs between checkpoints
    run_dir: str = ""  # default: runs/<method>, then the flags that change the result
    overwrite: bool = False  # delete the run of that folder instead of continuing it
    init: str = ""  # start from this encoder.pt or run folder
    tensorboard: bool = False  # also write TensorBoard events
    # --- end shared: args ---
    base_tau: float = 0.9  # tau at the first step; the target keeps this share of itself (section 3.3)
    projector_hidden: int = 1024  # width of the projector's hidden layer
    projector_dim: int = 256  # d, width of projections and predictions
    predictor_hidden: int = 1024  # width of the predictor's hidden layer
    predictor: bool = True  # without it, training collapses (table 5b)
    predictor_lr_factor: float = 10.0  # learning rate of the predictor's weights over that of the rest; the paper: 1
    zero_init: bool = False  # start residual branches at zero: slower at first, and `quick` is short
    std_coeff: float = 0.0  # weight of VICReg's variance penalty on the online projections
    cov_coeff: float = 0.0  # weight of VICReg's covariance penalty on the online projections
    crop_min_scale: float = 0.2  # smallest share of the area a crop keeps; the paper, for large images: 0.08
    flip: bool = True  # horizontal flip
    color_jitter: bool = True  # brightness, contrast, saturation, hue
    grayscale: bool = True  # drop the colour
    blur: bool = False  # Gaussian blur; part of the paper's views, for large images
    solarize: bool = False  # invert bright values; part of the paper's views


RECIPES = {
    "quick": {},
    # Optimizer of the official recipe for Imagenette (1000 epochs); heads, crop and tau of solo-learn's for CIFAR.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", batch_size=256, epochs=200, warmup_epochs=10, base_lr=2.0,
        weight_decay=1e-6, base_tau=0.99, projector_hidden=4096, predictor_hidden=4096, predictor_lr_factor=1.0,
        zero_init=True, crop_min_scale=0.08, solarize=True, log_every=50, eval_every=10, save_every=10,
    ),
    # Section 3.3 and the official code. 300 epochs: --epochs 300 --base-lr 0.3 --weight-decay 1e-6 --base-tau 0.99;
    # 100 epochs: --epochs 100 --base-lr 0.45 --weight-decay 1e-6 --base-tau 0.99.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", batch_size=4096, epochs=1000, warmup_epochs=10, base_lr=0.2,
        weight_decay=1.5e-6, base_tau=0.996, projector_hidden=4096, predictor_hidden=4096, predictor_lr_factor=1.0,
        zero_init=True, crop_min_scale=0.08, blur=True, solarize=True, workers=12,
        log_every=50, eval_every=10, save_every=1,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    if not 0 <= args.base_tau <= 1:
        fail(f"--base-tau {args.base_tau} is not between 0 and 1")
    if min(args.projector_hidden, args.projector_dim, args.predictor_hidden) < 1:
        fail("--projector-hidden, --projector-dim and --predictor-hidden must be at least 1")
    if not args.predictor_lr_factor > 0:
        fail(f"--predictor-lr-factor must be positive, not {args.predictor_lr_factor}")
    if not (args.std_coeff >= 0 and args.cov_coeff >= 0):
        fail("--std-coeff and --cov-coeff must not be negative")


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


# ------------------------------------------------------------------------------------------------------- loss


def byol_loss(p: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 2, one direction: the mean over this rank's images of 2 - 2 cos(p, z), in [0, 4].

    p (n, d) are predictions of one view, z (n, d) the target's projections of the other; z is a constant. The mean
    over ranks is the loss of the global batch: nothing is gathered. In float32 (float64 stays). Stands alone.
    """
    with torch.autocast(p.device.type, enabled=False):
        p, z = (F.normalize(t.to(torch.promote_types(t.dtype, torch.float32)), dim=1) for t in (p, z.detach()))  # n×d
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
    diagonal = z.square().sum(dim=0)  # d, the diagonal of ZᵀZ
    return (gram.square().sum() - diagonal.square().sum()) / (d * (n - 1) ** 2)


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


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    # --- shared: setup ---
    args = prepare("byol", args, RECIPES)
    device = start_processes()
    dtype, autocast, scaler = precision_of(args, device)
    train, test = load_data(args, device)
    args = fit_batch_size(args, len(train))
    torch.manual_seed(args.seed)
    # --- end shared: setup ---
    check(args)

    model = BYOL(args)
    # --- shared: model ---
    if args.init:
        load_encoder(model.backbone, args.init)
    model = sync_batchnorm(model.to(device, dtype, memory_format=torch.channels_last), device)
    # --- end shared: model ---
    target = Target(model)
    weights = [p for part in (model.backbone, model.projector) for p in part.parameters() if p.ndim > 1]
    predictor = [p for p in model.predictor.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]  # biases and BatchNorm: no decay, no adaptation
    groups = [
        {"params": weights, "factor": 1.0},
        {"params": predictor, "factor": args.predictor_lr_factor},
        {"params": others, "factor": 1.0, "weight_decay": 0.0, "adapt": False},
    ]
    # --- shared: optimizer ---
    make = LARS if args.optimizer == "lars" else torch.optim.SGD
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    # --- end shared: optimizer ---
    state["target"] = target
    # --- shared: resume ---
    run = Run(args, train, test, device, dtype, autocast)
    run.resume(state)
    if args.compile:
        model.compile()
    network = distribute(model, device)
    views = batches(train, crops(args), args, run.first_step, run.last_step, device, dtype)
    warmup_steps = round(args.warmup_epochs * run.steps_per_epoch)
    if run.first_step == 0:
        run.evaluate(0, model.backbone)
    # --- end shared: resume ---
    if args.compile:
        target.compile()
    peak_lr = args.base_lr * args.batch_size / 256

    for step, ((x1, x2), (draws1, draws2)) in enumerate(views, run.first_step):
        lr = cosine_schedule(step, run.total_steps, warmup_steps, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * lr
        x1 = augment(x1, draws1, args, blur=1.0, solarization=0.0)  # n×3×s×s
        x2 = augment(x2, draws2, args, blur=0.1, solarization=0.2)
        with autocast:
            p1, p2, z1, z2 = network(x1, x2)  # n×d each
            with torch.no_grad():
                target1, target2 = target(x1, x2)  # n×d each
        (loss1, terms1), (loss2, terms2) = byol_loss(p1, target2), byol_loss(p2, target1)
        loss = loss1 + loss2  # not halved: biases and BatchNorm see its scale, LARS hides it from the weights
        terms = {"cosine": (terms1["cosine"] + terms2["cosine"]) / 2}
        if args.std_coeff or args.cov_coeff:
            branches = [all_gather(z.to(dtype)) for z in (z1, z2)]  # N×d each, float32 or float64
            terms["variance"] = (variance_loss(branches[0]) + variance_loss(branches[1])) / 2
            terms["covariance"] = covariance_loss(branches[0]) + covariance_loss(branches[1])
            loss = loss + args.std_coeff * terms["variance"] + args.cov_coeff * terms["covariance"]

        # --- shared: backward ---
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        # --- end shared: backward ---
        # --- shared: step ---
        scaler.step(optimizer)
        scaler.update()
        # --- end shared: step ---
        # After the optimizer, so that the average takes in the new weights.
        update_target(target, model, tau_schedule(step, run.total_steps, args.base_tau))

        # --- shared: report ---
        run.log(step + 1, loss, terms, lr, z1)
        run.evaluate(step + 1, model.backbone)
        run.save(step + 1, model, state)
    return run.close()
    # --- end shared: report ---


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))
