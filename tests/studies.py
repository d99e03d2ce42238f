"""The studies of docs/studies.md: takes the runs that are not there yet, judges the encoders, prints tables, draws.

    python tests/studies.py                        all of them, an hour on two cores
    python tests/studies.py crops views            some of them
    python tests/studies.py transfer --cifar DIR   this one needs CIFAR-10 as a folder of images

Every run is a command that a reader could type; it is printed, and kept under runs/studies. The figures need
matplotlib.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import vicreg

ROOT = Path(__file__).parent.parent
SHORT = "--epochs 4 --warmup-epochs 1"
LONG = "--epochs 15 --warmup-epochs 7"
PROBE = ("--epochs", "30")  # of the linear classifier
ONLY_CROPS = "--no-color-jitter --no-grayscale --no-solarize"

# {study: {label: command}}; a command in two studies is run once.
STUDIES = {
    "batch": {f"batch {n}": f"vicreg.py {SHORT} --batch-size {n}" for n in (128, 256, 512)},
    "collapse": {
        "VICReg": f"vicreg.py {LONG}",
        "without variance": f"vicreg.py {LONG} --std-coeff 0",
    },
    "transfer": {
        "from scratch": f"vicreg.py {SHORT} --data-dir CIFAR --train-limit 5000",
        "from the encoder of patterns": f"vicreg.py {SHORT} --data-dir CIFAR --train-limit 5000 --init VICREG",
    },
    "crops": {f"at least {s}": f"vicreg.py {SHORT} --crop-min-scale {s}" for s in (0.08, 0.2, 0.5, 0.7)},
    "views": {
        "all": f"vicreg.py {SHORT}",
        "with blur": f"vicreg.py {SHORT} --blur",
        "without colour jitter": f"vicreg.py {SHORT} --no-color-jitter",
        "only crop and flip": f"vicreg.py {SHORT} {ONLY_CROPS}",
    },
    "covariance": {
        "5000 images": f"vicreg.py {SHORT} --eval-every 1",
        "512 images": "vicreg.py --epochs 40 --warmup-epochs 10 --train-limit 512 --eval-every 8",
    },
    "regularisers": {
        f"{name}{what}{how}": f"{script} --epochs 4 {switch}{coefficients}".strip()
        for name, script, what, switch in (
            ("BYOL", "byol.py", "", ""),
            ("BYOL", "byol.py", " without predictor", "--no-predictor "),
            ("SimSiam", "simsiam.py", "", ""),
            ("SimSiam", "simsiam.py", " without stop-gradient", "--no-stop-gradient "),
        )
        for how, coefficients in (("", ""), (", regularised", "--std-coeff 1 --cov-coeff 0.01"))
    },
    "branches": {
        "shared weights": f"vicreg.py {SHORT}",
        "two networks": f"vicreg.py {SHORT} --no-shared-weights",
        "two architectures": f"vicreg.py {SHORT} --arch2 resnet18",
    },
}


def run(command: str, cifar: str) -> Path:
    """The run folder of a command, after running it if it was not run to its end."""
    folder = folder_of(command)
    if not (folder / "done").exists():
        frozen = str(folder_of(STUDIES["collapse"]["VICReg"]))
        start(command.replace("CIFAR", cifar).replace("VICREG", frozen), folder)
        (folder / "done").touch()
    return folder


def run_in_stages(command: str) -> Path:
    """The same for VICReg, but the run stops every --eval-every epochs, and is then looked at: see terms.jsonl.

    A run stops where --max-steps says, and the same command with more of them continues it.
    """
    folder = folder_of(command)
    args = common.parse_args(vicreg.Args, vicreg.RECIPES, shlex.split(command)[1:])
    train, _ = common.load_data(args.dataset, args.data_dir, args.train_limit, torch.device("cpu"))
    epoch = len(train) // common.fit_batch_size(args, len(train))  # steps
    last = args.epochs * epoch
    seen = [record["step"] for record in lines(folder / "terms.jsonl")]
    for step in (*range(args.eval_every * epoch, last, args.eval_every * epoch), last):
        if step not in seen:
            start(f"{command} --max-steps {step}", folder)
            with open(folder / "terms.jsonl", "a") as file:
                print(json.dumps({"step": step, **frozen_terms(folder)}), file=file)
    return folder


def start(command: str, folder: Path) -> None:
    line = [*shlex.split(command), "--run-dir", str(folder)]
    print("$ python", *line, flush=True)
    subprocess.run([sys.executable, *line], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@torch.no_grad()
def frozen_terms(folder: Path) -> dict[str, float]:
    """VICReg's terms on views of the test images (`val_covariance`, ...) and of as many training images
    (`train_covariance`, ...), means over batches. The network is the one in the run folder, in eval mode: BatchNorm
    uses its running statistics. Every call takes the same images and views.
    """
    flags = json.loads((folder / "args.json").read_text())
    args = vicreg.Args(**{name: value for name, value in flags.items() if name != "method"})
    model = vicreg.VICReg(args).eval()
    encoder, heads = (torch.load(folder / name) for name in ("encoder.pt", "heads.pt"))
    model.load_state_dict({f"backbone.{name}": weight for name, weight in encoder.items()} | heads)
    compute, _ = common.compute_in("fp32", torch.device("cpu"))
    train, test = common.load_data(args.dataset, args.data_dir, args.train_limit, compute.device)
    steps, means = range(len(test) // args.batch_size), {}
    for split, data in (("train", train), ("val", test)):
        rows = []
        for view1, view2 in common.batches(data, vicreg.crops(args), steps, args.batch_size, args.seed, compute):
            x1 = vicreg.augment(*view1, args, blur=1.0, solarization=0.0)
            x2 = vicreg.augment(*view2, args, blur=0.1, solarization=0.2)
            _, terms = vicreg.vicreg_loss(*model(x1, x2))
            rows.append(terms)
        means |= {f"{split}_{name}": torch.stack([row[name] for row in rows]).mean().item() for name in terms}
    return means


def folder_of(command: str) -> Path:
    return ROOT / "runs" / "studies" / folder_name(command)


def folder_name(command: str) -> str:
    return "_".join(part.strip("-") for part in command.split())


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def judge(folder: Path, protocol: str, *flags: str) -> dict:
    """What `evaluate.py` finds, from the results kept in the run folder or anew."""
    output = folder / "-".join(["eval", protocol, *(Path(f).name.strip("-") for f in flags)])
    if not lines(output / "results.jsonl"):
        line = ["evaluate.py", str(folder.relative_to(ROOT)), "--protocol", protocol, *flags, "--output", str(output)]
        subprocess.run([sys.executable, *line], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return lines(output / "results.jsonl")[-1]


def curve(folder: Path, name: str, file: str = "metrics.jsonl") -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    records = [record for record in lines(folder / file) if name in record]
    return [record["step"] for record in records], [record[name] for record in records]


def draw_collapse(folders: dict[str, Path]) -> None:
    """Spread of the embeddings and nearest-neighbour accuracy over each run; t-SNE of the first two."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for label, folder in folders.items():
        left.plot(*curve(folder, "embedding_std"), label=label)
        steps, scores = curve(folder, "knn_top1")
        right.plot(steps, [100 * score for score in scores], "o-", label=label)
    left.axhline(width(next(iter(folders.values()))) ** -0.5, color="grey", linestyle=":", label="isotropic")
    left.set(xlabel="step", ylabel="std of normalised embeddings", ylim=(0, None))
    right.set(xlabel="step", ylabel="kNN top-1, %", ylim=(0, 100))
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.savefig(ROOT / "docs" / "collapse.png", dpi=130)
    for name, folder in zip(("healthy", "collapsed"), folders.values(), strict=False):
        judge(folder, "tsne")
        shutil.copy(folder / "eval-tsne" / "tsne.png", ROOT / "docs" / f"tsne-{name}.png")


def draw_covariance(folders: dict[str, Path]) -> None:
    """The covariance term on training and on held-out images over each run."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(folders), figsize=(8, 2.8), sharey=True, layout="constrained")
    for axis, (label, folder) in zip(axes, folders.items(), strict=True):
        for split, name in (("train", "training images"), ("val", "held-out images")):
            axis.plot(*curve(folder, f"{split}_covariance", "terms.jsonl"), "o-", label=name)
        axis.set(title=label, xlabel="step", yscale="log")
    axes[0].set_ylabel("covariance term")
    axes[0].legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "covariance.png", dpi=130)


def report(study: str, cifar: str) -> None:
    commands = STUDIES[study].items()
    if study == "covariance":
        folders = {label: run_in_stages(command) for label, command in commands}
    else:
        folders = {label: run(command, cifar) for label, command in commands}
    limit = ("--train-limit", "5000") if study == "transfer" else ()  # as many labels as patterns has
    print(f"\n| {study} | untrained kNN | kNN | linear | spread of z, 1 if isotropic |\n|---|---|---|---|---|")
    for label, folder in folders.items():
        knn, std = (curve(folder, name)[1] for name in ("knn_top1", "embedding_std"))
        linear, spread = judge(folder, "linear", *PROBE, *limit)["top1"], std[-1] * width(folder) ** 0.5
        print(f"| {label} | {100 * knn[0]:.1f} | {100 * knn[-1]:.1f} | {100 * linear:.1f} | {spread:.2f} |")
    if study == "transfer":
        frozen, where = run(STUDIES["collapse"]["VICReg"], cifar), ("--data-dir", cifar, "--train-limit", "5000")
        for label, flags in (("frozen encoder of patterns", where), ("random weights", (*where, "--scratch"))):
            knn, linear = (judge(frozen, *protocol, *flags)["top1"] for protocol in (("knn",), ("linear", *PROBE)))
            print(f"| {label} | | {100 * knn:.1f} | {100 * linear:.1f} | |")
    if study == "collapse":
        draw_collapse(folders)
    if study == "covariance":
        draw_covariance(folders)
        for label, folder in folders.items():
            train, val = (lines(folder / "terms.jsonl")[-1][f"{split}_covariance"] for split in ("train", "val"))
            print(f"{label}: covariance term {train:.2f} on training images, {val:.2f} on held-out ones")


def width(folder: Path) -> int:
    """Dimensions of the embeddings z whose spread the run logs."""
    args = json.loads((folder / "args.json").read_text())
    return args.get("expander_dim") or args["projector_dim"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=list(STUDIES), metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--cifar", default="cifar10", help="folder of CIFAR-10 images with train/ and test/")
    args = parser.parse_args()
    for study in args.studies:
        report(study, args.cifar)
