"""NNCLR: Nearest-Neighbor Contrastive Learning of visual Representations (Dwibedi, Aytar, Tompson, Sermanet, Zisserman;
ICCV 2021, arXiv 2104.14548).

SimCLR with one change: the positive is another image. The embedding z of one view is replaced by its nearest neighbour
in a support set Q, the embeddings of the last few thousand images; the neighbour has to recognise, among the N images
of the batch, the one it stands in for, by the prediction p that a small network makes from the other view's embedding:

    NN(z, Q) = the row of Q nearest to z                                                                    (eq. 4)
    l(i)     = -log  exp(NN(z_i, Q)·p_i / T)  /  sum over k of exp(NN(z_i, Q)·p_k / T)                      (eq. 3)
    loss     = mean of l over the N images and both directions: NN(z1) with p2, NN(z2) with p1

All are of length 1, so the nearest row is the one with the largest cosine. It is a constant: only p gets a gradient.
Crops and colours make an image differ from itself in a few ways; a neighbour differs in all the ways in which images
of one kind do. So the features depend less on the choice of views: without any but crops they lose little.

The other images in the denominator prevent collapse, as in SimCLR: were all embeddings the same, l would be log N. The
support set is a queue like MoCo's, but one of positives. It begins as noise, which is gone after Q / N steps. At first
a neighbour is seldom of the same kind. But it is near z, a blurred copy of it, so that to predict it is SimCLR's task
made harder; the features that come of this find better neighbours.

What you should see: the loss starts a little above log N (4.85 at N = 128), stays there for three epochs, then falls
to 2.7. `same_class`, how often an embedding and its neighbour have the same label (which nothing but this number uses),
goes from chance, a tenth, to two thirds, and with `python more/nnclr.py` the online kNN from 44 % to 80 %. `accuracy`,
how often the image's own prediction comes first, stays low, for a neighbour knows the kind and not the image. Signs of
trouble: the loss stays at log N; or `same_class` stays at chance while the loss falls.

    python more/nnclr.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

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
    base_lr: float = 2.0
    warmup_epochs: float = 4
    temperature: float = 0.2  # T (the paper: 0.1 on ImageNet)
    support_size: int = 0  # Q, a multiple of the batch size, smaller than the dataset; 0: 8 batches, or what fits
    projector_hidden: int = 512  # width of the projector's two hidden layers: that of ResNet-10's features
    projector_dim: int = 128  # d, width of the embeddings and predictions
    predictor_hidden: int = 512  # width of the predictor's hidden layer
    jitter_strength: float = 0.5  # strength of the colour jitter; 1 for large images


RECIPES = {
    "quick": {},
    # solo-learn's heads, temperature and decay (1000 epochs); its support set of 65536 would outnumber the images, so
    # this is Lightly's. The learning rate is that of simclr.py.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=200, log_every=50, eval_every=10, save_every=10,
        batch_size=256, warmup_epochs=10, base_lr=1.0, weight_decay=1e-5, crop_min_scale=0.08, support_size=8192,
        projector_hidden=2048, projector_dim=256, predictor_hidden=4096,
    ),
    # Section 4 of the paper.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=4096, epochs=1000, warmup_epochs=10, base_lr=0.3, crop_min_scale=0.08, blur=True,
        temperature=0.1, support_size=98304, projector_hidden=2048, projector_dim=256, predictor_hidden=4096,
        jitter_strength=1.0,
    ),
}  # fmt: skip


def check(args: Args, images: int) -> None:
    """Refuse impossible values of this method's flags, and a support set that does not fit the batch or the dataset."""
    check_widths(args, "projector_hidden", "projector_dim", "predictor_hidden")
    check_least(args, 0, "jitter_strength")
    check_least(args, 1e-4, "temperature")
    batch, size = args.batch_size, support_size(args, images)
    if batch >= images:
        refuse(f"--batch-size {batch} leaves no other of the {images} images for the support set; take {images // 2}")
    if size < 1 or size % batch or size >= images:
        fit = max(1, min(size, images - 1) // batch) * batch
        rule = f"must be a multiple of the batch size {batch} and smaller than the {images} training images"
        refuse(f"--support-size {size} {rule}; take {fit}")


def support_size(args: Args, images: int) -> int:
    """Q: `--support-size`, or eight batches, or as many as a small dataset has to spare."""
    return args.support_size or min(8, (images - 1) // args.batch_size) * args.batch_size


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: a random resized crop and flip of its own."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)] * 2


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws. SimCLR's views."""
    strength, hue = 0.8 * args.jitter_strength, 0.2 * args.jitter_strength
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=strength, contrast=strength, saturation=strength, hue=hue, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


# ---------------------------------------------------------------------------------------------------- network


class NNCLR(nn.Module):
    """Backbone, projector and predictor. Both views pass as one batch, so that BatchNorm sees all 2N."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=True)
        hidden, d = args.projector_hidden, args.projector_dim
        self.projector = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, d, bias=False),
            nn.BatchNorm1d(d),
        )
        self.predictor = nn.Sequential(
            nn.Linear(d, args.predictor_hidden, bias=False),
            nn.BatchNorm1d(args.predictor_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(args.predictor_hidden, d),  # no BatchNorm behind it
        )

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = self.backbone(torch.cat([x1, x2]))  # 2n×3×s×s -> 2n×width: what is kept
        z = self.projector(h)  # 2n×d
        p = self.predictor(z)  # 2n×d
        return *p.chunk(2), *z.chunk(2)  # n×d each


class Support(nn.Module):
    """The embeddings of the last images, (Q, d) normalised, the same on every rank; noise until Q images have passed.

    Their labels, (Q,) with -1 for noise and where unknown, are there to be counted, not to learn from.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))  # Q×d
        self.register_buffer("labels", torch.full((size,), -1))  # Q
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # the row that is overwritten next

    @torch.no_grad()
    def push(self, z: Tensor, labels: Tensor) -> None:
        """Put the embeddings of all ranks' images, (N, d) with N <= Q, in the place of the N oldest ones."""
        at = (self.oldest + torch.arange(len(z), device=z.device)) % len(self.rows)  # N, wrapped around
        self.rows[at] = F.normalize(z.to(self.rows.dtype), dim=1)
        self.labels[at] = labels.to(z.device, non_blocking=True)
        self.oldest.copy_((self.oldest + len(z)) % len(self.rows))


# ------------------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def nearest(z: Tensor, support: Tensor) -> Tensor:
    """Eq. 4: (n,) numbers of the rows of support (Q, d) with the largest cosines to z (n, d); of equals, the first.

    In float32 (float64 stays), also under autocast: rounding would choose among near neighbours.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, support = (F.normalize(full_precision(t), dim=1) for t in (z, support))
        return (z @ support.T).argmax(dim=1)  # n×Q -> n


def nnclr_loss(neighbours: Tensor, p: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 3, one direction: neighbours of this rank's embeddings of one view, predictions p of the other, (n, d) each.

    The mean over this rank's n images, each neighbour compared with the predictions of all N, which all get a gradient;
    the neighbours are constants. The mean over ranks is the loss of the global batch. In float32 (float64 stays).
    Terms: the mean cosine of neighbour and own prediction, and how often the own prediction comes first.
    """
    with torch.autocast(p.device.type, enabled=False):
        neighbours, p = (F.normalize(full_precision(t), dim=1) for t in (neighbours.detach(), p))  # n×d
        everyone = all_gather(p)  # N×d
        total = len(everyone)  # N
        own = torch.arange(total, device=p.device)[my_rows(total)]  # n: where this rank's images stand among the N
        logits = neighbours @ everyone.T / temperature  # n×N
        loss = F.cross_entropy(logits, own)  # with the own column as the class, this is eq. 3
        with torch.no_grad():
            positive = temperature * logits.gather(1, own[:, None]).mean()
            accuracy = (logits.argmax(1) == own).to(logits.dtype).mean()
    return loss, {"positive": positive, "accuracy": accuracy}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("nnclr", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args, len(run.train))

    model = run.place(NNCLR(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Neither adapted nor decayed: LARS obeys `adapt`; SGD does not know it, and takes the decay of 0.
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    support = Support(support_size(args, len(run.train)), args.projector_dim).to(run.device, run.dtype)
    run.start(model=model, optimizer=optimizer, support=support)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256
    labelled = bool((run.train.labels >= 0).all())

    for step, batch in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        view1, view2 = batch
        x1 = augment(*view1, args)  # n×3×s×s
        x2 = augment(*view2, args)
        with run.autocast:
            p1, p2, z1, z2 = network(x1, x2)  # n×d each
        nearest1, nearest2 = nearest(z1, support.rows), nearest(z2, support.rows)  # n each
        loss1, terms1 = nnclr_loss(support.rows[nearest1], p2, args.temperature)
        loss2, terms2 = nnclr_loss(support.rows[nearest2], p1, args.temperature)
        loss = (loss1 + loss2) / 2
        terms = {name: (terms1[name] + terms2[name]) / 2 for name in terms1}
        if labelled:
            labels = batch.labels[my_rows(args.batch_size)].to(run.device, non_blocking=True)  # n
            terms["same_class"] = (support.labels[nearest1] == labels).to(loss.dtype).mean()
        support.push(all_gather(z1.detach()), batch.labels)  # after the loss: no embedding is its own neighbour

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        run.report(step + 1, loss, terms, lr, z1)
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file and the paper differ (the authors published no code)
#
# (–: it does not say)  here                                   paper
#
# support set           1024 embeddings in `quick`, a fifth    98,304
#                       of the images (1)
# colour jitter         half as strong for small images        only for ImageNet: of full strength
# biases                none before BatchNorm, which would     –
#                       remove them
# precision             bf16 where fast; the search in float32 –
#
# (1) It has to be smaller than the dataset, or the nearest row would be the image's own embedding of the last epoch.
