"""Our convolutions against PyTorch's in float64: values, gradients, and the block that uses them."""

from __future__ import annotations

import pytest
import torch

from distillens import kernels
from distillens.core.rng import Key
from distillens.core.threads import pinned_threads
from distillens.kernels import Setting, conv_block, convolutions, planes

pytestmark = pytest.mark.skipif(not convolutions.available(), reason="no C++ compiler that makes them")

# (images, height, width, channels in and out of a group, groups, padding): each layout, one image, part of a block, several blocks,
# sums over blocks in several slices, channels that fill no pair of vectors.
SIZES = [
    pytest.param(1, 4, 4, 8, 8, 1, 1, id="one of 4x4"),
    pytest.param(7, 4, 4, 32, 16, 3, 1, id="4x4 in 3 groups"),
    pytest.param(300, 4, 4, 8, 24, 1, 1, id="many of 4x4"),
    pytest.param(5, 4, 4, 8, 16, 9, 1, id="4x4 in 9 groups"),
    pytest.param(25, 4, 4, 40, 24, 2, 1, id="one more than a block of 4x4"),
    pytest.param(130, 4, 4, 16, 8, 8, 1, id="4x4 in 8 groups, sums in slices"),
    pytest.param(5, 8, 8, 16, 32, 2, 1, id="8x8 in 2 groups"),
    pytest.param(3, 2, 8, 8, 8, 1, 1, id="2x8"),
    pytest.param(3, 6, 16, 40, 8, 1, 1, id="6x16"),
    pytest.param(40, 16, 16, 8, 8, 1, 1, id="16x16"),
    pytest.param(2, 32, 32, 8, 16, 2, 1, id="32x32 in 2 groups"),
    pytest.param(5, 32, 32, 3, 16, 1, 1, id="3 colours of 32x32"),
    pytest.param(9, 28, 28, 1, 8, 1, 3, id="grey 28x28 padded by 3"),
    pytest.param(9, 8, 8, 1, 32, 3, 1, id="grey 8x8 in 3 groups"),
    pytest.param(1, 6, 8, 4, 8, 2, 1, id="4 channels of 6x8"),
    pytest.param(3, 64, 48, 3, 8, 1, 1, id="3 colours of 64x48"),
    pytest.param(33, 18, 10, 2, 8, 1, 0, id="unpadded, 2 channels of 18x10"),
    pytest.param(2, 4, 128, 1, 8, 1, 1, id="grey 4x128"),
]


def given(
    n: int, h: int, w: int, inputs: int, outputs: int, groups: int, padding: int = 1
) -> list[torch.Tensor]:
    """Images, weight, bias and the gradient in the result."""
    key = Key(5)
    return [
        key.fold("x").normal(n, groups * inputs, h, w),
        key.fold("w").normal(groups * outputs, inputs, 3, 3),
        key.fold("b").normal(groups * outputs),
        key.fold("g").normal(n, groups * outputs, h + 2 * padding - 2, w + 2 * padding - 2),
    ]


def far(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("n", "h", "w", "inputs", "outputs", "groups", "padding"), SIZES)
def test_values_and_gradients_are_those_of_a_convolution(
    n: int, h: int, w: int, inputs: int, outputs: int, groups: int, padding: int
) -> None:
    x, weight, bias, g = given(n, h, w, inputs, outputs, groups, padding)
    assert convolutions.fit(x, weight, padding)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = torch.conv2d(*exact, padding=padding, groups=groups)
    gx, gw, _ = torch.autograd.grad(y, exact, g.double())
    assert far(convolutions.convolve(x, weight, bias, padding, groups), y.detach()) < 1e-6
    bare = torch.conv2d(*exact[:2], padding=padding, groups=groups)
    assert far(convolutions.convolve(x, weight, None, padding, groups), bare.detach()) < 1e-6
    assert far(convolutions.back(g, weight, padding, groups), gx) < 1e-6
    assert far(convolutions.in_weight(x, g, padding, groups), gw) < 2e-6


@pytest.mark.parametrize("size", [4, 16])
def test_errors_are_of_the_size_of_those_of_pytorch(size: int) -> None:
    x, weight, bias, g = given(32, size, size, 64, 64, 1)
    ours = (
        convolutions.convolve(x, weight, bias, 1, 1),
        convolutions.back(g, weight, 1, 1),
        convolutions.in_weight(x, g, 1, 1),
    )
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = torch.conv2d(*leaves, padding=1)
        found.append((y.detach(), *torch.autograd.grad(y, leaves[:2], g.to(dtype))))
    for each, (theirs, exact) in zip(ours, zip(*found, strict=True), strict=True):
        assert far(each, exact) < 2 * far(theirs, exact)


@pytest.mark.parametrize("memory", ["colours last", "a slice"])
def test_memory_of_any_order_is_taken(memory: str) -> None:
    x, weight, bias, g = given(5, 8, 8, 16, 32, 1)
    expected = (
        convolutions.convolve(x, weight, bias, 1, 1),
        convolutions.back(g, weight, 1, 1),
        convolutions.in_weight(x, g, 1, 1),
    )
    if memory == "colours last":
        x, weight, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, g))
    else:
        x, weight, g = (torch.stack([t, t], 1).flatten(0, 1)[::2] for t in (x, weight, g))
        bias = torch.stack([bias, bias], 1).flatten()[::2]
    found = (
        convolutions.convolve(x, weight, bias, 1, 1),
        convolutions.back(g, weight, 1, 1),
        convolutions.in_weight(x, g, 1, 1),
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("inputs", "size"), [(1, 8), (16, 8), (16, 4)])
def test_threads_and_other_images_change_no_bit(inputs: int, size: int) -> None:
    x, weight, bias, g = given(300, size, size, inputs, 16, 2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                (
                    convolutions.convolve(x, weight, bias, 1, 2),
                    convolutions.back(g, weight, 1, 2),
                    convolutions.in_weight(x, g, 1, 2),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(one, other) for each in found[1:] for one, other in zip(found[0], each, strict=True)
    )
    assert torch.equal(convolutions.convolve(x[17:18], weight, bias, 1, 2), found[0][0][17:18])


def test_what_is_not_a_number_stays_in_its_image() -> None:
    x, weight, bias, _ = given(7, 4, 4, 8, 8, 1)
    x[3, 2, 1, 1] = float("nan")
    y = convolutions.convolve(x, weight, bias, 1, 1)
    assert bool(y[3].isnan().any()) and not bool(y[[0, 1, 2, 4, 5, 6]].isnan().any())


@pytest.mark.parametrize(
    ("shape", "weight", "padding"),
    [
        ((2, 8, 4, 4), (8, 8, 3, 3), 3),
        ((2, 8, 7, 8), (8, 8, 3, 3), 1),
        ((2, 8, 8, 4), (8, 8, 3, 3), 1),
        ((2, 8, 12, 12), (8, 8, 3, 3), 1),
        ((2, 5, 8, 8), (8, 5, 3, 3), 1),
        ((2, 3, 8, 12), (8, 3, 3, 3), 1),
        ((2, 3, 5, 8), (8, 3, 3, 3), 1),
        ((2, 3, 8, 8), (12, 3, 3, 3), 1),
        ((2, 8, 8, 8), (12, 8, 3, 3), 1),
        ((2, 32, 8, 8), (8, 16, 3, 3), 1),  # two groups of 4 results
        ((0, 8, 8, 8), (8, 8, 3, 3), 1),
    ],
)
def test_what_they_do_not_take_is_convolved_as_ever(
    shape: tuple[int, ...], weight: tuple[int, ...], padding: int
) -> None:
    x, w, b = Key(1).normal(*shape), Key(2).normal(*weight), Key(3).normal(weight[0])
    assert not convolutions.fit(x, w, padding)
    if len(x):
        rest = (w, b, Key(4).uniform(len(b)), Key(5).normal(len(b)), padding, shape[1] // weight[1])
        assert torch.equal(conv_block.fused(x, *rest, True), conv_block.fused(x, *rest))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_than_float32_are_not_taken(dtype: torch.dtype) -> None:
    x, weight, _, _ = given(5, 8, 8, 16, 32, 1)
    assert not convolutions.fit(x.to(dtype), weight.to(dtype), 1) and not convolutions.fit(
        x, weight.to(dtype), 1
    )


@pytest.mark.parametrize(
    ("size", "channels", "groups", "padding"),
    [(4, 8, 2, 1), (8, 8, 2, 1), (16, 8, 2, 1), (8, 3, 1, 1), (8, 1, 2, 1), (28, 1, 1, 3)],
)
def test_second_derivatives_of_the_block_are_those_of_plain_pytorch(
    size: int, channels: int, groups: int, padding: int
) -> None:
    """Of <v, gradients> for the gradients in all five inputs: as matching, unrolling and Hessian products take them."""
    n, outputs = 6, 8
    x, weight, bias, _ = given(n, size, size, channels, outputs, groups)
    more = [0.5 + Key(6).uniform(len(bias)), 0.3 * Key(7).normal(len(bias))]
    g = Key(8).normal(n, groups * outputs, size // 2 + padding - 1, size // 2 + padding - 1)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias, *more)]
        extra = {} if dtype == torch.float64 else {"fewer": True}
        block = conv_block.plain if dtype == torch.float64 else conv_block.fused
        y = block(*leaves, padding, groups, **extra)
        first = torch.autograd.grad(y, leaves, g.to(dtype), create_graph=True)
        v = [Key(9).fold(str(i)).normal(*each.shape).to(dtype) for i, each in enumerate(first)]
        second = torch.autograd.grad(first, leaves, v)
        found.append([y.detach(), *(each.detach() for each in first), *second])
    for place, (ours, exact) in enumerate(zip(*found, strict=True)):
        if place == 3 or float(exact.norm()) < 1e-8:
            assert not ours.any()  # a norm takes the bias out again: rounding is all there is
            continue
        assert far(ours, exact) < 1e-5, place


@pytest.mark.parametrize(("n", "size", "channels", "groups"), [(7, 24, 1, 2), (5, 28, 1, 1), (3, 32, 3, 2)])
def test_a_block_of_few_channels_at_once_is_its_parts_to_the_bit(
    n: int, size: int, channels: int, groups: int
) -> None:
    padding = 3 if size == 28 else 1
    x, weight, bias, _ = given(n, size, size, channels, 16, groups, padding)
    gamma, beta = 0.5 + Key(6).uniform(len(bias)), 0.3 * Key(7).normal(len(bias))
    z = convolutions.convolve(x, weight, bias, padding, groups)
    parts = (z, *planes.forward(z, gamma, beta, 1e-5))
    whole = convolutions.block(x, weight, bias, gamma, beta, padding, groups, 1e-5, True)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    z, *rest = convolutions.block(x, weight, bias, gamma, beta, padding, groups, 1e-5, False)
    assert z is None
    assert all(torch.equal(one, other) for one, other in zip(rest, parts[1:], strict=True))

    # Where images want a gradient or somebody may differentiate on, the block goes by its parts.
    g = Key(8).normal(*parts[1].shape)
    found = []
    for images in (x, x.clone().requires_grad_()):
        leaves = [t.clone().requires_grad_() for t in (weight, bias, gamma, beta)]
        y = conv_block.fused(images, *leaves, padding, groups, True)
        found.append(torch.autograd.grad(y, leaves if images is x else [*leaves, images], g)[:4])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert bool(found[0][0].any())


SMALL = [(7, 8, 1, 2), (5, 16, 1, 1), (9, 8, 3, 2), (40, 8, 4, 1)]


@pytest.mark.parametrize(("n", "size", "channels", "groups"), SMALL)
def test_a_block_of_a_small_image_is_its_parts(n: int, size: int, channels: int, groups: int) -> None:
    x, weight, bias, _ = given(n, size, size, channels, 24, groups, 1)
    assert convolutions.small(channels, size, size, 1)
    gamma, beta = 0.5 + Key(6).uniform(len(bias)), 0.3 * Key(7).normal(len(bias))
    z = convolutions.convolve(x, weight, bias, 1, groups)
    parts = (z, *planes.forward(z, gamma, beta, 1e-5))
    known = convolutions.block(x, weight, bias, gamma, beta, 1, groups, 1e-5, True)
    assert all(far(one, other) < 1e-6 for one, other in zip(known, parts, strict=True))
    # Whether z is kept changes nothing else.
    found = convolutions.block(x, weight, bias, gamma, beta, 1, groups, 1e-5, False)
    assert found[0] is None
    assert all(torch.equal(one, other) for one, other in zip(found[1:], known[1:], strict=True))

    g = Key(8).normal(*parts[1].shape)
    slopes = []
    for images in (x, x.clone().requires_grad_()):  # in the images: by the parts
        for again in (False, True):
            leaves = [t.clone().requires_grad_() for t in (weight, gamma, beta)]
            y = conv_block.fused(images, leaves[0], bias, *leaves[1:], 1, groups, True)
            assert torch.equal(y, known[1])
            slopes.append(torch.autograd.grad(y, leaves, g, create_graph=again))
    for other in slopes[1:]:
        for one, two in zip(slopes[0], other, strict=True):
            assert far(one, two.detach()) < 1e-6


@pytest.mark.parametrize(("n", "size", "channels", "groups"), SMALL)
def test_the_gradient_of_a_small_image_can_be_differentiated(
    n: int, size: int, channels: int, groups: int
) -> None:
    """Of data, whose z is not kept: it is found again."""
    x, weight, bias, _ = given(n, size, size, channels, 16, groups, 1)
    gamma, beta = 0.5 + Key(6).uniform(len(bias)), 0.3 * Key(7).normal(len(bias))
    along = [Key(9).fold(i).normal(*t.shape) for i, t in enumerate((weight, gamma, beta))]
    found = []
    for kind in (torch.float32, torch.float64):
        leaves = [t.to(kind).requires_grad_() for t in (weight, gamma, beta)]
        block, extra = (conv_block.fused, (True,)) if kind == torch.float32 else (conv_block.plain, ())
        y = block(x.to(kind), leaves[0], bias.to(kind), *leaves[1:], 1, groups, *extra)
        if kind == torch.float32:
            assert y.grad_fn is not None
            assert y.grad_fn.saved_tensors[5] is None  # z
        gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        total = sum((one * other.to(kind)).sum() for one, other in zip(gradients, along, strict=True))
        found.append(torch.autograd.grad(total, leaves))
    for one, other in zip(*found, strict=True):
        assert far(one, other) < 1e-5


def test_a_low_image_of_odd_height_is_not_small() -> None:
    """Its planes are pooled without their last row."""
    assert convolutions.take(1, 16, 3, 32, 1) and not convolutions.small(1, 3, 32, 1)


@pytest.mark.parametrize(("n", "size", "channels", "groups"), SMALL)
def test_a_block_of_a_small_image_knows_no_neighbours(n: int, size: int, channels: int, groups: int) -> None:
    """Neither other channels, by however many at a time they are taken, nor other groups, nor who else sees the image."""
    x, weight, bias, _ = given(n, size, size, channels, 16, 1, 1)
    gamma, beta = 0.5 + Key(6).uniform(16), 0.3 * Key(7).normal(16)
    g = Key(8).normal(n, 16, size // 2, size // 2)

    def block(x: torch.Tensor, where: slice, times: int, groups: int) -> list[torch.Tensor]:
        own = [t[where].repeat(times, *[1] * (t.ndim - 1)) for t in (weight, bias, gamma, beta)]
        gradient = g[:, where].repeat(1, times, 1, 1)
        _, y, means, rstds = convolutions.block(x, *own, 1, groups, 1e-5, False)
        gw, *_ = convolutions.block_slope(gradient, x, *own, None, means, rstds, 1, groups)
        return [y, gw.transpose(0, 1)]  # channels second

    whole = block(x, slice(None), 1, 1)
    with pinned_threads(3):
        assert all(
            torch.equal(one, other) for one, other in zip(block(x, slice(None), 1, 1), whole, strict=True)
        )
    for one, other in zip(block(x, slice(8), 1, 1), whole, strict=True):
        assert torch.equal(one, other[:, :8])
    for both in (block(x, slice(None), 2, 1), block(x.repeat(1, 2, 1, 1), slice(None), 2, 2)):
        for one, other in zip(both, whole, strict=True):
            assert torch.equal(one[:, :16], other) and torch.equal(one[:, 16:], other)


def test_a_small_image_that_is_not_a_number_stays_none() -> None:
    x, weight, bias, _ = given(5, 8, 8, 1, 16, 1, 1)
    x[2, 0, 3, 3] = float("nan")
    ones, nothing = torch.ones(16), torch.zeros(16)
    _, y, means, rstds = convolutions.block(x, weight, bias, ones, nothing, 1, 1, 1e-5, False)
    assert bool(y[2].isnan().all()) and not bool(y[[0, 1, 3, 4]].isnan().any())
    gw, *_ = convolutions.block_slope(
        torch.ones_like(y), x, weight, bias, ones, nothing, None, means, rstds, 1, 1
    )
    assert bool(gw.isnan().all())


def test_they_are_used_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, _ = given(5, 8, 8, 16, 32, 1)
    rest = (x, weight, bias, torch.ones(32), torch.zeros(32))
    calls: list[int] = []
    convolve = convolutions.convolve
    monkeypatch.setattr(convolutions, "convolve", lambda *a: calls.append(1) or convolve(*a))
    for setting, count in ((Setting(), 0), (Setting("fused"), 0), (Setting("winograd"), 1)):
        with kernels.using(setting):
            kernels.block(*rest)
        assert len(calls) == count
