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
T = 0.2 and stronger views. v2+ is v2 with a symmetric loss (SimSiam, arXiv 2011.10566, appendix C): each view is query
once and key once.

    python moco.py                                              some minutes on two CPU cores
    torchrun --nproc_per_node 4 moco.py                         four processes share each batch
    torchrun --nproc_per_node 8 moco.py --recipe imagenet --data-dir /data/imagenet

What you should see: the loss starts low, for the queue holds noise that is easily told from keys; it climbs towards
log(K + 1) (5.5 at K = 256) while the first keys fill the queue, all alike as yet, and falls from then on; `accuracy`,
how often the right key comes first, rises towards 1. Sick: the loss stays at log(K + 1); or accuracy close to 1 once
the queue is full of keys, and a kNN accuracy that does not move (BatchNorm gives the answer away).

Where this file, the papers and the official code differ
    learning rate     cosine at every step (official code: at every epoch; v1: a tenth at epochs 120 and 160), and
                      scaled with the batch size (official code: not)
    BatchNorm         `--bn-groups` parts of the global batch (papers: one part for each GPU, eight); the running
                      statistics are the mean over all groups (official code: those of the first GPU)
    flip              before the colours instead of last: the same, since every step between commutes with a flip
    blur              a Gaussian kernel of a tenth of the image (official code: Pillow's box approximation)
    v2+               mean of the two directions, and the keys of the second view alone go to the queue, which so
                      holds K different images (official CIFAR-10 demo: the sum, and the keys of both views)
    precision         bf16 on a GPU (official code: float32, as `--precision fp32`)
    --recipe cifar    the official demo's settings, with the head of v2 (demo: linear)
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
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
    rank_and_world,
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
    batch_size: int = 128  # images per step over all processes; the default shrinks to fit a smaller dataset
    epochs: int = 15  # passes over the training images
    max_steps: int = 0  # stop after so many steps of the schedule that --epochs sets; 0: do not
    train_limit: int = 0  # train on so many images, chosen at random; 0: all
    base_lr: float = 0.1  # learning rate at batch size 256, scaled linearly with it
    optimizer: Literal["lars", "sgd"] = "sgd"  # momentum 0.9 in both
    weight_decay: float = 1e-4  # on which parameters: see `groups` in main
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
    version: Literal["v1", "v2", "v2+"] = "v2"  # head, temperature and views of that paper; v2+: symmetric loss
    temperature: float = 0.0  # T; 0: that of the version, 0.07 for v1 and 0.2 for v2 and v2+
    queue_size: int = 0  # K, a multiple of the batch size; 0: 2 batches, or what a smaller dataset allows
    key_momentum: float = 0.99  # m, share of the key network that a step keeps
    bn_groups: int = 8  # parts of the batch with BatchNorm statistics of their own; 1: those of the whole batch
    head_dim: int = 128  # d, width of the embeddings
    crop_min_scale: float = 0.2  # smallest share of the area a crop keeps
    flip: bool = True  # horizontal flip
    color_jitter: bool = True  # brightness, contrast, saturation, hue
    grayscale: bool = True  # drop the colour
    blur: bool = False  # Gaussian blur; part of v2's views, for large images


RECIPES = {
    "quick": {},
    # The official CIFAR-10 demo. Its symmetric loss is the sum of both directions, ours their mean: with
    # --version v2+ --base-lr 0.06 --weight-decay 2.5e-4, loss and decay have its weights.
    "cifar": dict(
        dataset="cifar10", mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), arch="resnet18", stem="small",
        batch_size=512, epochs=200, warmup_epochs=0, base_lr=0.03, weight_decay=5e-4, temperature=0.1, queue_size=4096,
        crop_min_scale=0.08, log_every=50, eval_every=10, save_every=10,
    ),
    # Section 4 and the official code. 800 epochs gain another 3.6 points (v2).
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", batch_size=256, epochs=200, warmup_epochs=0, base_lr=0.03,
        weight_decay=1e-4, queue_size=65536, key_momentum=0.999, blur=True, workers=12,
        log_every=50, eval_every=10, save_every=1,
    ),
}  # fmt: skip


def check(args: Args, images: int) -> int:
    """Refuse flags that do not fit the batch, the dataset or the processes; return the queue's size K."""
    batch, groups, world = args.batch_size, args.bn_groups, rank_and_world()[1]
    usable = [g for g in range(1, batch // 2 + 1) if batch % g == 0 and (g == 1 or g % world == 0)]
    if groups not in usable:
        rule = f"does not split {batch} images on {world} process(es) into equal parts of two or more"
        fail(f"--bn-groups {groups} {rule}; take one of {', '.join(map(str, usable))}")
    size = args.queue_size or min(2, images // batch) * batch
    if size < 0 or size % batch or size > images:
        fit = max(1, min(size, images) // batch) * batch
        rule = f"must be a multiple of the batch size {batch} and at most the {images} training images"
        fail(f"--queue-size {size} {rule}; take {fit}")
    if not 0 <= args.key_momentum <= 1:
        fail(f"--key-momentum must be between 0 and 1, not {args.key_momentum}")
    if not args.temperature >= 0:
        fail(f"--temperature must not be negative, not {args.temperature}; 0 is that of the version")
    return size


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bilinear", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws.

    Both views have the same strengths and probabilities.
    """
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


# ------------------------------------------------------------------------------------------------------- loss


def info_nce_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 1 for this rank's queries q and their keys k, (n, d) each, against the keys of other images, queue (K, d).

    The mean over the n queries; the mean of that over ranks is the loss of the global batch. Everything is normalised
    here; k and queue are constants. In float32 (float64 stays). Terms: the mean cosine of query and key, and how often
    the key comes first (a tie is lost, so that a collapsed network has accuracy 0). Stands alone.
    """
    with torch.autocast(q.device.type, enabled=False):
        # Normalising makes new tensors: the queue itself may change before the backward pass.
        q, k, queue = (
            F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
            for z in (q, k.detach(), queue.detach())
        )
        positive = (q * k).sum(dim=1, keepdim=True)  # n×1
        negative = q @ queue.T  # n×K
        logits = torch.cat([positive, negative], dim=1) / temperature  # n×(1+K)
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        with torch.no_grad():
            accuracy = (positive > negative.amax(dim=1, keepdim=True)).to(q.dtype).mean()
    return loss, {"positive": positive.detach().mean(), "accuracy": accuracy}


# ---------------------------------------------------------------------------------------------------- network


class MoCo(nn.Module):
    """Backbone and head; there are two of it, one for queries and one for keys. Without BatchNorm in the head."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=False)
        if args.version == "v1":
            self.head = nn.Linear(width, args.head_dim)
        else:
            self.head = nn.Sequential(
                nn.Linear(width, width),
                nn.ReLU(inplace=True),
                nn.Linear(width, args.head_dim),
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

    Running statistics follow the mean over the groups: over those of this rank here, see `average_statistics`.
    `groups` is a multiple of the number of processes, so no group lies on two of them. Made by `group_batchnorm`.
    """

    groups: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        parts = x.chunk(self.groups // rank_and_world()[1])
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
    """Make every BatchNorm of a ResNet work in `groups`; parameters, buffers and state-dict keys stay."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__, module.groups = GroupBatchNorm2d, groups
    return model


@torch.no_grad()
def average_statistics(*networks: nn.Module) -> None:
    """Average running statistics over ranks. Once after each step is as good as in each layer: they are linear."""
    buffers = [b for network in networks for b in network.buffers() if b.is_floating_point()]
    mean = all_gather(torch.cat(buffers)[None]).mean(0)
    torch._foreach_copy_(buffers, mean.split([len(b) for b in buffers]))


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    # --- shared: setup ---
    args = prepare("moco", args, RECIPES)
    device = start_processes()
    dtype, autocast, scaler = precision_of(args, device)
    train, test = load_data(args, device)
    args = fit_batch_size(args, len(train))
    torch.manual_seed(args.seed)
    # --- end shared: setup ---
    queue_size = check(args, len(train))

    model = MoCo(args)
    # --- shared: model ---
    if args.init:
        load_encoder(model.backbone, args.init)
    model = sync_batchnorm(model.to(device, dtype, memory_format=torch.channels_last), device)
    # --- end shared: model ---
    if args.bn_groups > 1:
        group_batchnorm(model, args.bn_groups)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]  # biases, BatchNorm: SGD decays them too; LARS does not
    groups = [{"params": weights}, {"params": others, "adapt": False}]
    # --- shared: optimizer ---
    make = LARS if args.optimizer == "lars" else torch.optim.SGD
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    # --- end shared: optimizer ---
    key_network = copy.deepcopy(model).requires_grad_(False)  # in training mode, as the query network
    queue = Queue(queue_size, args.head_dim).to(device, dtype)
    state |= {"key_network": key_network, "queue": queue}
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
    if args.compile:
        key_network.compile()
    peak_lr = args.base_lr * args.batch_size / 256
    temperature = args.temperature or (0.07 if args.version == "v1" else 0.2)

    for step, ((x1, x2), (draws1, draws2)) in enumerate(views, run.first_step):
        lr = cosine_schedule(step, run.total_steps, warmup_steps, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x1 = augment(x1, draws1, args)  # n×3×s×s
        x2 = augment(x2, draws2, args)
        momentum_update(key_network, model, args.key_momentum)  # before the keys; nothing to do in the first step
        with autocast:
            if args.version == "v2+":
                q = network(x1, x2)  # 2n×d
                keys = [encode_keys(key_network, x2, draws2), encode_keys(key_network, x1, draws1)]  # N×d each
            else:
                q = network(x1)  # n×d
                keys = [encode_keys(key_network, x2, draws2)]  # N×d
        k = torch.cat([everyone[my_rows(args.batch_size)] for everyone in keys])  # n×d or 2n×d, as q
        loss, terms = info_nce_loss(q, k, queue.keys, temperature)  # for v2+ the mean of both directions
        queue.enqueue(keys[0])  # after the loss: no key is its own negative
        z1 = q  # watched for collapse

        # --- shared: backward ---
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        # --- end shared: backward ---
        # --- shared: step ---
        scaler.step(optimizer)
        scaler.update()
        # --- end shared: step ---
        average_statistics(model, key_network)

        # --- shared: report ---
        run.log(step + 1, loss, terms, lr, z1)
        run.evaluate(step + 1, model.backbone)
        run.save(step + 1, model, state)
    return run.close()
    # --- end shared: report ---


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))
