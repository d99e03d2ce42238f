"""evaluate.py --protocol cluster: scores that are known, k-means that finds what is there, and the heads of scan.py."""

import importlib.util
import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate_faults import encoder, judge, refused, results, run_folder

import evaluate
from evaluate import cluster_scores

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="needs scikit-learn")

FEW = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


def test_the_scores_of_a_known_case():
    prediction, truth = (torch.tensor([int(digit) for digit in word]) for word in ("1100022221", "0001112222"))
    want = {"acc": 0.7, "nmi": 0.44270128, "ari": 0.20454545}
    assert cluster_scores(prediction, truth) == pytest.approx(want, abs=5e-9)


@given(FEW)
def test_accuracy_is_that_of_the_best_of_all_one_to_one_matchings(pairs):
    prediction, truth = (torch.tensor(side) for side in zip(*pairs, strict=True))
    best = max(sum(p[c] == k for c, k in pairs) for p in itertools.permutations(range(4)))
    scores = cluster_scores(prediction, truth)
    assert scores["acc"] == pytest.approx(best / len(pairs)) and scores["nmi"] <= 1 + 1e-9 and scores["ari"] <= 1


@given(FEW, st.permutations(range(4)))
def test_the_names_of_the_clusters_mean_nothing(pairs, names):
    prediction, truth = (torch.tensor(side) for side in zip(*pairs, strict=True))
    renamed = 10 * torch.tensor(names)[prediction] - 7
    assert cluster_scores(renamed, truth) == pytest.approx(cluster_scores(prediction, truth))


def test_clusters_beyond_the_classes_are_wrong_and_one_for_all_knows_nothing():
    truth = torch.arange(40) % 4
    assert cluster_scores(7 - truth, truth) == pytest.approx({"acc": 1, "nmi": 1, "ari": 1})
    halves = truth + 4 * (torch.arange(40) < 20)  # each class in two clusters of one size
    assert cluster_scores(halves, truth)["acc"] == 0.5
    assert cluster_scores(torch.zeros(40), truth) == pytest.approx({"acc": 0.25, "nmi": 0, "ari": 0})


def test_kmeans_finds_directions_whatever_the_lengths_and_belongs_to_the_seed():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 6
    x = torch.eye(6)[y] + 0.1 * torch.randn(600, 6, generator=generator)
    x = x * torch.rand(600, 1, generator=generator).mul(4).exp()
    found = evaluate.kmeans(x[:400], x[400:], 6, seed=3)
    assert found.shape == (200,) and cluster_scores(found, y[400:])["acc"] == 1
    noise = torch.randn(300, 4, generator=generator)
    again = [evaluate.kmeans(noise, noise, 6, seed) for seed in (1, 1, 2)]
    assert np.array_equal(again[0], again[1]) and not np.array_equal(again[0], again[2])


def test_features_that_are_all_the_same_are_one_cluster_and_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(evaluate.kmeans(torch.ones(8, 3), torch.ones(5, 3), 4, seed=0).tolist()) == {0}


# ----------------------------------------------------------------------------------------------- whole program

SCORES = ("acc", "nmi", "ari")


def heads(folder: Path, **changed) -> Path:
    """As a run of scan.py leaves them: of two heads with four clusters, the second has the lower loss."""
    generator = torch.Generator().manual_seed(0)
    state = {"heads.weight": torch.randn(8, 512, generator=generator), "heads.bias": torch.zeros(8)}
    torch.save(state | {"losses": torch.tensor([-3.0, -4.0])} | changed, folder / "heads.pt")
    return folder


def test_images_are_sorted_by_kmeans_and_by_the_head_with_the_lowest_loss(tmp_path, monkeypatch):
    folder, seen = heads(run_folder(tmp_path / "run")), []

    def spy(prediction, truth):
        seen.append((torch.as_tensor(prediction), truth))
        return cluster_scores(prediction, truth)

    monkeypatch.setattr(evaluate, "cluster_scores", spy)
    record = judge(folder, "cluster")
    (found, truth), (sorted_by_head, also) = seen
    assert len(truth) == 40 and torch.equal(truth, also) and set(found.tolist()) <= set(range(4))
    want = cluster_scores(found, truth) | {f"heads_{k}": v for k, v in cluster_scores(sorted_by_head, truth).items()}
    assert {name: record[name] for name in want} == want
    first, second = torch.load(folder / "heads.pt")["heads.weight"].split(4)
    for weight, same in ((first, False), (second, True)):
        heads(folder, **{"heads.weight": torch.cat([weight, weight])})
        seen.clear()
        judge(folder, "cluster")
        assert torch.equal(seen[1][0], sorted_by_head) == same


@pytest.mark.parametrize("what", ["no heads.pt", "another method's", "a bare file", "scratch"])
def test_other_runs_and_files_have_no_cluster_heads(what, tmp_path):
    folder = run_folder(tmp_path / "run")
    if what != "no heads.pt":
        heads(folder)
    if what == "another method's":
        torch.save({"projector.0.weight": torch.ones(2, 2)}, folder / "heads.pt")
    record = judge(folder / "encoder.pt" if what == "a bare file" else folder, "cluster", scratch=what == "scratch")
    assert [name for name in record if name.endswith(SCORES)] == list(SCORES)


DAMAGED = {
    "another width": {"heads.weight": torch.zeros(8, 64)},
    "nan": {"heads.weight": torch.full((8, 512), torch.nan)},
    "infinite": {"heads.bias": torch.full((8,), torch.inf)},
    "too few": {"heads.bias": torch.zeros(7)},
    "three heads": {"losses": torch.zeros(3)},
    "no head": {"losses": torch.zeros(0)},
    "a number": {"losses": 3},
    "text": None,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_heads_are_refused_in_one_line(damage, tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    if damage == "text":
        (folder / "heads.pt").write_text("text")
    else:
        heads(folder, **DAMAGED[damage])
    with refused(capsys, 2, str(folder / "heads.pt"), str(folder / "encoder.pt")):
        judge(folder, "cluster")


def test_fewer_images_than_clusters_are_refused(tmp_path, capsys):
    with refused(capsys, 2, "--protocol cluster", "4 clusters"):
        judge(run_folder(tmp_path / "run"), "cluster", train_limit=3)


@pytest.mark.parametrize("package, name", [("sklearn", "scikit-learn"), ("scipy", "scipy")])
def test_a_package_that_is_missing_is_named_in_one_line(package, name, tmp_path, monkeypatch, capsys):
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *more: asked != package and usual(asked, *more))
    folder = run_folder(tmp_path / "run", encoder())
    with refused(capsys, 2, "--protocol cluster", f"pip install {name}"):
        evaluate.main(evaluate.Args(str(folder), protocol="cluster"))
    assert not (folder / "results.jsonl").exists()


def test_the_result_is_kept(tmp_path, capsys):
    record = judge(heads(run_folder(tmp_path / "run")), "cluster")
    (kept,) = results(tmp_path / "run")
    assert kept == json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(record))
