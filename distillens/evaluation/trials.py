"""What a protocol trains on a set, and which of it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Net
from distillens.core.dataset import Dataset, Splits
from distillens.core.rng import Key
from distillens.evaluation.protocol import Protocol
from distillens.train import Population, Training, networks, on


@dataclass(frozen=True, eq=False)
class Judged:
    """The models of a protocol that count: m networks with parameters [m, P].

    ``candidate`` names the rate and steps that were chosen; it is empty where there was nothing to choose.
    """

    population: Population
    flat: torch.Tensor
    candidate: str = ""

    def logits(self, data: Dataset) -> torch.Tensor:
        """Logits [m, n, k]."""
        return self.population.logits(data, self.flat)

    def accuracy(self, data: Dataset) -> torch.Tensor:
        """The share of images that each network gets right, [m]."""
        return (self.logits(data).argmax(-1) == data.labels.hard()).double().mean(1)


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
    recipes = protocol.recipes(distilled if of is None else of)
    return [replace(on(distilled, net, recipe, keys), snapshots=protocol.moments) for recipe in recipes]


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


def of_full(protocol: Protocol, net: Net, real: Splits, replicates: int, key: Key) -> list[Training]:
    """The full training data under a protocol: one training a network.

    One network a replicate is enough of the full data; all of a protocol's where there is one replicate. Full batches
    of a whole dataset are nobody's practice: batches of 256, the same steps and rate.
    """
    each = protocol.nets if replicates == 1 else 1
    keys = [k for r in range(replicates) for k in networks(key, r, each)]
    recipe = protocol.recipes()[0]
    recipe = recipe.but(batch=min(recipe.batch or 256, len(real.train)))
    return [Training(real.train, net, recipe, (k,), snapshots=protocol.moments) for k in keys]


def choose(protocol: Protocol, candidates: Sequence[Population], real: Splits) -> Judged:
    """The candidate, and the moment of it, that is best on validation."""
    best, highest = None, -1.0
    for population, recipe in zip(candidates, protocol.recipes(), strict=False):
        for moment in population.moments or (None,):
            flat = population.final if moment is None else population.at(moment)
            if len(candidates) == 1 and not population.moments:
                return Judged(population, flat)
            one = Judged(population, flat, f"rate {recipe.lr:g}, {moment or recipe.steps} steps")
            on_validation = float(one.accuracy(real.val).mean())
            if on_validation > highest:
                best, highest = one, on_validation
    assert best is not None
    return best
