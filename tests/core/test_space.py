"""The units of images: round trips, and whitening against its formula."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distillens.core.checks import UserError
from distillens.core.rng import Key
from distillens.core.space import KINDS, Kind, Pixel, Space, Standardised, Zca, restore_space, same_space
from distillens.core.storage import fingerprint

SHAPE = (2, 3, 4)
D = 24
# Neighbouring pixels correlate, as they do in pictures.
MIX = Key(5).fold("mix").normal(D, D) / D**0.5
PIXELS = (0.5 + 0.15 * Key(5).fold("noise").normal(60, D) @ MIX).clamp(0, 1).reshape(60, *SHAPE)
SPACES: dict[str, Space] = {
    "pixel": Pixel(),
    "standardised": Standardised((0.47, 0.3), (0.25, 0.11)),
    "zca": Zca.fit(PIXELS),
    "zca-kip": Zca.fit(PIXELS, "kip"),
    "zca-frepo": Zca.fit(PIXELS, "frepo"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
spaces = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


def test_every_space_is_called_what_the_command_calls_it() -> None:
    assert [space.name for space in SPACES.values()] == list(SPACES)


@spaces
def test_pixels_come_back_where_the_space_says_so(space: Space) -> None:
    again = space.to_pixels(space.from_pixels(PIXELS))
    assert (float((again - PIXELS).abs().max()) < 1e-5) == space.invertible
    assert space.invertible == (space.name != "zca-kip")
    if space.invertible:
        assert float((space.from_pixels(space.to_pixels(PIXELS)) - PIXELS).abs().max()) < 1e-5


def test_what_kip_gives_back_is_the_image_up_to_brightness_and_contrast() -> None:
    space = SPACES["zca-kip"]
    white = space.from_pixels(PIXELS)
    again = space.to_pixels(white)
    levels, lengths = (
        PIXELS.flatten(1).mean(1),
        (PIXELS - PIXELS.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1),
    )
    own = (PIXELS - levels.view(-1, 1, 1, 1)) / lengths.view(-1, 1, 1, 1)
    torch.testing.assert_close(again, own * lengths.mean() + levels.mean(), rtol=0, atol=1e-5)
    # What comes back is at the same place in the space: what is lost, the space does not see.
    torch.testing.assert_close(space.from_pixels(again), white, rtol=0, atol=1e-5)
    torch.testing.assert_close(space.from_pixels(0.3 * PIXELS + 0.2), white, rtol=0, atol=1e-4)


def test_to_kip_an_image_of_one_level_is_nothing() -> None:
    flat = torch.full((2, *SHAPE), 0.3)
    assert float(SPACES["zca-kip"].from_pixels(flat).abs().max()) == 0


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
        *(Zca.fit(PIXELS, kind, 0.2) for kind in KINDS),
        *(Zca.fit(PIXELS[1:], kind) for kind in KINDS),
    ]
    for i, first in enumerate(others):
        for j, second in enumerate(others):
            assert same_space(first, second) == (i == j)
    assert same_space(Zca.fit(PIXELS), Zca.fit(PIXELS.clone()))


def test_standardised_is_channel_by_channel() -> None:
    moved = SPACES["standardised"].from_pixels(PIXELS)
    for c, (mean, std) in enumerate([(0.47, 0.25), (0.3, 0.11)]):
        torch.testing.assert_close(moved[:, c], (PIXELS[:, c] - mean) / std)


def inverse_root(square: np.ndarray) -> np.ndarray:
    """``square^(-1/2)`` by Newton's iteration: no eigenvectors in it."""
    inverse = np.linalg.inv(square)
    root, other = inverse, np.eye(D)
    for _ in range(40):
        root, other = (root + np.linalg.inv(other)) / 2, (other + np.linalg.inv(root)) / 2
    assert np.abs(root @ root - inverse).max() < 1e-8 * np.abs(inverse).max()
    return root


def outer_mean(rows: np.ndarray, over: int) -> np.ndarray:
    total = np.zeros((D, D))
    for row in rows:
        total += np.outer(row, row)
    return total / over


def kornia(x: np.ndarray, regulariser: float) -> tuple[np.ndarray, np.ndarray]:
    """Whitened images [n, d] and the matrix, in float64 from the definition."""
    centred = x - np.array([sum(column) / len(x) for column in x.T])
    matrix = inverse_root(outer_mean(centred, len(x) - 1) + regulariser * np.eye(D))
    return centred @ matrix, matrix


def kip(x: np.ndarray, regulariser: float) -> tuple[np.ndarray, np.ndarray]:
    unit = np.array([(row - sum(row) / D) / np.sqrt(((row - sum(row) / D) ** 2).sum()) for row in x])
    cov = outer_mean(unit, len(x))
    matrix = inverse_root(cov + regulariser * sum(cov[i, i] for i in range(D)) / D * np.eye(D))
    return unit @ matrix, matrix


def frepo(x: np.ndarray, regulariser: float) -> tuple[np.ndarray, np.ndarray]:
    channels = x.reshape(len(x), SHAPE[0], -1)
    normal = np.stack([(one - one.mean()) / one.std() for one in channels.swapaxes(0, 1)], 1).reshape(x.shape)
    normal -= np.array([sum(column) / len(x) for column in normal.T])
    cov = outer_mean(normal, len(x))
    matrix = inverse_root(cov + regulariser * sum(cov[i, i] for i in range(D)) / D * np.eye(D))
    return normal @ matrix, matrix


FORMULAS: dict[Kind, Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]] = {
    "kornia": kornia,
    "kip": kip,
    "frepo": frepo,
}


@every_kind
@pytest.mark.parametrize("regulariser", [0.1, 0.01])
def test_whitening_is_its_formula(kind: Kind, regulariser: float) -> None:
    expected, matrix = FORMULAS[kind](PIXELS.flatten(1).double().numpy(), regulariser)
    space = Zca.fit(PIXELS, kind, regulariser)
    size = np.abs(matrix).max()
    assert np.abs(space.matrix.numpy() - matrix).max() < 1e-6 * size
    assert np.abs(space.inverse.double().numpy() @ matrix - np.eye(D)).max() < 1e-5
    assert np.abs(space.from_pixels(PIXELS).flatten(1).numpy() - expected).max() < 1e-6 * size


@every_kind
def test_the_usual_regulariser_is_a_tenth(kind: Kind) -> None:
    assert same_space(Zca.fit(PIXELS, kind), Zca.fit(PIXELS, kind, 0.1))


@every_kind
def test_in_pieces_it_is_the_same_whitening(kind: Kind) -> None:
    whole = Zca.fit(PIXELS.double(), kind)
    for sizes in ([60], [1] * 60, [7, 50, 3]):
        parts = Zca.fit(iter(torch.split(PIXELS.double(), sizes)), kind)
        for name, tensor in whole.tensors().items():
            torch.testing.assert_close(parts.tensors()[name], tensor, rtol=1e-6, atol=1e-6)


@every_kind
def test_blocks_of_columns_change_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Zca.fit(PIXELS, kind)
    monkeypatch.setattr("distillens.core.space.BLOCK", 5)
    torch.testing.assert_close(Zca.fit(PIXELS, kind).matrix, whole.matrix, rtol=1e-6, atol=1e-6)


@every_kind
def test_the_same_images_give_the_same_bytes_on_any_number_of_threads(kind: Kind) -> None:
    pixels = Key(6).uniform(600, 3, 16, 15)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        space = Zca.fit(pixels, kind)
        found.append((space.describe(), space.from_pixels(pixels), space.to_pixels(pixels)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for described, white, back in found[1:]:
        assert described == found[0][0]
        assert torch.equal(white, found[0][1]) and torch.equal(back, found[0][2])


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is the system's own")
def test_memory_is_a_few_matrices_whatever_the_number_of_images() -> None:
    script = """
import resource, torch
from distillens.core.space import Zca

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

Zca.fit(torch.rand(20, 1, 4, 4))
before = peak()
for n in (4000, 40000):
    Zca.fit(torch.rand(200, 3, 12, 12) for _ in range(n // 200))
    print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    few, many = map(int, done.stdout.split())
    images = 36_000 * 4 * 432  # the 36,000 more, in float32: 62 MB; a matrix in float64 is 1.5 MB
    assert many - few < images / 6
    assert many < images / 2


def test_whitened_images_have_mean_zero_and_shrunken_covariance() -> None:
    white = Zca.fit(PIXELS).from_pixels(PIXELS).flatten(1).double()
    assert float(white.mean(0).abs().max()) < 1e-5
    cov = torch.cov(PIXELS.flatten(1).double().T)
    values, vectors = torch.linalg.eigh(cov)
    expected = (vectors * (values / (values + 0.1))) @ vectors.T
    torch.testing.assert_close(torch.cov(white.T), expected, rtol=1e-4, atol=1e-6)


def test_with_hardly_a_regulariser_whitened_images_have_unit_covariance() -> None:
    white = Zca.fit(PIXELS.double(), "kornia", 1e-7).from_pixels(PIXELS.double()).flatten(1)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(D).double(), rtol=0, atol=0.01)


def test_what_is_stored_is_half_the_matrix_and_no_inverse() -> None:
    space = Zca.fit(PIXELS)
    assert torch.equal(space.matrix, space.matrix.T)
    assert {name: tensor.numel() for name, tensor in space.tensors().items()} == {
        "mean": D,
        "scale": SHAPE[0],
        "triangle": D * (D + 1) // 2,
    }


def test_the_inverse_does_not_travel_to_other_processes() -> None:
    space = Zca.fit(PIXELS)
    bare = len(pickle.dumps(space))
    assert space.inverse.shape == (D, D)
    assert len(pickle.dumps(space)) == bare
    assert same_space(pickle.loads(pickle.dumps(space)), space)


def test_restored_twice_is_one_whitening_in_memory() -> None:
    space = Zca.fit(PIXELS)
    first, second = (restore_space(space.describe(), space.tensors()) for _ in range(2))
    assert first is second


@pytest.mark.parametrize("name", ["mean", "scale", "triangle"])
@every_kind
def test_a_tampered_whitening_is_refused(name: str, kind: Kind) -> None:
    space = Zca.fit(PIXELS, kind)
    tensors = {n: t.clone() for n, t in space.tensors().items()}
    tensors[name].view(-1)[1] += 1e-3
    with pytest.raises(
        UserError,
        match="a whitening matrix differs from the one that was recorded; make the file again",
    ):
        restore_space(space.describe(), tensors)


def test_a_whitening_of_an_earlier_version_is_refused() -> None:
    space = SPACES["zca"]
    tensors = {"mean": torch.zeros(D), "matrix": torch.eye(D), "inverse": torch.eye(D)}
    with pytest.raises(
        UserError, match="a whitened set of an earlier version stores another matrix; make it again"
    ):
        restore_space(space.describe(), tensors)


def test_a_tampered_description_of_a_whitening_is_refused() -> None:
    space = SPACES["zca"]
    again = restore_space({**space.describe(), "shape": [2, 4, 3]}, space.tensors())
    assert not same_space(again, space)
    again = restore_space({**space.describe(), "zca": "frepo"}, space.tensors())
    assert not same_space(again, space)
    with pytest.raises(UserError, match="unknown kind of whitening 'other'; Known: frepo, kip, kornia"):
        restore_space({**space.describe(), "zca": "other"}, space.tensors())


def test_a_matrix_of_another_size_is_refused() -> None:
    space = Zca.fit(PIXELS)
    with pytest.raises(
        UserError,
        match=r"a whitening matrix does not fit its image shape; got mean \(24,\), scale \(2,\), "
        r"matrix \(24, 24\); expected \[12\], \[1\] and \[12, 12\] for images \(1, 3, 4\)",
    ):
        Zca("kornia", (1, 3, 4), space.mean, space.scale, space.matrix)


def test_a_triangle_of_another_size_is_refused() -> None:
    tensors = {"mean": torch.zeros(D), "scale": torch.ones(2), "triangle": torch.ones(10)}
    fit = fingerprint(*tensors.values())
    with pytest.raises(UserError, match="a whitening matrix does not fit its mean; got 10 numbers for 24"):
        restore_space({"kind": "zca", "zca": "kornia", "shape": list(SHAPE), "fit": fit}, tensors)


def test_a_matrix_that_is_not_symmetric_is_refused() -> None:
    space = Zca.fit(PIXELS)
    matrix = space.matrix.clone()
    matrix[3, 1] += 1e-3
    with pytest.raises(UserError, match="a whitening matrix is not symmetric; make the file again"):
        Zca("kornia", SHAPE, space.mean, space.scale, matrix)


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
        Zca.fit(PIXELS, "kornia", 0.0)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown kind of whitening 'cornea'; Did you mean 'kornia'\?"):
        Zca.fit(PIXELS, "cornea")  # type: ignore[arg-type]


@every_kind
def test_there_must_be_images(kind: Kind) -> None:
    for nothing in (PIXELS[:0], iter([])):
        with pytest.raises(UserError, match="there are no images to fit a whitening on"):
            Zca.fit(nothing, kind)


def test_images_without_anything_to_whiten_are_refused() -> None:
    one = PIXELS.clone()
    one[:, 1] = 0.25
    with pytest.raises(
        UserError,
        match=r"channel 1 has one value in all training images, so it cannot be whitened; got 0\.25; leave",
    ):
        Zca.fit(one, "frepo")
    with pytest.raises(UserError, match="images of one level have nothing to whiten"):
        Zca.fit(torch.arange(6.0).view(6, 1, 1, 1).expand(6, *SHAPE) / 6, "kip")


def test_an_unknown_space_is_refused() -> None:
    with pytest.raises(UserError, match="unknown space; got 'lab'; expected pixel, standardised or zca"):
        restore_space({"kind": "lab"}, {})
