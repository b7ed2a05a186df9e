"""Corruptions against slow twins (Pillow, numpy, one pixel at a time) and by what they must keep."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image

from distillens import corruptions
from distillens.core.checks import UserError
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.corruptions import CORRUPTIONS, SEVERITIES, corrupt

KEY = Key(15, ("corruptions",))
COLOURS = KEY.fold("colours").uniform(3, 3, 8, 12)
RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "translate", "rotate")

every_corruption = pytest.mark.parametrize("name", sorted(CORRUPTIONS))


@every_corruption
def test_one_key_makes_one_set_of_images_in_range(name: str) -> None:
    before = COLOURS.clone()
    global_state = torch.get_rng_state()
    first = corrupt(COLOURS, name, 5, KEY)
    assert torch.equal(first, corrupt(COLOURS, name, 5, KEY))
    assert torch.equal(COLOURS, before) and torch.equal(torch.get_rng_state(), global_state)
    assert first.shape == COLOURS.shape and 0 <= float(first.min()) <= float(first.max()) <= 1
    assert torch.equal(first, corrupt(COLOURS, name, 5, KEY.fold("other"))) == (name not in RANDOM)
    assert not torch.equal(first, COLOURS)


@every_corruption
@pytest.mark.parametrize("channels", [1, 2])
def test_any_shape_is_corrupted(name: str, channels: int) -> None:
    images = KEY.fold("shape").uniform(2, channels, 8, 12)
    assert corrupt(images, name, 1, KEY).shape == images.shape
    assert corrupt(images.double(), name, 1, KEY).dtype == torch.float64


@every_corruption
def test_a_higher_severity_changes_more(name: str, digits: Splits) -> None:
    # At 32 px: of 8 px there are too few sizes for Pillow to make an image smaller to.
    pixels = F.interpolate(digits.test.pixels(), size=(32, 32), mode="bilinear").clamp(0, 1)
    changes = [float((corrupt(pixels, name, s, KEY) - pixels).abs().mean()) for s in SEVERITIES]
    assert changes == sorted(changes)
    assert changes[4] > 1.2 * changes[0] > 0


def test_gaussian_noise_has_its_deviation() -> None:
    grey = torch.full((4, 1, 64, 64), 0.5)
    for severity, sigma in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = corrupt(grey, "gaussian_noise", severity, KEY) - grey
        assert abs(float(noise.std()) - sigma) < 0.002
        assert abs(float(noise.mean())) < 0.003


def test_shot_noise_keeps_the_mean_and_grows_with_the_light() -> None:
    for level in (0.2, 0.6):
        noisy = corrupt(torch.full((4, 1, 64, 64), level), "shot_noise", 3, KEY)
        assert abs(float(noisy.mean()) - level) < 0.003
        assert abs(float(noisy.var()) - level / 100) < 0.0004  # Poisson: variance is mean, over the photons
    assert not corrupt(torch.zeros(1, 1, 8, 8), "shot_noise", 5, KEY).any()


def test_impulse_noise_makes_black_and_white() -> None:
    noisy = corrupt(torch.full((4, 2, 64, 64), 0.5), "impulse_noise", 5, KEY)
    values, counts = noisy.unique(return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    shares = (counts / noisy.numel()).tolist()
    assert abs(shares[0] - 0.035) < 0.004 and abs(shares[2] - 0.035) < 0.004


@pytest.mark.parametrize("side", [8, 64])
def test_gaussian_blur_is_a_sum_over_neighbours(side: int) -> None:
    image = KEY.fold("blur").uniform(side, side).double().numpy()
    sigma = 0.8 * max(1, side / 32)
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    wide = np.pad(image, reach, mode="edge")
    rows = np.array(
        [[wide[i : i + 2 * reach + 1, j] @ weights for j in range(wide.shape[1])] for i in range(side)]
    )
    slow = np.array([[rows[i, j : j + 2 * reach + 1] @ weights for j in range(side)] for i in range(side)])
    fast = corrupt(torch.from_numpy(image)[None, None], "gaussian_blur", 4, KEY)[0, 0]
    np.testing.assert_allclose(fast.numpy(), slow, atol=1e-5)


def between(image: np.ndarray, y: float, x: float) -> float:
    """The image at a place between pixels, by straight lines; beyond the border its pixels go on."""
    h, w = image.shape
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    i, j = min(int(y), h - 2), min(int(x), w - 2)
    a, b = y - i, x - j
    upper = (1 - b) * image[i, j] + b * image[i, j + 1]
    lower = (1 - b) * image[i + 1, j] + b * image[i + 1, j + 1]
    return float((1 - a) * upper + a * lower)


def slow_motion(image: np.ndarray, angle: float, sigma: float, radius: int) -> np.ndarray:
    found = np.zeros_like(image)
    weights = [math.exp(-(t**2) / (2 * sigma**2)) for t in range(radius + 1)]
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            seen = [
                between(image, y + t * math.sin(angle), x + t * math.cos(angle)) for t in range(radius + 1)
            ]
            found[y, x] = np.dot(weights, seen) / sum(weights)
    return found


def slow_shift(image: np.ndarray, direction: float, far: float) -> np.ndarray:
    h, w = image.shape
    return np.array(
        [
            [between(image, y + far * math.sin(direction), x + far * math.cos(direction)) for x in range(w)]
            for y in range(h)
        ]
    )


def slow_turn(image: np.ndarray, angle: float) -> np.ndarray:
    h, w = image.shape
    found = np.zeros_like(image)
    for y in range(h):
        for x in range(w):
            # The place that a turn about the middle brings here, as a complex number x + iy.
            place = complex(x - (w - 1) / 2, y - (h - 1) / 2) * complex(math.cos(angle), math.sin(angle))
            found[y, x] = between(image, place.imag + (h - 1) / 2, place.real + (w - 1) / 2)
    return found


def test_motion_blur_is_half_a_gaussian_along_a_line() -> None:
    images = KEY.fold("motion").uniform(3, 1, 8, 12)
    angles = KEY.uniform(3, low=-math.pi / 4, high=math.pi / 4).tolist()
    fast = corrupt(images, "motion_blur", 2, KEY)
    for image, angle, found in zip(images, angles, fast, strict=True):
        np.testing.assert_allclose(
            found[0].numpy(), slow_motion(image[0].double().numpy(), angle, 1.5, 6), atol=1e-5
        )


def test_translation_moves_by_a_share_of_the_side() -> None:
    images = KEY.fold("shift").uniform(3, 1, 8, 12)
    directions = KEY.uniform(3, high=2 * math.pi).tolist()
    fast = corrupt(images, "translate", 5, KEY)
    for image, direction, found in zip(images, directions, fast, strict=True):
        slow = slow_shift(image[0].double().numpy(), direction, 0.15 * 8)
        np.testing.assert_allclose(found[0].numpy(), slow, atol=1e-5)


def test_rotation_turns_about_the_middle_either_way() -> None:
    images = KEY.fold("turn").uniform(6, 1, 8, 12)
    signs = (2 * KEY.integers(2, 6) - 1).tolist()
    assert set(signs) == {-1, 1}
    fast = corrupt(images, "rotate", 4, KEY)
    for image, sign, found in zip(images, signs, fast, strict=True):
        slow = slow_turn(image[0].double().numpy(), sign * math.radians(20))
        np.testing.assert_allclose(found[0].numpy(), slow, atol=1e-5)


def test_brightness_is_added_to_the_value_of_a_colour() -> None:
    images = torch.cat([COLOURS, torch.zeros(1, 3, 8, 12)])
    hsv = rgb_to_hsv(images.permute(0, 2, 3, 1).numpy())
    hsv[..., 2] = (hsv[..., 2] + 0.2).clip(0, 1)
    fast = corrupt(images, "brightness", 4, KEY).permute(0, 2, 3, 1)
    np.testing.assert_allclose(fast.numpy(), hsv_to_rgb(hsv), atol=1e-5)
    grey = KEY.fold("grey").uniform(2, 1, 8, 8)
    torch.testing.assert_close(corrupt(grey, "brightness", 4, KEY), (grey + 0.2).clamp(max=1))


def test_contrast_keeps_the_mean_of_each_channel() -> None:
    low = corrupt(COLOURS, "contrast", 3, KEY)
    torch.testing.assert_close(low.mean((2, 3)), COLOURS.mean((2, 3)))
    torch.testing.assert_close(low.std((2, 3)), 0.4 * COLOURS.std((2, 3)))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_is_pillows_box_down_and_up(severity: int) -> None:
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    image = KEY.fold("box").uniform(1, 1, 9, 16)
    small = Image.fromarray(image[0, 0].numpy()).resize(
        (int(16 * share), int(9 * share)), Image.Resampling.BOX
    )
    slow = np.array(small.resize((16, 9), Image.Resampling.BOX))
    np.testing.assert_allclose(corrupt(image, "pixelate", severity, KEY)[0, 0].numpy(), slow, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_jpeg_is_pillows(channels: int) -> None:
    image = KEY.fold("jpeg").uniform(1, channels, 16, 16)
    levels = (image[0] * 255).round().byte().numpy()
    pictures = [levels.transpose(1, 2, 0)] if channels == 3 else list(levels)
    back = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=58)
        back.append(np.array(Image.open(file)))
    slow = back[0].transpose(2, 0, 1) if channels == 3 else np.stack(back)
    np.testing.assert_allclose(corrupt(image, "jpeg", 3, KEY)[0].numpy(), slow / 255, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["gaussian_blur", "motion_blur", "contrast", "pixelate", "translate", "rotate"]
)
def test_an_image_of_one_level_stays(name: str) -> None:
    level = torch.full((2, 3, 8, 8), 0.3)
    torch.testing.assert_close(corrupt(level, name, 5, KEY), level)


def test_every_table_has_five_severities() -> None:
    tables = [
        value for name, value in vars(corruptions).items() if name.isupper() and isinstance(value, tuple)
    ]
    assert len(tables) == len(CORRUPTIONS) + 2  # the radii of motion blur, and the severities themselves
    assert all(len(table) == 5 for table in tables)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown corruption 'jpg'; Did you mean 'jpeg'\?"):
        corrupt(COLOURS, "jpg", 1, KEY)
    with pytest.raises(UserError, match="a severity is one of five; got 6; expected 1 to 5"):
        corrupt(COLOURS, "jpeg", 6, KEY)
