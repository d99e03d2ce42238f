"""Write docs/diffs: each method as the diff from its neighbour, with a sentence above every hunk.

    python tests/diffs.py            write the pages; the sentences are in tests/lessons.md
    python tests/diffs.py barlow     print how far barlow.py is from each other method

A page leaves out what is not the method: docstrings, imports, recipes, the check of the flags, the table at the end of
the file, and lines that differ in nothing but the name of the method, its class or its loss.
"""

import ast
import difflib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "diffs"
CONTEXT = 2  # unchanged lines before and after a change, at most


class Part(NamedTuple):
    """Lines of one section of a file: of a function, class or constant, or, marked as by `diff`, of a hunk."""

    section: str
    lines: list[str]


class Lesson(NamedTuple):
    """A section of tests/lessons.md: a method, the one its diff starts from, its idea, and a sentence for each key."""

    method: str
    neighbour: str
    idea: str
    sentences: dict[str, str]


class Unexplained(Exception):
    """A hunk without a sentence, or a sentence without its hunk."""


def source(method: str) -> str:
    return (ROOT / f"{method}.py").read_text()


def lessons() -> tuple[str, list[Lesson]]:
    """What tests/lessons.md says: the text above the table of the index, and the lessons in reading order."""
    text, *sections = (ROOT / "tests" / "lessons.md").read_text().strip().split("\n## ")
    found = []
    for section in sections:
        title, idea, *paragraphs = section.split("\n\n")
        method, _, neighbour = title.partition(" from ")
        told = dict(paragraph.split("`\n", 1) for paragraph in paragraphs)
        told = {key.removeprefix("`"): " ".join(words.split()) for key, words in told.items()}
        found.append(Lesson(method, neighbour, " ".join(idea.split()), told))
    return text, found


def definitions(text: str) -> dict[str, Part]:
    """The functions, classes and constants of a file, in its order, without docstrings."""
    lines, tree = text.splitlines(), ast.parse(text)
    docstrings: set[int] = set()  # numbers of their lines, from 1
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            end = node.body[0].end_lineno or 0
            docstrings.update(range(node.body[0].lineno, end + (2 if lines[end : end + 1] == [""] else 1)))
    found, section, above = {}, "flags", 0
    for node in tree.body:
        banners = re.findall(r"^# -{9,} (\w+)$", "\n".join(lines[above : node.lineno - 1]), re.M)
        section, above = [section, *banners][-1], node.end_lineno or 0
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", "")
        if name and name not in ("RECIPES", "check"):
            start = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
            kept = [lines[n - 1] for n in range(start, above + 1) if n not in docstrings]
            found[name] = Part(section, [line for line in kept if not line.startswith("    check(")])
    return found


def renamed(text: str, old: str, new: str) -> str:
    """Part of file `old`, with the names that file `new` has for the run, the model and the loss."""
    names = {}
    for pattern in (r'Run\(("\w+")', r"run\.place\((\w+)\(", r"terms1? = (\w+)\("):
        before, after = re.search(pattern, old), re.search(pattern, new)
        if before and after:
            names[before[1]] = after[1]
    return re.sub(r'"\w+"|\w+', lambda word: names.get(word[0], word[0]), text)


def hunks(old: str, new: str) -> list[Part]:
    """The changes that make file `new` of file `old`, both given as text, in the order of `new`."""
    before = {renamed(name, old, new): part for name, part in definitions(old).items()}
    after, names, nothing, found = definitions(new), list(before), Part("", []), []
    order = list(after)
    for i, name in enumerate(names):
        if name not in after:  # what is gone stands where it was
            order.insert(order.index(names[i - 1]) + 1 if i else 0, name)
    for name in order:
        was, now, marked = before.get(name, nothing), after.get(name, nothing), []
        left, right = [renamed(line, old, new) for line in was.lines], now.lines
        matcher = difflib.SequenceMatcher(lambda line: len(line.strip()) < 2, left, right, autojunk=False)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes():
            if tag == "equal":
                marked += [f" {line}" for line in right[j1:j2]]
            else:
                marked += [f"-{line}" for line in was.lines[i1:i2]] + [f"+{line}" for line in right[j1:j2]]
        apart = 2 if name == "main" else 4  # main is a row of steps; a head or a loss is read as a whole
        found += [Part(now.section or was.section, lines) for lines in split(marked, apart)]
    return found


def split(marked: list[str], apart: int) -> Iterator[list[str]]:
    """The changes in a definition, parted by `apart` unchanged lines or by the head of a function."""
    groups: list[tuple[int, int]] = []  # first and last change
    for i, line in enumerate(marked):
        if line[0] == " ":
            continue
        between = marked[groups[-1][1] + 1 : i] if groups else []
        if groups and len(between) < apart and not any(line.lstrip().startswith("def ") for line in between):
            groups[-1] = groups[-1][0], i
        else:
            groups.append((i, i))
    for before, (first, last), after in zip([None, *groups], groups, [*groups[1:], None], strict=False):
        low = max(first - CONTEXT, (before[1] + first + 1) // 2 if before else 0)
        high = min(last + 1 + CONTEXT, (last + after[0] + 1) // 2 if after else len(marked))
        lines = "\n".join(line.rstrip() for line in marked[low:high]).strip("\n").split("\n")
        depth = len(lines[0][1:]) - len(lines[0][1:].lstrip())
        heads = [re.match(r"[ +]( *)(?:def|class) (\w+)", line) for line in marked[:low]]
        around = [head[2] for head in heads if head and len(head[1]) < depth]
        yield [f"@@ {name} @@" for name in around[-1:]] + lines


def size(old: str, new: str) -> tuple[int, int]:
    """How many lines, blank ones aside, file `new` adds to file `old` and takes from it."""
    marks = [line[0] for hunk in hunks(old, new) for line in hunk.lines if line[1:].strip()]
    return marks.count("+"), marks.count("-")


def explained(lesson: Lesson, found: list[Part]) -> list[tuple[str, Part]]:
    """Each hunk with its sentences: those whose key is part of a line that this hunk changes, and no other one."""
    changes = ["\n".join(line[1:] for line in hunk.lines if line.startswith(("+", "-"))) for hunk in found]
    homes = {key: sum(key in text for text in changes) for key in lesson.sentences}
    told = [" ".join(lesson.sentences[key] for key in homes if key in text) for text in changes]
    wrong = [f"{count} hunks, not one, change a line with {key!r}" for key, count in homes.items() if count != 1]
    wrong += ["no sentence:\n" + "\n".join(hunk.lines) for hunk, words in zip(found, told, strict=True) if not words]
    if wrong:
        raise Unexplained("\n\n".join([f"{lesson.method} in tests/lessons.md", *wrong]))
    return list(zip(told, found, strict=True))


def page(lesson: Lesson) -> str:
    """The walk from a method's neighbour to the method, as Markdown."""
    old, new = source(lesson.neighbour), source(lesson.method)
    (come, go), told = size(old, new), explained(lesson, hunks(old, new))
    a, b = f"{lesson.neighbour}.py", f"{lesson.method}.py"
    links = f"[{a}](../../{a}) · [{b}](../../{b}) · [all diffs](README.md) · `diff {a} {b}`"
    text = [f"# From {a} to {b}", lesson.idea, f"+{come} −{go} lines · {links}"]
    for section in dict.fromkeys(part.section for part in [*definitions(new).values(), *hunks(old, new)]):
        here = [(words, "\n".join(["```diff", *hunk.lines, "```"])) for words, hunk in told if hunk.section == section]
        text += [f"## {section.capitalize()}", *(itertools.chain(*here) if here else ["Nothing changes."])]
    return "\n\n".join(text) + "\n"


def pages() -> dict[Path, str]:
    """Every file of docs/diffs and what is in it."""
    (intro, told), written, rows, wrong = lessons(), {}, [], []
    for number, lesson in enumerate(told, 1):
        file, new = f"{lesson.method}.py", source(lesson.method)
        row = f"[{file}](../../{file}) | – | {size('', new)[0]}"
        if lesson.neighbour:
            path, (come, go) = PAGES / f"{Path(lesson.method).name}.md", size(source(lesson.neighbour), new)
            row = f"[{file}]({path.name}) | {lesson.neighbour}.py | +{come} −{go}"
            try:
                written[path] = page(lesson)
            except Unexplained as error:
                wrong.append(str(error))
        rows.append(f"| {number} | {row} | {lesson.idea} |")
    if wrong:
        raise Unexplained("\n\n".join(wrong))
    head = "| | method | from | lines | idea |\n|---|---|---|---|---|"
    return written | {PAGES / "README.md": f"{intro.strip()}\n\n" + "\n".join([head, *rows]) + "\n"}


if __name__ == "__main__":
    for method in sys.argv[1:]:
        sizes = [(*size(source(lesson.method), source(method)), lesson.method) for lesson in lessons()[1]]
        for come, go, other in sorted(sizes, key=lambda item: item[0] + item[1]):
            print(f"{come + go:4} lines from {other}: +{come} -{go}")
    try:
        for path, text in pages().items() if not sys.argv[1:] else ():
            path.write_text(text)
    except Unexplained as error:
        sys.exit(str(error))
