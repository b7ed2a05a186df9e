"""Common corruptions of natural images, in five severities, with every draw from a key.

Source: Hendrycks & Dietterich 2019; the severities are those of their CIFAR-10-C (``make_cifar_c.py``), which are milder than
ImageNet-C's. Translation and rotation are ours, as theirs has neither. Where we differ:

- Their lengths (blurs) are in pixels of 32 px images. Larger images take them as the same share of the shorter side;
  smaller ones take the pixels themselves, as a quarter of them would leave an 8 px image as it is.
- Images have any shape and any number of channels. Except by JPEG nothing is rounded to whole levels.
- Motion blur is the same half of a Gaussian along a line, here with straight interpolation between pixels.
- Left out: frost, snow and fog (of their weather brightness stays), glass, zoom and defocus blur (their extra Gaussian blur
  is here), elastic transformation, and their extra speckle noise, spatter and saturation.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from distillens.core.checks import UserError, one_of
from distillens.core.rng import Key

SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)
SIDE = 32  # pixels a side of the images that the lengths below were made for

GAUSSIAN_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation
SHOT_NOISE = (500, 250, 100, 75, 50)  # photons of a white pixel
IMPULSE_NOISE = (0.01, 0.02, 0.03, 0.05, 0.07)  # share of the values that become 0 or 1
GAUSSIAN_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # standard deviation, pixels
MOTION_BLUR = (1.0, 1.5, 2.0, 2.0, 2.5)  # standard deviation of the half Gaussian, pixels
MOTION_RADIUS = (6, 6, 6, 8, 9)  # where it ends, pixels
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)  # added to the value (HSV)
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # times each channel's distance from its mean
PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)  # side of the smaller image, share
JPEG = (80, 65, 58, 50, 40)  # quality
TRANSLATE = (0.03, 0.06, 0.09, 0.12, 0.15)  # share of the side, in any direction (ours)
ROTATE = (5.0, 10.0, 15.0, 20.0, 25.0)  # degrees, either way (ours)


def corrupt(pixels: torch.Tensor, name: str, severity: int, key: Key) -> torch.Tensor:
    """Pixels [n, c, h, w] in [0, 1] under one corruption, cut to [0, 1] again; the images handed in stay as they are.

    Made on the CPU, so that one key corrupts alike wherever the images live.

    >>> corrupt(torch.full((1, 1, 8, 8), 0.5), "brightness", 3, Key(0)).mean().item()  # doctest: +ELLIPSIS
    0.64999...

    Raises:
        UserError: the corruption or the severity is unknown.
    """
    one_of("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError("a severity is one of five", got=repr(severity), expected="1 to 5")
    changed = CORRUPTIONS[name](pixels.float().cpu(), severity - 1, key)
    return changed.clamp(0, 1).to(pixels)


def _gaussian_noise(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    return x + GAUSSIAN_NOISE[level] * key.normal(*x.shape)


def _shot_noise(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    photons = SHOT_NOISE[level]
    return torch.poisson(x.clamp(min=0) * photons, generator=key.generator()) / photons


def _impulse_noise(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    u, share = key.uniform(*x.shape), IMPULSE_NOISE[level]
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def _gaussian_blur(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    from scipy.ndimage import gaussian_filter

    sigma = GAUSSIAN_BLUR[level] * _length(x)
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest"))


def _motion_blur(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    sigma, radius = MOTION_BLUR[level] * _length(x), round(MOTION_RADIUS[level] * _length(x))
    angle = key.uniform(len(x), low=-math.pi / 4, high=math.pi / 4)[:, None, None]
    rows, columns = _grid(x)
    weights = torch.tensor([math.exp(-(t**2) / (2 * sigma**2)) for t in range(radius + 1)])
    weights /= weights.sum()
    blurred = torch.zeros_like(x)
    for t, weight in enumerate(weights.tolist()):
        blurred += weight * _sampled(x, rows + t * angle.sin(), columns + t * angle.cos())
    return blurred


def _brightness(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    # Adding to the value of HSV keeps hue and saturation: all channels grow by one factor; black becomes grey.
    value = x.amax(1, keepdim=True)
    brighter = (value + BRIGHTNESS[level]).clamp(max=1)
    return torch.where(value > 0, x * (brighter / value.clamp(min=1e-12)), brighter)


def _contrast(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * CONTRAST[level] + mean


def _pixelate(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    down, across = (_box(side, max(1, int(side * PIXELATE[level]))) for side in x.shape[2:])
    return torch.einsum("ih,nchw,jw->ncij", down, x, across)


def _jpeg(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    n, c, h, w = x.shape
    # Three channels are colours; any other number is that many grey images.
    levels = (x.clamp(0, 1) * 255).round().byte()
    pictures = levels.permute(0, 2, 3, 1) if c == 3 else levels.flatten(0, 1)
    back = []
    for picture in pictures.numpy():
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "JPEG", quality=JPEG[level])
        back.append(torch.from_numpy(np.array(Image.open(buffer))))
    found = torch.stack(back).float() / 255
    return found.permute(0, 3, 1, 2).contiguous() if c == 3 else found.view(n, c, h, w)


def _translate(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    direction = key.uniform(len(x), high=2 * math.pi)[:, None, None]
    rows, columns = _grid(x)
    shift = TRANSLATE[level] * min(x.shape[2:])
    return _sampled(x, rows + shift * direction.sin(), columns + shift * direction.cos())


def _rotate(x: torch.Tensor, level: int, key: Key) -> torch.Tensor:
    sign = (2 * key.integers(2, len(x)) - 1)[:, None, None]
    angle = sign * math.radians(ROTATE[level])
    rows, columns = _grid(x)
    y, z = rows - (x.shape[2] - 1) / 2, columns - (x.shape[3] - 1) / 2
    turned = y * angle.cos() + z * angle.sin(), z * angle.cos() - y * angle.sin()
    return _sampled(x, turned[0] + (x.shape[2] - 1) / 2, turned[1] + (x.shape[3] - 1) / 2)


CORRUPTIONS: dict[str, Callable[[torch.Tensor, int, Key], torch.Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "gaussian_blur": _gaussian_blur,
    "motion_blur": _motion_blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
    "translate": _translate,
    "rotate": _rotate,
}


def _length(x: torch.Tensor) -> float:
    """By how much lengths grow: with the shorter side, from 32 px on."""
    return max(1.0, min(x.shape[2:]) / SIDE)


def _grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the column of each pixel, [1, h, 1] and [1, 1, w]."""
    h, w = x.shape[2:]
    return torch.arange(h, dtype=x.dtype)[None, :, None], torch.arange(w, dtype=x.dtype)[None, None]


def _sampled(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Images [n, c, h, w] looked up at other places [n, h, w], in pixels; beyond the border its pixels go on."""
    n, _, h, w = x.shape
    # From pixels to the units of grid_sample, in which an image reaches from -1 to 1.
    across, down = ((2 * columns + 1) / w - 1).expand(n, h, w), ((2 * rows + 1) / h - 1).expand(n, h, w)
    places = torch.stack([across, down], -1)
    return F.grid_sample(x, places, padding_mode="border", align_corners=False)


def _box(side: int, fewer: int) -> torch.Tensor:
    """What making one axis smaller and larger again does to it, [side, side]: Pillow's box filter on unit vectors."""
    import numpy as np
    from PIL import Image

    unit = Image.fromarray(np.eye(side, dtype=np.float32))
    smaller = unit.resize((side, fewer), Image.Resampling.BOX)
    return torch.from_numpy(np.array(smaller.resize((side, side), Image.Resampling.BOX)))
