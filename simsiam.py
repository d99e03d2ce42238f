"""SimSiam: Exploring Simple Siamese Representation Learning (Chen, He; CVPR 2021, arXiv 2011.10566).

BYOL without the second network: two views pass through one network, and a predictor h makes from the projection of
one view that of the other, which counts as a constant.

    x -> backbone -> projector -> z -> predictor h -> p

    D(p, z) = -cos(p, stopgrad(z)),  a mean over images                                              (eq. 1, 3)

    loss = D(p1, z2) / 2 + D(p2, z1) / 2                                                                (eq. 4)

Constant outputs have the lowest loss, -1, and the stop-gradient is what keeps training from going there
(`--no-stop-gradient`: it collapses). The predictor is needed as well (`--no-predictor`): without it, each half pulls
one view towards the other, and together they have half the gradient of -cos(z1, z2) without stop-gradient, in the same
direction, so that collapses as well (section 4.2). It should keep up with the projections: its learning rate does not
decay (table 1c).

`--std-coeff 1 --cov-coeff 0.01` adds VICReg's variance and covariance penalties on the projections, as the VICReg paper
does it (arXiv 2105.04906, table 4, appendix C.4: in its own 100 epochs on ImageNet, 67.9 % without, 68.1 % with
variance, 67.6 % with both), each normalised as in `vicreg.py`. The last BatchNorm holds every variance of the
projections at 1, so the variance penalty is 0 until that BatchNorm's inputs have all but collapsed (standard deviation
under 0.05 at n = 256).

    python simsiam.py                                            some minutes on two CPU cores
    torchrun --nproc_per_node 4 simsiam.py                       four processes share each batch
    torchrun --nproc_per_node 8 simsiam.py --recipe imagenet --data-dir /data/imagenet

What you should see: the loss starts near 0 and falls towards -0.9; `std`, the standard deviation of the normalised
projections, stays near 1/sqrt(d), which is printed beside it (section 4.1). Sick: the loss runs to -1 while `std` goes
down or `rank` to a few. The last BatchNorm centres the projections and holds their variances, so they cannot all be one
point: without the stop-gradient `rank` falls under 5 within three epochs, and the kNN under the untrained network's.

Where this file, the paper and the official code differ
    learning rate     a cosine per step in every recipe, as in the other files (official code: constant within an
                      epoch, so half an epoch behind on average, and never 0)
    last BatchNorm    of the projector without scale and shift, as the official code (paper: with them; section 4.4
                      finds no difference)
    projector         the last linear layer has no bias (official code: a frozen one, which BatchNorm takes out again)
    flip              before the colours instead of last: the same, since every step between commutes with a flip
    blur              a Gaussian kernel of a tenth of the image (official code: Pillow's box approximation)
    predictor         ten times the learning rate in the `quick` recipe, which is short: a predictor that lags behind
                      lets the projections fall into few dimensions (paper and official code: as the rest)
    residual branches start at zero in `imagenet`, as the official code, and in `cifar`, not in `quick`
    precision         bf16 on a GPU (official code: float32, as `--precision fp32`)
    warm-up           two epochs in `quick`; none in the others, as the official code (paper: 10 epochs from batch 1024
                      on: `--warmup-epochs 10`)
    weight decay      on every parameter, as the official code; with `--optimizer lars`, biases and BatchNorm are left
                      out of both, as in BYOL, Barlow Twins and VICReg
"""

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
    base_lr: float = 0.4  # learning rate at batch size 256, scaled linearly with it
    optimizer: Literal["lars", "sgd"] = "sgd"  # momentum 0.9 in both
    weight_decay: float = 1e-4  # on which parameters: see `groups` in main
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
    projector_layers: int = 2  # of the projector: 3, or 2 on CIFAR-10 (appendix D)
    projector_dim: int = 1024  # d, width of every layer of the projector; the predictor's bottleneck is d/4
    predictor: bool = True  # without it, training collapses (section 4.2)
    stop_gradient: bool = True  # without it, training collapses (section 4.1)
    fix_predictor_lr: bool = True  # leave the predictor's learning rate at its peak (table 1c)
    predictor_lr_factor: float = 10.0  # learning rate of the predictor over that of the rest; the paper: 1
    zero_init: bool = False  # start residual branches at zero: slower at first, and `quick` is short
    std_coeff: float = 0.0  # weight of VICReg's variance penalty on the projections
    cov_coeff: float = 0.0  # weight of VICReg's covariance penalty on the projections
    crop_min_scale: float = 0.2  # smallest share of the area a crop keeps
    flip: bool = True  # horizontal flip
    color_jitter: bool = True  # brightness, contrast, saturation, hue
    grayscale: bool = True  # drop the colour
    blur: bool = False  # Gaussian blur; part of the paper's views, for large images


RECIPES = {
    "quick": {},
    # Appendix D, which trains 800 epochs.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", batch_size=512, epochs=200, warmup_epochs=0, base_lr=0.03,
        weight_decay=5e-4, projector_layers=2, projector_dim=2048, predictor_lr_factor=1.0, zero_init=True,
        log_every=50, eval_every=10, save_every=10,
    ),
    # Section 3 and the official code.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", batch_size=512, epochs=100, warmup_epochs=0, base_lr=0.05,
        weight_decay=1e-4, projector_layers=3, projector_dim=2048, predictor_lr_factor=1.0, zero_init=True, blur=True,
        workers=12,
        log_every=50, eval_every=10, save_every=1,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    if args.projector_layers not in (2, 3):
        fail(f"--projector-layers {args.projector_layers} is not 2 or 3")
    if args.projector_dim < 4:
        fail(f"--projector-dim {args.projector_dim} leaves nothing for a bottleneck of a quarter; take at least 4")
    if not args.predictor_lr_factor > 0:
        fail(f"--predictor-lr-factor must be positive, not {args.predictor_lr_factor}")
    if not (args.std_coeff >= 0 and args.cov_coeff >= 0):
        fail("--std-coeff and --cov-coeff must not be negative")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bilinear", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws (appendix A).

    Both views have the same strengths and probabilities.
    """
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


# ------------------------------------------------------------------------------------------------------- loss


def simsiam_loss(p: Tensor, z: Tensor, stop_gradient: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """D(p, stopgrad(z)), one direction (eq. 1, 3): the mean over this rank's images of -cos(p, z), in [-1, 1].

    p (n, d) are predictions of one view, z (n, d) the projections of the other. The mean over ranks is the loss of
    the global batch: nothing is gathered. In float32 (float64 stays). Stands alone.
    """
    if stop_gradient:
        z = z.detach()
    with torch.autocast(p.device.type, enabled=False):
        p, z = (F.normalize(t.to(torch.promote_types(t.dtype, torch.float32)), dim=1) for t in (p, z))  # n×d
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
    diagonal = z.square().sum(dim=0)  # d, the diagonal of ZᵀZ
    return (gram.square().sum() - diagonal.square().sum()) / (d * (n - 1) ** 2)


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


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    # --- shared: setup ---
    args = prepare("simsiam", args, RECIPES)
    device = start_processes()
    dtype, autocast, scaler = precision_of(args, device)
    train, test = load_data(args, device)
    args = fit_batch_size(args, len(train))
    torch.manual_seed(args.seed)
    # --- end shared: setup ---
    check(args)

    model = SimSiam(args)
    # --- shared: model ---
    if args.init:
        load_encoder(model.backbone, args.init)
    model = sync_batchnorm(model.to(device, dtype, memory_format=torch.channels_last), device)
    # --- end shared: model ---
    parts = [
        (model.backbone, False, 1.0),
        (model.projector, False, 1.0),
        (model.predictor, args.fix_predictor_lr, args.predictor_lr_factor),
    ]
    groups = []  # weight decay on everything; `adapt` is for LARS alone, which spares biases and BatchNorm
    for module, fixed, factor in parts:
        rates = {"fixed": fixed, "factor": factor}
        groups.append({"params": [p for p in module.parameters() if p.ndim > 1], **rates})
        groups.append({"params": [p for p in module.parameters() if p.ndim == 1], **rates, "adapt": False})
    # --- shared: optimizer ---
    make = LARS if args.optimizer == "lars" else torch.optim.SGD
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    # --- end shared: optimizer ---
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
    peak_lr = args.base_lr * args.batch_size / 256

    for step, ((x1, x2), (draws1, draws2)) in enumerate(views, run.first_step):
        lr = cosine_schedule(step, run.total_steps, warmup_steps, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * (peak_lr if group["fixed"] else lr)
        x1 = augment(x1, draws1, args)  # n×3×s×s
        x2 = augment(x2, draws2, args)
        with autocast:
            p1, p2, z1, z2 = network(x1, x2)  # n×d each
        loss1, terms1 = simsiam_loss(p1, z2, args.stop_gradient)
        loss2, terms2 = simsiam_loss(p2, z1, args.stop_gradient)
        loss = (loss1 + loss2) / 2
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

        # --- shared: report ---
        run.log(step + 1, loss, terms, lr, z1)
        run.evaluate(step + 1, model.backbone)
        run.save(step + 1, model, state)
    return run.close()
    # --- end shared: report ---


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))
