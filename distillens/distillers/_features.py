"""What methods share that compare features of real and distilled images: views, slopes by class, steps in pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from distillens import augment, cost, kernels
from distillens.augment import Draw
from distillens.core.contracts import Buffers, Like, Mode, Net, Params, Problem
from distillens.core.rng import Key
from distillens.distillers import _pixels
from distillens.distillers._formations import decoded

Draws = Sequence[Draw | None]  # one a class, the same for its real and its distilled images
Summary = Callable[[torch.Tensor], torch.Tensor]  # features [m, n, d] -> [m, ...]
Loss = Callable[[torch.Tensor, slice], torch.Tensor]  # images [m, n, c, h, w] of these classes -> [m]


@dataclass(frozen=True, eq=False)
class View:
    """A network that images are looked at through, and in which mode.

    Where training mode mixes images (batch norm), all classes go through as one batch, as in ``main_DM.py``: real and
    distilled images each with their own statistics. Else as many classes go together as a cache holds.
    """

    net: Net
    params: Params
    buffers: Buffers
    mode: Mode

    @staticmethod
    def fresh(net: Net, problem: Problem, key: Key) -> View:
        """A network that was never trained: it takes the statistics of a batch, where it takes any."""
        params, buffers = (
            {name: value.to(problem.real.images) for name, value in part.items()}
            for part in net.init(problem.real, key)
        )
        return View(net, params, buffers, "train")

    def together(self, images: int, like: Like) -> int:
        """How many classes of so many images go through at once."""
        return classes_at_once(self.net, self.mode, images, like)

    def features(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Features [m, n, d] of the augmented images [m, n, c, h, w] of some classes, all at once."""
        found, _ = self.net.features(self.params, self.buffers, shown(images, draws), self.mode)
        return found.reshape(*images.shape[:2], -1)

    def logits(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Logits [m, n, k] of the augmented images [m, n, c, h, w] of some classes, all at once."""
        found, _ = self.net.logits(self.params, self.buffers, shown(images, draws), self.mode)
        return found.reshape(*images.shape[:2], -1)

    def width(self, problem: Problem) -> int:
        """d, how many features an image has."""
        with torch.no_grad():
            return self.features(problem.real.images[None, :1], [None]).shape[2]

    def targets(self, images: torch.Tensor, draws: Draws, summary: Summary, like: Like) -> torch.Tensor:
        """A summary [k, ...] of each class's features that no gradient flows through."""
        step = self.together(images.shape[1], like)
        with torch.no_grad(), kernels.for_targets():
            return torch.cat(
                [
                    summary(self.features(images[first : first + step], draws[first : first + step]))
                    for first in range(0, len(images), step)
                ]
            )


def themselves(features: torch.Tensor) -> torch.Tensor:
    """Features as their own summary."""
    return features


def classes_at_once(net: Net, mode: Mode, images: int, like: Like) -> int:
    """How many classes of so many images go through a network at once."""
    if mode == "train" and net.mixes_examples:
        return like.k
    return min(like.k, _pixels.classes_together(images, like))


def shown(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The images [m, n, c, h, w] of some classes under their draws, as one batch [m * n, c, h, w]."""
    return torch.cat([augment.apply(own, drawn) for own, drawn in zip(images, draws, strict=True)])


def draws_of(strategy: str, key: Key, k: int) -> list[Draw | None]:
    """One siamese draw a class."""
    return [augment.draw(strategy, key.fold(c)) for c in range(k)]


def slope(
    images: torch.Tensor, loss: Loss, together: int, classes: range | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [m] of some classes (all where none are named), and the gradient of their sum [m, n, c, h, w].

    ``images`` [k, n, c, h, w] are those of all classes; ``together`` of them are differentiated at a time.
    """
    classes = range(len(images)) if classes is None else classes
    losses, gradients = [], []
    for first in range(classes.start, classes.stop, together):
        part = slice(first, min(first + together, classes.stop))
        leaf = images[part].detach().requires_grad_()
        own = loss(leaf, part)
        gradients.append(torch.autograd.grad(own.sum(), leaf)[0])
        losses.append(own.detach())
    return torch.cat(losses), torch.cat(gradients)


def felt(
    view: View,
    images: torch.Tensor,
    ways: torch.Tensor,
    draws: Draws,
    together: int,
    factor: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and what they do when images [k, n, c, h, w] move along ways of that shape.

    Both are [k, factor^2 n, d], of what a class's images decode to in the decoder's order; each moves with the image that it is a patch of.
    """
    found = []
    for first in range(0, len(images), together):
        part = slice(first, first + together)
        own, way, still = (
            shown(decoded(x, factor), draws[part])
            for x in (images[part], ways[part], torch.zeros_like(ways[part]))
        )
        leaf = own.detach().requires_grad_()
        at, _ = view.net.features(view.params, view.buffers, leaf, view.mode)
        # J' p is linear in p, so that its derivative there is J: faster than forward mode, whose group norm is Python.
        pulled = torch.zeros_like(at).requires_grad_()
        (back,) = torch.autograd.grad(at, leaf, pulled, create_graph=True)
        # Decoding and augmentation are affine in the image: what they do to a difference is exact.
        (moving,) = torch.autograd.grad(back, pulled, way - still)
        found.append((at.detach(), moving))
    at, moving = (torch.cat([pair[one] for pair in found]) for one in (0, 1))
    return by_class(at, len(images)), by_class(moving, len(images))


def of_stored(items: torch.Tensor, factor: int) -> torch.Tensor:
    """Sums [k, n, ...] over what each stored image decodes to, of items [k, factor^2 n, ...] in the decoder's order."""
    return items.reshape(len(items), factor**2, -1, *items.shape[2:]).sum(1)


def by_class(items: torch.Tensor, k: int) -> torch.Tensor:
    """Class-major items [k * n, ...] as [k, n, ...]."""
    return items.reshape(k, -1, *items.shape[1:])


def per_class(problem: Problem, batch: int) -> int:
    """How many real images a class gives to a batch."""
    return min(batch, min(map(len, problem.by_class)))


def matching_bytes(net: Net, mode: Mode, problem: Problem, real: int, distilled: int) -> float:
    """Bytes of a step: the distilled images' graph, as many classes as go together, and real ones without a graph."""
    one = cost.cost(net, problem.real)
    ours, theirs = (classes_at_once(net, mode, n, problem.real) * n for n in (distilled, real))
    # Without a graph no more than two layers are alive at once: a third of it at most.
    return ours * one.first + theirs * one.first / 3
