"""Small synthetic data with a known truth: a smooth template a class, and noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distillens.core.checks import at_least
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.rng import Key
from distillens.core.space import Standardised


def planted(
    key: Key,
    *,
    classes: int = 3,
    per_class: int = 40,
    shape: tuple[int, int, int] = (1, 8, 12),
    noise: float = 0.3,
    signal: float = 1.0,
) -> Splits:
    """Images ``signal * template[class] + noise * normal``, ``per_class`` a class in each of the three splits.

    With ``signal=0`` the images carry no information about their class: a null. Classes take turns, and every
    image has its own draw, so a larger ``per_class`` continues a smaller one. The numbers above are in the
    images' own space: standardised, pixels = 0.5 + 0.1 * image, so that few of them leave [0, 1].

    >>> len(planted(Key(0)).train), planted(Key(0)).train.shape
    (120, (1, 8, 12))

    Raises:
        UserError: a number is out of its range.
    """
    at_least(1, "planted data", per_class=per_class)
    at_least(0, "planted data", noise=noise, signal=signal)
    truth = templates(key, classes=classes, shape=shape)
    labels = torch.arange(classes).repeat(per_class)
    space = Standardised((0.5,) * shape[0], (0.1,) * shape[0])
    names = tuple(str(c) for c in range(classes))

    def split(name: str) -> Dataset:
        draws = torch.stack(
            [key.fold(name, i // classes, i % classes).normal(*shape) for i in range(len(labels))]
        )
        return Dataset(signal * truth[labels] + noise * draws, Hard(labels), names, space)

    return Splits(split("train"), split("val"), split("test"), "planted")


def templates(key: Key, *, classes: int = 3, shape: tuple[int, int, int] = (1, 8, 12)) -> torch.Tensor:
    """The truth behind ``planted``: a smooth image a class, [k, c, h, w], each of mean 0 and mean square 1.

    Raises:
        UserError: a number is out of its range.
    """
    c, h, w = shape
    at_least(2, "planted data", classes=classes, height=h, width=w)
    at_least(1, "planted data", channels=c)
    # Nine draws a channel, joined by straight lines: nothing changes between neighbours but slowly.
    coarse = torch.stack([key.fold("template", k).normal(c, 3, 3) for k in range(classes)])
    smooth = F.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=True)
    centred = smooth - smooth.mean((1, 2, 3), keepdim=True)
    return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt()
