"""What methods that learn pixels share: where they start, real batches, the pixel step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.contracts import Like, Net, Params, Problem, State
from distillens.core.dataset import check_per_class
from distillens.core.labels import Hard
from distillens.core.recipe import Recipe
from distillens.core.rng import Key

Init = Literal["real", "noise"]


def small(like: Like) -> bool:
    """Whether the data is of digits' scale (up to 16 x 16): the scale of the quick defaults."""
    return like.shape[1] * like.shape[2] <= 256


def choose(problem: Problem, key: Key) -> torch.Tensor:
    """Class-major indices [k * ipc] of a random real subset.

    Raises:
        UserError: a class has fewer images than were asked for.
    """
    check_per_class(problem.real, problem.ipc)
    return torch.cat(
        [
            members[key.fold(c).permutation(len(members))[: problem.ipc]]
            for c, members in enumerate(problem.by_class)
        ]
    )


def initial(problem: Problem, init: Init) -> torch.Tensor:
    """Images [k * ipc, c, h, w] to start from: a real subset, or standard normal numbers in the data's space."""
    key = problem.key.fold("init")
    if init == "real":
        return problem.real.images[choose(problem, key)].clone()
    return key.normal(problem.real.k * problem.ipc, *problem.real.shape).to(problem.real.images)


def fresh(net: Net, problem: Problem, key: Key) -> Params:
    """Fresh parameters of a network that is differentiated through, where the real images live.

    Raises:
        UserError: the network remembers something between steps, which no gradient flows through.
    """
    params, buffers = net.init(problem.real, key)
    refuse_buffers(net, buffers)
    return {name: value.to(problem.real.images) for name, value in params.items()}


def refuse_buffers(net: Net, buffers: Mapping[str, torch.Tensor]) -> None:
    """Refuse a network with buffers (running statistics of batch norm, say)."""
    if buffers:
        raise UserError(
            "this method differentiates through training, which needs a network without buffers",
            got=f"{type(net).__name__} with {', '.join(buffers)}",
            fix="choose a norm that remembers nothing, such as group norm",
        )


def real_batch(problem: Problem, key: Key, per_class: int) -> torch.Tensor:
    """Random real images of every class [k, b, c, h, w], b at most the smallest class; without repeats."""
    b = min(per_class, min(len(members) for members in problem.by_class))
    index = torch.stack(
        [members[key.fold(c).permutation(len(members))[:b]] for c, members in enumerate(problem.by_class)]
    )
    return problem.real.images[index]


def moved(state: State, gradient: torch.Tensor, lr: float, momentum: float) -> State:
    """The state after one step of SGD with momentum on ``images``.

    Raises:
        UserError: the gradient is not finite; the state before the step is kept.
    """
    if not bool(torch.isfinite(gradient).all()):
        raise UserError(
            "the distillation diverged: the gradient of the images is not finite",
            fix="the last good state is kept; start again with --force and a smaller --set lr_img",
        )
    velocity = momentum * state.tensors["velocity"] + gradient
    images = state.tensors["images"] - lr * velocity
    return State({**state.tensors, "images": images, "velocity": velocity}, state.values)


def begin(images: torch.Tensor, **values: float) -> State:
    """The state before the first step."""
    return State({"images": images, "velocity": torch.zeros_like(images)}, dict(values))


def finished(problem: Problem, images: torch.Tensor, recipe: Recipe | None = None) -> DistilledDataset:
    """A distilled set of plain images with hard class-major labels."""
    real = problem.real
    return DistilledDataset(
        {"images": images}, Hard(problem.labels()), real.classes, real.space, recipe=recipe
    )
