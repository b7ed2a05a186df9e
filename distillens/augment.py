"""Differentiable siamese augmentation (Zhao & Bilen 2021), with the draw as a value.

Mode "S" of the authors' code: one operation a call, drawn for the whole batch. A draw of one
row is *siamese*: the same parameters for every image, so real and distilled batches of any size share it.
Where we differ: the draw comes from an explicit key; the authors re-seed the global generator from the clock.
Everything is differentiable once in the images through every operation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distillens.core.checks import unknown
from distillens.core.rng import Key

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
CROP = 0.125  # zero padding on each side, share of the image
CUTOUT = 0.5  # side of the square, share of the image
SCALE = 1.2  # each axis between 1/1.2 and 1.2
ROTATE = 15.0  # degrees, either way


@dataclass(frozen=True)
class Draw:
    """One augmentation: an operation and uniform numbers [n or 1, 3] that settle it."""

    operation: str
    numbers: torch.Tensor


def parse(strategy: str) -> tuple[str, ...]:
    """The operations in ``color_crop_cutout_flip_scale_rotate`` (in any order); "" is none.

    Raises:
        UserError: an operation is unknown.
    """
    names = tuple(name for name in strategy.split("_") if name)
    for name in names:
        if name not in OPERATIONS:
            raise unknown("augmentation", name, OPERATIONS)
    return names


def draw(strategy: str, key: Key, n: int = 1) -> Draw | None:
    """One operation of the strategy for ``n`` images (1 is siamese); None where there is none."""
    names = parse(strategy)
    if not names:
        return None
    operation = names[int(key.fold("operation").integers(len(names), 1))]
    return Draw(operation, key.fold("numbers").uniform(n, 3))


def apply(images: torch.Tensor, drawn: Draw | None) -> torch.Tensor:
    """The images [n, c, h, w] under a draw."""
    if drawn is None:
        return images
    u = drawn.numbers.to(images)
    if drawn.operation == "color":
        return _color(images, u)
    if drawn.operation == "crop":
        return _crop(images, u)
    if drawn.operation == "cutout":
        return _cutout(images, u)
    if drawn.operation == "flip":
        return torch.where((u[:, 0] < 0.5)[:, None, None, None], images.flip(3), images)
    if drawn.operation == "scale":
        low = 1 / SCALE
        factors = low + (SCALE - low) * u[:, :2]
        zero = torch.zeros_like(factors[:, 0])
        return _affine(images, factors[:, 0], zero, zero, factors[:, 1])
    angle = (2 * u[:, 0] - 1) * math.radians(ROTATE)
    return _affine(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _color(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    brightness, saturation, contrast = (u[:, i, None, None, None] for i in range(3))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    level = images.mean((1, 2, 3), keepdim=True)
    return (images - level) * (contrast + 0.5) + level


def _crop(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    n, _, h, w = images.shape
    pad_h, pad_w = int(h * CROP + 0.5), int(w * CROP + 0.5)
    # Whole shifts in [-pad, pad]; numbers are below 1, so the floor never reaches the next shift.
    dy = (u[:, 0] * (2 * pad_h + 1)).floor().long().expand(n)
    dx = (u[:, 1] * (2 * pad_w + 1)).floor().long().expand(n)
    padded = F.pad(images, (pad_w, pad_w, pad_h, pad_h))
    rows = dy[:, None] + torch.arange(h, device=images.device)
    columns = dx[:, None] + torch.arange(w, device=images.device)
    every = torch.arange(n, device=images.device)
    return padded.permute(0, 2, 3, 1)[every[:, None, None], rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def _cutout(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    h, w = images.shape[2:]
    size_h, size_w = int(h * CUTOUT + 0.5), int(w * CUTOUT + 0.5)
    # The centre may lie on any pixel, so the square may hang over the border.
    top = (u[:, 0] * (h + (1 - size_h % 2))).floor() - size_h // 2
    left = (u[:, 1] * (w + (1 - size_w % 2))).floor() - size_w // 2
    y = torch.arange(h, device=images.device)
    x = torch.arange(w, device=images.device)
    in_rows = (y >= top[:, None]) & (y < top[:, None] + size_h)
    in_columns = (x >= left[:, None]) & (x < left[:, None] + size_w)
    hole = in_rows[:, :, None] & in_columns[:, None, :]
    return images * (~hole[:, None]).to(images)


def _affine(
    images: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    zero = torch.zeros_like(a)
    theta = torch.stack([torch.stack([a, b, zero], 1), torch.stack([c, d, zero], 1)], 1)
    size = list(images.shape)
    grid = F.affine_grid(theta.expand(images.shape[0], 2, 3), size, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
