"""The whole training step of the seven methods, beside that of the package lightly. Run by: python tests/bench.py peers

lightly's side is what its documentation shows for the method ("PyTorch" in its examples), written anew from its public
interface: its transform on Pillow images, torch's DataLoader, its heads and loss, its moving average where the method
has one, plain SGD at 0.06, float32. Its examples use no autocast; hence the ratio is that of float32 on both sides.
This project's side is the program itself, `main`, into a folder of its own; the rate is the one that it logs.

Made alike on both sides: the images (32 pixels, in memory), the batch, the network (torchvision's ResNet with one block
per stage; here with the convolution of common.py), the widths of the heads, and no blur. What remains of each:

- SimSiam's projector has three layers in lightly, so this project's has them, too, and not the two of its default.
- SwAV takes two crops, as by default here, and SGD; lightly's example takes eight crops of large images, and Adam.
- MoCo's queue is as long as here. BatchNorm in groups and shuffled keys are this project's alone, and cost it time.
- This project also logs, watches for collapse, steps LARS, and keeps random numbers per image.
"""

import contextlib
import copy
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import lightly
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss, VICRegLoss
from lightly.models.modules import heads
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    MoCoV2Transform,
    SimCLRTransform,
    SimSiamTransform,
    SwaVTransform,
    VICRegTransform,
)
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import barlow
import byol
import common
import moco
import simclr
import simsiam
import swav
import vicreg

ROUNDS = 3
IMAGES = 512  # few, for this project's programs judge all of them twice, outside the time that counts
LINE = 2560 if torch.cuda.is_available() else 256  # images between two lines of the programs' logs
LINES = 4  # that count, after one that is the warm-up
WARM_UP = 2  # steps of lightly's side: as many batches as a worker has ready
SIZE, WIDTH = 32, 512  # pixels of a view; features of the backbone


class Peer(NamedTuple):
    """A method by lightly: its views, what is trained, and the loss of two batches of views."""

    transform: Callable[[Image.Image], list[Tensor]]
    network: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]


def resnet10() -> nn.Module:
    """What --arch resnet10 is here, in torchvision's own convolutions."""
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    net.fc = nn.Identity()
    return net


def average_of(network: nn.Module) -> nn.Module:
    """The network that follows `network`, without gradient."""
    average = copy.deepcopy(network)
    deactivate_requires_grad(average)
    return average


def byol_views() -> BYOLTransform:
    return BYOLTransform(
        BYOLView1Transform(input_size=SIZE, gaussian_blur=0.0), BYOLView2Transform(input_size=SIZE, gaussian_blur=0.0)
    )


def simclr_by_lightly(args: simclr.Args, device: torch.device) -> Peer:
    head = heads.SimCLRProjectionHead(WIDTH, args.projector_hidden, args.projector_dim)
    network, criterion = nn.Sequential(resnet10(), head).to(device), NTXentLoss()

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        return criterion(network(x1), network(x2))

    return Peer(SimCLRTransform(input_size=SIZE, gaussian_blur=0.0), network, loss)


def vicreg_by_lightly(args: vicreg.Args, device: torch.device) -> Peer:
    head = heads.VICRegProjectionHead(WIDTH, args.expander_hidden, args.expander_dim)
    network, criterion = nn.Sequential(resnet10(), head).to(device), VICRegLoss()

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        return criterion(network(x1), network(x2))

    return Peer(VICRegTransform(input_size=SIZE, gaussian_blur=0.0), network, loss)


def barlow_by_lightly(args: barlow.Args, device: torch.device) -> Peer:
    head = heads.BarlowTwinsProjectionHead(WIDTH, args.projector_hidden, args.projector_dim)
    network, criterion = nn.Sequential(resnet10(), head).to(device), BarlowTwinsLoss()

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        return criterion(network(x1), network(x2))

    return Peer(byol_views(), network, loss)


def byol_by_lightly(args: byol.Args, device: torch.device) -> Peer:
    projector = heads.BYOLProjectionHead(WIDTH, args.projector_hidden, args.projector_dim)
    predictor = heads.BYOLPredictionHead(args.projector_dim, args.predictor_hidden, args.projector_dim).to(device)
    online, criterion = nn.Sequential(resnet10(), projector).to(device), NegativeCosineSimilarity()
    target = average_of(online)

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        update_momentum(online, target, m=0.996)
        p1, z1 = predictor(online(x1)), target(x1)
        p2, z2 = predictor(online(x2)), target(x2)
        return (criterion(p1, z2) + criterion(p2, z1)) / 2

    return Peer(byol_views(), nn.ModuleList([online, predictor]), loss)


def simsiam_by_lightly(args: simsiam.Args, device: torch.device) -> Peer:
    d = args.projector_dim
    network = nn.Sequential(resnet10(), heads.SimSiamProjectionHead(WIDTH, d, d)).to(device)
    predictor, criterion = heads.SimSiamPredictionHead(d, d // 4, d).to(device), NegativeCosineSimilarity()

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = network(x1), network(x2)
        p1, p2 = predictor(z1), predictor(z2)
        return (criterion(p1, z2.detach()) + criterion(p2, z1.detach())) / 2

    return Peer(SimSiamTransform(input_size=SIZE, gaussian_blur=0.0), nn.ModuleList([network, predictor]), loss)


def swav_by_lightly(args: swav.Args, device: torch.device) -> Peer:
    head = heads.SwaVProjectionHead(WIDTH, args.projector_hidden, args.projector_dim)
    network, criterion = nn.Sequential(resnet10(), head).to(device), SwaVLoss()
    prototypes = heads.SwaVPrototypes(args.projector_dim, args.prototypes).to(device)

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        prototypes.normalize()
        scores = [prototypes(nn.functional.normalize(network(x), dim=1)) for x in (x1, x2)]
        return criterion(scores, [])

    views = SwaVTransform(crop_sizes=(SIZE, SIZE), crop_counts=(2, 0), gaussian_blur=0.0)
    return Peer(views, nn.ModuleList([network, prototypes]), loss)


def moco_by_lightly(args: moco.Args, device: torch.device) -> Peer:
    head = heads.MoCoProjectionHead(WIDTH, args.head_hidden or WIDTH, args.head_dim)
    network = nn.Sequential(resnet10(), head).to(device)
    key_network = average_of(network)
    criterion = NTXentLoss(memory_bank_size=(moco.queue_size(args, IMAGES), args.head_dim)).to(device)

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        update_momentum(network, key_network, m=0.99)
        return criterion(network(x1), key_network(x2))

    return Peer(MoCoV2Transform(input_size=SIZE, gaussian_blur=0.0), network, loss)


class Pictures(torch.utils.data.Dataset):
    """Pillow images in memory: (views, label), as torchvision's CIFAR-10 gives them."""

    def __init__(self, pictures: list[Image.Image], transform: Callable[[Image.Image], list[Tensor]]):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.transform(self.pictures[index]), index % 10


def rate_of_lightly(peer: Peer, pictures: list[Image.Image], batch_size: int, workers: int) -> float:
    """Images per second of as many training steps as count on the other side."""
    steps = LINES * LINE // batch_size
    device = next(peer.network.parameters()).device
    images = Pictures(pictures, peer.transform)
    # One long epoch, so that no worker starts anew within the time that counts; and a little longer than that, so that
    # a worker has something to do until its end.
    order = torch.utils.data.RandomSampler(images, num_samples=(WARM_UP + steps + 4) * batch_size)
    loader = torch.utils.data.DataLoader(images, batch_size, sampler=order, drop_last=True, num_workers=workers)
    batches = iter(loader)
    optimizer = torch.optim.SGD(peer.network.parameters(), lr=0.06)
    total = torch.zeros((), device=device)
    for count in (WARM_UP, steps):
        began = time.perf_counter()
        for (x1, x2), _ in itertools.islice(batches, count):
            loss = peer.loss(x1.to(device), x2.to(device)).mean()  # SwaVLoss gives one element, not a scalar
            total += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not total.isfinite():  # waits for a GPU, too
            raise ArithmeticError(f"lightly's loss is {total}")
    return steps * batch_size / (time.perf_counter() - began)


def rate_here(program: ModuleType, flags: list[str], steps: int, precision: str) -> float:
    """Images per second by the log of a run with a line every so many steps, but for the first line."""
    with tempfile.TemporaryDirectory() as name:
        words = [*flags, "--precision", precision, "--run-dir", name]
        words += ["--log-every", str(steps), "--max-steps", str((1 + LINES) * steps)]
        quiet = io.StringIO()
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                program.main(common.parse_args(program.Args, program.RECIPES, words))
        except SystemExit:
            raise RuntimeError(quiet.getvalue()) from None  # what it had to say
        lines = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
        rates = [line["images_per_s"] for line in lines if "images_per_s" in line]
        return statistics.harmonic_mean(rates[1:])  # as many images in each line


# (a program, the same by lightly, flags that make both the same)
PAIRS: list[tuple[ModuleType, Callable[..., Peer], list[str]]] = [
    (simclr, simclr_by_lightly, []),
    (vicreg, vicreg_by_lightly, []),
    (barlow, barlow_by_lightly, []),
    (byol, byol_by_lightly, []),
    (simsiam, simsiam_by_lightly, ["--projector-layers", "3"]),
    (swav, swav_by_lightly, []),
    (moco, moco_by_lightly, []),
]


def main() -> None:
    """Print the table: medians of ROUNDS rounds, in which all four ways take turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as the programs and the examples choose it
    where, threads = torch.cuda.get_device_name() if device.type == "cuda" else "CPU", torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    print(f"\nlightly {lightly.__version__}; {where}, cores for all processes: {cores}, threads: {threads}\n")
    print("| method, batch | lightly, images/s, loader in the process | with one worker beside ", end="")
    print("| here fp32 | here bf16 | ratio fp32 / lightly in process |\n|---|---|---|---|---|---|", flush=True)
    pixels = common.patterns("train", IMAGES).pixels
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    shared = ["--dataset", "patterns", "--train-limit", str(IMAGES), "--image-size", str(SIZE)]
    shared += ["--epochs", "1000", "--eval-every", "1000", "--save-every", "1000"]  # nothing is due before the end
    for program, by_lightly, own in PAIRS:
        args = common.parse_args(program.Args, program.RECIPES, shared + own)
        rounds = []
        for _ in range(ROUNDS):
            there = [rate_of_lightly(by_lightly(args, device), pictures, args.batch_size, n) for n in (0, 1)]
            here = [
                rate_here(program, shared + own, LINE // args.batch_size, precision) for precision in ("fp32", "bf16")
            ]
            rounds.append(there + here)
        inside, beside, fp32, bf16 = (statistics.median(rates) for rates in zip(*rounds, strict=True))
        cells = [f"{inside:.0f}", f"{beside:.0f}", f"{fp32:.0f}", f"{bf16:.0f}", f"{fp32 / inside:.2f} x"]
        print("|", " | ".join([f"{program.__name__}, {args.batch_size}", *cells]), "|", flush=True)
