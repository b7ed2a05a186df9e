"""The units of images: round trips, and whitening against its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.rng import Key
from distillens.core.space import Pixel, Space, Standardised, Zca, restore_space, same_space

SHAPE = (2, 3, 4)
D = 24
# Neighbouring pixels correlate, as they do in pictures.
MIX = Key(5).fold("mix").normal(D, D) / D**0.5
PIXELS = (0.5 + 0.15 * Key(5).fold("noise").normal(60, D) @ MIX).clamp(0, 1).reshape(60, *SHAPE)
SPACES: dict[str, Space] = {
    "pixel": Pixel(),
    "standardised": Standardised((0.47, 0.3), (0.25, 0.11)),
    "zca": Zca.fit(PIXELS),
}
spaces = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


@spaces
def test_pixels_come_back(space: Space) -> None:
    assert float((space.to_pixels(space.from_pixels(PIXELS)) - PIXELS).abs().max()) < 1e-5
    assert float((space.from_pixels(space.to_pixels(PIXELS)) - PIXELS).abs().max()) < 1e-5


@spaces
def test_the_map_keeps_shape_and_kind_of_number(space: Space) -> None:
    for images in (PIXELS[:5], PIXELS[:5].double(), PIXELS[:0]):
        for moved in (space.from_pixels(images), space.to_pixels(images)):
            assert (moved.shape, moved.dtype) == (images.shape, images.dtype)


@spaces
def test_an_image_is_mapped_alone(space: Space) -> None:
    together = space.from_pixels(PIXELS)
    alone = torch.cat([space.from_pixels(image[None]) for image in PIXELS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@spaces
def test_gradients_flow_both_ways(space: Space) -> None:
    x = PIXELS[:2].double().requires_grad_()
    assert torch.autograd.gradcheck(space.to_pixels, (x,))
    assert torch.autograd.gradcheck(space.from_pixels, (x,))


@spaces
def test_a_restored_space_is_the_same(space: Space) -> None:
    again = restore_space(space.describe(), space.tensors())
    assert same_space(space, again)
    assert torch.equal(space.from_pixels(PIXELS), again.from_pixels(PIXELS))
    assert torch.equal(space.to_pixels(PIXELS), again.to_pixels(PIXELS))


def test_equal_descriptions_are_equal_spaces_and_others_differ() -> None:
    others: list[Space] = [
        *SPACES.values(),
        Standardised((0.47, 0.31), (0.25, 0.11)),
        Standardised((0.47, 0.3), (0.25, 0.12)),
        Zca.fit(PIXELS, 0.2),
        Zca.fit(PIXELS[1:]),
    ]
    for i, first in enumerate(others):
        for j, second in enumerate(others):
            assert same_space(first, second) == (i == j)
    assert same_space(Zca.fit(PIXELS), Zca.fit(PIXELS.clone()))


def test_standardised_is_channel_by_channel() -> None:
    moved = SPACES["standardised"].from_pixels(PIXELS)
    for c, (mean, std) in enumerate([(0.47, 0.25), (0.3, 0.11)]):
        torch.testing.assert_close(moved[:, c], (PIXELS[:, c] - mean) / std)


def whitening_by_formula(pixels: torch.Tensor, regulariser: float) -> tuple[np.ndarray, np.ndarray]:
    """``(cov + regulariser I)^(-1/2)`` in float64 from its definition, and the mean."""
    flat = pixels.flatten(1).double().numpy()
    mean = np.array([sum(column) / len(flat) for column in flat.T])
    cov = np.zeros((D, D))
    for row in flat:
        cov += np.outer(row - mean, row - mean)
    cov /= len(flat) - 1
    square = np.linalg.inv(cov + regulariser * np.eye(D))
    # The root of a positive matrix by Newton's iteration: no eigenvectors in it.
    root, inverse_root = square, np.eye(D)
    for _ in range(40):
        root, inverse_root = (
            (root + np.linalg.inv(inverse_root)) / 2,
            (inverse_root + np.linalg.inv(root)) / 2,
        )
    assert np.abs(root @ root - square).max() < 1e-9
    return root, mean


@pytest.mark.parametrize("regulariser", [0.1, 0.01])
def test_whitening_is_its_formula(regulariser: float) -> None:
    matrix, mean = whitening_by_formula(PIXELS, regulariser)
    space = Zca.fit(PIXELS, regulariser)
    assert np.abs(space.matrix.numpy() - matrix).max() < 1e-5
    assert np.abs(space.inverse.numpy() @ matrix - np.eye(D)).max() < 1e-5
    expected = (PIXELS.flatten(1).double().numpy() - mean) @ matrix
    assert np.abs(space.from_pixels(PIXELS).flatten(1).numpy() - expected).max() < 1e-5


def test_the_usual_regulariser_is_a_tenth() -> None:
    assert same_space(Zca.fit(PIXELS), Zca.fit(PIXELS, 0.1))


def test_whitened_images_have_mean_zero_and_shrunken_covariance() -> None:
    white = Zca.fit(PIXELS).from_pixels(PIXELS).flatten(1).double()
    assert float(white.mean(0).abs().max()) < 1e-5
    cov = torch.cov(PIXELS.flatten(1).double().T)
    values, vectors = torch.linalg.eigh(cov)
    expected = (vectors * (values / (values + 0.1))) @ vectors.T
    torch.testing.assert_close(torch.cov(white.T), expected, rtol=1e-4, atol=1e-6)


def test_with_hardly_a_regulariser_whitened_images_have_unit_covariance() -> None:
    white = Zca.fit(PIXELS.double(), 1e-7).from_pixels(PIXELS.double()).flatten(1)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(D).double(), rtol=0, atol=0.01)


def test_whitening_is_symmetric() -> None:
    space = Zca.fit(PIXELS)
    torch.testing.assert_close(space.matrix, space.matrix.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mean", "matrix", "inverse"])
def test_a_tampered_whitening_is_refused(name: str) -> None:
    space = SPACES["zca"]
    tensors = {n: t.clone() for n, t in space.tensors().items()}
    tensors[name].view(-1)[3] += 1e-3
    with pytest.raises(
        UserError,
        match="a whitening matrix differs from the one that was recorded; make the file again",
    ):
        restore_space(space.describe(), tensors)


@pytest.mark.parametrize(("shape", "kind"), [([2, 4, 3], "kornia"), ([2, 3, 4], "other")])
def test_a_tampered_description_of_a_whitening_is_refused(shape: list[int], kind: str) -> None:
    space = SPACES["zca"]
    again = restore_space({**space.describe(), "shape": shape, "zca": kind}, space.tensors())
    assert not same_space(again, space)


def test_a_matrix_of_another_size_is_refused() -> None:
    space = SPACES["zca"]
    with pytest.raises(
        UserError,
        match=r"a whitening matrix does not fit its image shape; got mean \(24,\), matrix \(24, 24\); "
        r"expected \[12\] and \[12, 12\] for images \(1, 3, 4\)",
    ):
        Zca("kornia", (1, 3, 4), **space.tensors())


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (SPACES["standardised"], r"\[n, 2, h, w\]"),
        (SPACES["zca"], r"\[n, \(2, 3, 4\)\]"),
    ],
)
def test_images_of_another_shape_are_refused(space: Space, expected: str) -> None:
    for change in (space.from_pixels, space.to_pixels):
        with pytest.raises(
            UserError, match=rf"images do not fit their space; got shape \(7, 1, 3, 4\); expected {expected}"
        ):
            change(torch.zeros(7, 1, 3, 4))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (
            (0.1, 0.2),
            (0.1,),
            "a standardised space needs one mean and one std a channel; got 2 means and 1 stds",
        ),
        ((), (), "a standardised space needs one mean and one std a channel; got 0 means and 0 stds"),
        ((0.1,), (0.0,), "a standardised space: std must be above 0; got 0.0"),
        ((0.1,), (float("nan"),), "a standardised space: std must be above 0; got nan"),
    ],
)
def test_constants_that_do_not_fit_are_refused(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Standardised(mean, std)


def test_a_regulariser_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"zca: regulariser must be at least 1e-08; got 0.0"):
        Zca.fit(PIXELS, 0.0)


def test_an_unknown_space_is_refused() -> None:
    with pytest.raises(UserError, match="unknown space; got 'lab'; expected pixel, standardised or zca"):
        restore_space({"kind": "lab"}, {})
