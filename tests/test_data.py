"""Folders of every shape, files of every kind, and the order and sameness of batches."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from methods import METHODS, module
from PIL import Image, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

import common
from common import Crop

CPU, FLOAT = torch.device("cpu"), torch.float32
close = torch.testing.assert_close


@dataclasses.dataclass
class Options:
    dataset: str = "folder"
    data_dir: str = ""
    train_limit: int = 0
    batch_size: int = 4
    image_size: int = 16
    seed: int = 0
    workers: int = 0
    mean: tuple = (0.0, 0.0, 0.0)
    std: tuple = (1.0, 1.0, 1.0)


def write(file: Path, size: tuple[int, int] = (20, 24), colour: int | None = None) -> None:
    """A PNG of (width, height) `size`, of one colour or of noise that depends on the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(list(file.name.encode()))
    pixels = random.integers(0, 256, (*size[::-1], 3)) if colour is None else np.full((*size[::-1], 3), colour)
    Image.fromarray(pixels.astype(np.uint8)).save(file)


def load(root: Path, **options):
    return common.load_data(Options(data_dir=str(root), **options), CPU)


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
    assert end.value.code == 2 and "0.png" in said and said.count("\n") == 1


def test_films_and_scientific_data_are_not_taken_for_images(tmp_path):
    for name in ("a.h5", "b.mpg", "c.eps"):
        (tmp_path / name).write_text("no image")
    write(tmp_path / "d.png")
    assert len(load(tmp_path)[0]) == 1


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_rotated_files_are_turned_once(tmp_path, suffix, orientation):
    """Left half dark in the file: upright, the dark half is on the left, on the right, on top."""
    pixels = np.full((24, 40, 3), 250, np.uint8)
    pixels[:, :20] = 5
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        width, height = common.upright_size(image)
        upright = np.asarray(common.to_rgb(image)).mean(2)
    assert (width, height) == upright.shape[::-1] == ((24, 40) if orientation == 6 else (40, 24))
    dark = upright < 100
    want = {1: dark[:, : width // 2], 3: dark[:, width // 2 :], 6: dark[: height // 2]}[orientation]
    assert want.mean() > 0.95 and dark.mean() < 0.55


def test_train_limit_takes_a_random_subset_the_same_for_every_seed(tmp_path):
    for i in range(20):
        write(tmp_path / f"{i:02}.png", (20 + i, 24))
    everything = load(tmp_path)[0].files.tolist()
    first, second = (load(tmp_path, train_limit=7, seed=s)[0].files.tolist() for s in (0, 1))
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation):
    write(tmp_path / "a.png", (40, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(tmp_path / "a.png").save(tmp_path / "b.png", exif=exif)
    with Image.open(tmp_path / "b.png") as image:
        want = np.asarray(ImageOps.exif_transpose(image))
        assert common.upright_size(image) == want.shape[1::-1]
        assert np.array_equal(common.to_rgb(image), want)


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
    views = list(common.batches(train, [Crop(16, (0.08, 1))] * 2, Options(), 0, 12, CPU, FLOAT))
    said = capsys.readouterr().err
    assert len(views) == 12 and all(view.isfinite().all() for crops, _ in views for view in crops)
    assert all(said.count(name) == 1 for name in bad) and said.count("\n") == 4
    list(common.test_views(train, slice(None), Options(), CPU, FLOAT))
    assert capsys.readouterr().err == "", "they are known by now"


def test_more_than_ten_bad_files_stop_the_run(tmp_path, capsys):
    for i in range(30):
        write(tmp_path / f"{i:02}.png", (20 + i, 24))
    spoil(tmp_path, 11)
    train, _ = load(tmp_path)
    with pytest.raises(SystemExit) as end:
        list(common.batches(train, [Crop(16, (0.08, 1))], Options(), 0, 40, CPU, FLOAT))
    assert end.value.code == 2 and "11 of 42 files cannot be decoded" in capsys.readouterr().err


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
    seen = [
        (255 * crops[0][:, 0, 0, 0]).round().int().tolist()
        for crops, _ in common.batches(data, CROPS, Options(), 0, 6, CPU, FLOAT)
    ]
    assert [len(batch) for batch in seen] == [4] * 6
    first, second = [i for b in seen[:3] for i in b], [i for b in seen[3:] for i in b]
    assert len(set(first)) == len(set(second)) == 12 and first != second


def test_views_have_their_sizes_and_range(data):
    (large, small), draws = next(common.batches(data, CROPS, Options(), 0, 1, CPU, FLOAT))
    assert large.shape == (4, 3, 16, 16) and small.shape == (4, 3, 8, 8)
    assert large.dtype == FLOAT and large.min() >= 0 and large.max() <= 1
    assert draws[0].chance(0.5).shape == (4,)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_any_start_any_number_of_workers_gives_the_same_views(data):
    def steps(first, workers):
        options = Options(workers=workers)
        return [
            (views, [d.uniform(0, 1) for d in draws])
            for views, draws in common.batches(data, CROPS, options, first, 5, CPU, FLOAT)
        ]

    want = steps(0, 0)
    for first, workers in [(0, 0), (2, 0), (4, 0)] + ([(0, 1), (3, 3)] if data.pixels is None else []):
        for (views, draws), (other, other_draws) in zip(want[first:], steps(first, workers), strict=True):
            for a, b in zip([*views, *draws], [*other, *other_draws], strict=True):
                close(a, b, rtol=0, atol=0)


def test_the_order_of_an_epoch_and_the_draws_of_a_step_share_no_numbers():
    data, args = common.patterns("train", 8), Options(batch_size=8)
    orders = [order.tolist() for _, order in common.batch_indices(8, args, 0, 4)]  # one step per epoch
    for _, draws in common.batches(data, [Crop(8, (1, 1), "bilinear")] * 2, args, 0, 4, CPU, FLOAT):
        for key in (d.generator.bit_generator.seed_seq for d in draws):
            assert np.random.default_rng(key).permutation(8).tolist() not in orders


def test_every_rank_takes_its_slice_of_the_same_batch(data, monkeypatch):
    def steps():
        return [views for views, _ in common.batches(data, CROPS, Options(), 0, 4, CPU, torch.float64)]

    want, world = steps(), 2
    for rank in range(world):
        monkeypatch.setattr(common, "rank_and_world", lambda rank=rank: (rank, world))
        for views, whole in zip(steps(), want, strict=True):
            for part, full in zip(views, whole, strict=True):
                close(part, full[rank * 2 : rank * 2 + 2], rtol=0, atol=1e-12)


def test_test_views_are_central_and_normalised(data):
    options = Options(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    (views,) = common.test_views(data, slice(3, 9), options, CPU, FLOAT)
    assert views.shape == (6, 3, 16, 16) and views.min() < -1 and views.max() > 1
    assert common.centre_box(16, 16, 16) == [0, 0, 16, 16], "images of the right size are taken whole"
    assert common.centre_box(256, 320, 224) == [16, 48, 224, 224]


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
    args = script.Args(batch_size=16, blur=True)
    data = common.patterns("train", 16)
    data.pixels = data.pixels.to(meta)
    shares = {"blur": 0.5, "solarization": 0.5} if method in ("vicreg", "barlow", "byol") else {}
    with Waits() as waits:
        for views, draws in common.batches(data, script.crops(args), args, 0, 2, meta, FLOAT):
            for x, draws_of_x in zip(views, draws, strict=True):
                assert script.augment(x, draws_of_x, args, **shares).shape == x.shape
    assert waits.count == 0


def test_features_are_those_of_each_image_in_its_place():
    """More images than two batches of the test views, and a network that was in training mode."""
    data, net = common.patterns("test", 700), torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    got = common.features(net, data, Options(image_size=32), CPU, FLOAT, contextlib.nullcontext())
    close(got, net(data.pixels / 255))
    assert net.training
