"""The fused block against plain PyTorch: values, first, second and third derivatives, all sizes, all precisions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from distillens import kernels
from distillens.core.rng import Key
from distillens.kernels import Setting, conv_block, planes

pytestmark = pytest.mark.skipif(not planes.available(), reason="no C++ compiler")

# (height, width, channels in, groups, padding): planes with a layout of their own, odd ones, 28 px, colours, stacks.
SIZES = [
    pytest.param(8, 8, 4, 1, 1, id="8x8"),
    pytest.param(4, 4, 4, 2, 1, id="4x4 in 2 groups"),
    pytest.param(16, 16, 3, 1, 1, id="16x16 of 3 colours"),
    pytest.param(32, 32, 6, 3, 1, id="32x32 in 3 groups"),
    pytest.param(7, 12, 5, 1, 1, id="7x12"),
    pytest.param(5, 5, 1, 1, 1, id="5x5 grey"),
    pytest.param(28, 28, 1, 1, 3, id="28x28 padded by 3"),
    pytest.param(2, 8, 8, 1, 1, id="2x8"),
]


def given(h: int, w: int, channels: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Images, weight, bias, gamma, beta."""
    key, out = Key(3), 6
    return [
        key.fold("x").normal(5, channels, h, w).to(dtype),
        0.3 * key.fold("w").normal(out, channels // groups, 3, 3).to(dtype),
        key.fold("b").normal(out).to(dtype),
        0.5 + key.fold("gamma").uniform(out).to(dtype),
        0.3 * key.fold("beta").normal(out).to(dtype),
    ]


def like(place: str, t: torch.Tensor) -> torch.Tensor:
    return Key(4).fold(place).normal(*t.shape).to(t.dtype)


def derivatives(
    block: Callable[..., torch.Tensor], tensors: list[torch.Tensor], padding: int, groups: int, order: int
) -> list[torch.Tensor]:
    """The value and all derivatives up to ``order``, each pulled back along fixed directions."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = block(*leaves, padding, groups)
    found = [y.detach()]
    g = like("g", y).requires_grad_()
    along, values = [g, *leaves], [y]
    cotangents = [g]
    for turn in range(order):
        last = turn == order - 1
        gradients = torch.autograd.grad(
            values,
            leaves if turn == 0 else along,
            cotangents,
            create_graph=not last,
            allow_unused=True,
            materialize_grads=True,
        )
        found += [one.detach() for one in gradients]
        values = [one for one in gradients if one.requires_grad]
        cotangents = [like(f"{turn}.{i}", one) for i, one in enumerate(gradients) if one.requires_grad]
    return found


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("h", "w", "channels", "groups", "padding"), SIZES)
def test_derivatives_are_those_of_plain_pytorch(
    h: int, w: int, channels: int, groups: int, padding: int, order: int
) -> None:
    tensors = given(h, w, channels, groups, torch.float64)
    ours = derivatives(conv_block.fused, tensors, padding, groups, order)
    plain = derivatives(conv_block.plain, tensors, padding, groups, order)
    scale = max(float(t.abs().max()) for t in plain)
    for one, other in zip(ours, plain, strict=True):
        assert float((one - other).abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize(("h", "w", "channels", "groups", "padding"), SIZES)
def test_only_what_is_asked_for_has_a_gradient(
    h: int, w: int, channels: int, groups: int, padding: int
) -> None:
    tensors = given(h, w, channels, groups, torch.float64)
    for asked in range(5):
        leaf = tensors[asked].clone().requires_grad_()
        both = []
        for block in (conv_block.fused, conv_block.plain):
            y = block(*(leaf if i == asked else t for i, t in enumerate(tensors)), padding, groups)
            both.append(torch.autograd.grad(y, leaf, like("g", y))[0])
        torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11)


def test_float32_is_plain_pytorch_to_rounding() -> None:
    tensors = given(16, 16, 8, 1, torch.float32)
    for one, other in zip(
        derivatives(conv_block.fused, tensors, 1, 1, 2),
        derivatives(conv_block.plain, tensors, 1, 1, 2),
        strict=True,
    ):
        assert float((one - other).norm()) <= 1e-4 * max(1.0, float(other.norm()))


def test_bfloat16_rounds_products_and_nothing_else() -> None:
    x, *rest = given(16, 16, 8, 1, torch.float32)
    half = conv_block.fused(x.bfloat16(), *rest)
    assert half.dtype == torch.bfloat16
    z = F.conv2d(x.bfloat16(), rest[0].bfloat16(), rest[1].bfloat16(), padding=1).float()
    expected = F.avg_pool2d(F.relu(F.group_norm(z, 6, rest[2], rest[3])), 2)
    # The result is rounded once, to 8 bits.
    torch.testing.assert_close(half.float(), expected, rtol=2**-8, atol=1e-6)
    leaves = [t.clone().requires_grad_() for t in rest]
    gradients = torch.autograd.grad(conv_block.fused(x.bfloat16(), *leaves).float().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("form", [conv_block.fused, conv_block.plain])
def test_a_processor_without_products_of_bfloat16_takes_them_in_float32(
    form: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same roundings: what is left is the order of float32 sums, which moves a few results by one place in 8 bits."""
    x, *rest = given(16, 16, 8, 1, torch.float32)
    found = []
    for native in (False, True):
        monkeypatch.setattr(conv_block, "multiplies_bfloat16", lambda native=native: native)
        leaves = [t.clone().requires_grad_() for t in (x.bfloat16(), *rest)]
        y = form(*leaves)
        found.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)))
    for i, (one, other) in enumerate(zip(*found, strict=True)):
        assert one.dtype == other.dtype
        # The gradient in the bias, which a norm takes away, is nothing but roundings: small against that in the weight.
        scale = found[1][2] if i == 3 else other
        assert float((one.float() - other.float()).norm()) <= 2**-7 * float(scale.float().norm())
    y, other = found[0][0].float(), found[1][0].float()
    assert float((y != other).float().mean()) < 0.05
    exact = form(x, *rest)
    assert float((y != exact).float().mean()) > 0.5  # and they are rounded


def test_threads_change_no_bit_of_a_plane() -> None:
    z = Key(5).normal(64, 16, 16, 16)
    gamma, beta = 0.5 + Key(6).uniform(16), Key(7).normal(16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y, means, rstds = planes.forward(z, gamma, beta, 1e-5)
            results.append((y, *planes.backward(like("g", y), z, gamma, beta, means, rstds)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_not_a_number_stays_none() -> None:
    tensors = given(8, 8, 4, 1, torch.float32)
    tensors[0][2, 1, 3, 3] = float("nan")
    y = conv_block.fused(*tensors)
    assert bool(y[2].isnan().any()) and not bool(y[[0, 1, 3, 4]].isnan().any())


def test_the_kernels_are_used_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = given(8, 8, 4, 1, torch.float32)
    calls: list[str] = []
    monkeypatch.setattr(conv_block, "fused", lambda *a: calls.append("fused"))
    monkeypatch.setattr(conv_block, "plain", lambda *a: calls.append("plain"))
    kernels.block(*tensors)
    with kernels.using(Setting("fused")):
        kernels.block(*tensors)
        torch.vmap(lambda x: kernels.block(x, *tensors[1:]) or x)(tensors[0][None])  # transforms look inside
    kernels.block(*tensors)
    assert calls == ["plain", "fused", "plain", "plain"]


def test_targets_have_a_precision_of_their_own() -> None:
    x = torch.zeros(1, 1, 4, 4)
    with kernels.using(Setting("plain", torch.float32, torch.bfloat16)):
        assert kernels.entering(x).dtype == torch.float32
        with kernels.for_targets():
            assert kernels.entering(x).dtype == torch.bfloat16
            assert kernels.entering(x.double()).dtype == torch.float64
        assert kernels.entering(x).dtype == torch.float32
    assert kernels.current() == Setting()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_with_colours_last_in_memory_are_the_same_images(channels: int) -> None:
    """One channel counts as plain memory in either order, and the library's convolution goes by the strides."""
    plain = given(8, 8, channels, 1, torch.float64)
    last = [plain[0].contiguous(memory_format=torch.channels_last), *plain[1:]]
    strange = [plain[0].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), *plain[1:]]
    expected = derivatives(conv_block.fused, plain, 1, 1, 2)
    for tensors in (last, strange):
        for one, other in zip(derivatives(conv_block.fused, tensors, 1, 1, 2), expected, strict=True):
            assert torch.equal(one, other)


def test_pooling_under_a_derivative_leaves_nothing_of_it_behind() -> None:
    """The first images of a size may be met there: a process that reads its networks from a store meets them so."""
    x = Key(7).normal(2, 3, 6, 5)
    conv_block._pooling_matrix.cache_clear()
    inside = torch.func.jvp(lambda y: torch.func.jvp(conv_block.average_pool, (y,), (x,))[1], (x,), (x,))[0]
    assert torch.allclose(inside, F.avg_pool2d(x, 2))
    assert torch.allclose(conv_block.average_pool(x), F.avg_pool2d(x, 2))
