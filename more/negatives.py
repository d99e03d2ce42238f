"""Which negatives: SimCLR with another loss; five losses of four papers as points of one formula.

    decoupled (DCL, DCLW)      Yeh, Hong, Hsu, Liu, Chen, LeCun; ECCV 2022, arXiv 2110.06848
    epsilon-InfoNCE            Barbano, Dufumier, Tartaglione, Grangetto, Gori; ICLR 2023, arXiv 2211.05568
    debiased                   Chuang, Robinson, Lin, Torralba, Jegelka; NeurIPS 2020, arXiv 2007.00224
    hard negatives (HCL)       Robinson, Chuang, Sra, Jegelka; ICLR 2021, arXiv 2010.04592

Each of the 2N embeddings is an anchor. Its positive is the other view of its image, p = exp(sim / T); its negatives are
the J = 2N - 2 embeddings of other images, e_1 to e_J in the same way. SimCLR's loss is -log p + log(p + sum of e_k).
Here it is

    loss = -w log p + log(exp(-epsilon) p + G),  the mean over all anchors

    S = J sum of e_k^(1 + beta) / sum of e_k^beta             e_k weighted by e_k^beta; for beta = 0 the sum of e_k
    G = max{(S - tau+ J p) / (1 - tau+),  J exp(-1 / T)}      for tau+ = 0 simply S
    w = 2 - N softmax(sim / sigma) over the N positives       for sigma = 0 simply 1

    DCL                python more/negatives.py                                    (epsilon infinite)
    DCLW               python more/negatives.py --positive-sigma 0.5
    epsilon-InfoNCE    python more/negatives.py --no-decoupled --epsilon 0.25
    debiased           python more/negatives.py --no-decoupled --tau-plus 0.1 --temperature 0.5
    hard negatives     python more/negatives.py --no-decoupled --tau-plus 0.1 --beta 1 --temperature 0.5
    SimCLR             python more/negatives.py --no-decoupled

Decoupled. SimCLR's gradient at an anchor, of attraction and repulsion alike, has the factor G / (p + G): once the
positive is easy, the negatives hardly count, and the fewer there are, the sooner. That is why SimCLR needs large
batches. Without p in the denominator the factor is 1. epsilon-InfoNCE leaves a part of p there, and so wants the
positive's cosine above the negatives' by a margin of epsilon T. DCLW attends to the positives that are far apart.

Debiased. Some negatives are of the anchor's class, a share tau+ of them as a rule. What they add to S can be estimated
from the positive, which is of that class for sure, and is taken out; since that may leave less than nothing, G has a
floor, the least that J negatives can sum to. With the floor aside, this too takes p out of the denominator: of
p + G there remains the weight 1 - (J + 1) tau+ for p, so that tau+ = 1 / (J + 1) is DCL plus a constant, and the
usual 0.1 goes far beyond. Hard negatives: those close to the anchor have more to teach, so beta makes them count more.

The negatives prevent collapse, as in SimCLR: were all embeddings the same, DCL would be log J. Its lower bound is not 0
but log J - 2 / T: the pull on the positives never ends.

What you should see: DCL starts at about 6.1, above log J = 5.5 (N = 128), passes it while the learning rate rises, and
ends near 2.5; the online kNN goes from 42 % to 88 %. The other four start at 6.9, 6.1, 5.6 and 5.8, end near 2.7, 2.6,
3.4 and 4.1, and reach 86 to 90 %. `clamped`, the share of anchors whose G is the floor, stays at 0. Signs of trouble:
the loss stays where it started; or `clamped` comes close to 1, for a floor pushes no negatives away (raise
--temperature, or lower --tau-plus).

    python more/negatives.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read the loss; views, network and the loop in main are those of simclr.py, and appendices are those of its paper. The
table at the end says where this departs from the papers.
"""

import math
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
    refuse,
)


@dataclass
class Args(Flags):
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the channels; the official code leaves them in [0, 1]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    base_lr: float = 2.0
    warmup_epochs: float = 4
    lr_scaling: Literal["linear", "sqrt"] = "linear"  # how the learning rate follows the batch size (appendix B.1)
    temperature: float = 0.2  # T (0.1 for DCL on ImageNet; 0.5 for debiased and hard negatives)
    decoupled: bool = True  # leave the positive out of the denominator, as with an infinite epsilon
    epsilon: float = 0.0  # with --no-decoupled: exp(-epsilon) of the positive stays in the denominator; 0: all of it
    tau_plus: float = 0.0  # tau+, share of the negatives that are of the anchor's class (0.1: ten equal classes)
    beta: float = 0.0  # how much more the negatives near the anchor count; 0: all count the same
    positive_sigma: float = 0.0  # sigma of the weights of the positives (0.5 for DCLW); 0: all count the same
    projector_hidden: int = 512  # width of the projector's hidden layer: that of ResNet-10's features
    projector_dim: int = 128  # d, width of the embeddings
    jitter_strength: float = 0.5  # s, strength of the colour jitter (appendix A: 1; appendix B.9: 0.5 for small images)


RECIPES = {
    "quick": {},
    # From no paper: optimizer, batch and temperature of DCL in lightly's CIFAR-10 benchmark (kNN 84.4 %).
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=200, log_every=50, eval_every=10, save_every=10,
        batch_size=128, warmup_epochs=0, base_lr=0.12, optimizer="sgd", weight_decay=5e-4, crop_min_scale=0.08,
        temperature=0.1,
    ),
    # Batch and epochs of the DCL paper (68.2 %, SimCLR 61.8 %). The rest is simclr.py's, with the square-root learning
    # rate, which suits small batches and short runs (SimCLR, appendix B.1).
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=256, epochs=200, warmup_epochs=10, base_lr=0.3, lr_scaling="sqrt", crop_min_scale=0.08, blur=True,
        temperature=0.1, projector_hidden=2048, jitter_strength=1.0,
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    check_widths(args, "projector_hidden", "projector_dim")
    check_least(args, 0, "jitter_strength")
    check_least(args, 1e-4, "temperature")
    check_least(args, 0, "epsilon", "beta", "positive_sigma")
    if args.decoupled and args.epsilon > 0:
        refuse(f"--epsilon {args.epsilon:g} is without effect on a decoupled loss; add --no-decoupled")
    if not 0 <= args.tau_plus < 1:
        refuse(f"--tau-plus is a share of the negatives, from 0 to less than 1, not {args.tau_plus}")


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


def log_negatives(
    positive: Tensor, negative: Tensor, count: int, temperature: float, tau_plus: float, beta: float
) -> tuple[Tensor, Tensor]:
    """(log G of each anchor, whether it is the floor), from cosines over T: of the positive, and of the J = `count`
    negatives beside entries of -inf. In logarithms throughout, for exp((1 + beta) / T) would overflow.
    """
    log_s = negative.logsumexp(1)  # 2n
    if beta > 0:
        log_s = math.log(count) + ((1 + beta) * negative).logsumexp(1) - (beta * negative).logsumexp(1)
    if tau_plus == 0:  # S is never under the floor
        return log_s, torch.zeros_like(log_s, dtype=torch.bool)
    log_floor = math.log(count) - 1 / temperature
    log_share = math.log(tau_plus * count) + positive - log_s  # 2n: log of tau+ J p / S
    # Where nothing of S would be left, any share under 1 will do: the floor takes its place, and no gradient passes.
    left = -log_share.where(log_share < 0, -1.0).expm1()  # 2n: 1 - tau+ J p / S
    log_rest = log_s + left.log() - math.log1p(-tau_plus)  # 2n
    clamped = (log_share >= 0) | (log_rest < log_floor)
    return log_rest.where(~clamped, log_floor), clamped


def decoupled_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    epsilon: float = math.inf,
    tau_plus: float = 0.0,
    beta: float = 0.0,
    positive_sigma: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The formula at the top of this file for this rank's embeddings of two views, (n, d) each, of two images or more.

    The mean over this rank's 2n anchors, each compared with the 2N - 1 other embeddings of all ranks; the mean of that
    over ranks is the loss of the global batch. In float32 (float64 stays). 0 <= tau_plus < 1; epsilon, beta and
    positive_sigma (0: every w is 1) are at least 0. With epsilon 0 and the other three at 0, SimCLR's loss. Terms: the
    mean cosine of the positive pairs, how often the positive comes first, and the share of anchors whose G is clamped.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.normalize(full_precision(z), dim=1) for z in (z1, z2))  # n×d
        all1, all2 = all_gather(z1), all_gather(z2)  # N×d
        everyone = torch.cat([all1, all2])  # 2N×d: all first views, then all second ones
        total = len(all1)  # N
        own = torch.arange(total, device=z1.device)[my_rows(total)]  # n: where this rank's images stand among the N
        self_column = torch.cat([own, own + total])  # 2n: where each anchor stands among the 2N
        positive_column = torch.cat([own + total, own])  # 2n: where its other view stands
        logits = torch.cat([z1, z2]) @ everyone.T / temperature  # 2n×2N
        logits = logits.scatter(1, self_column[:, None], -torch.inf)  # takes out k = i exactly
        positive = logits.gather(1, positive_column[:, None])[:, 0]  # 2n: log p
        negative = logits.scatter(1, positive_column[:, None], -torch.inf)  # 2n×2N: log e_k, 2N - 2 of them in a row
        log_g, clamped = log_negatives(positive, negative, 2 * total - 2, temperature, tau_plus, beta)  # 2n
        log_denominator = torch.logaddexp(positive - epsilon, log_g)  # 2n
        weight = torch.ones_like(positive)  # 2n
        with torch.no_grad():  # the weights are constants
            if positive_sigma > 0:
                share = ((all1 * all2).sum(1) / positive_sigma).softmax(0)  # N, over the images of all ranks
                weight = (2 - total * share)[own].repeat(2)  # 2n: 1 on average
            cosine = temperature * positive.mean()
            accuracy = (logits.argmax(1) == positive_column).to(logits.dtype).mean()
        loss = (log_denominator - weight * positive).mean()
    return loss, {"positive": cosine, "accuracy": accuracy, "clamped": clamped.to(logits.dtype).mean()}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("negatives", args, RECIPES)  # processes, device, images, seed
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
    epsilon = math.inf if args.decoupled else args.epsilon

    for step, (view1, view2) in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x1 = augment(*view1, args)  # n×3×s×s
        x2 = augment(*view2, args)
        with run.autocast:
            z1, z2 = network(x1, x2)  # n×d each
        loss, terms = decoupled_loss(z1, z2, args.temperature, epsilon, args.tau_plus, args.beta, args.positive_sigma)

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
# (–: it does not say)  here                       papers      codes
#
# loss                  mean over the 2N anchors   the same    DCL (1): sum of two means, which is twice that
# self similarity       left out exactly (-inf)    left out    DCL: 1e-45 of it stays
# DCLW's weights        constants, over all N      –           DCL: with gradient; lightly: over each process's n
# HCL's weights         with gradient              –           the same
# epsilon-InfoNCE       exact                      the same    times T / 0.07; 1e-6 more in the logarithm
# exponentials          none, so no overflow       –           debiased: in half precision
# optimizer, network    those of simclr.py         –           debiased, HCL: Adam; each view a batch of its own
#
# (1) github.com/raminnakhli/Decoupled-Contrastive-Learning, not by the authors. What is not the loss: see the table in
# simclr.py.
