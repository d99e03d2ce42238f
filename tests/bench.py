"""How fast the pieces are, beside the usual way of writing them. Run by hand: python tests/bench.py [--device cuda]

    python tests/bench.py                 every row, some twenty minutes on two CPU cores
    python tests/bench.py barlow start    some of them

Every row times the reference and this project's code in the same process, in turns, after a warm-up, synchronised, and
compares the medians; before that it checks that both compute the same, where they should. The references are written
here as papers and official repositories do it: one d×d matrix, one tensor, one image at a time.
"""

import argparse
import copy
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.transforms as T
import torchvision.transforms.v2 as T2
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import barlow
import byol
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


def barlow_by_dxd(z1: Tensor, z2: Tensor) -> Tensor:
    """The paper's pseudo-code, with lambda 0.0051 and the normalisation of its official code."""
    z1, z2 = ((z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + 1e-5) for z in (z1, z2))
    c = z1.T @ z2 / len(z1)
    diagonal = torch.diagonal(c)
    return (diagonal - 1).pow(2).sum() + 0.0051 * (c.pow(2).sum() - diagonal.pow(2).sum())


def vicreg_here(z1: Tensor, z2: Tensor) -> Tensor:
    return vicreg.vicreg_loss(z1, z2)[0]


def barlow_here(z1: Tensor, z2: Tensor) -> Tensor:
    return barlow.barlow_twins_loss(z1, z2)[0]


LOSSES = {"VICReg": (vicreg_by_dxd, vicreg_here), "Barlow Twins": (barlow_by_dxd, barlow_here)}


def bench_loss(name: str, device: torch.device, targets: dict[int, float]) -> None:
    reference, ours = LOSSES[name]
    for n, target in targets.items():
        views = [torch.randn(n, 8192, device=device) for _ in range(2)]
        for a, b in zip(gradients(reference, views), gradients(ours, views), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
        seconds = compare(partial(gradients, reference, views), partial(gradients, ours, views), device)
        row(f"{name} loss, n {n}, d 8192, forward + backward", *seconds, target)


def bench_growth(device: torch.device) -> None:
    """Milliseconds of forward and backward at n = 512 as d grows; the d×d form up to what memory allows."""
    widths = [1024, 2048, 4096, 8192, 16384, 32768]
    print("\n| n 512, ms at d =", *widths, sep=" | ", end=" |\n")
    print("|---" * (len(widths) + 1) + "|")
    for name, (reference, ours) in LOSSES.items():
        for what, loss, most in (("d×d", reference, 8192), ("here", ours, widths[-1])):
            cells = []
            for d in widths:
                views = [torch.randn(512, d, device=device) for _ in range(2)]
                work = partial(gradients, loss, views)
                cells.append(f"{1e3 * compare(work, lambda: None, device)[0]:.3g}" if d <= most else "")
            print(f"| {name}, {what}", *cells, sep=" | ", end=" |\n", flush=True)


def peak_bytes(which: str, n: int, d: int, device: str) -> float:
    """Most memory that one forward and backward pass takes beyond its inputs, measured in a fresh process."""
    line = [sys.executable, __file__, "--peak", which, str(n), str(d), "--device", device]
    return float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


def print_peak(which: str, n: int, d: int, device: torch.device) -> None:
    loss = vicreg_by_dxd if which == "reference" else vicreg_here
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


def usual_views(v, size: int, first: list, last: list) -> list:
    """VICReg's two views in torchvision's transforms `v`: v1 on Pillow images or v2 on tensors."""
    views, tensors = [], bool(first)
    for blur, solarize in ((1.0, 0.0), (0.1, 0.2)):
        jitter = v.RandomApply([v.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        kernel = max(3, size // 10 // 2 * 2 + 1)
        blurred = v.RandomApply([v.GaussianBlur(kernel, (0.1, 2.0))], p=blur)
        crop = v.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC)
        solarized = v.RandomSolarize(0.5 if tensors else 128, p=solarize)
        steps = [crop, v.RandomHorizontalFlip(), jitter, v.RandomGrayscale(0.2), blurred, solarized]
        views.append(v.Compose([*first, *steps, *last, v.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD)]))
    return views


def our_views(data: common.Data, args: vicreg.Args, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    compute, _ = common.compute_in("fp32", device)
    crops, steps = vicreg.crops(args), range(10**6)
    for view1, view2 in common.batches(data, crops, steps, args.batch_size, args.seed, compute, args.workers):
        yield vicreg.augment(*view1, args, 1.0, 0.0), vicreg.augment(*view2, args, 0.1, 0.2)


def bench_views(device: torch.device, target: float) -> None:
    """Two 32-pixel views of 256 images on one core, in images per second."""
    data = common.patterns("train", 256)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in data.pixels]
    pillow = usual_views(T, 32, [], [T.ToTensor()])
    tensor = usual_views(T2, 32, [T2.ToDtype(torch.float32, scale=True)], [])
    args = vicreg.Args(image_size=32, batch_size=256, crop_min_scale=0.08, blur=True)
    data.pixels = data.pixels.to(device)
    views = our_views(data, args, device)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    by_pillow, _ = compare(lambda: [v(p) for v in pillow for p in pictures], lambda: None, device)
    by_tensor, _ = compare(lambda: [v(p) for v in tensor for p in data.pixels.cpu()], lambda: None, device)
    _, seconds = compare(lambda: None, lambda: next(views), device)
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


def bench_average(device: torch.device, target: float) -> None:
    online = torchvision.models.resnet50().to(device)
    looped, ours = copy.deepcopy(online), copy.deepcopy(online)
    with torch.no_grad():
        for p in online.parameters():
            p.add_(0.1)

    @torch.no_grad()
    def loop() -> None:
        for xi, theta in zip(looped.parameters(), online.parameters(), strict=True):
            xi.data = 0.99 * xi.data + (1 - 0.99) * theta.data

    @torch.no_grad()
    def here() -> None:
        byol.update_target(ours, online, 0.99)

    loop(), here()
    for p, q in zip(looped.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    row("moving average of ResNet-50", *compare(loop, here, device), target)


# -------------------------------------------------------------------------------------------------- whole steps


class Pictures(torch.utils.data.Dataset):
    """Pillow images in memory and the usual transforms."""

    def __init__(self, pictures: list[Image.Image]):
        self.pictures, self.views = pictures, usual_views(T, 32, [], [T.ToTensor()])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> list[Tensor]:
        return [view(self.pictures[index]) for view in self.views]


def bench_step(device: torch.device, target: float, target_of_ceiling: float) -> None:
    """ResNet-18 on 32-pixel images, batch 256, expander 2048: seconds for four steps.

    The usual script loads its images once in the training process, with the same threads as here, and once in two
    processes of their own besides.
    """
    half = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
    args = vicreg.Args(
        arch="resnet18", image_size=32, batch_size=256, expander_hidden=2048, expander_dim=2048, blur=True
    )
    args.crop_min_scale = 0.08
    data = common.patterns("train", 2048)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in data.pixels]
    data.pixels = data.pixels.to(device)
    steps, fixed = 4, [torch.randn(256, 3, 32, 32, device=device).to(memory_format=torch.channels_last)] * 2

    def trainer(batches, loss, optimizer_of, layout: torch.memory_format) -> Callable[[], None]:
        model = vicreg.VICReg(args).to(device, memory_format=layout)
        optimizer = optimizer_of(model)

        def some_steps() -> None:
            for x1, x2 in itertools.islice(batches, steps):
                x1, x2 = (x.to(device, non_blocking=True) for x in (x1, x2))
                with half:
                    z1, z2 = model(x1, x2)
                optimizer.zero_grad()
                loss(z1.float(), z2.float()).backward()
                optimizer.step()

        return some_steps

    def lars(model: nn.Module) -> LARS:
        weights, others = ([p for p in model.parameters() if (p.ndim > 1) == w] for w in (True, False))
        return LARS([{"params": weights}, {"params": others, "adapt": False}], lr=0.1, weight_decay=1e-6)

    def looped(model: nn.Module) -> LoopedLARS:
        return LoopedLARS(model.parameters(), lr=0.1, weight_decay=1e-6)

    ours = trainer(our_views(data, args, device), vicreg_here, lars, torch.channels_last)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(
            Pictures(pictures),
            256,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        again = itertools.chain.from_iterable(itertools.repeat(loader))
        usual = trainer(again, vicreg_by_dxd, looped, torch.contiguous_format)
        reference, here = compare(usual, ours, device)
        rates = ", ".join(f"{256 * steps / t:.0f}" for t in (reference, here))
        beside = f" beside {workers} loader processes" if workers else ""
        row(f"four training steps, ResNet-18, batch 256{beside} ({rates} images/s)", reference, here, target)
    ceiling = trainer(itertools.repeat(fixed), vicreg_here, lars, torch.channels_last)
    best, here = compare(ceiling, ours, device)
    row("the same beside forward, backward and update alone on a fixed batch", best, here, target_of_ceiling)


def photographs(folder: Path, count: int) -> None:
    """JPEG files of 500×375 pixels with detail at every scale."""
    random = np.random.default_rng(0)
    (folder / "one").mkdir()
    for i in range(count):
        layers = [
            Image.fromarray(random.integers(0, 256, (3 * 2**k, 4 * 2**k, 3), dtype=np.uint8)).resize((500, 375), 3)
            for k in range(1, 8)
        ]
        weights = 0.6 ** np.arange(7)
        pixels = sum(w * np.asarray(layer, dtype=np.float32) for w, layer in zip(weights, layers, strict=True))
        Image.fromarray((pixels / weights.sum()).astype(np.uint8)).save(folder / "one" / f"{i}.jpg", quality=90)


def bench_folder(device: torch.device, target: float) -> None:
    """Decode, crop and augment two 224-pixel views of photographs with two workers: seconds per 128 images."""
    with tempfile.TemporaryDirectory() as name:
        photographs(Path(name), 128)
        args = vicreg.Args(image_size=224, batch_size=64, crop_min_scale=0.08, blur=True, workers=2)
        files, _, _ = common.list_images(Path(name))
        data = common.Data(None, files, torch.full((len(files),), -1), [])
        views = our_views(data, args, device)
        pillow = usual_views(T, 224, [], [T.ToTensor()])
        folder = torchvision.datasets.ImageFolder(name, lambda image: [view(image) for view in pillow])
        loader = torch.utils.data.DataLoader(folder, 64, shuffle=True, num_workers=2, persistent_workers=True)
        usual = (
            (view.to(device) for view in batch) for batch, _ in itertools.chain.from_iterable(itertools.repeat(loader))
        )

        def two(batches: Iterator) -> None:
            for batch in itertools.islice(batches, 2):
                list(batch)

        seconds = compare(partial(two, usual), partial(two, views), device)
        rates = ", ".join(f"{128 / t:.0f}" for t in seconds)
        row(f"two views of 128 photographs, 2 workers ({rates} images/s)", *seconds, target)
        views.close()


def bench_start(device: torch.device) -> None:
    """Seconds from the command to the first line of a step, less those of `import torch`."""

    def until(line: list[str], sign: str) -> float:
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, *line], stdout=subprocess.PIPE, text=True) as process:
            any(re.search(sign, text) for text in process.stdout)
            seconds = time.perf_counter() - began
            process.kill()
        return seconds

    with tempfile.TemporaryDirectory() as name:
        script = str(Path(vicreg.__file__))
        line = [script, "--log-every", "1", "--run-dir", name, "--overwrite"]
        until(line, r"^ *\d+\.\d +1 ")
        empty = statistics.median(until(["-c", "import torch; print('here', flush=True)"], "here") for _ in range(3))
        whole = statistics.median(until(line, r"^ *\d+\.\d +1 ") for _ in range(3))
    beyond = whole - empty
    print(
        f"| start to first step | {empty:.2f} s for import torch | {whole:.2f} s | {beyond:.2f} s beyond | under 5 s |",
        end="",
    )
    print(f" {'yes' if beyond < 5 else 'NO'} |", flush=True)


def bench_peak(device: torch.device, target: float) -> None:
    peaks = (peak_bytes(which, 256, 8192, device.type) for which in ("reference", "ours"))
    row("VICReg loss, n 256, d 8192, peak extra memory", *peaks, target, "MB")


def bench_peers(device: torch.device) -> None:
    """The seven programs beside the package lightly, which need not be there: see peers.py."""
    try:
        import lightly.loss
        import lightly.transforms  # noqa: F401
    except ImportError as error:
        also = f" ({error})" if error.name and error.name.split(".")[0] != "lightly" else ""  # a part that it needs
        print(f"lightly is not installed: pip install lightly{also}")
        return
    if torch.cuda.is_available() and device.type == "cpu":
        print("peers: the programs take the GPU by themselves; for the CPU, set CUDA_VISIBLE_DEVICES to nothing")
        return
    import peers

    peers.main()


def bench_recipes() -> None:
    """Peak memory of two steps of each method's recipe `imagenet`, at two batch sizes, on a CPU in bf16: what an image
    takes, and what is there without any.
    """
    print("\n| recipe imagenet, CPU, bf16 | MB per image | MB beside |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "images")
        folder.mkdir()
        photographs(folder, 32)
        for method in ("simclr", "moco", "barlow", "vicreg", "byol", "simsiam", "swav"):
            line = [sys.executable, str(Path(__file__).parent.parent / f"{method}.py"), "--recipe", "imagenet"]
            line += ["--data-dir", str(folder), "--precision", "bf16", "--max-steps", "2", "--workers", "0"]
            line += ["--run-dir", str(Path(name, "run")), "--overwrite", *["--queue-size", "32"] * (method == "moco")]
            peaks = []
            for batch_size in (16, 32):
                process = subprocess.Popen([*line, "--batch-size", str(batch_size)], stdout=subprocess.DEVNULL)
                _, status, used = os.wait4(process.pid, 0)
                assert status == 0, (method, batch_size)
                peaks.append(used.ru_maxrss / 1024)  # megabytes
            slope = (peaks[1] - peaks[0]) / 16
            print(f"| {method} | {slope:.0f} | {peaks[0] - 16 * slope:.0f} |", flush=True)


# {name: bench(device, cuda)}, with the ratios to reach.
ROWS: dict[str, Callable[[torch.device, bool], None]] = {
    "vicreg": lambda d, cuda: bench_loss("VICReg", d, {1024: 6.0} if cuda else {256: 25.0, 1024: 6.0, 2048: 3.0}),
    "barlow": lambda d, cuda: bench_loss("Barlow Twins", d, {1024: 4.0} if cuda else {256: 15.0, 1024: 3.5, 2048: 2.0}),
    "memory": lambda d, cuda: bench_peak(d, 8.0),
    "views": lambda d, cuda: bench_views(d, 50.0 if cuda else 4.0),
    "lars": lambda d, cuda: bench_lars(d, 5.0 if cuda else 1.2),
    "average": lambda d, cuda: bench_average(d, 5.0 if cuda else 1.0),
    "step": lambda d, cuda: bench_step(d, 4.0 if cuda else 1.3, 0.95 if cuda else 0.85),
    "folder": lambda d, cuda: bench_folder(d, 1.5 if cuda else 1.3),
    "start": lambda d, cuda: bench_start(d),
    "growth": lambda d, cuda: bench_growth(d),
    "recipes": lambda d, cuda: bench_recipes(),
    "peers": lambda d, cuda: bench_peers(d),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"all, or some of: {', '.join(ROWS)}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peak", nargs=3, metavar=("WHICH", "N", "D"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    device, cuda = torch.device(options.device), options.device == "cuda"
    torch.manual_seed(0)
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]), int(options.peak[2]), device)
        return
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    if set(options.rows or ROWS) - {"growth", "peers", "recipes"}:  # which have tables of their own
        print("| | reference | here | ratio | to reach | target met |\n|---|---|---|---|---|---|")
    for what, bench in ROWS.items():
        if what in (options.rows or ROWS):
            bench(device, cuda)


if __name__ == "__main__":
    main()
