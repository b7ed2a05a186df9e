"""What methods share that can say which real images their steps come from, and why others cannot."""

from __future__ import annotations

import torch

from distillens.core.checks import UserError
from distillens.core.contracts import Net, Problem, State
from distillens.core.donors import HALVES, Donors
from distillens.core.rng import Key

PARTS, MET, START = "donors.parts", "donors.met", "donors.start"

ROUNDING = 16  # times the precision and an image's length: what is less is no move
EVERY = 5  # matches of gradients of which one is on record: single images' gradients cost about two matches

# What a user is told who asks a method for donors that keeps no such record.
FOLLOWS = {
    "donors": "real images reach its steps through whole trainings of experts, which blend them: no part of a step is one image's"
}
UNROLLS = {
    "donors": "its loss is a sum over real images, but to tell their parts apart takes a way through the whole training for each image"
}
KERNELS = {
    "donors": "every real image, of whatever class, moves every point of its regression; the record is of donors of a point's own class"
}
SELECTS = {"donors": "its points are real images, and the set says which (chosen)"}


def begun(problem: Problem, state: State, net: Net, donors: bool) -> State:
    """The state before the first step, with an empty record where donors are asked for.

    Raises:
        UserError: donors are asked for under a network that mixes images.
    """
    if not donors:
        return state
    if net.mixes_examples:
        raise UserError(
            "donors are recorded under networks that keep images apart",
            got=f"{type(net).__name__}, whose batch norm lets every image of a batch change the others'",
            fix="choose another norm, or leave donors out",
        )
    n, images = len(problem.real), state.tensors["images"]
    record = {
        PARTS: images.new_zeros(HALVES, problem.ipc, n),
        MET: torch.zeros(HALVES, n, dtype=torch.int64, device=images.device),
        START: images,
    }
    return State({**state.tensors, **record}, state.values)


def way_back(state: State, gradient: torch.Tensor) -> torch.Tensor:
    """For each distilled image [k, n, c, h, w] the direction in which a gradient counts: from where it is to its start.

    Not the step's own direction: a batch sways each step, and an image far from the others would seem to give much in every batch that it
    is in, only because the step leans towards it. What came before does not know this batch. An image that has
    not moved yet has its first gradient's direction.
    """
    start = state.tensors[START].reshape(gradient.shape)
    back = start - state.tensors["images"].reshape(gradient.shape)
    # The way to pixels and back rounds: that is no move.
    rounding = ROUNDING * torch.finfo(start.dtype).eps * start.flatten(2).norm(dim=2)
    moved = back.flatten(2).norm(dim=2) > rounding
    return torch.where(moved[..., None, None, None], back, gradient)


def told(key: Key, matches: int, every: int) -> int:
    """Which of a step's matches is on record, drawn at random: one of ``every``, one a step at most; none where it is beyond the last."""
    return int(key.fold("donors").integers(max(matches, every), 1))


def over_length(parts: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Derivatives [k, n, b] along directions [k, n, c, h, w], over their lengths; 0 where there is no direction."""
    length = along.flatten(2).norm(dim=2)[..., None]
    return torch.where(length > 0, parts / length.where(length > 0, torch.ones_like(length)), 0.0)


def credited(state: State, index: torch.Tensor, parts: torch.Tensor, i: int) -> State:
    """The state with the parts [k, n, b] of step ``i`` on record, of the real images at ``index`` [k, b]."""
    half = i % HALVES
    places = index.flatten()  # each once: classes share no image
    record = {name: state.tensors[name].clone() for name in (PARTS, MET)}
    record[PARTS][half][:, places] += parts.transpose(0, 1).flatten(1).to(record[PARTS])
    record[MET][half][places] += 1
    return State({**state.tensors, **record}, state.values)


def recorded(state: State) -> Donors | None:
    """The record in a state, if one was kept and a step has been made."""
    if MET not in state.tensors or not bool(state.tensors[MET].any()):
        return None
    return Donors(state.tensors[PARTS], state.tensors[MET])
