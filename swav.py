"""SwAV: Swapping Assignments between Views (Caron, Misra, Mairal, Goyal, Bojanowski, Joulin; NeurIPS 2020,
arXiv 2006.09882).

K prototypes c_k cluster the images while the network learns. The score of an embedding z is its cosine with each c_k.
From the scores come a prediction p and a code q, and the code of one view is predicted from another view:

    p_k = exp(z·c_k / T) / sum over j of exp(z·c_j / T)                                                       (eq. 2)
    q   = the assignment of the batch to the prototypes that fits the scores best and uses all equally    (eq. 3 to 5)

    loss = mean over large views i, other views v and images of  -sum over k of q_k(i) log p_k(v)           (eq. 1, 6)

Equal use prevents collapse: no prototype, and so no point, can take all images. `sinkhorn` computes it: by turns it
gives every prototype the same total and every image the total 1. No gradient passes through the codes.
Multi-crop makes views cheap: small crops of small parts are predicted from, and only the two large ones have codes.
A batch much smaller than K cannot use all prototypes equally: a queue of older embeddings joins it (`--queue-length`).

What you should see: the loss starts a little above log K (4.2 at K = 64) and falls towards `entropy`, that of the
codes, which it cannot pass; `accuracy`, how often the prediction's first prototype is the code's, rises from 1/K.
Signs of trouble: the loss stays at log K, the accuracy near 1/K; then lower --epsilon or freeze the prototypes longer.

    python swav.py    a minute or two on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

import math
from dataclasses import dataclass

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
    std: tuple[float, float, float] = (0.228, 0.224, 0.225)  # as the official code
    epochs: int = 13
    base_lr: float = 3.0
    adapt_all: bool = True  # LARS adapts and decays biases and BatchNorm, too, as in the official code
    temperature: float = 0.1  # T of the predictions; the codes have epsilon
    epsilon: float = 0.02  # weight of the codes' entropy (eq. 3): smaller gives sharper codes; the paper: 0.05
    sinkhorn_iterations: int = 3  # each normalises over the images, then over the prototypes
    prototypes: int = 64  # K; the paper's 3000 need batches, or a queue, of about that many images
    freeze_prototypes_epochs: float = 1  # leave the prototypes as they are for this many epochs
    queue_length: int = 0  # older embeddings that join the batch in Sinkhorn, a multiple of the batch size; 0: none
    queue_start_epoch: int = 1  # when the queue begins to fill; the paper: 15
    projector_hidden: int = 512  # width of the projector's hidden layer: that of ResNet-10's features
    projector_dim: int = 128  # d, width of the embeddings
    small_crops: int = 0  # views beside the two large ones; the paper, for large images: 6
    small_size: int = 16  # their side in pixels
    small_scale: tuple[float, float] = (0.14, 0.4)  # share of the area that they keep (ImageNet: 0.05 to 0.14)
    jitter_strength: float = 0.5  # s, strength of the colour jitter; the paper, for large images: 1


LARGE_CROPS = 2  # the views that have codes


RECIPES = {
    "quick": {},
    # solo-learn's, which reached 89.17 % with it (published; a linear classifier trained along).
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=1000, log_every=50, eval_every=10, save_every=10,
        batch_size=256, warmup_epochs=10, base_lr=0.6, optimizer="larc", adapt_all=False, crop_min_scale=0.08,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), blur=True, jitter_strength=1.0,
        epsilon=0.05, prototypes=3000, freeze_prototypes_epochs=2, queue_length=3840, queue_start_epoch=50,
        projector_hidden=2048,
    ),
    # The official code's longest run. With a batch of 256 it trains 200 or 400 epochs: --batch-size 256 --epochs 400
    # --base-lr 0.6 --warmup-epochs 0 --queue-length 3840.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=4096, epochs=800, warmup_epochs=10, base_lr=0.3, crop_min_scale=0.14, blur=True, epsilon=0.05,
        prototypes=3000, projector_hidden=2048, small_crops=6, small_size=96, small_scale=(0.05, 0.14),
        jitter_strength=1.0, queue_start_epoch=15,
    ),
}  # fmt: skip


def check(args: Args, images: int) -> None:
    """Refuse impossible values of this method's flags."""
    low, high = args.small_scale
    if args.prototypes < 2:
        refuse(f"--prototypes {args.prototypes}: with fewer than two there is nothing to predict")
    check_widths(args, "prototypes", "projector_hidden", "projector_dim")
    check_least(args, 1e-4, "temperature", "epsilon")
    check_least(args, 1, "sinkhorn_iterations", most=1000)
    check_least(args, 0, "freeze_prototypes_epochs", "queue_start_epoch")
    if not 0 <= args.small_crops <= 16:
        refuse(f"--small-crops {args.small_crops} must be 0 to 16; the paper takes 6")
    if args.small_crops and not 1 <= args.small_size <= args.image_size:
        refuse(f"--small-size {args.small_size} must be 1 to --image-size {args.image_size}, or --small-crops 0")
    if args.small_crops and not 0 < low <= high <= 1:
        refuse(f"--small-scale {low} {high} must be two shares of the area, the smaller one first")
    if not 0 <= args.queue_length <= images:
        refuse(f"--queue-length {args.queue_length} must be 0 to the number of training images, {images}")
    if args.queue_length and args.queue_start_epoch >= args.epochs:
        refuse(f"--queue-start-epoch {args.queue_start_epoch}: the queue would never fill in {args.epochs} epochs")
    if args.queue_length % args.batch_size:
        fits = args.queue_length // args.batch_size * args.batch_size
        refuse(f"--queue-length {args.queue_length} is no multiple of --batch-size {args.batch_size}; take {fits}")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: two large crops, then the small ones."""
    large = Crop(args.image_size, (args.crop_min_scale, 1.0), "bilinear", flip=0.5 * args.flip)
    small = Crop(args.small_size, args.small_scale, "bilinear", flip=0.5 * args.flip)
    return [large] * LARGE_CROPS + [small] * args.small_crops


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws. All crops alike."""
    strength, hue = 0.8 * args.jitter_strength, 0.2 * args.jitter_strength
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=strength, contrast=strength, saturation=strength, hue=hue, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


# ---------------------------------------------------------------------------------------------------- network


class SwAV(nn.Module):
    """Backbone, projector, prototypes. Crops of one size pass the backbone as one batch, all pass the head as one."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=False)
        hidden, d = args.projector_hidden, args.projector_dim
        self.projector = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, d),
        )
        self.prototypes = nn.Linear(d, args.prototypes, bias=False)  # row k of its weight is c_k

    def forward(self, views: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        large, small = views[:LARGE_CROPS], views[LARGE_CROPS:]
        h = self.backbone(torch.cat(large))  # 2n×3×s×s -> 2n×width
        if small:
            h = torch.cat([h, self.backbone(torch.cat(small))])  # Vn×width
        z = self.projector(h)  # Vn×d
        with torch.autocast(z.device.type, enabled=False):  # small matrices, and the codes need exact scores
            z = F.normalize(z.to(self.prototypes.weight.dtype), dim=1)  # Vn×d
            scores = self.prototypes(z)  # Vn×K, cosines
        return z.chunk(len(views)), scores.chunk(len(views))  # n×d and n×K each


@torch.no_grad()
def normalize_prototypes(prototypes: nn.Linear) -> None:
    """Put the prototypes back on the unit sphere, which each update leaves."""
    prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))


class Queue(nn.Module):
    """The newest `length` embeddings of both large views, (2, length, d), over the images of all ranks.

    Every rank keeps all of them and brings its own share of them into Sinkhorn, whose sums are over all ranks: so every
    row counts once, on any number of processes. `length` must be a multiple of the global batch.
    """

    def __init__(self, length: int, d: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.length = length
        self.register_buffer("rows", torch.zeros(2, length, d, device=device, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))  # images ever stored; on the CPU, where reading it is free

    @torch.no_grad()
    def push(self, z: tuple[Tensor, ...]) -> None:
        """Put this step's embeddings, (n, d) of each large view, in the place of the oldest ones."""
        new = torch.stack([all_gather(view) for view in z])  # 2×N×d
        start = int(self.count) % self.length
        self.rows[:, start : start + new.shape[1]] = new
        self.count += new.shape[1]

    @torch.no_grad()
    def scores(self, prototypes: nn.Linear) -> list[Tensor] | None:
        """With today's prototypes, of this rank's share: (length/W, K) of each view; None before the queue is full."""
        if not 0 < self.length <= int(self.count):
            return None
        return [prototypes(rows[my_rows(self.length)]) for rows in self.rows]


# ------------------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes (n, K) of this rank's rows of scores (n, K): every row sums to 1, and over the rows of all ranks every
    prototype has about the same total (eq. 5, by Sinkhorn and Knopp's algorithm).

    In the paper the totals become 1/K and 1/N; the next division cancels such constants. Three iterations do not reach
    equal totals, and need not. In float32 (float64 stays), also under autocast.
    """
    if iterations < 1:
        raise ValueError(f"Sinkhorn needs at least one iteration, not {iterations}")
    with torch.autocast(scores.device.type, enabled=False):
        scores = full_precision(scores)  # n×K
        # A common factor changes no code: with the largest score at exp(0), nothing overflows. The least, exp(-70) in
        # float32, is nothing to a code, and keeps every total above 0. Cosines come near it only if epsilon < 2/70.
        least = 0.8 * math.log(torch.finfo(scores.dtype).tiny)
        q = ((scores - all_gather(scores.amax()[None]).amax()) / epsilon).clamp(min=least).exp()  # n×K
        for _ in range(iterations):
            q /= all_gather(q.sum(0)[None]).sum(0)  # every prototype has the total 1, over the images of all ranks
            q /= q.sum(1, keepdim=True)  # every image has the total 1: a code ends as a distribution
        return q


def swav_loss(
    scores: list[Tensor],
    num_assign: int,
    temperature: float,
    epsilon: float,
    iterations: int,
    queue_scores: list[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Swapped prediction (eq. 6) of this rank's scores of V views, (n, K) each; the first `num_assign` have codes.

    The mean over the pairs of a code and another view, and over this rank's images; the mean of that over ranks is
    the loss of the global batch. `queue_scores`, (m, K) for each view with a code: this rank's share of the queue,
    whose rows count in Sinkhorn and nowhere else. In float32 (float64 stays). Terms: the mean entropy of the codes,
    below which the loss cannot fall, and how often a prediction's first prototype is the code's.
    """
    if not 1 <= num_assign <= len(scores) or len(scores) < 2:
        raise ValueError(
            f"SwAV needs at least two views, and codes of 1 to all of them, not {num_assign} of {len(scores)}"
        )
    losses, entropies, hits = [], [], []
    with torch.autocast(scores[0].device.type, enabled=False):
        scores = [full_precision(s) for s in scores]
        log_p = [F.log_softmax(s / temperature, dim=1) for s in scores]  # n×K each
        for i in range(num_assign):
            older = scores[i][:0] if queue_scores is None else queue_scores[i]  # m×K
            q = sinkhorn(torch.cat([older, scores[i]]), epsilon, iterations)  # (m+n)×K, a constant
            q = q[len(older) :]  # n×K: the queue's own codes are not wanted
            entropies.append(torch.special.entr(q).sum(1).mean())
            for v, log_p_v in enumerate(log_p):
                if v != i:
                    losses.append(-(q * log_p_v).sum(1).mean())
                    hits.append((q.argmax(1) == log_p_v.argmax(1)).to(q.dtype).mean())
    loss, entropy, accuracy = (torch.stack(each).mean() for each in (losses, entropies, hits))
    return loss, {"entropy": entropy, "accuracy": accuracy}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("swav", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args, len(run.train))

    model = run.place(SwAV(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]  # biases and BatchNorm
    groups = [{"params": weights}, {"params": others, "adapt": args.adapt_all}]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    queue = Queue(args.queue_length, args.projector_dim, run.device, run.dtype)
    run.start(model=model, optimizer=optimizer, queue=queue)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256
    frozen_steps = round(args.freeze_prototypes_epochs * run.steps_per_epoch)

    for step, views in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=peak_lr / 1000)
        for group in optimizer.param_groups:
            group["lr"] = lr
        normalize_prototypes(model.prototypes)
        xs = [augment(*view, args) for view in views]  # n×3×s×s each
        with run.autocast:
            zs, scores = network(xs)  # n×d and n×K for each crop
        older = queue.scores(model.prototypes)
        loss, terms = swav_loss(scores, LARGE_CROPS, args.temperature, args.epsilon, args.sinkhorn_iterations, older)

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        if step < frozen_steps:
            model.prototypes.weight.grad = None  # no gradient: the optimizer leaves out decay and momentum, too
        run.scaler.step(optimizer)
        run.scaler.update()
        if args.queue_length and step >= args.queue_start_epoch * run.steps_per_epoch:
            queue.push(zs[:LARGE_CROPS])
        run.report(step + 1, loss, terms, lr, zs[0])
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                   paper      official code
#
# LARS                  of every tensor; divides by the norm   –          of every tensor (LARC); divides by the sum of
#                       of gradient and decay together                    the norms of gradient and decay, plus 1e-8
# projector             no bias before BatchNorm               –          with one, though BatchNorm removes it
# warm-up               from 0                                 –          from 0.3 to 4.8, reached a step earlier
# frozen prototypes     one epoch, 312 steps at batch 4096     –          313 steps
# scores                in float32 under autocast, too (1)     –          fp16
# queue                 its rows are kept once for all ranks   –          each rank has the rows of its own images
# BatchNorm             over the images of all processes       –          of groups of eight GPUs, at batch 4096
# blur                  Gaussian; the border is mirrored       –          Pillow's boxes; the border is repeated
# large JPEGs           decoded smaller, or --full-decode      –          decoded at full size
# small images          two crops, few prototypes, and         –          –
#                       sharper codes in `quick`
#
# (1) In bf16 they would change the codes by some per cent.
