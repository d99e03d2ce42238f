"""What an encoder is worth: one protocol for every method and every file of weights.

    python evaluate.py runs/vicreg                                    weighted nearest neighbours
    python evaluate.py runs/vicreg --protocol linear                  linear classifier on frozen features
    python evaluate.py runs/vicreg --protocol finetune --train-fraction 0.1
    python evaluate.py runs/vicreg --protocol regress                 linear regression on frozen features
    python evaluate.py runs/vicreg --protocol cluster                 clusters of the features, without labels
    python evaluate.py runs/vicreg --protocol tsne                    a picture of the features
    python evaluate.py runs/vicreg --protocol diagnose                how they fill their space
    python evaluate.py resnet50.pth --protocol linear --augment --data-dir imagenet

The features are h, the pooled output of the backbone; projectors and other heads are left aside. A run folder brings
its own dataset, image size and normalisation; a bare file of weights (this project's, torchvision's, or a published one
of VICReg, Barlow Twins, SwAV, MoCo, SimSiam or DINO) needs them as flags. The architecture is read off the weights.

    knn       every test image takes the class with the largest sum of exp(cosine / temperature) over its k nearest
              training images (Wu et al., arXiv 1805.01978)
    linear    softmax regression on frozen features by SGD, once they have mean 0 and a mean variance of 1 over
              the training images; learning rate and weight decay are chosen on a tenth of the training images held out,
              never on the test images, then the classifier is trained on all of them.
              The features are computed once, without augmentation; with `--augment` anew in every epoch from
              random resized crops and flips, as in the papers
    finetune  backbone and classifier together, each with its own learning rate, on random resized crops and flips;
              kept in finetuned.pt, which a torchvision ResNet with as many classes loads
    regress   ridge regression of the targets, numbers that a folder has in its targets.csv, on frozen features; its
              strength is chosen on a tenth of the training images held out, never on the test images. R2 (the share of
              the test targets' variance that it explains) and mean absolute error
    cluster   k-means on the normalised features of the training images, as many clusters as classes, the best of ten
              starts; each test image is in the nearest of these clusters. acc: accuracy of the test images with the
              best matching of clusters and classes, one to one; nmi: normalised mutual information (arithmetic mean);
              ari: adjusted Rand index. For a run that has cluster heads (more/scan.py) also heads_acc and so on, of the
              clusters into which the head with the lowest loss sorts the test images
    tsne      t-SNE of the test features of some classes, a PNG
    diagnose  spread, rank and singular values of the features, covariance and correlation between their dimensions on
              training and test images (the same where no image has a label), alignment and uniformity (Wang and
              Isola, arXiv 2005.10242); a PNG and a JSON file

The last line printed is one JSON object, which is also appended to results.jsonl; its `files` are those written beside
that. It is printed before anything is saved. Accuracies are fractions. Under torchrun every process takes its share of
the images, and the result is the same.
"""

import dataclasses
import importlib.util
import io
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from common import (
    ARCHITECTURES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    Compute,
    Crop,
    Data,
    Judge,
    abort,
    all_gather,
    atomic_save,
    backbone,
    batches,
    check_least,
    check_shared,
    compute_in,
    cosine_schedule,
    distribute,
    embedding_health,
    knn_accuracy,
    knn_scores,
    load_data,
    misfits,
    my_rows,
    normalize,
    on_rank_0,
    parse_args,
    rank_and_world,
    read_flags,
    read_weights,
    refuse,
    say,
    start_processes,
    sync_batchnorm,
    tell,
    warn,
)

__all__ = ["cluster_scores", "knn_accuracy", "linear_probe", "main"]


@dataclass
class Args:
    weights: str  # a run folder, or a file of weights such as encoder.pt
    protocol: Literal["knn", "linear", "finetune", "regress", "cluster", "tsne", "diagnose"] = "knn"  # how to judge
    scratch: bool = False  # take random weights of that architecture instead, to compare with
    dataset: Literal["", "patterns", "cifar10", "cifar100", "stl10", "folder"] = ""  # none: the run's
    data_dir: str = ""  # none: the run's
    image_size: int = 0  # side of the images in pixels; 0: the run's, or 224
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the channels; used with --std
    std: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the channels; without it, both are the run's, or ImageNet's
    train_fraction: float = 1.0  # share of the labelled training images to learn from, the same in every class
    train_limit: int = 0  # use so many training images, chosen at random; 0: all
    k: int = 20  # knn: neighbours
    temperature: float = 0.07  # knn: of the neighbours' votes
    epochs: int = 0  # 0: 100 for linear, 20 for finetune
    batch_size: int = 0  # linear, finetune: images per step over all processes; 0: 256, or fewer for 8 steps an epoch
    augment: bool = False  # linear: random resized crops and flips instead of features computed once
    lr: float = 0.0  # linear: learning rate; 0: choose on held-out images
    weight_decay: float = 0.0  # linear: only with --lr
    lr_backbone: float = 0.01  # finetune: learning rate of the backbone (VICReg: 0.01 for 10 %, 0.03 for 1 %)
    lr_head: float = 0.1  # finetune: learning rate of the classifier (VICReg: 0.1 for 10 %, 0.08 for 1 %)
    crop_min_scale: float = 0.08  # linear --augment, finetune: smallest share of the area a crop keeps
    classes: int = 5  # tsne: so many classes, chosen at random
    seed: int = 0  # of the label subset, the held-out images, the order and the crops
    output: str = ""  # folder for results and pictures; none: where the weights are
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"  # auto: as in training, if that was told
    workers: int = 2  # for images that do not fit in memory
    full_decode: bool = False  # decode JPEGs at full size, as is done anyway if the run did


LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of features with a variance of 1
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)  # the last for few labels
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of features with a variance of 1

Stream = Iterator[tuple[Tensor, Tensor]]  # for each step: features (n, d) and labels (n,)


def with_progress(items: Iterable, steps: int) -> Iterator:
    """The same items; after every tenth of them, a line with the time left."""
    began = time.perf_counter()
    for step, item in enumerate(items, 1):
        yield item
        if step % max(1, steps // 10) == 0 and rank_and_world()[0] == 0:
            left = (time.perf_counter() - began) * (steps - step) / step
            tell(f"step {step}/{steps}, {int(left // 60)}:{int(left % 60):02d} left", "stderr")


def features(net: nn.Module, data: Data, args: Args, judge: Judge) -> Tensor:
    """(N, d) features of every image, on all ranks. A fault if they, or the sum of their squares, are not finite."""
    x = judge.features(net, data)
    if not torch.linalg.vector_norm(x).isfinite():
        abort(
            f"the features of {args.weights} are not finite: its weights are not, or --mean, --std, --precision misfit"
        )
    return x


# ----------------------------------------------------------------------------------------------------- linear


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    epochs: int = 100,
    batch_size: int = 256,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS,
    seed: int = 0,
) -> dict[str, float]:
    """Softmax regression on features (N, d) with labels (N,): test top-1 and top-5 (fractions) and what was chosen.

    One head per pair of learning rate and weight decay is trained, all in one pass, on nine tenths of the training
    rows; the best on the other tenth is trained again on all of them, and that one is tested. SGD with Nesterov
    momentum 0.9, cosine decay to 0, weights and bias from 0. The features are centred and divided by one number first
    (`moments`): SGD is slow where means are large beside the spread, as they are after a ReLU.
    """
    mean, std = moments(train_x)

    def stream(rows: Tensor) -> Stream:
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            order = rows[torch.from_numpy(rng.permutation(len(rows))).to(rows.device)]
            for batch in order.tensor_split(max(1, len(rows) // batch_size)):
                yield (train_x[batch] - mean) / std, train_y[batch]

    def train(rows: Tensor, grid: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
        heads = train_heads(stream(rows), epochs * max(1, len(rows) // batch_size), classes, grid)
        return for_raw_features(*heads, mean, std)

    def score(heads: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        return accuracy(train_x[rows], train_y[rows], *heads)

    classes = int(max(train_y.max(), test_y.max())) + 1
    grid = [(lr, decay) for lr in learning_rates for decay in weight_decays]
    heads, chosen = choose(len(train_x), grid, seed, train_x.device, train, score)
    top1, top5 = (accuracy(test_x, test_y, *heads, k=k)[0].item() for k in (1, min(5, classes)))
    return {"top1": top1, "top5": top5, **chosen}


def augmented_probe(
    net: nn.Module,
    train: Data,
    test: Data,
    args: Args,
    learning_rates: tuple[float, ...],
    weight_decays: tuple[float, ...],
    judge: Judge,
) -> dict[str, float]:
    """`linear_probe` on crops and flips drawn anew in every epoch, as the papers train it; net stays frozen."""
    device = judge.compute.device

    @torch.no_grad()
    def stream(data: Data, batch_size: int, steps: int) -> Stream:
        for batch in with_progress(cropped_batches(data, 1, batch_size, steps, args, judge.compute), steps):
            ((x, _),) = batch
            with judge.compute.autocast:
                h = net(normalize(x, args.mean, args.std))  # n×d
            yield (all_gather(h.float()) - mean) / std, batch.labels.to(device)

    def fit(rows: Tensor, grid: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
        batch_size = probe_batch_size(args, len(rows), least=1)
        steps = args.epochs * (len(rows) // batch_size)
        heads = train_heads(stream(train.subset(rows), batch_size, steps), steps, len(train.classes), grid)
        return for_raw_features(*heads, mean, std)

    def score(heads: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        held_out = train.subset(rows)
        return accuracy(features(net, held_out, args, judge), held_out.labels.to(device), *heads)

    net.eval()
    mean, std = moments(features(net, train, args, judge))
    grid = [(lr, decay) for lr in learning_rates for decay in weight_decays]
    heads, chosen = choose(len(train), grid, args.seed, torch.device("cpu"), fit, score)
    test_x, test_y = features(net, test, args, judge), test.labels.to(device)
    top1, top5 = (accuracy(test_x, test_y, *heads, k=k)[0].item() for k in (1, min(5, len(train.classes))))
    return {"top1": top1, "top5": top5, **chosen}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) of features (N, d), and the root of their mean variance, one number: directions keep their weights."""
    variance, mean = torch.var_mean(x, dim=0)
    return mean, (variance.mean() + 1e-12).sqrt()


def for_raw_features(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The heads (d, m, classes) and (m, classes) on (x - mean) / std, as heads on x."""
    weight = weight / std
    return weight, bias - (mean @ weight.flatten(1)).view_as(bias)


def choose(
    total: int, grid: list[tuple[float, float]], seed: int, device: torch.device, train, score
) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
    """The head trained on all rows with the pair of `grid` that did best on a tenth held out, and what was chosen."""
    everything = torch.from_numpy(np.random.default_rng(seed).permutation(total)).to(device)
    chosen = {}
    if len(grid) > 1:
        held_out, rest = everything[: max(1, total // 10)], everything[max(1, total // 10) :]
        top1, loss = score(train(rest, grid), held_out)  # one per head
        best = int((top1 - 1e-6 * loss.nan_to_num(1e6)).argmax())  # of few images many do equally well
        chosen, grid = {"held_out_top1": top1[best].item()}, [grid[best]]
    weight, bias = train(everything, grid)
    if not weight.isfinite().all():
        abort(f"the linear classifier diverged at --lr {grid[0][0]:g}; lower it")
    return (weight, bias), {"lr": grid[0][0], "weight_decay": grid[0][1], **chosen}


def train_heads(stream: Stream, steps: int, classes: int, grid: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Weights (d, m, classes) and biases (m, classes) of m heads, one per (learning rate, weight decay)."""
    for step, (x, y) in enumerate(stream):
        if step == 0:
            lr, decay = torch.tensor(grid, device=x.device, dtype=x.dtype).T[:, :, None]  # m×1 each
            weight, bias = x.new_zeros(x.shape[1], len(grid), classes), x.new_zeros(len(grid), classes)
            speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
        cosine = cosine_schedule(step, steps, 0, peak=1.0, final=0.0)
        logits = (x @ weight.flatten(1)).unflatten(1, bias.shape) + bias  # n×m×classes
        # The gradient of the mean cross-entropy: probabilities minus the one-hot label.
        error = logits.softmax(2)
        error[torch.arange(len(x)), :, y] -= 1
        error /= len(x)
        gradients = [(x.T @ error.flatten(1)).view_as(weight) + decay * weight, error.sum(0)]
        for parameter, gradient, v in zip((weight, bias), gradients, speed, strict=True):
            v.mul_(0.9).add_(gradient)
            parameter.sub_(cosine * lr * (gradient + 0.9 * v))
    return weight, bias


def accuracy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Top-k accuracy and mean cross-entropy (m,) of m heads."""
    hits, loss = bias.new_zeros(2, len(bias), dtype=torch.float64)
    for rows, labels in zip(x.split(4096), y.split(4096), strict=True):
        logits = (rows @ weight.flatten(1)).unflatten(1, bias.shape) + bias  # n×m×classes
        hits += (logits.topk(k, dim=2).indices == labels[:, None, None]).any(2).double().sum(0)
        loss -= logits.log_softmax(2)[torch.arange(len(rows)), :, labels].double().sum(0)
    return hits / len(x), loss / len(x)


# ---------------------------------------------------------------------------------------------------- regress


def ridge_regression(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    ridges: tuple[float, ...] = RIDGES,
    seed: int = 0,
) -> dict[str, float]:
    """Ridge regression of targets (N,) on features (N, d): test R2 and mean absolute error, and what was chosen.

    The mean squared error plus `ridge` times the squared norm of the weights is least; the bias is free. The features
    are divided by one number first (`moments`). Of `ridges` the one with the least error on a tenth of the training
    rows, after a fit to the other nine, is taken, and fitted to all of them. In float64.
    """

    def squared_error(heads: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (predictions(x, *heads) - y[:, None]).square().mean(0)  # m

    _, std = moments(train_x)
    train_x, test_x = train_x / std, test_x / std
    train_y, test_y = train_y.double(), test_y.double()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(train_x))).to(train_x.device)
    held_out, rest = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    errors = squared_error(ridge_heads(train_x[rest], train_y[rest], ridges), train_x[held_out], train_y[held_out])
    ridge = ridges[int(errors.argmin())]
    found = predictions(test_x, *ridge_heads(train_x, train_y, (ridge,)))[:, 0]  # M
    left = (found - test_y).square().mean() / test_y.var(correction=0)
    return {"r2": 1 - left.item(), "mae": (found - test_y).abs().mean().item(), "ridge": ridge}


def ridge_heads(x: Tensor, y: Tensor, ridges: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Weights (d, m) and biases (m,), float64, of m heads, one per ridge, of features (n, d) and targets (n,)."""
    x_mean, y_mean = x.mean(0, dtype=torch.float64), y.mean()
    gram, moment = 0.0, 0.0
    for rows, targets in zip(x.split(4096), y.split(4096), strict=True):
        centred = rows.double() - x_mean  # n×d
        gram = gram + centred.T @ centred / len(x)  # d×d
        moment = moment + centred.T @ (targets - y_mean) / len(x)  # d
    values, vectors = torch.linalg.eigh(gram)
    shrunk = (vectors.T @ moment)[:, None] / (values.clamp(min=0)[:, None] + values.new_tensor(ridges))  # d×m
    weight = vectors @ shrunk  # d×m
    return weight, y_mean - x_mean @ weight


def predictions(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(n, m) of m heads."""
    return torch.cat([rows.double() @ weight + bias for rows in x.split(4096)])


# --------------------------------------------------------------------------------------------------- finetune


def finetune(
    net: nn.Module, width: int, train: Data, test: Data, args: Args, judge: Judge, scaler: torch.amp.GradScaler
) -> tuple[dict[str, float], bytes]:
    """Train backbone and classifier on labels: SGD, momentum 0.9, no weight decay, cosine decay to 0, BatchNorm in
    training mode over the whole batch, classifier from N(0, 0.01²). Test top-1 and top-5 (fractions); finetuned.pt.
    """
    device, dtype, autocast = judge.compute
    features(net, train.subset(torch.arange(1)), args, judge)  # finite
    head = nn.Linear(width, len(train.classes))
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    model = sync_batchnorm(nn.Sequential(net, head).to(device, dtype), device)
    rates = (args.lr_backbone, args.lr_head)
    optimizer = torch.optim.SGD([{"params": part.parameters()} for part in model], lr=0.0, momentum=0.9)
    network = distribute(model)
    batch_size = probe_batch_size(args, len(train), least=2)
    steps = args.epochs * (len(train) // batch_size)
    model.train()
    for step, batch in enumerate(
        with_progress(cropped_batches(train, 1, batch_size, steps, args, judge.compute), steps)
    ):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = cosine_schedule(step, steps, 0, peak=rate, final=0.0)
        ((x, _),) = batch
        y = batch.labels[my_rows(batch_size)].to(device)  # n
        with autocast:
            logits = network(normalize(x, args.mean, args.std))  # n×classes
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    logits = judge.features(model, test)  # N×classes, on all ranks, so that all end
    if not logits.isfinite().all():
        abort("the logits of the test images are not finite: training diverged; lower --lr-backbone and --lr-head")
    top = logits.topk(min(5, len(train.classes)), dim=1).indices  # N×5
    hits = top == test.labels.to(device)[:, None]
    classifier = "heads.head." if hasattr(net, "heads") else "fc."  # as torchvision names it
    weights = net.state_dict() | {classifier + name: value for name, value in head.state_dict().items()}
    file = io.BytesIO()
    torch.save({name: value.cpu() for name, value in weights.items()}, file)
    return {"top1": hits[:, 0].double().mean().item(), "top5": hits.any(1).double().mean().item()}, file.getvalue()


def cropped_batches(
    data: Data, views: int, batch_size: int, steps: int, args: Args, compute: Compute
) -> Iterator[Batch]:
    """`steps` batches of random resized crops and flips, so many `views` of each image."""
    crops = [Crop(args.image_size, (args.crop_min_scale, 1.0), "bilinear")] * views
    return batches(data, crops, range(steps), batch_size, args.seed, compute, args.workers)


def probe_batch_size(args: Args, images: int, least: int) -> int:
    """A batch that fits the images, the same for any number of processes; a power of two if none that fits is given.
    Every process takes as many, and not fewer than `least`; 0 for a batch that is not shared.
    """
    world = rank_and_world()[1]
    size = args.batch_size or min(256, max(16, 2 ** int(math.log2(images / 8))))
    size = size if size <= images else 2 ** int(math.log2(images))
    if least and (size % world or size < least * world):
        shares = f"does not divide among {world} processes with {least} or more each"
        refuse(f"a batch of {size} of the {images} images {shares}; change --batch-size or the number of processes")
    return size


# ---------------------------------------------------------------------------------------------------- cluster


def cluster_scores(prediction: Tensor, truth: Tensor) -> dict[str, float]:
    """How well clusters and classes agree, both (N,) numbers that name them; the clusters' may be any.

    acc: the share of images that are in the cluster of their class, with the matching of clusters and classes, one to
    one, that makes it largest; a cluster more than there are classes has none. nmi: their mutual information over the
    mean of their entropies. ari: the share of pairs of images on which both agree, 0 at chance, 1 at most.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    prediction, truth = (np.unique(np.asarray(y), return_inverse=True)[1] for y in (prediction, truth))  # from 0
    counts = np.zeros((prediction.max() + 1, truth.max() + 1), dtype=np.int64)  # clusters×classes
    np.add.at(counts, (prediction, truth), 1)
    matched = counts[linear_sum_assignment(counts, maximize=True)].sum()
    nmi, ari = (float(score(truth, prediction)) for score in (normalized_mutual_info_score, adjusted_rand_score))
    return {"acc": float(matched / len(truth)), "nmi": nmi, "ari": ari}


def kmeans(train_x: Tensor, test_x: Tensor, clusters: int, seed: int) -> np.ndarray:
    """(M,) the nearest of the `clusters` means of normalised features (N, d) to each of (M, d): the best of ten starts,
    by the squared distances of the N. In float64.
    """
    from sklearn.cluster import KMeans

    train_x, test_x = (F.normalize(x.double(), dim=1).cpu().numpy() for x in (train_x, test_x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer distinct features than clusters
        return KMeans(clusters, n_init=10, random_state=seed % 2**32).fit(train_x).predict(test_x)


def read_heads(folder: Path, width: int) -> tuple[Tensor, Tensor] | None:
    """Weight (C, width) and bias (C,) of the cluster head with the lowest loss; None if the run has none."""
    file = folder / "heads.pt"
    if not file.exists():
        return None
    try:
        heads = torch.load(file, map_location="cpu", weights_only=True)
        if not {"heads.weight", "heads.bias", "losses"} <= heads.keys():
            return None
        weight, bias = (heads[name].unflatten(0, (len(heads["losses"]), -1)) for name in ("heads.weight", "heads.bias"))
        best = int(heads["losses"].argmin())
        if weight.shape[2] == width and weight.isfinite().all() and bias.isfinite().all():
            return weight[best], bias[best]
        fault = "they are not finite" if weight.shape[2] == width else f"they are not of {width} features"
    except Exception as error:  # a damaged or foreign file can raise almost anything
        fault = type(error).__name__
    refuse(f"{file} does not hold the heads of this encoder ({fault}); restore it, or judge {folder / 'encoder.pt'}")


# --------------------------------------------------------------------------------------------- looking at them


def tsne_rows(test: Data, args: Args) -> tuple[Tensor, dict[int, str]]:
    """Which test images to show, at most 2000 of `--classes` random classes, and those classes' names."""
    rng = np.random.default_rng(args.seed)
    chosen = np.sort(rng.permutation(len(test.classes))[: args.classes])
    rows = np.flatnonzero(np.isin(test.labels.numpy(), chosen))
    rows = np.sort(rng.permutation(rows)[:2000])
    if len(rows) < 4:
        refuse(f"--protocol tsne needs at least four test images, and these classes have {len(rows)}")
    return torch.from_numpy(rows), {int(label): test.classes[label] for label in chosen}


def draw_tsne(x: Tensor, y: Tensor, shown: dict[int, str], args: Args) -> bytes:
    """A PNG of features x (N, d) of the labels y (N,) that are named in `shown`."""
    import matplotlib
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    rows = F.normalize(x, dim=1).cpu().numpy()
    if np.ptp(rows, axis=0).max() < 1e-6:
        abort(f"the features of {args.weights} are the same for all images: t-SNE has nothing to show")
    state = args.seed % 2**32
    flat = TSNE(perplexity=min(30, len(x) / 4), init="pca", random_state=state).fit_transform(rows)  # N×2
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name is one
        figure = Figure(figsize=(6, 6), layout="constrained")
        axes = figure.subplots()
        for label, name in shown.items():
            axes.scatter(*flat[y.numpy() == label].T, s=8, label=drawable(name))
        axes.set(xticks=[], yticks=[], title=f"t-SNE of {len(x)} test images, {drawable(args.weights)}")
        axes.legend(markerscale=2)
        return png(figure)


def drawable(name: str) -> str:
    """A name as matplotlib can draw it, which leaves out what begins with an underscore."""
    return name.encode(errors="replace").decode()[:60].replace("_", " _" if name.startswith("_") else "_", 1)


def png(figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure.savefig(file, dpi=120)
    return file.getvalue()


def diagnose(train_x: Tensor, test_x: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[dict[str, float], dict[str, list]]:
    """How features fill their space: (numbers, singular values of the centred features of each split).

    For the splits (N, d): standard deviation and effective rank of the normalised features (`embedding_health`);
    covariance, the sum of squared off-diagonal covariances over d (VICReg, eq. 3); correlation, the root mean square of
    the off-diagonal correlations. For two augmented views of the test images, normalised: alignment, the mean squared
    distance of the two, and uniformity, the log of the mean of exp(-2 |x - y|²) over pairs of images.
    """
    numbers, spectra = {}, {}
    for split, x in (("train", train_x), ("test", test_x)):
        mean, covariance = x.mean(0, dtype=torch.float64), 0.0
        for rows in x.split(4096):
            centred = rows.double() - mean  # n×d
            covariance = covariance + centred.T @ centred / (len(x) - 1)  # d×d
        std = covariance.diagonal().sqrt()
        correlation = covariance / (std[:, None] * std).clamp(min=1e-12)
        off_diagonal = ~torch.eye(len(std), dtype=torch.bool, device=x.device)
        numbers |= {f"{split}_{name}": value for name, value in embedding_health(x).items()}
        numbers[f"{split}_covariance"] = (covariance[off_diagonal].square().sum() / len(std)).item()
        numbers[f"{split}_correlation"] = correlation[off_diagonal].square().mean().sqrt().item()
        spectra[split] = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt().flip(0).tolist()
    a, b = (F.normalize(x.double(), dim=1) for x in pair)
    numbers["alignment"] = (a - b).square().sum(1).mean().item()
    numbers["uniformity"] = F.pdist(a[:2048]).square().mul(-2).exp().mean().log().item()
    return numbers, spectra


@torch.no_grad()
def view_pair(net: nn.Module, test: Data, args: Args, judge: Judge) -> tuple[Tensor, Tensor]:
    """Features of two random crops of each test image (the short last batch is left out)."""
    net, batch_size, rows = net.eval(), probe_batch_size(args, len(test), least=1), []
    for batch in cropped_batches(test, 2, batch_size, len(test) // batch_size, args, judge.compute):
        with judge.compute.autocast:
            rows.append([all_gather(net(normalize(x, args.mean, args.std)).float()) for x, _ in batch])
    first, second = (torch.cat(side) for side in zip(*rows, strict=True))
    return first, second


def draw_spectra(spectra: dict[str, list], args: Args) -> dict[str, bytes]:
    """Singular values on a logarithmic scale, diagnose.png, and the numbers, diagnose.json."""
    files = {"diagnose.json": json.dumps({"singular_values": spectra}, allow_nan=False).encode()}
    if not importlib.util.find_spec("matplotlib"):
        warn("the singular values are not drawn without matplotlib: pip install matplotlib")
        return files
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for split, values in spectra.items():
        axes.semilogy(range(1, len(values) + 1), np.maximum(values, 1e-12), label=split)
    axes.set(xlabel="singular value, by size", ylabel="standard deviation along it")
    axes.set_title(f"features of {drawable(args.weights)}", parse_math=False)
    axes.legend()
    return files | {"diagnose.png": png(figure)}


# -------------------------------------------------------------------------------------------------- everything


def label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Sorted indices of `fraction` of the labelled rows: the same share of every class, never fewer than one row."""
    rng, chosen = np.random.default_rng(seed), []
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero()[:, 0].numpy()
        chosen.append(rng.permutation(rows)[: max(1, round(fraction * len(rows)))] if len(rows) else rows)
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def complete(args: Args) -> tuple[Args, dict[str, Tensor]]:
    """Fill what was not given from the run folder that the weights lie in; return the weights too."""
    path = Path(args.weights)
    file = path / "encoder.pt" if os.path.isdir(path) else path
    state = read_weights(file)
    usual = {"image_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "output": str(file.parent)}
    usual["epochs"] = 20 if args.protocol == "finetune" else 100
    # Beside a file that was named itself, another program's args.json may lie.
    flags = file.parent / "args.json"
    run = read_flags(flags, required=file is not path) if flags.exists() else {}
    inherited = ("image_size", "mean", "std", "full_decode") + (
        () if args.dataset or args.data_dir else ("dataset", "data_dir")
    )
    inherited += ("precision",) * (run.get("precision") != "fp16")  # which needs a GPU
    usual |= {name: run[name] for name in inherited if name in run}
    if color_space(state):
        usual |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        if any(args.std):
            refuse(f"{file} splits the colours of images in [0, 1]: leave out --mean and --std")
    if any(args.std):
        del usual["mean"], usual["std"]  # given by hand, where 0 0 0 is a mean
    filled = {name: value for name, value in usual.items() if getattr(args, name) in ("", 0, (0, 0, 0), "auto")}
    args = dataclasses.replace(args, **filled)
    if not args.dataset:
        refuse("a file of weights does not say what to test it on: give --data-dir or --dataset")
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--output {args.output} cannot be made: {error}")
    if not os.access(args.output, os.W_OK):
        refuse(f"the result cannot be kept in {args.output}: give another folder with --output")
    return args, state


def check(args: Args) -> None:
    check_shared(args)
    if not 0 < args.train_fraction <= 1:
        refuse(f"--train-fraction must be above 0 and at most 1, not {args.train_fraction}")
    check_least(args, 1, "k", "classes")
    check_least(args, 1e-4, "temperature")
    check_least(args, 0, "epochs", "batch_size", "train_limit", "seed")
    check_least(args, 0, "lr", "weight_decay", "lr_backbone", "lr_head")
    if args.lr and args.protocol != "linear":
        refuse("--lr belongs to --protocol linear; finetune takes --lr-backbone and --lr-head")
    if args.augment and args.protocol != "linear":
        refuse("--augment belongs to --protocol linear")
    if any(args.mean) and not any(args.std):
        refuse("--mean needs --std")
    if any(args.std) and min(args.std) < 1e-6:
        refuse(f"--std must be at least 1e-6, not {min(args.std)}")
    if args.weight_decay and not args.lr:
        refuse("--weight-decay is chosen on held-out images, like the learning rate; give --lr to set both by hand")
    needs = {"tsne": ["matplotlib", "sklearn"], "cluster": ["sklearn", "scipy"]}.get(args.protocol, [])
    for package in needs:
        if not importlib.util.find_spec(package):
            name = {"sklearn": "scikit-learn"}.get(package, package)
            refuse(f"--protocol {args.protocol} needs {name}: pip install {name}")


def check_images(args: Args, train: int, test: int) -> None:
    """Refuse flags that so many images do not allow."""
    if args.protocol == "knn" and args.k > train:
        refuse(f"--k {args.k} is more than the {train} labelled training images")
    if args.protocol in ("linear", "finetune") and args.batch_size > train:
        refuse(f"--batch-size {args.batch_size} is more than the {train} labelled training images")
    both = args.protocol in ("regress", "diagnose")
    if min(train, test if both else train) < 2 and args.protocol not in ("knn", "tsne"):
        refuse(f"--protocol {args.protocol} needs two images or more; there are {train} to train and {test} to test on")


def keep(record: dict[str, Any], contents: dict[str, bytes], folder: Path) -> None:
    """Print the result, save its files, and append it to results.jsonl, where it names those that were saved.

    Each file is tried whatever became of the others; what failed is said at the end, in one line.
    """
    try:
        say(json.dumps(record, allow_nan=False))
    except ValueError:
        abort(f"a number of the result is not finite: {record}")
    saved, faults = [], []
    for name, content in contents.items():
        try:
            atomic_save(folder / name, content)
            saved.append(name)
        except OSError as error:
            faults.append(f"{folder / name} cannot be saved: {error}")
    try:
        append(folder / "results.jsonl", json.dumps(record | {"files": saved}))
    except OSError as error:
        faults.append(f"the result cannot be kept in {folder / 'results.jsonl'}: {error}")
    if faults:
        abort("; ".join(faults))


def append(file: Path, line: str) -> None:
    """In one write, as others may append at the same time; all of the line or nothing."""
    content = f"{line}\n".encode()
    with open(file, "ab", buffering=0) as handle:
        written = handle.write(content)
        if written < len(content):
            handle.truncate(handle.tell() - written)
            raise OSError("the disk is full")


def describe_weights(state: dict[str, Tensor], name: str, image_size: int = 224) -> tuple[str, str]:
    """(arch, stem) of the ResNet whose state dict this is, read off its shapes; ("vit", "") of a vision transformer."""
    if "conv_proj.weight" in state:
        with torch.device("meta"):
            net, _ = vision_transformer(state, name, image_size)
        if faults := misfits(net, state):
            refuse(f"{name} holds the weights of no vision transformer known here: {faults[0]}")
        return "vit", ""
    space = color_space(state)
    first = f"{COLOR_VIEWS[space][0][0]}.conv1.weight" if space else "conv1.weight"
    stem = "small" if state[first].shape[2:] == (3, 3) else "imagenet"
    faults = {}
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            net, _ = resnet(arch, stem, state)
        faults[arch] = misfits(net, state)
        if not faults[arch]:
            return arch, stem
    nearest = min(faults, key=lambda arch: len(faults[arch]))
    refuse(f"{name} holds the weights of no ResNet known here; it is nearest to {nearest}, but {faults[nearest][0]}")


COLOR_VIEWS = {  # of more/cmc.py: names, and how many channels each has
    "lab": (("l", 1), ("ab", 2)),
    "ycbcr": (("y", 1), ("cbcr", 2)),
    "rgb": (("r", 1), ("g", 1), ("b", 1)),
}


def color_space(state: dict[str, Tensor]) -> str:
    """Whose views the ResNets of more/cmc.py see that this state dict holds; "" of a single ResNet."""
    return next((space for space, views in COLOR_VIEWS.items() if f"{views[0][0]}.conv1.weight" in state), "")


def resnet(arch: str, stem: str, state: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """What has these weights: a ResNet without its classifier, or one for each view; and the width of its features."""
    if space := color_space(state):
        net = ColorViews(arch, stem, space)
        return net, net.width
    norm = "batch" if any(name.endswith("running_mean") for name in state) else "group"  # which keeps no statistics
    return backbone(arch, stem, zero_init=False, norm=norm)


class ColorViews(nn.Module):
    """What more/cmc.py trains: images in [0, 1] are split by their colours, the features are those of all views."""

    def __init__(self, arch: str, stem: str, space: str):
        super().__init__()
        self.space, self.width = space, 0
        for view, channels in COLOR_VIEWS[space]:
            net, width = backbone(arch, stem, zero_init=False)
            old = net.conv1
            net.conv1 = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.add_module(view, net)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        views = split_colors(x, self.space)  # n×channels×s×s each
        return torch.cat([net(view) for net, view in zip(self.children(), views, strict=True)], dim=1)  # n×width


def split_colors(x: Tensor, space: str) -> list[Tensor]:
    """The same as `split` in more/cmc.py, which says more."""
    r, g, b = x.split(1, dim=1)  # n×1×s×s
    if space == "lab":
        r, g, b = (((c + 0.055) / 1.055).pow(2.4).where(c > 0.04045, c / 12.92) for c in (r, g, b))
        fx, fy, fz = (
            t.pow(1 / 3).where(t > (6 / 29) ** 3, t * (29 / 6) ** 2 / 3 + 4 / 29)
            for t in (
                (0.412391 * r + 0.357584 * g + 0.180481 * b) / 0.950456,
                0.212639 * r + 0.715169 * g + 0.072192 * b,
                (0.019331 * r + 0.119195 * g + 0.950532 * b) / 1.089058,
            )
        )
        x = torch.cat([1.16 * fy - 0.16, 5 * (fx - fy), 2 * (fy - fz)], dim=1)
    elif space == "ycbcr":
        y = 0.299 * r + 0.587 * g + 0.114 * b
        x = torch.cat([y, (b - y) / 1.772, (r - y) / 1.402], dim=1)
    return list(x.split([channels for _, channels in COLOR_VIEWS[space]], dim=1))


def vision_transformer(state: dict[str, Tensor], name: str, image_size: int) -> tuple[nn.Module, int]:
    """torchvision's vision transformer whose state dict this is, without its classifier, and its width."""
    try:
        (d, _, patch, _), tokens = state["conv_proj.weight"].shape, state["encoder.pos_embedding"].shape[1]
        hidden = len(state["encoder.layers.encoder_layer_0.mlp.0.weight"])
    except (KeyError, ValueError, IndexError) as error:
        refuse(f"{name} holds the weights of no vision transformer known here: {error}")
    side, blocks = patch * math.isqrt(tokens - 1), sum(key.endswith("ln_1.weight") for key in state)
    if side != image_size:
        refuse(f"{name} is a vision transformer for images of {side} pixels: give --image-size {side}")
    heads = 16 if d == 1280 else d // 64  # shapes do not tell; these are those of all in torchvision
    net = torchvision.models.VisionTransformer(side, patch, blocks, heads, d, hidden)
    net.heads = nn.Identity()
    return net, d


class PatchMean(nn.Module):
    """The mean of the backbone's features over overlapping square patches, CPC's encoder: (n, 3, s, s) -> (n, d).
    `patches` are their side and stride in pixels; what does not fill a patch at the right and bottom is left out.
    """

    def __init__(self, backbone: nn.Module, patches: Tensor):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("patches", patches)  # the names are those of the file that it came from

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.patches.tolist()
        cells = x.unfold(2, size, stride).unfold(3, size, stride)  # n×3×R×C×p×p
        cells = cells.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # n×RC×3×p×p
        return self.backbone(cells.flatten(0, 1)).unflatten(0, cells.shape[:2]).mean(1)  # nRC×d -> n×d


def check_patches(patches: Any, args: Args) -> None:
    """Refuse what is no side and stride of patches, and images that are smaller than one."""
    pair = isinstance(patches, Tensor) and patches.shape == (2,) and patches.dtype == torch.long
    if not pair or patches.is_meta or min(patches.tolist()) < 1:
        refuse(f"{args.weights}: patches must be two whole numbers above 0, their side and stride")
    if patches[0] > args.image_size:
        refuse(f"{args.weights} looks at patches of {patches[0]} pixels: give --image-size {patches[0]} or more")


def main(args: Args) -> dict[str, Any]:
    """Evaluate; return what the JSON line says."""
    check(args)
    args, state = complete(args)
    patches = state.pop("patches", None)
    if patches is not None:
        check_patches(patches, args)
    arch, stem = describe_weights(state, args.weights, args.image_size)
    device = start_processes()
    compute, scaler = compute_in(args.precision, device)
    judge = Judge(args.image_size, args.mean, args.std, compute, args.workers)
    known = "targets" if args.protocol == "regress" else "labels"
    train, test = load_data(args.dataset, args.data_dir, args.train_limit, device, known)
    for data in filter(None, (train, test)):
        data.full_decode = args.full_decode
    if test is None and known == "targets":
        refuse("--protocol regress needs targets for training and test images: those of patterns, or a targets.csv")
    if test is None and args.protocol != "diagnose":
        refuse(f"--data-dir {args.data_dir} needs two or more class folders, the same in val/ or test/, to test on")
    contents: dict[str, bytes] = {}  # of the files to keep
    if test is None:
        test = train  # which needs no labels
    else:
        kinds = train.labels if known == "labels" else -train.targets.isnan().long()  # one class of all with a target
        chosen = label_subset(kinds, args.train_fraction, args.seed)
        train = train.subset(chosen)
        if args.train_fraction < 1:
            data = (Path(args.data_dir).name or args.dataset)[:100]
            name = f"labels-{data}-{args.train_fraction:g}-seed{args.seed}.json"
            contents[name] = json.dumps(chosen.tolist()).encode()
    check_images(args, len(train), len(test))
    if args.protocol == "cluster" and len(train) < len(train.classes):
        refuse(f"--protocol cluster needs an image for each of {len(train.classes)} clusters; there are {len(train)}")
    if known == "targets" and test.targets.min() == test.targets.max():
        refuse("all test images have the same target: there is no variance to explain")
    torch.manual_seed(args.seed)
    if arch == "vit":
        net, width = vision_transformer(state, args.weights, args.image_size)
    else:
        net, width = resnet(arch, stem, state)
    if not args.scratch:
        net.load_state_dict(state)
    if patches is not None:
        net = PatchMean(net, patches)
    net = net.to(device, compute.dtype, memory_format=torch.channels_last)

    record = {"weights": args.weights, "protocol": args.protocol, "dataset": args.dataset, "arch": arch}
    record |= {"train_images": len(train), "test_images": len(test), "classes": len(train.classes), "seed": args.seed}
    rates, decays = ((args.lr,), (args.weight_decay,)) if args.lr else (LEARNING_RATES, WEIGHT_DECAYS)
    if args.protocol == "finetune":
        numbers, contents["finetuned.pt"] = finetune(net, width, train, test, args, judge, scaler)
        record |= numbers
    elif args.protocol == "linear" and args.augment:
        record |= augmented_probe(net, train, test, args, rates, decays, judge)
    elif args.protocol == "tsne":
        rows, shown = tsne_rows(test, args)
        some = test.subset(rows)
        x, y = features(net, some, args, judge), some.labels
        record["shown"] = list(shown.values())
        contents["tsne.png"] = on_rank_0(lambda: draw_tsne(x, y, shown, args))
    elif args.protocol == "cluster":
        heads = None if args.scratch or not os.path.isdir(args.weights) else read_heads(Path(args.weights), width)
        train_x, test_x = (features(net, data, args, judge) for data in (train, test))
        found = on_rank_0(lambda: kmeans(train_x, test_x, len(train.classes), args.seed))
        record |= cluster_scores(found, test.labels)
        if heads is not None:
            found = F.linear(test_x.cpu().double(), *(part.double() for part in heads)).argmax(1)  # M
            record |= {f"heads_{name}": value for name, value in cluster_scores(found, test.labels).items()}
    elif args.protocol == "regress":
        train_x, test_x = (features(net, data, args, judge) for data in (train, test))
        train_y, test_y = train.targets.to(device), test.targets.to(device)
        record |= ridge_regression(train_x, train_y, test_x, test_y, seed=args.seed)
    else:
        train_x, test_x = (features(net, data, args, judge) for data in (train, test))
        train_y, test_y = train.labels.to(device), test.labels.to(device)
        if args.protocol == "knn":
            record |= knn_scores(train_x, train_y, test_x, test_y, args.k, args.temperature)
        elif args.protocol == "linear":
            batch_size = probe_batch_size(args, len(train), least=0)  # all processes train the same classifier
            record |= linear_probe(
                train_x, train_y, test_x, test_y, args.epochs, batch_size, rates, decays, args.seed
            )  # fmt: skip
        else:
            numbers, spectra = diagnose(train_x, test_x, view_pair(net, test, args, judge))
            record |= numbers
            contents |= on_rank_0(lambda: draw_spectra(spectra, args))
    record["flags"] = {k: v for k, v in dataclasses.asdict(args).items() if k not in (*record, "output", "workers")}
    record["files"] = list(contents)
    on_rank_0(lambda: keep(record, contents, Path(args.output)))
    if dist.is_initialized():
        dist.destroy_process_group()
    return record


if __name__ == "__main__":
    main(parse_args(Args))
