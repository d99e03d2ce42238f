"""MoCo: Momentum Contrast (He, Fan, Wu, Xie, Girshick; CVPR 2020, arXiv 1911.05722) and MoCo v2 (arXiv 2003.04297).

Contrastive learning as looking up a key. The query q is the embedding of one view of an image; its key k+ is that of
the other view. It has to be found among the keys of K other images:

    loss = -log  exp(q·k+ / T)  /  sum over k+ and the K others of exp(q·k / T)                             (eq. 1)

The other keys come from a queue: those of the last batches, K of them however small the batch is (SimCLR takes them
from the batch). Old keys only compare with new ones if the network that makes them hardly changes, so the keys have a
network of their own, a slow moving average of the network of the queries, which alone is trained by gradient:

    theta_k <- m theta_k + (1 - m) theta_q                                                                  (eq. 2)

The negatives prevent collapse: were all embeddings the same, the loss would be log(K + 1). One shortcut remains: the
statistics of BatchNorm leave a mark on every embedding of a batch, and a query could know its key by that mark. So the
key images change places before BatchNorm, which works in groups (the authors' eight GPUs), and a query and its key are
normalised in different company (ShuffleBN, section 3.3). With one group, changing places would change nothing.

`--version v1` is the first paper: linear head, T = 0.07, weaker views. v2, the default, has a head of two layers,
T = 0.2 and stronger views. v2+ is v2 with a symmetric loss (SimSiam, arXiv 2011.10566, appendix C).

What you should see: the loss starts low, for the queue holds noise that is easily told from keys; it climbs towards
log(K + 1) (5.5 at K = 256) while the first keys fill the queue, all alike as yet, and falls from then on; `accuracy`,
how often the right key comes first, rises towards 1. Signs of trouble: the loss stays at log(K + 1); or the accuracy is
close to 1 once the queue is full of keys, while the kNN accuracy does not move (BatchNorm gives the answer away).

    python moco.py    a minute or two on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

import copy
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
    cosine_schedule,
    distribute,
    full_precision,
    grayscale,
    my_rows,
    normalize,
    parse_args,
    random_blur,
    rank_and_world,
    refuse,
)


@dataclass
class Args(Flags):
    epochs: int = 13
    base_lr: float = 0.1
    optimizer: Literal["lars", "larc", "sgd"] = "sgd"
    weight_decay: float = 1e-4
    version: Literal["v1", "v2", "v2+"] = "v2"  # head, temperature and views of that paper; v2+: symmetric loss
    temperature: float = 0.0  # T; 0: that of the version, 0.07 for v1 and 0.2 for v2 and v2+
    queue_size: int = 0  # K, a multiple of the batch size; 0: 2 batches, or what a smaller dataset allows
    key_momentum: float = 0.99  # m, share of the key network that a step keeps
    key_momentum_end: float = 0.0  # m at the last step, on half a cosine from --key-momentum; 0: m stays
    bn_groups: int = 8  # parts of the batch with own BatchNorm statistics; 1: all of it; the default fits a smaller one
    head_hidden: int = 0  # width of the hidden layer that the head has in v2 and v2+; 0: that of the features
    head_dim: int = 128  # d, width of the embeddings


RECIPES = {
    "quick": {},
    # solo-learn's, which reached 92.94 % with it (published; a linear classifier trained along).
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=1000, log_every=50, eval_every=10, save_every=10,
        batch_size=256, warmup_epochs=10, base_lr=0.3, crop_min_scale=0.08, blur=True, version="v2+",
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), queue_size=32768, key_momentum_end=0.999,
        bn_groups=1, head_hidden=2048, head_dim=256,
    ),
    # Section 4 and the official code. 800 epochs gain another 3.6 points (v2).
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=256, epochs=200, warmup_epochs=0, base_lr=0.03, blur=True, queue_size=65536, key_momentum=0.999,
    ),
}  # fmt: skip


def check(args: Args, images: int) -> None:
    """Refuse flags that do not fit the batch, the dataset or the processes."""
    batch, groups, world = args.batch_size, bn_groups(args), rank_and_world()[1]
    usable = [g for g in range(1, batch // 2 + 1) if batch % g == 0 and (g == 1 or g % world == 0)]
    if groups not in usable:
        rule = f"does not split {batch} images on {world} process(es) into equal parts of two or more"
        refuse(f"--bn-groups {groups} {rule}; take one of {', '.join(map(str, usable))}")
    size = queue_size(args, images)
    if size < 0 or size % batch or size > images:
        fit = max(1, min(size, images) // batch) * batch
        rule = f"must be a multiple of the batch size {batch} and at most the {images} training images"
        refuse(f"--queue-size {size} {rule}; take {fit}")
    check_widths(args, "head_dim")
    check_least(args, 1e-4 if args.temperature else 0, "temperature")
    check_least(args, 0, "head_hidden", most=2**15)
    check_least(args, 0, "key_momentum", "key_momentum_end", most=1)


def bn_groups(args: Args) -> int:
    """`--bn-groups`; the default shrinks until it splits the batch into equal parts of two images or more."""
    fits = [g for g in range(1, Args.bn_groups + 1) if args.batch_size % g == 0 and args.batch_size >= 2 * g]
    return fits[-1] if args.bn_groups == Args.bn_groups else args.bn_groups


def queue_size(args: Args, images: int) -> int:
    """K: `--queue-size`, or two batches, or the one that a small dataset has."""
    return args.queue_size or min(2, images // args.batch_size) * args.batch_size


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bilinear", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws."""
    if args.version == "v1":
        if args.grayscale:  # before the jitter, which comes always: v1's order
            x = grayscale(x, draws.chance(0.2))
        if args.color_jitter:
            x = color_jitter(x, draws, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, p=1.0)
        return normalize(x, args.mean, args.std)
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


# ---------------------------------------------------------------------------------------------------- network


class MoCo(nn.Module):
    """Backbone and head. MoCo has two of these, for queries and for keys. The head has no BatchNorm."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=False)
        if args.version == "v1":
            self.head = nn.Linear(width, args.head_dim)
        else:
            self.head = nn.Sequential(
                nn.Linear(width, args.head_hidden or width),
                nn.ReLU(inplace=True),
                nn.Linear(args.head_hidden or width, args.head_dim),
            )

    def forward(self, *views: Tensor) -> Tensor:
        """One or two views of n images, each a batch of its own for BatchNorm -> (n, d), or (2n, d) for two."""
        return torch.cat([self.head(self.backbone(x)) for x in views])  # n×3×s×s -> n×width -> n×d


class Queue(nn.Module):
    """The keys of the last images, (K, d) normalised, the same on every rank; noise until K images have passed."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))  # K×d
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # the row that is overwritten next

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put the keys of all ranks' images, (N, d) with N <= K, in the place of the N oldest ones."""
        rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % len(self.keys)  # N, wrapped around
        self.keys[rows] = F.normalize(keys.to(self.keys.dtype), dim=1)
        self.oldest.copy_((self.oldest + len(keys)) % len(self.keys))


@torch.no_grad()
def momentum_update(key_network: nn.Module, network: nn.Module, m: float) -> None:
    """Eq. 2, for parameters alone: running statistics are each network's own."""
    torch._foreach_lerp_(list(key_network.parameters()), list(network.parameters()), 1 - m)


@torch.no_grad()
def encode_keys(key_network: nn.Module, x: Tensor, draws: Draws) -> Tensor:
    """Keys of all ranks' images (N, d) from this rank's (n, 3, s, s), with ShuffleBN (section 3.3).

    All images change places, each rank takes the keys of its slice, and the keys change back. The permutation is drawn
    like an augmentation, for the global batch, so the same images meet in a BatchNorm group on any number of ranks.
    """
    order = torch.from_numpy(draws.generator.permutation(draws.total)).to(x.device, non_blocking=True)  # N
    shuffled = all_gather(x)[order[my_rows(draws.total)]]  # n×3×s×s
    k = key_network(shuffled).to(x.dtype)  # n×d
    return all_gather(k)[order.argsort()]  # N×d


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with statistics of its own for each of `groups` equal parts of the global batch, in its order.

    Running statistics follow the mean over this rank's groups; `average_statistics` then averages over ranks.
    `groups` is a multiple of the number of processes, so no group lies on two of them. A batch that does not split into
    equal groups is a ValueError.
    """

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        groups = self.groups // rank_and_world()[1]
        if groups == 0 or len(x) % groups:
            raise ValueError(f"{len(x)} images on this process do not split into {self.groups} groups over all")
        parts = x.chunk(groups)
        means, variances = self.running_mean.new_zeros(2, len(parts), x.shape[1])  # parts×C each
        # With momentum 1, batch_norm overwrites the buffers it is given with this part's mean and unbiased variance.
        normalized = [
            F.batch_norm(part, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
            for part, mean, var in zip(parts, means, variances, strict=True)
        ]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(means.mean(0), self.momentum)
            self.running_var.lerp_(variances.mean(0), self.momentum)
        return torch.cat(normalized)


def group_batchnorm(model: nn.Module, groups: int) -> nn.Module:
    """Make every BatchNorm of a ResNet work in `groups`; parameters, buffers and state-dict keys stay. A BatchNorm1d is
    a TypeError: it is not for images.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            raise TypeError("BatchNorm1d cannot work in groups: GroupBatchNorm2d is for images, (n, C, H, W)")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__, module.groups = GroupBatchNorm2d, groups
    return model


@torch.no_grad()
def average_statistics(*networks: nn.Module) -> None:
    """Average running statistics over ranks. They are linear in those of the batch, so once per step is enough."""
    buffers = [b for network in networks for b in network.buffers() if b.is_floating_point()]
    mean = all_gather(torch.cat(buffers)[None]).mean(0)
    torch._foreach_copy_(buffers, mean.split([len(b) for b in buffers]))


# ------------------------------------------------------------------------------------------------------- loss


def info_nce_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 1 for this rank's queries q and their keys k, (n, d) each, against the keys of other images, queue (K, d).

    The mean over the n queries; the mean of that over ranks is the loss of the global batch. Everything is normalised
    here; k and queue are constants. In float32 (float64 stays). Terms: the mean cosine of query and key, and how often
    the key comes first (a tie is lost, so that a collapsed network has accuracy 0).
    """
    with torch.autocast(q.device.type, enabled=False):
        # Normalising makes new tensors: the queue itself may change before the backward pass.
        q, k, queue = (F.normalize(full_precision(z), dim=1) for z in (q, k.detach(), queue.detach()))
        positive = (q * k).sum(dim=1, keepdim=True)  # n×1
        negative = q @ queue.T  # n×K
        logits = torch.cat([positive, negative], dim=1) / temperature  # n×(1+K)
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        with torch.no_grad():
            accuracy = (positive > negative.amax(dim=1, keepdim=True)).to(q.dtype).mean()
    return loss, {"positive": positive.detach().mean(), "accuracy": accuracy}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("moco", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args, len(run.train))

    model = run.place(MoCo(args))  # on the device; --init; BatchNorm over the images of all processes
    if bn_groups(args) > 1:
        group_batchnorm(model, bn_groups(args))
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # SGD decays all of them. Under LARS `adapt=False` exempts biases and BatchNorm, from adaptation and decay.
    groups = [{"params": weights}, {"params": others, "adapt": False}]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    key_network = copy.deepcopy(model).requires_grad_(False)  # in training mode, as the query network
    queue = Queue(queue_size(args, len(run.train)), args.head_dim).to(run.device, run.dtype)
    run.start(model=model, optimizer=optimizer, key_network=key_network, queue=queue)  # from a checkpoint, if any
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256
    temperature = args.temperature or (0.07 if args.version == "v1" else 0.2)
    symmetric = args.version == "v2+"  # each view is query once and key once

    for step, (view1, view2) in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x1 = augment(*view1, args)  # n×3×s×s
        x2 = augment(*view2, args)
        m = cosine_schedule(step, run.total_steps, 0, args.key_momentum, args.key_momentum_end or args.key_momentum)
        momentum_update(key_network, model, m)  # before the keys; nothing to do in the first step
        with run.autocast:
            q = network(x1, x2) if symmetric else network(x1)  # 2n×d or n×d
            keys = [encode_keys(key_network, x2, view2.draws)]  # N×d
            if symmetric:
                keys.append(encode_keys(key_network, x1, view1.draws))
        k = torch.cat([everyone[my_rows(args.batch_size)] for everyone in keys])  # of q's shape
        loss, terms = info_nce_loss(q, k, queue.keys, temperature)  # where symmetric, the mean of both directions
        queue.enqueue(keys[0])  # after the loss: no key is its own negative

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        average_statistics(model, key_network)
        run.report(step + 1, loss, terms, lr, q)
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                   papers              official code
#
# learning rate         a cosine at every step, scaled with    v1: divided by 10,  by epoch, and not scaled
#                       the batch size                         twice; v2: cosine
# BatchNorm             --bn-groups parts of the batch; their  a part per GPU, 8   a part per GPU; running statistics
#                       mean as running statistics                                 of the first
# v2+                   mean of both directions; the keys of   –                   CIFAR-10 demo: their sum; the keys of
#                       view 2 alone are queued: of K images                       both views; a linear head
# blur                  Gaussian; the border is mirrored       –                   Pillow's boxes; border repeated
# large JPEGs           decoded smaller, or --full-decode      –                   decoded at full size
# precision             bf16 where fast                        –                   float32, as --precision fp32
