"""Attributes that are measured on the pixels, without any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from distillens.attributes import MISSING, Attributes
from distillens.core.checks import UserError, one_of
from distillens.core.dataset import Dataset
from distillens.core.space import ROWS

COLOURS = ("black", "grey", "white", "red", "brown", "orange", "yellow", "green", "blue", "purple", "pink")
DARK, PALE, LIGHT = 0.2, 0.15, 0.8  # value below which a pixel is black; saturation below which it has no hue
# Hues in degrees up to which a colour goes; what is above the last is red again.
HUES = (
    (15.0, "red"),
    (42.0, "orange"),
    (70.0, "yellow"),
    (165.0, "green"),
    (260.0, "blue"),
    (310.0, "purple"),
)
HUES_END = ((345.0, "pink"), (361.0, "red"))
BROWN = 0.65  # an orange of less value is brown
CLEAR = 0.2  # coherence of the gradients below which an image has no direction
INKED = (
    0.4  # of the darkest ink: on 8 x 8 digits a threshold that leaves thin strokes whole and small loops open
)
LEVELS = 32  # of the histogram that a threshold is sought on


@dataclass(frozen=True)
class Measure:
    """One attribute: its words, what it is measured on, and how.

    ``of`` gives for pixels [n, c, h, w] a number each, NaN where it is not known, which is cut into the words at equal shares of other
    images; or, where ``cut`` is not set, the word's place itself.
    """

    words: tuple[str, ...]
    images: Literal["colour", "grey", "any"]
    of: Callable[[torch.Tensor], torch.Tensor]
    cut: bool = True

    def fits(self, channels: int) -> bool:
        """Whether images of so many channels have it."""
        return self.images == "any" or (self.images == "colour") == (channels == 3)


@dataclass(frozen=True)
class Vision:
    """Measured attributes: all that fit the images, or only the ``measures`` named.

    Images of three channels: names of the dominant colour and of the background's (the border's), brightness, contrast, texture,
    direction, size and position of the object. Of one channel they are taken for strokes on a ground: stroke width, slant, loops, aspect,
    ink, position. Numbers become words at the thirds of other images (``fit``), names of colours and directions by fixed bounds.
    """

    measures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.measures:
            one_of("measure of vision", name, MEASURES)

    def __call__(self, data: Dataset, fit: Dataset) -> Attributes:
        """The attributes of ``data``, cut at the thirds of ``fit``.

        Raises:
            UserError: a named measure does not fit the images, or none does.
        """
        channels = data.shape[0]
        fitting = [name for name, measure in MEASURES.items() if measure.fits(channels)]
        for name in self.measures:
            if name not in fitting:
                raise UserError(
                    f"vision: {name} is measured on images of {'three channels' if channels == 1 else 'one channel'}",
                    got=f"{channels} channels",
                    expected=f"one of {', '.join(fitting)}",
                )
        chosen = self.measures or tuple(fitting)
        columns = []
        for name in chosen:
            measure = MEASURES[name]
            values = measured(measure, data)
            columns.append(thirds(values, measured(measure, fit)) if measure.cut else values.long())
        words = {name.replace("_", " "): MEASURES[name].words for name in chosen}
        return Attributes(words, torch.stack(columns, 1))


def measured(measure: Measure, data: Dataset) -> torch.Tensor:
    """What a measure gives for each image [n], float64 on the CPU."""
    parts = [measure.of(data.space.to_pixels(x).double().cpu()) for x in torch.split(data.images, ROWS)]
    return torch.cat(parts).double()


def thirds(values: torch.Tensor, fit: torch.Tensor) -> torch.Tensor:
    """Values [n] as 0, 1 or 2: in the lower, middle or upper third of ``fit``; what is not known stays so."""
    known = fit[fit.isfinite()]
    if not len(known):
        return torch.full(values.shape, MISSING)
    edges = torch.quantile(known, torch.tensor([1 / 3, 2 / 3], dtype=known.dtype))
    return torch.where(values.isfinite(), torch.bucketize(values.nan_to_num(), edges), MISSING)


def _luma(x: torch.Tensor) -> torch.Tensor:
    """Brightness of each pixel [n, h, w]."""
    if x.shape[1] == 3:
        return (x * torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype)[:, None, None]).sum(1)
    return x.mean(1)


def _border(h: int, w: int) -> torch.Tensor:
    """Which pixels are the border: a tenth of the shorter side, at least one."""
    edge = max(1, round(min(h, w) / 10))
    inside = torch.zeros(h, w, dtype=torch.bool)
    inside[edge : h - edge, edge : w - edge] = True
    return ~inside


def colour_names(x: torch.Tensor) -> torch.Tensor:
    """The colour of each pixel [n, h, w] of images [n, 3, h, w], as its place in COLOURS: by fixed bounds of hue, saturation and value."""
    from matplotlib.colors import rgb_to_hsv

    hsv = torch.from_numpy(rgb_to_hsv(x.clamp(0, 1).movedim(1, -1).numpy()))
    hue, saturation, value = hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]
    found = torch.zeros(hue.shape, dtype=torch.long)
    for bound, name in reversed(HUES + HUES_END):
        found[hue < bound] = COLOURS.index(name)
    found[(found == COLOURS.index("orange")) & (value < BROWN)] = COLOURS.index("brown")
    found[saturation < PALE] = COLOURS.index("grey")
    found[(saturation < PALE) & (value > LIGHT)] = COLOURS.index("white")
    found[value < DARK] = COLOURS.index("black")
    return found


def _most_common(names: torch.Tensor) -> torch.Tensor:
    counts = torch.stack([(names == i).sum(1) for i in range(len(COLOURS))], 1)
    return counts.argmax(1)


def _colour(x: torch.Tensor) -> torch.Tensor:
    return _most_common(colour_names(x).flatten(1))


def _background(x: torch.Tensor) -> torch.Tensor:
    return _most_common(colour_names(x)[:, _border(*x.shape[2:])])


def _brightness(x: torch.Tensor) -> torch.Tensor:
    return _luma(x).mean((1, 2))


def _contrast(x: torch.Tensor) -> torch.Tensor:
    return _luma(x).flatten(1).std(1)


def _texture(x: torch.Tensor) -> torch.Tensor:
    """How far apart light and dark are, in pixels: spread over mean slope. NaN for an image of one level."""
    y = _luma(x)
    slope = (y.diff(dim=1).square().mean((1, 2)) + y.diff(dim=2).square().mean((1, 2))) / 2
    variance = y.flatten(1).var(1, correction=0)
    return torch.where(slope > 1e-12, variance / slope.clamp(min=1e-12), torch.nan).sqrt()


def _direction(x: torch.Tensor) -> torch.Tensor:
    """Where edges run, by the image's structure tensor: the place in its words."""
    y = _luma(x)
    down, right = torch.gradient(y, dim=(1, 2))
    xx, yy, xy = ((a * b).sum((1, 2)) for a, b in ((right, right), (down, down), (right, down)))
    # Edges run across the gradient. Rows count downwards: turned round, so that 45 degrees rise to the right.
    along = torch.rad2deg(-torch.atan2(2 * xy, xx - yy) / 2) + 90
    sector = torch.div(along + 22.5, 45, rounding_mode="floor") % 4
    clear = ((xx - yy).square() + 4 * xy.square()).sqrt() > CLEAR * (xx + yy)
    return torch.where(clear, sector, 4)


def otsu(x: torch.Tensor) -> torch.Tensor:
    """For numbers of at least 0 [n, p] the level [n] that parts each row best in two: Otsu 1979, on a histogram of LEVELS."""
    most = x.amax(1, keepdim=True).clamp(min=1e-12)
    bins = (x / most * LEVELS).long().clamp(max=LEVELS - 1)
    counts = torch.zeros(len(x), LEVELS, dtype=x.dtype).scatter_add(1, bins, torch.ones_like(x))
    below, sums = counts.cumsum(1), (counts * torch.arange(LEVELS)).cumsum(1)
    total, all_sums = below[:, -1:], sums[:, -1:]
    between = (all_sums * below - sums * total).square() / (below * (total - below)).clamp(min=1)
    return (between.argmax(1) + 1) / LEVELS * most[:, 0]


def _object(x: torch.Tensor) -> torch.Tensor:
    """Which pixels are the object [n, h, w]: those far from the mean colour of the border, by Otsu's threshold."""
    ground = x[:, :, _border(*x.shape[2:])].mean(2)
    far = torch.linalg.vector_norm(x - ground[:, :, None, None], dim=1)
    found: torch.Tensor = (far > otsu(far.flatten(1))[:, None, None]) & (far > 1e-6)
    return found


def _ink(x: torch.Tensor) -> torch.Tensor:
    """How much of a stroke is on each pixel [n, h, w], 0 to 1: the difference from the border's level, over the largest one."""
    y = x.mean(1)
    ground = y[:, _border(*x.shape[2:])].median(1).values
    ink = (y - ground[:, None, None]).abs()
    most = ink.amax((1, 2), keepdim=True)
    return torch.where(most > 1e-6, ink / most.clamp(min=1e-6), 0.0)


def _moments(
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre (rows, columns) and second moments (rows, columns, mixed) of weights [n, h, w]; NaN where there are none."""
    h, w = weight.shape[1:]
    rows, columns = torch.arange(h)[None, :, None], torch.arange(w)[None, None, :]
    total = weight.sum((1, 2))
    total = torch.where(total > 0, total, torch.nan)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (weight * values).sum((1, 2)) / total

    y, x = mean(rows), mean(columns)
    dy, dx = rows - y[:, None, None], columns - x[:, None, None]
    return y, x, mean(dy * dy), mean(dx * dx), mean(dy * dx)


def _size(x: torch.Tensor) -> torch.Tensor:
    return _object(x).double().mean((1, 2))


def _weight(x: torch.Tensor) -> torch.Tensor:
    """Where the object or the strokes are."""
    return _object(x).double() if x.shape[1] == 3 else _ink(x)


def _across(x: torch.Tensor) -> torch.Tensor:
    return _moments(_weight(x))[1]


def _upright(x: torch.Tensor) -> torch.Tensor:
    return _moments(_weight(x))[0]


def _amount(x: torch.Tensor) -> torch.Tensor:
    return _ink(x).mean((1, 2))


def _stroke_width(x: torch.Tensor) -> torch.Tensor:
    """Twice the area over the length of the outline, both of grey strokes: the outline is the total variation."""
    ink = torch.nn.functional.pad(_ink(x), (1, 1, 1, 1))
    down, right = ink.diff(dim=1)[:, :, 1:], ink.diff(dim=2)[:, 1:]
    outline = (down.square() + right.square()).sqrt().sum((1, 2))
    return torch.where(outline > 0, 2 * ink.sum((1, 2)) / outline.clamp(min=1e-12), torch.nan)


def _slant(x: torch.Tensor) -> torch.Tensor:
    """By how many columns a stroke moves to the right a row upwards."""
    _, _, rows, _, mixed = _moments(_ink(x))
    return torch.where(rows > 0, -mixed / rows, torch.nan)


def _aspect(x: torch.Tensor) -> torch.Tensor:
    """Height over width, by the second moments."""
    _, _, rows, columns, _ = _moments(_ink(x))
    return torch.where(columns > 0, (rows / columns).sqrt(), torch.nan)


def _loops(x: torch.Tensor) -> torch.Tensor:
    """Grounds that strokes close in: none, one, or two and more."""
    from scipy.ndimage import label

    ground = torch.nn.functional.pad((_ink(x) < INKED).byte(), (1, 1, 1, 1), value=1).numpy()
    # The one outside is connected through the padding; grounds touch at sides only, as strokes may at corners.
    holes = [label(image)[1] - 1 for image in ground]
    return torch.tensor(holes).clamp(0, 2)


MEASURES: dict[str, Measure] = {
    "dominant_colour": Measure(COLOURS, "colour", _colour, cut=False),
    "background_colour": Measure(COLOURS, "colour", _background, cut=False),
    "brightness": Measure(("dark", "medium", "bright"), "colour", _brightness),
    "contrast": Measure(("low", "medium", "high"), "colour", _contrast),
    "texture": Measure(("fine", "medium", "coarse"), "colour", _texture),
    "direction": Measure(("level", "rising", "upright", "falling", "none"), "colour", _direction, cut=False),
    "object_size": Measure(("small", "medium", "large"), "colour", _size),
    "stroke_width": Measure(("thin", "medium", "thick"), "grey", _stroke_width),
    "slant": Measure(("left", "upright", "right"), "grey", _slant),
    "loops": Measure(("none", "one", "two or more"), "grey", _loops, cut=False),
    "aspect": Measure(("wide", "medium", "narrow"), "grey", _aspect),
    "ink": Measure(("little", "medium", "much"), "grey", _amount),
    "position_across": Measure(("left", "centre", "right"), "any", _across),
    "position_upright": Measure(("top", "centre", "bottom"), "any", _upright),
}
