"""Adversarial images within a small box around real ones, for many networks at once.

Shapes: m networks, n images. Everything is in pixels: ``logits`` takes the images [m, n, c, h, w] that each network sees,
in [0, 1], and gives [m, n, k]; the map into the networks' own units is its part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Logits = Callable[[torch.Tensor], torch.Tensor]
STRIDE = 2.5  # times eps / steps is a step: together far enough to cross the box and more


def fgsm(logits: Logits, pixels: torch.Tensor, labels: torch.Tensor, eps: float) -> torch.Tensor:
    """One step of ``eps`` up the loss in every pixel: images [m, n, c, h, w] in [0, 1] that fool.

    Source: Goodfellow et al. 2015, section 4: x + eps sign(dL/dx), cut to [0, 1].
    """
    return (pixels + eps * _climb(logits, pixels, labels)[1].sign()).clamp(0, 1)


def pgd(
    logits: Logits, pixels: torch.Tensor, labels: torch.Tensor, eps: float, steps: int, start: torch.Tensor
) -> torch.Tensor:
    """``steps`` steps up the loss, each brought back into the box of half side ``eps`` and into [0, 1].

    ``start`` [n, c, h, w] in [-1, 1] is where in its box each image begins, the same for all networks. Of all places that
    it has been in an image keeps the one of highest loss.

    Source: Madry et al. 2018, section 2.1. Where we differ: they keep the last place.
    """
    low, high = (pixels - eps).clamp(0, 1), (pixels + eps).clamp(0, 1)
    at = torch.minimum(torch.maximum(pixels + eps * start, low), high)
    best, highest = at, torch.full(pixels.shape[:2], -torch.inf, dtype=torch.float64, device=pixels.device)
    for _ in range(steps):
        losses, slope = _climb(logits, at, labels)
        best, highest = _higher(best, highest, at, losses)
        step = at + STRIDE * eps / steps * slope.sign()
        at = torch.minimum(torch.maximum(step, low), high)
    with torch.no_grad():
        losses = _losses(logits(at), labels)
    return _higher(best, highest, at, losses)[0]


def _higher(
    best: torch.Tensor, highest: torch.Tensor, at: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    better = losses > highest
    return torch.where(better[..., None, None, None], at, best), torch.where(better, losses, highest)


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [m, n] of logits [m, n, k], as a function of how far the label's logit is ahead.

    As it is usually written its slope rounds to nothing where a network is confident, which would look robust.
    """
    logits = logits.double()
    own = F.one_hot(labels, logits.shape[-1]).bool()
    others = logits.masked_fill(own, -torch.inf).logsumexp(-1)
    return F.softplus(others - logits.masked_fill(~own, 0).sum(-1))


def _climb(logits: Logits, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each image [m, n] and its slope in the image's pixels."""
    with torch.enable_grad():
        at = pixels.detach().requires_grad_()
        losses = _losses(logits(at), labels)
        # Each loss depends on its own image alone, so the gradient of the sum holds them all.
        (slope,) = torch.autograd.grad(losses.sum(), at)
    return losses.detach(), slope
