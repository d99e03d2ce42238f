"""DeepCluster-v2: Deep Clustering for Unsupervised Learning of Visual Features (Caron, Bojanowski, Joulin, Douze;
ECCV 2018, arXiv 1807.05520), as improved in the SwAV paper (Caron et al.; NeurIPS 2020, arXiv 2006.09882).

By turns, the embeddings of all images are clustered, and the network learns to tell from any view of an image to which
cluster it belongs. With z_i the embedding of image i, of length 1, and all c_k of length 1:

    a_i, c_k = spherical k-means of all z_i: a_i is the nearest of K centroids c_k         (DeepCluster, eq. 2)
    p_k(z)   = exp(z·c_k / T) / sum over j of exp(z·c_j / T)
    loss     = mean over clusterings, views and images i of  -log p_k(z),  k = a_i         (DeepCluster, eq. 1)

Clusters are made at the start of each epoch, from the embeddings that the last one left in a bank, and fixed until the
next. Their centroids are the weights of the classifier. (Version 1 learned such weights, and had to begin anew after
each clustering, for clusters come in no order.) One clustering is noisy, so there are several, `--heads`, which start
from different images and take turns at the embeddings of the first and the second large view.

Fixed clusters prevent collapse within an epoch: were all embeddings the same, the loss would be at least the entropy of
the clusters' sizes, log K if they are equal. What could collapse is the clustering, into one cluster that takes all
images. But each begins at K images drawn at random, among which the others are divided, however close they all are.

What you should see: the loss starts at 3.7, under log K (4.16 at K = 64): a view is near the cluster of its image from
the beginning. The second clustering takes it above log K, at first to 6, for the embeddings in the bank are those of an
earlier network; then it falls to 3.3. `accuracy`, how often the nearest centroid is that of the image's cluster, stays
low. `purity`, the share of images that have the most frequent label of their cluster (which nothing but this number
uses), goes from 0.20 to 0.39, the effective rank from 90 to 11, and with `python more/deepcluster.py` the online kNN
from 53 % to 77 %. No cluster is empty. Signs of trouble: the loss stays at log K, or `purity` at its first value; then
lower --base-lr, or --prototypes.

    python more/deepcluster.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, clusters, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
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
    epochs: int = 6
    base_lr: float = 0.2
    optimizer: Literal["lars", "larc", "sgd"] = "sgd"
    warmup_epochs: float = 1
    adapt_all: bool = True  # LARS adapts and decays biases and BatchNorm, too, as in the official code
    eval_every: int = 2  # epochs between online kNN evaluations
    temperature: float = 0.1  # T
    prototypes: int = 64  # K, clusters of each clustering; the paper: 3000 on ImageNet
    heads: int = 3  # clusterings
    kmeans_iterations: int = 10  # of k-means, at the start of each epoch
    projector_hidden: int = 512  # width of the projector's hidden layer: that of ResNet-10's features
    projector_dim: int = 128  # d, width of the embeddings
    small_crops: int = 0  # views beside the two large ones; the paper, for large images: 6
    small_size: int = 16  # their side in pixels
    small_scale: tuple[float, float] = (0.14, 0.4)  # share of the area that they keep (ImageNet: 0.05 to 0.14)
    jitter_strength: float = 0.5  # s, strength of the colour jitter; the paper, for large images: 1


LARGE_CROPS = 2  # the views that are clustered


RECIPES = {
    "quick": {},
    # solo-learn's, which reached 88.85 % with it (published; a linear classifier trained along).
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=1000, log_every=50, eval_every=10, save_every=10,
        batch_size=256, warmup_epochs=11, base_lr=0.6, optimizer="larc", adapt_all=False, crop_min_scale=0.08,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), blur=True, jitter_strength=1.0,
        prototypes=3000, projector_hidden=2048,
    ),
    # The official code's longest run.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=4096, epochs=800, warmup_epochs=10, base_lr=0.3, optimizer="lars", crop_min_scale=0.14, blur=True,
        prototypes=3000, projector_hidden=2048, small_crops=6, small_size=96, small_scale=(0.05, 0.14),
        jitter_strength=1.0,
    ),
}  # fmt: skip


def check(args: Args, images: int) -> None:
    """Refuse impossible values of this method's flags."""
    low, high = args.small_scale
    check_widths(args, "projector_hidden", "projector_dim")
    check_least(args, 1e-4, "temperature")
    check_least(args, 1, "kmeans_iterations", most=1000)
    check_least(args, 1, "heads", most=100)
    check_least(args, 0, "jitter_strength")
    if not 0 <= args.small_crops <= 16:
        refuse(f"--small-crops {args.small_crops} must be 0 to 16; the paper takes 6")
    if args.small_crops and not 1 <= args.small_size <= args.image_size:
        refuse(f"--small-size {args.small_size} must be 1 to --image-size {args.image_size}, or --small-crops 0")
    if args.small_crops and not 0 < low <= high <= 1:
        refuse(f"--small-scale {low} {high} must be two shares of the area, the smaller one first")
    seen = images // args.batch_size * args.batch_size  # in an epoch
    if not 2 <= args.prototypes <= seen:
        refuse(f"--prototypes {args.prototypes} must be 2 to the {seen} images of an epoch; take {max(2, seen // 8)}")


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


class DeepCluster(nn.Module):
    """Backbone and projector. Crops of one size pass the backbone as one batch, all pass the projector as one."""

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

    def forward(self, views: list[Tensor]) -> Tensor:
        large, small = views[:LARGE_CROPS], views[LARGE_CROPS:]
        h = self.backbone(torch.cat(large))  # 2n×3×s×s -> 2n×width
        if small:
            h = torch.cat([h, self.backbone(torch.cat(small))])  # Vn×width
        return self.projector(h)  # Vn×d


# --------------------------------------------------------------------------------------------------- clusters

UNSEEN = -100  # in place of the cluster of an image that was in no batch yet
CLUSTERS = 4  # first word of the key of k-means' random numbers, beside those in common.py that serve every method
AT_ONCE = 2**25  # cosines that k-means computes at once


@torch.no_grad()
def spherical_kmeans(x: Tensor, k: int, iterations: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster the directions of x (N, d): (N,) numbers of the nearest centroids, and the k centroids (k, d), length 1.

    Nearest is what has the largest cosine. The first centroids are the rows of x that `start` (k,) names. Each of the
    `iterations` moves every centroid to the mean direction of its rows; one that has none stays where it is. In float32
    (float64 stays), also under autocast.
    """
    if len(start) != k:
        raise ValueError(f"{k} clusters begin at {k} rows, not at {len(start)}")
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(full_precision(x), dim=1)  # N×d
        centroids = x[start]  # k×d
        pieces = x.split(max(1, AT_ONCE // k))  # m×d each
        for _ in range(iterations):
            sums, counts = torch.zeros_like(centroids), x.new_zeros(k, 1)  # k×d, k×1
            for piece in pieces:
                member = F.one_hot((piece @ centroids.T).argmax(dim=1), k).to(x.dtype)  # m×k
                sums += member.T @ piece  # a product: index_add_ on a GPU gives other bits each time
                counts += member.sum(dim=0)[:, None]
            centroids = F.normalize(sums, dim=1).where(counts > 0, centroids)
        assignments = torch.cat([(piece @ centroids.T).argmax(dim=1) for piece in pieces])  # N
    return assignments, centroids


class Bank(nn.Module):
    """The last embeddings of every image, and the clusters made of them. The same on every rank.

    rows (2, I, d): of both large views of all I images of the dataset, normalised; `seen` (I,) says of which there are
    any. assignments (H, I): the image's cluster in each of H clusterings, UNSEEN where there is none; centroids
    (H, K, d). Clustering h is of view h mod 2.
    """

    def __init__(self, images: int, heads: int, k: int, d: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(LARGE_CROPS, images, d))
        self.register_buffer("seen", torch.zeros(images, dtype=torch.bool))
        self.register_buffer("assignments", torch.full((heads, images), UNSEEN))
        self.register_buffer("centroids", torch.zeros(heads, k, d))

    @torch.no_grad()
    def update(self, index: Tensor, views: tuple[Tensor, ...]) -> None:
        """Put in this rank's embeddings of both large views, (n, d) each; `index` (N,) are the images of all ranks."""
        index = index.to(self.rows.device, non_blocking=True)
        for rows, z in zip(self.rows, views, strict=True):
            rows[index] = F.normalize(full_precision(all_gather(z)), dim=1).to(rows.dtype)  # N×d
        self.seen[index] = True

    @torch.no_grad()
    def cluster(self, iterations: int, seed: int, epoch: int) -> None:
        """Make new clusters; where k-means starts is drawn for the seed, the epoch and the clustering."""
        seen, k = self.seen.nonzero()[:, 0], self.centroids.shape[1]
        for head in range(len(self.centroids)):
            generator = np.random.default_rng((CLUSTERS, seed, epoch, head))
            # Files that cannot be decoded may leave fewer images than clusters; those that start alike stay empty.
            start = torch.from_numpy(generator.choice(len(seen), k, replace=len(seen) < k)).to(seen.device)
            z = self.rows[head % LARGE_CROPS, seen]
            self.assignments[head, seen], self.centroids[head] = spherical_kmeans(z, k, iterations, start)


@torch.no_grad()
def purity(assignments: Tensor, labels: Tensor, k: int, classes: int) -> Tensor:
    """Share of the images that have the most frequent label of their cluster; a mean over the clusterings.

    assignments (H, I), of 0 to k - 1 or UNSEEN, which do not count; labels (I,), of 0 to classes - 1.
    """
    cells = (classes * assignments + labels).where(assignments >= 0, k * classes)  # H×I, the last cell for UNSEEN
    table = cells.new_zeros(len(cells), k * classes + 1).scatter_add_(1, cells, torch.ones_like(cells))
    table = table[:, :-1].unflatten(1, (k, classes))  # H×K×classes: how many images of that cluster have that label
    return (table.amax(dim=2).sum(dim=1) / table.sum(dim=(1, 2))).mean()


# ------------------------------------------------------------------------------------------------------- loss


def deepcluster_loss(
    z: Tensor, assignments: Tensor, centroids: Tensor, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of the embeddings z (Vn, d) of this rank's n images, view by view, with the images' clusters.

    assignments (H, n) are the images' clusters in H clusterings, UNSEEN where an image has none and does not count;
    centroids (H, K, d), or H of any K, are constants. The mean over clusterings, views and images; the mean over ranks
    is the loss of the global batch. In float32 (float64 stays). Terms: how often the nearest centroid is the cluster's.
    """
    losses, hits = [], []
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(full_precision(z), dim=1)  # Vn×d
        targets = torch.stack([*assignments]).repeat(1, len(z) // len(assignments[0]))  # H×Vn
        # How many count, by the average rank: ranks that have more of them then weigh more in the mean over ranks.
        counts = all_gather((targets >= 0).sum(dim=1)[None]).to(z.dtype).mean(dim=0).clamp(min=1)  # H
        for target, c, count in zip(targets, centroids, counts, strict=True):
            logits = z @ F.normalize(c.detach().to(z.dtype), dim=1).T / temperature  # Vn×K
            losses.append(F.cross_entropy(logits, target, ignore_index=UNSEEN, reduction="sum") / count)
            hits.append((logits.argmax(dim=1) == target).sum() / count)
        loss, accuracy = torch.stack(losses).mean(), torch.stack(hits).mean()
    return loss, {"accuracy": accuracy}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("deepcluster", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args, len(run.train))

    model = run.place(DeepCluster(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]  # biases and BatchNorm
    groups = [{"params": weights}, {"params": others, "adapt": args.adapt_all}]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    bank = Bank(len(run.train), args.heads, args.prototypes, args.projector_dim).to(run.device, run.dtype)
    run.start(model=model, optimizer=optimizer, bank=bank)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256
    labels, classes = run.train.labels.to(run.device), int(run.train.labels.max()) + 1
    labelled = bool((run.train.labels >= 0).all())

    if run.first_step == 0:  # the first clusters are those of the untrained network
        for _, batch in run.batches(crops(args), range(run.steps_per_epoch)):
            xs = [augment(*view, args) for view in batch]  # n×3×s×s each
            with torch.no_grad(), run.autocast:
                z = model(xs)  # Vn×d
            bank.update(batch.index, z.chunk(len(xs))[:LARGE_CROPS])

    for step, batch in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=peak_lr / 1000)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step % run.steps_per_epoch == 0:
            bank.cluster(args.kmeans_iterations, args.seed, step // run.steps_per_epoch)
        xs = [augment(*view, args) for view in batch]  # n×3×s×s each
        with run.autocast:
            z = network(xs)  # Vn×d
        own = batch.index[my_rows(args.batch_size)].to(run.device, non_blocking=True)  # n
        loss, terms = deepcluster_loss(z, bank.assignments[:, own], bank.centroids, args.temperature)
        if labelled:
            terms["purity"] = purity(bank.assignments, labels, args.prototypes, classes)

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        zs = z.detach().chunk(len(xs))  # n×d each
        bank.update(batch.index, zs[:LARGE_CROPS])
        run.report(step + 1, loss, terms, lr, zs[0])
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                   paper      official code
#
# clusters and bank     of the images, whatever the number     –          each rank has those of its own images, so a
#                       of processes                                      run goes on with as many ranks only
# start of k-means      drawn by seed, epoch and clustering    random     rows of rank 0, other ones after a resume
# images not yet seen   left out of the mean over the batch    –          left out of each GPU's mean
# LARS                  of every tensor; divides by the norm   –          of every tensor (LARC); divides by the sum of
#                       of gradient and decay together                    the norms of gradient and decay
# projector             no bias before BatchNorm               –          with one, though BatchNorm removes it
# warm-up               from 0                                 –          from 0.3 to 4.8: from a sixteenth of the peak
# logits                in float32 under autocast, too         –          fp16
# blur                  Gaussian; the border is mirrored       –          Pillow's boxes; the border is repeated
# large JPEGs           decoded smaller, or --full-decode      –          decoded at full size
# small images          two crops, few prototypes, and         –          –
#                       SGD in `quick`
