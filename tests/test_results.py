"""The tables of docs/results.md are those that the logs give, and the logs are of the commands that the tables name."""

import json
import re
import shlex

import pytest
import results
from methods import MORE, module

import common


def test_the_tables_are_those_that_the_command_writes():
    text = results.PAGE.read_text()
    assert results.page(text) == text, "run: python tests/results.py"
    assert all(f"<!-- table {name} -->" in text for name in results.TABLES)


@pytest.mark.parametrize("name", [folder.name for run in results.RUNS for folder in results.seeds(run)])
def test_a_log_is_of_the_command_that_its_row_names(name):
    base, _, seed = name.partition("-seed")
    script, *words = shlex.split(results.RUNS[base])
    file = module(script.rpartition("/")[2].removesuffix(".py"))
    want = common.parse_args(file.Args, file.RECIPES, [*words, *(["--seed", seed] if seed else [])])
    flags = json.loads((results.folder_of(name) / "args.json").read_text())
    # `--eval-every` changes no result; the size follows the images; a flag that the run had not yet has its default.
    free = common.FREE_FLAGS - {"epochs", "max_steps", "data_dir"} | {"image_size"}
    usual, typed = vars(file.Args()), json.loads(json.dumps(vars(want)))
    differ = {k: (flags.get(k, usual[k]), v) for k, v in typed.items() if k not in free and flags.get(k, usual[k]) != v}
    assert differ == {}
    records = results.lines(results.folder_of(name) / "metrics.jsonl")
    logged = next(record for record in records if "epoch" in record)
    assert records[-1]["step"] == round(want.epochs * logged["step"] / logged["epoch"]), "the run came to its end"


def test_every_run_that_is_linked_is_kept():
    assert {name for runs, _ in results.TABLES.values() for name in runs} <= {
        name for name in results.RUNS if results.seeds(name)
    }


def test_the_readmes_figures_of_more_are_those_of_seed_0():
    rows = re.findall(r"^\| \[(\w+)\.py\]\(more/.*\| (.*?) → (.*?) \|$", (results.ROOT / "README.md").read_text(), re.M)
    assert {name for name, _, _ in rows} == set(MORE)
    for name, before, after in rows:
        if name == "scan":
            scores = [results.judged(results.folder_of(run), "cluster") for run in ("scan-init", "scan")]
            want = scores[0]["acc"], scores[1]["heads_acc"]
            assert [before, after] == [
                f"in the cluster of its class: {100 * want[0]:.1f} (k-means)",
                f"{100 * want[1]:.1f}",
            ]
        else:
            commands = {f"more/{name}.py", f"more/{name}.py --precision bf16"}
            (run,) = (run for run, command in results.MORE.items() if command in commands)
            knn = results.knn(results.folder_of(run))
            assert [before, after] == [f"{knn[0]:.1f}", f"{knn[-1]:.1f}"], name
