"""The test images that a point helps most, and the words that they have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from distillens.attributes import Attributes

HALVES = ("all", "first", "second")  # initialisations that influences are averaged over


def most_helped(effect: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor, top: int) -> torch.Tensor:
    """The images [P, top] of each point's class with the largest influence [P, n], the largest first."""
    own = labels[:, None] == classes[None]
    return effect.masked_fill(~own, -math.inf).topk(top, dim=1).indices


def base_counts(attributes: Attributes, classes: torch.Tensor, k: int) -> torch.Tensor:
    """How many images of each class have each word [k, words]."""
    has = attributes.has()
    return torch.stack([has[classes == c].sum(0) for c in range(k)])


@dataclass(frozen=True)
class OfClass:
    """The points of one class and all images of it."""

    c: int
    points: torch.Tensor  # [P of the class], places in the set
    listed: torch.Tensor  # [HALVES, P of the class, n of the class], 1.0 for the most helped
    words: torch.Tensor  # [n of the class, words], 1.0 where the image has it

    def counts(self) -> torch.Tensor:
        """How many of each point's most helped images have each word [HALVES, P of the class, words]."""
        return (self.listed @ self.words).long()


def by_class(
    effect: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor, attributes: Attributes, top: int
) -> tuple[OfClass, ...]:
    """Of each class in the set its points' ``top`` most helped images, and the words of all of them.

    ``effect`` [inits, P, n] are influences of points with ``labels`` [P] on images of ``classes`` [n]; lists are made from
    all initialisations, and from every other one beginning with the first and with the second.
    """
    halves = (effect, effect[::2], effect[1::2])
    lists = [most_helped(part.mean(0), labels, classes, top) for part in halves]
    listed = torch.stack([torch.zeros(effect.shape[1:]).scatter_(1, one, 1.0) for one in lists])
    has = attributes.has().float()
    found = []
    for c in sorted(set(labels.tolist())):
        points, images = (labels == c).nonzero()[:, 0], (classes == c).nonzero()[:, 0]
        found.append(OfClass(c, points, listed[:, points][:, :, images], has[images]))
    return tuple(found)


def all_counts(parts: tuple[OfClass, ...]) -> torch.Tensor:
    """How many of each point's most helped images have each word [HALVES, P, words]."""
    p, words = sum(len(part.points) for part in parts), parts[0].words.shape[1]
    counts = torch.zeros(len(HALVES), p, words, dtype=torch.long)
    for part in parts:
        counts[:, part.points] = part.counts()
    return counts
