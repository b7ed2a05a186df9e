from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from distillens import augment
from distillens.augment import Draw
from distillens.core.checks import UserError
from distillens.core.rng import Key

ALL = "color_crop_cutout_flip_scale_rotate"
ALMOST_ONE = 1 - 2**-24  # the largest number that a draw can hold


def images(n: int = 5, c: int = 3, h: int = 8, w: int = 12) -> torch.Tensor:
    return Key(1).normal(n, c, h, w).double() + 2  # nowhere zero, so that zeros are seen


def numbers(n: int, place: str = "u") -> torch.Tensor:
    return Key(2).fold(place).uniform(n, 3)


# ---- slow twins: one image, loops, the formulas of the paper's code ----


def slow_color(x: torch.Tensor, u: list[float]) -> torch.Tensor:
    x = x + (u[0] - 0.5)
    out = x.clone()
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            grey = x[:, i, j].mean()
            out[:, i, j] = grey + (x[:, i, j] - grey) * 2 * u[1]
    level = out.mean()
    return level + (out - level) * (u[2] + 0.5)


def slow_crop(x: torch.Tensor, u: list[float]) -> torch.Tensor:
    _, h, w = x.shape
    pad = [int(h * 0.125 + 0.5), int(w * 0.125 + 0.5)]
    dy, dx = (math.floor(u[axis] * (2 * pad[axis] + 1)) - pad[axis] for axis in (0, 1))
    out = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            if 0 <= i + dy < h and 0 <= j + dx < w:
                out[:, i, j] = x[:, i + dy, j + dx]
    return out


def slow_cutout(x: torch.Tensor, u: list[float]) -> torch.Tensor:
    _, h, w = x.shape
    size = [int(h * 0.5 + 0.5), int(w * 0.5 + 0.5)]
    centre = [math.floor(u[a] * (side + 1 - size[a] % 2)) for a, side in enumerate((h, w))]
    out = x.clone()
    for i in range(size[0]):
        for j in range(size[1]):
            # The authors move what hangs over the border onto it; the square always covers the border then.
            row = min(max(i + centre[0] - size[0] // 2, 0), h - 1)
            column = min(max(j + centre[1] - size[1] // 2, 0), w - 1)
            out[:, row, column] = 0
    return out


def slow_flip(x: torch.Tensor, u: list[float]) -> torch.Tensor:
    if u[0] >= 0.5:
        return x
    w = x.shape[2]
    return torch.stack([x[:, :, w - 1 - j] for j in range(w)], 2)


def slow_scale(x: torch.Tensor, u: list[float]) -> torch.Tensor:
    sx, sy = (1 / 1.2 + (1.2 - 1 / 1.2) * u[axis] for axis in (0, 1))
    return warped(x, [[sx, 0, 0], [0, sy, 0]])


def slow_rotate(x: torch.Tensor, u: list[float]) -> torch.Tensor:
    angle = (u[0] - 0.5) * 2 * 15 / 180 * math.pi
    cos, sin = math.cos(angle), math.sin(angle)
    return warped(x, [[cos, -sin, 0], [sin, cos, 0]])


def warped(x: torch.Tensor, matrix: list[list[float]]) -> torch.Tensor:
    grid = F.affine_grid(torch.tensor([matrix], dtype=x.dtype), [1, *x.shape], align_corners=False)
    return F.grid_sample(x[None], grid, align_corners=False)[0]


TWINS: dict[str, Callable[[torch.Tensor, list[float]], torch.Tensor]] = {
    "color": slow_color,
    "crop": slow_crop,
    "cutout": slow_cutout,
    "flip": slow_flip,
    "scale": slow_scale,
    "rotate": slow_rotate,
}
every_operation = pytest.mark.parametrize("operation", augment.OPERATIONS)


def test_every_operation_has_a_twin() -> None:
    assert set(TWINS) == set(augment.OPERATIONS) == set(ALL.split("_"))


@every_operation
@pytest.mark.parametrize("shape", [(3, 8, 12), (1, 9, 7), (1, 8, 8)], ids=str)
def test_a_batch_is_its_images_one_by_one(operation: str, shape: tuple[int, int, int]) -> None:
    x, u = images(24, *shape), numbers(24)
    found = augment.apply(x, Draw(operation, u))
    twin = torch.stack([TWINS[operation](image, row.tolist()) for image, row in zip(x, u, strict=True)])
    torch.testing.assert_close(found, twin, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found, x)


@every_operation
@pytest.mark.parametrize("edge", [0.0, ALMOST_ONE])
def test_draws_at_the_edges_stay_in_range(operation: str, edge: float) -> None:
    for shape in ((3, 8, 12), (1, 9, 7), (1, 32, 32)):
        for x in (images(1, *shape), images(1, *shape).float()):
            u = torch.full((1, 3), edge)
            twin = TWINS[operation](x[0].double(), u[0].tolist())
            found = augment.apply(x, Draw(operation, u))[0]
            torch.testing.assert_close(found.double(), twin, rtol=1e-4, atol=1e-4)


@every_operation
def test_a_siamese_draw_treats_every_image_of_any_batch_alike(operation: str) -> None:
    drawn = Draw(operation, numbers(1))
    small, large = images(2), images(7)
    assert torch.equal(small, large[:2])
    found = augment.apply(large, drawn)
    torch.testing.assert_close(augment.apply(small, drawn), found[:2])
    repeated = Draw(operation, drawn.numbers.expand(7, 3))
    torch.testing.assert_close(found, augment.apply(large, repeated))


@every_operation
def test_gradients_flow_to_every_pixel_that_is_shown(operation: str) -> None:
    x = images(3, 2, 6, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, Draw(operation, numbers(3))), (x,))
    (gradient,) = torch.autograd.grad(augment.apply(x, Draw(operation, numbers(3))).square().sum(), x)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())


@every_operation
def test_the_images_are_left_alone(operation: str) -> None:
    x = images()
    augment.apply(x, Draw(operation, numbers(5)))
    assert torch.equal(x, images())


@every_operation
def test_images_keep_their_kind(operation: str) -> None:
    assert augment.apply(images().float(), Draw(operation, numbers(5))).dtype == torch.float32


# ---- draws ----


def test_no_strategy_is_no_augmentation() -> None:
    assert augment.draw("", Key(0)) is None
    x = images()
    assert augment.apply(x, None) is x


def test_a_draw_comes_from_its_key_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = augment.draw(ALL, Key(3), 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = augment.draw(ALL, Key(3), 4)
    assert first is not None and second is not None
    assert first.operation == second.operation
    assert torch.equal(first.numbers, second.numbers)
    other = augment.draw(ALL, Key(4), 4)
    assert other is not None and not torch.equal(other.numbers, first.numbers)


def test_more_images_leave_the_draws_of_the_others_alone() -> None:
    few, many = augment.draw(ALL, Key(3), 5), augment.draw(ALL, Key(3), 50)
    assert few is not None and many is not None
    assert few.operation == many.operation
    assert torch.equal(few.numbers, many.numbers[:5])


def test_one_operation_of_the_strategy_is_drawn_each_about_as_often() -> None:
    drawn = [augment.draw(ALL, Key(5).fold(i)) for i in range(3000)]
    counts = {name: sum(d is not None and d.operation == name for d in drawn) for name in augment.OPERATIONS}
    assert sum(counts.values()) == 3000
    assert all(abs(count - 500) < 5 * 20.4 for count in counts.values())  # 5 standard deviations
    only = {d.operation for i in range(50) if (d := augment.draw("flip_crop", Key(6).fold(i))) is not None}
    assert only == {"flip", "crop"}


def test_each_image_of_a_draw_has_its_own_numbers() -> None:
    drawn = augment.draw("rotate", Key(0), 10)
    assert drawn is not None and drawn.numbers.shape == (10, 3)
    assert len(torch.unique(drawn.numbers)) == 30
    siamese = augment.draw("rotate", Key(0))
    assert siamese is not None and siamese.numbers.shape == (1, 3)


def test_an_unknown_operation_is_met_with_a_suggestion() -> None:
    with pytest.raises(UserError) as error:
        augment.parse("color_rotat")
    assert str(error.value) == (
        "unknown augmentation 'rotat'; Did you mean 'rotate'? Known: color, crop, cutout, flip, rotate, scale"
    )


def test_choices_joined_by_plus_are_made_in_turn() -> None:
    assert augment.parse("color+crop_scale_rotate+cutout") == (
        ("color",),
        ("crop", "scale", "rotate"),
        ("cutout",),
    )
    x, between = images(), set()
    for seed in range(30):
        first = augment.draw("color+crop_scale_rotate+cutout", Key(seed), 5)
        assert first is not None and first.then is not None and first.then.then is not None
        second, third = first.then, first.then.then
        assert first.operation == "color" and third.operation == "cutout" and third.then is None
        between.add(second.operation)
        assert len(torch.unique(torch.cat([d.numbers for d in (first, second, third)]))) == 45
        one_by_one = x
        for drawn in (first, second, third):
            one_by_one = augment.apply(one_by_one, Draw(drawn.operation, drawn.numbers))
        assert torch.equal(augment.apply(x, first), one_by_one)
        some = torch.tensor([3, 1])
        torch.testing.assert_close(augment.apply(x[some], first.rows(some)), one_by_one[some])
    assert between == {"crop", "scale", "rotate"}


# ---- CutMix ----


def test_a_mix_puts_a_box_of_the_partner_into_each_image() -> None:
    x = images(6)
    kept = x.clone()
    mix = augment.Mix(torch.tensor([5, 0, 1, 2, 3, 4]), 2, 5, 1, 11)
    found = mix.images(x)
    for i in range(6):
        for row in range(8):
            for column in range(12):
                theirs = 2 <= row < 5 and 1 <= column < 11
                source = x[int(mix.partner[i])] if theirs else x[i]
                assert torch.equal(found[i, :, row, column], source[:, row, column])
    assert mix.share(x) == 30 / 96
    assert torch.equal(x, kept)


def test_mixes_are_drawn_as_often_as_asked_with_boxes_of_all_sizes_everywhere() -> None:
    drawn = [augment.draw_mix(0.3, Key(8).fold(i), 6, (8, 12)) for i in range(3000)]
    mixes = [mix for mix in drawn if mix is not None]
    assert abs(len(mixes) - 900) < 5 * (3000 * 0.3 * 0.7) ** 0.5
    x = images(1)
    shares = torch.tensor([mix.share(x) for mix in mixes])
    assert float(shares.min()) < 0.01 and float(shares.max()) > 0.6
    covered = torch.zeros(8, 12)
    for mix in mixes:
        assert 0 <= mix.top <= mix.bottom <= 8 and 0 <= mix.left <= mix.right <= 12
        assert sorted(mix.partner.tolist()) == list(range(6))
        covered[mix.top : mix.bottom, mix.left : mix.right] += 1
    assert float(covered.min()) > 0
    assert all(augment.draw_mix(0.0, Key(i), 6, (8, 12)) is None for i in range(50))
    assert all(augment.draw_mix(1.0, Key(i), 6, (8, 12)) is not None for i in range(50))


# ---- ranges over many draws ----

MANY = 4000


def shown(operation: str, x: torch.Tensor) -> torch.Tensor:
    drawn = augment.draw(operation, Key(7), MANY)
    assert drawn is not None
    return augment.apply(x.expand(MANY, *x.shape[1:]), drawn)


def test_half_of_the_images_are_flipped() -> None:
    x = images(1)
    flipped = (shown("flip", x) == x.flip(3)).flatten(1).all(1)
    kept = (shown("flip", x) == x).flatten(1).all(1)
    assert bool((flipped ^ kept).all())
    assert abs(float(flipped.double().mean()) - 0.5) < 5 * 0.5 / MANY**0.5


@pytest.mark.parametrize(("side", "reach"), [(8, 1), (12, 2), (28, 4), (32, 4)])
def test_crops_shift_each_way_by_an_eighth_all_shifts_alike(side: int, reach: int) -> None:
    where = torch.arange(side, dtype=torch.float64) + 1
    rows = shown("crop", where.view(1, 1, side, 1).expand(1, 1, side, side))[:, 0]
    columns = shown("crop", where.view(1, 1, 1, side).expand(1, 1, side, side))[:, 0]
    middle = side // 2
    dy = rows.amax(2)[:, middle] - where[middle]
    dx = columns.amax(1)[:, middle] - where[middle]
    for shifts in (dy, dx):
        values, counts = shifts.unique(return_counts=True)
        assert values.tolist() == list(range(-reach, reach + 1))
        expected = MANY / (2 * reach + 1)
        assert float((counts - expected).abs().max()) < 5 * expected**0.5
    assert abs(float(torch.corrcoef(torch.stack([dy, dx]))[0, 1])) < 5 / MANY**0.5


@pytest.mark.parametrize("side", [8, 9, 32])
def test_cutout_zeroes_a_square_of_half_the_side_anywhere(side: int) -> None:
    holes = shown("cutout", torch.ones(1, 1, side, side)) == 0
    size = int(side * 0.5 + 0.5)
    tall, wide = holes.any(3).sum(2), holes.any(2).sum(2)
    assert int(tall.max()) == int(wide.max()) == size
    assert int(tall.min()) >= size // 2 and int(wide.min()) >= size // 2
    assert torch.equal(holes.sum((1, 2, 3)), (tall * wide).flatten())
    # Every centre is as likely: how often a row is covered can be counted.
    centres = torch.arange(side + 1 - size % 2)
    row = torch.arange(side)[:, None]
    covered = ((row >= centres - size // 2) & (row < centres - size // 2 + size)).double().mean(1)
    share = holes.double().mean(0)[0]
    assert float((share - covered[:, None] * covered).abs().max()) < 5 * 0.5 / MANY**0.5


def test_scales_reach_from_one_over_1_2_to_1_2_on_each_axis() -> None:
    # On a ramp around 0 the slope is the factor.
    ramp = torch.arange(32, dtype=torch.float64) - 15.5
    for axis, other in ((3, 2), (2, 3)):
        x = ramp.view(1, 1, *((1, 32) if axis == 3 else (32, 1))).expand(1, 1, 32, 32)
        middle = shown("scale", x).select(other, 15)[:, 0]
        factors = middle[:, 16] - middle[:, 15]
        assert 1 / 1.2 <= float(factors.min()) < 1 / 1.2 + 0.002
        assert 1.2 - 0.002 < float(factors.max()) <= 1.2
        assert abs(float(factors.mean()) - (1.2 + 1 / 1.2) / 2) < 0.01


def test_angles_reach_15_degrees_either_way() -> None:
    ramp = torch.arange(32, dtype=torch.float64) - 15.5
    x = shown("rotate", ramp.view(1, 1, 1, 32).expand(1, 1, 32, 32))[:, 0, 14:18, 14:18]
    right, down = x[:, 1, 2] - x[:, 1, 1], x[:, 2, 1] - x[:, 1, 1]
    angles = torch.rad2deg(torch.atan2(-down, right))
    assert -15 <= float(angles.min()) < -14.95
    assert 14.95 < float(angles.max()) <= 15
    assert abs(float(angles.mean())) < 5 * 8.66 / MANY**0.5
    torch.testing.assert_close(right.square() + down.square(), torch.ones(MANY, dtype=torch.float64))


def test_colours_reach_their_ranges() -> None:
    x = torch.tensor([[[[0.0, 4.0]], [[1.0, 9.0]], [[2.0, 17.0]]]], dtype=torch.float64)
    out = shown("color", x)
    brightness = out.mean((1, 2, 3)) - x.mean()
    assert -0.5 <= float(brightness.min()) < -0.499
    assert 0.499 < float(brightness.max()) <= 0.5
    contrast = (out.mean(1)[:, 0, 1] - out.mean(1)[:, 0, 0]) / 9  # grey levels 1 and 10
    assert 0.5 <= float(contrast.min()) < 0.501
    assert 1.499 < float(contrast.max()) <= 1.5
    saturation = (out[:, 2, 0, 0] - out[:, 0, 0, 0]) / 2 / contrast
    assert 0 <= float(saturation.min()) < 0.002
    assert 1.998 < float(saturation.max()) <= 2
    for a, b in pairwise([brightness, contrast, saturation]):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / MANY**0.5
