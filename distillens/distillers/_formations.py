"""What methods share that store several images in one (multi-formation, Kim et al. 2022), in the range of pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distillens.core.contracts import Problem
from distillens.core.dataset import check_per_class
from distillens.core.decode import MultiFormation
from distillens.core.space import Space


def mixed(problem: Problem, factor: int) -> torch.Tensor:
    """Images [k * ipc, c, h, w] whose factor^2 patches are different real images of the class, made smaller.

    A class with too few images for that gives some of them more than once, as seldom as can be.

    Source: Kim et al. 2022, ``init: mix``. With factor 1 they are a random real subset.

    Raises:
        UserError: a class has fewer images than points were asked for.
    """
    check_per_class(problem.real, problem.ipc)
    wanted = problem.ipc * factor**2
    chosen = []
    for c, members in enumerate(problem.by_class):
        key = problem.key.fold("init").fold(c)
        rounds = [key.fold(turn) if turn else key for turn in range(-(-wanted // len(members)))]
        order = torch.cat([place.permutation(len(members)) for place in rounds])[:wanted]
        chosen.append(members[order].reshape(factor**2, problem.ipc))
    # [factor^2, k * ipc]: the patch is the outer index, as it is when they are decoded.
    index = torch.cat(chosen, 1)
    if factor == 1:
        return problem.real.images[index[0]].clone()
    h, w = problem.real.shape[1:]
    images = problem.real.images.new_empty(index.shape[1], *problem.real.shape)
    for place, (rows, columns) in enumerate(MultiFormation(factor).patches(h, w)):
        size = (rows.stop - rows.start, columns.stop - columns.start)
        shrunk = F.interpolate(problem.real.images[index[place]], size=size, mode="area")
        images[:, :, rows, columns] = shrunk
    return images


def decoded(images: torch.Tensor, factor: int) -> torch.Tensor:
    """What [k, n, c, h, w] stored images of each class decode to, [k, factor^2 * n, c, h, w]."""
    k, n = images.shape[:2]
    shown = MultiFormation(factor).images({"images": images.flatten(0, 1)})
    by_patch = shown.reshape(factor**2, k, n, *images.shape[2:])
    return by_patch.transpose(0, 1).reshape(k, factor**2 * n, *images.shape[2:])


def in_range(images: torch.Tensor, space: Space) -> torch.Tensor:
    """The nearest images whose pixels lie in [0, 1]; as they are in a space whose pixels are not known exactly."""
    if not space.invertible:
        return images
    pixels = space.to_pixels(images)
    clamped = pixels.clamp(0, 1)
    # An image that lies within already keeps its bits, which the way to pixels and back would change.
    within = (pixels == clamped).flatten(1).all(1)[:, None, None, None]
    return torch.where(within, images, space.from_pixels(clamped))


def in_pixels(
    space: Space, images: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and a gradient in units of pixels, where authors step; as they are where pixels are not known exactly."""
    if not space.invertible:
        return images, gradient
    pixels = space.to_pixels(images)
    return pixels, pulled_back(space, pixels, gradient)


def out_of_pixels(space: Space, images: torch.Tensor) -> torch.Tensor:
    """The way back from ``in_pixels``."""
    return space.from_pixels(images) if space.invertible else images


def per_pixel(space: Space, images: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """What moves images of a space by SGD as their pixels would be moved; the gradient where pixels are not known exactly.

    With J the derivative of the way from pixels, theirs is J' g, and the step that it becomes here J J' g: on a
    standardised space g / std^2.
    """
    if not space.invertible:
        return gradient
    leaf = space.to_pixels(images).detach().requires_grad_()
    along = torch.zeros_like(gradient).requires_grad_()
    (pulled,) = torch.autograd.grad(space.from_pixels(leaf), leaf, along, create_graph=True)
    # Linear in what it is given, so that its derivative in that is the way there.
    (step,) = torch.autograd.grad(pulled, along, pulled_back(space, leaf, gradient))
    return step


def pulled_back(space: Space, pixels: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient in the units of a space as one in pixels."""
    leaf = pixels.detach().requires_grad_()
    (pulled,) = torch.autograd.grad(space.from_pixels(leaf), leaf, gradient)
    return pulled
