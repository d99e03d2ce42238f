"""SCAN: Learning to Classify Images without Labels (Van Gansbeke, Vandenhende, Georgoulis, Proesmans, Van Gool;
ECCV 2020, arXiv 2005.12320).

Images are sorted into C clusters by a network that starts from one trained without labels (`--init`; in the paper
SimCLR's). What is near in its features is mostly of one kind. Let N(i) be the k nearest neighbours of image i, found
once, before training, and p_i the C probabilities that backbone, linear layer and softmax give to a view of image i:

    loss = - mean over i of log <p_i, p_j>, j drawn from N(i)  +  w · sum over c of p'_c log p'_c           (eq. 2)

with p' the mean of p_i over the batch. The first term wants an image and its neighbour in one cluster, and surely so:
the product of two probabilities is 1 only where both are 1. The second is minus the entropy of p', and wants clusters
of one size. Only small distances count, those to neighbours, and a chain of neighbours may be long and bent; k-means
takes large distances for what they are, and its clusters are round. Views that differ much make the chains shorter.

Then comes self-labelling (section 2.3). Where the network is sure of an image as it is, that cluster is the label of a
strongly augmented view of it: cross-entropy, in which every cluster has the same weight. What the network knows mends
what wrong neighbours have taught it.

The entropy prevents collapse: were all images in one cluster, the loss would be 0, and it is -w log C at best. What the
clusters mean is up to the neighbours, and those of an untrained network are alike in low-level ways; hence `--init`.

What you should see: the loss starts at (1 - w) log C, -9.2 for ten clusters, and falls to -10.6; `entropy` is log C, or
2.3, all the time, and `consistency`, the first term, falls from 2.3 to 0.9. In self-labelling the loss is another one;
`sure`, the share of images that have a label, rises from a half. With the command below and what `python simclr.py` has
trained, 67 % of the test images are in the cluster of their class before self-labelling and 73 % after it; of k-means'
clusters of SimCLR's features it is 44 %. The online kNN goes from 88 % to 89 %. Signs of trouble: `entropy` sinks, as
with a weight w near 0; or `sure` stays near 0.

    python more/scan.py --init runs/simclr    some minutes on two CPU cores, once python simclr.py has made that run
    python evaluate.py runs/scan... --protocol cluster    how well clusters and classes agree

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Crop,
    Data,
    Draws,
    Flags,
    Run,
    View,
    all_gather,
    backbone,
    check_least,
    color_jitter,
    distribute,
    full_precision,
    grayscale,
    normalize,
    parse_args,
    random_blur,
    read_flags,
    refuse,
)


@dataclass
class Args(Flags):
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the channels; those of the run in --init: simclr.py's
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    epochs: int = 13
    base_lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 1e-4
    warmup_epochs: float = 0
    scan_epochs: int = 10  # passes with neighbours; the rest of --epochs is self-labelling
    clusters: int = 0  # C; 0: as many as the images have classes
    neighbours: int = 20  # k, of every image
    entropy_weight: float = 5.0  # w
    heads: int = 10  # H, linear layers that are trained side by side; the one with the lowest loss is kept
    threshold: float = 0.9  # self-labelling: least probability that makes a label (section 2.3: 0.99)
    freeze_backbone: bool = False  # train the heads alone
    jitter_strength: float = 0.5  # of the strong views' colour jitter; 1 for large images
    degrees: float = 30.0  # a strong view is turned by up to so much, either way
    shear: float = 0.3  # and sheared by up to so many pixels per pixel
    cutout: float = 0.0  # largest side of the hole in a strong view, as a share of the image's; 0: no hole


RECIPES = {
    "quick": {},
    # The official configuration: 50 epochs, then 200 of self-labelling, for which it takes batches of 1000.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=250, log_every=50, eval_every=10, save_every=10,
        scan_epochs=50, base_lr=2e-4, heads=1, threshold=0.99, cutout=0.5,
    ),
    # The official configuration: MoCo's weights, of which nothing but the heads is trained, and no self-labelling.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        mean=IMAGENET_MEAN, std=IMAGENET_STD, batch_size=512, epochs=100, scan_epochs=100, optimizer="sgd", base_lr=2.5,
        weight_decay=0.0, freeze_backbone=True, neighbours=50, blur=True, jitter_strength=1.0, cutout=0.5,
    ),
}  # fmt: skip


def check(args: Args, train: Data) -> None:
    """Refuse impossible values of this method's flags, and an encoder that was trained on otherwise scaled images."""
    if not args.init:
        refuse("scan.py needs a trained encoder: run python simclr.py, then give its folder, --init runs/simclr")
    if (flags := Path(args.init, "args.json")).exists():
        trained = read_flags(flags)
        mean, std = ([float(value) for value in trained[name]] for name in ("mean", "std"))
        if (mean, std) != (list(args.mean), list(args.std)):
            numbers = [" ".join(f"{value:g}" for value in values) for values in (mean, std)]
            refuse(f"--init {args.init} was trained otherwise: add --mean {numbers[0]} --std {numbers[1]}")
    check_least(args, 0, "entropy_weight", "jitter_strength")
    check_least(args, 0, "threshold", "shear", "cutout", most=1)
    check_least(args, 0, "degrees", most=180)
    check_least(args, 1, "scan_epochs")
    check_least(args, 1, "heads", most=100)
    check_least(args, 1, "neighbours", most=len(train) - 1)
    if not args.clusters and len(train.classes) < 2:
        refuse("--clusters: the images have no classes that say how many; give a number")
    if args.clusters:
        check_least(args, 2, "clusters", most=2**15)


def cluster_count(args: Args, train: Data) -> int:
    """C: `--clusters`, or the number of classes."""
    return args.clusters or len(train.classes)


# ------------------------------------------------------------------------------------------------------ views


def stages(run: Run, table: Tensor) -> Iterator[tuple[int, View, View]]:
    """(step, two views of its images) for every step that is left: views to be augmented strongly of an image and of
    one of its neighbours; then, of an image, all of it as it is, and one to be augmented.
    """
    args, (first, last) = run.args, (run.first_step, run.last_step)
    strong = Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)
    weak = Crop(args.image_size, (1.0, 1.0), "bicubic", flip=0.0)
    begin = max(first, min(last, self_labelling_step(run)))
    near = run.batches([strong], range(first, begin), neighbours=table)
    for (step, (anchor,)), (_, (neighbour,)) in zip(run.batches([strong], range(first, begin)), near, strict=True):
        yield step, anchor, neighbour
    for step, (whole, part) in run.batches([weak, strong], range(begin, last)):
        yield step, whole, part


def self_labelling_step(run: Run) -> int:
    """The first step of self-labelling."""
    return run.args.scan_epochs * run.steps_per_epoch


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a strong view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws."""
    strength, hue = 0.8 * args.jitter_strength, 0.2 * args.jitter_strength
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=strength, contrast=strength, saturation=strength, hue=hue, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    x = turn(x, draws, args.degrees, args.shear)
    return cutout(normalize(x, args.mean, args.std), draws, args.cutout)


def turn(x: Tensor, draws: Draws, degrees: float, shear: float) -> Tensor:
    """Each image turned by up to so many degrees, either way, after a shear of up to `shear` pixels per pixel along
    either axis; mirrored at the border.
    """
    angle = draws.uniform(-degrees, degrees) * math.pi / 180  # n
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # n×2×2
    sheared = torch.eye(2, dtype=torch.float64) + draws.uniform(-shear, shear, 2).diag_embed().flip(2)  # n×2×2
    matrix = F.pad(sheared @ rotation, (0, 1)).to(x.device, x.dtype, non_blocking=True)  # n×2×3: no translation
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)  # n×s×s×2: where each pixel comes from
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def cutout(x: Tensor, draws: Draws, most: float) -> Tensor:
    """Zeros in a square of each image, of a side uniform in 0 to `most` of the image's, around a random pixel."""
    side, centre = draws.uniform(0, most * x.shape[-1]), draws.uniform(0, x.shape[-1], 2)  # n, n×2
    position = torch.arange(x.shape[-1]) + 0.5
    within = (position - centre[:, :, None]).abs() < side[:, None, None] / 2  # n×2×s: rows, columns
    hole = within[:, 0, :, None] & within[:, 1, None, :]  # n×s×s
    return x.masked_fill(hole[:, None].to(x.device, non_blocking=True), 0)


# ---------------------------------------------------------------------------------------------------- network


class SCAN(nn.Module):
    """Backbone and H heads, each of which has one logit per cluster: H linear layers in one."""

    def __init__(self, args: Args, clusters: int):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=True)
        self.heads = nn.Linear(width, args.heads * clusters)
        self.register_buffer("losses", torch.zeros(args.heads))  # H: of each head, a mean over about an epoch

    def forward(self, x: Tensor) -> Tensor:
        h = self.backbone(x)  # n×3×s×s -> n×width: what is kept
        return self.heads(h).unflatten(1, (len(self.losses), -1))  # n×H×C

    def best(self, logits: Tensor) -> Tensor:
        """Those, (n, C), of the head with the lowest loss."""
        return logits.index_select(1, self.losses.argmin()[None])[:, 0]


class Neighbours(nn.Module):
    """The table, (images, k) rows of the dataset, in the checkpoint: what is near is decided once, by `--init`."""

    def __init__(self, images: int, k: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(images, k, dtype=torch.int32))


# ------------------------------------------------------------------------------------------------------- loss


AT_ONCE = 2**27  # cosines in memory: half a gigabyte


@torch.no_grad()
def mine_neighbours(h: Tensor, k: int) -> Tensor:
    """(N, k) int64: for each row of h (N, d), the k other rows that have the largest cosine with it, nearest first.

    In float32 (float64 stays), also under autocast. A k that is not smaller than N is a ValueError.
    """
    if not 0 < k < len(h):
        raise ValueError(f"each of {len(h)} rows has {len(h) - 1} others, not {k}")
    found, rows = [], max(1, AT_ONCE // len(h))
    with torch.autocast(h.device.type, enabled=False):
        h = F.normalize(full_precision(h), dim=1)  # N×d
        for start in range(0, len(h), rows):
            cosine = h[start : start + rows] @ h.T  # m×N
            cosine.diagonal(start).fill_(-torch.inf)  # no image is its own neighbour
            found.append(cosine.topk(k, dim=1).indices)  # m×k
    return torch.cat(found)


def scan_loss(anchors: Tensor, neighbours: Tensor, entropy_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 2 of this rank's logits of images and of a neighbour of each, (n, C) both; both get a gradient.

    The first term is a mean over this rank's images, p' over those of all ranks: the mean over ranks is the loss of
    the global batch. All in logarithms, so that no probability is too small. In float32 (float64 stays). Terms: the
    first term, and the entropy of p' in nats: log C where clusters have one size.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        log_p, log_q = (full_precision(logits).log_softmax(dim=1) for logits in (anchors, neighbours))  # n×C
        consistency = -(log_p + log_q).logsumexp(dim=1).mean()  # log <p, q>, averaged
        log_mean = all_gather(log_p.logsumexp(dim=0)[None]).logsumexp(dim=0)  # C: of the sum over all images
        log_mean = log_mean.log_softmax(dim=0)  # the C probabilities have the sum 1: this divides by N
        entropy = -(log_mean.exp() * log_mean).sum()
    return consistency - entropy_weight * entropy, {"consistency": consistency.detach(), "entropy": entropy.detach()}


def self_label_loss(weak: Tensor, strong: Tensor, threshold: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the strong views' logits with the weak views' clusters, where these are surer than `threshold`.

    Both are this rank's logits (n, C); weak ones are constants. The mean over clusters of the mean over their images,
    both over all ranks: the mean over ranks is the loss of the global batch. 0 where no image is sure. In float32
    (float64 stays). Terms: the share of this rank's images that are sure, and how often both views have one cluster.
    """
    with torch.autocast(strong.device.type, enabled=False):
        weak, strong = full_precision(weak.detach()), full_precision(strong)  # n×C
        p, label = weak.softmax(dim=1).max(dim=1)  # n
        sure = p > threshold
        chosen = F.one_hot(label, weak.shape[1]).to(strong.dtype) * sure[:, None]  # n×C
        counts = all_gather(chosen.sum(0)[None])  # W×C: images with that label, on each rank
        world, counts = len(counts), counts.sum(0)
        weight = (chosen / (counts * (counts > 0).sum()).clamp(min=1)).sum(1)  # n: 1 / (images of its label · labels)
        loss = world * (weight * F.cross_entropy(strong, label, reduction="none")).sum()
        agreement = (strong.argmax(1) == label).to(loss.dtype).mean()
    return loss, {"sure": sure.to(loss.dtype).mean(), "agreement": agreement}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("scan", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args, run.train)

    model = run.place(SCAN(args, cluster_count(args, run.train)))  # on the device; --init; BatchNorm over all processes
    if args.freeze_backbone:
        model.backbone.requires_grad_(False).eval()
    learnt = [p for p in model.parameters() if p.requires_grad]  # all of them are decayed
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(learnt, lr=0.0, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.SGD(learnt, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    table = Neighbours(len(run.train), args.neighbours)
    run.start(model=model, optimizer=optimizer, neighbours=table)  # from a checkpoint, if there is one
    if run.first_step == 0:
        table.rows.copy_(mine_neighbours(run.judge.features(run.encoder, run.train), args.neighbours))
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256

    for step, view1, view2 in stages(run, table.rows):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x2 = augment(*view2, args)  # n×3×s×s
        if step < self_labelling_step(run):
            x1 = augment(*view1, args)
            with run.autocast:
                logits, near = network(torch.cat([x1, x2])).chunk(2)  # n×H×C each
            pairs = zip(logits.unbind(1), near.unbind(1), strict=True)
            losses, terms = zip(*(scan_loss(*pair, args.entropy_weight) for pair in pairs), strict=True)
            loss, terms = torch.stack(losses).mean(), {k: torch.stack([t[k] for t in terms]).mean() for k in terms[0]}
            model.losses.lerp_(all_gather(torch.stack(losses).detach()[None]).mean(0), 1 / run.steps_per_epoch)
        else:
            with torch.no_grad(), run.autocast:
                weak = model.best(model(normalize(view1.x, args.mean, args.std)))  # n×C
            with run.autocast:
                logits = network(x2)  # n×H×C
            loss, terms = self_label_loss(weak, model.best(logits), args.threshold)

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        run.report(step + 1, loss, terms, lr, model.best(logits))
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                   paper      official code
#
# neighbours            of h, for encoder.pt has no projector  –          of SimCLR's z, the output of its projector
# k of them             and not the image itself               the same   and the image itself
# strong views          crop, colours, turn, shear (cutout)    4 of RandAugment's 14, then cutout: both; no crop
# no sure image         loss 0                                 –          an error
# heads                 mean of their losses                   –          sum
# which head is kept    lowest training loss of late           –          lowest validation loss, w = 1
# logarithms            exact                                  –          -100 at least; 1e-8 added
# BatchNorm             of images and neighbours together      –          of each by itself
# self-labelling        goes on, with the same batch size      –          a run of its own, with another batch size
# learning rate         half a cosine, scaled with the batch   –          constant, not scaled
# precision             bf16 where fast, the losses in float32 –          float32
