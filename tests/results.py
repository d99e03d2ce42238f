"""The tables of docs/results.md: takes the runs, keeps their logs in docs/results, writes the tables from these.

    python tests/results.py                      write the tables anew; a test fails if a figure is not that of its log
    python tests/results.py take NAME...         take runs of the tables below, judge them, keep their logs
    python tests/results.py keep NAME FOLDER commit=... torch=... machine=... date=... seconds=...    of another run

A name is a key of RUNS, for another seed than 0 with its number behind it: wmse-seed1. Runs lie in runs/results. Beside
the log (metrics.jsonl), the flags (args.json) and what evaluate.py found (results.jsonl) a folder of docs/results has
taken.json: the commit, the machine, the date, the seconds that the command took from beginning to end, and the seconds
of all its threads.
"""

import datetime
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
LOGS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "results.md"
SHORT = "--crop-min-scale 0.6 --epochs 6 --warmup-epochs 1 --precision bf16"
CIFAR = "--data-dir cifar10 --warmup-epochs 0.5"

# `--eval-every 1` gives the curves a point for every epoch, and changes no result.
SEVEN = {name: f"{name}.py" for name in ("simclr", "moco", "barlow", "vicreg", "byol", "simsiam", "swav")}
COLLAPSED = {"vicreg-collapsed": "vicreg.py --std-coeff 0"}
NEGATIVES = {
    "dcl": "more/negatives.py",
    "dclw": "more/negatives.py --positive-sigma 0.5 --precision bf16",
    "epsilon": "more/negatives.py --no-decoupled --epsilon 0.25 --precision bf16",
    "debiased": "more/negatives.py --no-decoupled --tau-plus 0.1 --temperature 0.5 --precision bf16",
    "hard": "more/negatives.py --no-decoupled --tau-plus 0.1 --beta 1 --temperature 0.5 --precision bf16",
}
SUPCON = {
    "supcon": "more/supcon.py",
    "eps_supcon": "more/supcon.py --loss eps_supcon",
    "eps_supinfonce": "more/supcon.py --loss eps_supinfonce --precision bf16",
}
MORE = {
    **{f"negatives-{loss}": command for loss, command in NEGATIVES.items()},
    **{f"supcon-{loss}".replace("supcon-supcon", "supcon"): command for loss, command in SUPCON.items()},
    "nnclr": "more/nnclr.py",
    "wmse": "more/wmse.py",
    "dino": "more/dino.py --precision bf16",
    "rotnet": "more/rotnet.py",
    "pirl-npid": "more/pirl.py --transform none",
    "pirl": "more/pirl.py",
    "pirl-jigsaw": "more/pirl.py --transform jigsaw",
    "deepcluster": "more/deepcluster.py",
    "cpc": "more/cpc.py",
    "cmc": "more/cmc.py",
}
FEW = {  # on CIFAR-10, saved as JPEG files
    **{f"cifar-{loss}": f"{command} {CIFAR} --epochs 1" for loss, command in NEGATIVES.items()},
    "cifar-supcon": f"more/supcon.py {CIFAR} --epochs 2",
    "cifar-eps_supcon": f"more/supcon.py --loss eps_supcon --precision bf16 {CIFAR} --epochs 1",
    "cifar-eps_supinfonce": f"more/supcon.py --loss eps_supinfonce --precision bf16 {CIFAR} --epochs 1",
    "cifar-nnclr": f"more/nnclr.py {CIFAR} --epochs 3",
    "cifar-wmse": f"more/wmse.py {CIFAR} --epochs 2",
    "cifar-dino": f"more/dino.py {CIFAR} --epochs 4 --base-lr 1 --precision bf16",
    "cifar-cmc": f"more/cmc.py {CIFAR} --epochs 2 --precision bf16",
}
REGRESS = {
    "regress-simclr": f"simclr.py {SHORT} --base-lr 2",
    **{f"regress-{loss}": f"more/supcon.py --loss {loss} {SHORT}" for loss in ("yaware", "thr", "exp")},
}
COLLAPSES = {
    f"dino-no-{what}": f"more/dino.py --precision bf16 --epochs 2 --warmup-epochs 1 --eval-every 1 {flag}"
    for what, flag in (("centering", "--no-centering"), ("sharpening", "--teacher-temperature 0.1"))
}
CLUSTERS = {
    "scan-init": "simclr.py --precision bf16 --epochs 15 --base-lr 2 --warmup-epochs 4",
    "scan": "more/scan.py --init runs/scan-init",
}
RUNS = SEVEN | COLLAPSED | MORE | FEW | REGRESS | COLLAPSES | CLUSTERS
PROTOCOLS = {name: "linear" for name in SEVEN | COLLAPSED}  # of evaluate.py
PROTOCOLS |= {name: "regress" for name in REGRESS} | {name: "cluster" for name in CLUSTERS}

# ------------------------------------------------------------------------------------------------------ logs


def folder_of(name: str) -> Path:
    return LOGS / name if name.partition("-seed")[0] in SEVEN | COLLAPSED else LOGS / "more" / name


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def seeds(name: str) -> list[Path]:
    """The folders of all seeds that there are logs of, seed 0 first."""
    found = [folder_of(name), *(folder_of(f"{name}-seed{seed}") for seed in range(1, 10))]
    return [folder for folder in found if (folder / "metrics.jsonl").exists()]


def knn(folder: Path) -> list[float]:
    """Online kNN in percent at every evaluation, the first of the untrained network."""
    return [100 * record["knn_top1"] for record in lines(folder / "metrics.jsonl") if "knn_top1" in record]


def judged(folder: Path, protocol: str) -> dict:
    return next(record for record in lines(folder / "results.jsonl") if record["protocol"] == protocol)


# --------------------------------------------------------------------------------------------------- columns


def percent(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def duration(folder: Path) -> str:
    """Of the program's own work if that is known; else from the command to its end."""
    taken = json.loads((folder / "taken.json").read_text()) if (folder / "taken.json").exists() else {}
    seconds = round(taken.get("cpu_seconds", taken.get("seconds", 0)))
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds else ""


def whole_time(folders: list[Path]) -> str:
    """From the command to its end, of seed 1."""
    return f"{json.loads((folders[1] / 'taken.json').read_text())['seconds']:.0f} s" if len(folders) > 1 else ""


def agreement(folder: Path, prefix: str) -> str:
    """Of clusters and classes: accuracy, NMI, ARI."""
    scores = judged(folder, "cluster")
    return " / ".join(f"{scores[prefix + name]:.3f}" for name in ("acc", "nmi", "ari") if prefix + name in scores)


def links(folders: list[Path]) -> str:
    return ", ".join(f"[{i}]({os.path.relpath(folder, PAGE.parent)})" for i, folder in enumerate(folders))


Column = Callable[[list[Path]], str]
COLUMNS: dict[str, Column] = {
    "untrained": lambda folders: percent([statistics.mean(knn(folder)[0] for folder in folders)]),
    "kNN of each seed": lambda folders: percent([knn(folder)[-1] for folder in folders]),
    "kNN: mean (range)": lambda folders: spread([knn(folder)[-1] for folder in folders]),
    "linear: mean (range)": lambda folders: spread([100 * judged(folder, "linear")["top1"] for folder in folders]),
    "gain": lambda folders: percent([statistics.mean(knn(folder)[-1] - knn(folder)[0] for folder in folders)]),
    "R2": lambda folders: ", ".join(f"{judged(folder, 'regress')['r2']:.3f}" for folder in folders),
    "mean absolute error": lambda folders: ", ".join(f"{judged(folder, 'regress')['mae']:.3f}" for folder in folders),
    "k-means: accuracy / NMI / ARI": lambda folders: ", ".join(agreement(folder, "") for folder in folders),
    "heads: accuracy / NMI / ARI": lambda folders: ", ".join(agreement(folder, "heads_") for folder in folders),
    "time": lambda folders: duration(folders[-1]),
    "time of seed 1": whole_time,
    "log": links,
}
TABLES: dict[str, tuple[dict[str, str], list[str]]] = {
    "seven": (SEVEN | COLLAPSED, ["untrained", "kNN: mean (range)", "linear: mean (range)", "time of seed 1", "log"]),
    "more": (MORE, ["untrained", "kNN of each seed", "time", "log"]),
    "more-cifar": (FEW, ["untrained", "kNN of each seed", "gain", "time", "log"]),
    "regress": (REGRESS, ["R2", "mean absolute error", "kNN of each seed", "log"]),
    "collapses": (COLLAPSES, ["untrained", "kNN of each seed", "log"]),
    "clusters": (CLUSTERS, ["k-means: accuracy / NMI / ARI", "heads: accuracy / NMI / ARI", "time", "log"]),
}


def table(name: str) -> str:
    runs, columns = TABLES[name]
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for run, command in runs.items():
        if folders := seeds(run):
            rows.append([f"`python {command}`", *(COLUMNS[column](folders) for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(text: str) -> str:
    """The page with every table anew, between `<!-- table NAME -->` and `<!-- end -->`."""

    def anew(found: re.Match) -> str:
        return f"{found[1]}\n{table(found[2])}\n{found[3]}"

    return re.sub(r"(<!-- table ([\w-]+) -->)\n.*?(<!-- end -->)", anew, text, flags=re.S)


# ------------------------------------------------------------------------------------------------------ runs


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()[:10]


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"


def take(name: str) -> None:
    """Run and judge; keep the log."""
    base, _, seed = name.partition("-seed")
    run = ROOT / "runs" / "results" / name
    line = [*shlex.split(RUNS[base]), *(["--seed", seed] if seed else []), "--run-dir", str(run)]
    line += ["--eval-every", "1"] * (name in SEVEN | COLLAPSED)
    print("$ python", *line, flush=True)
    began, before = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    subprocess.run([sys.executable, *line], cwd=ROOT, check=True)
    facts = {"commit": commit(), "torch": torch.__version__, "machine": machine()}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts |= {"date": str(datetime.date.today()), "seconds": round(time.perf_counter() - began, 1)}
    facts["cpu_seconds"] = round(used.ru_utime + used.ru_stime - before, 1)
    keep(name, run, facts)


def keep(name: str, run: Path, facts: dict) -> None:
    """Judge the encoder of `run` and copy its log; paths of this machine are left out."""
    base, folder = name.partition("-seed")[0], folder_of(name)
    protocol = PROTOCOLS.get(base)
    if protocol and protocol not in [record["protocol"] for record in lines(run / "results.jsonl")]:
        judge = [sys.executable, "evaluate.py", str(run), "--protocol", protocol]
        subprocess.run(judge, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    folder.mkdir(parents=True, exist_ok=True)
    flags = json.loads((run / "args.json").read_text())
    flags |= {"run_dir": f"runs/{name}", "data_dir": Path(flags["data_dir"]).name}
    flags["init"] = flags["init"] and f"runs/{Path(flags['init']).name}"
    (folder / "args.json").write_text(json.dumps(flags, indent=1) + "\n")
    (folder / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    results = [record | {"weights": f"runs/{name}"} for record in lines(run / "results.jsonl")]
    for record in results:
        record["flags"]["data_dir"] = flags["data_dir"]
    if results:
        (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in results))
    (folder / "taken.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            PAGE.write_text(page(PAGE.read_text()))
        case ["take", *names]:
            for name in names:
                take(name)
        case ["keep", name, folder, *facts]:
            facts = dict(fact.split("=", 1) for fact in facts)  # commit=... torch=... machine=... date=... seconds=...
            numbers = {key: float(facts[key]) for key in ("seconds", "cpu_seconds") if key in facts}
            keep(name, Path(folder), facts | numbers)
        case _:
            sys.exit(__doc__)
