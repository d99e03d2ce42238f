"""Draws the figures of the pages: `python tests/figures.py curves` or `views`. Needs matplotlib.

`curves` reads the runs kept in docs/results and writes docs/curves.png; `views` shows what the public functions make of
eight images and writes docs/views.png. (The other figures are those of studies.py.)
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import vicreg

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
# Colours that colour-blind readers tell apart (Okabe and Ito).
CURVES = {
    "simclr": ("SimCLR", "#0072B2"),
    "moco": ("MoCo v2", "#56B4E9"),
    "barlow": ("Barlow Twins", "#009E73"),
    "vicreg": ("VICReg", "#000000"),
    "byol": ("BYOL", "#D55E00"),
    "simsiam": ("SimSiam", "#E69F00"),
    "swav": ("SwAV", "#CC79A7"),
}


def knn_curve(run: Path) -> tuple[list[float], list[float]]:
    """Epochs, and the accuracy of the online kNN after each of them in percent, from the log of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = next(record for record in records if "epoch" in record)
    scored = [record for record in records if "knn_top1" in record]
    steps_per_epoch = logged["step"] / logged["epoch"]
    return [r["step"] / steps_per_epoch for r in scored], [100 * r["knn_top1"] for r in scored]


def knn_of_pixels() -> float:
    """The accuracy of the same nearest neighbours on the raw pixels of `patterns`, in percent."""
    train, test = common.patterns("train", 5000), common.patterns("test", 1000)
    train_x, test_x = (data.pixels.flatten(1) / 255 for data in (train, test))
    return 100 * common.knn_accuracy(train_x, train.labels, test_x, test.labels)


def draw_curves(results: Path = RESULTS, file: Path = ROOT / "docs" / "curves.png") -> None:
    """All methods on one axis; beside them, with the same scale, VICReg with its variance term and without."""
    figure, (healthy, collapsed) = plt.subplots(
        1, 2, figsize=(9, 3.8), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    pixels = knn_of_pixels()
    for axes in (healthy, collapsed):
        axes.axhline(pixels, color="0.6", linewidth=1, linestyle=":")
        axes.set(xlabel="epochs", xlim=(0, 13.3), xticks=range(0, 14, 3), ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    curves = {method: knn_curve(results / method) for method in CURVES}
    for method in sorted(curves, key=lambda method: -curves[method][1][-1]):  # the legend in the order of the ends
        name, colour = CURVES[method]
        epochs, accuracy = curves[method]
        healthy.plot(epochs, accuracy, color=colour, marker=".", label=f"{name} {accuracy[-1]:.1f}")
    healthy.text(0.2, pixels - 1.5, f"raw pixels {pixels:.1f}", color="0.4", fontsize=8, va="top")
    healthy.set(ylabel="nearest neighbours, % right", title="seven methods, ten kinds of texture")
    healthy.legend(loc="lower right", frameon=False, fontsize=8, ncols=2)
    name, colour = CURVES["vicreg"]
    collapsed.plot(*curves["vicreg"], color=colour, marker=".", label=name)
    collapsed.plot(
        *knn_curve(results / "vicreg-collapsed"), color="#CC0000", marker="x", label="without its variance term"
    )
    collapsed.set(title="a collapse")
    collapsed.legend(loc="upper left", bbox_to_anchor=(0.3, 0.68), frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_views() -> None:
    """Eight images of patterns, and the two views of each before normalisation."""
    args = vicreg.Args(image_size=32, batch_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    data = common.patterns("train", 8)
    compute, _ = common.compute_in("fp32", torch.device("cpu"))
    (batch,) = common.batches(data, vicreg.crops(args), range(1), args.batch_size, args.seed, compute)
    view1, view2 = batch
    rows = [data.pixels[batch.index] / 255]
    rows += [vicreg.augment(*view1, args, 1.0, 0.0), vicreg.augment(*view2, args, 0.1, 0.2)]
    figure, axes = plt.subplots(3, 8, figsize=(8, 3.2))
    for axis_row, row, name in zip(axes, rows, ("image", "view 1", "view 2"), strict=True):
        for axis, image in zip(axis_row, row, strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1))
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(name)
    figure.tight_layout(pad=0.3)
    figure.savefig(ROOT / "docs" / "views.png", dpi=130)


FIGURES = {"curves": draw_curves, "views": draw_views}

if __name__ == "__main__":
    for figure in sys.argv[1:] or FIGURES:
        FIGURES[figure]()
