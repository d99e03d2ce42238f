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

    python swav.py                                            some minutes on two CPU cores
    torchrun --nproc_per_node 4 swav.py --batch-size 1024     four processes share each batch
    torchrun --nproc_per_node 8 swav.py --recipe imagenet --data-dir /data/imagenet

What you should see: the loss starts a little above log K (4.2 at K = 64) and falls towards `entropy`, that of the
codes, which it cannot pass; `accuracy`, how often the prediction's first prototype is the code's, rises from 1/K. Sick:
the loss stays at log K with the accuracy near 1/K; then lower --epsilon or freeze the prototypes for longer.

Where this file, the paper and the official code differ
    LARS              on every tensor, biases and BatchNorm too, as the official code's LARC; in the denominator is the
                      norm of gradient and decay together (LARC: the sum of their norms)
    projector         no bias before BatchNorm, which removes it (official code: with one, whose gradient is nothing but
                      rounding; LARC scales it up)
    warm-up           linear from 0 (official code: from 0.3 to 4.8, one sixteenth of the peak)
    Sinkhorn          factors of rows and columns instead of dividing the matrix: the same in two thirds of the time
    scores            in float32 also under autocast (official code: half; bf16 would change the codes by some per cent)
    queue             its rows are kept once for all processes (official code: each has the rows of its own images)
    BatchNorm         over the images of all processes (official code, at batch 4096: of groups of eight GPUs)
    blur              a Gaussian kernel of a tenth of the image (official code: Pillow's box approximation)
    small images      two crops and few prototypes; `quick` has sharper codes, too (the paper has no small images)
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    IMAGENET_MEAN,
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
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of the channels, for normalisation
    std: tuple[float, float, float] = (0.228, 0.224, 0.225)  # of the channels, for normalisation
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
    temperature: float = 0.1  # T of the predictions; the codes have epsilon
    epsilon: float = 0.02  # sharpness of the codes: smaller is sharper; the paper: 0.05
    sinkhorn_iterations: int = 3  # of one normalisation over the batch and one over the prototypes
    prototypes: int = 64  # K; the paper's 3000 need batches, or a queue, of about that many images
    freeze_prototypes_epochs: float = 1  # leave the prototypes as they are for so long
    queue_length: int = 0  # older embeddings that join the batch in Sinkhorn, a multiple of the batch size; 0: none
    queue_start_epoch: int = 15  # when the queue begins to fill
    projector_hidden: int = 512  # width of the projector's hidden layer: that of the features
    projector_dim: int = 128  # d, width of the embeddings
    small_crops: int = 0  # views beside the two large ones; the paper, for large images: 6
    small_size: int = 16  # their side in pixels
    small_scale: tuple[float, float] = (0.14, 0.4)  # share of the area that they keep (ImageNet: 0.05 to 0.14)
    crop_min_scale: float = 0.2  # smallest share of the area a large crop keeps; paper: 0.14 beside small ones
    jitter_strength: float = 0.5  # s, strength of the colour jitter; the paper, for large images: 1
    flip: bool = True  # horizontal flip
    color_jitter: bool = True  # brightness, contrast, saturation, hue
    grayscale: bool = True  # drop the colour
    blur: bool = False  # Gaussian blur; part of the paper's views, for large images


RECIPES = {
    "quick": {},
    # From no paper: at 32 pixels, two crops and 512 prototypes instead of multi-crop and 3000.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", batch_size=512, epochs=200, warmup_epochs=10, base_lr=1.0,
        epsilon=0.05, prototypes=512, crop_min_scale=0.08, projector_hidden=2048, jitter_strength=0.5,
        log_every=50, eval_every=10, save_every=10,
    ),
    # The official code's longest run. With a batch of 256 it trains 200 or 400 epochs: --batch-size 256 --epochs 400
    # --base-lr 0.6 --warmup-epochs 0 --queue-length 3840.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", batch_size=4096, epochs=800, warmup_epochs=10, base_lr=0.3,
        weight_decay=1e-6, epsilon=0.05, prototypes=3000, projector_hidden=2048, crop_min_scale=0.14, small_crops=6,
        small_size=96, small_scale=(0.05, 0.14), jitter_strength=1.0, blur=True, workers=12,
        log_every=50, eval_every=10, save_every=1,
    ),
}  # fmt: skip


def check(args: Args, images: int) -> None:
    """Refuse impossible values of this method's flags."""
    low, high = args.small_scale
    if args.prototypes < 2:
        fail(f"--prototypes {args.prototypes}: with fewer than two there is nothing to predict")
    if min(args.temperature, args.epsilon, args.sinkhorn_iterations) <= 0:
        fail("--temperature, --epsilon and --sinkhorn-iterations must be positive")
    if not 0 <= args.small_crops <= 16:
        fail(f"--small-crops {args.small_crops} must be 0 to 16; the paper takes 6")
    if args.small_crops and not 1 <= args.small_size <= args.image_size:
        fail(f"--small-size {args.small_size} must be 1 to --image-size {args.image_size}, or --small-crops 0")
    if args.small_crops and not 0 < low <= high <= 1:
        fail(f"--small-scale {low} {high} must be two shares of the area, the smaller one first")
    if not 0 <= args.queue_length <= images:
        fail(f"--queue-length {args.queue_length} must be 0 to the number of training images, {images}")
    if args.queue_length % args.batch_size:
        fits = args.queue_length // args.batch_size * args.batch_size
        fail(f"--queue-length {args.queue_length} is no multiple of --batch-size {args.batch_size}; take {fits}")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: two large crops, then the small ones."""
    large = Crop(args.image_size, (args.crop_min_scale, 1.0), "bilinear", flip=0.5 * args.flip)
    small = Crop(args.small_size, args.small_scale, "bilinear", flip=0.5 * args.flip)
    return [large] * 2 + [small] * args.small_crops


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws. All crops alike."""
    s = args.jitter_strength
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


# ------------------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes (n, K) of this rank's rows of scores (n, K): every row sums to 1, and over the rows of all ranks every
    prototype has about the same total (eq. 5, by Sinkhorn and Knopp's algorithm).

    Starts from exp(scores / epsilon); each iteration divides every column by its total, then every row by its own, so a
    code ends as a distribution. (In the paper the totals become 1/K and 1/N; the next division cancels such constants.)
    Three iterations do not reach equal totals, and need not. Only a factor for each row and column is kept: an
    iteration is two products of the n×K matrix with a vector.
    In float32 (float64 stays), also under autocast. Each row's maximum is taken out before exp and put back as the
    factor the row starts with, so nothing overflows. A column's total counts as at least 4.5e-31, which touches only a
    prototype whose every score lies 70 epsilon below the largest: impossible at epsilon 0.05, where cosines differ by
    40 epsilon at most, possible at 0.02 (100).
    """
    if iterations < 1:
        raise ValueError(f"Sinkhorn needs at least one iteration, not {iterations}")
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # n×K
        top = scores.amax(1)  # n
        q = (scores - top[:, None]).div_(epsilon).exp_()  # n×K
        rows = ((top - all_gather(top).max()) / epsilon).exp()  # n
        least = torch.finfo(q.dtype).tiny ** 0.8  # 4.5e-31: K times its reciprocal is still finite
        for _ in range(iterations):
            totals = all_gather((rows @ q)[None]).sum(0)  # K, over this rank, then over all
            columns = totals.mean() / totals.clamp(min=least)  # K; any common factor would do, but it may not grow
            rows = 1 / (q @ columns)  # n
        return q * rows[:, None] * columns


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
    below which the loss cannot fall, and how often a prediction's first prototype is the code's. To take it elsewhere,
    take `sinkhorn` and `all_gather` with it.
    """
    if not 1 <= num_assign <= len(scores) or len(scores) < 2:
        raise ValueError(
            f"SwAV needs at least two views, and codes of 1 to all of them, not {num_assign} of {len(scores)}"
        )
    losses, entropies, hits = [], [], []
    with torch.autocast(scores[0].device.type, enabled=False):
        scores = [s.to(torch.promote_types(s.dtype, torch.float32)) for s in scores]
        log_p = [F.log_softmax(s / temperature, dim=1) for s in scores]  # n×K each
        for i in range(num_assign):
            older = [] if queue_scores is None else [queue_scores[i]]
            q = sinkhorn(torch.cat([*older, scores[i]]), epsilon, iterations)  # (m+n)×K, a constant
            q = q[-len(scores[i]) :]  # n×K: the queue's own codes are not wanted
            entropies.append(torch.special.entr(q).sum(1).mean())
            for v, log_p_v in enumerate(log_p):
                if v != i:
                    losses.append(-(q * log_p_v).sum(1).mean())
                    hits.append((q.argmax(1) == log_p_v.argmax(1)).to(q.dtype).mean())
    loss, entropy, accuracy = (torch.stack(each).mean() for each in (losses, entropies, hits))
    return loss, {"entropy": entropy, "accuracy": accuracy}


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
        h = self.backbone(torch.cat(views[:2]))  # 2n×3×s×s -> 2n×width
        if len(views) > 2:
            h = torch.cat([h, self.backbone(torch.cat(views[2:]))])  # Vn×width
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


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    # --- shared: setup ---
    args = prepare("swav", args, RECIPES)
    device = start_processes()
    dtype, autocast, scaler = precision_of(args, device)
    train, test = load_data(args, device)
    args = fit_batch_size(args, len(train))
    torch.manual_seed(args.seed)
    # --- end shared: setup ---
    check(args, len(train))

    model = SwAV(args)
    # --- shared: model ---
    if args.init:
        load_encoder(model.backbone, args.init)
    model = sync_batchnorm(model.to(device, dtype, memory_format=torch.channels_last), device)
    # --- end shared: model ---
    groups = [{"params": list(model.parameters())}]  # biases and BatchNorm as all others
    # --- shared: optimizer ---
    make = LARS if args.optimizer == "lars" else torch.optim.SGD
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    # --- end shared: optimizer ---
    queue = state["queue"] = Queue(args.queue_length, args.projector_dim, device, dtype)
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
    frozen_steps = round(args.freeze_prototypes_epochs * run.steps_per_epoch)

    for step, (x, draws) in enumerate(views, run.first_step):
        lr = cosine_schedule(step, run.total_steps, warmup_steps, peak_lr, final=peak_lr / 1000)
        for group in optimizer.param_groups:
            group["lr"] = lr
        normalize_prototypes(model.prototypes)
        x = [augment(x_v, draws_v, args) for x_v, draws_v in zip(x, draws, strict=True)]  # n×3×s×s each
        with autocast:
            z, scores = network(x)  # n×d and n×K for each crop
        older = queue.scores(model.prototypes)
        loss, terms = swav_loss(scores, 2, args.temperature, args.epsilon, args.sinkhorn_iterations, older)
        z1 = z[0]

        # --- shared: backward ---
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        # --- end shared: backward ---
        if step < frozen_steps:
            model.prototypes.weight.grad = None  # no gradient: the optimizer leaves out decay and momentum, too
        # --- shared: step ---
        scaler.step(optimizer)
        scaler.update()
        # --- end shared: step ---
        if args.queue_length and step >= args.queue_start_epoch * run.steps_per_epoch:
            queue.push(z[:2])

        # --- shared: report ---
        run.log(step + 1, loss, terms, lr, z1)
        run.evaluate(step + 1, model.backbone)
        run.save(step + 1, model, state)
    return run.close()
    # --- end shared: report ---


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))
