"""What the pages tell a reader to type can be typed, their links lead somewhere, and the tests they name exist."""

import argparse
import ast
import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from methods import ROOT
from torch.distributed.run import get_args_parser as torchrun_parser

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
SCRIPTS = [file for file in (*ROOT.glob("*.py"), *ROOT.glob("more/*.py")) if file.name != "common.py"]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The words of every command line that runs Python, in a fenced block without a language or in a code span."""
    blocks = [block for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if not language]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]
    return [words for line in lines if (words := command(line))]


def usage(docstring: str) -> list[list[str]]:
    """The same in the indented lines of a script's docstring, where two spaces set off what is no command."""
    parts = [part for line in re.findall(r"^    (.*)", docstring, re.M) for part in re.split("  +", line)]
    return [words for part in parts if (words := command(part))]


def command(line: str) -> list[str]:
    """The words of a line that runs Python; none of another line."""
    run = re.match(r"(?:srun )?(python -m .*|(?:python|torchrun) .*\.py\b.*|\S+\.py .*)", line)
    return shlex.split(run[1], comments=True) if run else []


class Parsed(Exception):
    """Raised in a script as soon as it has read its command line."""


@functools.cache
def refusal(*words: str) -> str:
    """What a command would answer before it did anything: "" if its script is there and takes its flags."""
    read = argparse.ArgumentParser.parse_known_args

    def read_and_stop(parser: argparse.ArgumentParser, *args):
        _, unknown = read(parser, *args)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise Parsed

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        patch.setattr(sys, "excepthook", sys.excepthook)
        if words[0] == "torchrun":
            options = torchrun_parser().parse_args(words[1:])
            words = ("python", options.training_script, *options.training_script_args)
        script, *flags = words[1:] if words[0] == "python" else words
        if script == "-m":
            return "" if importlib.util.find_spec(flags[0]) else f"no module {flags[0]}"
        if re.search("[A-Z]{2}", script):
            return ""  # a placeholder
        if not (ROOT / script).is_file():
            return f"no file {script}"
        if "parse_args" not in (ROOT / script).read_text():
            return " ".join(flag for flag in flags if flag.startswith("-"))
        patch.setattr(argparse.ArgumentParser, "parse_known_args", read_and_stop)
        patch.setattr(sys, "argv", [script, *flags])
        with contextlib.suppress(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
            return "it did not read its flags"
    return said.getvalue().strip()


def wrong(lines: list[list[str]]) -> list[str]:
    """Each command that would be refused, and why."""
    told = {" ".join(words): refusal(*words) for words in lines}
    return [f"{line}: {why}" for line, why in told.items() if why]


def anchors(page: Path) -> set[str]:
    """The names that a browser finds the headings of a page by: those that GitHub makes."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*?) *$", prose(page.read_text()), re.M):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def wrong_links(page: Path, text: str) -> list[str]:
    """Each link of a page to a file that is not there, or to a heading that the file has not."""
    without_code = re.sub(r"`[^`]+`", "", prose(text))
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", without_code)
    wrong = []
    for target in {first or second for first, second in targets}:
        if re.match(r"[a-z]+:", target):  # elsewhere in the world
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


@functools.cache
def names_of_tests(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def wrong_tests(text: str) -> list[str]:
    """Each test file or test that a page names and that is not there."""
    files = {file.name: names_of_tests(file) for file in (ROOT / "tests").glob("test_*.py")}
    every = set().union(*files.values())
    wrong = []
    for file, name in re.findall(r"`(?:tests/)?(test_[a-z0-9_]+\.py)?(?:::)?(test_[a-z0-9_]+)?`", prose(text)):
        known = files.get(file, set()) if file else every
        if (file and file not in files) or (name and name not in known):
            wrong.append("::".join(part for part in (file, name) if part))
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_pages_commands_can_be_typed_its_links_lead_somewhere_and_its_tests_exist(page):
    text = page.read_text()
    assert wrong(commands(text)) + wrong_links(page, text) + wrong_tests(text) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_a_scripts_docstring_says_how_to_run_it(script):
    lines = usage(ast.get_docstring(ast.parse(script.read_text())))
    assert wrong(lines) == []
    assert ["python", str(script.relative_to(ROOT))] in [words[:2] for words in lines]


@pytest.mark.parametrize(
    "text, words",
    [
        ("```\npip install x\npython simclr.py --seed 1  # why\n```", ["python simclr.py --seed 1"]),
        ("```\nsrun torchrun --nnodes 2 \\\n    simclr.py --seed 1\n```", ["torchrun --nnodes 2 simclr.py --seed 1"]),
        ("| `python simclr.py` | 42 % |", ["python simclr.py"]),
        ("Then `python simclr.py\n--seed 1` does.", ["python simclr.py --seed 1"]),
        ("`evaluate.py RUN --protocol tsne`", ["evaluate.py RUN --protocol tsne"]),
        ("```python\npython = 1\n```\n`simclr.py`, `diff simclr.py moco.py`", []),
    ],
)
def test_commands_are_found_in_blocks_and_in_prose(text, words):
    assert [" ".join(found) for found in commands(text)] == words


def test_commands_are_found_in_a_docstring():
    text = (
        "Run.\n\n    hard    python more/x.py --beta 1  # b\n    python y.py    some minutes; see x.py\npython z.py\n"
    )
    assert [" ".join(found) for found in usage(text)] == ["python more/x.py --beta 1", "python y.py"]


@pytest.mark.parametrize(
    "line, why",
    [
        ("python simclr.py --temperature 0.1 --no-flip --recipe cifar", ""),
        ("python simclr.py --temprature 0.1", "temprature"),
        ("python simclr.py --epochs few", "few"),
        ("python simclr.py --recipe imagent", "imagent"),
        ("python simclr.py --batch-size", "batch-size"),
        ("python simclr.py runs", "runs"),
        ("python simclip.py", "no file simclip.py"),
        ("python evaluate.py RUN --protocol tsne", ""),
        ("python evaluate.py", "weights"),
        ("python tests/bench.py barlow --device cuda", ""),
        ("python tests/bench.py --devices cuda", "devices"),
        ("python tests/diffs.py --barlow", "--barlow"),
        ("python -m pytest tests/test_drift.py", ""),
        ("python -m pytset", "no module pytset"),
        ("torchrun --nproc_per_node 4 simclr.py --batch-size 1024", ""),
        ("torchrun --processes 4 simclr.py", "processes"),
        ("torchrun --nproc_per_node 4 simclr.py --batchsize 1024", "batchsize"),
    ],
)
def test_a_command_that_cannot_be_typed_is_found(line, why):
    said = refusal(*shlex.split(line))
    assert (why in said) if why else said == ""


def test_a_dead_link_is_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "docs" / "other.md"
    other.parent.mkdir()
    other.write_text("# `SimCLR`: what, and why\n\n```\n# no heading\n```\n\n## Twice\n\n## Twice\n")
    good = "docs/other.md docs #here docs/other.md#simclr-what-and-why docs/other.md#twice-1 https://example.org/x"
    dead = "docs/another.md #there docs/other.md#no-heading docs/other.md#twice-2 gone.png"
    page.write_text("## Here\n\n`[not](a-link)`\n\n" + " ".join(f"[x]({to})" for to in f"{good} {dead}".split()))
    assert sorted(wrong_links(page, page.read_text())) == sorted(dead.split())
    assert wrong_links(page, '<img src="none.png">') == ["none.png"]


def test_a_test_that_is_gone_is_found():
    here = "test_a_test_that_is_gone_is_found"
    text = (
        f"`test_readme.py::{here}`, `{here}`, `tests/test_readme.py`, `test_drift.py::{here}`, `test_not.py`, `test_no`"
    )
    assert wrong_tests(text) == [f"test_drift.py::{here}", "test_not.py", "test_no"]
