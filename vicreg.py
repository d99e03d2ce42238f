"""VICReg: Variance-Invariance-Covariance Regularization (Bardes, Ponce, LeCun; ICLR 2022, arXiv 2105.04906).

Two views of an image pass through the same network, and three terms act on the embeddings z and z' (n×d):

    invariance   s(z, z')  mean squared distance between the two views of an image                     (eq. 5)
    variance     v(z)      hinge that keeps the standard deviation of every dimension above gamma = 1  (eq. 1)
    covariance   c(z)      squared covariances between different dimensions                        (eq. 3, 4)

    loss = 25 s(z, z') + 25 [v(z) + v(z')] / 2 + 1 [c(z) + c(z')]                                      (eq. 6)

Nothing else prevents collapse: no negatives, no momentum encoder, no stop-gradient, no predictor. The variance term
alone keeps the embeddings from becoming one point (try `--std-coeff 0`), the covariance term keeps the
dimensions from repeating each other. The two branches need not share weights (`--no-shared-weights`).

The covariance term costs O(n d min(n, d)) here instead of O(n d²): |ZᵀZ|² = |ZZᵀ|², see `covariance_loss`.

    python vicreg.py                                            some minutes on two CPU cores
    torchrun --nproc_per_node 4 vicreg.py --batch-size 1024     four processes share each batch
    torchrun --nproc_per_node 8 vicreg.py --recipe imagenet --data-dir /data/imagenet

What you should see: the loss starts near 23 (variance term 0.66, invariance 0.23) and is slow to fall: at first the two
views come together, the variance term rises to 0.76 and the covariance term sinks to a tenth of what it was; then the
embeddings spread, variance falls and covariance rises to nearly 2. With `python vicreg.py` the loss ends near 18, and
the online kNN goes from 44 % to 89 %. Sick: `variance` near 0.99 and `invariance` near 0 (complete collapse: the loss
stays near 24.8, or goes to 0 with `--std-coeff 0`), or `rank` at a few (dimensional collapse). `--val-loss` logs the
terms on the test images as well.

Where this file, the paper and the official code differ
    normalisation     as the official code: invariance is a mean over n and d (eq. 5: a sum over d), variance is halved
                      over the two branches (eq. 6 sums)
    precision         bf16 on a GPU, the loss in float32 (official code: fp16, the products of the loss, too)
    augmentation      as the official code: blur 1.0 | 0.1 and solarize 0 | 0.2 (paper: 0.5 and 0.1 on both)
    blur              a Gaussian kernel of a tenth of the image (official code: Pillow's box approximation)
    final rate        a thousandth of the peak, 0.0016 at batch 2048, as the official code (paper: 0.002)
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
    Data,
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
    batch_size: int = 256  # images per step over all processes; the default shrinks to fit a smaller dataset
    epochs: int = 15  # passes over the training images
    max_steps: int = 0  # stop after so many steps of the schedule that --epochs sets; 0: do not
    train_limit: int = 0  # train on so many images, chosen at random; 0: all
    base_lr: float = 2.5  # learning rate at batch size 256, scaled linearly with it
    optimizer: Literal["lars", "sgd"] = "lars"  # momentum 0.9 in both
    weight_decay: float = 1e-6  # on which parameters: see `groups` in main
    warmup_epochs: float = 7  # linear warm-up of the learning rate from 0
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
    sim_coeff: float = 25.0  # lambda, weight of the invariance term (section 4.2)
    std_coeff: float = 25.0  # mu, weight of the variance term
    cov_coeff: float = 1.0  # nu, weight of the covariance term
    expander_hidden: int = 1024  # width of the expander's two hidden layers
    expander_dim: int = 1024  # d, width of the embeddings
    shared_weights: bool = True  # one network for both views, or one for each; --init fills the first
    arch2: str = ""  # backbone of the second view, if not the same; implies --no-shared-weights
    crop_min_scale: float = 0.2  # smallest share of the area a crop keeps; the paper, for large images: 0.08
    flip: bool = True  # horizontal flip
    color_jitter: bool = True  # brightness, contrast, saturation, hue
    grayscale: bool = True  # drop the colour
    blur: bool = False  # Gaussian blur; part of the paper's views, for large images
    solarize: bool = True  # invert bright values
    val_loss: bool = False  # at each evaluation of a trained network, log the loss on test images


RECIPES = {
    "quick": {},
    # From no paper: solo-learn's expander, batch, crop and decay (for 1000 epochs); the learning rate is ours.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", batch_size=256, epochs=200, warmup_epochs=10, base_lr=2.0,
        weight_decay=1e-4, expander_hidden=2048, expander_dim=2048, crop_min_scale=0.2,
        log_every=50, eval_every=10, save_every=10,
    ),
    # Section 4.2 and the official code. 100 epochs: --epochs 100 --base-lr 0.3.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", batch_size=2048, epochs=1000, warmup_epochs=10, base_lr=0.2,
        weight_decay=1e-6, expander_hidden=8192, expander_dim=8192, crop_min_scale=0.08, blur=True,
        workers=12,
        log_every=50, eval_every=10, save_every=1,
    ),
}  # fmt: skip


def check(args: Args, test: Data | None) -> None:
    """Refuse impossible values of this method's flags."""
    if not all(coeff >= 0 for coeff in (args.sim_coeff, args.std_coeff, args.cov_coeff)):
        fail("--sim-coeff, --std-coeff and --cov-coeff must not be negative")
    if min(args.expander_hidden, args.expander_dim) < 1:
        fail("--expander-hidden and --expander-dim must be at least 1")
    if args.val_loss and len(test or ()) < args.batch_size:
        fail("--val-loss needs val/ or test/ with class folders and at least one batch of images")


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


# ------------------------------------------------------------------------------------------------------- loss


def invariance_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean over images and dimensions of the squared distance between two views, (n, d) each (eq. 5, over d)."""
    return F.mse_loss(z1, z2)


def variance_loss(z: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Mean over dimensions of how far the standard deviation of z (n, d) falls short of gamma (eq. 1, 2).

    eps stands under the root, where it keeps the gradient finite on a constant column.
    """
    std = torch.sqrt(z.var(dim=0) + eps)  # d; unbiased, over n - 1
    return F.relu(gamma - std).mean()


class _SquaredGram(torch.autograd.Function):
    """|ZᵀZ|² of z (n, d), with its gradient 4 ZZᵀZ as one product: autograd would take two, one per factor."""

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


def covariance_loss(z: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances of z (n, d), divided by d (eq. 3, 4).

    The sum of all squared entries of the d×d matrix ZᵀZ is that of the n×n matrix ZZᵀ: both are tr(ZᵀZZᵀZ). The
    diagonal of ZᵀZ is known without forming it. So the smaller of the two matrices is formed: 256×256 instead of
    8192×8192 at n = 256, d = 8192, with the same value and gradient. Differentiable once.
    """
    n, d = z.shape
    z = z - z.mean(dim=0)
    diagonal = z.square().sum(dim=0)  # d, the diagonal of ZᵀZ
    return (_SquaredGram.apply(z) - diagonal.square().sum()) / (d * (n - 1) ** 2)


def vicreg_loss(
    z1: Tensor, z2: Tensor, sim_coeff: float = 25.0, std_coeff: float = 25.0, cov_coeff: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 6 for this rank's embeddings of two views, (n, d) each; the terms are returned unweighted.

    Computed on the rows of all ranks, in float32 (float64 stays), with official normalisation: variance halved over
    the branches, covariance summed. Needs n >= 2 over all ranks. To take it elsewhere, take what it calls with it.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (all_gather(z.to(torch.promote_types(z.dtype, torch.float32))) for z in (z1, z2))  # N×d
        if len(z1) < 2:
            raise ValueError("VICReg needs at least two images: variance and covariance are over the batch")
        invariance = invariance_loss(z1, z2)
        variance = (variance_loss(z1) + variance_loss(z2)) / 2
        covariance = covariance_loss(z1) + covariance_loss(z2)
        loss = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance
    return loss, {"invariance": invariance, "variance": variance, "covariance": covariance}


# ---------------------------------------------------------------------------------------------------- network


class VICReg(nn.Module):
    """Backbone and expander; two of each with `--no-shared-weights`. Each view is a batch of its own for BatchNorm."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, self.expander = self.branch(args, args.arch)
        self.backbone2, self.expander2 = None, None
        if args.arch2 or not args.shared_weights:
            self.backbone2, self.expander2 = self.branch(args, args.arch2 or args.arch)

    @staticmethod
    def branch(args: Args, arch: str) -> tuple[nn.Module, nn.Module]:
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
        z2 = (self.expander2 or self.expander)((self.backbone2 or self.backbone)(x2))
        return z1, z2


# --------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def held_out_terms(model: VICReg, train: Data, test: Data, args: Args, how: tuple) -> dict[str, float]:
    """Loss and terms of the frozen network on views of the test images (`val_loss`, ...) and of as many training
    images (`train_loss`, ...), means over batches. Every call takes the same images and views. BatchNorm uses its
    running statistics, so `train_loss` is not the loss of a training step.
    """
    device, dtype, autocast = how
    model.eval()
    steps, means = len(test) // args.batch_size, {}
    for split, data in (("train", train), ("val", test)):
        rows = []
        for (x1, x2), (draws1, draws2) in batches(data, crops(args), args, 0, steps, device, dtype):
            x1 = augment(x1, draws1, args, blur=1.0, solarization=0.0)  # n×3×s×s
            x2 = augment(x2, draws2, args, blur=0.1, solarization=0.2)
            with autocast:
                z1, z2 = model(x1, x2)  # n×d each
            loss, terms = vicreg_loss(z1, z2, args.sim_coeff, args.std_coeff, args.cov_coeff)
            rows.append(torch.stack([loss, *terms.values()]))
        names = [f"{split}_{name}" for name in ("loss", *terms)]
        means |= dict(zip(names, torch.stack(rows).mean(dim=0).tolist(), strict=True))
    model.train()
    return means


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    # --- shared: setup ---
    args = prepare("vicreg", args, RECIPES)
    device = start_processes()
    dtype, autocast, scaler = precision_of(args, device)
    train, test = load_data(args, device)
    args = fit_batch_size(args, len(train))
    torch.manual_seed(args.seed)
    # --- end shared: setup ---
    check(args, test)

    model = VICReg(args)
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

    for step, ((x1, x2), (draws1, draws2)) in enumerate(views, run.first_step):
        lr = cosine_schedule(step, run.total_steps, warmup_steps, peak_lr, final=peak_lr / 1000)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x1 = augment(x1, draws1, args, blur=1.0, solarization=0.0)  # n×3×s×s
        x2 = augment(x2, draws2, args, blur=0.1, solarization=0.2)
        with autocast:
            z1, z2 = network(x1, x2)  # n×d each
        loss, terms = vicreg_loss(z1, z2, args.sim_coeff, args.std_coeff, args.cov_coeff)

        # --- shared: backward ---
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        # --- end shared: backward ---
        # --- shared: step ---
        scaler.step(optimizer)
        scaler.update()
        # --- end shared: step ---

        if args.val_loss and run.due(step + 1, args.eval_every):
            with run.uncounted():
                run.write({"step": step + 1, **held_out_terms(model, train, test, args, (device, dtype, autocast))})
        # --- shared: report ---
        run.log(step + 1, loss, terms, lr, z1)
        run.evaluate(step + 1, model.backbone)
        run.save(step + 1, model, state)
    return run.close()
    # --- end shared: report ---


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))
