"""SupCon: contrast with labels, be they classes or numbers; six losses of four papers as points of one formula.

    SupCon                        Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu, Krishnan; NeurIPS 2020,
                                  arXiv 2004.11362
    epsilon-SupInfoNCE, -SupCon   Barbano, Dufumier, Tartaglione, Grangetto, Gori; ICLR 2023, arXiv 2211.05568
    y-aware                       Dufumier, Gori, Victor, Grigis, Wessa and others; MICCAI 2021, arXiv 2106.08808
    L_thr, L_exp                  Barbano, Dufumier, Duchesnay, Grangetto, Gori; ISBI 2023, arXiv 2211.08326

Each of the 2N embeddings is an anchor i. SimCLR draws it to the other view of its image. Here it is drawn to every
other embedding k, as much as their labels agree, and pushed away from others. With s_ik, their cosine over T:

    loss = sum over k of w_ik / (sum of w_ik) * (log(sum over t of r_ikt exp(s_it)) - s_ik),  the mean over all anchors

    --loss             w_ik                             r_ikt, for t other than i
    supcon             1 in the class of i, 0 outside   1                                                     (eq. 2)
    eps_supcon         the same                         1 outside the class of i, exp(-epsilon) in it
    eps_supinfonce     the same                         1 outside the class of i, exp(-epsilon) for t = k, or else 0
    yaware             exp(-(y_i - y_k)^2 / 2 sigma^2)  1
    thr                the same                         1 for w_it < w_ik, or else 0
    exp                the same                         1 for t other than k, but with s_it (1 - w_it) for s_it

Classes are those of the images' folders, or of the dataset; an image without a label is a class of its own, and so, of
images without any label, SupCon is SimCLR. Numbers y, the targets, are the period in pixels of `patterns`, or stand in
the file targets.csv of --data-dir. For these keep the crops large, since a small one changes the scale:

    python more/supcon.py --loss yaware --crop-min-scale 0.6
    python evaluate.py runs/supcon-crop_min_scale=0.6-loss=yaware --protocol regress

What differs. In SupCon those of one class repel each other, too, since all of them stand in the denominator: the more
there are, the larger the least loss, the mean log of their number. epsilon-SupInfoNCE leaves them out of it.
exp(-epsilon) asks for a margin: the cosine with the class should exceed that with others by epsilon T. y-aware draws
to all, most to the nearest in y. L_thr pushes away, for the sake of k, only what is farther from i in y than k is;
L_exp pushes the less, the nearer.

Those that i is not drawn to stand in its denominator, and so prevent collapse, as in SimCLR. Inside a class nothing
does: it may become one point, and whatever the labels do not ask for is lost.

What you should see: SupCon starts at about 6.1, above log(2N - 1) = 5.5 (N = 128), passes it while the learning rate
rises, and ends at 3.4; the log of the 25 others of a class is 3.2. The online kNN goes from 42 % to 98 %, with the two
epsilon losses, too. `same`, the mean cosine weighted by w, and `accuracy`, the w of the nearest embedding, approach 1;
for classes the latter is how often the nearest is of the same one. Targets are learned more slowly: y-aware falls from
6.0 to 5.4 only, for a fifth of the batch is drawn together. After six epochs on large crops ridge regression explains
62 % of the variance of the period with y-aware, 68 % with L_thr, 67 % with L_exp, 57 % with SimCLR, and 12 % with
random weights. Signs of trouble: the loss stays where it started; or `positive`, the cosine of the two views, rises
and `same` stays at 0: the labels say nothing.

    python more/supcon.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read the two losses; views, network and the loop in main are those of simclr.py, and appendices are those of its paper.
The table at the end says where this departs from the papers.
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
    Data,
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
    my_rows,
    normalize,
    parse_args,
    random_blur,
    refuse,
)


@dataclass
class Args(Flags):
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the channels; the official code leaves them in [0, 1]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    base_lr: float = 2.0
    warmup_epochs: float = 4
    lr_scaling: Literal["linear", "sqrt"] = "linear"  # how the learning rate follows the batch size (appendix B.1)
    loss: Literal["supcon", "eps_supcon", "eps_supinfonce", "yaware", "thr", "exp"] = "supcon"  # see the top
    temperature: float = 0.2  # T (0.1 in all of the papers)
    epsilon: float = 0.25  # eps_supcon, eps_supinfonce: the margin, in units of T (the paper: 0.1 to 0.5)
    sigma: float = 0.5  # yaware, thr, exp: width of the kernel, in the unit of the targets (a quarter of their std)
    projector_hidden: int = 512  # width of the projector's hidden layer: that of ResNet-10's features
    projector_dim: int = 128  # d, width of the embeddings
    jitter_strength: float = 0.5  # s, strength of the colour jitter (appendix A: 1; appendix B.9: 0.5 for small images)


WITH_MARGIN, OF_TARGETS = ("eps_supcon", "eps_supinfonce"), ("yaware", "thr", "exp")

RECIPES = {
    "quick": {},
    # The authors' CIFAR-10 command, which trains a ResNet-50 for 1000 epochs. Its learning rate is 0.5.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=200, log_every=50, eval_every=10, save_every=10,
        batch_size=1024, warmup_epochs=10, base_lr=0.125, optimizer="sgd", weight_decay=1e-4, temperature=0.1,
    ),
    # The paper's ResNet-50 as its official code trains it (78.7 %), but with SimCLR's views in place of AutoAugment.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=6144, epochs=350, warmup_epochs=10, base_lr=0.4, weight_decay=1e-3, crop_min_scale=0.08, blur=True,
        temperature=0.1, projector_hidden=2048, jitter_strength=1.0,
    ),
}  # fmt: skip


def check(args: Args, train: Data | None = None) -> None:
    """Refuse impossible values of this method's flags, and training images without what the loss needs."""
    check_widths(args, "projector_hidden", "projector_dim")
    check_least(args, 0, "jitter_strength", "epsilon")
    check_least(args, 1e-4, "temperature")
    check_positive(args, "sigma")
    for name, losses in (("epsilon", WITH_MARGIN), ("sigma", OF_TARGETS)):
        if args.loss not in losses and getattr(args, name) != getattr(Args, name):
            refuse(f"--{name} is without effect on --loss {args.loss}; it belongs to {', '.join(losses)}")
    if train and args.loss in OF_TARGETS and not len(train.rows_with("targets")):
        refuse(f"--loss {args.loss} needs targets: patterns has them, a folder in its targets.csv")
    if train and args.loss not in OF_TARGETS and not len(train.rows_with("labels")):
        refuse(f"--loss {args.loss} needs labels: sort the images of --data-dir into class folders")


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


def compare(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's 2n anchors with the 2N embeddings of all ranks, first views before second ones, three (2n, 2N):
    cosine over T, with gradient on both sides; whether the two are of one image; whether they are the same embedding.
    """
    z1, z2 = (F.normalize(full_precision(z), dim=1) for z in (z1, z2))  # n×d
    everyone = torch.cat([all_gather(z1), all_gather(z2)])  # 2N×d
    s = torch.cat([z1, z2]) @ everyone.T / temperature  # 2n×2N
    total = len(everyone) // 2  # N
    image = torch.arange(total, device=s.device)
    own = image[my_rows(total)]  # n: where this rank's images stand among the N
    same_image = (own[:, None] == image).repeat(2, 2)  # 2n×2N
    itself = torch.cat([own, own + total])[:, None] == torch.arange(2 * total, device=s.device)  # 2n×2N
    return s, same_image, itself


def weighted_loss(
    s: Tensor, weight: Tensor, log_denominator: Tensor, same_image: Tensor, itself: Tensor, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The formula at the top of this file from s, w and log(sum over t of r exp(s)); w of an anchor with itself is 0.

    Terms: the mean cosine of the two views; the mean cosine weighted by w; and w of the nearest embedding, which for
    classes is how often that is of the same one.
    """
    share = weight / weight.sum(1, keepdim=True)  # 2n×2N; the other view has weight 1, so that no sum is 0
    loss = (share * (log_denominator - s)).sum(1).mean()
    with torch.no_grad():
        positive = temperature * s[same_image & ~itself].mean()
        same = temperature * (share * s).sum(1).mean()
        nearest = s.masked_fill(itself, -torch.inf).argmax(1, keepdim=True)  # 2n×1
        accuracy = weight.gather(1, nearest).mean()
    return loss, {"positive": positive, "same": same, "accuracy": accuracy}


def supcon_loss(
    z1: Tensor, z2: Tensor, labels: Tensor, temperature: float, epsilon: float = 0.0, keep_positives: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """SupCon (eq. 2, L_out) of this rank's embeddings of two views, (n, d) each, and the labels (N,) of all ranks'.

    Images of label -1 are classes of their own; of such images alone this is SimCLR's loss. With epsilon > 0
    epsilon-SupCon, and without `keep_positives` epsilon-SupInfoNCE, whose denominator has no others of the class.

    The mean over this rank's 2n anchors; the mean of that over ranks is the loss of the global batch. In float32
    (float64 stays). Terms: see `weighted_loss`.
    """
    with torch.autocast(z1.device.type, enabled=False):
        s, same_image, itself = compare(z1, z2, temperature)  # 2n×2N
        labels = labels.to(s.device)
        same = (labels[my_rows(len(labels))][:, None] == labels) & (labels >= 0)  # n×N
        same = same.repeat(2, 2) | same_image  # 2n×2N
        if keep_positives:
            log_denominator = (s - epsilon * same).masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)  # 2n×1
        else:
            log_negatives = s.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)  # 2n×1
            log_denominator = torch.logaddexp(s - epsilon, log_negatives)  # 2n×2N
        weight = (same & ~itself).to(s.dtype)  # 2n×2N
        return weighted_loss(s, weight, log_denominator, same_image, itself, temperature)


def log_sum_of_farther(s: Tensor, weight: Tensor) -> Tensor:
    """log of the sum of exp(s_t) over all t with weight_t < weight_k, for every k of a row; s_k where there is none.

    Sorted by weight, these t are the first ones of the row, and all sums come from one pass.
    """
    rising, order = weight.sort(1)
    sums = s.gather(1, order).logcumsumexp(1)  # of the first, of the first two, ...
    count = torch.searchsorted(rising, weight)  # how many are farther than k
    return sums.gather(1, (count - 1).clamp(min=0)).where(count > 0, s)


def log_sum_of_others(s: Tensor) -> Tensor:
    """log of the sum of exp(s_t) over all t other than k, for every k of a row: those before it and those behind it.

    To take exp(s_k) from the sum of all would lose every digit where k is most of it.
    """
    none = torch.full_like(s[:, :1], -torch.inf)
    before = torch.cat([none, s[:, :-1].logcumsumexp(1)], 1)
    behind = torch.cat([s[:, 1:].flip(1).logcumsumexp(1).flip(1), none], 1)
    return torch.logaddexp(before, behind)


def yaware_loss(
    z1: Tensor,
    z2: Tensor,
    targets: Tensor,
    temperature: float,
    sigma: float,
    repel: Literal["all", "thr", "exp"] = "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """y-aware, L_thr or L_exp of this rank's embeddings of two views, (n, d) each, and the targets (N,) of all ranks'.

    An image of target NaN is like no other. `sigma` is in the unit of the targets; towards 0, y-aware is SimCLR's loss.
    `repel` says what stands in the denominator: all; those that are less like the anchor, "thr"; all, but less the more
    they are like it, "exp", which needs two images or more. L_thr has no term for what is less like the anchor than all
    others, and neither of the last two has a bound of 0.

    The mean over this rank's 2n anchors; the mean of that over ranks is the loss of the global batch. In float32
    (float64 stays). Terms: see `weighted_loss`.
    """
    with torch.autocast(z1.device.type, enabled=False):
        s, same_image, itself = compare(z1, z2, temperature)  # 2n×2N
        targets = targets.to(s.device)
        distance = targets[my_rows(len(targets))][:, None] - targets  # n×N, in float64
        kernel = (-0.5 * (distance / sigma) ** 2).exp().nan_to_num(0.0)  # n×N
        kernel = kernel.repeat(2, 2).masked_fill(same_image, 1.0)  # 2n×2N
        weight = kernel.masked_fill(itself, 0.0).to(s.dtype)  # 2n×2N
        if repel == "all":
            log_denominator = s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)  # 2n×1
        elif repel == "thr":
            log_denominator = log_sum_of_farther(s, kernel.masked_fill(itself, 2.0))  # itself: nearer than all others
        else:
            log_denominator = log_sum_of_others((s * (1 - weight)).masked_fill(itself, -torch.inf))  # 2n×2N
        return weighted_loss(s, weight, log_denominator, same_image, itself, temperature)


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("supcon", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args, run.train)

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
    epsilon = args.epsilon if args.loss in WITH_MARGIN else 0.0
    repel = "all" if args.loss == "yaware" else args.loss

    for step, batch in run.batches(crops(args)):
        view1, view2 = batch
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x1 = augment(*view1, args)  # n×3×s×s
        x2 = augment(*view2, args)
        with run.autocast:
            z1, z2 = network(x1, x2)  # n×d each
        if args.loss in OF_TARGETS:
            loss, terms = yaware_loss(z1, z2, batch.targets, args.temperature, args.sigma, repel)
        else:
            keep_positives = args.loss != "eps_supinfonce"
            loss, terms = supcon_loss(z1, z2, batch.labels, args.temperature, epsilon, keep_positives)

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        run.report(step + 1, loss, terms, lr, z1)
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the papers and their codes differ
#
# (–: it does not say)  here                               papers        codes
#
# SupCon, size          as printed                         the same      times T / 0.07 (PyTorch), times T (TensorFlow)
# image without others  its other view is there            –             the same; NaN with one view, before Dec. 2023
#   of its class
# unlabelled images     classes of their own               –             –
# epsilon losses        exact                              the same      times T / 0.07; 1e-6 more in the logarithm
# y-aware               a row of weights sums to 1         the same      twice that, and the columns sum to 1
# L_thr                 divided by the sum of all w        of w_t < w_k  one denominator per anchor, with other weights
# k without a farther   no term                            –             –
#   t, in L_thr
# L_exp                 as printed                         the same      T s - 1 for T s (1), and k in the denominator
# kernel                1 for equal targets                –             divided by sqrt(2 pi) sigma, if "gaussian"
# weight decay          not on biases and BatchNorm        –             SupCon: on all
# projector             with BatchNorm, as in simclr.py    without       without
# views                 simclr.py's                        AutoAugment   PyTorch: no blur; y-aware: of 3-D images
#
# (1) The largest cosine of each row, 1, is subtracted before the factor 1 - w, which changes this loss. Divided as
# printed, L_thr goes to minus infinity with the few far images that are left. What is not the loss: see the table in
# simclr.py.
