"""Folders of every shape, files of every kind, and the order and sameness of batches."""

import contextlib
import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from methods import METHODS, metrics, module, run
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import run_on

import common
from common import Crop

CPU = torch.device("cpu")
FP32, FP64 = (common.compute_in(precision, CPU)[0] for precision in ("fp32", "fp64"))
close = torch.testing.assert_close


def write(file: Path, size: tuple[int, int] = (20, 24), colour: int | None = None) -> None:
    """A PNG of (width, height) `size`, of one colour or of noise that depends on the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(list(file.name.encode()))
    pixels = random.integers(0, 256, (*size[::-1], 3)) if colour is None else np.full((*size[::-1], 3), colour)
    Image.fromarray(pixels.astype(np.uint8)).save(file)


def load(root: Path, train_limit: int = 0) -> tuple[common.Data, common.Data | None]:
    return common.load_data("folder", str(root), train_limit, CPU)


def batches(data, crops, steps: range, workers: int = 0, batch_size: int = 4, compute=FP32) -> list[common.Batch]:
    return list(common.batches(data, crops, steps, batch_size, 0, compute, workers))


# ------------------------------------------------------------------------------------------------- layouts


def test_classes_and_validation_split(tmp_path):
    for name in ("train/cat/b.png", "train/cat/a.png", "train/dog/deep/c.png", "val/dog/d.png", "train/.trash/e.png"):
        write(tmp_path / name)
    train, test = load(tmp_path)
    assert train.classes == ["cat", "dog"] and train.labels.tolist() == [0, 0, 1]
    assert test.labels.tolist() == [1], "the number of a class is that of the training images"


@pytest.mark.parametrize("names", [["train/a.png", "train/b.png"], ["a.png", "b.png"], ["x/a.png", "x/b.png"]])
def test_without_classes_there_are_no_labels_and_no_test_split(tmp_path, names):
    for name in [*names, "val/cat/v.png"]:
        write(tmp_path / name)
    train, test = load(tmp_path)
    assert train.labels.tolist() == [-1, -1] and train.classes == [] and test is None


def test_classes_without_train_folder(tmp_path):
    for name in ("cat/a.png", "dog/b.png", "test/cat/t.png", "readme.txt", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("no image")
    train, test = load(tmp_path)
    assert train.labels.tolist() == [0, 1] and test.labels.tolist() == [0]


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: write(p / "a.txt.png" / "x.gif.txt")])
def test_a_missing_or_empty_folder_is_answered_in_one_line(tmp_path, capsys, make):
    if make.__code__.co_names != ("write",):
        make(tmp_path / "photos")
    with pytest.raises(SystemExit) as end:
        load(tmp_path / "photos")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--data-dir" in said and said.count("\n") == 1


def test_a_split_with_a_class_of_its_own_is_named_and_left_out(tmp_path, capsys):
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/emu/d.png", "test/dog/e.png"):
        write(tmp_path / name)
    train, test = load(tmp_path)
    said = capsys.readouterr().err
    assert "'emu'" in said and said.count("\n") == 1
    assert train.labels.tolist() == [0, 1] and test.labels.tolist() == [1]


@pytest.mark.parametrize("link, to", [("train/latest", "."), ("train/dog/up", "../..")])
def test_a_link_back_to_a_folder_above_is_not_followed_and_other_links_are(link, to, tmp_path):
    for name in ("root/train/cat/a.png", "root/train/dog/b.png", "elsewhere/c.png"):
        write(tmp_path / name)
    (tmp_path / "root" / link).symlink_to(to)
    (tmp_path / "root" / "train" / "emu").symlink_to(tmp_path / "elsewhere")
    train, _ = load(tmp_path / "root")
    assert train.classes == ["cat", "dog", "emu"] and train.labels.tolist() == [0, 1, 2]


# What lies in the folder; what is said of it; the labels of the training images and of the test images.
LAYOUTS = {
    "CIFAR-100 has a class called train": (
        "apple/a tractor/b train/c test/apple/d test/train/e",
        ["read as <class>/*, tested on test"], [0, 1, 2], [0, 2],
    ),
    "the class train inside the split train": (
        "train/apple/a train/train/b test/train/c", ["read as train/<class>/*, tested on test"], [0, 1], [1]
    ),
    "capital letters": (
        "Train/cat/a Train/dog/b Test/dog/c", ["read as train/<class>/*, tested on test"], [0, 1], [1]
    ),
    "another name of val": ("train/a/x train/b/x valid/b/x", ["tested on val"], [0, 1], [1]),
    "val before test": (
        "train/a/x train/b/x val/a/x test/b/x", ["tested on val", "left out test, as val is there"], [0, 1], [0]
    ),
    "folders beside train": ("train/a/x train/b/x extra/x extra/y y", ["left out 3 images beside"], [0, 1], None),
    "train without classes": ("train/x train/y", ["read as train/*, tested on nothing"], [-1, -1], None),
    "an image beside the classes": ("a/x b/x stray", ["1 training images have no label"], [-1, 0, 1], None),
    "an image beside the classes of test": (
        "train/a/x train/b/x test/a/x test/b/x test/stray", ["left out 1 images in test"], [0, 1], [0, 1]
    ),
    "a test split without classes": ("a/x b/x test/x test/y", ["2 images in test", "on nothing"], [0, 1], None),
    "a run in the folder": (
        "a/x b/x runs/vicreg/tsne runs/vicreg/args.json runs/vicreg/metrics.jsonl", ["1 folders of runs"], [0, 1], None
    ),
    "pictures of a camera": ("a/x b/x a/1.HEIC b/2.heic b/n.txt", ["2 .heic files", "1 .txt files"], [0, 1], None),
}  # fmt: skip


@pytest.mark.parametrize("names, told, train_labels, test_labels", LAYOUTS.values(), ids=LAYOUTS)
def test_how_a_folder_was_read_and_what_was_left_out_is_said(names, told, train_labels, test_labels, tmp_path, capsys):
    for name in names.split():
        write(tmp_path / f"{name}.png") if "." not in name else None
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("") if "." in name else None
    train, test = load(tmp_path)
    out, err = capsys.readouterr()
    assert all(words in out + err for words in told), out + err
    assert train.labels.tolist() == train_labels and (test and test.labels.tolist()) == test_labels


def test_folders_that_link_to_each_other_are_read_once(tmp_path, capsys):
    for here, there in ("ab", "ba"):
        write(tmp_path / here / "x.png")
        (tmp_path / here / there).symlink_to(tmp_path / there)
    assert len(load(tmp_path)[0]) == 2 and "read already" in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """By a process that is not the superuser, who may read everything."""
    for name in ("cat/a.png", "dog/b.png", "emu/c.png"):
        write(tmp_path / name)
    (tmp_path / "emu").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above may be the superuser's own
    read, end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with contextlib.suppress(PermissionError):
                os.setuid(65534)
            with open(end, "w") as sys.stderr:
                assert load(Path("."))[0].classes == ["cat", "dog"]
            os._exit(0)
        finally:
            os._exit(1)
    os.close(end)
    with open(read) as said:
        assert "emu (Permission denied)" in said.read()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("side, view", [(20, 32), (63, 32), (64, 64), (96, 96), (300, 96)])
def test_without_image_size_the_views_follow_the_images_and_one_line_says_so(side, view, tmp_path, capsys):
    for i in range(3):
        write(tmp_path / f"{i}.png", (side, side + 4 * i))
    assert common.usual_view(load(tmp_path)[0]) == view
    said = capsys.readouterr().out
    assert all((flag in said) == (side >= 96) for flag in ("--image-size", "--arch", "--batch-size"))


def test_equal_sizes_are_kept_in_memory_and_mixed_ones_are_not(tmp_path):
    for i in range(5):
        write(tmp_path / "same" / f"{i}.png")
        write(tmp_path / "mixed" / f"{i}.png", (20 + i, 24))
    assert load(tmp_path / "same")[0].pixels.shape == (5, 3, 24, 20)
    assert load(tmp_path / "mixed")[0].pixels is None
    for i in range(2):  # would be batches of gigabytes
        write(tmp_path / "large" / f"{i}.png", (300, 24))
    assert load(tmp_path / "large")[0].pixels is None


def test_a_folder_of_nothing_that_can_be_decoded_is_refused(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SystemExit) as end:
        load(tmp_path)
    said = capsys.readouterr().err
    assert end.value.code == 2 and str(tmp_path) in said and ".png" in said and said.count("\n") == 1


def test_films_and_scientific_data_are_not_taken_for_images(tmp_path):
    for name in ("a.h5", "b.mpg", "c.eps"):
        (tmp_path / name).write_text("no image")
    write(tmp_path / "d.png")
    assert len(load(tmp_path)[0]) == 1


def test_train_limit_takes_the_same_random_subset_whatever_torch_was_seeded_with(tmp_path):
    for i in range(20):
        write(tmp_path / f"{i:02}.png", (20 + i, 24))
    everything, subsets = load(tmp_path)[0].files.tolist(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        subsets.append(load(tmp_path, train_limit=7)[0].files.tolist())
    first, second = subsets
    assert first == second == sorted(first) and len(first) == 7 and first != everything[:7]


# --------------------------------------------------------------------------------------------------- files


def rgb(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.array(common.to_rgb(image))


def test_every_mode_becomes_rgb_by_the_stated_rule(tmp_path):
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = np.stack([ramp] * 3, 2)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    assert (rgb(tmp_path / "grey.png") == grey).all()
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "16bit.png")
    assert (rgb(tmp_path / "16bit.png") == grey).all()
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    assert (rgb(tmp_path / "float.tiff") == grey).all()
    Image.fromarray(ramp).convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(rgb(tmp_path / "bits.png"))) <= {0, 255}
    palette = Image.fromarray(grey).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert (rgb(tmp_path / "palette.png") == np.array(palette.convert("RGB"))).all()
    alpha = np.concatenate([grey, np.zeros((8, 8, 1), np.uint8)], 2)
    alpha[:4, :, 3] = 255
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    assert (rgb(tmp_path / "alpha.png")[:4] == grey[:4]).all() and (rgb(tmp_path / "alpha.png")[4:] == 255).all()
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(rgb(tmp_path / "cmyk.jpg").astype(int) - grey).max() < 12
    first, second = Image.fromarray(grey), Image.fromarray(255 - grey)
    first.save(tmp_path / "film.gif", save_all=True, append_images=[second])
    assert np.abs(rgb(tmp_path / "film.gif").astype(int) - grey).max() < 12
    Image.fromarray(grey[:1, :1]).save(tmp_path / "one.png")
    assert rgb(tmp_path / "one.png").shape == (1, 1, 3)


# Where the first row and the first column of the file are seen, as the EXIF standard says it.
ORIENTATION_MEANS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", ORIENTATION_MEANS)
def test_a_turned_file_is_turned_once_so_that_its_corners_are_where_exif_says(tmp_path, suffix, orientation):
    """The quarters of the file are black, red, green and blue."""
    colours = np.array([[(0, 0, 0), (255, 0, 0)], [(0, 255, 0), (0, 0, 255)]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(colours.repeat(16, 0).repeat(32, 1)).save(file, exif=exif, quality=95)  # 64 wide, 32 high
    with Image.open(file) as image:
        size, upright = common.upright_size(image), np.asarray(common.to_rgb(image)).astype(int)
    first_row, first_column = ORIENTATION_MEANS[orientation]
    assert size == upright.shape[1::-1] == ((64, 32) if first_row in ("top", "bottom") else (32, 64))
    for (row, column), colour in zip(np.ndindex(2, 2), colours.reshape(4, 3), strict=True):
        sides = {OPPOSITE[first_row] if row else first_row, OPPOSITE[first_column] if column else first_column}
        seen = upright[-4 if "bottom" in sides else 3, -4 if "right" in sides else 3]
        assert np.abs(seen - colour).max() < 30, sides


ORIENTATIONS = {
    "nine": b"\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",
    "text": b"\x12\x01\x02\0\x04\0\0\0six\0",
    "bytes": b"\x12\x01\x07\0\x02\0\0\0\x06\0\0\0",
    "two numbers": b"\x12\x01\x03\0\x02\0\0\0\x09\0\x09\0",
    "a fraction beyond the end": b"\x12\x01\x05\0\x01\0\0\0\xff\xff\xff\xff",
}
DAMAGED = {name: b"II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0" for name, entry in ORIENTATIONS.items()}
DAMAGED |= {"nothing": b"", "no header": b"six", "no directory": b"II*\0\xff\xff\xff\xff", "noise": bytes(range(40))}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("exif", DAMAGED)
def test_an_image_with_damaged_exif_is_upright(tmp_path, exif):
    write(tmp_path / "a.png", (40, 24))
    Image.open(tmp_path / "a.png").save(tmp_path / "b.jpg", exif=b"Exif\0\0" + DAMAGED[exif])
    with Image.open(tmp_path / "b.jpg") as image:
        plain = np.asarray(image)
    with Image.open(tmp_path / "b.jpg") as image:
        assert common.upright_size(image) == (40, 24)
        assert np.array_equal(common.to_rgb(image), plain)


def spoil(folder: Path, count: int) -> list[str]:
    """Files that look like images and are none: text, empty, cut off, noise."""
    write(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    kinds = [b"this is text", b"", whole[: len(whole) // 3], bytes(range(256)) * 4]
    for i in range(count):
        (folder / f"bad{i:02}.jpg").write_bytes(kinds[i % len(kinds)])
    return [f"bad{i:02}.jpg" for i in range(count)]


@pytest.mark.parametrize("sizes", ["same", "mixed"])
def test_a_file_that_cannot_be_decoded_is_named_once_and_replaced(tmp_path, capsys, sizes):
    for i in range(12):
        write(tmp_path / f"{i:02}.png", (20 + i * (sizes == "mixed"), 24))
    bad = spoil(tmp_path, 4)
    (tmp_path / "whole.jpg").unlink()
    train, _ = load(tmp_path)
    assert (train.pixels is None) == (sizes == "mixed")
    seen = batches(train, [Crop(16, (0.08, 1))] * 2, range(12))
    said = capsys.readouterr().err
    assert len(seen) == 12 and all(view.x.isfinite().all() for batch in seen for view in batch)
    assert all(said.count(name) == 1 for name in bad) and said.count("\n") == 4
    list(common.centred_views(train, range(16), 16, FP32, workers=0))
    assert capsys.readouterr().err == "", "they are known by now"


def test_more_than_ten_bad_files_stop_the_run(tmp_path, capsys):
    for i in range(30):
        write(tmp_path / f"{i:02}.png", (20 + i, 24))
    spoil(tmp_path, 11)
    with pytest.raises(SystemExit) as end:
        train, _ = load(tmp_path)
        batches(train, [Crop(16, (0.08, 1))], range(40))
    assert end.value.code == 2 and "11 of 42 files cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["same", "mixed"])
def test_the_label_goes_with_the_image_that_replaces_a_bad_one(tmp_path, sizes):
    """The last image of class a is bad, and what follows it is of class b; so in the test split."""
    for split, count in (("train", 6), ("val", 3)):
        for i in range(count):
            for name in "ab":
                write(
                    tmp_path / split / name / f"{i}.png",
                    (20 + i * (sizes == "mixed"), 24),
                    colour=100 * "ab".index(name),
                )
        (tmp_path / split / "a" / f"{count - 1}.png").write_bytes(b"cut")
    train, val = load(tmp_path)
    index = []
    for batch in batches(train, [Crop(16, (0.08, 1))], range(6)):
        shown = (batch.views[0].x[:, 0, 0, 0] > 0.2).long()
        assert torch.equal(batch.labels, shown) and torch.equal(train.labels[batch.index], shown)
        index += batch.index.tolist()
    assert 5 not in index or sizes == "same", "a batch says which image it took"
    judge = common.Judge(16, (0.0,) * 3, (1.0,) * 3, FP32, 0)
    colour = judge.features(torch.nn.Flatten(), val)[:, 0]
    assert torch.equal(val.labels, (colour > 0.2).long())


def spoiled_run(root: Path, workers: int) -> str:
    """What is said of images that have good headers and no content, once they are needed."""
    for i in range(15):
        write(root / f"{i:02}.jpg", (200 + i, 200))
        whole = (root / f"{i:02}.jpg").read_bytes()
        (root / f"{i:02}.jpg").write_bytes(whole[: len(whole) // 3])
    train, _ = load(root)
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        batches(train, [Crop(16, (0.08, 1))], range(2), workers)
    assert end.value.code == 2
    STILL_HELD.append(end)
    return said.getvalue()


STILL_HELD = []


def test_images_with_good_headers_and_no_content_are_answered_in_one_line(tmp_path):
    said = spoiled_run(tmp_path, workers=0)
    assert said.count("\n") == 1 and "of 15 files cannot be decoded" in said and "truncated" in said


def test_so_they_are_with_workers_and_the_program_ends_although_these_ignore_sigterm(tmp_path):
    """Something still holds the loader when the program ends, as a debugger does."""
    program = "import test_data, pathlib, sys; print(test_data.spoiled_run(pathlib.Path(sys.argv[1]), workers=1))"
    ended = run([sys.executable, "-c", program, str(tmp_path)], timeout=60, PYTHONPATH=os.pathsep.join(sys.path))
    assert ended.returncode == 0 and ended.stdout.count("of 15 files cannot be decoded") == 1, ended.stderr


def test_a_flood_of_bad_files_is_named_ten_times_at_most(tmp_path, capsys):
    for i in range(2000):
        (tmp_path / f"{i:04}.png").write_bytes(b"")
    write(tmp_path / "0000.png")
    train = common.Data(None, common.list_images(tmp_path)[0], torch.zeros(2000), [])
    for i in range(1, 16):
        common.count_bad(train, [(f"{i}.png", "empty")])
    assert capsys.readouterr().err.count("\n") == 10
    with pytest.raises(SystemExit):
        load(tmp_path)
    assert capsys.readouterr().err.count("\n") == 1


def read_by_rank(folders: list[str]) -> str:
    """What a rank says that reads a folder of its own."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        load(Path(folders[common.rank_and_world()[0]]))
    return f"{end.value.code} {said.getvalue()}"


def test_ranks_that_see_other_images_are_told_so_before_they_train(tmp_path):
    for name in ("one/a.png", "one/b.png", "two/a.png", "two/c.png"):
        write(tmp_path / name)
    first, second = run_on(2, [(read_by_rank, ([str(tmp_path / "one"), str(tmp_path / "two")],))])[0]
    assert first.startswith("2 ") and "not the same on rank 1" in first and first.count("\n") == 1
    assert second == "2 "


# ------------------------------------------------------------------------------------------------- batches


@pytest.fixture(params=["resident", "files"])
def data(request, tmp_path) -> common.Data:
    for i in range(14):
        write(tmp_path / f"{i:02}.png", (20 + i * (request.param == "files"), 24))
    return load(tmp_path)[0]


CROPS = [Crop(16, (0.08, 1.0)), Crop(8, (0.05, 0.14), "bilinear")]


def test_an_epoch_takes_every_image_at_most_once_and_no_short_batch(data):
    """Each image is painted in its own colour, so that a view tells which image it comes from."""
    if data.pixels is not None:
        data.pixels[:] = torch.arange(14, dtype=torch.uint8)[:, None, None, None]
    else:
        for i, file in enumerate(data.files):
            write(Path(file.decode()), (20 + i, 24), colour=i)
    taken = batches(data, CROPS, range(6))
    seen = [(255 * batch.views[0].x[:, 0, 0, 0]).round().int().tolist() for batch in taken]
    assert [len(batch) for batch in seen] == [4] * 6
    first, second = [i for b in seen[:3] for i in b], [i for b in seen[3:] for i in b]
    assert len(set(first)) == len(set(second)) == 12 and first != second
    assert [batch.index.tolist() for batch in taken] == seen, "a batch says which images it took"


def test_views_have_their_sizes_and_range_and_a_batch_its_labels(data):
    data.labels = torch.arange(14) * 10
    (batch,) = batches(data, CROPS, range(1))
    (large, draws), (small, _) = batch
    assert large.shape == (4, 3, 16, 16) and small.shape == (4, 3, 8, 8)
    assert large.dtype == torch.float32 and large.min() >= 0 and large.max() <= 1
    assert draws.chance(0.5).shape == (4,)
    assert torch.equal(batch.labels, 10 * batch.index)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_any_start_any_number_of_workers_gives_the_same_views(data):
    def steps(first: int, workers: int) -> list[list[torch.Tensor]]:
        taken = batches(data, CROPS, range(first, 5), workers)
        return [[t for x, draws in batch for t in (x, draws.uniform(0, 1))] for batch in taken]

    want = steps(0, 0)
    for first, workers in [(0, 0), (2, 0), (4, 0)] + ([(0, 1), (3, 3)] if data.pixels is None else []):
        for expected, got in zip(want[first:], steps(first, workers), strict=True):
            for a, b in zip(expected, got, strict=True):
                close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_neighbours_stand_where_their_images_stand_and_look_different(data):
    """Of each image one neighbour at random, whatever the step begun at and the workers; its views are its own."""
    data.labels = torch.arange(14) * 10
    table = torch.stack([(torch.arange(14) + step) % 14 for step in (0, 3, 5)], 1).int()

    def taken(first: int, workers: int, neighbours: torch.Tensor = table) -> list[common.Batch]:
        steps = range(first, 12)
        return list(common.batches(data, CROPS, steps, 4, 0, FP32, workers, neighbours))

    own, near = batches(data, CROPS, range(12)), taken(0, 0)
    offsets = [(b.index - a.index) % 14 for a, b in zip(own, near, strict=True)]
    assert set(torch.cat(offsets).tolist()) == {0, 3, 5} and len({tuple(o.tolist()) for o in offsets}) > 6
    assert all(torch.equal(batch.labels, 10 * batch.index) and batch.index.dtype == torch.int64 for batch in near)
    for first, workers in [(3, 0)] + ([(3, 2)] if data.pixels is None else []):
        for expected, got in zip(near[first:], taken(first, workers), strict=True):
            assert torch.equal(expected.index, got.index)
            assert all(torch.equal(a.x, b.x) for a, b in zip(expected, got, strict=True))
    themselves = taken(0, 0, torch.arange(14)[:, None])
    for a, b in zip(own, themselves, strict=True):
        assert torch.equal(a.index, b.index)
        for (x, draws), (y, others) in zip(a, b, strict=True):
            assert not torch.equal(x, y) and not torch.equal(draws.uniform(0, 1), others.uniform(0, 1))


def test_the_order_of_an_epoch_and_the_draws_of_a_step_share_no_numbers():
    data = common.patterns("train", 8)
    orders = [order.tolist() for _, order in common.batch_indices(8, 8, range(4), seed=0)]  # one step per epoch
    for batch in batches(data, [Crop(8, (1, 1), "bilinear")] * 2, range(4), batch_size=8):
        for key in (view.draws.generator.bit_generator.seed_seq for view in batch):
            assert np.random.default_rng(key).permutation(8).tolist() not in orders


def taken(folder: Path) -> list[tuple]:
    """(index, labels, views) of this rank's slice of four batches."""
    batch_of = batches(load(folder)[0], CROPS, range(4), compute=FP64)
    return [(batch.index, batch.labels, [x for x, _ in batch]) for batch in batch_of]


def test_every_rank_takes_its_slice_of_the_same_batch(data, tmp_path):
    want = taken(tmp_path)
    for rank, got in enumerate(run_on(2, [(taken, (tmp_path,))])[0]):
        for (index, labels, part), (whole_index, whole_labels, whole) in zip(got, want, strict=True):
            assert torch.equal(index, whole_index) and torch.equal(labels, whole_labels)
            for x, full in zip(part, whole, strict=True):
                close(x, full[rank * 2 : rank * 2 + 2], rtol=0, atol=1e-12)


def test_test_views_are_the_images_asked_for_in_their_order_and_in_range(data):
    (views,) = common.centred_views(data, range(3, 9), 16, FP32, workers=0)
    assert views.shape == (6, 3, 16, 16) and views.min() >= 0 and views.max() <= 1 and views.std() > 0.1
    for row, view in zip(range(3, 9), views, strict=True):
        ((alone,),) = common.centred_views(data, range(row, row + 1), 16, FP32, workers=0)
        close(view, alone)
    assert len(views.unique(dim=0)) == 6


@pytest.mark.parametrize(
    "height, width, size, box",
    [(16, 16, 16, [0, 0, 16, 16]), (256, 320, 224, [16, 48, 224, 224]), (64, 64, 32, [4, 4, 56, 56])],
    ids=["images of the right size are taken whole", "ImageNet", "square"],
)
def test_the_centre_of_an_image(height, width, size, box):
    assert common.centre_box(height, width, size) == box


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: blocking copies to it, and values read from it."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, onto = operator.overloadpacket.__name__, torch.device(kwargs.get("device") or "cpu")
        if name == "_to_copy" and onto.type == "meta" and args[0].device.type == "cpu":
            self.count += not kwargs.get("non_blocking")
        if name in ("_local_scalar_dense", "nonzero") and args[0].device.type == "meta":
            self.count += 1
        return operator(*args, **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_making_views_never_waits_for_the_device(method):
    """On torch's meta device, which computes shapes only and stands for a GPU here."""
    script, meta = module(method), torch.device("meta")
    args = script.Args(batch_size=16, image_size=32, blur=True)
    data = common.patterns("train", 16)
    data.pixels = data.pixels.to(meta)
    shares = {"blur": 0.5, "solarization": 0.5} if method in ("vicreg", "barlow", "byol") else {}
    with Waits() as waits:
        compute, _ = common.compute_in("fp32", meta)
        for batch in common.batches(data, script.crops(args), range(2), args.batch_size, args.seed, compute):
            for x, draws in batch:
                assert script.augment(x, draws, args, **shares).shape == x.shape
    assert waits.count == 0


@pytest.mark.parametrize("mean, std", [((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))])
def test_features_are_those_of_each_normalised_image_in_its_place(mean, std):
    """More images than two batches of the test views, and a network that was in training mode."""
    data, net = common.patterns("test", 700), torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    got = common.Judge(32, mean, std, FP32, workers=0).features(net, data)
    x = data.pixels / 255
    want = torch.stack([(x[:, channel] - mean[channel]) / std[channel] for channel in range(3)], 1)
    close(got, net(want))
    assert net.training


# ------------------------------------------------------------------------------------- torchvision's datasets


def write_archive(root: Path, name: str, monkeypatch) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A few images in the files of `name`: training pixels (N, 3, H, W), labels and the names of the classes.

    CIFAR holds rows of red, green and blue planes; STL-10 holds planes column by column, and labels from 1.
    """
    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}[name]
    kind = getattr(torchvision.datasets, kind)
    for files in ("train_list", "test_list"):  # the sums are those of the full files
        monkeypatch.setattr(kind, files, [[file, None] for file, _ in getattr(kind, files)])
    if name != "stl10":
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    random, folder = np.random.default_rng(0), root / kind.base_folder
    folder.mkdir(parents=True)
    classes = [f"class {i}" for i in range(10 if name != "cifar100" else 100)]
    side = 96 if name == "stl10" else 32
    pixels, labels = random.integers(0, 256, (16, 3, side, side), np.uint8), random.permutation(16) % 10
    if name == "stl10":
        (folder / "class_names.txt").write_text("\n".join(classes))
        for split, rows in (("train", slice(0, 10)), ("unlabeled", slice(10, 16)), ("test", slice(0, 6))):
            pixels[rows].transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
            (labels[rows] + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
        (folder / "unlabeled_y.bin").unlink()  # nobody labelled these
        return pixels, np.concatenate([labels[:10], [-1] * 6]), classes
    key = "labels" if name == "cifar10" else "fine_labels"
    parts = np.array_split(np.arange(16), len(kind.train_list))
    for (file, _), rows in zip([*kind.train_list, *kind.test_list], [*parts, np.arange(6)], strict=True):
        entry = {"data": pixels[rows].reshape(len(rows), -1), key: labels[rows].tolist()}
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: classes}))
    return pixels, labels, classes


DATASETS = ["cifar10", "cifar100", "stl10"]


@pytest.mark.parametrize("name", DATASETS)
def test_torchvisions_datasets_keep_their_pixels_labels_and_classes(name, tmp_path, monkeypatch):
    pixels, labels, classes = write_archive(tmp_path, name, monkeypatch)
    train, test = common.load_data(name, str(tmp_path), 0, CPU)
    assert train.pixels.dtype == torch.uint8 and np.array_equal(train.pixels, pixels)
    assert train.labels.dtype == torch.int64 and train.labels.tolist() == labels.tolist()
    assert np.array_equal(test.pixels, pixels[:6]) and test.labels.tolist() == labels[:6].tolist()
    assert train.classes == test.classes == classes


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_that_is_missing_where_there_is_no_network_is_answered_in_one_line(
    name, tmp_path, monkeypatch, capsys
):
    def unreachable(*_, **__):
        raise OSError("the network is unreachable")

    for library in (torchvision.datasets.cifar, torchvision.datasets.stl10):
        monkeypatch.setattr(library, "download_and_extract_archive", unreachable)
    with pytest.raises(SystemExit) as end:
        common.load_data(name, str(tmp_path), 0, CPU)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert f"--dataset {name}" in said and str(tmp_path) in said and "the network is unreachable" in said


def test_the_cifar_recipe_finds_its_dataset_in_the_folder_data_and_trains(tmp_path, monkeypatch):
    write_archive(tmp_path / "data", "cifar10", monkeypatch)
    monkeypatch.chdir(tmp_path)
    line = "--recipe cifar --arch resnet10 --image-size 16 --batch-size 8 --max-steps 2 --log-every 1 --run-dir run"
    line += " --projector-hidden 24 --projector-dim 40"
    script = module("barlow")
    script.main(common.parse_args(script.Args, script.RECIPES, line.split()))
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert [record["step"] for record in records if "knn_top1" in record] == [0, 2]
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["dataset"] == "cifar10" and args["stem"] == "small"
