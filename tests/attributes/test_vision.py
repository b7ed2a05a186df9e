"""Measured attributes: on drawn images whose answer is seen at a glance, and against slow twins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from distillens import attributes
from distillens.attributes import Attributes, fingerprints
from distillens.attributes.vision import (
    COLOURS,
    LEVELS,
    MEASURES,
    Vision,
    colour_names,
    measured,
    otsu,
    thirds,
)
from distillens.core.checks import UserError
from distillens.core.config import describe, restore
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.rng import Key
from distillens.core.space import Pixel, Standardised


def dataset(images: torch.Tensor) -> Dataset:
    return Dataset(images, Hard(torch.zeros(len(images), dtype=torch.long)), ("a", "b"), Pixel())


def grey(*rows: str) -> torch.Tensor:
    """An image [1, 1, h, w] drawn in text."""
    return torch.tensor([[float(mark == "#") for mark in row] for row in rows])[None, None]


def seen(name: str, image: torch.Tensor) -> float:
    return float(measured(MEASURES[name], dataset(image))[0])


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0.0, 0.0, 0.0), "black"),
        ((1.0, 1.0, 1.0), "white"),
        ((0.5, 0.5, 0.5), "grey"),
        ((0.9, 0.1, 0.1), "red"),
        ((0.9, 0.05, 0.12), "red"),  # hue just below 360
        ((1.0, 0.55, 0.0), "orange"),
        ((0.7, 0.4, 0.1), "orange"),
        ((0.45, 0.27, 0.1), "brown"),
        ((0.95, 0.9, 0.1), "yellow"),
        ((0.1, 0.6, 0.2), "green"),
        ((0.53, 0.81, 0.92), "blue"),  # the sky is no white
        ((0.5, 0.1, 0.7), "purple"),
        ((1.0, 0.4, 0.7), "pink"),
        ((1.7, -0.3, -0.2), "red"),  # distilled pixels leave [0, 1]
    ],
)
def test_colours_have_their_names(rgb: tuple[float, float, float], name: str) -> None:
    assert COLOURS[int(colour_names(torch.tensor(rgb)[None, :, None, None])[0, 0, 0])] == name


def test_an_object_on_a_ground_is_described() -> None:
    image = torch.zeros(1, 3, 20, 20)
    image[0, 2] = 0.9  # blue everywhere
    image[0, :, 12:16, 3:9] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    assert COLOURS[int(seen("dominant_colour", image))] == "blue"
    assert COLOURS[int(seen("background_colour", image))] == "blue"
    assert seen("object_size", image) == 4 * 6 / 400
    assert seen("position_across", image) == 5.5
    assert seen("position_upright", image) == 13.5
    image[0, :, 2:18, 2:18] = torch.tensor([0.1, 0.7, 0.1])[:, None, None]
    assert COLOURS[int(seen("dominant_colour", image))] == "green"
    assert COLOURS[int(seen("background_colour", image))] == "blue"


@pytest.mark.parametrize(
    ("degrees", "word"),
    [
        *((-15, "level"), (0, "level"), (15, "level"), (30, "rising"), (45, "rising"), (60, "rising")),
        *(
            (75, "upright"),
            (90, "upright"),
            (105, "upright"),
            (120, "falling"),
            (135, "falling"),
            (150, "falling"),
        ),
    ],
)
def test_edges_have_a_direction(degrees: float, word: str) -> None:
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    angle = math.radians(degrees)
    # Waves whose crests run in that direction, upwards being positive.
    across = columns * math.sin(angle) + rows * math.cos(angle)
    image = (0.5 + 0.5 * torch.sin(across)).expand(1, 3, 24, 24)
    assert MEASURES["direction"].words[int(seen("direction", image))] == word


def test_noise_and_flat_images_have_no_direction_and_a_flat_one_no_object() -> None:
    for image in (Key(3).uniform(1, 1, 40, 40).expand(1, 3, 40, 40), torch.full((1, 3, 9, 9), 0.3)):
        assert MEASURES["direction"].words[int(seen("direction", image))] == "none"
    flat = dataset(torch.full((2, 3, 9, 9), 0.3))
    found = Vision()(flat, flat)
    places = dict(zip(found.words, found.values[0].tolist(), strict=True))
    assert places["position across"] == places["texture"] == -1
    assert places["dominant colour"] == COLOURS.index("grey")


def test_coarse_patterns_are_coarser_than_fine_ones() -> None:
    fine = Key(5).uniform(1, 3, 8, 8)
    coarse = fine.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert seen("texture", coarse) > 1.5 * seen("texture", fine)


def test_strokes_are_measured() -> None:
    ring = grey("......", ".####.", ".#..#.", ".#..#.", ".####.", "......")
    eight = grey(".......", "..###..", "..#.#..", "..###..", "..#.#..", "..###..", ".......")
    line = grey(*["......", *["..#..."] * 6, "......"])
    thick = grey(*["........", *[".####..."] * 12, "........"])
    rising = grey("........", ".....#..", "....#...", "...#....", "..#.....", "........")
    assert [seen("loops", image) for image in (line, ring, eight)] == [0, 1, 2]
    assert seen("loops", grey(".....", ".#.#.", "..#..", ".#.#.", ".....")) == 0  # corners close nothing in
    assert seen("stroke_width", thick) > 2 * seen("stroke_width", line)
    assert seen("stroke_width", line) == pytest.approx(1, abs=0.3)
    assert seen("slant", rising) == pytest.approx(1)
    assert seen("slant", rising.flip(3)) == pytest.approx(-1)
    assert seen("slant", ring) == pytest.approx(0)
    assert seen("aspect", ring) == pytest.approx(1)
    assert seen("aspect", thick) > 2
    assert seen("loops", 1 - ring) == 1  # dark strokes on a light ground are strokes too
    assert seen("ink", thick) == 48 / 112


def test_real_digits_have_the_loops_that_they_are_written_with(digits: Splits) -> None:
    found = Vision(("loops",))(digits.test, digits.val)
    shares = [float((found.values[members] > 0).double().mean()) for members in digits.test.by_class]
    assert shares[0] > 0.8
    assert max(shares[1], shares[7]) < 0.2


def test_a_threshold_parts_numbers_best() -> None:
    x = torch.cat([Key(1).uniform(4, 60) * 0.3, 0.6 + Key(2).uniform(4, 20) * 0.4], 1).double()
    for row, found in zip(x.numpy(), otsu(x).tolist(), strict=True):
        edges = np.arange(1, LEVELS) / LEVELS * row.max()
        # The variance within the two parts, of the middles of the histogram's bins.
        middles = np.minimum(np.floor(row / row.max() * LEVELS), LEVELS - 1)
        within = [
            sum(part.var() * len(part) for part in (middles[row < e], middles[row >= e]) if len(part))
            for e in edges
        ]
        assert within[int(np.argmin(within))] == pytest.approx(within[round(found / row.max() * LEVELS) - 1])


# The slow twin of what is measured: loops over one image's pixels, in numpy.


def border(h: int, w: int) -> list[tuple[int, int]]:
    edge = max(1, round(min(h, w) / 10))
    return [
        (y, x) for y in range(h) for x in range(w) if y < edge or x < edge or y >= h - edge or x >= w - edge
    ]


def centre(weight: np.ndarray) -> tuple[float, float]:
    total = sum(weight[y, x] for y, x in np.ndindex(weight.shape))
    return (
        sum(y * weight[y, x] for y, x in np.ndindex(weight.shape)) / total,
        sum(x * weight[y, x] for y, x in np.ndindex(weight.shape)) / total,
    )


def by_hand_in_colour(image: np.ndarray) -> dict[str, float]:
    """The measures of an image [3, h, w]."""
    _, h, w = image.shape
    luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    slopes = [(luma[y + 1, x] - luma[y, x]) ** 2 for y in range(h - 1) for x in range(w)]
    across = [(luma[y, x + 1] - luma[y, x]) ** 2 for y in range(h) for x in range(w - 1)]
    # Edges run across the gradient: its covariance, by an eigenvector.
    down, right = np.gradient(luma)
    values, vectors = np.linalg.eigh(
        np.array([[(right**2).sum(), (right * down).sum()], [(right * down).sum(), (down**2).sum()]])
    )
    degrees = math.degrees(math.atan2(-vectors[1, 0], vectors[0, 0])) % 180
    clear = values[1] - values[0] > 0.2 * values.sum()
    ground = np.mean([image[:, y, x] for y, x in border(h, w)], 0)
    far = np.linalg.norm(image - ground[:, None, None], axis=0)
    # Otsu 1979: the cut of a histogram of 32 bins with the least variance within.
    bins = np.minimum((far / far.max() * 32).astype(int), 31).ravel()
    cuts = [c for c in range(1, 32) if 0 < (bins < c).sum() < len(bins)]
    within = [sum(p.var() * len(p) for p in (bins[bins < c], bins[bins >= c])) for c in cuts]
    found = (far > cuts[int(np.argmin(within))] / 32 * far.max()).astype(float)
    upright, across_at = centre(found)
    return {
        "brightness": luma.mean(),
        "contrast": luma.std(ddof=1),
        "texture": math.sqrt(luma.var() / ((np.mean(slopes) + np.mean(across)) / 2)),
        "direction": [0, 1, 2, 3, 0][int((degrees + 22.5) // 45)] if clear else 4,
        "object_size": found.mean(),
        "position_upright": upright,
        "position_across": across_at,
    }


def by_hand_of_strokes(image: np.ndarray) -> dict[str, float]:
    """The measures of an image [h, w]."""
    h, w = image.shape
    # torch's median is the lower of two.
    levels = sorted(image[y, x] for y, x in border(h, w))
    ink = abs(image - levels[(len(levels) - 1) // 2])
    ink = ink / ink.max()
    y0, x0 = centre(ink)
    rows, columns, mixed = (
        sum(ink[y, x] * (y - y0) ** a * (x - x0) ** b for y, x in np.ndindex(h, w)) / ink.sum()
        for a, b in ((2, 0), (0, 2), (1, 1))
    )
    padded = np.pad(ink, 1)
    outline = sum(
        math.hypot(padded[y, x] - padded[y - 1, x], padded[y, x] - padded[y, x - 1])
        for y in range(1, h + 2)
        for x in range(1, w + 2)
    )
    return {
        "stroke_width": 2 * ink.sum() / outline,
        "slant": -mixed / rows,
        "aspect": math.sqrt(rows / columns),
        "ink": ink.mean(),
        "position_upright": y0,
        "position_across": x0,
    }


def test_measures_of_colour_images_are_those_of_slow_loops() -> None:
    """Coloured noise with a wave in some direction, from none to clear, and a patch."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(15.0), indexing="ij")
    words = set()
    for i in range(24):
        key = Key(11).fold(i)
        angle = math.radians(float(key.fold("angle").uniform()) * 180)
        wave = torch.sin(1.2 * (columns * math.sin(angle) + rows * math.cos(angle)))
        image = 0.3 + 0.25 * key.fold("noise").uniform(3, 12, 15) + 0.008 * i * wave
        y, x = key.fold("at").integers(8, 2).tolist()
        image[:, y : y + 4, x : x + 5] += key.fold("patch").uniform(3)[:, None, None] * 0.4
        for name, value in by_hand_in_colour(image.double().numpy()).items():
            assert seen(name, image[None]) == pytest.approx(value, abs=1e-6), name
        words.add(MEASURES["direction"].words[int(seen("direction", image[None]))])
    assert words == set(MEASURES["direction"].words)


def test_measures_of_strokes_are_those_of_slow_loops() -> None:
    """Grey strokes of any strength, to the border, on grey grounds: also darker ones on lighter grounds."""
    for i in range(12):
        key = Key(12).fold(i)
        ground, sign = 0.2 + 0.05 * i, 1 if i % 2 else -1
        image = torch.full((9, 12), ground) + 0.02 * key.fold("noise").uniform(9, 12)
        y, x = key.fold("at").integers(5, 2).tolist()
        image[y : y + 5, x : x + 2] += sign * 0.15 * (1 + key.fold("stroke").uniform(5, 2))
        for name, value in by_hand_of_strokes(image.double().numpy()).items():
            assert seen(name, image[None, None]) == pytest.approx(value, abs=1e-6), name


def block(top: int, left: int, height: int, width: int) -> torch.Tensor:
    """A light block on a dark ground [1, 1, 16, 16]."""
    image = torch.zeros(1, 1, 16, 16)
    image[..., top : top + height, left : left + width] = 1
    return image


STRIPES = torch.arange(16)
DIAGONAL = torch.eye(16)[None, None] * torch.tensor([0.0] * 4 + [1.0] * 8 + [0.0] * 4)


@pytest.mark.parametrize(
    ("name", "words", "images"),
    [
        (
            "brightness",
            ["dark", "medium", "bright"],
            [torch.full((1, 1, 16, 16), x) for x in (0.1, 0.5, 0.9)],
        ),
        ("contrast", ["low", "medium", "high"], [0.9 - x * block(4, 4, 8, 8) for x in (0.1, 0.4, 0.8)]),
        (
            "texture",
            ["fine", "medium", "coarse"],
            [(STRIPES // x % 2).float().expand(1, 1, 16, 16) for x in (1, 2, 4)],
        ),
        ("object_size", ["small", "medium", "large"], [block(3, 3, x, x) for x in (2, 5, 9)]),
        ("stroke_width", ["thin", "medium", "thick"], [block(2, 5, 12, x) for x in (1, 2, 4)]),
        ("slant", ["left", "upright", "right"], [DIAGONAL, block(2, 5, 12, 2), DIAGONAL.flip(3)]),
        ("aspect", ["wide", "medium", "narrow"], [block(6, 2, 3, 12), block(4, 4, 7, 7), block(2, 6, 12, 3)]),
        ("ink", ["little", "medium", "much"], [block(3, 3, x, x) for x in (2, 5, 9)]),
        ("position_across", ["left", "centre", "right"], [block(6, x, 4, 4) for x in (1, 6, 11)]),
        ("position_upright", ["top", "centre", "bottom"], [block(x, 6, 4, 4) for x in (1, 6, 11)]),
        (
            "loops",
            ["none", "one", "two or more"],
            [
                block(4, 4, 6, 6),
                block(2, 2, 6, 6) - block(4, 4, 2, 2),
                block(2, 2, 10, 6) - block(4, 4, 2, 2) - block(8, 4, 2, 2),
            ],
        ),
    ],
)
def test_words_say_what_is_seen(name: str, words: list[str], images: list[torch.Tensor]) -> None:
    channels = {"colour": [3], "grey": [1], "any": [1, 3]}[MEASURES[name].images]
    for c in channels:
        data = dataset(torch.cat(images).expand(-1, c, -1, -1))
        found = Vision((name,))(data, data)
        ((_, known),) = found.words.items()
        assert [known[i] for i in found.values[:, 0].tolist()] == words


def test_a_small_loop_in_grey_strokes_is_seen_and_a_faint_ground_is_no_stroke() -> None:
    """What is less than INKED of the darkest ink is ground."""
    ring = grey("......", ".####.", ".#..#.", ".#..#.", ".####.", "......")
    assert seen("loops", torch.where(ring > 0, 1.0, 0.0) * 0.6 + 0.4 * ring[..., :1, :1]) == 1
    half = ring.clone()
    half[..., 1, 2] = 0.5  # a thinner place
    assert seen("loops", half) == 1
    half[..., 1, 2] = 0.3  # an open one
    assert seen("loops", half) == 0
    touching = grey("####", "#..#", "#..#", "####")  # strokes on the border: the ground is the border's level
    assert seen("loops", touching) == 0


def test_words_are_cut_on_other_images_only() -> None:
    fit = torch.arange(300, dtype=torch.float64)
    values = torch.tensor([-5.0, 50, 150, 250, 1e9, math.nan], dtype=torch.float64)
    assert thirds(values, fit).tolist() == [0, 0, 1, 2, 2, -1]
    assert thirds(values[:2], fit).tolist() == [0, 0]
    edges = torch.tensor([99.6, 99.7, 199.3, 199.4], dtype=torch.float64)
    assert thirds(edges, fit).tolist() == [0, 1, 1, 2]
    # Where a third of the images and more are alike their words are alike: what lies on an edge is below it.
    assert thirds(torch.tensor([0.0, 0.5, 3.0]), torch.tensor([0.0] * 6 + [1.0, 2, 3, 4])).tolist() == [
        0,
        1,
        2,
    ]
    assert thirds(values, torch.full((3,), math.nan).double()).tolist() == [-1] * 6


def test_an_image_has_its_words_whatever_stands_beside_it_and_in_every_space(digits: Splits) -> None:
    all_of_them = Vision()(digits.test, digits.val)
    assert torch.equal(Vision()(digits.test.take(torch.arange(7)), digits.val).values, all_of_them.values[:7])
    pixels = digits.to_space(Pixel())
    changed = (Vision()(pixels.test, pixels.val).values != all_of_them.values).double().mean()
    assert float(changed) < 0.01  # numbers at the edge of a third may fall to either side
    assert fingerprints(pixels.test) == fingerprints(digits.test)
    assert len(set(fingerprints(digits.test))) == len(digits.test)


def test_an_image_has_its_name_in_every_space_and_another_in_another_shape() -> None:
    halves = torch.arange(17.0).div(16).expand(2, 3, 4, 17)  # times 255, 8/16 lies at a half
    data = dataset(halves)
    for i in range(20):
        mean, std = (tuple(Key(6).fold(name, i).uniform(3, low=0.1, high=0.9).tolist()) for name in "ms")
        moved = data.to_space(Standardised(mean, std))
        assert not torch.equal(moved.images, data.images)
        assert fingerprints(moved) == fingerprints(data)
    assert fingerprints(dataset(torch.zeros(1, 1, 4, 9))) != fingerprints(dataset(torch.zeros(1, 1, 9, 4)))


def test_colours_are_those_of_pixels_in_every_space() -> None:
    data = dataset(Key(9).uniform(20, 3, 8, 8) * Key(9).fold("level").uniform(20, 3)[..., None, None])
    moved = data.to_space(Standardised((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    names = ("dominant_colour", "background_colour", "direction")
    assert torch.equal(Vision(names)(moved, moved).values, Vision(names)(data, data).values)
    assert len(set(Vision(names)(data, data).values[:, 0].tolist())) > 3


def test_measures_can_be_named_and_must_fit(digits: Splits) -> None:
    assert list(Vision(("slant", "ink"))(digits.test, digits.val).words) == ["slant", "ink"]
    with pytest.raises(UserError, match=r"unknown measure of vision 'slunt'.*Did you mean 'slant'"):
        Vision(("slunt",))
    with pytest.raises(UserError, match="vision: contrast is measured on images of three channels"):
        Vision(("contrast",))(digits.test, digits.val)
    colour = dataset(torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match="vision: slant is measured on images of one channel"):
        Vision(("slant",))(colour, colour)


def test_odd_shapes_and_spaces() -> None:
    space = Standardised((0.5,) * 3, (0.2,) * 3)
    images = Key(8).normal(5, 3, 8, 12)
    data = Dataset(images, Hard(torch.zeros(5, dtype=torch.long)), ("a", "b"), space)
    assert Vision()(data, data).values.shape == (5, 9)


def test_every_source_is_found_and_its_settings_come_back() -> None:
    assert attributes.room.names() == ["clip", "labels", "vision", "vlm"]
    for name in attributes.room.names():
        source: Any = attributes.named(name)
        assert restore(describe(source)) == source


def test_words_become_columns() -> None:
    found = Attributes({"a": ("x", "y"), "b": ("u", "v", "w")}, torch.tensor([[0, 2], [1, -1]]))
    assert len(found) == 2
    assert found.each == (("a", "x"), ("a", "y"), ("b", "u"), ("b", "v"), ("b", "w"))
    assert found.has().tolist() == [[True, False, False, False, True], [False, True, False, False, False]]


@pytest.mark.parametrize(
    ("words", "values", "said"),
    [
        ({"a": ("x", "y")}, [[0, 1]], "every attribute needs a column of values"),
        ({"a": ("x",)}, [[0]], "the attribute 'a' needs two words or more"),
        ({"a": ("x", "y")}, [[2]], "the attribute 'a' has values that are none of its words"),
        ({"a": ("x", "y")}, [[-2]], "the attribute 'a' has values that are none of its words"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    words: dict[str, tuple[str, ...]], values: list[list[int]], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        Attributes(words, torch.tensor(values))
