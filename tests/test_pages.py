"""The pages say what is so: flags exist, code runs, figures are those of the runs (and see test_readme.py)."""

import ast
import re
import statistics
from pathlib import Path

import pytest
import results
import torch
from methods import METHODS, MORE, ROOT, module

import common

PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
PROGRAMS = [*METHODS, *MORE, "evaluate"]


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_fill_in(page):
    assert re.findall("@@.*?@@", PAGES[page]) == []


def test_flags_exist():
    ours = {common.flag_of(name) for program in PROGRAMS for name in module(program).Args.__dataclass_fields__}
    ours |= {flag.replace("--", "--no-", 1) for flag in ours}
    others = "--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --max-restarts --index-url --cifar --signal"
    others += " --nodes --ntasks-per-node --gpus-per-node --cpus-per-task --device"  # torchrun, pip, tests, SLURM
    named = {flag for text in PAGES.values() for flag in re.findall(r"(?<![-\w])--[a-z][\w-]*", text)}
    assert named - ours - set(others.split()) == set()


# -------------------------------------------------------------------------------------------------- code


def block(heading: str) -> str:
    """The Python block below a heading of the README."""
    return re.search(rf"^## {heading}\n.*?^```python\n(.*?)^```", README, re.M | re.S)[1]


def test_the_lines_that_use_an_encoder_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, width = common.backbone("resnet10", "imagenet", zero_init=True)
    Path("runs/vicreg").mkdir(parents=True)
    torch.save(net.state_dict(), "runs/vicreg/encoder.pt")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names = {"images": images}
    exec(block("Use the encoder"), names)
    assert names["h"].shape == (2, width) and torch.allclose(names["h"], net.eval()(images), atol=1e-5)


def test_the_example_of_pieces_runs():
    """Each line `# paste from FILE: NAMES` is replaced by what it says."""

    def paste(found: re.Match) -> str:
        text = (ROOT / found[1]).read_text()
        statements = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
        sources = []
        for name in found[2].split(", "):
            sources += [f"@{ast.get_source_segment(text, d)}" for d in statements[name].decorator_list]
            sources.append(ast.get_source_segment(text, statements[name]))
        return "\n".join(sources)

    z1, z2 = torch.rand(2, 8, 4, generator=torch.Generator().manual_seed(0))
    names = {"z1": z1, "z2": z2}
    exec(re.sub(r"# paste from (\S+): (.*)", paste, block("Copy a piece")), names)
    assert torch.equal(names["loss"], module("vicreg").vicreg_loss(z1, z2)[0])


# ----------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("method", METHODS)
def test_the_readmes_figure_is_the_mean_of_the_runs(method):
    (row,) = [line for line in README.splitlines() if line.startswith("| ") and f"[{method}.py]({method}.py)" in line]
    knn = [results.knn(folder)[-1] for folder in results.seeds(method)]
    assert len(knn) > 1 and row.strip("| ").split(" | ")[-1] == f"{statistics.mean(knn):.1f}"
