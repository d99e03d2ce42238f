"""RotNet: Unsupervised Representation Learning by Predicting Image Rotations (Gidaris, Singh, Komodakis; ICLR 2018,
arXiv 1803.07728).

Every image is turned by 0, 90, 180 and 270 degrees, g(X|y) with y = 0, 1, 2, 3, and the network has to say by how much:

    F(g(X|y)) = 4 logits, one for each rotation
    l(X)      = mean over y of  -log softmax(F(g(X|y)))_y                                                  (eq. 2, 3)
    loss      = mean of l over the N images

The label comes with the task, so nothing is compared: there is one view, and neither projector nor negatives. To tell
how a picture was turned, one has to find out what it shows, and which side of that is usually up. Turns of 90 degrees
only move pixels; any other angle would leave traces of resampling that give it away. All four rotations of an image go
into one batch, which the paper found much better than one at random.

A constant output cannot win: its loss is log 4. What can go wrong is a shortcut, a mark of "up" that has nothing to do
with what is shown: a border, the blocks of a JPEG, a lens that darkens the corners. Crop and flip come first: a flip
after the rotation would make 90 and 270 degrees the same.

The last layers of the network serve this task alone: in the paper, a probe of the second of four blocks is the best,
and one of the last far behind. The kNN here judges the last.

What you should see: the loss starts near log 4 = 1.39 and falls slowly, to 1.2. The images of `patterns` have no up:
their angle is random, so nobody can tell 0 from 180 degrees, nor 90 from 270, and the loss stays above log 2 = 0.69.
But they are sheared along x, and so change faster along y, which tells 0 from 90. That is read off the texture, so the
texture is what the network learns: `accuracy` only goes from 0.25 to 0.36, but with `python more/rotnet.py` the online
kNN from 53 % to 71 %. On photographs both go much further. Signs of trouble: the loss stays at log 4; or `accuracy`
comes to 1 within an epoch, which is a shortcut.

    python more/rotnet.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
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
    Draws,
    Flags,
    Run,
    backbone,
    color_jitter,
    distribute,
    full_precision,
    grayscale,
    normalize,
    parse_args,
    random_blur,
)


@dataclass
class Args(Flags):
    epochs: int = 4
    base_lr: float = 0.1
    optimizer: Literal["lars", "larc", "sgd"] = "sgd"
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.5
    eval_every: int = 2  # epochs between online kNN evaluations
    color_jitter: bool = False  # brightness, contrast, saturation, hue; not part of the paper's views
    grayscale: bool = False  # drop the colour; not part of the paper's views


RECIPES = {
    "quick": {},
    # The official code, which divides the learning rate by five three times, for ResNet-18 in place of its own network.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=200, log_every=50, eval_every=10, save_every=10,
        warmup_epochs=0, base_lr=0.2,
    ),
    # VISSL's RotNet with ResNet-50, where a step decays the learning rate; the paper has AlexNet.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=256, epochs=105, warmup_epochs=0, base_lr=0.1, weight_decay=1e-4, crop_min_scale=0.08,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of the only view, made where the image is decoded: a random resized crop and flip."""
    return [Crop(args.image_size, (args.crop_min_scale, 1.0), "bilinear", flip=0.5 * args.flip)]


def augment(x: Tensor, draws: Draws, args: Args) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws."""
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=0.5)
    return normalize(x, args.mean, args.std)


def rotations(x: Tensor) -> Tensor:
    """g(X|y): square images (n, c, s, s) -> (4n, c, s, s), each turned counter-clockwise by 0, 90, 180, 270 degrees.

    Image by image, so the labels y are 0 1 2 3 0 1 2 3 and so on. Pixels move, and none is resampled.
    """
    return torch.stack([x.rot90(y, (2, 3)) for y in range(4)], dim=1).flatten(0, 1)  # n×4×c×s×s -> 4n×c×s×s


# ---------------------------------------------------------------------------------------------------- network


class RotNet(nn.Module):
    """Backbone and a linear classifier. BatchNorm sees all four rotations of all images."""

    def __init__(self, args: Args):
        super().__init__()
        self.backbone, width = backbone(args.arch, args.stem, zero_init=False)
        self.classifier = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.backbone(x)  # 4n×3×s×s -> 4n×width: what is kept
        logits = self.classifier(h)  # 4n×4
        return logits, h


# ------------------------------------------------------------------------------------------------------- loss


def rotation_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy (eq. 3) of this rank's logits (m, 4) with the rotations `labels` (m,), 0 to 3; a mean over rows.

    The mean over ranks is the loss of the global batch: nothing is gathered. In float32 (float64 stays). Terms: how
    often the right rotation has the largest logit.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = full_precision(logits)  # m×4
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).to(logits.dtype).mean()
    return loss, {"accuracy": accuracy}


# --------------------------------------------------------------------------------------------------- training


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("rotnet", args, RECIPES)  # processes, device, images, seed
    args = run.args

    model = run.place(RotNet(args))  # on the device; --init; BatchNorm over the images of all processes
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Neither adapted nor decayed: LARS obeys `adapt`; SGD does not know it, and takes the decay of 0.
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    make = {"lars": LARS, "larc": LARC, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=model, optimizer=optimizer)  # from a checkpoint, if there is one
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256

    for step, (view,) in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x = rotations(augment(*view, args))  # n×3×s×s -> 4n×3×s×s; the four of an image share its colours
        labels = torch.arange(len(x), device=run.device) % 4  # 4n
        with run.autocast:
            logits, h = network(x)  # 4n×4 and 4n×width
        loss, terms = rotation_loss(logits, labels)

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        run.report(step + 1, loss, terms, lr, h)
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                   paper      official code
#
# network               a ResNet                               NIN, and   the same, with BatchNorm
#                                                              AlexNet
# learning rate         a cosine at every step                 in steps   divided by 5 three times; ImageNet: by 10
# momentum              plain                                  plain      Nesterov's
# weight decay          not on biases and BatchNorm            on all     on all
# crop                  of 0.2 of the area or more             –          CIFAR: 32 pixels of the image in a border of 4
# initial weights       those of torchvision and PyTorch       –          normal, by the fan-out
# precision             bf16 where fast                        –          float32, as --precision fp32
#
# Elsewhere: VISSL draws one rotation for each image, and crops and flips afterwards.
