"""How fast the pieces are, beside the usual way of writing them. Run by hand: python tests/bench.py [--device cuda]

Every row times the reference and this project's code in the same process, in turns, after a warm-up, synchronised, and
compares the medians; before that it checks that both compute the same. The references are written here as papers
and official repositories do it: one d×d matrix, one tensor, one image at a time.
"""

import argparse
import copy
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision.transforms as T
import torchvision.transforms.v2 as T2
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import vicreg
from common import LARS

REPEATS = 5


def timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(reference: Callable[[], object], ours: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Median seconds of both, run in turns so that a busy machine slows both alike."""
    times: list[tuple[float, float]] = [(timed(reference, device), timed(ours, device)) for _ in range(REPEATS + 1)][1:]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def row(what: str, reference: float, ours: float, target: float, unit: str = "ms") -> None:
    ratio, scale = reference / ours, {"ms": 1e3, "MB": 1e-6}[unit]
    cells = [what, f"{reference * scale:.4g} {unit}", f"{ours * scale:.4g} {unit}", f"{ratio:.3g} x", f"{target:g} x"]
    print("|", " | ".join([*cells, "yes" if ratio >= target else "NO"]), "|", flush=True)


# ------------------------------------------------------------------------------------------------------ losses


def covariance_by_dxd(z: Tensor) -> Tensor:
    """The covariance penalty as the paper's pseudo-code has it."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    c = z.T @ z / (n - 1)
    return (c**2).sum() / d - (torch.diagonal(c) ** 2).sum() / d


def vicreg_by_dxd(z1: Tensor, z2: Tensor) -> Tensor:
    invariance = nn.functional.mse_loss(z1, z2)
    variance = sum(torch.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean() for z in (z1, z2)) / 2
    return 25 * invariance + 25 * variance + covariance_by_dxd(z1) + covariance_by_dxd(z2)


def gradients(loss: Callable[[Tensor, Tensor], Tensor], views: list[Tensor]) -> list[Tensor]:
    views = [z.detach().requires_grad_() for z in views]
    loss(*views).backward()
    return [z.grad for z in views]


def bench_loss(device: torch.device, targets: dict[int, float]) -> None:
    def ours(z1: Tensor, z2: Tensor) -> Tensor:
        return vicreg.vicreg_loss(z1, z2)[0]

    for n, target in targets.items():
        views = [torch.randn(n, 8192, device=device) for _ in range(2)]
        for a, b in zip(gradients(vicreg_by_dxd, views), gradients(ours, views), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
        seconds = compare(partial(gradients, vicreg_by_dxd, views), partial(gradients, ours, views), device)
        row(f"VICReg loss, n {n}, d 8192, forward + backward", *seconds, target)


def peak_bytes(which: str, n: int, d: int, device: str) -> float:
    """Most memory that one forward and backward pass takes beyond its inputs, measured in a fresh process."""
    line = [sys.executable, __file__, "--peak", which, str(n), str(d), "--device", device]
    return float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


def print_peak(which: str, n: int, d: int, device: torch.device) -> None:
    loss = vicreg_by_dxd if which == "reference" else lambda a, b: vicreg.vicreg_loss(a, b)[0]
    gradients(loss, [torch.randn(4, 8, device=device) for _ in range(2)])  # what the first call allocates for good
    views = [torch.randn(n, d, device=device) for _ in range(2)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(loss, views)
        print(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far, which importing torch has set
        before = resident("VmRSS")
        gradients(loss, views)
        print(resident("VmHWM") - before)


def resident(which: str) -> int:
    """Bytes of memory in use (VmRSS) or at the peak (VmHWM), from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


# ------------------------------------------------------------------------------------------------------- views


def bench_views(device: torch.device, target: float) -> None:
    """Two 32-pixel views of 256 images on one core, in images per second."""

    def pipeline(v, first: list, last: list, blur: float, solarize: float):
        jitter = v.RandomApply([v.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        blurred = v.RandomApply([v.GaussianBlur(5, (0.1, 2.0))], p=blur)
        crop = v.RandomResizedCrop(32, interpolation=T.InterpolationMode.BICUBIC)
        solarized = v.RandomSolarize(128 if not first else 0.5, p=solarize)
        steps = [crop, v.RandomHorizontalFlip(), jitter, v.RandomGrayscale(0.2), blurred, solarized]
        return v.Compose([*first, *steps, *last, v.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD)])

    data = common.patterns("train", 256)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in data.pixels]
    pillow = [pipeline(T, [], [T.ToTensor()], *view) for view in ((1.0, 0.0), (0.1, 0.2))]
    tensor = [pipeline(T2, [T2.ToDtype(torch.float32, scale=True)], [], *view) for view in ((1.0, 0.0), (0.1, 0.2))]
    args = vicreg.Args(batch_size=256)
    data.pixels = data.pixels.to(device)
    views = common.batches(data, vicreg.crops(args), args, 0, 10**6, device, torch.float32)

    def ours() -> None:
        (x1, x2), (draws1, draws2) = next(views)
        vicreg.augment(x1, draws1, args, 1.0, 0.0), vicreg.augment(x2, draws2, args, 0.1, 0.2)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    by_pillow, _ = compare(lambda: [v(p) for v in pillow for p in pictures], lambda: None, device)
    by_tensor, _ = compare(lambda: [v(p) for v in tensor for p in data.pixels.cpu()], lambda: None, device)
    _, seconds = compare(lambda: None, ours, device)
    torch.set_num_threads(threads)
    rates = ", ".join(f"{256 / t:.0f}" for t in (by_pillow, by_tensor, seconds))
    row(f"two views of 256 images (Pillow, v2, here: {rates} images/s)", min(by_pillow, by_tensor), seconds, target)


# --------------------------------------------------------------------------------------------------- optimizers


class LoopedLARS(torch.optim.Optimizer):
    """LARS one tensor at a time, as the papers' repositories write it."""

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim != 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm, u_norm = torch.norm(p), torch.norm(update)
                    one = torch.ones_like(p_norm)
                    q = torch.where(p_norm > 0, torch.where(u_norm > 0, 0.001 * p_norm / u_norm, one), one)
                    update = update.mul(q)
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(0.9).add_(update)
                p.add_(buffer, alpha=-group["lr"])


def bench_lars(device: torch.device, target: float) -> None:
    model = vicreg.VICReg(vicreg.Args(arch="resnet50", expander_hidden=8192, expander_dim=8192)).to(device)
    twin = copy.deepcopy(model)
    for net in (model, twin):
        generator = torch.Generator(device).manual_seed(0)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator, device=device)
    weights, others = ([p for p in model.parameters() if (p.ndim > 1) == w] for w in (True, False))
    ours = LARS([{"params": weights}, {"params": others, "adapt": False}], lr=0.1, weight_decay=1e-6)
    reference = LoopedLARS(twin.parameters(), lr=0.1, weight_decay=1e-6)
    ours.step(), reference.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    row("LARS step, ResNet-50 and expander", *compare(reference.step, ours.step, device), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peak", nargs=3, metavar=("WHICH", "N", "D"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, cuda = torch.device(options.device), options.device == "cuda"
    torch.manual_seed(0)
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]), int(options.peak[2]), device)
        return
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| | reference | here | ratio | to reach | target met |\n|---|---|---|---|---|---|")
    bench_loss(device, {256: 6.0, 1024: 6.0, 2048: 3.0} if cuda else {256: 25.0, 1024: 6.0, 2048: 3.0})
    peaks = (peak_bytes(which, 256, 8192, options.device) for which in ("reference", "ours"))
    row("VICReg loss, n 256, d 8192, peak extra memory", *peaks, 8.0, "MB")
    bench_views(device, 50.0 if cuda else 4.0)
    bench_lars(device, 5.0 if cuda else 1.2)


if __name__ == "__main__":
    main()
