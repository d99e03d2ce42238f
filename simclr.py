"""SimCLR: Simple Framework for Contrastive Learning (Chen, Kornblith, Norouzi, Hinton; ICML 2020, arXiv 2002.05709).

Two views of each of N images give 2N embeddings z. Each of them has to recognise the other view of its own image among
all 2N - 1 others, by cosine similarity:

    l(i, j) = -log  exp(sim(z_i, z_j) / T)  /  sum over k != i of exp(sim(z_i, z_k) / T)                (eq. 1)
    loss    = mean of l over all 2N ordered pairs of views                                       (algorithm 1)

The sum leaves out k = i: an embedding has cosine 1 with itself, the largest value there is. Left in, it would keep
every l above log 2, even of perfect positives.

The denominator prevents collapse: were all embeddings the same, every l would be log(2N - 1). Only the negatives do
this, and more of them help: the batch is large, and the embeddings of all processes take part, with gradient. Strong
colour jitter matters, too: crops of one image share their colours, and could be told from others by them alone.

What one keeps is h, the output of the backbone, not z behind the projector. The loss makes z blind to whatever differs
between views, such as colour; h still has it, and a linear classifier on h is ten points better (section 4.2).

What you should see: the loss starts at about 6.1, above log(2N - 1) = 5.5 (N = 128), reaches it while the learning rate
rises, then falls for as long as you train; `accuracy`, how often the other view comes first, rises towards 1. Signs of
trouble: the loss stays at log(2N - 1).

    python simclr.py    a minute or two on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

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
    check_widths,
    color_jitter,
    distribute,
    full_precision,
    grayscale,
    my_rows,
    normalize,
    parse_args,
    random_blur,
)


@dataclass
class Args(Flags):
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the channels; the official code leaves them in [0, 1]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    epochs: int = 11
    base_lr: float = 3.0
    warmup_epochs: float = 5
    lr_scaling: Literal["linear", "sqrt"] = "linear"  # how the learning rate follows the batch size (appendix B.1)
    temperature: float = 0.2  # T (table 5: 0.1 on ImageNet; appendix B.9: 0.5 on CIFAR-10)
    projector_hidden: int = 512  # width of the projector's hidden layer: that of ResNet-10's features
    projector_dim: int = 128  # d, width of the embeddings
    jitter_strength: float = 0.5  # s, strength of the colour jitter (appendix A: 1; appendix B.9: 0.5 for small images)


RECIPES = {
    "quick": {},
    # The CIFAR-10 command in the official README, which promises about 91 % (published; linear classifier).
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=1000, log_every=50, eval_every=10, save_every=10,
        batch_size=512, warmup_epochs=10, base_lr=1.0, weight_decay=1e-4, crop_min_scale=0.08, temperature=0.5,
    ),
    # Section 2 and the official code, which train 100 to 1000 epochs.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=4096, epochs=1000, warmup_epochs=10, base_lr=0.3, crop_min_scale=0.08, blur=True,
        temperature=0.1, projector_hidden=2048, jitter_strength=1.0,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    check_widths(args, "projector_hidden", "projector_dim")
    check_least(args, 0, "jitter_strength")
    check_least(args, 1e-4, "temperature")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws (appendix A)."""
    strength, hue = 0.8 * args.jitter_strength, 0.2 * args.jitter_strength
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=strength, contrast=strength, saturation=strength, hue=hue, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


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
            nn.BatchNorm1d(d),  # with a scale and no shift
        )
        self.projector[4].bias.requires_grad_(False)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        h = self.backbone(torch.cat([x1, x2]))  # 2n×3×s×s -> 2n×width: what is kept
        z = self.projector(h)  # 2n×d
        return z.chunk(2)  # n×d each


# ------------------------------------------------------------------------------------------------------- loss


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Normalised temperature-scaled cross entropy (eq. 1) of this rank's embeddings of two views, (n, d) each.

    The mean over this rank's 2n anchors, each compared with the 2N - 1 other embeddings of all ranks; the mean of that
    over ranks is the loss of the global batch. In float32 (float64 stays). Terms: the mean cosine of the positive
    pairs, and how often the positive comes first.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.normalize(full_precision(z), dim=1) for z in (z1, z2))  # n×d
        everyone = torch.cat([all_gather(z1), all_gather(z2)])  # 2N×d: all first views, then all second ones
        total = len(everyone) // 2  # N
        own = torch.arange(total, device=z1.device)[my_rows(total)]  # n: where this rank's images stand among the N
        self_column = torch.cat([own, own + total])  # 2n: where each anchor stands among the 2N
        positive_column = torch.cat([own + total, own])  # 2n: where its other view stands
        logits = torch.cat([z1, z2]) @ everyone.T / temperature  # 2n×2N
        # -inf takes out k = i exactly. Subtracting exp(1 / T) from the sum would lose digits, or overflow.
        logits = logits.scatter(1, self_column[:, None], -torch.inf)
        loss = F.cross_entropy(logits, positive_column)  # with the positive's column as the class, this is eq. 1
        with torch.no_grad():
            positive = temperature * logits.gather(1, positive_column[:, None]).mean()
            accuracy = (logits.argmax(1) == positive_column).to(logits.dtype).mean()
    return loss, {"positive": positive, "accuracy": accuracy}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("simclr", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args)

    model = run.place(SimCLR(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Neither adapted nor decayed: LARS obeys `adapt`; SGD does not know it, and takes the decay of 0.
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=model, optimizer=optimizer)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    # The two rules agree at N = 4096.
    scale = {"linear": args.batch_size / 256, "sqrt": 16 * (args.batch_size / 4096) ** 0.5}[args.lr_scaling]
    peak_lr = args.base_lr * scale

    for step, (view1, view2) in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x1 = augment(*view1, args)  # n×3×s×s
        x2 = augment(*view2, args)
        with run.autocast:
            z1, z2 = network(x1, x2)  # n×d each
        loss, terms = nt_xent_loss(z1, z2, args.temperature)

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
# loss                  mean over the 2N anchors               the same   sum of two means, which is twice that
# learning rate, LARS   multiplies the momentum buffer         –          inside it; the same while the rate is constant
# crop                  0.08 of the area or more               the same   about 0.1, by TensorFlow's sampler
# resizing              antialiased                            –          not antialiased
# brightness            multiplied                             added      multiplied, by default
# contrast, saturation  about the mean grey; towards grey      –          about the mean of each channel; in HSV
# blur                  one sigma per image; mirrored border   –          one sigma per batch and view; zeros outside
# large JPEGs           decoded smaller, or --full-decode      –          decoded at full size
# precision             bf16 where fast                        –          float32, as --precision fp32
# projector             two layers                             the same   three by default, as in SimCLR v2
# BatchNorm in it       after both layers                      –          after every layer
# weight decay          1e-6; 1e-4 in `cifar`                  1e-6       1e-4 in its README's commands
# initial weights       those of torchvision and PyTorch       –          truncated normal; std 0.01 in the head
