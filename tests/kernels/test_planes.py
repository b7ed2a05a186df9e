"""Planes of 4 x 4, which go eight at a time: any number of them, each for itself."""

from __future__ import annotations

import pytest
import torch

from distillens.core.rng import Key
from distillens.core.threads import pinned_threads
from distillens.kernels import planes

pytestmark = pytest.mark.skipif(not planes.available(), reason="no C++ compiler")

# Fewer than eight, as many, a rest, and eights that lie across images.
COUNTS = [(1, 3), (1, 8), (5, 6), (7, 16), (3, 5)]


def given(n: int, channels: int, kind: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """g, z, gamma, beta."""
    key = Key(2)
    tensors = (
        key.fold("g").normal(n, channels, 2, 2),
        key.fold("z").normal(n, channels, 4, 4) + 0.5,
        0.5 + key.fold("gamma").uniform(channels),
        0.3 * key.fold("beta").normal(channels),
    )
    return tuple(tensor.to(kind) for tensor in tensors)


def whole(
    g: torch.Tensor, z: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """All that the kernels find: y, means, rstds, gz, ggamma, gbeta."""
    found = planes.forward(z, gamma, beta, 1e-5)
    return (*found, *planes.backward(g, z, gamma, beta, *found[1:]))


@pytest.mark.parametrize(("n", "channels"), COUNTS)
def test_they_are_what_they_are_in_plain_pytorch(n: int, channels: int) -> None:
    g, z, gamma, beta = given(n, channels, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (z, gamma, beta)]
    normed = torch.nn.functional.group_norm(z, channels, gamma, beta, 1e-5)
    y = torch.nn.functional.avg_pool2d(normed.relu(), 2)
    plain = (y, *torch.autograd.grad(y, leaves, g))
    found = whole(*given(n, channels))
    for one, other in zip((found[0], *found[3:]), plain, strict=True):
        torch.testing.assert_close(one.double(), other.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), z.detach().mean((2, 3)).flatten())


@pytest.mark.parametrize(("n", "channels"), COUNTS[1:])
def test_none_knows_its_neighbours(n: int, channels: int) -> None:
    """A channel's planes, given beside others or between images of its own, are the same to the bit, by any number of threads."""
    g, z, gamma, beta = given(n, channels)
    copies = 8  # alone there would be fewer than eight, which go another way
    alone = [
        whole(*(t[:, c : c + 1].repeat(copies, 1, 1, 1) for t in (g, z)), gamma[c : c + 1], beta[c : c + 1])
        for c in range(channels)
    ]
    with pinned_threads(2):
        y, means, rstds, gz, *_ = whole(g, z, gamma, beta)
    for c, each in enumerate(alone):
        assert torch.equal(y[:, c], each[0][:n, 0]) and torch.equal(gz[:, c], each[3][:n, 0])
        assert torch.equal(means.view(n, channels)[:, c], each[1][:n])
        assert torch.equal(rstds.view(n, channels)[:, c], each[2][:n])


def test_what_is_not_a_number_stays_none() -> None:
    g, z, gamma, beta = given(5, 6)
    z[2, 1, 3, 3] = float("nan")
    y, *_, gz, _, _ = whole(g, z, gamma, beta)
    bad = torch.zeros(5, 6, dtype=torch.bool)
    bad[2, 1] = True
    for found in (y, gz):
        assert torch.equal(found.isnan().flatten(2).any(2), bad)
