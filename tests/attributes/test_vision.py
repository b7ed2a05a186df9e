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
    ("degrees", "word"), [(0, "level"), (45, "rising"), (90, "upright"), (135, "falling")]
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


def test_words_are_cut_on_other_images_only() -> None:
    fit = torch.arange(300, dtype=torch.float64)
    values = torch.tensor([-5.0, 50, 150, 250, 1e9, math.nan], dtype=torch.float64)
    assert thirds(values, fit).tolist() == [0, 0, 1, 2, 2, -1]
    assert thirds(values[:2], fit).tolist() == [0, 0]
    assert thirds(values, torch.full((3,), math.nan).double()).tolist() == [-1] * 6


def test_an_image_has_its_words_whatever_stands_beside_it_and_in_every_space(digits: Splits) -> None:
    all_of_them = Vision()(digits.test, digits.val)
    assert torch.equal(Vision()(digits.test.take(torch.arange(7)), digits.val).values, all_of_them.values[:7])
    pixels = digits.to_space(Pixel())
    changed = (Vision()(pixels.test, pixels.val).values != all_of_them.values).double().mean()
    assert float(changed) < 0.01  # numbers at the edge of a third may fall to either side
    assert fingerprints(pixels.test) == fingerprints(digits.test)
    assert len(set(fingerprints(digits.test))) == len(digits.test)


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
