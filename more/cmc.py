"""CMC: Contrastive Multiview Coding (Tian, Krishnan, Isola; ECCV 2020, arXiv 1906.05849).

The two views of an image are not two crops but two parts of its colours: lightness, and colour without lightness, of
the same crop. Each has an encoder of its own, and neither sees what the other does. With z_1 to z_M the embeddings of
M views of N images, of length 1, view i of an image has to find view j of it among the N:

    L(i→j) = mean over images k of  -log  exp(z_i,k·z_j,k / T)  /  sum over l of exp(z_i,k·z_j,l / T)
    L(i, j) = L(i→j) + L(j→i)                                                                     (two views)
    loss = sum over j > 1 of L(1, j)      core view, `--graph core`
    loss = sum over i < j of L(i, j)      full graph, `--graph full`

What both views show is there in the scene; what only one of them shows, such as noise, does not help to find the other
and is left out. So no jitter is needed: the views differ by nature, as sight and sound do. `--space lab` and `ycbcr`
separate lightness from colour. `--space rgb` has three views, red, green and blue, and shows what happens where views
differ little: the task is easy, and the encoders need not leave out much.

The other images prevent collapse, as in SimCLR: were all embeddings the same, the loss would be 2 log N for each pair.
The paper takes its negatives from memory banks; here they come from the batch. One shortcut is left: both views share
the crop, so whatever tells where edges are will do.

What one keeps is h, the outputs of all backbones side by side: twice as wide as elsewhere. encoder.pt has one ResNet
for each view, named by it (`l.conv1.weight`, `ab.conv1.weight`). The encoder splits images, in [0, 1], itself.

What you should see: with two views the loss starts at about 10.4, above 2 log N = 9.7 (N = 128), passes it within the
first steps and ends near 3.5; `accuracy`, how often the image is found from its other view, rises from 1 / N to 0.6. On
the textures of `patterns` colour says next to nothing of the kind: features of random weights score 49 % by kNN on
lightness and 9 %, chance, on colour. The online kNN still goes from 47 % to 78 %, for lightness has to keep what tells
images apart. Photographs are what this method is for: CIFAR-10, `--data-dir cifar10 --epochs 2 --warmup-epochs 0.5`,
goes from 38 % to 50 %. Signs of trouble: the loss stays at 2 log N.

    python more/cmc.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

from dataclasses import dataclass
from itertools import permutations
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
    refuse,
)


@dataclass
class Args(Flags):
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # stays 0: `split` takes images in [0, 1]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # stays 1
    base_lr: float = 0.1
    optimizer: Literal["lars", "larc", "sgd"] = "sgd"
    weight_decay: float = 1e-4
    color_jitter: bool = False  # brightness, contrast, saturation, hue, before the image is split
    grayscale: bool = False  # drop the colour, which is a view
    space: Literal["lab", "ycbcr", "rgb"] = "lab"  # two views, lightness and colour, or three, the channels
    graph: Literal["core", "full"] = "full"  # pairs of views that are compared: those with the first, or all
    temperature: float = 0.1  # T (the official code: 0.07)
    projector_dim: int = 128  # d, width of the embeddings
    jitter_strength: float = 0.5  # strength of the colour jitter; 1 for large images


RECIPES = {
    "quick": {},
    # From no paper: epochs, batch and warm-up of simclr.py, learning rate and decay as in `quick`.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=200, log_every=50, eval_every=10, save_every=10,
        batch_size=512, warmup_epochs=10,
    ),
    # The official code's, whose learning rate falls in three steps. Its banks hold 16384 negatives for a batch of 256;
    # here the batch has to hold them, so it is larger.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=1024, epochs=240, warmup_epochs=0, base_lr=0.03, crop_min_scale=0.08, temperature=0.07,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    check_widths(args, "projector_dim")
    check_least(args, 0, "jitter_strength")
    check_least(args, 1e-4, "temperature")
    if any(args.mean) or args.std != (1.0, 1.0, 1.0):
        refuse("--mean and --std must stay 0 0 0 and 1 1 1: images are split into views by their values in [0, 1]")


# ------------------------------------------------------------------------------------------------------ views

SPACES = {"lab": {"l": 1, "ab": 2}, "ycbcr": {"y": 1, "cbcr": 2}, "rgb": {"r": 1, "g": 1, "b": 1}}  # views: channels


def crops(args: Args) -> list[Crop]:
    """The first step of all views, made where the image is decoded: one random resized crop and flip."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)]


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """What happens to the whole image, (n, 3, s, s) in [0, 1], before it is split; every image has its own draws."""
    strength, hue = 0.8 * args.jitter_strength, 0.2 * args.jitter_strength
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=strength, contrast=strength, saturation=strength, hue=hue, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


def split(x: Tensor, space: str) -> list[Tensor]:
    """The views of sRGB images (n, 3, s, s) in [0, 1]: (n, channels, s, s) each, as many channels as SPACES says.

    lab: CIE 1976 L*a*b* over 100, white point D65, with sRGB's curve and primaries (IEC 61966-2-1). L is in [0, 1], a
    in [-0.87, 0.99], b in [-1.08, 0.95]. ycbcr: that of JPEG files (JFIF 1.02). Y is in [0, 1], Cb and Cr in
    [-0.5, 0.5]. In both, grey has colour 0. rgb: the channels as they are.
    """
    r, g, b = x.split(1, dim=1)  # n×1×s×s
    if space == "lab":
        r, g, b = (((c + 0.055) / 1.055).pow(2.4).where(c > 0.04045, c / 12.92) for c in (r, g, b))  # linear in light
        # CIE XYZ over that of white, in which the numbers of a row sum to the divisor.
        xyz_over_white = (
            (0.412391 * r + 0.357584 * g + 0.180481 * b) / 0.950456,
            0.212639 * r + 0.715169 * g + 0.072192 * b,
            (0.019331 * r + 0.119195 * g + 0.950532 * b) / 1.089058,
        )
        # A cube root, but a straight line near 0.
        fx, fy, fz = (t.pow(1 / 3).where(t > (6 / 29) ** 3, t * (29 / 6) ** 2 / 3 + 4 / 29) for t in xyz_over_white)
        x = torch.cat([1.16 * fy - 0.16, 5 * (fx - fy), 2 * (fy - fz)], dim=1)
    elif space == "ycbcr":
        y = 0.299 * r + 0.587 * g + 0.114 * b
        x = torch.cat([y, (b - y) / 1.772, (r - y) / 1.402], dim=1)
    return list(x.split(list(SPACES[space].values()), dim=1))


# ---------------------------------------------------------------------------------------------------- network


class Backbones(nn.Module):
    """A backbone for each view. RGB images (n, 3, s, s) in [0, 1] -> the features of all, side by side, (n, M·width).

    The views name the weights: `l.conv1.weight`. The `l` among them fit a torchvision ResNet of one input channel.
    """

    def __init__(self, args: Args):
        super().__init__()
        self.space = args.space
        for view, channels in SPACES[args.space].items():
            net, self.width = backbone(args.arch, args.stem, zero_init=False)
            old = net.conv1
            net.conv1 = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
            self.add_module(view, net)

    def each(self, x: Tensor) -> list[Tensor]:
        views = split(x, self.space)  # n×channels×s×s
        return [net(view) for net, view in zip(self.children(), views, strict=True)]  # n×width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.each(x), dim=1)


class CMC(nn.Module):
    """For each view a backbone and a projector, one linear layer."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone = Backbones(args)
        width, d = self.backbone.width, args.projector_dim
        self.projectors = nn.ModuleList(nn.Linear(width, d) for _ in SPACES[args.space])

    def forward(self, x: Tensor) -> list[Tensor]:
        hs = self.backbone.each(x)  # n×3×s×s -> n×width each: side by side, they are what is kept
        return [projector(h) for projector, h in zip(self.projectors, hs, strict=True)]  # n×d each


# ------------------------------------------------------------------------------------------------------- loss


def cmc_loss(z: list[Tensor], temperature: float, core: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of L(i, j) + L(j, i) over pairs of views; z are this rank's embeddings of M views, (n, d) each.

    The pairs are those with view number `core`, from 0, or by default all. The means are over this rank's n images,
    each compared with the N of all ranks; the mean of that over ranks is the loss of the global batch. In float32
    (float64 stays). Terms: the mean cosine of two views of an image, and how often the own image comes first.
    """
    with torch.autocast(z[0].device.type, enabled=False):
        z = [F.normalize(full_precision(view), dim=1) for view in z]  # n×d each
        everyone = [all_gather(view) for view in z]  # N×d each
        total = len(everyone[0])  # N
        own = torch.arange(total, device=z[0].device)[my_rows(total)]  # n: where this rank's images stand among the N
        losses, positives, hits = [], [], []
        for i, j in permutations(range(len(z)), 2):
            if core is None or core in (i, j):
                logits = z[i] @ everyone[j].T / temperature  # n×N
                losses.append(F.cross_entropy(logits, own))
                with torch.no_grad():
                    positives.append(temperature * logits.gather(1, own[:, None]).mean())
                    hits.append((logits.argmax(1) == own).to(logits.dtype).mean())
        terms = {"positive": torch.stack(positives).mean(), "accuracy": torch.stack(hits).mean()}
    return torch.stack(losses).sum(), terms


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("cmc", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args)

    model = run.place(CMC(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Neither adapted nor decayed: LARS obeys `adapt`; SGD does not know it, and takes the decay of 0.
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=model, optimizer=optimizer)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256

    for step, (view,) in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x = augment(*view, args)  # n×3×s×s
        with run.autocast:
            zs = network(x)  # n×d each
        loss, terms = cmc_loss(zs, args.temperature, core=0 if args.graph == "core" else None)

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        run.report(step + 1, loss, terms, lr, zs[0])
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                 paper            official code
#
# negatives             the other images of the batch        16384 of a bank  the same; their mean of old and new ones
# loss                  a softmax over the batch             –                NCE; the softmax with --softmax
# colours               Lab over 100; JPEG's YCbCr           Lab              Lab or YCbCr, each channel within [-1, 1]
# three views and more  red, green, blue                     depth and other  –
# width                 a whole ResNet for each view         halves           halves, or a ResNet-50 of any width
# learning rate         a cosine at every step               –                a tenth after 120, 160 and 200 epochs
# weight decay          not on biases and BatchNorm          –                on all of them
# precision             bf16 where fast, the loss in float32 –                float32
