"""What a run prints, read as a user with a terminal of 100 columns reads it."""

import contextlib
import io
import math
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from methods import METHODS, ROOT, at_step, metrics, module, narrow, small_folder, tiny
from PIL import Image
from worlds import run_on

import common
import evaluate

WIDTH = 99  # a terminal of 100 columns may break a line of 100


def edges(line: str) -> list[int]:
    """Where the words of a line end."""
    return [word.end() for word in re.finditer(r"\S+", line)]


def table(out: str) -> list[dict[str, str]]:
    """The lines of steps as {name: text}; names stand above them in two lines, the first of which may be empty."""
    lines, found, names = out.splitlines(), [], {}
    for above, line in zip(["", *lines], lines, strict=False):
        if line.split()[:2] == ["epoch", "step"]:
            tops = dict(zip(edges(above), above.split(), strict=True))
            names = {
                end: "_".join([tops.pop(end, ""), name]).strip("_")
                for end, name in zip(edges(line), line.split(), strict=True)
            }
            assert not tops, "a name's first line ends where its second does"
        elif at_step(line) is not None:
            assert edges(line) == list(names), f"the columns end where their names do:\n{line}"
            found.append(dict(zip(names.values(), line.split(), strict=True)))
    return found


def log_of(folder: Path, last_step: int, seconds_per_step: float, monkeypatch: pytest.MonkeyPatch) -> common.Log:
    """A log whose clock moves on by so many seconds whenever it is read."""
    now = iter(range(10**9))
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: seconds_per_step * next(now)))
    log = common.Log(tiny("vicreg", folder, batch_size=64), steps_per_epoch=625, last_step=last_step)
    log.open(0, 0)
    return log


@pytest.mark.parametrize("method", [*METHODS, "byol with penalties"])
def test_a_run_prints_aligned_columns_that_a_terminal_holds(method, tmp_path, monkeypatch, capsys):
    name, flags = method.split()[0], {"std_coeff": 1.0, "cov_coeff": 1.0} if "penalties" in method else {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module(name), "backbone", narrow)
    module(name).main(tiny(name, Path("runs", name), log_every=2, **flags))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    rows, logged = table(out), [line for line in metrics(Path("runs", name)) if "loss" in line]
    assert [int(row["step"]) for row in rows] == [line["step"] for line in logged] == [2, 4, 6, 8, 10, 12]
    for row, line in zip(rows, logged, strict=True):
        assert set(row) == line.keys() - {"embedding_std", "images_per_s"} | {"spread", "images/s", "time_left"}
        for key in row.keys() & line.keys():
            decimals = len(row[key].partition(".")[2])
            assert float(row[key]) == pytest.approx(line[key], abs=0.51 * 10**-decimals)
            assert decimals >= 4 or key in ("epoch", "step", "effective_rank") or abs(line[key]) > 99


term = st.floats(1e-4, 12345) | st.floats(-100, 0)


@given(
    st.lists(st.tuples(term, term, term, term), min_size=1, max_size=35),
    st.integers(4, 999_999),
    st.floats(1e-3, 3),
    st.floats(1e-6, 99),
)
def test_columns_hold_small_and_large_numbers(tmp_path_factory, values, last_step, seconds, lr):
    lines, names = io.StringIO(), ("loss", "invariance", "variance", "covariance")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(lines):
        log = log_of(tmp_path_factory.mktemp("log"), last_step, seconds, patch)
        z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        for i, (loss, *others) in enumerate(values):
            named = zip(names[1:], map(torch.tensor, others), strict=True)
            log.step(i % last_step + 1, torch.tensor(loss), dict(named), lr, z)
    lines = lines.getvalue().splitlines()
    assert {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) <= WIDTH
    rows = table("\n".join(lines))
    for row, line in zip(rows, values, strict=True):
        for name, value in zip(names, line, strict=True):
            assert float(row[name]) == pytest.approx(value, rel=6e-3, abs=5.1e-5)
    headers = [i for i, line in enumerate(lines) if "epoch" in line]
    assert headers == [32 * j + 1 for j in range(len(headers))] and len(headers) == math.ceil(len(values) / 30)


def test_names_stand_above_the_columns_again_when_the_terms_change(tmp_path, monkeypatch, capsys):
    log, one = log_of(tmp_path, 12, 1.0, monkeypatch), torch.tensor(1.0)
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for step, names in enumerate((["cosine"], ["cosine"], ["cosine", "on_diagonal"], ["cosine", "on_diagonal"]), 1):
        log.step(step, one, dict.fromkeys(names, one), 0.1, z)
    out = capsys.readouterr().out
    assert ["on_diagonal" in row for row in table(out)] == [False, False, True, True] and out.count("epoch") == 2


@pytest.mark.parametrize("dimensions", [2, 8, 32])
@pytest.mark.parametrize("angle", [0.1, 0.7, math.pi / 2])
def test_spread_is_the_std_of_the_normalised_embeddings_over_that_of_isotropic_ones(
    dimensions, angle, tmp_path, monkeypatch, capsys
):
    """Embeddings on a cone: its axis, and plus and minus each of m directions at right angles to it."""
    m = dimensions
    directions = torch.cat([torch.eye(m), -torch.eye(m)]) * math.sin(angle)  # 2m×m
    z = torch.cat([torch.full((2 * m, 1), math.cos(angle)), directions], 1) * torch.rand(2 * m, 1).add(1)
    log_of(tmp_path, 12, 1.0, monkeypatch).step(1, torch.tensor(1.0), {}, 0.1, z)
    (row,) = table(capsys.readouterr().out)
    # In each of the m directions two of 2m embeddings are not 0, along the axis all are the same.
    std = math.sin(angle) * math.sqrt(2 / (2 * m - 1)) * m / (m + 1)
    assert float(row["spread"]) == pytest.approx(std * math.sqrt(m + 1), abs=6e-4)


def test_the_first_lines_tell_on_what_where_and_how_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module("vicreg"), "backbone", narrow)
    for most, told in ((0, ""), (5, "; --max-steps ends the run after 5"), (500, "")):
        module("vicreg").main(tiny("vicreg", tmp_path / str(most), max_steps=most))
        _, images, batch, steps, folder, *_ = capsys.readouterr().out.splitlines()
        assert images.endswith(f"folder {small_folder()}: 64 in memory, of 4 classes; 40 to test on")
        cpu = "batch    16 on CPU, 1 thread, fp32;"
        assert batch.startswith(cpu if not torch.cuda.is_available() else "batch    16 on")
        assert steps == f"steps    12 = 3 epochs of 4{told}"
        assert folder.split() == ["folder", str(tmp_path / str(most))]


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
def test_a_cpu_with_bf16_instructions_uses_them_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module("vicreg"), "backbone", narrow)
    has = {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    for asked, told in (("auto", "bf16" if has else "fp32"), ("fp32", "fp32"), ("bf16", "bf16")):
        module("vicreg").main(tiny("vicreg", tmp_path / asked, max_steps=1, precision=asked))
        assert f"1 thread, {told};" in capsys.readouterr().out
    losses = [metrics(tmp_path / asked)[1]["loss"] for asked in ("auto", "bf16", "fp32")]
    assert losses[0] == losses[1 if has else 2] and losses[1] != losses[2]


def last_lines(out: str) -> dict[str, str]:
    """{label: the rest} of what follows the last evaluation or step."""
    return {label: rest for label, _, rest in (line.partition(" ") for line in out.splitlines()[-4:])}


def run_next(command: str) -> dict:
    """What evaluate.py answers to the last line of a run."""
    python, script, *words = shlex.split(command)
    assert python == "python" and Path(script).resolve() == ROOT / "evaluate.py"
    return evaluate.main(common.parse_args(evaluate.Args, argv=words))


def test_the_last_lines_name_the_encoder_and_a_next_command_that_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module("vicreg").main(tiny("vicreg", Path("it's a run"), max_steps=1))
    capsys.readouterr()
    module("vicreg").main(tiny("vicreg", Path("it's a run"), max_steps=3))  # a continued run knows how it began
    told, scores = (
        last_lines(capsys.readouterr().out),
        [m["knn_top1"] for m in metrics(Path("it's a run")) if "knn_top1" in m],
    )
    assert re.fullmatch(r" *2 steps in 0:\d\d:\d\d; online kNN from \S+ % \(untrained\) to \S+ %", told["done"])
    assert re.findall(r"\S+(?= %)", told["done"]) == [f"{100 * scores[0]:.1f}", f"{100 * scores[-1]:.1f}"]
    assert torch.load(told["encoder"].strip(), weights_only=True).keys() >= {"conv1.weight"}
    assert run_next(told["next"])["protocol"] == "linear"
    module("vicreg").main(tiny("vicreg", Path("it's a run"), max_steps=3))  # nothing is left to do
    again = last_lines(capsys.readouterr().out)
    assert again["next"] == told["next"] and "done" not in again


def test_without_labels_the_next_command_needs_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)):
        Image.fromarray(pixels).save(f"images/{i}.png")
    module("vicreg").main(tiny("vicreg", Path("run"), max_steps=1, data_dir="images"))
    out = capsys.readouterr().out
    told = last_lines(out)
    assert "kNN" not in told["done"] and run_next(told["next"])["protocol"] == "diagnose"
    with pytest.raises(SystemExit):
        evaluate.main(common.parse_args(evaluate.Args, argv=["run", "--protocol", "linear"]))
    labelled = ["run", "--protocol", "linear", "--data-dir", small_folder()]
    assert "--data-dir" in out.splitlines()[-1]
    assert evaluate.main(common.parse_args(evaluate.Args, argv=labelled))["test_images"] == 40


def printed(folder: Path) -> str:
    module("vicreg").backbone = narrow
    with contextlib.redirect_stdout(io.StringIO()) as said:
        module("vicreg").main(tiny("vicreg", folder, max_steps=2))
    return said.getvalue()


def test_several_processes_print_each_line_once(tmp_path):
    ((first, second),) = run_on(2, [(printed, (tmp_path,))])
    assert second == "" and "batch    16 = 2 x 8 on" in first
    for label in ("images", "batch", "steps", "folder", "columns", "untrained", "done", "encoder", "next"):
        assert len(re.findall(f"^{label} ", first, re.M)) == 1
    assert len(table(first)) == 2


@pytest.mark.parametrize("kind, color", [("warning", 33), ("vicreg.py: error", 31)])
def test_warnings_have_a_colour_on_a_terminal_and_nowhere_else(kind, color, monkeypatch, capsys):
    common.warn("mind", kind=kind)
    assert capsys.readouterr().err == f"{kind}: mind\n"
    master, slave = os.openpty()
    with open(slave, "w") as terminal, open(master, "rb") as shown:
        monkeypatch.setattr(sys, "stderr", terminal)
        common.warn("mind", kind=kind)
        assert shown.readline() == f"\033[{color}m{kind}\033[0m: mind\r\n".encode()
