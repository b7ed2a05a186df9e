"""What a protocol trains on a set, and which of it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard, Labels, Targets, Teacher
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.evaluation.protocol import Labelling, Protocol
from distillens.runs import Runs
from distillens.train import Population, Training, networks, on


@dataclass(frozen=True, eq=False)
class Judged:
    """The models of a protocol that count: m networks with parameters [m, P].

    ``candidate`` names the rate and steps that were chosen, ``moment`` the step after which; both are empty where there
    was nothing to choose.
    """

    population: Population
    flat: torch.Tensor
    candidate: str = ""
    moment: int | None = None

    def logits(self, data: Dataset) -> torch.Tensor:
        """Logits [m, n, k]."""
        return self.population.logits(data, self.flat)

    def accuracy(self, data: Dataset) -> torch.Tensor:
        """The share of images that each network gets right, [m]."""
        return (self.logits(data).argmax(-1) == data.labels.hard()).double().mean(1)

    def seen(self, training: Training) -> int:
        """Images that each network was shown till then, in one of the protocol's trainings on the set."""
        if training.order is not None:
            return int((training.order.steps >= 0).sum())
        n = len(training.data)
        batch = min(training.recipe.batch or n, n)
        steps = training.steps if self.moment is None else self.moment
        passes, rest = divmod(steps, math.ceil(n / batch))
        return passes * n + rest * batch  # the short batch comes last in a pass


def trials(
    protocol: Protocol,
    distilled: DistilledDataset,
    net: Net,
    keys: tuple[Key, ...],
    *,
    of: DistilledDataset | None = None,
) -> list[Training]:
    """The candidates of a protocol on a set, with the step size that the set ``of`` learned (its own by default)."""
    if distilled.order is not None:  # nothing of it can be chosen: its own steps are replayed
        return [on(distilled, net, protocol.recipe, keys)]
    recipes = protocol.recipes(distilled, rate_of=of)
    shown = labelled(distilled, protocol.labels)
    return [replace(on(shown, net, recipe, keys), snapshots=protocol.looks(recipe)) for recipe in recipes]


def labelled(distilled: DistilledDataset, labels: Labelling) -> DistilledDataset:
    """The set with its labels as a protocol wants them (``Protocol`` says how)."""
    present = distilled.labels
    if labels == "hard" and present.kind != Hard.kind:
        return replace(distilled, labels=Hard(present.hard()))
    if labels == "targets" and present.kind != Targets.kind:
        k = len(distilled.classes)
        return replace(distilled, labels=Targets(_shares(present, k) - 1 / k))
    return distilled


def _shares(labels: Labels, k: int) -> torch.Tensor:
    """What each class has of each label, [n, k]; rows sum to 1."""
    if isinstance(labels, Hard):
        return torch.nn.functional.one_hot(labels.index, k).float()
    if isinstance(labels, Teacher):
        return (labels.views / labels.temperature).softmax(-1).mean(0)
    (values,) = labels.tensors().values()
    return values.softmax(-1) if labels.kind == "logits" else values


def of_sets(
    protocol: Protocol, net: Net, named: Mapping[str, tuple[DistilledDataset, ...]], key: Key
) -> dict[str, list[list[Training]]]:
    """The candidates on every replicate of every set; replicate r of all sets has the same network keys."""
    return {
        name: [
            trials(protocol, one, net, networks(key, r, protocol.nets)) for r, one in enumerate(replicates)
        ]
        for name, replicates in named.items()
    }


def of_full(
    protocol: Protocol, net: Net, real: Splits, replicates: int, key: Key, *, steps: int | None = None
) -> list[list[Training]]:
    """The full training data under a protocol, with the data's own labels: the candidates of each network.

    One network a replicate is enough of the full data; all of a protocol's where there is one replicate. Full batches
    of a whole dataset are nobody's practice: batches of 256, the same rates to try, and ``steps`` (those of a set of one
    batch, where they are not given).
    """
    each = protocol.nets if replicates == 1 else 1
    keys = [k for r in range(replicates) for k in networks(key, r, each)]

    def at(recipe: Recipe, k: Key) -> Training:
        recipe = recipe.but(batch=min(recipe.batch or 256, len(real.train)), steps=steps or recipe.steps)
        looks = protocol.looks(recipe) if protocol.selection == "best_validation" else ()
        return Training(real.train, net, recipe, (k,), snapshots=looks)

    return [[at(recipe, k) for recipe in protocol.recipes()] for k in keys]


def longest(by_name: Mapping[str, list[list[Training]]]) -> int | None:
    """Steps of the longest training that follows the protocol; a set of ordered steps follows its own."""
    trainings = (t for many in by_name.values() for each in many for t in each)
    return max((t.steps for t in trainings if t.order is None), default=None)


def choose(protocol: Protocol, candidates: Sequence[Population], real: Splits) -> Judged:
    """What counts: the candidate and the moment of it that is best on validation, or the last there is.

    The test split chooses nothing here, whatever the protocol's selection is.
    """
    last = candidates[-1]
    only = len(candidates) == 1 and not last.moments
    if protocol.selection != "best_validation" or only:
        return Judged(last, last.final)
    rates = [f"rate {rate:g}" for rate in protocol.rates] if len(candidates) == len(protocol.rates) else [""]
    best, highest = None, -1.0
    for population, rate in zip(candidates, rates, strict=False):
        for moment in population.moments or (None,):
            flat = population.final if moment is None else population.at(moment)
            words = [rate, "" if moment is None else f"{moment} steps"]
            one = Judged(population, flat, ", ".join(word for word in words if word), moment)
            on_validation = float(one.accuracy(real.val).mean())
            if on_validation > highest:
                best, highest = one, on_validation
    assert best is not None
    return best


def best_on_test(population: Population, real: Splits) -> torch.Tensor:
    """The highest test accuracy that each network has at its looks, [m]: what some papers report.

    It is for printing beside what counts; nothing may be decided by it.
    """
    looks = [population.at(moment) for moment in population.moments] or [population.final]
    return torch.stack([Judged(population, flat).accuracy(real.test) for flat in looks]).amax(0)


def teacher(protocol: Protocol, net: Net, real: Splits, key: Key) -> list[Training]:
    """The training of the protocol's teacher, if it has one: what ``taught`` needs."""
    return [] if protocol.teaching is None else [protocol.teaching.training(real, net, key)]


def taught(protocol: Protocol, net: Net, sets: Sets, real: Splits, runs: Runs, key: Key) -> Sets:
    """The sets with the labels that the protocol's teacher gives; as they are where it has none.

    It comes before an analysis, which must know its trainings beforehand. ``net`` is the network that is taught.
    """
    if protocol.teaching is None:
        return sets
    (population,) = runs.get(*teacher(protocol, net, real, key))
    return protocol.teaching.relabel(sets, population, protocol.recipe.augment, key)
