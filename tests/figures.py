"""Draws docs/views.png with the public functions. Needs matplotlib. (The other figures are those of studies.py.)"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import vicreg

ROOT = Path(__file__).parent.parent


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


if __name__ == "__main__":
    draw_views()
