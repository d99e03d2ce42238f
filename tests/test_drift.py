"""The diff between two method files is the lesson: what they share is the same to the letter, the rest is the method.

`python tests/test_drift.py` copies what is shared from the file that has it first into the others.
"""

import ast
import dataclasses
import difflib
import re

import pytest
from methods import METHODS, ROOT, module

# The statements of main, named by what they assign, call or go through, that a method has otherwise than simclr.py, or
# that only one of them has. (Beside these `scale`, and `peak_lr` made of it, which are simclr.py's alone.)
OWN = {
    "vicreg": "blur, solarization | lr | x1 | x2 | loss, terms",
    "barlow": "factor | groups | lr | group['lr'] | x1 | x2 | loss, terms | loss",
    "byol": "target | weights | predictor | groups | run.start | group['lr'] | x1 | x2 | z1, z2 | p1, p2, z1, z2 "
    "| torch.no_grad() | target1, target2 | loss, terms | loss1, terms1 | loss2, terms2 | loss | terms "
    "| if args.std_coeff | terms['variance'], terms['covariance'] | update_target",
    "simsiam": "weights | others | parts | groups | rates | groups.append | optimizer.param_groups | group['lr'] "
    "| z1, z2 | p1, p2, z1, z2 | loss, terms | loss1, terms1 | loss2, terms2 | loss | terms "
    "| if args.std_coeff | terms['variance'], terms['covariance']",
    "swav": "check | others | groups | queue | run.start | frozen_steps | run.batches | lr "
    "| normalize_prototypes | x1 | x2 | xs | z1, z2 | zs, scores | older | loss, terms | if step "
    "| model.prototypes.weight.grad | if args.queue_length | queue.push | run.report",
    "moco": "check | if bn_groups(args) | group_batchnorm | groups | key_network | queue | run.start | temperature "
    "| symmetric | m | momentum_update | z1, z2 | q | keys | if symmetric | keys.append | k | loss, terms "
    "| queue.enqueue | average_statistics | run.report",
}
# How many lines of code are not simclr.py's, at most.
BEYOND = {"vicreg": 90, "barlow": 60, "byol": 115, "simsiam": 100, "swav": 145, "moco": 143}
COPIES = [  # (what, the file that has it first, where else it is the same but for the docstring)
    ("crops", "simclr", "vicreg barlow byol"),
    ("crops", "simsiam", "moco"),
    ("augment", "simclr", "swav"),
    ("augment", "vicreg", "barlow byol"),
    ("variance_loss", "byol", "simsiam"),
    ("covariance_loss", "byol", "simsiam"),
    ("vicreg_penalties", "byol", "simsiam"),
    ("if __name__", "simclr", "vicreg barlow byol simsiam swav moco"),
]
SHARED = [("main", "simclr", method, {"scale", "peak_lr", *own.split(" | ")}) for method, own in OWN.items()]
SHARED += [(what, first, method, {"docstring"}) for what, first, others in COPIES for method in others.split()]

Pieces = list[tuple[str, str]]  # (name, text)


def source(method: str) -> str:
    return (ROOT / f"{method}.py").read_text()


def name_of(node: ast.stmt) -> str:
    """What a statement assigns, calls, goes through or defines."""
    match node:
        case ast.Expr(ast.Constant()):
            return "docstring"
        case ast.Assign([ast.Tuple() as names]):
            return re.sub("[()]", "", ast.unparse(names))
        case ast.Assign([part]) | ast.Expr(part) | ast.For(iter=part) | ast.With([part]):
            return ast.unparse(part.func if isinstance(part, ast.Call) else part)
        case ast.If(test):
            return "if " + ast.unparse(test).split()[0]
    return getattr(node, "name", type(node).__name__)


def pieces(method: str, what: str) -> Pieces:
    """All that a function or `if` of a file is made of, in order; comments and blank lines go with what follows them.

    Of main, every statement is a piece, and so is the head of a block; anything else is head, docstring and body.
    """
    lines, found = source(method).splitlines(keepends=True), []
    (top,) = (node for node in ast.parse("".join(lines)).body if name_of(node) == what)
    at = top.lineno - 1

    def walk(node: ast.stmt) -> None:
        nonlocal at
        block = getattr(node, "body", []) if node is top or what == "main" else []
        ends = (n for n in range(node.lineno, node.end_lineno) if re.search(r":(  # .*)?\n$", lines[n - 1]))
        end = next(ends) if block else node.end_lineno
        found.append((name_of(node), "".join(lines[at:end])))
        at = end
        for inner in block:
            walk(inner)

    walk(top)
    if what != "main":
        start = 2 if found[1][0] == "docstring" else 1
        found[start:] = [("body", "".join(text for _, text in found[start:]))]
    return found


def expected(method: str, what: str, first: str) -> Pieces:
    """The pieces of file `first` with the name and the class of `method` in place of its own."""
    ours, theirs = (re.search(r"run\.place\((\w+)", source(file))[1] for file in (first, method))
    names = {f'"{first}"': f'"{method}"', f"{ours}(args)": f"{theirs}(args)"}
    change = re.compile("|".join(map(re.escape, names)))
    return [(name, change.sub(lambda found: names[found[0]], text)) for name, text in pieces(first, what)]


@pytest.mark.parametrize("what, first, method, own", SHARED)
def test_what_is_shared_is_the_same_to_the_letter(what, first, method, own):
    sides = expected(method, what, first), pieces(method, what)
    want, got = ("".join(text for name, text in side if name not in own).splitlines() for side in sides)
    diff = difflib.unified_diff(want, got, f"{first}.py", f"{method}.py", lineterm="")
    if want != got:
        pytest.fail("\n".join([*diff, "run: python tests/test_drift.py"]), pytrace=False)
    differ = {name for name, _ in set(sides[0]) ^ set(sides[1])}
    assert own - {"docstring"} <= differ, "the table names statements that are the same"


def code(method: str) -> list[str]:
    """The lines of a file without docstrings, comments and blank lines."""
    lines = source(method).splitlines()
    for node in ast.walk(ast.parse(source(method))):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            doc = node.body[0]
            lines[doc.lineno - 1 : doc.end_lineno] = [""] * (doc.end_lineno - doc.lineno + 1)
    lines = [re.sub(r"(^|  )# .*", "", line).rstrip() for line in lines]
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("method", OWN)
def test_the_rest_is_small_enough_to_be_read_as_a_diff(method):
    own = sum(line.startswith("+") for line in difflib.ndiff(code("simclr"), code(method)))
    assert own <= BEYOND[method], f"{own} lines of code are not those of simclr.py"


@pytest.mark.parametrize("file, most", [("common", 2000), *((method, 350) for method in METHODS)])
def test_a_file_can_be_read_in_one_go(file, most):
    assert len(source(file).splitlines()) <= most
    main = next((node for node in ast.parse(source(file)).body if name_of(node) == "main"), None)
    assert file == "common" or main.end_lineno - main.lineno < 55


@pytest.mark.parametrize("method", METHODS)
def test_args_lists_no_default_that_flags_has_already(method):
    args = module(method).Args
    usual = {f.name: f for f in dataclasses.fields(args.__base__)}
    given = [f for f in dataclasses.fields(args) if f.name in args.__annotations__ and f.name in usual]
    assert [f.name for f in given if f.default == usual[f.name].default or f.type != usual[f.name].type] == []


def repair() -> None:
    """Put the shared pieces in order, as their first file has them; what a method has beside them stays behind the
    piece that it followed. So a new statement of simclr.py comes to all, and one that it lost is left to be deleted.
    """
    for what, first, method, own in SHARED:
        want = [piece for piece in expected(method, what, first) if piece[0] not in own]
        there, order, last, behind = pieces(method, what), [name for name, _ in want], -1, [""] * len(want)
        for name, text in there:
            if name not in order:
                behind[last] += text
            else:  # one that is out of order has nothing behind it
                last = max(last, order.index(name))
        old = "".join(text for _, text in there)
        new = "".join(text + more for (_, text), more in zip(want, behind, strict=True))
        (ROOT / f"{method}.py").write_text(source(method).replace(old, new))


if __name__ == "__main__":
    repair()
