"""RotNet's rotations and loss against independent oracles; what the network sees, runs, and what crosses processes."""

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import quick
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from methods import metrics, narrow, small_folder, tiny
from strategies import numbers
from torch import Tensor
from worlds import run_on

import common
import rotnet
from rotnet import RotNet, rotation_loss, rotations

close = torch.testing.assert_close
IMAGES = st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 5)).flatmap(
    lambda shape: hnp.arrays(np.float64, (*shape, shape[-1]), elements=numbers()).map(torch.from_numpy)
)


@st.composite
def answers(draw) -> tuple[Tensor, Tensor]:
    """Logits (m, 4) and labels (m,)."""
    m = draw(st.integers(1, 9))
    logits = draw(hnp.arrays(np.float64, (m, 4), elements=numbers(8.0)))
    return torch.from_numpy(logits), torch.tensor(draw(st.lists(st.integers(0, 3), min_size=m, max_size=m)))


# -------------------------------------------------------------------------------------------------- rotations


def test_labels_count_quarter_turns_counter_clockwise():
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[None, None]
    want = [[[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]]
    assert rotations(x)[:, 0].tolist() == want


@given(IMAGES)
def test_each_image_is_turned_pixel_by_pixel_and_its_rotations_follow_each_other(x):
    before, got, side = x.clone(), rotations(x), x.shape[-1]
    assert got.shape == (4 * len(x), *x.shape[1:])
    for row, turned in enumerate(got):
        want = x[row // 4].tolist()
        for _ in range(row % 4):  # counter-clockwise: the last column becomes the first row
            want = [[[line[side - 1 - r] for line in channel] for r in range(side)] for channel in want]
        assert turned.tolist() == want
    close(x, before, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- loss


@given(answers())
def test_equals_the_equation_in_plain_loops(batch):
    total, hits = 0.0, 0
    for row, label in zip(*(t.tolist() for t in batch), strict=True):
        total -= math.log(math.exp(row[label]) / sum(map(math.exp, row)))
        hits += row.index(max(row)) == label
    loss, terms = rotation_loss(*batch)
    assert loss.item() == pytest.approx(total / len(batch[1]), rel=1e-9, abs=1e-9)
    assert terms["accuracy"].item() == pytest.approx(hits / len(batch[1]))


@given(answers(), st.randoms())
def test_a_shift_of_all_logits_and_the_order_of_rows_change_nothing(batch, random):
    logits, labels = batch
    order = random.sample(range(len(labels)), len(labels))
    shift = torch.tensor([random.uniform(-50, 50) for _ in labels], dtype=torch.float64)[:, None]
    close(rotation_loss((logits + shift)[order], labels[order])[0], rotation_loss(logits, labels)[0])


@given(answers())
def test_a_constant_output_costs_log_4_on_all_four_rotations(batch):
    """So no network gains by collapsing."""
    logits = batch[0][:1].expand(4, -1)
    loss, terms = rotation_loss(logits, torch.arange(4))
    assert loss.item() >= math.log(4) - 1e-12 and terms["accuracy"].item() == 0.25
    assert rotation_loss(torch.full((4, 4), 3.0), torch.arange(4))[0].item() == pytest.approx(math.log(4))


@settings(max_examples=15)
@given(answers())
def test_gradient_is_that_of_finite_differences(batch):
    logits, labels = batch
    assert torch.autograd.gradcheck(lambda t: rotation_loss(t, labels)[0], logits.requires_grad_())


@given(answers())
def test_inputs_are_left_alone_and_terms_have_no_gradient(batch):
    before = copy.deepcopy(batch)
    loss, terms = rotation_loss(batch[0].requires_grad_(), batch[1])
    loss.backward()
    assert not any(term.requires_grad or term.ndim for term in terms.values())
    close((batch[0].detach(), batch[1]), before, rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_computes_in_float32_whatever_the_network_computed_in(half):
    generator = torch.Generator().manual_seed(0)
    logits, labels = (20 * torch.randn(64, 4, generator=generator)).to(half), torch.arange(64) % 4
    want, _ = rotation_loss(logits.double(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        got, terms = rotation_loss(logits, labels)
    assert {got.dtype, terms["accuracy"].dtype} == {torch.float32} and want.dtype == torch.float64
    close(got.double(), want, rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------- network, runs


def test_one_batch_for_batchnorm_and_a_gradient_for_every_weight(tmp_path):
    torch.manual_seed(0)
    model = RotNet(tiny("rotnet", tmp_path))
    x = rotations(torch.rand(4, 3, 16, 16))
    logits, h = model(x)
    rotation_loss(logits, torch.arange(16) % 4)[0].backward()
    assert logits.shape == (16, 4) and h.shape == (16, 512)
    close(model.classifier(h), logits)
    assert model.backbone.bn1.num_batches_tracked == 1
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


@pytest.fixture
def train(tmp_path, monkeypatch):
    args = rotnet.Args(image_size=16, batch_size=8, epochs=2, base_lr=1.0)
    return quick.trainer(rotnet, args, 24, tmp_path, monkeypatch)


def test_every_step_trains_on_all_rotations_of_the_batch_and_watches_the_features(train, monkeypatch):
    seen, reported = [], []
    forward, report = RotNet.forward, common.Run.report

    def spy_forward(self, x):
        seen.append((x, *forward(self, x)))
        return seen[-1][1:]

    def spy_loss(logits, labels):
        x, given, _ = seen[-1]
        close(x, rotations(x[::4]), rtol=0, atol=0)
        assert len(x) == 32 and logits is given and labels.tolist() == [0, 1, 2, 3] * 8
        return rotation_loss(logits, labels)

    def spy_report(self, step, loss, terms, lr, z):
        reported.append(z is seen[-1][2])
        report(self, step, loss, terms, lr, z)

    monkeypatch.setattr(RotNet, "forward", spy_forward)
    monkeypatch.setattr(rotnet, "rotation_loss", spy_loss)
    monkeypatch.setattr(common.Run, "report", spy_report)
    train()
    assert reported == [True] * 6


def test_images_that_have_an_up_are_learned_and_after_random_turns_they_are_not(train, monkeypatch, tmp_path):
    """Bright at the top: the rotation shows. Turned at random by a quarter, as likely as any other, it does not."""
    ramp = torch.linspace(255, 0, 16)[:, None].expand(24, 3, 16, 16)
    turned = torch.stack([image.rot90(i % 4, (1, 2)) for i, image in enumerate(ramp)])
    for name, images in (("up", ramp), ("none", turned)):
        data = common.Data(images.to(torch.uint8), None, torch.full((24,), -1), [])
        monkeypatch.setattr(common, "load_data", lambda *_, data=data: (data, None))
        train(name, epochs=20, log_every=1, flip=False)
    up, none = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("up", "none"))
    assert up[0] > 0.8 and max(up[-5:]) < 0.1
    assert min(none) > 1.2


@pytest.mark.parametrize("flag", ["color_jitter", "grayscale", "blur", "flip"])
def test_changes_of_colour_are_off_and_can_be_had(flag):
    args = rotnet.Args(image_size=16)
    x = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, with_it = (dataclasses.replace(args, **{flag: on}) for on in (False, True))

    def view(args):
        (crop,), draws = rotnet.crops(args), common.Draws((1, 2), 64)
        return rotnet.augment(common.random_resized_crop(x, draws, crop), draws, args)

    assert getattr(args, flag) == (flag == "flip")
    assert not torch.equal(view(plain), view(with_it))


def test_a_resumed_run_is_the_same(train):
    train("parts", max_steps=4)
    whole, parts = train("whole"), train("parts")
    close(parts["model"], whole["model"], rtol=0, atol=0)
    close(parts["optimizer"], whole["optimizer"], rtol=0, atol=0)


def test_the_recipes_fit():
    for name, recipe in rotnet.RECIPES.items():
        common.check_flags(rotnet.Args(**{**recipe, "recipe": name, "data_dir": "images" * (name == "imagenet")}))


# -------------------------------------------------------------------------------------------------- processes


def gradient() -> tuple[Tensor, Tensor]:
    """(loss, gradient) averaged over ranks as DDP does it; rows that grow from rank to rank."""
    _, world = common.rank_and_world()
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(48, 4, generator=generator, dtype=torch.float64) * torch.arange(1, 49)[:, None] / 10
    logits = everyone[common.my_rows(48)].clone().requires_grad_()
    loss, _ = rotation_loss(logits, torch.arange(len(logits)) % 4)
    loss.backward()
    with torch.no_grad():
        return common.all_gather(loss[None]).mean(), common.all_gather(logits.grad) / world


def run_of(folder: str, data_dir: str, steps: int) -> dict[str, float]:
    rotnet.backbone = narrow
    flags = {"epochs": 2, "max_steps": steps, "eval_every": 2, "save_every": 2, "precision": "fp64"}
    return rotnet.main(tiny("rotnet", Path(folder), data_dir=data_dir, **flags))


def test_several_processes_give_the_gradient_of_one_and_the_same_run(tmp_path):
    """Begun on two processes, a run goes on on one, too."""
    want, gradients = gradient()
    assert gradients.abs().max() > 1e-6
    data = small_folder()

    def job(name: str, steps: int):
        return run_of, (str(tmp_path / name), data, steps)

    run_on(1, [job("1", 6)])
    for world in (2, 4):
        jobs = [(gradient, ())] + [job("2", 6), job("2 then 1", 3)] * (world == 2)
        for loss, got in run_on(world, jobs)[0]:
            close(loss, want, rtol=1e-10, atol=1e-12)
            close(got, gradients, rtol=1e-10, atol=1e-10)
    run_on(1, [job("2 then 1", 6)])
    for other in ("2", "2 then 1"):
        lines = [[line for line in metrics(tmp_path / run) if "loss" in line] for run in ("1", other)]
        assert len(lines[0]) == len(lines[1]) == 6
        for a, b in zip(*lines, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"images_per_s"}:
                assert math.isclose(a[key], b[key], rel_tol=1e-9, abs_tol=1e-10), (other, a["step"], key)
        saved = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["model"] for run in ("1", other)]
        close(saved[1], saved[0], rtol=1e-7, atol=1e-9)
