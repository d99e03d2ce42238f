"""SimCLR: Simple Framework for Contrastive Learning (Chen, Kornblith, Norouzi, Hinton; ICML 2020, arXiv 2002.05709).

Two views of each of N images give 2N embeddings. Each of them has to recognise the other view of its own image among
the 2N - 1 others, by cosine similarity:

    l(i, j) = -log  exp(sim(z_i, z_j) / T)  /  sum over k != i of exp(sim(z_i, z_k) / T)                  (eq. 1)

    loss = mean of l over all 2N ordered pairs of views                                            (algorithm 1)

The denominator prevents collapse: were all embeddings the same, every l would be log(2N - 1). Only the negatives
do this, and more of them help: the batch is large, and the embeddings of all processes take part, with gradient. Two
more things matter: strong colour augmentation, and a projector that is thrown away afterwards.

    python simclr.py                                            some minutes on two CPU cores
    torchrun --nproc_per_node 4 simclr.py --batch-size 1024     four processes share each batch
    torchrun --nproc_per_node 8 simclr.py --recipe imagenet --data-dir /data/imagenet

What you should see: the loss starts above log(2N - 1) (6.1 where N = 128 and log 255 = 5.5), reaches it while the
learning rate rises, then falls for as long as you train; `accuracy`, how often the other view comes first, rises
towards 1. Sick: the loss stays at log(2N - 1).

Where this file, the paper and the official code differ
    loss              mean over the 2N anchors, as the paper (official code: the sum of two means, twice that)
    LARS              learning rate outside the momentum buffer (official code: inside; the same while it is constant)
    crop              0.08 of the area or more, as the paper (official code: about 0.1, by TensorFlow's sampler)
    brightness        multiplicative, as the official code's default (the paper's own runs: additive)
    contrast          about the image's mean grey, saturation towards grey, as torchvision (official code, in
                      TensorFlow: about the mean of each channel; saturation in HSV)
    resizing          antialiased, as torchvision (official code: not)
    blur              one width per image (official code: one per batch and view), mirrored at the border (zeros)
    precision         bf16 on a GPU (official code: float32, as `--precision fp32`)
    projector         two layers, as the paper (official code's default: three, as in SimCLR v2)
    weight decay      1e-6, as the paper; 1e-4 in `cifar`, as the official README (whose ImageNet command has 1e-4, too)
    initial weights   torchvision's and PyTorch's (official code: truncated normal; head normal with std 0.01)
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
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
    my_rows,
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
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the channels, for normalisation
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of the channels, for normalisation
    arch: str = "resnet10"  # resnet10 (one block per stage) or any torchvision ResNet
    stem: Literal["imagenet", "small"] = "imagenet"  # small: 3x3 stride 1, no max-pooling, for 32-pixel images
    batch_size: int = 128  # images per step over all processes; the default shrinks to fit a smaller dataset
    epochs: int = 15  # passes over the training images
    max_steps: int = 0  # stop after so many steps of the schedule that --epochs sets; 0: do not
    train_limit: int = 0  # train on so many images, chosen at random; 0: all
    base_lr: float = 2.0  # learning rate at batch size 256, scaled linearly with it
    optimizer: Literal["lars", "sgd"] = "lars"  # momentum 0.9 in both
    weight_decay: float = 1e-6  # on which parameters: see `groups` in main
    warmup_epochs: float = 4  # linear warm-up of the learning rate from 0
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
    lr_scaling: Literal["linear", "sqrt"] = "linear"  # base_lr times N / 256, or times sqrt(N) / 4 (appendix B.1)
    temperature: float = 0.2  # T (table 5: 0.1 on ImageNet; appendix B.9: 0.5 on CIFAR-10)
    projector_hidden: int = 512  # width of the projector's hidden layer: that of the features
    projector_dim: int = 128  # d, width of the embeddings
    jitter_strength: float = 0.5  # s, strength of the colour jitter (appendix A: 1; appendix B.9: 0.5 for small images)
    crop_min_scale: float = 0.2  # smallest share of the area a crop keeps; the paper, for large images: 0.08
    flip: bool = True  # horizontal flip
    color_jitter: bool = True  # brightness, contrast, saturation, hue
    grayscale: bool = True  # drop the colour
    blur: bool = False  # Gaussian blur; part of the paper's views, for large images


RECIPES = {
    "quick": {},
    # The official README's CIFAR-10 command, which trains 1000 epochs, with the paper's projector.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", batch_size=512, epochs=200, warmup_epochs=10, base_lr=1.0,
        weight_decay=1e-4, temperature=0.5, jitter_strength=0.5, crop_min_scale=0.08,
        log_every=50, eval_every=10, save_every=10,
    ),
    # Section 2 and the official code, which train 100 to 1000 epochs.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", batch_size=4096, epochs=1000, warmup_epochs=10, base_lr=0.3,
        weight_decay=1e-6, temperature=0.1, projector_hidden=2048, jitter_strength=1.0, crop_min_scale=0.08, blur=True,
        workers=12,
        log_every=50, eval_every=10, save_every=1,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    if not args.temperature > 0:
        fail(f"--temperature must be positive, not {args.temperature}")
    if min(args.projector_hidden, args.projector_dim) < 1:
        fail("--projector-hidden and --projector-dim must be at least 1")
    if not args.jitter_strength >= 0:
        fail(f"--jitter-strength must not be negative, not {args.jitter_strength}")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws (appendix A).

    Both views have the same strengths and probabilities.
    """
    s = args.jitter_strength
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)  # mean 0 and std 1 by default: the official code leaves [0, 1]


# ------------------------------------------------------------------------------------------------------- loss


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Normalised temperature-scaled cross entropy (eq. 1) of this rank's embeddings of two views, (n, d) each.

    The mean over this rank's 2n anchors, each compared with the 2N - 1 other embeddings of all ranks; the mean of that
    over ranks is the loss of the global batch. In float32 (float64 stays). Terms: the mean cosine of the positive
    pairs, and how often the positive comes first. To take it elsewhere, take `all_gather` and `my_rows` with it.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1) for z in (z1, z2))  # n×d
        everyone = torch.cat([all_gather(z1), all_gather(z2)])  # 2N×d: all first views, then all second ones
        total = len(everyone) // 2  # N
        own = torch.arange(total, device=z1.device)[my_rows(total)]  # n: where this rank's images stand among the N
        anchors, itself, other = torch.cat([z1, z2]), torch.cat([own, own + total]), torch.cat([own + total, own])
        logits = anchors @ everyone.T / temperature  # 2n×2N
        # An anchor is no candidate for itself. -inf, not a subtraction after exp: nothing is lost or overflows.
        logits = logits.scatter(1, itself[:, None], -torch.inf)
        loss = F.cross_entropy(logits, other)
        with torch.no_grad():
            positive = temperature * logits.gather(1, other[:, None]).mean()
            accuracy = (logits.argmax(1) == other).to(logits.dtype).mean()
    return loss, {"positive": positive, "accuracy": accuracy}


# ---------------------------------------------------------------------------------------------------- network


class SimCLR(nn.Module):
    """Backbone and projector. Both views pass as one batch, so that BatchNorm sees all 2N."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=True)
        hidden, d = args.projector_hidden, args.projector_dim
        self.projector = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, d, bias=False),
            nn.BatchNorm1d(d),  # in the official code, with a scale and no shift
        )
        self.projector[4].bias.requires_grad_(False)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector(self.backbone(torch.cat([x1, x2])))  # 2n×3×s×s -> 2n×width -> 2n×d
        return z.chunk(2)  # n×d each


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    # --- shared: setup ---
    args = prepare("simclr", args, RECIPES)
    device = start_processes()
    dtype, autocast, scaler = precision_of(args, device)
    train, test = load_data(args, device)
    args = fit_batch_size(args, len(train))
    torch.manual_seed(args.seed)
    # --- end shared: setup ---
    check(args)

    model = SimCLR(args)
    # --- shared: model ---
    if args.init:
        load_encoder(model.backbone, args.init)
    model = sync_batchnorm(model.to(device, dtype, memory_format=torch.channels_last), device)
    # --- end shared: model ---
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
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
    peak_lr = args.base_lr * (args.batch_size / 256 if args.lr_scaling == "linear" else args.batch_size**0.5 / 4)

    for step, ((x1, x2), (draws1, draws2)) in enumerate(views, run.first_step):
        lr = cosine_schedule(step, run.total_steps, warmup_steps, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x1 = augment(x1, draws1, args)  # n×3×s×s
        x2 = augment(x2, draws2, args)
        with autocast:
            z1, z2 = network(x1, x2)  # n×d each
        loss, terms = nt_xent_loss(z1, z2, args.temperature)

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
