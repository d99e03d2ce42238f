"""Random flags, one to three of them out of the usual: the program does its work or says what is wrong in one line.

The flags are found in `Args`, so that a new one is attacked, too.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import signal
import sys
import tempfile
import typing
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import METHODS, MORE, SMALL, module
from PIL import Image
from torch import nn

import common

# What a number can be. Nothing between 12 and a million: a large value that is none too large takes long.
WHOLE = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([-(10**30), -(2**63), 10**6, 2**31, 2**32, 10**9, 10**12, 10**18, 2**63, 2**64, 10**30]),
)
REAL = st.one_of(
    st.floats(0, 2),
    st.floats(),
    st.sampled_from([0.0, -1.0, 1e-300, 1e-45, 1e-9, 1e9, 1e18, 1e300, math.nan, math.inf, -math.inf]),
)
# In the folder where the program runs `file` is a line of text and `folder` is empty.
PATH = st.sampled_from(["", "missing", "file", "folder", "file/below"])
# Not attacked: what downloads or needs another package, and compilation, which takes a minute. `--recipe` is a set of
# flags, and those are attacked.
LEFT_ALONE = {"recipe", "dataset", "compile", "tensorboard"}


def values(kind: type, default) -> st.SearchStrategy[str]:
    """What to write behind a flag of that type, as one word or, for tuples, several."""
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind)).map(lambda choice: [choice])
    if typing.get_origin(kind) is tuple:
        return st.lists(REAL, min_size=len(default), max_size=len(default)).map(lambda t: [str(x) for x in t])
    return {int: WHOLE, float: REAL, str: PATH}[kind].map(lambda value: [str(value)])


def flags_of(program: str) -> dict[str, st.SearchStrategy[list[str]]]:
    """For each flag its own strategy: the words that set it."""
    args, found = module(program).Args, {}
    kinds = typing.get_type_hints(args)
    for field in dataclasses.fields(args):
        flag, kind = common.flag_of(field.name), kinds[field.name]
        if kind is bool:
            found[field.name] = st.sampled_from([[flag], ["--no-" + flag[2:]]])
        elif field.default is dataclasses.MISSING:
            found[field.name] = values(kind, None)
        elif typing.get_origin(kind) is tuple:
            found[field.name] = values(kind, field.default).map(lambda words, flag=flag: [flag, *words])
        else:
            found[field.name] = values(kind, None).map(lambda words, flag=flag: [f"{flag}={words[0]}"])
    return {name: words for name, words in found.items() if name not in LEFT_ALONE}


def attacked(program: str) -> st.SearchStrategy[dict[str, list[str]]]:
    """One to three flags, and the words that set each; for evaluate.py some protocol, too."""
    flags = flags_of(program)
    names = st.lists(st.sampled_from(sorted(flags)), min_size=1, max_size=3, unique=True)
    names = names.map(lambda chosen: {*chosen, *({"protocol"} & flags.keys())})
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: flags[name] for name in sorted(chosen)}))


def endless(flags: dict[str, list[str]]) -> bool:
    """Whether they ask, rightly, for training that takes for ever."""
    number = {name: float(words[0].split("=")[1]) for name, words in flags.items() if name in ("epochs", "max_steps")}
    return 12 < number.get("epochs", 1) <= 1e18 and not 0 < number.get("max_steps", 0) <= 12


def tiny_resnet(arch: str, stem: str, zero_init: bool, norm: str = "batch") -> tuple[nn.Module, int]:
    """In place of `backbone`: two convolutions that have the names of a ResNet's."""
    with torch.device("meta"):
        common.backbone(arch, stem, zero_init)  # refuses what it does not know
    layer = nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8)
    layers = OrderedDict(conv1=nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), bn1=layer)
    layers |= OrderedDict(relu=nn.ReLU(), layer1=nn.Conv2d(8, 16, 3, stride=2, padding=1))
    return nn.Sequential(layers | OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())), 16


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `images`, 32 for training and 12 for testing, and `run`, a run on them."""
    root, random = tmp_path_factory.mktemp("attack"), np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 12)):
        for i in range(count):
            file = root / "images" / split / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", sys.excepthook)  # parse_args sets another
        for program in (*METHODS, *MORE, "evaluate"):
            patch.setattr(module(program), "backbone", tiny_resnet)
        assert answer("vicreg", {"run_dir": [f"--run-dir={root / 'run'}"]}, root)[0] == 0
        yield root


def answer(program: str, flags: dict[str, list[str]], root: Path) -> tuple[int, list[str]]:
    """(exit code, lines on stderr) of the program with these flags in place of usual ones. What is raised, passes."""
    usual = {"data_dir": root / "images", "epochs": 1, "image_size": 8}
    if program == "evaluate":
        usual |= {"k": 5, "output": "out"}
        first = flags.get("weights", [str(root / "run")])
    else:
        usual |= (SMALL | MORE)[program] | {
            "epochs": 2,
            "log_every": 1,
            "max_steps": 2,
            "warmup_epochs": 0,
            "run_dir": "run",
        }
        if program == "scan":
            usual["init"] = root / "run" / "encoder.pt"
        first = []
    line = [f"{common.flag_of(name)}={value}" for name, value in usual.items() if name not in flags]
    line += [word for name, words in flags.items() if name != "weights" for word in words]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(os.chdir, os.getcwd())
        os.chdir(here)
        Path("folder").mkdir()
        Path("file").write_text("neither an image nor weights\n")
        said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        script, code = module(program), 0
        try:
            script.main(common.parse_args(script.Args, getattr(script, "RECIPES", None), [*first, *line]))
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, said.getvalue().splitlines()


@pytest.mark.parametrize("program", [*METHODS, *MORE, "evaluate"])
@settings(max_examples=int(os.environ.get("ATTACKS", 20)))
@given(data=st.data())
def test_any_flags_are_obeyed_or_answered_in_one_line(program, trained, data):
    flags = data.draw(attacked(program).filter(lambda flags: not endless(flags)))
    code, said = answer(program, flags, trained)
    assert code in (0, 1, 2)
    # A run that ends on a fault may have warned before, of a schedule that only rises or of a collapse, and
    # evaluate.py has told how far it was. A refusal comes alone.
    before = said if code == 0 else said[:-1]
    assert code == 0 or "error: " in said[-1]
    assert not before if code == 2 else all(re.match("warning: |step ", line) for line in before), said
