"""docs/diffs shows the code as it is, and every hunk on it has its sentence."""

import difflib
import itertools
from collections import Counter

import diffs
import pytest
from hypothesis import given
from hypothesis import strategies as st

_, LESSONS = diffs.lessons()
BY_METHOD = {lesson.method: lesson for lesson in LESSONS if lesson.neighbour}

OLD = '''
"""One."""
import torch
RECIPES = {"quick": {}}
def check(args):
    refuse()
# ------------------------------- network
class One:
    """One."""

    width = 1
    depth = 1
# ------------------------------- training
def main(args):
    """Train."""
    run = Run("one", args)
    check(args)
    model = run.place(One(args))
    loss, terms = one_loss(model)
    return loss
'''


def test_the_pages_are_those_that_the_command_writes():
    want, got = diffs.pages(), {path: path.read_text() for path in diffs.PAGES.glob("*.md")}
    for path in want.keys() | got.keys():
        sides = [side.get(path, "").splitlines() for side in (got, want)]
        lines = list(difflib.unified_diff(*sides, path.name, "what it should be", lineterm=""))
        if lines:
            pytest.fail("\n".join([*lines[:40], "run: python tests/diffs.py"]), pytrace=False)


def code(text: str) -> list[str]:
    return [line for part in diffs.definitions(text).values() for line in part.lines]


@pytest.mark.parametrize("method", BY_METHOD)
def test_a_page_shows_the_files_lines_and_every_change(method):
    old, new = diffs.source(BY_METHOD[method].neighbour), diffs.source(method)
    shown = [line for hunk in diffs.hunks(old, new) for line in hunk.lines if line and line[0] != "@"]
    added, gone, same = (Counter(line[1:] for line in shown if line[0] == mark) for mark in "+- ")
    assert added + same <= Counter(new.splitlines())
    assert gone <= Counter(old.splitlines())
    kept = Counter(code(new)) - added  # what the page leaves out is in both files
    assert kept <= Counter(code(diffs.renamed(old, old, new)))
    assert kept.total() == len(code(old)) - gone.total()


def test_names_and_what_is_left_out_make_no_hunk():
    new = OLD.replace("one", "two").replace("One", "Two").replace("refuse()", "abort()").replace("quick", "slow")
    assert diffs.hunks(OLD, new.replace("    check(args)", "    check(args, 3)").replace("torch", "math")) == []


def test_a_hunk_is_marked_with_its_section_and_what_it_is_part_of():
    new = OLD.replace("depth = 1", "depth = 2").replace("return loss", "return -loss")
    network, training = diffs.hunks(OLD, new)
    assert network == ("network", [" class One:", "     width = 1", "-    depth = 1", "+    depth = 2"])
    assert training.section == "training"
    assert training.lines[0] == "@@ main @@" and training.lines[-2:] == ["-    return loss", "+    return -loss"]


@pytest.mark.parametrize(
    "sentences, message",
    [
        ({"depth = 2": "Deeper."}, "no sentence:\n@@ main @@"),
        ({"depth = 2": "Deeper.", "return -": "Upwards.", "width": "Same."}, "0 hunks, not one, .* 'width'"),
        ({"depth = 2": "Deeper.", "return -": "Upwards.", "t": "Both."}, "2 hunks, not one, .* 't'"),
    ],
)
def test_every_hunk_has_a_sentence_and_every_sentence_one_hunk(sentences, message):
    new = OLD.replace("depth = 1", "depth = 2").replace("return loss", "return -loss")
    with pytest.raises(diffs.Unexplained, match=message):
        diffs.explained(diffs.Lesson("two", "one", "", sentences), diffs.hunks(OLD, new))


def test_a_hunk_has_the_sentences_of_all_its_lines():
    new = OLD.replace("width = 1", "width = 2").replace("depth = 1", "depth = 2")
    lesson = diffs.Lesson("two", "one", "", {"width = 2": "Wider.", "depth = 1": "Deeper."})
    assert [words for words, _ in diffs.explained(lesson, diffs.hunks(OLD, new))] == ["Wider. Deeper."]


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from("+-")), max_size=6), st.integers(1, 4), st.integers(0, 3))
def test_hunks_have_every_change_once_and_lie_apart(changes, apart, rest):
    marks = "".join(" " * same + mark for same, mark in changes) + " " * rest
    marked = [f"{mark}x = {i}" for i, mark in enumerate(marks)]
    parts = list(diffs.split(marked, apart))
    shown = [line for part in parts for line in part]
    places = [marked.index(line) for line in shown]
    assert places == sorted(set(places))  # in order, none twice
    assert [line for line in shown if line[0] != " "] == [line for line in marked if line[0] != " "]
    changed = [[marked.index(line) for line in part if line[0] != " "] for part in parts]
    assert all(after[0] - before[-1] > apart for before, after in itertools.pairwise(changed))
    assert all(b - a <= apart for part in changed for a, b in itertools.pairwise(part))
