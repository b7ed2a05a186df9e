"""Four instruments that tell at which moment of real training a set, a class or an image stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distillens.analyses.representativeness._beside import answers, first_at
from distillens.analyses.representativeness._trajectory import shown
from distillens.attribution.gradients import example_gradients, mean_gradient
from distillens.core.dataset import Dataset
from distillens.curvature import quadratic_forms
from distillens.train import Population

INSTRUMENTS = ("agreement", "recognition", "gradients", "curvature")
OF_POINTS = INSTRUMENTS[1:]  # no model is trained on a single point, so none can agree
REACHED, LEFT = 0.95, 0.5  # shares of the greatest reading
LEAST = 0.1  # a reading that never gets so far (of at most 1) tells no age


@dataclass(frozen=True, eq=False)
class Readings:
    """What the instruments say at each moment, of one set: ``whole`` [m, 4, t], ``classes`` [m, 4, k, t], ``points`` [m, 3, n, t]."""

    whole: torch.Tensor
    classes: torch.Tensor
    points: torch.Tensor


def real_directions(population: Population, moments: tuple[int, ...], data: Dataset) -> torch.Tensor:
    """The gradient of the loss on real data at each moment, of length 1, [m, t, P]."""
    rows = [
        torch.stack([mean_gradient(population.net, population.shapes, flat, data) for flat in own])
        for own in torch.stack([population.at(moment) for moment in moments], 1)
    ]
    return F.normalize(torch.stack(rows), dim=-1)


def read(
    population: Population,
    moments: tuple[int, ...],
    directions: torch.Tensor,
    probes: torch.Tensor,
    data: Dataset,
    model: Population,
    test: Dataset,
) -> Readings:
    """All readings of one set along its replicate's trajectories; model j of the set goes with trajectory j."""
    data = shown(data)
    labels = data.labels.hard().cpu()
    members = F.one_hot(labels, data.k).double().T  # [k, n]
    members = members / members.sum(1, keepdim=True).clamp(min=1)
    right = (answers(population, data, moments)[0] == labels).double()  # [m, t, n]
    right = (right - 1 / data.k) / (1 - 1 / data.k)
    agreed, agreed_by_class = _agreement(
        answers(population, test, moments)[0], model.predictions(test).cpu(), test
    )
    cosine: list[list[tuple[torch.Tensor, ...]]] = []
    trace: list[list[torch.Tensor]] = []
    for j in range(len(population)):
        steps = [population.at(moment)[j] for moment in moments]
        cosine.append(
            [_cosines(population, flat, data, members, directions[j, t]) for t, flat in enumerate(steps)]
        )
        trace.append(
            [
                quadratic_forms(population.net, population.shapes, flat, data, probes.to(flat))
                .mean(0)
                .double()
                .cpu()
                for flat in steps
            ]
        )
    curvature = torch.stack([torch.stack(own) for own in trace])  # [m, t, n]
    cosines = [torch.stack([torch.stack([at[i] for at in own]) for own in cosine]) for i in range(3)]
    whole = torch.stack([agreed, right.mean(-1), cosines[0], curvature.mean(-1)], 1)
    classes = torch.stack([agreed_by_class, right @ members.T, cosines[1], curvature @ members.T], 1)
    points = torch.stack([right, cosines[2], curvature], 1)
    return Readings(whole, classes.transpose(-1, -2), points.transpose(-1, -2))


def _agreement(theirs: torch.Tensor, own: torch.Tensor, test: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Cohen's kappa of a set's models [m, n] and real ones [m, t, n] on test images, [m, t], and by class [m, t, k].

    What two models would agree by chance goes by the classes that they name on all test images, for one class too: on the
    images of one class alone both name little else, and every agreement would pass for chance.
    """
    labels = test.labels.hard().cpu()
    members = F.one_hot(labels, test.k).double()
    members = members / members.sum(0).clamp(min=1)
    same = (theirs == own[:, None]).double()
    named = F.one_hot(theirs, test.k).double().mean(2) * F.one_hot(own, test.k).double().mean(1)[:, None]
    chance = named.sum(-1)
    room = (1 - chance).clamp(min=1e-12)  # two models that name one and the same class alone
    return (same.mean(-1) - chance) / room, (same @ members - chance[..., None]) / room[..., None]


def _cosines(
    population: Population, flat: torch.Tensor, data: Dataset, members: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cosine with a direction [P] of length 1: of the gradient on all images, on each class [k], on each image [n].

    ``members`` [k, n] averages over classes. The images' gradients are held some at a time.
    """
    points, at = [], 0
    whole = torch.zeros_like(flat)
    classes = flat.new_zeros(data.k, len(flat))
    for part in example_gradients(population.net, population.shapes, flat, data):
        whole += part.sum(0) / len(data)
        classes += members[:, at : at + len(part)].to(part) @ part
        points.append(_along(part, direction))
        at += len(part)
    return _along(whole, direction), _along(classes, direction), torch.cat(points)


def _along(gradients: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return (F.normalize(gradients, dim=-1) @ direction).double().cpu()


def smooth(readings: torch.Tensor) -> torch.Tensor:
    """Readings [..., t] averaged with their neighbours: 1/4, 1/2, 1/4; the ends count for what is missing."""
    before = torch.cat([readings[..., :1], readings[..., :-1]], -1)
    after = torch.cat([readings[..., 1:], readings[..., -1:]], -1)
    return before / 4 + readings / 2 + after / 4


def highest(readings: torch.Tensor, moments: tuple[int, ...]) -> torch.Tensor:
    """When readings [..., t] are greatest, as log(1 + updates): the top of the parabola through three; infinite at the end.

    Of equals the first.
    """
    logs = torch.tensor(moments, dtype=torch.float64).log1p()
    top = readings.argmax(-1)
    inner = top.clamp(1, max(1, len(moments) - 2))
    x0, x1, x2 = (logs[(inner + i).clamp(max=len(moments) - 1)] for i in (-1, 0, 1))
    y0, y1, y2 = (
        readings.gather(-1, (inner + i).clamp(max=len(moments) - 1)[..., None])[..., 0] for i in (-1, 0, 1)
    )
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    peak = x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right)
    age = torch.where(top == 0, logs[0], peak)
    return torch.where(top == len(moments) - 1, math.inf, age)


def fallen(readings: torch.Tensor, share: float, moments: tuple[int, ...]) -> torch.Tensor:
    """When readings [..., t], once past their greatest, first are at a share of it or below, as log(1 + updates)."""
    most, top = readings.max(-1)
    early = torch.arange(len(moments)) < top[..., None]
    return first_at((-readings).masked_fill(early, -math.inf), -share * most, moments)


def ages_of(readings: torch.Tensor, moments: tuple[int, ...]) -> torch.Tensor:
    """The ages [m, instruments, ...] from readings [m, instruments, ..., t], the last instruments where there are fewer than 4.

    Infinite where it has not come by the last moment, or the reading never was worth speaking of.
    """
    readings = smooth(readings)
    found = []
    for name, own in zip(INSTRUMENTS[-readings.shape[1] :], readings.unbind(1), strict=True):
        most = own.max(-1).values
        if name == "agreement":
            age = highest(own, moments)
        elif name == "recognition":
            age = first_at(own, REACHED * most, moments)
        else:
            age = fallen(own, LEFT, moments)
        found.append(age.masked_fill(most < (0 if name == "curvature" else LEAST), math.inf))
    return torch.stack(found, 1)
