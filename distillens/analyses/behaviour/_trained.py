"""The networks that a protocol trains on every set and on the full data, and how their figures are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from distillens.core.contracts import FULL, Net, Sets
from distillens.core.dataset import Splits
from distillens.core.result import NETWORK, REPLICATE, Estimate, paired, units
from distillens.core.rng import Key
from distillens.evaluation.protocol import Protocol
from distillens.evaluation.teaching import check_labels
from distillens.evaluation.trials import Judged, choose, longest, of_full, of_sets
from distillens.runs import Runs
from distillens.train import Training


def asked(protocol: Protocol, net: Net, sets: Sets, real: Splits, key: Key) -> list[Training]:
    """What ``judged`` needs: the trainings of behaviour/accuracy on the sets, baselines and full data."""
    found = of_sets(protocol, net, sets.everything(), key)
    full = _full(protocol, net, sets, real, key)
    return [t for many in (*found.values(), full) for each in many for t in each]


def judged(
    protocol: Protocol, net: Net, sets: Sets, real: Splits, runs: Runs, key: Key
) -> dict[str, list[Judged]]:
    """The networks that count of each replicate, by set; the full data's under ``FULL``, one network in each entry."""
    check_labels(protocol.teaching, protocol.name, sets)
    runs.make(asked(protocol, net, sets, real, key))
    found = {
        name: [choose(protocol, runs.get(*each), real) for each in replicates]
        for name, replicates in of_sets(protocol, net, sets.everything(), key).items()
    }
    full = [choose(protocol, runs.get(*each), real) for each in _full(protocol, net, sets, real, key)]
    return {**found, FULL: full}


def by_replicate(name: str, values: Sequence[torch.Tensor], replicates: int) -> torch.Tensor:
    """Values [networks, ...] of each replicate as [replicates, networks, ...].

    The full data has one network a replicate; where there is one replicate, its networks are that replicate's.
    """
    stacked = torch.stack(list(values))
    return stacked.transpose(0, 1) if name == FULL and replicates == 1 else stacked


def difference(values: Mapping[str, torch.Tensor], name: str, against: str) -> Estimate | None:
    """Values [replicates, networks] of one set minus another's, paired; None where the other is not there."""
    if against not in values:
        return None
    first, second = values[name], values[against]
    pairs = min(len(first), len(second))
    if pairs == 1:
        networks = min(first.shape[1], second.shape[1])
        return paired(first[0, :networks].tolist(), second[0, :networks].tolist(), NETWORK)
    return paired(units(first[:pairs])[0], units(second[:pairs])[0], REPLICATE)


def single(values: Mapping[str, torch.Tensor], names: Sequence[str]) -> tuple[str, ...]:
    """What to say of sets of which there is one."""
    alone = [name for name in names if len(values[name]) == 1]
    return (f"{', '.join(alone)}: one set, the interval covers training only.",) if alone else ()


def _full(protocol: Protocol, net: Net, sets: Sets, real: Splits, key: Key) -> list[list[Training]]:
    everything = sets.everything()
    steps = longest(of_sets(protocol, net, everything, key))
    return of_full(protocol, net, real, max(map(len, everything.values())), key, steps=steps)
