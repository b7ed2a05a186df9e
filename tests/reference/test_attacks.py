"""Attacks against closed forms of linear networks, and by what they must keep."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from distillens.attacks import _losses, fgsm, pgd
from distillens.core.contracts import logits_of_many
from distillens.core.rng import Key
from distillens.nets.convnet import ConvNet

KEY = Key(16, ("attacks",))
M, N, K = 3, 5, 4
EPS = 0.05
PIXELS = KEY.fold("pixels").uniform(N, 2, 6, 8).double().expand(M, -1, -1, -1, -1)
LABELS = KEY.fold("labels").integers(K, N)
START = KEY.fold("start").uniform(N, 2, 6, 8, low=-1.0).double()
WEIGHT = KEY.fold("weight").normal(M, K, 2 * 6 * 8).double()


def linear(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flatten(2) @ WEIGHT.mT


def curved(pixels: torch.Tensor) -> torch.Tensor:
    return (8 * linear(pixels).sin()) + linear(pixels)


def loss(logits: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.cross_entropy(one, LABELS, reduction="none") for one in logits])


def test_fgsm_of_a_linear_network_in_closed_form() -> None:
    # dL/dx = W' (p - y)
    p = linear(PIXELS).softmax(-1) - F.one_hot(LABELS, K)
    slope = (p @ WEIGHT).view_as(PIXELS)
    expected = (PIXELS + EPS * slope.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(linear, PIXELS, LABELS, EPS), expected)


def test_pgd_reaches_the_best_corner_of_a_linear_network_of_two_classes() -> None:
    two = WEIGHT[:, :2]
    labels = LABELS % 2

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(2) @ two.mT

    # The loss falls with (w_own - w_other) x alone: the best place is a corner of the box.
    sign = (two[:, 0] - two[:, 1]).sign()[:, None] * (2 * labels - 1)[None, :, None]
    corner = (PIXELS + EPS * sign.view_as(PIXELS)).clamp(0, 1)
    torch.testing.assert_close(pgd(logits, PIXELS, labels, EPS, 10, START), corner)


def test_the_loss_is_cross_entropy() -> None:
    logits = KEY.fold("logits").normal(M, N, K).double()
    torch.testing.assert_close(_losses(logits, LABELS), loss(logits))


@pytest.mark.parametrize("steps", [1, 10])
def test_pgd_stays_in_its_box_and_in_range(steps: int) -> None:
    fooled = pgd(curved, PIXELS, LABELS, EPS, steps, START)
    assert float((fooled - PIXELS).abs().max()) <= EPS * (1 + 1e-5)
    assert 0 <= float(fooled.min()) <= float(fooled.max()) <= 1
    assert not fooled.requires_grad


def test_a_confident_network_is_climbed_all_the_same() -> None:
    sure = torch.zeros(1, K, 2 * 6 * 8)
    sure[0, 0] = 1.0  # a logit of 43 for class 0: its probability is 1 to the last bit

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(2) @ sure.mT

    bright = torch.full((1, 1, 2, 6, 8), 0.45)
    fooled = fgsm(logits, bright, torch.tensor([0]), EPS)
    torch.testing.assert_close(fooled, bright - EPS)


def test_pgd_is_no_weaker_than_one_step_or_its_start() -> None:
    with torch.no_grad():
        begun = (PIXELS + EPS * START).clamp(0, 1)
        clean, once = loss(curved(begun)), loss(curved(fgsm(curved, PIXELS, LABELS, EPS)))
        many = loss(curved(pgd(curved, PIXELS, LABELS, EPS, 10, START)))
    assert bool((many >= clean).all()), "the start is one of the places"
    assert float(many.mean()) > float(once.mean())


@pytest.mark.parametrize("steps", [0, 3])
def test_many_networks_are_attacked_as_one_by_one(steps: int) -> None:
    net = ConvNet(depth=2, width=4)
    like = SimpleNamespace(shape=(2, 8, 12), k=K)
    started = [net.init(like, KEY.fold("net", j))[0] for j in range(M)]
    pixels = KEY.fold("large").uniform(N, 2, 8, 12)
    start = KEY.fold("large start").uniform(N, 2, 8, 12, low=-1.0)

    def attacked(some: list[int]) -> torch.Tensor:
        params = {name: torch.stack([started[j][name] for j in some]) for name in started[0]}

        def logits(seen: torch.Tensor) -> torch.Tensor:
            return logits_of_many(net, params, {}, seen)[0]

        own = pixels.expand(len(some), -1, -1, -1, -1)
        return pgd(logits, own, LABELS, EPS, steps, start) if steps else fgsm(logits, own, LABELS, EPS)

    together = attacked([0, 1, 2])
    # A slope of exactly nothing may round to either side: such pixels are none here.
    for j in range(M):
        torch.testing.assert_close(attacked([j])[0], together[j])
