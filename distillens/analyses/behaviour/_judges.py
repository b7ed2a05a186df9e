"""Networks that are trained on real data and then look at a set: how they are trained and named, what they are asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Net, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.recipe import Recipe
from distillens.core.result import REPLICATE, Estimate, paired
from distillens.core.rng import Key
from distillens.train import Training

TEST = "real, test split"
UNSEEN = "real, unseen"
SEEN = "random real, seen"
ONE = f"image of one {REPLICATE}"


def recipe(data: Dataset) -> Recipe:
    """How judges are trained: Adam at a falling rate, 9 passes on digits' scale, 40 above it.

    One recipe for all, so that judges differ in their network alone; plain SGD at one rate leaves transformers far
    behind. On digits it was chosen on the validation split: the weakest judge reaches 0.92 there.
    """
    if data.shape[1] * data.shape[2] <= 256:
        return Recipe(9 * _batches(data, 64), 64, "adam", lr=0.01, schedule="cosine")
    return Recipe(40 * _batches(data, 256), 256, "adam", lr=0.001, schedule="cosine")


def published(data: Dataset) -> Recipe:
    """The paper's recipe for its ConvNet: 40 passes over the training data, batches of 256, SGD 0.01, momentum 0.9."""
    return Recipe(steps=40 * _batches(data, 256), batch=256)


def _batches(data: Dataset, batch: int) -> int:
    return -(-len(data) // batch)


def training(real: Splits, net: Net, recipe: Recipe, seeds: int, key: Key) -> Training:
    """A judge's training on all real training data; the same network, recipe and key give the same models."""
    return Training(real.train, net, recipe, key.fold("judge").split(seeds))


def shown(sets: Sets, real: Splits, key: Key) -> dict[str, list[Dataset]]:
    """What the judges are asked about, by name and replicate: the sets, a random subset, and unseen real images.

    The judges were trained on the random subset's images. The unseen ones are cut from the validation split, as many
    a class as a set holds, by a key of the replicate.
    """

    def images(many: Sequence[DistilledDataset]) -> list[Dataset]:
        return [one.dataset() for one in many]

    found = {name: images(many) for name, many in sets.distilled.items()}
    replicates = max(map(len, found.values()))
    per_class = max(1, round(next(iter(sets.distilled.values()))[0].ipc))
    if sets.random:
        found[SEEN] = images(sets.random)
    places = [key.fold("unseen", r) for r in range(replicates)]
    found[UNSEEN] = [real.val.take(real.val.drawn(per_class, place)) for place in places]
    return found


def chance(predicted: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """The exact mean share of hits [judges] over all permutations of the labels, for [judges, seeds, n]."""
    answered = F.one_hot(predicted, k).double().mean(2)  # [judges, seeds, k]
    named = F.one_hot(labels, k).double().mean(0)
    return (answered * named).sum(-1).mean(1)


def above_chance(shares: Sequence[torch.Tensor], chances: Sequence[float]) -> Estimate:
    """Shares of hits, image by image [n] for each replicate, minus what permuted labels would give.

    Where all replicates agree a spread of nothing says nothing: the images' own interval stands in for it.
    """
    means = [float(one.mean()) for one in shares]
    gain = Estimate.mean([m - c for m, c in zip(means, chances, strict=True)], REPLICATE)
    if gain.n > 1 and min(means) < max(means):
        return gain
    found = Estimate.share(means, len(shares[0]), REPLICATE)
    expected = sum(chances) / len(chances)
    return Estimate(gain.value, found.low - expected, found.high - expected, found.n, found.unit)


def difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> Estimate:
    """The mean of one thing minus that of another, given image by image [n] for each replicate; paired.

    Of a single pair the images are all there is: Welch's interval over the images of both.
    """
    pairs = min(len(first), len(second))
    if pairs > 1:
        own, other = ([float(one.mean()) for one in many[:pairs]] for many in (first, second))
        return paired(own, other, REPLICATE)
    parts = {"first": first[0].tolist(), "second": second[0].tolist()}
    return Estimate.components(float(first[0].mean() - second[0].mean()), parts, ONE)


def of_class(values: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], c: int) -> list[torch.Tensor]:
    """The values of one class, for each replicate that has it."""
    found = [one[y == c] for one, y in zip(values, labels, strict=True)]
    return [one for one in found if len(one)]
