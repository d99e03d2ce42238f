"""What a frozen encoder is worth: one protocol for every method and every file of weights.

    python evaluate.py runs/vicreg                                    weighted nearest neighbours
    python evaluate.py runs/vicreg --protocol linear                  linear classifier
    python evaluate.py encoder.pt --protocol linear --dataset folder --data-dir photos --image-size 224

The features are h, the pooled output of the backbone, computed once in eval mode without augmentation; projectors and
other heads are left aside. A run folder brings its own dataset, image size and normalisation; a bare file of weights
needs them as flags. The architecture is read off the weights.

    knn     every test image takes the class with the largest sum of exp(cosine / temperature) over its k nearest
            training images (Wu et al. 2018)
    linear  softmax regression by SGD on the training features; learning rate and weight decay are chosen on a tenth of
            the training images held out, never on the test images, then the classifier is trained on all of them

The last line printed is one JSON object. Accuracies are fractions.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    backbone,
    check_precision,
    describe_weights,
    fail,
    features,
    knn_accuracy,
    knn_scores,
    load_data,
    parse_args,
    precision_of,
    rank_and_world,
    read_weights,
    start_processes,
)

__all__ = ["knn_accuracy", "linear_probe", "main"]


@dataclass
class Args:
    weights: str  # a run folder, or a file of weights such as encoder.pt
    protocol: Literal["knn", "linear"] = "knn"  # how to judge the features
    dataset: Literal["", "patterns", "cifar10", "cifar100", "stl10", "folder"] = ""  # default: the run's
    data_dir: str = ""  # default: the run's
    image_size: int = 0  # side of the images in pixels; 0: the run's, or 224
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the channels; all 0: the run's, or ImageNet's
    std: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the channels; all 0: the run's, or ImageNet's
    train_fraction: float = 1.0  # share of the labelled training images to learn from, the same in every class
    train_limit: int = 0  # use so many training images, chosen at random; 0: all
    k: int = 20  # neighbours
    temperature: float = 0.07  # of the neighbours' votes
    epochs: int = 100  # of the linear classifier
    batch_size: int = 256  # of the linear classifier
    seed: int = 0  # of the label subset, the held-out images and the order
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"  # of the features
    workers: int = 2  # for images that do not fit in memory


LEARNING_RATES = (
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
    30.0,
)  # papers use 0.02 to 30, as their features differ in scale
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3)


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
    momentum 0.9, cosine decay to 0, weights and bias from 0.
    """
    classes = int(max(train_y.max(), test_y.max())) + 1
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(train_x))).to(train_x.device)
    held_out, rest = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    grid = [(lr, decay) for lr in learning_rates for decay in weight_decays]
    heads = train_heads(train_x[rest], train_y[rest], classes, grid, epochs, batch_size, seed)
    scores = accuracy(train_x[held_out], train_y[held_out], *heads)  # one per head
    best = grid[int(scores.argmax())]
    weight, bias = train_heads(train_x, train_y, classes, [best], epochs, batch_size, seed)
    return {
        "top1": accuracy(test_x, test_y, weight, bias).item(),
        "top5": accuracy(test_x, test_y, weight, bias, k=min(5, classes)).item(),
        "lr": best[0],
        "weight_decay": best[1],
        "held_out_top1": scores.max().item(),
    }


def train_heads(
    x: Tensor, y: Tensor, classes: int, grid: list[tuple[float, float]], epochs: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Weights (d, m, classes) and biases (m, classes) of m heads, one per (learning rate, weight decay)."""
    lr, decay = torch.tensor(grid, device=x.device, dtype=x.dtype).T[:, :, None]  # m×1 each
    weight = torch.zeros(x.shape[1], len(grid), classes, device=x.device, dtype=x.dtype)
    bias = torch.zeros(len(grid), classes, device=x.device, dtype=x.dtype)
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    rng, batches = np.random.default_rng(seed), max(1, len(x) // batch_size)
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(len(x))).to(x.device)
        for batch, rows in enumerate(order.tensor_split(batches)):
            cosine = 0.5 * (1 + np.cos(np.pi * (epoch * batches + batch) / (epochs * batches)))
            logits = (x[rows] @ weight.flatten(1)).unflatten(1, bias.shape) + bias  # n×m×classes
            # The gradient of the mean cross-entropy: probabilities minus the one-hot label.
            error = logits.softmax(2)
            error[torch.arange(len(rows)), :, y[rows]] -= 1
            error /= len(rows)
            gradients = [(x[rows].T @ error.flatten(1)).view_as(weight) + decay * weight, error.sum(0)]
            for parameter, gradient, v in zip((weight, bias), gradients, speed, strict=True):
                v.mul_(0.9).add_(gradient)
                parameter.sub_(cosine * lr * (gradient + 0.9 * v))
    return weight, bias


def accuracy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, k: int = 1) -> Tensor:
    """(m,) top-k accuracies of m heads."""
    hits = torch.zeros(len(bias), device=x.device, dtype=torch.float64)
    for rows, labels in zip(x.split(4096), y.split(4096), strict=True):
        logits = (rows @ weight.flatten(1)).unflatten(1, bias.shape) + bias  # n×m×classes
        hits += (logits.topk(k, dim=2).indices == labels[:, None, None]).any(2).double().sum(0)
    return hits / len(x)


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
    file = path / "encoder.pt" if path.is_dir() else path
    state = read_weights(file)
    usual = {"image_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if (file.parent / "args.json").exists():
        run = json.loads((file.parent / "args.json").read_text())
        usual = {name: run[name] for name in ("image_size", "mean", "std")}
        if not (args.dataset or args.data_dir):
            usual |= {name: run[name] for name in ("dataset", "data_dir", "train_limit")}
    filled = {name: value for name, value in usual.items() if getattr(args, name) in ("", 0, (0, 0, 0))}
    args = dataclasses.replace(args, **filled)
    if not args.dataset:
        fail("a file of weights does not say what to test it on: give --data-dir or --dataset")
    return args, state


def check(args: Args) -> None:
    if not 0 < args.train_fraction <= 1:
        fail(f"--train-fraction must be above 0 and at most 1, not {args.train_fraction}")
    for name in ("k", "epochs", "batch_size", "temperature"):
        if getattr(args, name) <= 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    check_precision(args)


def main(args: Args) -> dict[str, float | str]:
    """Evaluate; return what the JSON line says."""
    check(args)
    args, state = complete(args)
    device = start_processes()
    dtype, autocast, _ = precision_of(args, device)
    train, test = load_data(args, device)
    if test is None:
        fail(f"--data-dir {args.data_dir} has no labelled val/ or test/ folder to test on")
    train = train.subset(label_subset(train.labels, args.train_fraction, args.seed))
    arch, stem = describe_weights(state, args.weights)
    net, _ = backbone(arch, stem, zero_init=False)
    net.load_state_dict(state)
    net = net.to(device, dtype, memory_format=torch.channels_last)

    train_x, test_x = (features(net, data, args, device, dtype, autocast) for data in (train, test))
    train_y, test_y = train.labels.to(device), test.labels.to(device)
    if args.protocol == "knn":
        if args.k > len(train):
            fail(f"--k {args.k} is more than the {len(train)} labelled training images")
        result = knn_scores(train_x, train_y, test_x, test_y, args.k, args.temperature)
    else:
        result = linear_probe(
            train_x, train_y, test_x, test_y, epochs=args.epochs, batch_size=args.batch_size, seed=args.seed
        )
    record = {"weights": args.weights, "protocol": args.protocol, "dataset": args.dataset, "arch": arch, **result}
    record |= {"train_images": len(train), "test_images": len(test), "classes": len(train.classes)}
    if rank_and_world()[0] == 0:
        print(json.dumps(record), flush=True)
    return record


if __name__ == "__main__":
    main(parse_args(Args))
