"""Decoders against slow twins, and which stored point an image came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distillens.core.checks import UserError
from distillens.core.decode import Bases, Decode, MultiFormation, Pixels, restore_decode
from distillens.core.rng import Key

KEY = Key(9)
N = 4


def images(h: int, w: int) -> torch.Tensor:
    return KEY.fold("images", h, w).normal(N, 2, h, w).double()


def bases() -> dict[str, torch.Tensor]:
    return {
        "bases": KEY.fold("bases").normal(3, 2, 4, 5).double(),
        "coefficients": KEY.fold("coefficients").normal(N, 3).double(),
    }


CASES: dict[str, tuple[Decode, Callable[[], dict[str, torch.Tensor]]]] = {
    "pixels": (Pixels(), lambda: {"images": images(6, 4)}),
    "multi_formation": (MultiFormation(2), lambda: {"images": images(6, 4)}),
    "three does not divide": (MultiFormation(3), lambda: {"images": images(8, 7)}),
    "bases": (Bases((4, 5)), bases),
    "enlarged bases": (Bases((9, 8)), bases),
}
cases = pytest.mark.parametrize("case", CASES)


def bilinear_by_hand(patch: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """One channel [h, w] enlarged: pixel centres at (i + 1/2), borders repeated."""
    h, w = patch.shape
    out = torch.zeros(height, width, dtype=patch.dtype)
    for i in range(height):
        y = min(max((i + 0.5) * h / height - 0.5, 0.0), h - 1.0)
        for j in range(width):
            x = min(max((j + 0.5) * w / width - 0.5, 0.0), w - 1.0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            dy, dx = y - top, x - left
            out[i, j] = (1 - dy) * ((1 - dx) * patch[top, left] + dx * patch[top, right]) + dy * (
                (1 - dx) * patch[bottom, left] + dx * patch[bottom, right]
            )
    return out


@pytest.mark.parametrize(
    ("h", "w", "factor", "rows", "columns"),
    [
        (6, 4, 2, [0, 3, 6], [0, 2, 4]),
        (8, 7, 3, [0, 3, 5, 8], [0, 2, 5, 7]),
        (6, 4, 1, [0, 6], [0, 4]),
    ],
)
def test_multi_formation_is_its_slow_twin(
    h: int, w: int, factor: int, rows: list[int], columns: list[int]
) -> None:
    stored = images(h, w)
    expected = []
    for i in range(factor):
        for j in range(factor):  # patches outside, images inside
            for image in stored:
                patch = image[:, rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
                expected.append(torch.stack([bilinear_by_hand(channel, h, w) for channel in patch]))
    got = MultiFormation(factor).images({"images": stored})
    assert got.shape == (factor**2 * N, 2, h, w)
    torch.testing.assert_close(got, torch.stack(expected))


def test_multi_formation_gives_the_same_patch_of_all_images_before_the_next_patch() -> None:
    stored = torch.zeros(N, 1, 4, 4)
    for n in range(N):
        for i in range(2):
            for j in range(2):
                stored[n, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = 100 * (2 * i + j) + n
    decoded = MultiFormation(2).images({"images": stored})
    assert decoded[:, 0, 0, 0].tolist() == [100 * patch + n for patch in range(4) for n in range(N)]


@pytest.mark.parametrize("size", [(4, 5), (9, 8)])
def test_bases_are_an_explicit_sum(size: tuple[int, int]) -> None:
    stored = bases()
    expected = []
    for row in stored["coefficients"]:
        image = torch.zeros(2, 4, 5, dtype=torch.float64)
        for weight, basis in zip(row.tolist(), stored["bases"], strict=True):
            image += weight * basis
        expected.append(torch.stack([bilinear_by_hand(channel, *size) for channel in image]))
    torch.testing.assert_close(Bases(size).images(stored), torch.stack(expected))


def test_pixels_are_the_stored_images_themselves() -> None:
    stored = images(6, 4)
    assert Pixels().images({"images": stored}) is stored


@cases
def test_origin_names_the_point_of_every_image(case: str) -> None:
    decode, make = CASES[case]
    stored = make()
    before = decode.images(stored)
    origin = decode.origin(stored)
    assert (len(origin), origin.dtype) == (len(before), torch.int64)
    assert decode.points(stored) == N
    name = "coefficients" if isinstance(decode, Bases) else "images"
    for point in range(N):
        changed = {**stored, name: stored[name].clone()}
        changed[name][point] += 1
        moved = (decode.images(changed) - before).abs().flatten(1).amax(1) > 1e-9
        assert torch.equal(moved, origin == point)


@cases
def test_keep_leaves_the_images_of_some_points(case: str) -> None:
    decode, make = CASES[case]
    stored = make()
    points = torch.tensor([3, 1])
    kept = decode.keep(stored, points)
    assert decode.points(kept) == 2
    before, origin = decode.images(stored), decode.origin(stored)
    after, new_origin = decode.images(kept), decode.origin(kept)
    for new, old in enumerate([3, 1]):
        torch.testing.assert_close(after[new_origin == new], before[origin == old])


def test_keep_shares_the_bases() -> None:
    stored = bases()
    kept = Bases((4, 5)).keep(stored, torch.tensor([2]))
    assert torch.equal(kept["bases"], stored["bases"])
    assert torch.equal(kept["coefficients"], stored["coefficients"][2:3])


@cases
def test_gradients_flow_to_everything_stored(case: str) -> None:
    decode, make = CASES[case]
    stored = {name: tensor.requires_grad_() for name, tensor in make().items()}
    names = tuple(stored)
    assert torch.autograd.gradcheck(
        lambda *tensors: decode.images(dict(zip(names, tensors, strict=True))),
        tuple(stored.values()),
        fast_mode=True,
    )


@cases
def test_decoding_leaves_the_stored_tensors_alone(case: str) -> None:
    decode, make = CASES[case]
    stored = make()
    decode.images(stored)
    decode.keep(stored, torch.tensor([0]))
    assert all(torch.equal(tensor, make()[name]) for name, tensor in stored.items())


@cases
def test_a_decoder_is_restored_from_its_description(case: str) -> None:
    decode, _ = CASES[case]
    assert restore_decode(decode.describe()) == decode


def test_enlargement_is_the_one_that_torch_calls_bilinear() -> None:
    stored = images(6, 4)
    patch = stored[:, :, 3:, :2]
    expected = F.interpolate(patch, size=(6, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(MultiFormation(2).images({"images": stored})[2 * N : 3 * N], expected)


@pytest.mark.parametrize(
    ("decode", "stored", "message"),
    [
        (Pixels(), {"pixels": torch.zeros(1)}, "got pixels; expected images"),
        (MultiFormation(2), {"images": 0, "more": 0}, "got images, more; expected images"),
        (Bases((2, 2)), {"bases": 0}, "got bases; expected bases, coefficients"),
    ],
)
def test_stored_tensors_of_other_names_are_refused(
    decode: Decode, stored: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"the stored tensors do not fit their decoder; {message}"):
        decode.points(stored)


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(
        UserError, match="unknown decoder; got 'gan'; expected pixels, multi_formation or bases"
    ):
        restore_decode({"kind": "gan"})
