"""Every batched augmentation against torchvision on the same parameters, image by image; and the random draws."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import common
from common import Crop, Draws

close = torch.testing.assert_close
MODES = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}


def images(n: int = 6, height: int = 32, width: int = 32) -> torch.Tensor:
    """Smooth colour, noise, greys, and pure primaries, in [0, 1]."""
    random = np.random.default_rng(0)
    x = random.random((max(n, 4), 3, height, width))
    x[1] = x[1, :, :1, :1] + np.linspace(0, 0.3, height * width).reshape(height, width)
    x[2] = x[2, :1]
    x[3] = np.round(x[3])
    return torch.from_numpy(x[:n]).clamp(0, 1).float()


@st.composite
def boxes(draw, height: int, width: int) -> list[int]:
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    return [draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w]


@given(st.data(), st.sampled_from(sorted(MODES)), st.sampled_from([8, 20, 32, 45]))
def test_resized_crop(data, interpolation, size):
    x = images(3, 24, 32)
    box = torch.tensor([data.draw(boxes(24, 32)) for _ in x])
    flip = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    got = common.resized_crop(x, box, size, interpolation, flip)
    for image, (top, left, h, w), flipped, result in zip(x, box.tolist(), flip, got, strict=True):
        want = TF.resized_crop(image, top, left, h, w, [size, size], MODES[interpolation], antialias=True).clamp(0, 1)
        close(result, TF.horizontal_flip(want) if flipped else want, rtol=0, atol=2e-6)


factors = st.lists(st.floats(0, 2, width=32), min_size=6, max_size=6).map(torch.tensor)


@given(factors, factors, factors, st.data())
def test_color_jitter(brightness, contrast, saturation, data):
    x = images()
    hue = torch.tensor([data.draw(st.floats(-0.5, 0.5, width=32)) for _ in x])
    order = torch.tensor([data.draw(st.permutations(range(4))) for _ in x])
    got = common.adjust_color(x, brightness, contrast, saturation, hue, order)
    for i, image in enumerate(x):
        for turn in order[i].tolist():
            adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue][turn]
            image = adjust(image, [brightness, contrast, saturation, hue][turn][i].item())
        close(got[i], image, rtol=0, atol=2e-4)


@given(hnp.arrays(np.float32, (5, 3, 2, 2), elements=st.floats(0, 1, width=32)), st.floats(-0.5, 0.5, width=32))
def test_hue_is_true_hsv(pixels, shift):
    """Against the definition in the standard library, pixel by pixel."""
    import colorsys

    got = common.adjust_hue(torch.from_numpy(pixels).double(), torch.full((5,), shift, dtype=torch.float64))
    for rgb, turned in zip(pixels.transpose(0, 2, 3, 1).reshape(-1, 3), got.movedim(1, 3).reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*rgb.astype(np.float64))
        close(turned, torch.tensor(colorsys.hsv_to_rgb((h + shift) % 1, s, v), dtype=torch.float64), rtol=0, atol=1e-6)


@given(st.lists(st.floats(0.1, 2.0), min_size=6, max_size=6), st.sampled_from([3, 5, 9, 23]))
def test_gaussian_blur(sigma, kernel_size):
    x = images(6, 24, 32)
    got = common.gaussian_blur(x, torch.tensor(sigma), kernel_size)
    for image, s, result in zip(x, sigma, got, strict=True):
        close(result, TF.gaussian_blur(image, [kernel_size] * 2, [s, s]), rtol=0, atol=2e-6)


@given(st.lists(st.booleans(), min_size=6, max_size=6).map(torch.tensor), st.floats(0, 1, width=32))
def test_grayscale_and_solarize(chosen, threshold):
    x = images()
    grey, solarized = common.grayscale(x, chosen), common.solarize(x, chosen, threshold)
    for i, image in enumerate(x):
        close(grey[i], TF.rgb_to_grayscale(image, 3) if chosen[i] else image, rtol=0, atol=1e-6)
        close(solarized[i], TF.solarize(image, threshold) if chosen[i] else image, rtol=0, atol=1e-6)


def test_normalize():
    x = images()
    close(common.normalize(x, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), TF.normalize(x, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))


@pytest.mark.parametrize("name", ["color", "hue", "blur", "crop"])
def test_neutral_parameters_change_nothing_and_inputs_are_left_alone(name):
    x = images()
    before, one, zero = x.clone(), torch.ones(6), torch.zeros(6)
    got = {
        "color": lambda: common.adjust_color(x, one, one, one, zero, Draws((0,), 6).order(4)),
        "hue": lambda: common.adjust_hue(x, zero),
        "blur": lambda: common.gaussian_blur(x, zero, 5),
        "crop": lambda: common.resized_crop(x, torch.tensor([[0, 0, 32, 32]] * 6), 32, "bicubic"),
    }[name]()
    close(got, x, rtol=0, atol=1e-6)
    close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["color_jitter", "grayscale", "solarize", "normalize", "blur", "crop"])
def test_images_of_whole_numbers_are_refused(name):
    """They are not in [0, 1]: whatever came out would be wrong, and silently so."""
    x, draws = (255 * images()).byte(), Draws((0,), 6)
    with pytest.raises(TypeError, match="divide them by 255"):
        {
            "color_jitter": lambda: common.color_jitter(x, draws, 0.4, 0.4, 0.2, 0.1, p=1.0),
            "grayscale": lambda: common.grayscale(x, draws.chance(1.0)),
            "solarize": lambda: common.solarize(x, draws.chance(1.0)),
            "normalize": lambda: common.normalize(x, common.IMAGENET_MEAN, common.IMAGENET_STD),
            "blur": lambda: common.gaussian_blur(x, torch.ones(6), 5),
            "crop": lambda: common.resized_crop(x, torch.tensor([[0, 0, 32, 32]] * 6), 32, "bicubic"),
        }[name]()


# ---------------------------------------------------------------------------------------------------- draws


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]))
def test_draws_do_not_depend_on_the_number_of_processes(seed, world):
    whole = Draws((seed, 3), 8)
    parts = [Draws((seed, 3), 8, slice(r * 8 // world, (r + 1) * 8 // world)) for r in range(world)]
    for draw in (
        lambda d: d.uniform(0.1, 2.0, 3),
        lambda d: d.chance(0.5),
        lambda d: d.order(4),
        lambda d: common.random_boxes(d, 30, 40, (0.08, 1.0)),
    ):
        close(torch.cat([draw(part) for part in parts]), draw(whole), rtol=0, atol=0)


def test_every_image_and_every_key_has_its_own_draws():
    numbers = torch.stack([Draws(key, 100).uniform(0, 1) for key in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]])
    assert len(numbers.unique()) == numbers.numel()


def test_probabilities_ranges_and_orders_are_those_asked_for():
    draws = Draws((0,), 20000)
    assert draws.chance(0.2).double().mean().item() == pytest.approx(0.2, abs=0.02)
    assert not draws.chance(0.0).any() and draws.chance(1.0).all()
    sigma = draws.uniform(0.1, 2.0)
    assert 0.1 <= sigma.min() < 0.11 and 1.99 < sigma.max() < 2.0
    _, counts = (draws.order(4) * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)
    assert len(counts) == 24 and counts.min() > 700  # 833 expected


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([(0.08, 1.0), (0.2, 1.0), (1.0, 1.0), (0.05, 0.14)]))
def test_boxes_lie_inside_and_keep_area_and_aspect(height, width, scale):
    top, left, h, w = common.random_boxes(Draws((height, width), 200), height, width, scale).unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_boxes_are_distributed_as_torchvision_draws_them():
    torch.manual_seed(0)
    ours = common.random_boxes(Draws((0,), 4000), 48, 64, (0.08, 1.0)).double()
    image = torch.zeros(3, 48, 64)
    theirs = [T.RandomResizedCrop.make_params(T.RandomResizedCrop(32), [image]) for _ in range(4000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs], dtype=torch.float64)
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        close(ours.quantile(q, dim=0), theirs.quantile(q, dim=0), rtol=0.05, atol=1.5)


# ------------------------------------------------------------------------- the same views from decoded files


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_decoded_crops_equal_torchvisions_on_the_decoded_image(tmp_path, interpolation):
    pixels = (255 * images(1, 48, 64)[0]).byte()
    TF.to_pil_image(pixels).save(tmp_path / "a.png")
    box, crop = [5, 7, 30, 41], Crop(24, (0.08, 1), interpolation)
    with Image.open(tmp_path / "a.png") as image:
        (got,) = common.decode_crops(image, [box], [crop])
    want = TF.resized_crop(TF.to_pil_image(pixels), *box, [24, 24], MODES[interpolation], antialias=True)
    close(got, TF.pil_to_tensor(want), rtol=0, atol=0)


def test_a_large_jpeg_decoded_at_reduced_size_gives_nearly_the_same_view(tmp_path):
    smooth = TF.resize(images(1, 16, 16)[0], [512, 512], T.InterpolationMode.BICUBIC).clamp(0, 1)
    TF.to_pil_image(smooth).save(tmp_path / "a.jpg", quality=95)
    box, crop = [10, 20, 400, 450], Crop(64, (0.08, 1))
    with Image.open(tmp_path / "a.jpg") as image:
        (got,) = common.decode_crops(image, [box], [crop])
        assert image.size == (128, 128), "400 / 64 allows a quarter"
    with Image.open(tmp_path / "a.jpg") as image:
        want = TF.resized_crop(image.convert("RGB"), *box, [64, 64], MODES["bicubic"], antialias=True)
    assert (got.float() - TF.pil_to_tensor(want).float()).abs().mean() < 2


def test_with_full_decode_a_large_jpeg_gives_the_same_view_to_the_bit(tmp_path):
    pixels = (255 * images(1, 300, 260)[0]).byte()
    TF.to_pil_image(pixels).save(tmp_path / "a.jpg", quality=95)
    box, crop = [10, 20, 250, 230], Crop(32, (0.08, 1))
    with Image.open(tmp_path / "a.jpg") as image:
        want = TF.resized_crop(image.convert("RGB"), *box, [32, 32], MODES["bicubic"], antialias=True)
    with Image.open(tmp_path / "a.jpg") as image:
        (got,) = common.decode_crops(image, [box], [crop], full_decode=True)
        close(got, TF.pil_to_tensor(want), rtol=0, atol=0)


def test_upright_boxes_on_a_turned_photograph(tmp_path):
    """A camera stores the image on its side and says so in EXIF: boxes are those of the upright image."""
    pixels = (255 * images(1, 40, 60)[0]).byte()  # the first row is to be seen on the right: a quarter turn
    exif = Image.Exif()
    exif[0x0112] = 6
    TF.to_pil_image(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert common.upright_size(image) == (40, 60)
        (got,) = common.decode_crops(image, [[10, 3, 40, 30]], [Crop(20, (0.08, 1))])
    upright = TF.to_pil_image(pixels.rot90(-1, (1, 2)))
    want = TF.resized_crop(upright, 10, 3, 40, 30, [20, 20], MODES["bicubic"], antialias=True)
    close(got, TF.pil_to_tensor(want), rtol=0, atol=0)


def test_other_interpolations_are_refused():
    with pytest.raises(ValueError, match="bilinear or bicubic"):
        common.resized_crop(torch.zeros(1, 3, 8, 8), torch.tensor([[0, 0, 8, 8]]), 8, "nearest")
