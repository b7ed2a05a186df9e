"""What methods that learn pixels share: where they start, real batches, the pixel step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.checks import DivergedError, UserError
from distillens.core.contracts import Buffers, Like, Net, Params, Problem, State
from distillens.core.dataset import check_per_class
from distillens.core.decode import Decode, Pixels
from distillens.core.labels import Hard, Labels
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.unroll import Adam

Init = Literal["real", "noise"]
AS_THEY_ARE = Pixels()


def small(like: Like) -> bool:
    """Whether the data is of digits' scale (up to 16 x 16): the scale of the quick defaults."""
    return like.shape[1] * like.shape[2] <= 256


def choose(problem: Problem, key: Key) -> torch.Tensor:
    """Class-major indices [k * ipc] of a random real subset.

    Raises:
        UserError: a class has fewer images than were asked for.
    """
    check_per_class(problem.real, problem.ipc)
    return problem.real.drawn(problem.ipc, key)


def initial(problem: Problem, init: Init) -> torch.Tensor:
    """Images [k * ipc, c, h, w] to start from: a real subset, or standard normal numbers in the data's space."""
    key = problem.key.fold("init")
    if init == "real":
        return problem.real.images[choose(problem, key)].clone()
    return key.normal(problem.real.k * problem.ipc, *problem.real.shape).to(problem.real.images)


def drawn(net: Net, problem: Problem, key: Key) -> tuple[Params, Buffers]:
    """Fresh parameters and buffers of a network, where the real images live."""
    params, buffers = net.init(problem.real, key)
    return (
        {name: value.to(problem.real.images) for name, value in params.items()},
        {name: value.to(problem.real.images) for name, value in buffers.items()},
    )


def fresh(net: Net, problem: Problem, key: Key) -> Params:
    """Fresh parameters of a network that is differentiated through, where the real images live.

    Raises:
        UserError: the network remembers something between steps, which no gradient flows through.
    """
    params, buffers = drawn(net, problem, key)
    refuse_buffers(net, buffers)
    return params


def refuse_buffers(net: Net, buffers: Mapping[str, torch.Tensor]) -> None:
    """Refuse a network with buffers (running statistics of batch norm, say)."""
    if buffers:
        first, *others = buffers
        more = f" and {len(others)} more" if others else ""
        raise UserError(
            "this method differentiates through training, which needs a network without buffers",
            got=f"{type(net).__name__} with {first}{more}",
            fix="choose a norm that remembers nothing, such as group norm",
        )


def real_index(problem: Problem, key: Key, per_class: int) -> torch.Tensor:
    """The places [k, b] of random real images of every class, b at most the smallest class; without repeats."""
    b = min(per_class, min(len(members) for members in problem.by_class))
    return problem.real.drawn(b, key).view(-1, b)


def real_batch(problem: Problem, key: Key, per_class: int) -> torch.Tensor:
    """Random real images of every class [k, b, c, h, w], as ``real_index`` draws them."""
    return problem.real.images[real_index(problem, key, per_class)]


AT_ONCE = 1 << 18  # pixels of the images that go through a network together: more leave the cache


def classes_together(images: int, like: Like) -> int:
    """How many classes go through a network together when each has so many images."""
    return max(1, AT_ONCE // (images * like.shape[1] * like.shape[2]))


def moved(state: State, gradient: torch.Tensor, lr: float, momentum: float, name: str = "images") -> State:
    """The state after one step of SGD with momentum on the tensor ``name``, whose velocity it keeps.

    Raises:
        DivergedError: the gradient is not finite; the state before the step is kept.
    """
    setting = "lr_y" if name == "logits" else "lr_img"
    check_finite(gradient, f"the gradient of the {name}", setting)
    at = velocity_of(name)
    velocity = momentum * state.tensors[at] + gradient
    after = state.tensors[name] - lr * velocity
    check_finite(after, f"the step of the {name}", setting)
    return State({**state.tensors, name: after, at: velocity}, state.values)


def velocity_of(name: str) -> str:
    """Where the state keeps the velocity of one of its tensors."""
    return "velocity" if name == "images" else f"{name}.velocity"


def adam_moved(
    state: State, gradient: torch.Tensor, lr: float, betas: tuple[float, float], i: int, name: str = "images"
) -> State:
    """The state after step ``i`` of Adam on the tensor ``name``, whose moments it keeps.

    Raises:
        DivergedError: the gradient is not finite; the state before the step is kept.
    """
    check_finite(gradient, f"the gradient of the {name}", "lr_img")
    rule = Adam(*betas)
    moments = (f"{name}.first", f"{name}.second")
    now = (state.tensors[name], *(state.tensors[m] for m in moments))
    after = rule.step(now, gradient, torch.tensor(lr, dtype=gradient.dtype, device=gradient.device), i)
    return State({**state.tensors, **dict(zip((name, *moments), after, strict=True))}, state.values)


def with_moments(tensors: Mapping[str, torch.Tensor], **values: float) -> State:
    """A state before the first step of Adam on each of its tensors."""
    moments = {f"{n}.{m}": torch.zeros_like(t) for n, t in tensors.items() for m in ("first", "second")}
    return State({**tensors, **moments}, dict(values))


def clipped(gradients: Sequence[torch.Tensor], bound: float) -> tuple[list[torch.Tensor], float]:
    """Gradients no longer than ``bound`` together, and how long they were."""
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    return [g * (bound / norm) if norm > bound else g for g in gradients], norm


def check_finite(value: torch.Tensor | float, what: str, setting: str) -> None:
    """Stop where a number is not finite.

    Raises:
        DivergedError: it is not; the state before the step is kept.
    """
    if not bool(torch.isfinite(torch.as_tensor(value)).all()):
        raise DivergedError(
            f"the distillation diverged: {what} is not finite",
            fix=f"the last good state is kept; start again with --force and a smaller --set {setting}",
        )


def begin(images: torch.Tensor, **values: float) -> State:
    """The state before the first step."""
    return State({"images": images, "velocity": torch.zeros_like(images)}, dict(values))


def finished(
    problem: Problem,
    images: torch.Tensor,
    recipe: Recipe | None = None,
    labels: Labels | None = None,
    decode: Decode = AS_THEY_ARE,
) -> DistilledDataset:
    """A distilled set of stored images, class by class; with hard labels where none are given."""
    real = problem.real
    own = Hard(problem.labels()) if labels is None else labels
    return DistilledDataset({"images": images}, own, real.classes, real.space, decode, recipe)
