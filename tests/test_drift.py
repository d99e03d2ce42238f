"""The diff between two method files is the lesson: what they share is the same to the letter, the rest is the method.

`python tests/test_drift.py` copies the shared regions of simclr.py into the other files.
"""

import ast
import dataclasses
import difflib
import importlib
import re
import sys
from pathlib import Path

import pytest
from methods import METHODS

ROOT = Path(__file__).parent.parent
REGIONS = ["args", "setup", "model", "optimizer", "resume", "backward", "step", "report"]
REGION = re.compile(r"^ *# --- shared: (\w+) ---\n(.*?)^ *# --- end shared: \1 ---\n", re.M | re.S)

# Shared flags whose default is another than SimCLR's, and why.
OTHER_DEFAULTS = {
    "vicreg": {"mean", "std", "batch_size", "base_lr", "warmup_epochs"},
    "barlow": {"mean", "std", "base_lr", "warmup_epochs"},
    "byol": {"mean", "std", "batch_size", "epochs", "base_lr", "warmup_epochs"},
    "simsiam": {"mean", "std", "batch_size", "epochs", "base_lr", "warmup_epochs", "optimizer", "weight_decay"},
    "swav": {"mean", "std", "base_lr", "warmup_epochs"},
    "moco": {"mean", "std", "base_lr", "warmup_epochs", "optimizer", "weight_decay"},
}


def source(method: str) -> str:
    return (ROOT / f"{method}.py").read_text()


def regions(method: str) -> dict[str, str]:
    """{name: text} in the order of the file, with the method's own name and the defaults of flags taken out."""
    found = dict(REGION.findall(source(method)))
    found["setup"] = found["setup"].replace(f'prepare("{method}"', 'prepare("<method>"')
    found["args"] = re.sub(r"^(    \w+: [^=]*= ).*?(  # .*)$", r"\1...\2", found["args"], flags=re.M)
    return found


@pytest.mark.parametrize("method", METHODS[1:])
def test_shared_regions_are_the_same(method):
    want, got = regions("simclr"), regions(method)
    assert list(want) == list(got) == REGIONS
    for name in want:
        diff = difflib.unified_diff(
            want[name].splitlines(), got[name].splitlines(), "simclr.py", f"{method}.py", lineterm=""
        )
        assert want[name] == got[name], "\n".join(["", *diff, "run: python tests/test_drift.py"])


@pytest.mark.parametrize("method", METHODS[1:])
def test_shared_flags_have_the_same_defaults_but_for_those_in_the_table(method):
    count = regions("simclr")["args"].count("\n")
    ours, theirs = (dataclasses.fields(importlib.import_module(m).Args)[:count] for m in (method, "simclr"))
    assert [(f.name, f.type) for f in ours] == [(f.name, f.type) for f in theirs]
    assert {a.name for a, b in zip(ours, theirs, strict=True) if a.default != b.default} == OTHER_DEFAULTS[method]


def code(method: str) -> list[str]:
    """The lines of a file without docstrings and blank lines."""
    text = source(method)
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            doc = node.body[0]
            lines[doc.lineno - 1 : doc.end_lineno] = [""] * (doc.end_lineno - doc.lineno + 1)
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_rest_is_small_enough_to_be_read_as_a_diff(method):
    diff = difflib.ndiff(code("simclr"), code(method))
    own = sum(line.startswith("+") for line in diff)
    assert own <= 150, f"{own} lines outside docstrings are not those of simclr.py"


def rewrite() -> None:
    """Copy every shared region of simclr.py but the flags, whose defaults differ, into the other files."""
    want = dict(REGION.findall(source("simclr")))
    for method in METHODS[1:]:

        def replace(match: re.Match, method: str = method) -> str:
            name, text = match.groups()
            new = text if name == "args" else want[name].replace('prepare("simclr"', f'prepare("{method}"')
            return match.group(0).replace(text, new)

        (ROOT / f"{method}.py").write_text(REGION.sub(replace, source(method)))


if __name__ == "__main__":
    rewrite()
    sys.exit()
