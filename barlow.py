"""Barlow Twins: self-supervised learning via redundancy reduction (Zbontar, Jing, Misra, LeCun, Deny; ICML 2021,
arXiv 2103.03230).

Two views of an image pass through the same network. Every dimension of the embeddings z and z' (n×d) is brought to mean
0 and variance 1 over the batch, and C is the d×d matrix of correlations between a dimension of z and one of z':

    C_ij = mean over the batch of  z_i z'_j                                                            (eq. 2)

    loss = sum of (1 - C_ii)²  +  lambda · sum over i != j of C_ij²                                    (eq. 1)
           invariance             redundancy

The target is the identity: a dimension should agree between the views (diagonal) and be uncorrelated with every other
dimension (off the diagonal). A constant embedding correlates with nothing, so its diagonal is 0 and the loss is d: that
prevents complete collapse, without negatives, momentum encoder, stop-gradient or predictor. The redundancy term keeps
the dimensions from repeating each other (try `--lambd 0`).

The redundancy term costs O(n d min(n, d)) here instead of O(n d²): see `barlow_twins_loss`.

    python barlow.py                                            some minutes on two CPU cores
    torchrun --nproc_per_node 4 barlow.py --batch-size 1024     four processes share each batch
    torchrun --nproc_per_node 8 barlow.py --recipe imagenet --data-dir /data/imagenet

What you should see: the loss starts near d, since the two views are hardly correlated, and `on_diagonal` falls from
there. The loss need not come near 0: with n images, C has rank n - 1 at most, so where d is larger it stays above
d·lambda·k / (1 + lambda·k) with k = d / (n - 1) - 1, which is 36 at n = 128, d = 1024 and 124 in recipe imagenet.
Sick: `on_diagonal` stays at d (the embedding is constant, or nothing is learned); `off_diagonal` comes near d², or
`rank` sticks at a few (the dimensions repeat each other).

Where this file, the paper and the official code differ
    gradient          the true one (official code: 1/W of it on W processes, see RECIPES)
    learning rate     of biases and BatchNorm in recipe imagenet: 0.0003, which is the official 0.0048 over W = 16
    weight decay      1e-6, as the official code (paper: 1.5e-6). Its gradient is 1/W of the true one, so there decay
                      weighs W = 16 times as much against it: --weight-decay 1.6e-5 restores that ratio
    precision         bf16 on a GPU, the loss in float32 (official code: fp16, the products of the loss, too)
    lambda            0.0051, as the official code (paper: 0.005)
    BatchNorm of z    written out in the loss (official code: a module, with running statistics that nothing reads)
    blur              a Gaussian kernel of a tenth of the image (official code: Pillow's box approximation)
    short last batch  left out (official code: kept, but divided by the full size)
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    batch_size: int = 128  # images per step over all processes; the default shrinks to fit a smaller dataset
    epochs: int = 15  # passes over the training images
    max_steps: int = 0  # stop after so many steps of the schedule that --epochs sets; 0: do not
    train_limit: int = 0  # train on so many images, chosen at random; 0: all
    base_lr: float = 3.0  # learning rate at batch size 256, scaled linearly with it
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
    lambd: float = 0.0051  # lambda, weight of the redundancy term (paper: 0.005)
    base_lr_biases: float = 0.01  # as --base-lr, for biases and BatchNorm, which LARS does not adapt
    projector_hidden: int = 1024  # width of the projector's two hidden layers
    projector_dim: int = 1024  # d, width of the embeddings
    crop_min_scale: float = 0.2  # smallest share of the area a crop keeps; the paper, for large images: 0.08
    flip: bool = True  # horizontal flip
    color_jitter: bool = True  # brightness, contrast, saturation, hue
    grayscale: bool = True  # drop the colour
    blur: bool = False  # Gaussian blur; part of the paper's views, for large images
    solarize: bool = True  # invert bright values


RECIPES = {
    "quick": {},
    # From no paper: solo-learn's projector, batch, crop and decay (for 1000 epochs); the learning rates are ours.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", batch_size=256, epochs=200, warmup_epochs=10, base_lr=2.0,
        base_lr_biases=0.003, weight_decay=1e-4, projector_hidden=2048, projector_dim=2048, crop_min_scale=0.08,
        log_every=50, eval_every=10, save_every=10,
    ),
    # Section 2.2 and the official code. The authors' best --base-lr at other batch sizes (300 epochs, issue 7 of their
    # repository): 0.7 at 128, 0.4 at 256, 0.3 at 512, 0.25 at 1024, 0.2 at 4096. Those runs had one rate for
    # all and multiplied the loss by 0.024: --base-lr-biases at 0.0015 (0.024 / 16) of --base-lr does the same to those.
    # Biases and BatchNorm take the raw gradient, which in the official code is 1/W of the true one on W processes (the
    # sum of C over processes is not differentiated, then DDP averages). Its 0.0048 with W = 16 is 0.0048 / 16 here.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", batch_size=2048, epochs=1000, warmup_epochs=10, base_lr=0.2,
        base_lr_biases=0.0003, weight_decay=1e-6, projector_hidden=8192, projector_dim=8192, crop_min_scale=0.08,
        blur=True, workers=12,
        log_every=50, eval_every=10, save_every=1,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    if not (args.lambd >= 0 and args.base_lr_biases >= 0):
        fail("--lambd and --base-lr-biases must not be negative")
    if min(args.projector_hidden, args.projector_dim) < 1:
        fail("--projector-hidden and --projector-dim must be at least 1")


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


# ------------------------------------------------------------------------------------------------------- loss


def standardize(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Every dimension of z (n, d) with mean 0 and variance 1 over the batch: a BatchNorm without scale and shift.

    The variance is the biased one, over n. eps keeps a constant dimension at 0, with a finite gradient.
    """
    z = z - z[:1].detach()  # a shift changes nothing, but rounding in the mean of a large constant would
    return F.batch_norm(z, None, None, training=True, eps=eps)


class _GramProduct(torch.autograd.Function):
    """tr(Z1Z1ᵀ Z2Z2ᵀ) of two (n, d), with each gradient as one product: autograd would take two, one per factor."""

    @staticmethod
    def forward(ctx, z1: Tensor, z2: Tensor) -> Tensor:
        gram1, gram2 = z1 @ z1.T, z2 @ z2.T  # n×n
        ctx.save_for_backward(z1, z2, gram1, gram2)
        return (gram1 * gram2).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2, gram1, gram2 = ctx.saved_tensors
        return 2 * grad * (gram2 @ z1), 2 * grad * (gram1 @ z2)  # n×d


def barlow_twins_loss(z1: Tensor, z2: Tensor, lambd: float = 0.0051) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 1 for this rank's embeddings of two views, (n, d) each; a sum over dimensions, not divided by d.

    Computed on the rows of all ranks, in float32 (float64 stays). Terms: the sums over the diagonal (the paper's
    invariance term) and over the rest (its redundancy reduction term), both unweighted. Needs n >= 2 over all ranks.
    Differentiable once. To take it elsewhere, take what it calls with it.

    The sum of all C_ij² is tr(CᵀC) = tr(Z1Z1ᵀ Z2Z2ᵀ)/n², with Z1 and Z2 the standardised embeddings; the diagonal of C
    is known without forming C. So at n = 256, d = 8192 two 256×256 matrices are formed and not one of 8192×8192, with
    the same value and gradient.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (all_gather(z.to(torch.promote_types(z.dtype, torch.float32))) for z in (z1, z2))  # N×d
        n, d = z1.shape
        if n < 2:
            raise ValueError("Barlow Twins needs at least two images: correlations are over the batch")
        z1, z2 = standardize(z1), standardize(z2)
        diagonal = (z1 * z2).mean(dim=0)  # d, C_ii
        squares = _GramProduct.apply(z1, z2) if n < d else (z1.T @ z2).square().sum()  # all C_ij², times n²
        on_diagonal = (1 - diagonal).square().sum()
        off_diagonal = squares / n**2 - diagonal.square().sum()
        loss = on_diagonal + lambd * off_diagonal
    return loss, {"on_diagonal": on_diagonal, "off_diagonal": off_diagonal}


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


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    # --- shared: setup ---
    args = prepare("barlow", args, RECIPES)
    device = start_processes()
    dtype, autocast, scaler = precision_of(args, device)
    train, test = load_data(args, device)
    args = fit_batch_size(args, len(train))
    torch.manual_seed(args.seed)
    # --- end shared: setup ---
    check(args)

    model = BarlowTwins(args)
    # --- shared: model ---
    if args.init:
        load_encoder(model.backbone, args.init)
    model = sync_batchnorm(model.to(device, dtype, memory_format=torch.channels_last), device)
    # --- end shared: model ---
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]  # biases and BatchNorm: no decay, no adaptation
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
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
    peak_lr_biases = args.base_lr_biases * args.batch_size / 256

    for step, ((x1, x2), (draws1, draws2)) in enumerate(views, run.first_step):
        share = cosine_schedule(step, run.total_steps, warmup_steps, peak=1.0, final=1 / 1000)
        lr, lr_biases = share * peak_lr, share * peak_lr_biases
        for group, rate in zip(optimizer.param_groups, (lr, lr_biases), strict=True):
            group["lr"] = rate
        x1 = augment(x1, draws1, args, blur=1.0, solarization=0.0)  # n×3×s×s
        x2 = augment(x2, draws2, args, blur=0.1, solarization=0.2)
        with autocast:
            z1, z2 = network(x1, x2)  # n×d each
        loss, terms = barlow_twins_loss(z1, z2, args.lambd)

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
