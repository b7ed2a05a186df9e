"""Differentiable siamese augmentation (Zhao & Bilen 2021) and CutMix, with the draw as a value.

A strategy names operations: ``color_crop_cutout_flip_scale_rotate`` is mode "S" of the authors' code, one of them a
call, drawn for the whole batch. Several such choices in turn are joined by "+": ``color+crop_scale_rotate+cutout`` always
changes colour, then moves in one of three ways, then cuts out, as IDC (Kim et al. 2022) and its successors do.
A draw of one row is *siamese*: the same parameters for every image, so real and distilled batches of any size share it.
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
    """One augmentation: an operation, uniform numbers [n or 1, 3] that settle it, and what comes after it."""

    operation: str
    numbers: torch.Tensor
    then: Draw | None = None

    def rows(self, index: torch.Tensor | slice) -> Draw:
        """The draw of some images only."""
        return Draw(self.operation, self.numbers[index], None if self.then is None else self.then.rows(index))


def parse(strategy: str) -> tuple[tuple[str, ...], ...]:
    """The choices in turn, each of some operations; "" is none.

    >>> parse("color+crop_rotate")
    (('color',), ('crop', 'rotate'))

    Raises:
        UserError: an operation is unknown.
    """
    choices = (tuple(name for name in choice.split("_") if name) for choice in strategy.split("+"))
    found = tuple(choice for choice in choices if choice)
    for name in (name for choice in found for name in choice):
        if name not in OPERATIONS:
            raise unknown("augmentation", name, OPERATIONS)
    return found


def draw(strategy: str, key: Key, n: int = 1) -> Draw | None:
    """One operation of each choice of the strategy, for ``n`` images (1 is siamese); None where there is none."""
    drawn = None
    choices = parse(strategy)
    for turn in reversed(range(len(choices))):
        place = key.fold("turn", turn) if turn else key
        operation = choices[turn][int(place.fold("operation").integers(len(choices[turn]), 1))]
        drawn = Draw(operation, place.fold("numbers").uniform(n, 3), drawn)
    return drawn


def apply(images: torch.Tensor, drawn: Draw | None) -> torch.Tensor:
    """The images [n, c, h, w] under a draw."""
    while drawn is not None:
        images, drawn = _apply(images, drawn), drawn.then
    return images


@dataclass(frozen=True)
class Mix:
    """CutMix (Yun et al. 2019): a box of every image comes from its partner, and so does that share of its label.

    ``partner`` [n] int64; rows ``top`` to ``bottom`` and columns ``left`` to ``right`` are the partner's.
    """

    partner: torch.Tensor
    top: int
    bottom: int
    left: int
    right: int

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """The images [n, c, h, w], mixed."""
        mixed = images.clone()
        box = (..., slice(self.top, self.bottom), slice(self.left, self.right))
        mixed[box] = images[self.partner.to(images.device)][box]
        return mixed

    def share(self, images: torch.Tensor) -> float:
        """How much of each image is its partner's, 0 to 1."""
        return (self.bottom - self.top) * (self.right - self.left) / (images.shape[-2] * images.shape[-1])


def draw_mix(probability: float, key: Key, n: int, shape: tuple[int, int]) -> Mix | None:
    """A mix of ``n`` images of height and width ``shape``, with that probability; one box and one share a batch.

    The box covers a uniform share of the image; its centre is uniform and what hangs over the border is lost.
    """
    chance, share, row, column = key.fold("mix").uniform(4).tolist()
    if chance >= probability:
        return None
    ends = []
    for centre, side in zip((row, column), shape, strict=True):
        middle, length = int(centre * side), int(side * math.sqrt(share))
        ends += [max(middle - length // 2, 0), min(middle + length // 2, side)]
    return Mix(key.fold("partner").permutation(n), *ends)


def _apply(images: torch.Tensor, drawn: Draw) -> torch.Tensor:
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
